-- Several short steps at once: what acquire and end do in their short way, and nothing else.
-- KEYS: the record of each.
-- ARGV of each: A not_after enqueue token session kind texts, or the token that is to be ended.
-- Answers the time, and for each step a + if it was done, or a - if it is to be done alone: then nothing was.
local call, pcall = redis.call, redis.pcall
local byte, sub = string.byte, string.sub
local time = call('TIME')
local now = time[2]
now = time[1] .. (#now == 6 and now or sub('00000' .. now, -6))
local answer = now
for at = 1, #KEYS do
  local key, asked, done = KEYS[at], ARGV[at], false
  local record = pcall('GET', key)
  if byte(asked) == 65 then
    if now <= sub(asked, 2, 18) and (not record or #record == 17 and sub(record, 2) < now) then
      done = not pcall('SET', key, '1' .. now .. now .. sub(asked, 19), 'PX', '86400000').err
    end
  elseif type(record) == 'string' and byte(record) == 49 and sub(record, 34, 65) == asked then
    done = not pcall('SET', key, '0' .. sub(record, 2, 17), 'PX', '600000').err
  end
  answer = answer .. (done and '+' or '-')
end
return answer
