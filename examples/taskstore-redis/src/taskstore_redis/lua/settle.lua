-- Say how a commit came out whose answer was lost; if it did not happen, see
-- to it that it never will: the command may still be on its way.
-- KEYS: commits, void.  ARGV: commit id, ms that the void lasts, the last seq
-- that the asker knew before.
local commits = redis.call('XREVRANGE', KEYS[1], '+', '-')
for _, commit in ipairs(commits) do
  local fields = commit[2]
  if fields[2] == ARGV[1] then
    return {'ok', fields[4], string.match(commit[1], '^%d+'), fields[6]}
  end
end
local oldest = commits[#commits]
if oldest and tonumber(oldest[2][4]) > tonumber(ARGV[3]) + 1 then
  -- It may have happened before those that are remembered.
  return {'unknown'}
end
redis.call('SET', KEYS[2], '', 'PX', ARGV[2])
return {'void'}
