-- Publish the snapshot that was copied, drop those that are not kept, move
-- the floor.  KEYS: head, lease, cut, saved, snapshots, staging.
-- ARGV: token, ms that the lease lasts, what the names of snapshots begin
-- with, seq, at, records, chunks, floor; then the seqs of those that stay.
local HEAD, LEASE, CUT, SAVED, SNAPSHOTS, STAGING = unpack(KEYS)
local TOKEN, MS, PREFIX, SEQ, AT, RECORDS, CHUNKS, FLOOR = unpack(ARGV, 1, 8)
local mark = AT .. '\0' .. RECORDS .. '\0' .. CHUNKS .. '\0' .. TOKEN
if not held(LEASE, TOKEN, MS) then
  return {'lost'}
end
if redis.call('HGET', SNAPSHOTS, SEQ) == mark then
  return {'ok'} -- done before; the answer was lost
end
local cut = redis.call('HMGET', CUT, 'token', 'seq', 'pos')
if cut[1] ~= TOKEN or cut[2] ~= SEQ or cut[3] ~= ALL_END or redis.call('LLEN', SAVED) > 0 then
  return {'lost'}
end
local stays = {}
for n = 9, #ARGV do
  stays[ARGV[n]] = true
end
local marks = redis.call('HGETALL', SNAPSHOTS)
for n = 1, #marks, 2 do
  if not stays[marks[n]] or marks[n] == SEQ then
    redis.call('UNLINK', PREFIX .. split(marks[n + 1])[4])
    redis.call('HDEL', SNAPSHOTS, marks[n])
  end
end
redis.call('HSET', SNAPSHOTS, SEQ, mark)
redis.call('HDEL', STAGING, TOKEN)
redis.call('UNLINK', CUT)
if redis.call('EXISTS', HEAD) == 1 then
  redis.call('HSET', HEAD, 'floor', FLOOR)
end
return {'ok'}
