-- A session: until when it lives and its ttl, both in 16 digits of µs, and behind them what was taken from it by force, if
-- there is something: what cmsgpack makes of a table by token. All in one key: a cluster that moves a slot refuses what
-- has two of which one is not there. The key stays when the session is over, so that a late question to open it again is
-- refused.
-- KEYS: session.  ARGV: ttl (µs), memory (ms)
local time = redis.call('TIME')
local now = string.format('%016.0f', tonumber(time[1]) * 1000000 + tonumber(time[2]))
local session = redis.call('GET', KEYS[1])
if session then
  return { string.sub(session, 1, 16) > now and 'opened' or 'gone', now }
end
local until_ = string.format('%016.0f', tonumber(now) + tonumber(ARGV[1]))
redis.call('SET', KEYS[1], until_ .. string.format('%016.0f', tonumber(ARGV[1])), 'PX', ARGV[2])
return { 'opened', now }
