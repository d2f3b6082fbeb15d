-- Begin a picture of the ledger as of the present head.  From here on writers
-- keep what it has not come to yet (see apply.lua).
-- KEYS: head, lease, cut, saved, aside, staging, snapshot.
-- ARGV: token, ms that the lease lasts.
local HEAD, LEASE, CUT, SAVED, ASIDE, STAGING, SNAPSHOT = unpack(KEYS)
if not held(LEASE, ARGV[1], ARGV[2]) then
  return {'lost'}
end
local known = state(HEAD)
local seq, at = known[3] or '0', known[5] or '0'
local aside = redis.call('HVALS', ASIDE)
redis.call('UNLINK', SAVED, CUT, SNAPSHOT)
-- Whoever holds the lease after us may throw it away at once.
redis.call('HSET', STAGING, ARGV[1], 0)
redis.call('HSET', CUT, 'token', ARGV[1], 'seq', seq, 'pos', ALL, 'chunks', 0, 'records', #aside)
if #aside > 0 then
  redis.call('HSET', SNAPSHOT, 'aside', table.concat(aside, '\n'))
end
return {'ok', seq, at}
