-- Replace the whole content by the staged content, atomically.
-- KEYS: head, staging, snapshots, commits, void, journal, deleted, cut,
-- saved; then six live keys and the six staged ones that replace them.
-- ARGV: format, token (the commit id), ledger id, seq, at, records, chunks,
-- prefix of snapshot keys.
local HEAD, STAGING, SNAPSHOTS, COMMITS, VOID, JOURNAL, DELETED, CUT, SAVED = unpack(KEYS, 1, 9)
local FORMAT, TOKEN, LEDGER, SEQ, AT, RECORDS, CHUNKS, PREFIX = unpack(ARGV)
local LIVE, CONTENT = 9, 6
if redis.call('EXISTS', VOID) == 1 then
  return {'void'}
end
local known = state(HEAD)
if known[3] and known[7] ~= FORMAT then
  return {'format', known[7] or ''}
end
local head = tonumber(known[3] or 0)
if head > 0 and tonumber(SEQ) <= head then
  return {'behind', known[3]}
end
if redis.call('HEXISTS', STAGING, TOKEN) == 0 then
  return {'gone'}
end
redis.call('XLEN', COMMITS)
local snapshots = redis.call('HVALS', SNAPSHOTS)

for _, snapshot in ipairs(snapshots) do
  redis.call('UNLINK', PREFIX .. split(snapshot)[4])
end
redis.call('UNLINK', SNAPSHOTS, JOURNAL, DELETED, CUT, SAVED)
for n = LIVE + 1, LIVE + CONTENT do
  -- RENAME over a large key would free it synchronously.
  redis.call('UNLINK', KEYS[n])
  if redis.call('EXISTS', KEYS[n + CONTENT]) == 1 then
    redis.call('RENAME', KEYS[n + CONTENT], KEYS[n])
  end
end
redis.call('HSET', SNAPSHOTS, SEQ, AT .. '\0' .. RECORDS .. '\0' .. CHUNKS .. '\0' .. TOKEN)
redis.call('HDEL', STAGING, TOKEN)
local at = tonumber(AT) > tonumber(known[5] or 0) and AT or known[5] or '0'
redis.call('HDEL', HEAD, 'base')
redis.call('HSET', HEAD, 'format', FORMAT, 'ledger', known[1] or LEDGER,
  'timeline', digits(tonumber(known[2] or 0) + 1), 'head', SEQ,
  'floor', digits(tonumber(SEQ) + 1), 'at', at, 'commit', TOKEN)
announce(COMMITS, SEQ, TOKEN, SEQ, at)
return {'ok', SEQ, SEQ, at}
