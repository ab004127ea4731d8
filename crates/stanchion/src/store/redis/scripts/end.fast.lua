-- Fast path of end: releases a mutex without waiters with one GET and one SET. Everything else is below.
-- KEYS: record, queue, waiting
-- ARGV: token and, optionally: cooldown (µs)
local call = redis.call
local record = call('GET', KEYS[1])
local time = call('TIME')
local now = time[2]
now = time[1] .. (#now == 6 and now or string.sub('00000' .. now, -6))
if record and not ARGV[2] and string.byte(record) == 49 and string.sub(record, 34, 65) == ARGV[1] then
  local idle = '0' .. string.sub(record, 2, 17)
  if redis.pcall('SET', KEYS[1], idle, 'PX', '600000').err then
    -- Memory is short: the server then allows deleting, and further writes of the same script.
    call('DEL', KEYS[1])
    call('SET', KEYS[1], idle, 'PX', '600000')
  end
  return now
end
