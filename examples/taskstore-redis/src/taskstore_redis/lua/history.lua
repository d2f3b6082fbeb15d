-- Read the entries of one task, newest first: each has the seq of the previous
-- one.  KEYS: head, facts, deleted, journal.  ARGV: task, first seq ('' for the
-- task's last), maximum of entries.  Returns the entries, the next seq ('' if
-- there is none), and 'missing' if the entry at that seq is missing.
local HEAD, FACTS, DELETED, JOURNAL = unpack(KEYS)
local id, seq, limit = ARGV[1], ARGV[2], tonumber(ARGV[3])
local floor = tonumber(redis.call('HGET', HEAD, 'floor') or 1)
if seq == '' then
  local facts = redis.call('HGET', FACTS, id)
  seq = facts and split(facts)[1] or redis.call('ZSCORE', DELETED, id) or '0'
end
local entries = {}
while tonumber(seq) >= floor and #entries < limit do
  local entry = redis.call('XRANGE', JOURNAL, seq .. '-0', seq .. '-0')[1]
  if not entry then
    return {entries, seq, 'missing'}
  end
  entries[#entries + 1] = entry
  seq = entry[2][12]
end
return {entries, tonumber(seq) >= floor and seq or '', ''}
