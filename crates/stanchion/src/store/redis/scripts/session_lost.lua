-- A hold of this session was released by force: its beats say so until its token is ended.
-- KEYS: session, lost.  ARGV: token, what was lost
local time = redis.call('TIME')
local now = string.format('%016.0f', tonumber(time[1]) * 1000000 + tonumber(time[2]))
local session = redis.call('GET', KEYS[1])
if session and string.sub(session, 1, 16) > now then
  redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
  redis.call('PEXPIRE', KEYS[2], redis.call('PTTL', KEYS[1]))
end
return { 'told', now }
