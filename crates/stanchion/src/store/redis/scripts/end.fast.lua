-- end: the release of a mutex that nobody waits for. One GET, one SET; all else is further down.
-- KEYS: record, queue, waiting
-- ARGV: token and, if there is one: cooldown (µs)
local call = redis.call
local record = call('GET', KEYS[1])
local time = call('TIME')
local now = time[2]
now = time[1] .. (#now == 6 and now or string.sub('00000' .. now, -6))
if record and not ARGV[2] and string.byte(record) == 49 and string.sub(record, 34, 65) == ARGV[1] then
  local idle = '0' .. string.sub(record, 2, 17)
  if redis.pcall('SET', KEYS[1], idle, 'PX', '600000').err then
    -- Out of memory: freeing some is allowed, and so is what the same script does after that.
    call('DEL', KEYS[1])
    call('SET', KEYS[1], idle, 'PX', '600000')
  end
  return now
end
