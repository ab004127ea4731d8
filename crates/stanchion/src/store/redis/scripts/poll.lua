reconcile()
local held = {}
for _, hold in ipairs(state.holds) do held[hold.token] = hold end
-- For each token: its hold, or the number of waiters ahead of it, or nothing.
local rows, front = {}, nil
for at, token in ipairs(ARGV) do
  local hold, ahead = held[token], nil
  if not hold and state.queued then ahead = call('ZRANK', KEYS[2], token) end
  if hold then
    mark_seen(hold)
    rows[at] = { hold.fence, remaining(hold), hold.kind == 'S' and hold.session or '' }
  elseif ahead then
    rows[at] = { tostring(ahead) }
    if not front or ahead < front then front = ahead end
  else
    rows[at] = {}
  end
end
local answer = { 'polled', now, rows, check_in(), in_use() }
if front then
  remind_holders(front)
  blocking_sessions(answer)
end
save()
return answer
