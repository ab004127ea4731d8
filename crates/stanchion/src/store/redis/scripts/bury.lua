-- Ends what sessions have that are dead. That they never live again is what makes it safe, however late it comes.
-- ARGV: sessions
local dead = {}
for _, session in ipairs(ARGV) do dead[session] = true end
local kept = {}
for _, hold in ipairs(state.holds) do
  if not ends_with_its_session(hold) or not dead[hold.session] then kept[#kept + 1] = hold end
end
if #kept < #state.holds then state.holds, changed = kept, true end
for token, forced in pairs(state.forced) do
  if dead[forced.session] then state.forced[token], changed = nil, true end
end
if state.queued then
  local waiting = call('HGETALL', KEYS[3])
  for at = 2, #waiting, 2 do
    if dead[cmsgpack.unpack(waiting[at]).session] then dequeue(waiting[at - 1]) end
  end
end
settle()
save()
return { 'buried', now }
