"""What must happen at once in Redis, as Lua. Key and field names are in ``keys``; ``BOOK`` below are its five keys.

Whatever is written is given an end at once (``keys.FORGOTTEN_S``), which the signs of life of workers and replicas put
off again and again.

Where Redis is full, only commands that free memory are obeyed, unless the script has already written: so SUBMIT begins
with a command that a full Redis refuses (nothing is half admitted), and SETTLE and BURY with one that it obeys (a full
Redis can be emptied).
"""

from __future__ import annotations

_BOOK = """
local OPEN, TOKENS, DONE, STREAMS = KEYS[1], KEYS[2], KEYS[3], {KEYS[4], KEYS[5]}

local function find(id)  -- an open job: number of its stream, entry, tokens
  local place = redis.call('HGET', OPEN, id)
  if not place then return nil end
  local s, entry, tokens = string.match(place, '^(%d) (%S+) (%d+)$')
  return tonumber(s), entry, tonumber(tokens)
end

local function close(group, id, s, entry, tokens)
  redis.call('HDEL', OPEN, id)
  redis.call('XACK', STREAMS[s], group, entry)
  redis.call('XDEL', STREAMS[s], entry)
  if redis.call('DECRBY', TOKENS, tokens) < 0 or redis.call('EXISTS', OPEN) == 0 then redis.call('DEL', TOKENS) end
end

local function reply(stream, most, seconds, outcome)
  redis.call('XADD', stream, 'MAXLEN', '~', most, '*', 'o', outcome)
  redis.call('EXPIRE', stream, seconds)
end

local function mine(group, me, s, entry)  -- whether the claim on an entry is ours
  local pending = redis.call('XPENDING', STREAMS[s], group, entry, entry, 1)
  return pending[1] and pending[1][2] == me, pending[1] and pending[1][4]
end
"""

_CLAIM = """
local function claim(s, pending, idle)  -- {deliveries, fields} of another worker's job, which is ours from now on
  local claimed = redis.call('XCLAIM', STREAMS[s], ARGV[1], ARGV[2], idle, pending[1])[1]
  if claimed and find(claimed[2][2]) then return {pending[4] + 1, claimed[2]} end
  -- the entry is gone, or is no open job: nothing is left to do for it
  redis.call('XACK', STREAMS[s], ARGV[1], pending[1])
  redis.call('XDEL', STREAMS[s], pending[1])
end
"""
_STRIKE_OFF = """
local function strike_off(workers, gone, seconds)  -- who gave no sign of life in time is gone
  local now = redis.call('TIME')
  local ms = now[1] * 1000 + math.floor(now[2] / 1000)
  local dead = redis.call('ZRANGEBYSCORE', workers, '-inf', ms)
  if #dead > 0 then
    redis.call('ZREMRANGEBYSCORE', workers, '-inf', ms)  -- first, since a full Redis obeys it
    redis.call('SADD', gone, unpack(dead))
    redis.call('EXPIRE', gone, seconds)
  end
  return ms
end
"""

SUBMIT = (
    _BOOK
    + """
-- ARGV: max tokens, seconds to keep, then for each job: stream, id, tokens, replica, job.
-- Gives {admitted, tokens before}.
local held, cost, used = tonumber(redis.call('GET', TOKENS) or '0'), 0, {}
for i = 3, #ARGV, 5 do cost = cost + tonumber(ARGV[i + 2]) end
if held > 0 and held + cost > tonumber(ARGV[1]) then return {0, held} end
for i = 3, #ARGV, 5 do
  local s, id, tokens = tonumber(ARGV[i]), ARGV[i + 1], ARGV[i + 2]
  if redis.call('HEXISTS', OPEN, id) == 0 then  -- a repeat, after an answer of ours got lost, changes nothing
    local entry = redis.call('XADD', STREAMS[s], '*', 'id', id, 'to', ARGV[i + 3], 'job', ARGV[i + 4])
    redis.call('HSET', OPEN, id, s .. ' ' .. entry .. ' ' .. tokens)
    redis.call('INCRBY', TOKENS, tokens)
    used[STREAMS[s]] = true
  end
end
if next(used) then used[OPEN], used[TOKENS] = true, true end
for key in pairs(used) do redis.call('EXPIRE', key, ARGV[2]) end
return {1, held}
"""
)

