-- Extends the life of a record that a live session holds.
-- ARGV: token
local answer = { find(ARGV[1]) and 'held' or 'gone', now }
if find(ARGV[1]) then
  local life = string.format('%.0f', math.max(RECORD_LIFE, tonumber(state.life or 0)))
  if call('PTTL', KEYS[1]) < tonumber(life) then call('PEXPIRE', KEYS[1], life) end
  if state.queued then
    call('PEXPIRE', KEYS[2], life)
    call('PEXPIRE', KEYS[3], life)
  end
end
return answer
