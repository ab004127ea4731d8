reconcile()
local hold = find(ARGV[1])
local answer = { 'not held', now }
if hold and hold.deadline then
  hold.deadline, changed = plus(now, ARGV[2]), true
  answer = { 'extended', now }
end
reconcile()
save()
return answer
