-- Read records in the order of the index; the state and all records are of
-- one seq.  KEYS: head, index, rows, facts, aside.  ARGV: maximum of records
-- per range (0: all), of bytes per range, '1' to add the quarantined values,
-- 'REV' for descending order or ''; then for each range the length of the
-- prefix of its members, its first and its last bound.
-- Returns the state, the quarantined values, and for each range whether there
-- may be more records, then sort key, facts and image of each record.
local HEAD, INDEX, ROWS, FACTS, ASIDE = unpack(KEYS)
local LIMIT, BYTES = tonumber(ARGV[1]), tonumber(ARGV[2])

local function range(prefix_size, from, to)
  local command = {'ZRANGE', INDEX, from, to, 'BYLEX'}
  if ARGV[4] ~= '' then
    command[#command + 1] = ARGV[4]
  end
  if LIMIT > 0 then
    command[#command + 1] = 'LIMIT'
    command[#command + 1] = 0
    command[#command + 1] = LIMIT
  end
  local page = redis.call(unpack(command))
  local rows, bytes = {LIMIT > 0 and #page == LIMIT and 1 or 0}, 0
  for n, member in ipairs(page) do
    local sort_key = string.sub(member, prefix_size + 1)
    local id = string.sub(sort_key, 17)
    local image = redis.call('HGET', ROWS, id)
    rows[#rows + 1] = sort_key
    rows[#rows + 1] = redis.call('HGET', FACTS, id)
    rows[#rows + 1] = image
    bytes = bytes + (image and #image or 0)
    if BYTES > 0 and bytes >= BYTES and n < #page then
      rows[1] = 1
      break
    end
  end
  return rows
end

local reply = {state(HEAD), ARGV[3] == '1' and redis.call('HVALS', ASIDE) or {}}
for n = 5, #ARGV, 3 do
  reply[#reply + 1] = range(tonumber(ARGV[n]), ARGV[n + 1], ARGV[n + 2])
end
return reply
