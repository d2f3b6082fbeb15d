-- Take the lease, and say what there is to compact.
-- KEYS: head, lease, snapshots, staging, facts, journal.
-- ARGV: token, ms that the lease lasts, the token of a holder who is known to
-- be gone ('' if none is).
-- Returns the state, the snapshots, what is staged and until when, how many
-- records there are, the server's time, and the first entry since the newest
-- snapshot.
local HEAD, LEASE, SNAPSHOTS, STAGING, FACTS, JOURNAL = unpack(KEYS)
local holder = redis.call('GET', LEASE)
if holder and holder ~= ARGV[1] and holder ~= ARGV[3] then
  return {'busy', holder, digits(redis.call('PTTL', LEASE))}
end
local known = state(HEAD)
local marks = redis.call('HGETALL', SNAPSHOTS)
local newest = 0
for n = 1, #marks, 2 do
  newest = math.max(newest, tonumber(marks[n]))
end
local now = redis.call('TIME')
local since = redis.call('XRANGE', JOURNAL, '(' .. digits(newest) .. '-0', '+', 'COUNT', 1)
redis.call('SET', LEASE, ARGV[1], 'PX', ARGV[2])
return {'ok', known, marks, redis.call('HGETALL', STAGING), redis.call('HLEN', FACTS),
  digits(now[1] * 1000), since}
