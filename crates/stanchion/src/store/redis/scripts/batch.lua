-- Several short steps at once: what acquire and end do in their short way, and nothing else.
-- KEYS: the record of each.
-- ARGV of each: what the script of that step takes, which is longer than a token where something is asked for.
-- Answers the time, and for each step a + if it was done, or a - if it is to be done alone: then nothing was.
local pcall = redis.pcall
local byte, sub = string.byte, string.sub
local time = redis.call('TIME')
local now = time[2]
now = time[1] .. (#now == 6 and now or sub('00000' .. now, -6))
-- One call for all: calls are what costs.
local records = redis.call('MGET', unpack(KEYS))
local written = {}
local signs = {}
for at = 1, #KEYS do
  local key, asked = KEYS[at], ARGV[at]
  local record = written[key] or records[at]
  local new, life
  if #asked > 32 then
    if now <= sub(asked, 1, 17) and (not record or #record == 17 and byte(record) == 48 and sub(record, 2) < now) then
      new, life = '1' .. now .. now .. sub(asked, 18), '86400000'
    end
  elseif record and byte(record) == 49 and sub(record, 34, 65) == asked then
    new, life = '0' .. sub(record, 2, 17), '600000'
  end
  -- What is no string looks like nothing here, and is not written over.
  local done = new and (record and pcall('SET', key, new, 'PX', life) or pcall('SET', key, new, 'PX', life, 'NX'))
  if done and not done.err then
    written[key] = new
    signs[at] = '+'
  else
    signs[at] = '-'
  end
end
return now .. table.concat(signs)
