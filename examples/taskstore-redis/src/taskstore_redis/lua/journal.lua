-- Read entries after a seq.
-- KEYS: head, journal.  ARGV: after, most entries, and the id of the commit
-- that the reader has seen at "after" ('' if none): on another, the ledger is
-- not the one that was read, and what came before is no longer complete.
local HEAD, JOURNAL = unpack(KEYS)
local after, seen = tonumber(ARGV[1]), ARGV[3]
local known = state(HEAD)
local head, floor = tonumber(known[3] or 0), tonumber(known[4] or 1)
if after < floor - 1 then
  return {known, 'expired'}
end
if seen ~= '' then
  if after > head then
    return {known, 'lost'}
  elseif after == head then
    if known[6] ~= seen then
      return {known, 'lost'}
    end
  elseif after >= floor then
    local seq = digits(after) .. '-0'
    local entry = redis.call('XRANGE', JOURNAL, seq, seq)[1]
    if not entry or entry[2][4] ~= seen then
      return {known, 'lost'}
    end
  end
end
if after >= head then
  return {known, 'ok', {}}
end
local entries = redis.call('XRANGE', JOURNAL, digits(after + 1) .. '-0', digits(head) .. '-0',
  'COUNT', ARGV[2])
return {known, 'ok', entries}
