-- Publish the copied snapshot, drop the snapshots that are not kept, and move
-- the floor.  KEYS: head, lease, cut, saved, snapshots, staging, journal.
-- ARGV: token, duration of the lease in ms, prefix of snapshot keys, seq, at,
-- records, chunks, floor; then the seqs of the kept snapshots.
local HEAD, LEASE, CUT, SAVED, SNAPSHOTS, STAGING, JOURNAL = unpack(KEYS)
local TOKEN, MS, PREFIX, SEQ, AT, RECORDS, CHUNKS, FLOOR = unpack(ARGV, 1, 8)
local value = AT .. '\0' .. RECORDS .. '\0' .. CHUNKS .. '\0' .. TOKEN
if not renew(LEASE, TOKEN, MS) then
  return {'lost'}
end
if redis.call('HGET', SNAPSHOTS, SEQ) == value then
  return {'ok'} -- published before; that answer was lost
end
local cut = redis.call('HMGET', CUT, 'token', 'seq', 'pos')
if cut[1] ~= TOKEN or cut[2] ~= SEQ or cut[3] ~= ALL_END or redis.call('LLEN', SAVED) > 0 then
  return {'lost'}
end
local kept = {}
for n = 9, #ARGV do
  kept[ARGV[n]] = true
end
local snapshots = redis.call('HGETALL', SNAPSHOTS)
for n = 1, #snapshots, 2 do
  if not kept[snapshots[n]] or snapshots[n] == SEQ then
    redis.call('UNLINK', PREFIX .. split(snapshots[n + 1])[4])
    redis.call('HDEL', SNAPSHOTS, snapshots[n])
  end
end
redis.call('HSET', SNAPSHOTS, SEQ, value)
redis.call('HDEL', STAGING, TOKEN)
redis.call('UNLINK', CUT)
if redis.call('EXISTS', HEAD) == 1 then
  -- The commit id of the entry at floor - 1 shows whether a cursor at this seq is of this history.
  local before = digits(tonumber(FLOOR) - 1) .. '-0'
  local entry = redis.call('XRANGE', JOURNAL, before, before)[1]
  if entry then
    redis.call('HSET', HEAD, 'base', entry[2][4])
  end
  redis.call('HSET', HEAD, 'floor', FLOOR)
end
return {'ok'}
