-- Copy the next chunk of records into the snapshot.
-- KEYS: lease, cut, saved, index, rows, facts, snapshot.
-- ARGV: token, duration of the lease in ms, maximum of records, of bytes.
-- The position of the copy is stored in the cut, so that a call whose answer
-- was lost can be repeated.
local LEASE, CUT, SAVED, INDEX, ROWS, FACTS, SNAPSHOT = unpack(KEYS)
local TOKEN, MS, RECORDS, BYTES = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
if not renew(LEASE, TOKEN, MS) then
  return {'lost'}
end
local cut = redis.call('HMGET', CUT, 'token', 'seq', 'pos', 'chunks', 'records')
if cut[1] ~= TOKEN then
  return {'lost'}
end
local seq, pos = tonumber(cut[2]), cut[3]
local chunk, bytes = {}, 0

if pos ~= ALL_END then
  local page = redis.call('ZRANGE', INDEX, '(' .. pos, '(' .. ALL_END, 'BYLEX', 'LIMIT', 0, RECORDS)
  for _, member in ipairs(page) do
    local id = string.sub(member, #ALL + 17)
    local facts, image = redis.call('HGET', FACTS, id), redis.call('HGET', ROWS, id)
    local parts = facts and split(facts)
    if parts and image and tonumber(parts[1]) <= seq then
      chunk[#chunk + 1] = item(id, parts[2], image)
      bytes = bytes + #image
    end
    pos = member
    if bytes >= BYTES then
      break
    end
  end
  if #page == 0 then
    pos = ALL_END
  end
else
  -- All unchanged records are copied; now those that writers saved.
  while #chunk < RECORDS and bytes < BYTES do
    local saved = redis.call('LPOP', SAVED)
    if not saved then
      break
    end
    chunk[#chunk + 1] = saved
    bytes = bytes + #saved
  end
  if #chunk == 0 then
    return {'done', cut[5], cut[4]}
  end
end

local chunks, records = tonumber(cut[4]), tonumber(cut[5])
if #chunk > 0 then
  redis.call('HSET', SNAPSHOT, digits(chunks), table.concat(chunk))
  chunks, records = chunks + 1, records + #chunk
end
redis.call('HSET', CUT, 'pos', pos, 'chunks', digits(chunks), 'records', digits(records))
return {'more'}
