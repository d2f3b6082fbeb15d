-- Put in front of every other script.

-- The shape of "facts", what a script has to know of a task without looking
-- into its payload: parts with NUL between them, which no text may hold.
--   1 last seq   2 revision   3 created_at, 16 digits   4 booking
--   5 to 11: the values of INDEXED; "=" and the text, or nothing for null
local PARTS = 11
local INDEXED = {'r', 's', 'o', 'c', 'q', 'p', 'f'}

-- All members of the index that are about every task begin like this ...
local ALL = '*\0'
-- ... and end before this, since ":" follows "9".
local ALL_END = '*\0:'

-- A seq or time as text: tostring() would round it and turn to exponents.
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

-- The members of the index that are about a task: newest-first order is the
-- order of bytes, within each value of each field.
local function members(parts, id)
  local place = parts[3] .. id
  local list = {ALL .. place}
  for n, letter in ipairs(INDEXED) do
    local value = parts[4 + n]
    if value ~= '' then
      list[#list + 1] = letter .. '\0' .. string.sub(value, 2) .. '\0' .. place
    end
  end
  return list
end

-- What a task holds of its run: run_id and booking, or nil.
local function booked(parts)
  if parts[4] ~= '' and parts[5] ~= '' then
    return string.sub(parts[5], 2) .. '\0' .. string.sub(parts[4], 2)
  end
  return nil
end

-- One record in a chunk of a snapshot.
local function item(id, revision, image)
  return struct.pack('>I2I8I4', #id, tonumber(revision), #image) .. id .. image
end

-- ledger, timeline, head, floor, time and id of the last commit, format
local function state(key)
  return redis.call('HMGET', key, 'ledger', 'timeline', 'head', 'floor', 'at', 'commit', 'format')
end

-- Whether the lease is still ours; if so it lasts on.
local function held(lease, token, ms)
  if redis.call('GET', lease) ~= token then
    return false
  end
  redis.call('PEXPIRE', lease, ms)
  return true
end

-- Tell those who wait, and remember how this commit came out.
local function announce(commits, last, commit, first, at)
  redis.pcall('XADD', commits, 'MAXLEN', '~', 1000, last .. '-0', 'c', commit, 'f', first, 't', at)
end
