-- KEYS: session.  ARGV: retention (ms)
local time = redis.call('TIME')
local now = string.format('%016.0f', tonumber(time[1]) * 1000000 + tonumber(time[2]))
local session = redis.call('GET', KEYS[1])
if not session or string.sub(session, 1, 16) <= now then return { 'gone', now } end
local alive_until = string.format('%016.0f', tonumber(now) + tonumber(string.sub(session, 17, 32)))
-- The server allows this when memory is short, and then allows the write after it.
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('SET', KEYS[1], alive_until .. string.sub(session, 17), 'PX', ARGV[1])
local answer = { 'alive', now }
-- An entry that somebody else damaged is skipped, and the session stays alive.
local ok, lost = pcall(cmsgpack.unpack, string.sub(session, 33))
if #session > 32 and ok and type(lost) == 'table' then
  for token, loss in pairs(lost) do
    if type(token) == 'string' and type(loss) == 'string' then
      answer[#answer + 1] = token
      answer[#answer + 1] = loss
    end
  end
end
return answer