SETTLE = (
    _BOOK
    + """
-- KEYS: BOOK, then for each replica: replies, alive.
-- ARGV: group, most replies kept, seconds for which, seconds to keep the rest, then for each job: id, replica, outcome.
-- The first outcome of a job closes it; any later one finds it closed.  Without an outcome it is closed and nobody is
-- told.
local settled = 0
for i = 5, #ARGV, 3 do
  local id, replica, outcome = ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2]
  local s, entry, tokens = find(id)
  if s then
    close(ARGV[1], id, s, entry, tokens)
    settled = settled + 1
    if outcome ~= '' then
      redis.call('INCRBY', DONE, tokens)
      if redis.call('EXISTS', KEYS[5 + 2 * replica]) == 1 then
        reply(KEYS[4 + 2 * replica], ARGV[2], ARGV[3], outcome)
      end
    end
  end
end
if settled > 0 then redis.call('EXPIRE', DONE, ARGV[4]) end
return settled
"""
)

TELL = (
    _BOOK
    + """
-- KEYS: BOOK, replies, alive.  ARGV: group, worker, most replies there, seconds for which they are kept, id, piece.
-- Tells of an open job that is ours, if its replica lives and reads; whether it was told. It never drops another reply.
local s, entry = find(ARGV[5])
if not s or not mine(ARGV[1], ARGV[2], s, entry) then return 0 end
if redis.call('EXISTS', KEYS[7]) == 0 or redis.call('XLEN', KEYS[6]) >= tonumber(ARGV[3]) then return 0 end
redis.call('XADD', KEYS[6], '*', 'o', ARGV[6])
redis.call('EXPIRE', KEYS[6], ARGV[4])
return 1
"""
)

WANTED = (
    _BOOK
    + """
-- KEYS: BOOK, then for each replica: alive.  ARGV: group, worker, then for each job: id, replica.
-- Gives 1 for a job that is open, claimed by this worker, and waited for by a replica that lives; closes those of dead
-- replicas.
local wanted = {}
for i = 3, #ARGV, 2 do
  local s, entry, tokens = find(ARGV[i])
  local yes = s and mine(ARGV[1], ARGV[2], s, entry)
  if yes and redis.call('EXISTS', KEYS[5 + tonumber(ARGV[i + 1])]) == 0 then
    close(ARGV[1], ARGV[i], s, entry, tokens)
    yes = false
  end
  wanted[#wanted + 1] = yes and 1 or 0
end
return wanted
"""
)

RENEW = (
    _BOOK
    + """
-- ARGV: group, worker, then ids.  Gives for each job 1 if its claim is still ours (its idle time begins anew), 0 if it
-- is closed (settled, perhaps by us this moment, or abandoned), -1 if it is open and the claim is not ours any more.
local kept, entries = {}, {{}, {}}
for i = 3, #ARGV do
  local s, entry = find(ARGV[i])
  local yes = s and mine(ARGV[1], ARGV[2], s, entry)
  if yes then table.insert(entries[s], entry) end
  kept[#kept + 1] = s and (yes and 1 or -1) or 0
end
for s = 1, 2 do
  for from = 1, #entries[s], 1000 do
    local some = {unpack(entries[s], from, math.min(from + 999, #entries[s]))}
    some[#some + 1] = 'JUSTID'
    redis.call('XCLAIM', STREAMS[s], ARGV[1], ARGV[2], 0, unpack(some))
  end
end
return kept
"""
)

RECLAIM = (
    _BOOK
    + _CLAIM
    + """
-- ARGV: group, worker, idle milliseconds, most jobs, deliveries of a suspect.
-- Gives jobs of other workers that have not been heard of for so long, {deliveries, fields} each: at most one suspect,
-- and nothing beside it. Our own claims may be as old after a stall; we live, so it is no delivery more.
local taken = {}
for s = 1, 2 do
  local from, page = '-', nil
  repeat
    page = redis.call('XPENDING', STREAMS[s], ARGV[1], 'IDLE', ARGV[3], from, '+', ARGV[4])
    for _, pending in ipairs(page) do
      local suspect = pending[4] + 1 >= tonumber(ARGV[5])
      from = '(' .. pending[1]
      if pending[2] ~= ARGV[2] and #taken < tonumber(ARGV[4]) and not (suspect and #taken > 0) then
        local job = claim(s, pending, ARGV[3])
        taken[#taken + 1] = job
        if job and suspect then return taken end
      end
    end
  until #taken > 0 or #page < tonumber(ARGV[4])
end
return taken
"""
)

