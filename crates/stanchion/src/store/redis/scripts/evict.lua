-- ARGV: fence, what was lost
settle()
local answer
for at, hold in ipairs(state.holds) do
  if hold.fence == ARGV[1] then
    table.remove(state.holds, at)
    if not next_fence() then return OUT_OF_FENCES end
    state.forced[hold.token] = { session = hold.session, fence = hold.fence, at = now }
    answer = { 'evicted', now, hold.session, hold.token }
    -- A hint, in the very step: also where whoever evicts does not come to tell the session.
    redis.pcall('PUBLISH', PREFIX .. 'session:{' .. hold.session .. '}', 'F' .. hold.token .. ARGV[2])
    break
  end
end
if not answer then
  answer = { 'no such hold', now, '', '' }
  for token, forced in pairs(state.forced) do
    -- Asked again, because the first answer was lost or the victim has not been told yet.
    if forced.fence == ARGV[1] then answer[3], answer[4] = forced.session, token end
  end
  for _, hold in ipairs(state.holds) do answer[#answer + 1] = hold.fence end
end
settle()
save()
return answer
