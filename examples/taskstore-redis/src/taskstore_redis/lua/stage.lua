-- Add records to the staged content, and a chunk to its snapshot.
-- KEYS: staging, the staged rows, facts, index and bookings, snapshot.
-- ARGV: token, ms until the staged content expires, number of the chunk; then
-- id, facts and image of each record.  A repeat has no further effect.
local STAGING, ROWS, FACTS, INDEX, BOOKINGS, SNAPSHOT = unpack(KEYS)
if redis.call('HEXISTS', STAGING, ARGV[1]) == 0 then
  return {'gone'}
end
local now = redis.call('TIME')
redis.call('HSET', STAGING, ARGV[1], digits(now[1] * 1000 + tonumber(ARGV[2])))
local chunk = {}
for n = 4, #ARGV, 3 do
  local id, facts, image = unpack(ARGV, n, n + 2)
  facts = '0\0' .. facts
  local parts = split(facts)
  redis.call('HSET', ROWS, id, image)
  redis.call('HSET', FACTS, id, facts)
  for _, member in ipairs(members(parts, id)) do
    redis.call('ZADD', INDEX, 0, member)
  end
  local key = dedup_key(parts)
  if key then
    redis.call('HSET', BOOKINGS, key, id)
  end
  chunk[#chunk + 1] = item(id, parts[2], image)
end
redis.call('HSET', SNAPSHOT, ARGV[3], table.concat(chunk))
return {'ok'}
