-- Commit a batch: compare all net changes, then write all changes or none.
-- KEYS: see APPLY_KEYS in writing.py, then the void key.  ARGV: format, commit
-- id, now, ledger id, number of changes, number of net changes, seq and commit id of
-- the base position (0: any); then task, kind, revision and image of each
-- change; then for each net change the number of its task's last change, the
-- revision that must be stored, and the facts ('' for a removal).
--
-- Redis does not roll back a script that fails midway.  So the script reads
-- every key before the first write, which detects keys of a wrong type.  The
-- first write is the one that Redis may refuse: for lack of memory, or because
-- the seq exists.
local HEAD, ROWS, FACTS, INDEX, BOOKINGS, JOURNAL, COMMITS, DELETED, ASIDE, ASIDE_IDS, LEASE, CUT,
  SAVED, VOID = unpack(KEYS)
local FORMAT, COMMIT, NOW, LEDGER = unpack(ARGV, 1, 4)
local CHANGES, STEPS = tonumber(ARGV[5]), tonumber(ARGV[6])
local BASE, BASE_COMMIT = unpack(ARGV, 7, 8)

local function change(n)
  return unpack(ARGV, 9 + (n - 1) * 4, 12 + (n - 1) * 4)
end

local function net_change(n)
  local at = 8 + CHANGES * 4 + (n - 1) * 3
  local last = tonumber(ARGV[at + 1])
  local id, _, _, image = change(last)
  local facts = ARGV[at + 3]
  return {
    id = id,
    expected_revision = ARGV[at + 2],
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
if BASE ~= '0' then
  local entry = redis.call('XRANGE', JOURNAL, BASE .. '-0', BASE .. '-0')[1]
  local before = tonumber(BASE) == floor - 1 and (known[8] or BASE_COMMIT)
  if (entry and entry[2][4] or before) ~= BASE_COMMIT then
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
local any_quarantined = redis.call('HLEN', ASIDE_IDS) > 0
local cut = redis.call('HMGET', CUT, 'token', 'seq', 'pos')
if cut[1] and redis.call('GET', LEASE) ~= cut[1] then
  -- The compactor is dead, or lost its lease.
  redis.call('UNLINK', CUT, SAVED)
  cut = {false}
end

local net_changes, removed, previous = {}, {}, {}
for n = 1, STEPS do
  net_changes[n] = net_change(n)
  if not net_changes[n].parts then
    removed[net_changes[n].id] = true
  end
end

local conflicts = {'conflict'}
for n, want in ipairs(net_changes) do
  local id = want.id
  local stored = redis.call('HGET', FACTS, id)
  local quarantined = any_quarantined and redis.call('HGET', ASIDE_IDS, id)
  local score = redis.call('ZSCORE', DELETED, id)
  local deleted = score and tonumber(score) >= floor
  local revision, owner = '0', nil
  if stored then
    want.stored = split(stored)
    if #want.stored ~= PARTS then
      return {'damaged', id}
    end
    revision = want.stored[2]
    previous[id] = want.stored[1]
  elseif quarantined then
    revision = split(quarantined)[1]
  end
  want.quarantined = quarantined and split(quarantined)
  local key = want.parts and dedup_key(want.parts)
  if key and not (want.stored and dedup_key(want.stored) == key) then
    owner = redis.call('HGET', BOOKINGS, key)
    if owner and (owner == id or removed[owner]) then
      owner = nil
    end
  end
  if revision ~= want.expected_revision or deleted or (quarantined and want.expected_revision == '0') then
    for _, fact in ipairs({n, revision, deleted and '1' or '0', ''}) do
      conflicts[#conflicts + 1] = fact
    end
  elseif owner then
    for _, fact in ipairs({n, revision, '0', owner}) do
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
    'b', previous[id] or '0', 'p', image)
  previous[id] = seq
end

-- A compactor copies the records of an earlier seq.  Save the old record if it
-- is not copied yet.
local function save_for_compactor(id, parts)
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

local function remove_stored(want)
  local id = want.id
  save_for_compactor(id, want.stored)
  local kept = {}
  for _, member in ipairs(want.parts and members(want.parts, id) or {}) do
    kept[member] = true
  end
  for _, member in ipairs(members(want.stored, id)) do
    if not kept[member] then
      redis.call('ZREM', INDEX, member)
    end
  end
  local key = dedup_key(want.stored)
  if key and redis.call('HGET', BOOKINGS, key) == id then
    redis.call('HDEL', BOOKINGS, key)
  end
end

-- All old index members and dedup keys are removed first: another net change may use
-- a removed dedup key.
for _, want in ipairs(net_changes) do
  if want.stored then
    remove_stored(want)
  end
  if want.quarantined then
    for n = 2, #want.quarantined do
      redis.call('HDEL', ASIDE, want.quarantined[n])
    end
    redis.call('HDEL', ASIDE_IDS, want.id)
  end
end
for _, want in ipairs(net_changes) do
  local id, parts = want.id, want.parts
  if parts then
    redis.call('HSET', ROWS, id, want.image)
    redis.call('HSET', FACTS, id, previous[id] .. '\0' .. want.facts)
    for _, member in ipairs(members(parts, id)) do
      redis.call('ZADD', INDEX, 0, member)
    end
    local key = dedup_key(parts)
    if key then
      redis.call('HSET', BOOKINGS, key, id)
    end
  else
    redis.call('HDEL', ROWS, id)
    redis.call('HDEL', FACTS, id)
    redis.call('ZADD', DELETED, previous[id], id)
  end
end

if not known[3] then
  redis.call('HSET', HEAD, 'format', FORMAT, 'ledger', LEDGER, 'timeline', 1, 'floor', 1)
end
redis.call('HSET', HEAD, 'head', last, 'at', at, 'commit', COMMIT)
announce(COMMITS, last, COMMIT, first, at)
return {'ok', first, last, at}
