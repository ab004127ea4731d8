settle()
local who = string.sub(ARGV[1], 18)
local token = string.sub(who, 1, 32)
local asked = {
  token = token, session = string.sub(who, 33, 64), kind = string.sub(who, 65, 65), texts = string.sub(who, 66),
  term = ARGV[2] or '0', units = tonumber(ARGV[3] or 1), capacity = tonumber(ARGV[4] or 1), at = now,
}
local life = tonumber(ARGV[5] or 0)
local answer
local held = find(token)
if state.forced[token] then
  answer = { 'forced', now }
elseif held then
  write_again()
  answer = granted(held)
elseif state.queued and call('ZSCORE', KEYS[2], token) then
  answer = queued(token)
elseif now > string.sub(ARGV[1], 1, 16) then
  answer = { 'stale', now }
elseif not state.queued and not state.closed and fits(asked, taken()) then
  if life > DAY and life > tonumber(state.life or 0) then state.life = ARGV[5] end
  local hold = grant(asked)
  if not hold then return OUT_OF_FENCES end
  answer = granted(hold)
elseif string.sub(ARGV[1], 17, 17) == '0' then
  answer = in_the_way({ 'busy', now, check_in(), in_use() })
elseif state.queued and call('ZCARD', KEYS[2]) >= MOST_WAITERS then
  answer = { 'full', now, tostring(MOST_WAITERS) }
  local seen = {}
  for _, waiter in ipairs(call('HVALS', KEYS[3])) do
    local session = cmsgpack.unpack(waiter).session
    if not seen[session] then
      seen[session] = true
      answer[#answer + 1] = session
    end
  end
else
  local last = call('ZRANGE', KEYS[2], -1, -1, 'WITHSCORES')[2]
  -- In this order: what is in the queue has what it asks for, also where a right is missing for the second one.
  call('HSET', KEYS[3], token, cmsgpack.pack(asked))
  call('ZADD', KEYS[2], string.format('%.0f', (tonumber(last) or 0) + 1), token)
  state.queued, changed = true, true
  if life > DAY and life > tonumber(state.life or 0) then state.life = ARGV[5] end
  answer = queued(token)
end
save(true)
return answer
