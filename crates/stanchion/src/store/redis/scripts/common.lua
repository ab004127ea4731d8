-- The format of a key's record, and the operations on it. `record` and `now` are set already.
--
-- The format of a record is one of:
--   '0' fence [closed]                          nobody holds the key: its last fence, and until when it is closed
--   '1' fence at token session kind texts       one mutex without a deadline and without waiters
--   '2' and the table `state` as cmsgpack       everything else
-- Fences and times have 16 digits, so that they compare as texts and no digit is lost: a Lua number is exact only up to
-- 2^53. Tokens and sessions have 32 hexadecimal digits. A kind is S (ends with its session) or F (fixed lifetime).
-- A hold that lingers has `lingers = true` in its table, so its record has the form '2'. A program older than this mark
-- keeps it when it writes the record, and sends no recalls: a waiter then waits for the holder's next `linger`, which
-- finds it. Both versions may therefore run together. Only a hold that lingered must not be adopted by the older
-- version, which leaves the hold its fence although the holder used higher ones.
-- Waiters are in two keys that exist only while there are some: `queue` has their tokens in order, and `waiting` has
-- their requests. Scripts see sessions only by name: the caller queries them, and reaps expired ones.

-- Minimum time that a record with a hold is kept after a write, in ms.
local RECORD_LIFE = 86400000
-- Time that an idle record is kept after the last release, in ms. It preserves the fence: a clock that is set back by
-- less does no harm.
local IDLE_LIFE = 600000
-- Time that a force-released token is rejected, in µs.
local FORCED_RETENTION = 3600000000
-- Maximum number of waiters of a key.
local MAX_WAITERS = 10000
local RECORD_NAME = KEYS[1]
local PREFIX = string.match(RECORD_NAME, '^[^{]*')

if #now < 16 then now = string.rep('0', 16 - #now) .. now end

local function plus(at, span)
  return string.format('%016.0f', tonumber(at) + tonumber(span))
end

local function minus(at, from)
  return string.format('%.0f', math.max(0, tonumber(at) - tonumber(from)))
end

-- Whether the record has to be written.
local changed = false

