-- KEYS: session.  ARGV: retention (ms)
local time = redis.call('TIME')
local now = string.format('%016.0f', tonumber(time[1]) * 1000000 + tonumber(time[2]))
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1], '00000000000000000000000000000000', 'PX', ARGV[1])
return { 'closed', now }
