-- Opens a session. Its record has the time until which it lives and its ttl, both in 16 digits of µs, followed by its
-- force-released tokens, if there are any, as a table by token that cmsgpack packed. All this is in one key, because a
-- cluster that moves a slot rejects a request with two keys of which one does not exist. The key stays after the
-- session has ended, so that a late request cannot open it again.
-- KEYS: session.  ARGV: ttl (µs), retention (ms)
local time = redis.call('TIME')
local now = string.format('%016.0f', tonumber(time[1]) * 1000000 + tonumber(time[2]))
local session = redis.call('GET', KEYS[1])
if session then
  return { string.sub(session, 1, 16) > now and 'opened' or 'gone', now }
end
local alive_until = string.format('%016.0f', tonumber(now) + tonumber(ARGV[1]))
redis.call('SET', KEYS[1], alive_until .. string.format('%016.0f', tonumber(ARGV[1])), 'PX', ARGV[2])
return { 'opened', now }
