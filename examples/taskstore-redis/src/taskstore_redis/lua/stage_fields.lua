-- Set fields of a staged hash.
-- KEYS: staging, the hash.  ARGV: token, then fields and values.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then
  return {'gone'}
end
for n = 2, #ARGV, 2 do
  redis.call('HSET', KEYS[2], ARGV[n], ARGV[n + 1])
end
return {'ok'}
