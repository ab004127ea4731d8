reconcile()
local token, answer = ARGV[1], nil
local hold, at = find(token)
local forced = state.forced[token]
if forced then state.forced[token], changed = nil, true end
if hold then
  table.remove(state.holds, at)
  changed = true
  if ARGV[2] then
    local closed = plus(now, ARGV[2])
    if not state.closed or state.closed < closed then state.closed = closed end
  end
  answer = { 'released', now }
elseif state.queued and call('ZSCORE', KEYS[2], token) then
  dequeue(token)
  answer = { 'dequeued', now }
else
  answer = { 'nothing', now }
end
if forced then answer[3] = forced.session end
reconcile()
save()
return answer
