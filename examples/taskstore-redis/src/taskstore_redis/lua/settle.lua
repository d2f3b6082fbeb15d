-- Look up the outcome of a commit whose answer was lost.  If the commit is
-- missing, void it, because the server may still receive the command.
-- KEYS: commits, void.  ARGV: commit id, duration of the void key in ms, the
-- last seq that the caller knew before the commit.
local commits = redis.call('XREVRANGE', KEYS[1], '+', '-')
for _, commit in ipairs(commits) do
  local fields = commit[2]
  if fields[2] == ARGV[1] then
    return {'ok', fields[4], string.match(commit[1], '^%d+'), fields[6]}
  end
end
local oldest = commits[#commits]
if oldest and tonumber(oldest[2][4]) > tonumber(ARGV[3]) + 1 then
  -- The commit may be older than the listed ones.
  return {'unknown'}
end
redis.call('SET', KEYS[2], '', 'PX', ARGV[2])
return {'void'}
