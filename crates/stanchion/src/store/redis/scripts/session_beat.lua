-- KEYS: session.  ARGV: memory (ms)
local time = redis.call('TIME')
local now = string.format('%016.0f', tonumber(time[1]) * 1000000 + tonumber(time[2]))
local session = redis.call('GET', KEYS[1])
if not session or string.sub(session, 1, 16) <= now then return { 'gone', now } end
local until_ = string.format('%016.0f', tonumber(now) + tonumber(string.sub(session, 17, 32)))
-- Allowed when memory is short, and makes what follows it allowed too.
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('SET', KEYS[1], until_ .. string.sub(session, 17), 'PX', ARGV[1])
local answer = { 'alive', now }
-- What was damaged by others is passed over: the session lives all the same.
local ok, lost = pcall(cmsgpack.unpack, string.sub(session, 33))
if #session > 32 and ok and type(lost) == 'table' then
  for token, what in pairs(lost) do
    if type(token) == 'string' and type(what) == 'string' then
      answer[#answer + 1] = token
      answer[#answer + 1] = what
    end
  end
end
return answer
