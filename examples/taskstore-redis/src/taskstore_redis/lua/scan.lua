-- Read records in the order of the index, head and records of one moment.
-- KEYS: head, index, rows, facts, aside.  ARGV: most records of a range (0:
-- all), most bytes of a range, whether to add what is set aside ('1'), 'REV'
-- for descending order or ''; then for each range the bytes before
-- (created_at, task_id) in its members, where it begins and where it ends.
-- Returns the state, what is set aside, and for each range whether there may
-- be more, followed by (created_at, task_id), facts and image of each record.
local HEAD, INDEX, ROWS, FACTS, ASIDE = unpack(KEYS)
local LIMIT, BYTES = tonumber(ARGV[1]), tonumber(ARGV[2])

local function range(skip, from, to)
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
    local place = string.sub(member, skip + 1)
    local id = string.sub(place, 17)
    local image = redis.call('HGET', ROWS, id)
    rows[#rows + 1] = place
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
