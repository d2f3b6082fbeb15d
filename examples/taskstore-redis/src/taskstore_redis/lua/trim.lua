-- Remove the first entries before the floor, and the deletions among them.
-- KEYS: head, lease, journal, deleted.  ARGV: token, duration of the lease in
-- ms, maximum of entries.
local HEAD, LEASE, JOURNAL, DELETED = unpack(KEYS)
if not renew(LEASE, ARGV[1], ARGV[2]) then
  return {'lost'}
end
local floor = tonumber(redis.call('HGET', HEAD, 'floor') or 1)
local first = redis.call('XRANGE', JOURNAL, '-', '+', 'COUNT', 1)[1]
local to, answer = floor, 'done'
if first then
  local step = tonumber(string.match(first[1], '^%d+')) + tonumber(ARGV[3])
  if step < floor then
    to, answer = step, 'more'
  end
  redis.call('XTRIM', JOURNAL, 'MINID', digits(to) .. '-0')
end
redis.call('ZREMRANGEBYSCORE', DELETED, '-inf', '(' .. digits(to))
return {answer}
