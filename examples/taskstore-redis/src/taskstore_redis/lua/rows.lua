-- Read records by their ids; the state and all records are of one seq.
-- KEYS: head, rows, facts.  ARGV: ids.  Returns the state, then facts and
-- image of each id, null if the id does not exist.
local reply = {state(KEYS[1])}
for _, id in ipairs(ARGV) do
  reply[#reply + 1] = redis.call('HGET', KEYS[3], id)
  reply[#reply + 1] = redis.call('HGET', KEYS[2], id)
end
return reply
