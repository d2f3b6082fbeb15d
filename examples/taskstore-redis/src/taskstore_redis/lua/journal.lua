-- Read the entries after a seq.
-- KEYS: head, journal.  ARGV: after, maximum of entries, and the commit id that
-- the reader knows at "after" ('' if none).  If the ledger has another commit
-- there, its history was replaced, and the answer is 'lost'.
local HEAD, JOURNAL = unpack(KEYS)
local after, expected = tonumber(ARGV[1]), ARGV[3]
local known = state(HEAD)
local head, floor = tonumber(known[3] or 0), tonumber(known[4] or 1)
if after < floor - 1 then
  return {known, 'expired'}
end
if expected ~= '' then
  if after > head then
    return {known, 'lost'}
  elseif after == head then
    if known[6] ~= expected then
      return {known, 'lost'}
    end
  elseif after >= floor then
    local seq = digits(after) .. '-0'
    local entry = redis.call('XRANGE', JOURNAL, seq, seq)[1]
    if not entry or entry[2][4] ~= expected then
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
