-- Commit a batch: compare everything, then write everything, or nothing.
-- KEYS: see Keys.apply.  ARGV: format, commit id, now, ledger id, number of
-- changes, number of steps, seq and id of the commit over which all this was
-- worked out (0: any); then for each change its task, kind, revision and
-- image; then for each step the place of its task's last change, the revision
-- that has to be stored, and the facts ('' for a removal).
--
-- A script that fails half-way leaves what it has written.  So every key is
-- read before the first write, which finds one of a wrong type, and the first
-- write is the one that Redis may refuse: for memory, or for a seq that is
-- there already.
local HEAD, ROWS, FACTS, INDEX, BOOKINGS, JOURNAL, COMMITS, DELETED, ASIDE, ASIDE_IDS, LEASE, CUT,
  SAVED, VOID = unpack(KEYS)
local FORMAT, COMMIT, NOW, LEDGER = unpack(ARGV, 1, 4)
local CHANGES, STEPS = tonumber(ARGV[5]), tonumber(ARGV[6])
local OVER, OVER_COMMIT = unpack(ARGV, 7, 8)

local function change(n)
  return unpack(ARGV, 9 + (n - 1) * 4, 12 + (n - 1) * 4)
end

local function step(n)
  local at = 8 + CHANGES * 4 + (n - 1) * 3
  local last = tonumber(ARGV[at + 1])
  local id, _, _, image = change(last)
  local facts = ARGV[at + 3]
  return {
    id = id,
    base = ARGV[at + 2],
    image = image,
    facts = facts,
    parts = facts ~= '' and split('0\0' .. facts) or nil,
  }
end

-- -- reading --------------------------------------------------------------

if redis.call('EXISTS', VOID) == 1 then
  return {'void'}
end
local known = state(HEAD)
if not known[3] and redis.call('EXISTS', ROWS, FACTS, JOURNAL, COMMITS) > 0 then
  return {'headless'}
elseif known[3] and known[7] ~= FORMAT then
  return {'format', known[7] or ''}
end
local head, floor, last_at = tonumber(known[3] or 0), tonumber(known[4] or 1), known[5] or '0'
if OVER ~= '0' then
  local entry = redis.call('XRANGE', JOURNAL, OVER .. '-0', OVER .. '-0')[1]
  if not entry and tonumber(OVER) ~= floor - 1 or entry and entry[2][4] ~= OVER_COMMIT then
    return {'elsewhere'}
  end
end
redis.call('HLEN', ROWS)
redis.call('ZCARD', INDEX)
redis.call('HLEN', BOOKINGS)
redis.call('XLEN', JOURNAL)
redis.call('XLEN', COMMITS)
redis.call('HLEN', ASIDE)
redis.call('LLEN', SAVED)
local any_aside = redis.call('HLEN', ASIDE_IDS) > 0
local cut = redis.call('HMGET', CUT, 'token', 'seq', 'pos')
if cut[1] and redis.call('GET', LEASE) ~= cut[1] then
  -- Whoever compacted is gone.
  redis.call('UNLINK', CUT, SAVED)
  cut = {false}
end

local steps, leaving, back = {}, {}, {}
for n = 1, STEPS do
  steps[n] = step(n)
  if not steps[n].parts then
    leaving[steps[n].id] = true
  end
end

local conflicts = {'conflict'}
for n, want in ipairs(steps) do
  local id = want.id
  local stored = redis.call('HGET', FACTS, id)
  local aside = any_aside and redis.call('HGET', ASIDE_IDS, id)
  local score = redis.call('ZSCORE', DELETED, id)
  local deleted = score and tonumber(score) >= floor
  local found, holder = '0', nil
  if stored then
    want.stored = split(stored)
    if #want.stored ~= PARTS then
      return {'damaged', id}
    end
    found = want.stored[2]
    back[id] = want.stored[1]
  elseif aside then
    found = split(aside)[1]
  end
  want.aside = aside and split(aside)
  local claim = want.parts and booked(want.parts)
  if claim and not (want.stored and booked(want.stored) == claim) then
    holder = redis.call('HGET', BOOKINGS, claim)
    if holder and (holder == id or leaving[holder]) then
      holder = nil
    end
  end
  if found ~= want.base or deleted or (aside and want.base == '0') then
    for _, fact in ipairs({n, found, deleted and '1' or '0', ''}) do
      conflicts[#conflicts + 1] = fact
    end
  elseif holder then
    for _, fact in ipairs({n, found, '0', holder}) do
      conflicts[#conflicts + 1] = fact
    end
  end
end
if #conflicts > 1 then
  return conflicts
end

-- -- writing --------------------------------------------------------------

local at = tonumber(NOW) > tonumber(last_at) and NOW or last_at
local first = digits(head + 1)
local last = digits(head + CHANGES)
for n = 1, CHANGES do
  local id, kind, revision, image = change(n)
  local seq = digits(head + n)
  redis.call('XADD', JOURNAL, seq .. '-0', 't', at, 'c', COMMIT, 'k', kind, 'i', id, 'r', revision,
    'b', back[id] or '0', 'p', image)
  back[id] = seq
end

-- A compactor takes its picture as of an earlier seq: what it has not come
-- to yet is kept for it as it was.
local function keep_for_compactor(id, parts)
  if not cut[1] or tonumber(parts[1]) > tonumber(cut[2]) then
    return
  end
  if redis.call('ZLEXCOUNT', INDEX, '(' .. cut[3], '[' .. ALL .. parts[3] .. id) > 0 then
    local image = redis.call('HGET', ROWS, id)
    if image then
      redis.call('RPUSH', SAVED, item(id, parts[2], image))
    end
  end
end

local function forget(want)
  local id = want.id
  keep_for_compactor(id, want.stored)
  local staying = {}
  for _, member in ipairs(want.parts and members(want.parts, id) or {}) do
    staying[member] = true
  end
  for _, member in ipairs(members(want.stored, id)) do
    if not staying[member] then
      redis.call('ZREM', INDEX, member)
    end
  end
  local claim = booked(want.stored)
  if claim and redis.call('HGET', BOOKINGS, claim) == id then
    redis.call('HDEL', BOOKINGS, claim)
  end
end

-- Everything that leaves goes first: what it has booked may be booked again.
for _, want in ipairs(steps) do
  if want.stored then
    forget(want)
  end
  if want.aside then
    for n = 2, #want.aside do
      redis.call('HDEL', ASIDE, want.aside[n])
    end
    redis.call('HDEL', ASIDE_IDS, want.id)
  end
end
for _, want in ipairs(steps) do
  local id, parts = want.id, want.parts
  if parts then
    redis.call('HSET', ROWS, id, want.image)
    redis.call('HSET', FACTS, id, back[id] .. '\0' .. want.facts)
    for _, member in ipairs(members(parts, id)) do
      redis.call('ZADD', INDEX, 0, member)
    end
    local claim = booked(parts)
    if claim then
      redis.call('HSET', BOOKINGS, claim, id)
    end
  else
    redis.call('HDEL', ROWS, id)
    redis.call('HDEL', FACTS, id)
    redis.call('ZADD', DELETED, back[id], id)
  end
end

if not known[3] then
  redis.call('HSET', HEAD, 'format', FORMAT, 'ledger', LEDGER, 'timeline', 1, 'floor', 1)
end
redis.call('HSET', HEAD, 'head', last, 'at', at, 'commit', COMMIT)
announce(COMMITS, last, COMMIT, first, at)
return {'ok', first, last, at}
