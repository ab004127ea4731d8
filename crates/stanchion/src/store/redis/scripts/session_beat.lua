-- KEYS: session, lost.  ARGV: memory (ms)
local time = redis.call('TIME')
local now = string.format('%016.0f', tonumber(time[1]) * 1000000 + tonumber(time[2]))
local session = redis.call('GET', KEYS[1])
if not session or string.sub(session, 1, 16) <= now then return { 'gone', now } end
local ttl = string.sub(session, 17, 32)
local renewed = string.format('%016.0f', tonumber(now) + tonumber(ttl)) .. ttl
-- Allowed when memory is short, and makes what follows it allowed too.
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('SET', KEYS[1], renewed, 'PX', ARGV[1])
local lost = redis.call('HGETALL', KEYS[2])
if #lost > 0 then redis.call('PEXPIRE', KEYS[2], ARGV[1]) end
table.insert(lost, 1, 'alive')
table.insert(lost, 2, now)
return lost
