settle()
local token, answer = ARGV[1], nil
local hold = find(token)
if hold then
  answer = granted(hold)
  if hold.kind == 'S' then answer[5] = hold.session end
elseif state.queued and call('ZSCORE', KEYS[2], token) then
  answer = queued(token)
else
  answer = { 'gone', now }
end
save()
return answer
