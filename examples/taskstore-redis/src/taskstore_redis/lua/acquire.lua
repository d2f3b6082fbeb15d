-- Acquire the lease, and return the state of the ledger.
-- KEYS: head, lease, snapshots, staging, facts, journal.
-- ARGV: token, duration of the lease in ms, the token of a dead owner ('' if
-- none).
-- Returns the state, the snapshots, the staging tokens with their expiry, the
-- number of records, the server's time, and the first entry after the newest
-- snapshot.
local HEAD, LEASE, SNAPSHOTS, STAGING, FACTS, JOURNAL = unpack(KEYS)
local owner = redis.call('GET', LEASE)
if owner and owner ~= ARGV[1] and owner ~= ARGV[3] then
  return {'busy', owner, digits(redis.call('PTTL', LEASE))}
end
local known = state(HEAD)
local snapshots = redis.call('HGETALL', SNAPSHOTS)
local newest = 0
for n = 1, #snapshots, 2 do
  newest = math.max(newest, tonumber(snapshots[n]))
end
local now = redis.call('TIME')
local since = redis.call('XRANGE', JOURNAL, '(' .. digits(newest) .. '-0', '+', 'COUNT', 1)
redis.call('SET', LEASE, ARGV[1], 'PX', ARGV[2])
return {'ok', known, snapshots, redis.call('HGETALL', STAGING), redis.call('HLEN', FACTS),
  digits(now[1] * 1000), since}
