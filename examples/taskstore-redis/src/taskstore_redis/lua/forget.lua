-- Throw away what was staged and did not become anything.
-- KEYS: staging, and everything that was staged.  ARGV: token.
if redis.call('HDEL', KEYS[1], ARGV[1]) == 1 then
  redis.call('UNLINK', unpack(KEYS, 2))
end
return {'ok'}
