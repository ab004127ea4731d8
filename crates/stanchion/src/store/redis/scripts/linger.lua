-- Marks a hold as lingering, and raises the key's last fence to the time: the holder may use the fences up to that one.
-- ARGV: token, and 1 if the holder's session hears recalls, or 0
reconcile()
local hold = find(ARGV[1])
local answer = { hold and 'wanted' or 'gone', now }
if hold and ARGV[2] == '1' and not state.queued
  and hold.units == hold.capacity and hold.kind == 'S' and not hold.deadline then
  hold.lingers, changed = true, true
  if not state.last or state.last < now then state.last = now end
  answer = { 'lingers', now, hold.fence, state.last }
end
local is_saved, fault = pcall(save, true)
if not is_saved then
  local text = type(fault) == 'table' and fault.err or tostring(fault)
  if not string.find(text, 'OOM ', 1, true) then error(fault, 0) end
  -- Memory is short, and nothing was written. The holder then gives up a hold that it does not use.
  answer = { hold and 'wanted' or 'gone', now }
end
return answer
