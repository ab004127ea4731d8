-- Ends the holds and waiters of expired sessions. They never become alive again, so this is safe however late it
-- happens.
-- ARGV: sessions
local expired = {}
for _, session in ipairs(ARGV) do expired[session] = true end
local live = {}
for _, hold in ipairs(state.holds) do
  if not ends_with_its_session(hold) or not expired[hold.session] then live[#live + 1] = hold end
end
if #live < #state.holds then state.holds, changed = live, true end
for token, forced in pairs(state.forced) do
  if expired[forced.session] then state.forced[token], changed = nil, true end
end
if state.queued then
  local waiting = call('HGETALL', KEYS[3])
  for at = 2, #waiting, 2 do
    if expired[cmsgpack.unpack(waiting[at]).session] then dequeue(waiting[at - 1]) end
  end
end
reconcile()
save()
return { 'reaped', now }
