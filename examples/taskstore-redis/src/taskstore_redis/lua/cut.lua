-- Begin a snapshot of the ledger at the current head.  From now on writers
-- save the records that are not copied yet (see apply.lua).
-- KEYS: head, lease, cut, saved, aside, staging, snapshot.
-- ARGV: token, duration of the lease in ms.
local HEAD, LEASE, CUT, SAVED, ASIDE, STAGING, SNAPSHOT = unpack(KEYS)
if not renew(LEASE, ARGV[1], ARGV[2]) then
  return {'lost'}
end
local known = state(HEAD)
local seq, at = known[3] or '0', known[5] or '0'
local quarantined = redis.call('HVALS', ASIDE)
redis.call('UNLINK', SAVED, CUT, SNAPSHOT)
-- The next lease owner may delete this snapshot at once.
redis.call('HSET', STAGING, ARGV[1], 0)
redis.call('HSET', CUT, 'token', ARGV[1], 'seq', seq, 'pos', ALL, 'chunks', 0,
  'records', #quarantined)
if #quarantined > 0 then
  redis.call('HSET', SNAPSHOT, 'aside', table.concat(quarantined, '\n'))
end
return {'ok', seq, at}
