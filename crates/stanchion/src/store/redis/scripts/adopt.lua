-- ARGV: from, to, session, owner as a text, not_after, life of the record (ms)
reconcile()
local hold = find(ARGV[2])
local answer
if hold then
  write_again()
else
  if now > ARGV[5] then
    answer = { 'stale', now }
  else
    hold = find(ARGV[1])
    if hold then
      -- Owner is the first of the texts; the others stay.
      local length = string.match(hold.texts, '^(%d+):')
      hold.texts = ARGV[4] .. string.sub(hold.texts, #length + 2 + tonumber(length))
      hold.token, hold.session, changed = ARGV[2], ARGV[3], true
      if hold.lingers then
        -- The old holder may have used all fences up to the last one. After the highest fence nothing more is granted,
        -- so the fence need not be higher.
        hold.lingers, hold.fence = nil, next_fence() or state.last
      end
      local life = tonumber(ARGV[6])
      if life > RECORD_LIFE and life > tonumber(state.life or 0) then state.life = ARGV[6] end
    else
      answer = { 'gone', now }
    end
  end
end
if hold then
  answer = { 'adopted', now, hold.fence, remaining(hold), hold.kind }
end
save()
return answer
