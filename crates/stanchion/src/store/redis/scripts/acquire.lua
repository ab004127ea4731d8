reconcile()
local sender = string.sub(ARGV[1], 18)
local token = string.sub(sender, 1, 32)
local request = {
  token = token, session = string.sub(sender, 33, 64), kind = string.sub(sender, 65, 65),
  texts = string.sub(sender, 66),
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
elseif not state.queued and not state.closed and fits(request, usage()) then
  if life > RECORD_LIFE and life > tonumber(state.life or 0) then state.life = ARGV[5] end
  local hold = grant(request)
  if not hold then return OUT_OF_FENCES end
  answer = granted(hold)
elseif string.sub(ARGV[1], 17, 17) == '0' then
  answer = blocking_sessions({ 'busy', now, check_in(), in_use(), lingers() })
elseif state.queued and call('ZCARD', KEYS[2]) >= MAX_WAITERS then
  answer = { 'full', now, tostring(MAX_WAITERS) }
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
  -- In this order, because every token in the queue must have its request, even if the right to the second command is
  -- missing.
  call('HSET', KEYS[3], token, cmsgpack.pack(request))
  call('ZADD', KEYS[2], string.format('%.0f', (tonumber(last) or 0) + 1), token)
  state.queued, changed = true, true
  if life > RECORD_LIFE and life > tonumber(state.life or 0) then state.life = ARGV[5] end
  answer = queued(token)
end
save(true)
return answer
