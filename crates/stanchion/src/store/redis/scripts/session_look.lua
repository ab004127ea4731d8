-- How long sessions live if they do not beat, in µs. 0: dead, and from here on for good.
-- KEYS: sessions
--
-- What looks dead is written down as dead. A server that has become a replica, and knows of no newer beat, refuses that;
-- without it a live session could be taken for dead there, and be buried at the new primary.
local time = redis.call('TIME')
local now = string.format('%016.0f', tonumber(time[1]) * 1000000 + tonumber(time[2]))
local OVER = '00000000000000000000000000000000'
local answer = { 'seen', now }
for at, key in ipairs(KEYS) do
  local session = redis.call('GET', key)
  local left = session and tonumber(string.sub(session, 1, 16)) - tonumber(now) or 0
  -- Its next beat sets it to its ttl, whatever a clock that was set back makes of the last one.
  if left > 0 then left = math.min(left, tonumber(string.sub(session, 17, 32))) end
  if left <= 0 and session ~= OVER then
    local life = string.format('%.0f', math.max(redis.call('PTTL', key), 120000))
    -- Allowed when memory is short, and makes what follows it allowed too.
    redis.call('DEL', key)
    redis.call('SET', key, OVER, 'PX', life)
  end
  answer[at + 2] = string.format('%.0f', math.max(0, left))
end
return answer