local state
local function is_record()
  local kind_byte = string.byte(record)
  if kind_byte == 48 then return (#record == 17 or #record == 33) and not string.find(record, '%D') end
  if kind_byte == 49 then
    return #record >= 98 and not string.find(string.sub(record, 2, 33), '%D')
      and not string.find(string.sub(record, 34, 97), '%X') and string.find(record, '^[SF]', 98)
  end
  if kind_byte == 50 then
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

-- Returns the units of all holds, and their smallest capacity.
local function usage()
  local units, capacity = 0, math.huge
  for _, hold in ipairs(state.holds) do
    units, capacity = units + hold.units, math.min(capacity, hold.capacity)
  end
  return units, capacity
end

-- Returns whether a request fits with holds of these units and this smallest capacity.
local function fits(request, units, capacity)
  return units + request.units <= math.min(capacity, request.capacity)
end

-- Creates a hold for a request. Returns nil if there is no higher fence.
local function grant(request)
  local fence = next_fence()
  if not fence then return nil end
  local hold = {
    fence = fence, at = now, token = request.token, session = request.session, kind = request.kind,
    texts = request.texts, units = request.units, capacity = request.capacity,
  }
  if request.term ~= '0' then hold.deadline = plus(now, request.term) end
  state.holds[#state.holds + 1] = hold
  return hold
end

local function head()
  if not state.queued then return nil end
  local first = call('ZRANGE', KEYS[2], 0, 0)[1]
  while first do
    local request = call('HGET', KEYS[3], first)
    if request then return cmsgpack.unpack(request) end
    -- The request is missing, which only an eviction or a manual change can cause. The waiters behind it still wait.
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

-- Ends expired holds, and grants the key to the head of the queue while its request fits.
local function reconcile()
  local live = {}
  for _, hold in ipairs(state.holds) do
    if not hold.deadline or hold.deadline > now then live[#live + 1] = hold end
  end
  if #live < #state.holds then state.holds, changed = live, true end
  if state.closed and state.closed <= now then state.closed, changed = nil, true end
  for token, forced in pairs(state.forced) do
    if plus(forced.at, FORCED_RETENTION) <= now then state.forced[token], changed = nil, true end
  end
  local first = not state.closed and head()
  local units, capacity
  if first then units, capacity = usage() end
  while first and fits(first, units, capacity) do
    dequeue(first.token)
    local hold = grant(first)
    if hold then
      units, capacity = units + hold.units, math.min(capacity, hold.capacity)
      -- The hold outlives its session only after its holder has learned of it. Until then no guard relies on it.
      if hold.kind == 'F' then hold.unseen = true end
      -- Only a hint: without the right to publish, the waiter finds its grant by polling.
      local message = 'G' .. first.token .. hold.fence .. RECORD_NAME
      redis.pcall('PUBLISH', PREFIX .. 'session:{' .. first.session .. '}', message)
    end
    first = head()
  end
end

-- Returns '1' if the hold of the key lingers. Only an exclusive hold does, so it is the only hold.
local function lingers()
  local hold = state.holds[1]
  return hold and hold.lingers and '1' or ''
end

-- Returns the smallest capacity of the holds that share the key.
local function in_use()
  local capacity
  for _, hold in ipairs(state.holds) do
    if hold.units < hold.capacity and (not capacity or hold.capacity < capacity) then capacity = hold.capacity end
  end
  return capacity and tostring(capacity) or ''
end

-- Records that the holder has learned of its hold.
local function mark_seen(hold)
  if hold.unseen then hold.unseen, changed = nil, true end
end

-- Returns the hold of a token. Only its holder knows the token, so it has seen the hold now.
local function find(token)
  for at, hold in ipairs(state.holds) do
    if hold.token == token then
      mark_seen(hold)
      return hold, at
    end
  end
end

local function ends_with_its_session(hold)
  return hold.kind == 'S' or hold.unseen
end

-- Writes the record, also when memory is short: the server then allows deleting, and further writes of the same script.
local function set(...)
  if redis.pcall('SET', KEYS[1], ...).err then
    call('DEL', KEYS[1])
    call('SET', KEYS[1], ...)
  end
end

-- Writes the record back. With `may_fail` it returns an error rather than writing when memory is short.
local function save(may_fail)
  if not changed then return end
  local write = set
  if may_fail then write = function(...) call('SET', KEYS[1], ...) end end
  local only = state.holds[1]
  if not only and not state.queued and not next(state.forced) then
    if not state.last and not state.closed then
      if record then call('DEL', KEYS[1]) end
      return
    end
    local life = IDLE_LIFE
    if state.closed then life = life + tonumber(minus(state.closed, now)) / 1000 end
    return write('0' .. (state.last or '0000000000000000') .. (state.closed or ''), 'PX', string.format('%.0f', life))
  end
  local life = math.max(RECORD_LIFE, tonumber(state.life or 0))
  for _, hold in ipairs(state.holds) do
    if hold.deadline then life = math.max(life, tonumber(minus(hold.deadline, now)) / 1000 + IDLE_LIFE) end
  end
  if state.closed then life = math.max(life, tonumber(minus(state.closed, now)) / 1000 + IDLE_LIFE) end
  life = string.format('%.0f', life)
  if only and not state.holds[2] and not state.queued and not next(state.forced) and not state.closed and not state.life
    and not only.deadline and only.units == 1 and only.capacity == 1 and only.fence == state.last
    and not only.lingers then
    return write('1' .. only.fence .. only.at .. only.token .. only.session .. only.kind .. only.texts, 'PX', life)
  end
  write('2' .. cmsgpack.pack(state), 'PX', life)
  if state.queued then
    call('PEXPIRE', KEYS[2], life)
    call('PEXPIRE', KEYS[3], life)
  end
end

-- Repeats a write without changing anything, because WAIT covers only writes of the same connection.
local function write_again()
  local life = call('PTTL', KEYS[1])
  call('PEXPIRE', KEYS[1], life > 0 and life or RECORD_LIFE)
end

local function remaining(hold)
  return hold.deadline and minus(hold.deadline, now) or ''
end

-- Returns the time until the state may change without a request, in µs.
local function check_in()
  local at = state.closed
  for _, hold in ipairs(state.holds) do
    if hold.deadline and (not at or hold.deadline < at) then at = hold.deadline end
  end
  return at and minus(at, now) or ''
end

-- Adds the sessions that the waiters' progress depends on: those of the holders and of the head of the queue.
local function blocking_sessions(answer)
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

-- Reminds the holders of their holds on behalf of a waiter. A failover may forget a release, and nobody would end that
-- hold while its session is alive. The head of the queue sends reminders with each poll. The waiters behind it do so
-- now and then, because a failover may also have forgotten that the head has left.
-- On behalf of the head it also recalls a hold that lingers. A recall does not replace the reminder, because a session
-- ignores the recall of a hold that it has forgotten.
local function remind_holders(ahead)
  local is_due = ahead == 0 or tonumber(string.sub(now, -4)) % (ahead + 1) == 0
  for _, hold in ipairs(state.holds) do
    if ahead == 0 and hold.lingers then
      redis.pcall('PUBLISH', PREFIX .. 'session:{' .. hold.session .. '}', 'R' .. hold.token)
    end
    if is_due and hold.kind == 'S' and plus(hold.at, '1000000') <= now then
      local message = 'G' .. hold.token .. hold.fence .. RECORD_NAME
      redis.pcall('PUBLISH', PREFIX .. 'session:{' .. hold.session .. '}', message)
    end
  end
end

local function queued(token)
  local ahead = call('ZRANK', KEYS[2], token)
  remind_holders(ahead)
  return blocking_sessions({ 'queued', now, tostring(ahead), check_in(), in_use() })
end

local OUT_OF_FENCES = redis.error_reply('FENCE this key has reached the highest fence')
