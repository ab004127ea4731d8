-- A hold of this session was released by force: its beats say so until its token is ended.
-- KEYS: session.  ARGV: token and what was lost, or the token alone: it is ended, and need not be told any longer.
local time = redis.call('TIME')
local now = string.format('%016.0f', tonumber(time[1]) * 1000000 + tonumber(time[2]))
local session = redis.call('GET', KEYS[1])
if session and string.sub(session, 1, 16) > now then
  local lost = #session > 32 and cmsgpack.unpack(string.sub(session, 33)) or {}
  if lost[ARGV[1]] ~= ARGV[2] then
    lost[ARGV[1]] = ARGV[2]
    local life = redis.call('PTTL', KEYS[1])
    -- Allowed when memory is short, and makes what follows it allowed too.
    redis.call('PEXPIRE', KEYS[1], life)
    redis.call('SET', KEYS[1], string.sub(session, 1, 32) .. (next(lost) and cmsgpack.pack(lost) or ''), 'PX', life)
  end
end
return { 'told', now }
