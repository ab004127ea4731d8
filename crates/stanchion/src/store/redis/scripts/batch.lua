-- Runs several short calls at once: the fast paths of acquire and end, and nothing else.
-- KEYS: the record of each call.
-- ARGV: the argument of each call. The argument of an acquire is longer than a token.
-- Returns the time, and for each call a + if it was done, or a - if it was skipped without any effect.
local pcall = redis.pcall
local byte, sub = string.byte, string.sub
local time = redis.call('TIME')
local now = time[2]
now = time[1] .. (#now == 6 and now or sub('00000' .. now, -6))
-- One command for all records, because each command has a cost.
local records = redis.call('MGET', unpack(KEYS))
local written = {}
local signs = {}
for at = 1, #KEYS do
  local key, request = KEYS[at], ARGV[at]
  local record = written[key] or records[at]
  local new, life
  if #request > 32 then
    if now <= sub(request, 1, 17) and (not record or #record == 17 and byte(record) == 48 and sub(record, 2) < now) then
      new, life = '1' .. now .. now .. sub(request, 18), '86400000'
    end
  elseif record and byte(record) == 49 and sub(record, 34, 65) == request then
    new, life = '0' .. sub(record, 2, 17), '600000'
  end
  -- A value that is not a string looks like a missing one here, and must not be overwritten.
  local done = new and (record and pcall('SET', key, new, 'PX', life) or pcall('SET', key, new, 'PX', life, 'NX'))
  if done and not done.err then
    written[key] = new
    signs[at] = '+'
  else
    signs[at] = '-'
  end
end
return now .. table.concat(signs)
