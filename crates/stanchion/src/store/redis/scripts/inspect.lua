reconcile()
save()
local holds, waiters = {}, {}
for _, hold in ipairs(state.holds) do
  holds[#holds + 1] = {
    hold.fence, tostring(hold.units), hold.kind, hold.session, hold.at, remaining(hold), hold.texts,
    ends_with_its_session(hold) and '1' or '', tostring(hold.capacity),
    hold.lingers and '1' or '',
  }
end
if state.queued then
  for _, token in ipairs(call('ZRANGE', KEYS[2], 0, -1)) do
    local waiter = cmsgpack.unpack(call('HGET', KEYS[3], token))
    waiters[#waiters + 1] = {
      tostring(waiter.units), waiter.session, waiter.at, waiter.texts, tostring(waiter.capacity),
    }
  end
end
local closed = state.closed and minus(state.closed, now) or ''
return { 'inspected', now, state.last or '', closed, holds, waiters }
