-- Fast path of acquire: grants a mutex without holder and waiters with one GET and one SET. Everything else is below.
-- KEYS: record, queue, waiting
-- ARGV: not_after .. enqueue (0 or 1) .. token .. session .. kind .. texts
--       and, unless it is a mutex without a deadline: lifetime (µs, 0: none), units, capacity, life of the record (ms)
local call = redis.call
local record = call('GET', KEYS[1])
local time = call('TIME')
local now = time[2]
now = time[1] .. (#now == 6 and now or string.sub('00000' .. now, -6))
if not ARGV[2] and now <= string.sub(ARGV[1], 1, 17)
  and (not record or #record == 17 and string.byte(record) == 48 and string.sub(record, 2) < now) then
  call('SET', KEYS[1], '1' .. now .. now .. string.sub(ARGV[1], 18), 'PX', '86400000')
  return now
end