INHERIT = (
    _BOOK
    + _CLAIM
    + """
-- KEYS: BOOK, workers, gone.  ARGV: group, worker, most jobs, deliveries of a suspect, seconds to keep.
-- Gives jobs of workers that are gone, whatever the age of their claims, {deliveries, fields} each: at most one
-- suspect, and nothing beside it. Costs next to nothing where nobody is.
"""
    + _STRIKE_OFF
    + """
strike_off(KEYS[6], KEYS[7], ARGV[5])
local taken = {}
for _, gone in ipairs(redis.call('SMEMBERS', KEYS[7])) do
  local left = false
  for s = 1, 2 do
    local page = redis.call('XPENDING', STREAMS[s], ARGV[1], '-', '+', ARGV[3], gone)
    left = left or #page == tonumber(ARGV[3])
    for _, pending in ipairs(page) do
      local suspect = pending[4] + 1 >= tonumber(ARGV[4])
      if gone == ARGV[2] or #taken >= tonumber(ARGV[3]) or (suspect and #taken > 0) then
        left = true
      else
        local job = claim(s, pending, 0)
        taken[#taken + 1] = job
        if job and suspect then return taken end
      end
    end
  end
  if not left then redis.call('SREM', KEYS[7], gone) end
end
return taken
"""
)

RECALL = (
    _BOOK
    + """
-- ARGV: group, worker.  Gives what this worker has claimed, {deliveries, fields} each: also where the answer got lost
-- on its way.
local claimed = {}
for s = 1, 2 do
  for _, pending in ipairs(redis.call('XPENDING', STREAMS[s], ARGV[1], '-', '+', 10000, ARGV[2])) do
    local entry = redis.call('XRANGE', STREAMS[s], pending[1], pending[1])[1]
    if entry and find(entry[2][2]) then claimed[#claimed + 1] = {pending[4], entry[2]} end
  end
end
return claimed
"""
)

RELEASE = (
    _BOOK
    + """
-- KEYS: BOOK, gone.  ARGV: group, worker, nobody, seconds to keep, then ids.  Makes claims of ours those of a worker
-- that is gone, so that any other takes them over at once.
for i = 5, #ARGV do
  local s, entry = find(ARGV[i])
  local yes, deliveries = false, 0
  if s then yes, deliveries = mine(ARGV[1], ARGV[2], s, entry) end
  if yes then
    redis.call('XCLAIM', STREAMS[s], ARGV[1], ARGV[3], 0, entry, 'RETRYCOUNT', deliveries, 'JUSTID')
    redis.call('SADD', KEYS[6], ARGV[3])
    redis.call('EXPIRE', KEYS[6], ARGV[4])
  end
end
"""
)

REQUEUE = (
    _BOOK
    + """
-- ARGV: group, worker, then ids.  Puts jobs that were claimed and never begun back at the end of their stream, as if
-- never delivered.
for i = 3, #ARGV do
  local s, entry, tokens = find(ARGV[i])
  if s and mine(ARGV[1], ARGV[2], s, entry) then
    local fields = redis.call('XRANGE', STREAMS[s], entry, entry)[1][2]
    redis.call('XACK', STREAMS[s], ARGV[1], entry)
    redis.call('XDEL', STREAMS[s], entry)
    redis.call('HSET', OPEN, ARGV[i], s .. ' ' .. redis.call('XADD', STREAMS[s], '*', unpack(fields)) .. ' ' .. tokens)
  end
end
"""
)

BURY = (
    _BOOK
    + """
-- KEYS: BOOK, dead letters, replies, alive.
-- ARGV: group, worker, most letters kept, seconds for which, id, reason, deliveries, outcome, most replies kept,
-- seconds for which, our backbone.
local s, entry, tokens = find(ARGV[5])
if not s or not mine(ARGV[1], ARGV[2], s, entry) then return 0 end
local fields = redis.call('XRANGE', STREAMS[s], entry, entry)[1][2]
for _, more in ipairs({'reason', ARGV[6], 'deliveries', ARGV[7], 'queue', tostring(s), 'backbone', ARGV[11]}) do
  fields[#fields + 1] = more
end
close(ARGV[1], ARGV[5], s, entry, tokens)
redis.call('XADD', KEYS[6], 'MAXLEN', '~', ARGV[3], '*', unpack(fields))
redis.call('EXPIRE', KEYS[6], ARGV[4])
if redis.call('EXISTS', KEYS[8]) == 1 then reply(KEYS[7], ARGV[9], ARGV[10], ARGV[8]) end
return 1
"""
)

