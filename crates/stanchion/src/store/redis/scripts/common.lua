-- The record of a key, and the rules for it. `record` and `now` are there already.
--
-- A record is one of
--   '0' fence [closed]                          nobody has it: the newest fence, and until when it is closed
--   '1' fence at token session kind texts       one mutex without a deadline, and nobody waits
--   '2' and what cmsgpack makes of `state`      everything else
-- Fences and times are 16 digits, so that text order is number order and no digit is lost: a Lua number is exact up to
-- 2^53 only. Tokens and sessions are 32 hexadecimal digits, a kind is S (ends with its session) or F (fixed term).
-- Those who wait are in two keys that exist only then: `queue`, their tokens in order, and `waiting`, what they ask for.
-- A script sees sessions as names only: who reads the answer asks whether they live, and has the dead buried.

local DAY = 86400000
-- A fence is remembered this long after the last release: a clock that is set back by less does no harm.
local IDLE = 600000
-- For so long a token that was forced out is refused, in µs.
local FORCED = 3600000000
local MOST_WAITERS = 10000
local SUBJECT = KEYS[1]
local PREFIX = string.match(SUBJECT, '^[^{]*')

if #now < 16 then now = string.rep('0', 16 - #now) .. now end

local function plus(at, span)
  return string.format('%016.0f', tonumber(at) + tonumber(span))
end

local function minus(at, from)
  return string.format('%.0f', math.max(0, tonumber(at) - tonumber(from)))
end

-- Whether the record is to be written.
local changed = false

