-- Returns how long sessions remain alive without a renewal, in µs; 0 for a session that has expired for good.
-- KEYS: sessions
--
-- An expired session is marked as expired. A server that has become a replica, and lacks newer renewals, rejects that
-- write. Without it, a live session could look expired there, and be reaped at the new primary.
local time = redis.call('TIME')
local now = string.format('%016.0f', tonumber(time[1]) * 1000000 + tonumber(time[2]))
local EXPIRED = '00000000000000000000000000000000'
local answer = { 'remaining', now }
for at, key in ipairs(KEYS) do
  local session = redis.call('GET', key)
  local left = session and tonumber(string.sub(session, 1, 16)) - tonumber(now) or 0
  -- The next renewal sets it to the ttl, even if the clock was set back since the last one.
  if left > 0 then left = math.min(left, tonumber(string.sub(session, 17, 32))) end
  if left <= 0 and session ~= EXPIRED then
    local life = string.format('%.0f', math.max(redis.call('PTTL', key), 120000))
    -- The server allows this when memory is short, and then allows the write after it.
    redis.call('DEL', key)
    redis.call('SET', key, EXPIRED, 'PX', life)
  end
  answer[at + 2] = string.format('%.0f', math.max(0, left))
end
return answer