BEAT = (
    _BOOK
    + """
-- KEYS: BOOK, alive, workers, dead, backbone, then more that lives as long.
-- ARGV: milliseconds to live, group, seconds to keep.
-- A replica lives on.  Gives {lived until now, the backbone that the queue is served with or '', open jobs, open
-- tokens, tokens done, workers alive, dead letters, jobs in the first stream, those of them that are claimed, jobs in
-- the second stream, those of them that are claimed}.
local lived = redis.call('PEXPIRE', KEYS[6], ARGV[1])  -- a full Redis obeys this one, not SET
if lived == 0 then redis.call('SET', KEYS[6], '1', 'PX', ARGV[1]) end
local now = redis.call('TIME')
local workers = redis.call('ZCOUNT', KEYS[7], now[1] * 1000 + math.floor(now[2] / 1000), '+inf')
local beat = {
  lived, redis.call('GET', KEYS[9]) or '', redis.call('HLEN', OPEN), tonumber(redis.call('GET', TOKENS) or '0'),
  tonumber(redis.call('GET', DONE) or '0'), workers, redis.call('XLEN', KEYS[8])
}
for i = 1, #KEYS do
  if i ~= 6 and i ~= 9 then redis.call('EXPIRE', KEYS[i], ARGV[3]) end
end
for _, stream in ipairs({STREAMS[1], STREAMS[2]}) do
  beat[#beat + 1] = redis.call('XLEN', stream)
  local pending = redis.pcall('XPENDING', stream, ARGV[2])  -- an error as long as no worker has made the group
  beat[#beat + 1] = pending.err and 0 or pending[1]
end
return beat
"""
)

ENLIST = (
    _STRIKE_OFF
    + """
-- KEYS: backbone, workers, worker, gone, then more that lives as long.
-- ARGV: our backbone, worker, milliseconds to live, who it is, seconds to keep.
-- A worker lives on, if the queue is served with its backbone or with none.  Gives the backbone that it is served with.
local served = redis.call('GET', KEYS[1])
if served and served ~= ARGV[1] then
  redis.call('ZREM', KEYS[2], ARGV[2])
  redis.call('DEL', KEYS[3])
  return served
end
-- a full Redis obeys PEXPIRE, not SET
if redis.call('PEXPIRE', KEYS[1], ARGV[3]) == 0 then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3]) end
local ms = strike_off(KEYS[2], KEYS[4], ARGV[5])
redis.call('ZADD', KEYS[2], ms + ARGV[3], ARGV[2])
redis.call('SREM', KEYS[4], ARGV[2])  -- it may have been late, not dead
if redis.call('PEXPIRE', KEYS[3], ARGV[3]) == 0 or ARGV[4] ~= '' then
  redis.call('SET', KEYS[3], ARGV[4], 'PX', ARGV[3])
end
for i = 2, #KEYS do
  if i ~= 3 then redis.call('EXPIRE', KEYS[i], ARGV[5]) end
end
return ARGV[1]
"""
)

LEAVE = """
-- KEYS: backbone, workers, worker, gone.  ARGV: our backbone, worker, seconds to keep.
-- The last worker of a backbone leaves the queue to any other; what this one still has is for others at once.
redis.call('DEL', KEYS[3])
redis.call('ZREM', KEYS[2], ARGV[2])
redis.call('SADD', KEYS[4], ARGV[2])
redis.call('EXPIRE', KEYS[4], ARGV[3])
local now = redis.call('TIME')
local others = redis.call('ZCOUNT', KEYS[2], now[1] * 1000 + math.floor(now[2] / 1000), '+inf')
if others == 0 and redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""

DISMISS = """
-- KEYS: one job stream.  ARGV: group, idle milliseconds.  Forgets workers that hold nothing and have not asked for
-- anything so long.
local gone = 0
for _, row in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local consumer = {}
  for i = 1, #row, 2 do consumer[row[i]] = row[i + 1] end
  if consumer.pending == 0 and consumer.idle > tonumber(ARGV[2]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer.name)
    gone = gone + 1
  end
end
return gone
"""