local state
local function is_record()
  local form = string.byte(record)
  if form == 48 then return (#record == 17 or #record == 33) and not string.find(record, '%D') end
  if form == 49 then
    return #record >= 98 and not string.find(string.sub(record, 2, 33), '%D')
      and not string.find(string.sub(record, 34, 97), '%X') and string.find(record, '^[SF]', 98)
  end
  if form == 50 then
    local ok, read = pcall(cmsgpack.unpack, string.sub(record, 2))
    return ok and type(read) == 'table' and type(read.holds) == 'table' and type(read.forced) == 'table'
  end
end
if record and not is_record() then
  return redis.error_reply('RECORD the record of this key was not written by this library')
end
if not record then
  state = { holds = {}, forced = {} }
elseif string.byte(record) == 48 then
  state = { holds = {}, forced = {}, last = string.sub(record, 2, 17) }
  if #record > 17 then state.closed = string.sub(record, 18, 33) end
elseif string.byte(record) == 49 then
  local fence = string.sub(record, 2, 17)
  state = { forced = {}, last = fence, holds = { {
    fence = fence, at = string.sub(record, 18, 33), token = string.sub(record, 34, 65),
    session = string.sub(record, 66, 97), kind = string.sub(record, 98, 98), texts = string.sub(record, 99),
    units = 1, capacity = 1,
  } } }
else
  state = cmsgpack.unpack(string.sub(record, 2))
end

local function next_fence()
  local fence = now
  if state.last and state.last >= now then
    if tonumber(state.last) >= 9007199254740990 then return nil end
    fence = plus(state.last, 1)
  end
  state.last, changed = fence, true
  return fence
end

-- The units of all holds, and their smallest capacity.
local function taken()
  local units, capacity = 0, math.huge
  for _, hold in ipairs(state.holds) do
    units, capacity = units + hold.units, math.min(capacity, hold.capacity)
  end
  return units, capacity
end

-- Whether a request fits beside holds of so many units and this smallest capacity.
local function fits(asked, units, capacity)
  return units + asked.units <= math.min(capacity, asked.capacity)
end

-- Makes a hold of what was asked for. Nothing, if there is no higher fence.
local function grant(asked)
  local fence = next_fence()
  if not fence then return nil end
  local hold = {
    fence = fence, at = now, token = asked.token, session = asked.session, kind = asked.kind, texts = asked.texts,
    units = asked.units, capacity = asked.capacity,
  }
  if asked.term ~= '0' then hold.deadline = plus(now, asked.term) end
  state.holds[#state.holds + 1] = hold
  return hold
end

local function head()
  if not state.queued then return nil end
  local first = call('ZRANGE', KEYS[2], 0, 0)[1]
  while first do
    local asked = call('HGET', KEYS[3], first)
    if asked then return cmsgpack.unpack(asked) end
    -- What it asks for is gone: only an eviction or a hand does that. Those behind it still wait.
    call('ZREM', KEYS[2], first)
    first = call('ZRANGE', KEYS[2], 0, 0)[1]
  end
  state.queued, changed = nil, true
end

local function dequeue(token)
  changed = true
  call('ZREM', KEYS[2], token)
  call('HDEL', KEYS[3], token)
end

-- Ends what time has ended, and gives the key to the head of the queue for as long as that fits.
local function settle()
  local kept = {}
  for _, hold in ipairs(state.holds) do
    if not hold.deadline or hold.deadline > now then kept[#kept + 1] = hold end
  end
  if #kept < #state.holds then state.holds, changed = kept, true end
  if state.closed and state.closed <= now then state.closed, changed = nil, true end
  for token, forced in pairs(state.forced) do
    if plus(forced.at, FORCED) <= now then state.forced[token], changed = nil, true end
  end
  local first = not state.closed and head()
  local units, capacity
  if first then units, capacity = taken() end
  while first and fits(first, units, capacity) do
    dequeue(first.token)
    local hold = grant(first)
    if hold then
      units, capacity = units + hold.units, math.min(capacity, hold.capacity)
      -- It outlives its session from when its holder has learned of it. Until then nobody believes it.
      if hold.kind == 'F' then hold.unseen = true end
      -- A hint: without the right to publish it is found by asking.
      redis.pcall('PUBLISH', PREFIX .. 'session:{' .. first.session .. '}', 'G' .. first.token .. hold.fence .. SUBJECT)
    end
    first = head()
  end
end

-- The smallest capacity of the holds, if they share the key.
local function in_use()
  local capacity
  for _, hold in ipairs(state.holds) do
    if hold.units < hold.capacity and (not capacity or hold.capacity < capacity) then capacity = hold.capacity end
  end
  return capacity and tostring(capacity) or ''
end

-- The holder has learned of its hold.
local function saw(hold)
  if hold.unseen then hold.unseen, changed = nil, true end
end

-- The hold of a token, for whoever has the token: its holder has seen it then.
local function find(token)
  for at, hold in ipairs(state.holds) do
    if hold.token == token then
      saw(hold)
      return hold, at
    end
  end
end

local function ends_with_its_session(hold)
  return hold.kind == 'S' or hold.unseen
end

-- Writes, also when memory is short: freeing some is allowed then, and so is what the same script does after that.
local function set(...)
  if redis.pcall('SET', KEYS[1], ...).err then
    call('DEL', KEYS[1])
    call('SET', KEYS[1], ...)
  end
end

-- Writes the record back. `may_fail`: rather an error than a write that memory has no room for.
local function save(may_fail)
  if not changed then return end
  local put = set
  if may_fail then put = function(...) call('SET', KEYS[1], ...) end end
  local lone = state.holds[1]
  if not lone and not state.queued and not next(state.forced) then
    if not state.last and not state.closed then
      if record then call('DEL', KEYS[1]) end
      return
    end
    local life = IDLE
    if state.closed then life = life + tonumber(minus(state.closed, now)) / 1000 end
    return put('0' .. (state.last or '0000000000000000') .. (state.closed or ''), 'PX', string.format('%.0f', life))
  end
  local life = math.max(DAY, tonumber(state.life or 0))
  for _, hold in ipairs(state.holds) do
    if hold.deadline then life = math.max(life, tonumber(minus(hold.deadline, now)) / 1000 + IDLE) end
  end
  if state.closed then life = math.max(life, tonumber(minus(state.closed, now)) / 1000 + IDLE) end
  life = string.format('%.0f', life)
  if lone and not state.holds[2] and not state.queued and not next(state.forced) and not state.closed and not state.life
    and not lone.deadline and lone.units == 1 and lone.capacity == 1 and lone.fence == state.last then
    return put('1' .. lone.fence .. lone.at .. lone.token .. lone.session .. lone.kind .. lone.texts, 'PX', life)
  end
  put('2' .. cmsgpack.pack(state), 'PX', life)
  if state.queued then
    call('PEXPIRE', KEYS[2], life)
    call('PEXPIRE', KEYS[3], life)
  end
end

-- A write that changes nothing: who waits for replicas (WAIT) waits for what was written over the same connection.
local function write_again()
  local life = call('PTTL', KEYS[1])
  call('PEXPIRE', KEYS[1], life > 0 and life or DAY)
end

local function remaining(hold)
  return hold.deadline and minus(hold.deadline, now) or ''
end

-- When time alone may change something, in µs from now.
local function check_in()
  local at = state.closed
  for _, hold in ipairs(state.holds) do
    if hold.deadline and (not at or hold.deadline < at) then at = hold.deadline end
  end
  return at and minus(at, now) or ''
end

-- The sessions on which it depends whether those who wait go on: those of the holders and of the head of the queue.
local function in_the_way(answer)
  local seen = {}
  local function add(session)
    if not seen[session] then
      seen[session] = true
      answer[#answer + 1] = session
    end
  end
  for _, hold in ipairs(state.holds) do
    if ends_with_its_session(hold) then add(hold.session) end
  end
  local first = head()
  if first then add(first.session) end
  return answer
end

local function granted(hold)
  return { 'granted', now, hold.fence, remaining(hold) }
end

-- Who waits has those who hold the key told again that they do. A failover may forget a release: nobody would end that hold,
-- because the session that has it lives. The head does it each time it asks; those behind it now and then, because a failover
-- may have forgotten that the head has gone, too.
local function tell_holders(ahead)
  local tells = ahead == 0 or tonumber(string.sub(now, -4)) % (ahead + 1) == 0
  for _, hold in ipairs(state.holds) do
    if tells and hold.kind == 'S' and plus(hold.at, '1000000') <= now then
      redis.pcall('PUBLISH', PREFIX .. 'session:{' .. hold.session .. '}', 'G' .. hold.token .. hold.fence .. SUBJECT)
    end
  end
end

local function queued(token)
  local ahead = call('ZRANK', KEYS[2], token)
  tell_holders(ahead)
  return in_the_way({ 'queued', now, tostring(ahead), check_in(), in_use() })
end

local OUT_OF_FENCES = redis.error_reply('FENCE this key has the highest fence there is')
