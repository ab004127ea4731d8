-- Records that a hold of this session was force-released. Renewals report it until its token is released.
-- KEYS: session.  ARGV: token and loss, or the token alone, which removes the loss.
local time = redis.call('TIME')
local now = string.format('%016.0f', tonumber(time[1]) * 1000000 + tonumber(time[2]))
local session = redis.call('GET', KEYS[1])
if session and string.sub(session, 1, 16) > now then
  local lost = #session > 32 and cmsgpack.unpack(string.sub(session, 33)) or {}
  if lost[ARGV[1]] ~= ARGV[2] then
    lost[ARGV[1]] = ARGV[2]
    local life = redis.call('PTTL', KEYS[1])
    -- The server allows this when memory is short, and then allows the write after it.
    redis.call('PEXPIRE', KEYS[1], life)
    redis.call('SET', KEYS[1], string.sub(session, 1, 32) .. (next(lost) and cmsgpack.pack(lost) or ''), 'PX', life)
  end
end
return { 'recorded', now }
