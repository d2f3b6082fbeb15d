-- Delete staged content that was not published.
-- KEYS: staging, and the keys of the staged content.  ARGV: token.
if redis.call('HDEL', KEYS[1], ARGV[1]) == 1 then
  redis.call('UNLINK', unpack(KEYS, 2))
end
return {'ok'}
