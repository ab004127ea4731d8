-- The beginning of a script without a fast path.
local call = redis.call
local record = call('GET', KEYS[1])
local time = call('TIME')
local now = time[2]
now = time[1] .. (#now == 6 and now or string.sub('00000' .. now, -6))
