-- How long sessions live if they do not beat, in µs. 0: dead.
-- KEYS: sessions
local time = redis.call('TIME')
local now = string.format('%016.0f', tonumber(time[1]) * 1000000 + tonumber(time[2]))
local answer = { 'seen', now }
for at, key in ipairs(KEYS) do
  local session = redis.call('GET', key)
  local left = session and tonumber(string.sub(session, 1, 16)) - tonumber(now) or 0
  answer[at + 2] = string.format('%.0f', math.max(0, left))
end
return answer
