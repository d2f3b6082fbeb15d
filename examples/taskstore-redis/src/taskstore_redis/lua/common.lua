-- The common prefix of all other scripts.

-- The format of "facts", the fields of a task that scripts need without
-- decoding its payload: parts separated by NUL, which no text may contain.
--   1 last seq   2 revision   3 created_at, 16 digits   4 run digest
--   5 to 11: the values of INDEXED.  4 to 11: "=" and the text, or '' for null
local PARTS = 11
local INDEXED = {'r', 's', 'o', 'c', 'q', 'p', 'f'}

-- The prefix of the index members that list all tasks ...
local ALL = '*\0'
-- ... and a bound after the last of them, since ":" follows "9".
local ALL_END = '*\0:'

-- A seq or time as text: tostring() would round it and use exponents.
local function digits(number)
  return string.format('%.0f', number)
end

local function split(facts)
  local parts = {}
  for part in string.gmatch(facts .. '\0', '([^%z]*)%z') do
    parts[#parts + 1] = part
  end
  return parts
end

-- The index members of a task.  Within each value of each field, the order of
-- bytes is the order of created_at and id.
local function members(parts, id)
  local sort_key = parts[3] .. id
  local list = {ALL .. sort_key}
  for n, letter in ipairs(INDEXED) do
    local value = parts[4 + n]
    if value ~= '' then
      list[#list + 1] = letter .. '\0' .. string.sub(value, 2) .. '\0' .. sort_key
    end
  end
  return list
end

-- The dedup key of a task: run_id and run digest, or nil.
local function dedup_key(parts)
  if parts[4] ~= '' and parts[5] ~= '' then
    return string.sub(parts[5], 2) .. '\0' .. string.sub(parts[4], 2)
  end
  return nil
end

-- One record in a chunk of a snapshot.
local function item(id, revision, image)
  return struct.pack('>I2I8I4', #id, tonumber(revision), #image) .. id .. image
end

-- ledger, timeline, head, floor, time and id of the last commit, format, id of the
-- commit at floor - 1
local function state(key)
  return redis.call('HMGET', key, 'ledger', 'timeline', 'head', 'floor', 'at', 'commit', 'format',
    'base')
end

-- Renew the lease; returns whether the caller owns it.
local function renew(lease, token, ms)
  if redis.call('GET', lease) ~= token then
    return false
  end
  redis.call('PEXPIRE', lease, ms)
  return true
end

-- Add a commit to "commits": this wakes waiters and records the outcome.
local function announce(commits, last, commit, first, at)
  redis.pcall('XADD', commits, 'MAXLEN', '~', 1000, last .. '-0', 'c', commit, 'f', first, 't', at)
end
