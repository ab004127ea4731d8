-- ARGV: fence, loss
reconcile()
local answer
for at, hold in ipairs(state.holds) do
  if hold.fence == ARGV[1] then
    table.remove(state.holds, at)
    if not next_fence() then return OUT_OF_FENCES end
    state.forced[hold.token] = { session = hold.session, fence = hold.fence, at = now }
    answer = { 'force released', now, hold.session, hold.token }
    -- Only a hint, but published here, so that it is sent even if the caller fails before it records the loss.
    redis.pcall('PUBLISH', PREFIX .. 'session:{' .. hold.session .. '}', 'F' .. hold.token .. ARGV[2])
    break
  end
end
if not answer then
  answer = { 'no such hold', now, '', '' }
  for token, forced in pairs(state.forced) do
    -- The request is repeated, because its answer was lost or the holder has not been notified yet.
    if forced.fence == ARGV[1] then answer[3], answer[4] = forced.session, token end
  end
  for _, hold in ipairs(state.holds) do answer[#answer + 1] = hold.fence end
end
reconcile()
save()
return answer
