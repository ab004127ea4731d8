-- The schema of stanchion in PostgreSQL. Applying it again changes nothing, and several processes may apply it at once.
--
-- Each operation of the protocol is a function, and costs one round trip. An operation locks one row of `keys`, and
-- then reads the clock: `clock_timestamp()`, never `now()`, which stands still while an operation waits for the row.
-- Times are µs since 1970; tokens and sessions are 16 bytes. Every column is qualified with its table, so a bare name
-- is a variable.

BEGIN ISOLATION LEVEL READ COMMITTED;

-- Unqualified names resolve to objects of the server. Without this line another role could put its own objects before
-- them.
SET LOCAL search_path = pg_catalog, pg_temp;

-- One process at a time applies the schema. Every role can take this lock, so the wait has a limit.
SET LOCAL lock_timeout = '60s';
SELECT pg_advisory_xact_lock(hashtextextended('stanchion schema', 0));

-- Another role may already have created the schema, or a part of it. Its code would run with the rights of the role
-- that applies this script, so the script checks the owner of all parts before it touches one.
DO $$
DECLARE
  owner name;
  wrong text;
BEGIN
  SELECT pg_get_userbyid(n.nspowner) INTO owner FROM pg_namespace n WHERE n.oid = to_regnamespace('@schema@');
  IF owner <> current_user THEN
    RAISE EXCEPTION 'the schema belongs to %: apply it as that role, or name another schema', owner USING ERRCODE = 'SF005';
  END IF;
  SELECT string_agg(w.wrong, '; ') INTO wrong FROM (SELECT f.wrong FROM (
@foreign@
  ) f LIMIT 3) w;
  IF wrong IS NOT NULL THEN
    RAISE EXCEPTION '%', wrong USING ERRCODE = 'SF005';
  END IF;
END $$;

DO $$
DECLARE
  found integer;
BEGIN
  IF to_regnamespace('@schema@') IS NULL THEN
    CREATE SCHEMA @schema@;
  END IF;
  IF to_regclass('@schema@.meta') IS NOT NULL THEN
    SELECT version INTO found FROM @schema@.meta;
    IF found > 7 THEN
      RAISE EXCEPTION 'the schema is of version %, newer than this program: update the program', found
        USING ERRCODE = 'SF003';
    END IF;
    IF found < 5 THEN
      -- The columns of their results have changed.
      DROP FUNCTION IF EXISTS @schema@.acquire, @schema@.poll_many, @schema@.together;
    END IF;
    IF found < 7 THEN
      DROP FUNCTION IF EXISTS @schema@.state_of, @schema@.inspect, @schema@.list_page;
    END IF;
  END IF;
END $$;
COMMENT ON SCHEMA @schema@ IS 'stanchion: distributed locks';

CREATE TABLE IF NOT EXISTS @schema@.meta (
  one boolean PRIMARY KEY DEFAULT true CHECK (one),
  version integer NOT NULL,
  -- Identifies this database. A store with a user's pool compares the identifiers behind the pool and behind the URL.
  id uuid NOT NULL DEFAULT gen_random_uuid(),
  -- No fence of a deleted key is higher than this.
  fence_floor bigint NOT NULL DEFAULT 0,
  -- The last key that housekeeping has visited. It visits the keys in order.
  tidied_to text COLLATE "C" NOT NULL DEFAULT ''
);
-- Only the owner can read the secret: see `turn`.
ALTER TABLE @schema@.meta ADD COLUMN IF NOT EXISTS secret bytea NOT NULL DEFAULT uuid_send(gen_random_uuid());

-- The sessions of processes. A session is alive until `expires`, and never becomes alive again.
CREATE TABLE IF NOT EXISTS @schema@.sessions (
  id bytea PRIMARY KEY,
  owner text NOT NULL,
  ttl bigint NOT NULL,
  expires bigint NOT NULL
) WITH (fillfactor = 50);

-- The keys. The columns from `token` to `trace` are the hold of a mutex without a deadline, as long as the key has no
-- waiters and no other state. This most frequent case costs one update of one row. If `busy`, the state of the key is
-- in `holds`, `queue` and `forced`. `waiting` is the number of waiters in the queue.
CREATE TABLE IF NOT EXISTS @schema@.keys (
  key text COLLATE "C" PRIMARY KEY,
  fence bigint,
  closed_until bigint,
  busy boolean NOT NULL DEFAULT false,
  waiting integer NOT NULL DEFAULT 0,
  token bytea,
  session bytea,
  at bigint,
  metadata text,
  trace text
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000);

CREATE TABLE IF NOT EXISTS @schema@.holds (
  key text COLLATE "C" NOT NULL,
  token bytea NOT NULL,
  session bytea NOT NULL,
  bound boolean NOT NULL,
  deadline bigint,
  fence bigint NOT NULL,
  units integer NOT NULL,
  capacity integer NOT NULL,
  owner text NOT NULL,
  at bigint NOT NULL,
  metadata text,
  trace text,
  -- The holder may keep the hold without using it, until it is recalled. Its fences are `fence` and those above it, up to
  -- the newest fence of the key. `checked` is the highest one that `check_fence` has accepted.
  lingers boolean NOT NULL DEFAULT false,
  checked bigint NOT NULL DEFAULT 0,
  PRIMARY KEY (key, token)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000);
DO $$
BEGIN
  -- Since version 7. An ALTER TABLE locks the table even if it has nothing to add, so this looks first. A running program
  -- of version 6 calls the new functions: they recall and unmark a hold that lingers as for any other program. It marks
  -- no hold, so it receives no recall.
  IF NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = '@schema@.holds'::regclass AND attname = 'lingers') THEN
    ALTER TABLE @schema@.holds ADD COLUMN lingers boolean NOT NULL DEFAULT false,
      ADD COLUMN checked bigint NOT NULL DEFAULT 0;
  END IF;
END $$;

CREATE TABLE IF NOT EXISTS @schema@.queue (
  key text COLLATE "C" NOT NULL,
  place bigint GENERATED ALWAYS AS IDENTITY,
  token bytea NOT NULL,
  session bytea NOT NULL,
  bound boolean NOT NULL,
  term bigint,
  units integer NOT NULL,
  capacity integer NOT NULL,
  at bigint NOT NULL,
  metadata text,
  trace text,
  PRIMARY KEY (key, place)
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 1000);
CREATE UNIQUE INDEX IF NOT EXISTS queue_token ON @schema@.queue (key, token);
CREATE INDEX IF NOT EXISTS queue_session ON @schema@.queue (session);

-- Force-released tokens. A token in this table is never granted again, and a renewal reports it to its session.
CREATE TABLE IF NOT EXISTS @schema@.forced (
  token bytea PRIMARY KEY,
  session bytea NOT NULL,
  key text COLLATE "C" NOT NULL,
  reason text NOT NULL,
  at bigint NOT NULL
);
CREATE INDEX IF NOT EXISTS forced_session ON @schema@.forced (session);
CREATE INDEX IF NOT EXISTS forced_key ON @schema@.forced (key);

CREATE OR REPLACE FUNCTION @schema@.clock() RETURNS bigint LANGUAGE sql VOLATILE AS
$$ SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint $$;

-- Check the limits that the documentation of the store states. The operations check them too, because the right to call
-- an operation must not allow a role to write values that others cannot read. A span may be a little longer than 30
-- days, because a lifetime is sent with its grace.
CREATE OR REPLACE FUNCTION @schema@.is_span(span bigint) RETURNS boolean LANGUAGE sql IMMUTABLE AS
$$ SELECT span BETWEEN 1 AND 2721610000000 $$;

CREATE OR REPLACE FUNCTION @schema@.is_request(
  token bytea, session bytea, units integer, capacity integer, bound boolean, term bigint, enqueue boolean,
  not_after bigint, metadata text, trace text
) RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
  SELECT octet_length(token) = 16 AND octet_length(session) = 16 AND units BETWEEN 1 AND capacity
    AND bound IS NOT NULL AND (bound OR term IS NOT NULL) AND (term IS NULL OR @schema@.is_span(term))
    AND enqueue IS NOT NULL AND not_after >= 0
    AND (metadata IS NULL OR octet_length(metadata) <= 4096) AND (trace IS NULL OR octet_length(trace) <= 4096)
$$;

-- Returns whether `Key::from_encoded` accepts the text. In a store with a prefix a key may be longer than a user's key.
CREATE OR REPLACE FUNCTION @schema@.is_key(wanted text) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
DECLARE
  length integer;
  rest bytea;
BEGIN
  IF octet_length(wanted) > 1024 OR wanted !~ '^([1-9][0-9]?[0-9]?)?:' THEN RETURN false; END IF;
  length := coalesce(nullif(split_part(wanted, ':', 1), ''), '0');
  rest := convert_to(substr(wanted, strpos(wanted, ':') + 1), 'UTF8');
  IF length > 255 OR octet_length(rest) <= length THEN RETURN false; END IF;
  -- The name must begin at the first byte of a character.
  RETURN get_byte(rest, length) & 192 <> 128;
END $$;

CREATE OR REPLACE FUNCTION @schema@.refuse_unless(fits boolean, what text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF fits IS NOT TRUE THEN
    RAISE EXCEPTION '% is outside of the limits', what USING ERRCODE = 'SF006';
  END IF;
END $$;

-- Functions that read a table are not in the language SQL, because the server would plan them again for each call.
CREATE OR REPLACE FUNCTION @schema@.lives(wanted bytea, at bigint) RETURNS boolean LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_variable
BEGIN
  RETURN EXISTS (SELECT FROM @schema@.sessions s WHERE s.id = wanted AND s.expires > at);
END $$;

-- Returns a fence that is higher than the last one, and no lower than the clock.
CREATE OR REPLACE FUNCTION @schema@.next_fence(last bigint) RETURNS bigint LANGUAGE plpgsql AS $$
#variable_conflict use_variable
BEGIN
  IF last = 9223372036854775807 THEN
    RAISE EXCEPTION 'the key has the highest fence there is' USING ERRCODE = 'SF002';
  END IF;
  RETURN greatest(@schema@.clock(), last + 1);
END $$;

-- Sends a message to a session, over the channel of the session. Without a listener this does nothing.
CREATE OR REPLACE FUNCTION @schema@.tell(session bytea, message text) RETURNS void LANGUAGE plpgsql AS $$
#variable_conflict use_variable
BEGIN
  -- The server accepts messages of up to 7999 bytes. The next renewal reports a loss whose message is too long.
  IF octet_length(message) < 8000 THEN
    PERFORM pg_catalog.pg_notify('stanchion_' || encode(session, 'hex'), message);
  END IF;
END $$;

-- Returns whether a request fits next to the holds of a key. The sum of all units must not exceed the smallest
-- capacity.
CREATE OR REPLACE FUNCTION @schema@.fits(wanted text, units integer, capacity integer) RETURNS boolean
LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_variable
BEGIN
  -- Without holds `min` is NULL, which `least` ignores.
  RETURN (SELECT coalesce(sum(h.units), 0) + units <= least(capacity, min(h.capacity))
          FROM @schema@.holds h WHERE h.key = wanted);
END $$;

-- Returns the smallest capacity among the holds of a key that leave room for others.
CREATE OR REPLACE FUNCTION @schema@.in_use(wanted text) RETURNS integer LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_variable
BEGIN
  RETURN (SELECT min(h.capacity) FROM @schema@.holds h WHERE h.key = wanted AND h.units < h.capacity);
END $$;

-- Notifies the holder of a hold that lingers that a request waits for the key. A holder that lingers has its key alone.
CREATE OR REPLACE FUNCTION @schema@.recall(wanted text) RETURNS void LANGUAGE plpgsql AS $$
#variable_conflict use_variable
BEGIN
  PERFORM @schema@.tell(h.session, 'R' || encode(h.token, 'hex')) FROM @schema@.holds h
  WHERE h.key = wanted AND h.lingers;
END $$;

-- Reconciles a key: removes expired holds and everything of expired sessions, and grants the waiters at the head of the
-- queue that fit.
CREATE OR REPLACE FUNCTION @schema@.settle(INOUT rec @schema@.keys) LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
  now bigint := @schema@.clock();
  first @schema@.queue;
  dropped integer;
BEGIN
  -- This does not use `lives`, because a thousand readers would cost a thousand calls.
  DELETE FROM @schema@.holds h WHERE h.key = rec.key AND (h.deadline <= now
    OR h.bound AND NOT EXISTS (SELECT FROM @schema@.sessions s WHERE s.id = h.session AND s.expires > now));
  IF rec.closed_until <= now THEN rec.closed_until := NULL; END IF;
  LOOP
    SELECT * INTO first FROM @schema@.queue q WHERE q.key = rec.key ORDER BY q.place LIMIT 1;
    EXIT WHEN NOT FOUND;
    IF NOT @schema@.lives(first.session, now) THEN
      -- Remove all expired waiters before the first live one at once, because there may be thousands.
      DELETE FROM @schema@.queue q WHERE q.key = rec.key AND q.place < coalesce(
        (SELECT l.place FROM @schema@.queue l JOIN @schema@.sessions s ON s.id = l.session
         WHERE l.key = rec.key AND s.expires > now ORDER BY l.place LIMIT 1), 9223372036854775807);
      GET DIAGNOSTICS dropped = ROW_COUNT;
      rec.waiting := rec.waiting - dropped;
      CONTINUE;
    END IF;
    EXIT WHEN rec.closed_until IS NOT NULL;
    -- There is no higher fence, so nothing is granted: polls report that. Holders can still release.
    EXIT WHEN rec.fence = 9223372036854775807;
    EXIT WHEN NOT @schema@.fits(rec.key, first.units, first.capacity);
    DELETE FROM @schema@.queue q WHERE q.key = rec.key AND q.place = first.place;
    rec.waiting := rec.waiting - 1;
    rec.fence := @schema@.next_fence(rec.fence);
    INSERT INTO @schema@.holds
      SELECT rec.key, first.token, first.session, first.bound, now + first.term, rec.fence, first.units,
             first.capacity, s.owner, now, first.metadata, first.trace
      FROM @schema@.sessions s WHERE s.id = first.session;
    PERFORM @schema@.tell(first.session, 'G' || encode(first.token, 'hex') || rec.fence || ' ' || rec.key);
  END LOOP;
END $$;

-- Returns the number of the advisory lock that an operation takes before it touches the row of a key. The lock puts the
-- operations in order: transactions that only wait for a row overtake each other, and one may wait forever. The lock
-- belongs to the transaction, not to the connection. Two keys with the same number wait for each other, which is
-- harmless. Every role of the database can take an advisory lock, so a secret makes the number impossible to guess.
CREATE OR REPLACE FUNCTION @schema@.turn(wanted text, secret bytea) RETURNS bigint LANGUAGE sql STABLE AS $$
  SELECT pg_catalog.hashtextextended(pg_catalog.encode(
    pg_catalog.sha256(secret || pg_catalog.convert_to('@schema@ ' || wanted, 'UTF8')), 'hex'), 0)
$$;
DROP FUNCTION IF EXISTS @schema@.turn(text);

-- Rejects isolation levels whose transactions see one snapshot. An operation that has waited must see the commits of
-- that time. With one snapshot the clock would go on but the renewals of sessions would be invisible, so live sessions
-- would count as expired. A function cannot change the level, so it raises an error.
CREATE OR REPLACE FUNCTION @schema@.sees_what_is_new() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF pg_catalog.current_setting('transaction_isolation') IN ('repeatable read', 'serializable') THEN
    RAISE EXCEPTION 'a step is not done in a transaction of %', pg_catalog.current_setting('transaction_isolation')
      USING ERRCODE = 'SF004', HINT = $hint$ALTER ROLE ... SET default_transaction_isolation = 'read committed'$hint$;
  END IF;
END $$;

-- Rejects reads on a server that accepts no writes. It is a standby, or was the primary before a failover, and its data
-- may be old.
CREATE OR REPLACE FUNCTION @schema@.sees_the_present() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF pg_catalog.current_setting('transaction_read_only') = 'on' THEN
    RAISE EXCEPTION 'a look is not done in a read-only transaction' USING ERRCODE = '25006';
  END IF;
END $$;

-- Locks the row of a key and reconciles the key. Afterwards all holds of the key are in `holds`. The caller must call
-- `put`.
CREATE OR REPLACE FUNCTION @schema@.take(wanted text) RETURNS @schema@.keys LANGUAGE plpgsql AS $$
#variable_conflict use_variable
DECLARE
  rec @schema@.keys;
BEGIN
  PERFORM @schema@.sees_what_is_new();
  PERFORM pg_catalog.pg_advisory_xact_lock(@schema@.turn(wanted, m.secret)) FROM @schema@.meta m;
  LOOP
    SELECT * INTO rec FROM @schema@.keys k WHERE k.key = wanted FOR UPDATE;
    EXIT WHEN FOUND;
    PERFORM @schema@.refuse_unless(@schema@.is_key(wanted), 'the key');
    INSERT INTO @schema@.keys (key) VALUES (wanted) ON CONFLICT DO NOTHING;
  END LOOP;
  IF rec.fence IS NULL THEN
    -- The row is new. Its fences must be above the floor, which is read only now, because housekeeping could still
    -- raise the floor for this key until the row existed.
    SELECT m.fence_floor INTO rec.fence FROM @schema@.meta m;
  END IF;
  IF rec.token IS NOT NULL THEN
    INSERT INTO @schema@.holds
      SELECT rec.key, rec.token, rec.session, true, NULL, rec.fence, 1, 1, s.owner, rec.at,
             rec.metadata, rec.trace
      FROM @schema@.sessions s WHERE s.id = rec.session;
    rec.token := NULL;
    rec.session := NULL;
    rec.at := NULL;
    rec.metadata := NULL;
    rec.trace := NULL;
  END IF;
  RETURN @schema@.settle(rec);
END $$;

-- Reconciles a key and writes its row.
CREATE OR REPLACE FUNCTION @schema@.put(rec @schema@.keys) RETURNS void LANGUAGE plpgsql AS $$
#variable_conflict use_variable
BEGIN
  rec := @schema@.settle(rec);
  rec.busy := rec.closed_until IS NOT NULL OR rec.waiting > 0
    OR EXISTS (SELECT FROM @schema@.holds h WHERE h.key = rec.key)
    OR EXISTS (SELECT FROM @schema@.forced f WHERE f.key = rec.key);
  UPDATE @schema@.keys k SET fence = rec.fence, closed_until = rec.closed_until, busy = rec.busy,
    waiting = rec.waiting, token = NULL, session = NULL, at = NULL, metadata = NULL, trace = NULL
  WHERE k.key = rec.key
    AND (k.fence, k.closed_until, k.busy, k.waiting, k.token) IS DISTINCT FROM
        (rec.fence, rec.closed_until, rec.busy, rec.waiting, NULL::bytea);
END $$;

-- Returns the time in µs after which the state of a waiter may change without any operation.
CREATE OR REPLACE FUNCTION @schema@.check_in(rec @schema@.keys, now bigint) RETURNS bigint LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_variable
BEGIN
  RETURN least(
    (SELECT min(least(h.deadline, CASE WHEN h.bound THEN s.expires END))
     FROM @schema@.holds h LEFT JOIN @schema@.sessions s ON s.id = h.session WHERE h.key = rec.key),
    (SELECT s.expires FROM @schema@.queue q JOIN @schema@.sessions s ON s.id = q.session
     WHERE q.key = rec.key ORDER BY q.place LIMIT 1),
    rec.closed_until) - now;
END $$;

CREATE OR REPLACE FUNCTION @schema@.ahead(wanted text, before bigint) RETURNS bigint LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_variable
BEGIN
  RETURN (SELECT count(*) FROM @schema@.queue q WHERE q.key = wanted AND q.place < before);
END $$;

-- The operations. `at` is the time of the store, and spans are in µs. `number` is the number of waiters before a request
-- that is queued, and the number of holds that linger if the answer is `busy`. Their settings guard the plans:
-- - `enable_bitmapscan`: the rows of a key are inserted and deleted often. A plain index scan marks dead entries and
--   then skips them. A bitmap scan, which the planner prefers for tables without statistics, visits them every time.
-- - `enable_seqscan`: a connection keeps its plans. A plan from the time when a table was small would scan the whole
--   table, even after many keys have been added.
-- - `jit`: the planner estimates a remaining table scan as so expensive that the server would compile the plan.

CREATE OR REPLACE FUNCTION @schema@.acquire(
  wanted text, asked_token bytea, asked_session bytea, asked_units integer, asked_capacity integer, asked_bound boolean,
  asked_term bigint, enqueue boolean, not_after bigint, asked_metadata text, asked_trace text,
  OUT outcome text, OUT at bigint, OUT fence bigint, OUT remaining bigint, OUT number bigint, OUT check_in bigint,
  OUT in_use integer
) LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
  SET enable_bitmapscan = off SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
  rec @schema@.keys;
  hold @schema@.holds;
  place bigint;
  dropped integer;
  is_plain boolean;
  lowest bigint;
BEGIN
  PERFORM @schema@.sees_what_is_new();
  PERFORM @schema@.refuse_unless(@schema@.is_request(asked_token, asked_session, asked_units, asked_capacity, asked_bound,
    asked_term, enqueue, not_after, asked_metadata, asked_trace), 'a part of the request');
  -- The fast path takes the turn too, because an update that finds the row changed leaves it locked.
  PERFORM pg_catalog.pg_advisory_xact_lock(@schema@.turn(wanted, m.secret)) FROM @schema@.meta m;
  is_plain := asked_capacity = 1 AND asked_bound AND asked_term IS NULL;
  WHILE is_plain LOOP
    UPDATE @schema@.keys k SET fence = greatest(@schema@.clock(), coalesce(k.fence, lowest) + 1), token = asked_token,
      session = asked_session, at = @schema@.clock(), metadata = asked_metadata, trace = asked_trace
    FROM @schema@.sessions s
    WHERE k.key = wanted AND k.token IS NULL AND NOT k.busy AND coalesce(k.fence, lowest) < 9223372036854775807
      AND s.id = asked_session AND s.expires > @schema@.clock() AND @schema@.clock() <= not_after
    RETURNING k.fence INTO fence;
    IF FOUND THEN
      at := @schema@.clock();
      outcome := 'granted';
      -- The update may have waited for the row.
      IF at > not_after THEN
        UPDATE @schema@.keys k SET token = NULL, session = NULL, at = NULL, metadata = NULL, trace = NULL
        WHERE k.key = wanted;
        outcome := 'stale';
      END IF;
      RETURN;
    END IF;
    -- A new key takes the fast path too. One statement inserts its row and a later one grants it: see `take`.
    EXIT WHEN lowest IS NOT NULL OR EXISTS (SELECT FROM @schema@.keys k WHERE k.key = wanted)
      OR NOT @schema@.lives(asked_session, @schema@.clock());
    PERFORM @schema@.refuse_unless(@schema@.is_key(wanted), 'the key');
    INSERT INTO @schema@.keys (key) VALUES (wanted) ON CONFLICT DO NOTHING;
    EXIT WHEN NOT FOUND;
    SELECT m.fence_floor INTO lowest FROM @schema@.meta m;
  END LOOP;
  rec := @schema@.take(wanted);
  at := @schema@.clock();
  SELECT * INTO hold FROM @schema@.holds h WHERE h.key = wanted AND h.token = asked_token;
  SELECT q.place INTO place FROM @schema@.queue q WHERE q.key = wanted AND q.token = asked_token;
  IF NOT @schema@.lives(asked_session, at) THEN
    outcome := 'session_gone';
  ELSIF EXISTS (SELECT FROM @schema@.forced f WHERE f.token = asked_token) THEN
    outcome := 'forced';
  ELSIF hold.token IS NOT NULL THEN
    outcome := 'granted';
    fence := hold.fence;
    remaining := hold.deadline - at;
  ELSIF place IS NOT NULL THEN
    outcome := 'queued';
    number := @schema@.ahead(wanted, place);
  ELSIF at > not_after THEN
    outcome := 'stale';
  ELSIF rec.fence = 9223372036854775807 THEN
    PERFORM @schema@.next_fence(rec.fence);
  ELSIF rec.closed_until IS NULL AND rec.waiting = 0 AND @schema@.fits(wanted, asked_units, asked_capacity) THEN
    rec.fence := @schema@.next_fence(rec.fence);
    INSERT INTO @schema@.holds
      SELECT wanted, asked_token, asked_session, asked_bound, at + asked_term, rec.fence, asked_units, asked_capacity,
             s.owner, at, asked_metadata, asked_trace
      FROM @schema@.sessions s WHERE s.id = asked_session;
    outcome := 'granted';
    fence := rec.fence;
    remaining := asked_term;
  ELSIF NOT enqueue THEN
    outcome := 'busy';
  ELSE
    outcome := 'queued';
    IF rec.waiting >= 10000 THEN
      DELETE FROM @schema@.queue q WHERE q.key = wanted AND NOT @schema@.lives(q.session, at);
      GET DIAGNOSTICS dropped = ROW_COUNT;
      rec.waiting := rec.waiting - dropped;
    END IF;
    number := rec.waiting;
    IF number >= 10000 THEN
      outcome := 'full';
    ELSE
      INSERT INTO @schema@.queue (key, token, session, bound, term, units, capacity, at, metadata, trace)
        VALUES (wanted, asked_token, asked_session, asked_bound, asked_term, asked_units, asked_capacity, at,
                asked_metadata, asked_trace);
      rec.waiting := rec.waiting + 1;
    END IF;
  END IF;
  IF outcome IN ('queued', 'busy') THEN
    check_in := @schema@.check_in(rec, at);
    in_use := @schema@.in_use(wanted);
    IF outcome = 'busy' THEN
      number := (SELECT count(*) FROM @schema@.holds h WHERE h.key = wanted AND h.lingers);
    ELSIF number = 0 THEN
      PERFORM @schema@.recall(wanted);
    END IF;
  END IF;
  PERFORM @schema@.put(rec);
END $$;

-- Returns the number of waiters before each of these tokens in the queue of a key, and NULL for a token that does not
-- wait. For many tokens one pass over the queue counts them all. Counting for each token alone takes too long, and so
-- does comparing each token with each waiter, which the planner would choose for tables without statistics.
CREATE OR REPLACE FUNCTION @schema@.places_of_many(wanted text, asked bytea[], at bigint) RETURNS bigint[]
LANGUAGE plpgsql STABLE SET enable_nestloop = off AS $$
#variable_conflict use_variable
BEGIN
  RETURN ARRAY(
    SELECT w.ahead FROM unnest(asked) WITH ORDINALITY a (token, nth)
    LEFT JOIN (
      SELECT q.token, q.session, row_number() OVER (ORDER BY q.place) - 1 AS ahead
      FROM @schema@.queue q WHERE q.key = wanted
    ) w ON w.token = a.token AND @schema@.lives(w.session, at)
    ORDER BY a.nth);
END $$;

CREATE OR REPLACE FUNCTION @schema@.places(wanted text, asked bytea[], at bigint) RETURNS bigint[]
LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_variable
BEGIN
  IF cardinality(asked) > 8 THEN RETURN @schema@.places_of_many(wanted, asked, at); END IF;
  RETURN ARRAY(
    SELECT (SELECT @schema@.ahead(wanted, q.place) FROM @schema@.queue q JOIN @schema@.sessions s ON s.id = q.session
            WHERE q.key = wanted AND q.token = a.token AND s.expires > at)
    FROM unnest(asked) WITH ORDINALITY a (token, nth) ORDER BY a.nth);
END $$;

-- Polls tokens of a key. The first row has the time and the time until the next poll. Then comes a row for each token,
-- in the order of the tokens: a token with a fence holds the key, and a token with a number waits.
CREATE OR REPLACE FUNCTION @schema@.poll_many(wanted text, asked bytea[])
RETURNS TABLE (at bigint, check_in bigint, in_use integer, fence bigint, remaining bigint, number bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
  SET enable_bitmapscan = off SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
  now bigint := @schema@.clock();
  rec @schema@.keys;
  before bigint;
  lingers boolean;
  aheads bigint[];
BEGIN
  PERFORM @schema@.sees_the_present();
  -- The fast path reads without a lock. It serves polls of a token whose state has not changed.
  SELECT * INTO rec FROM @schema@.keys k WHERE k.key = wanted;
  IF asked = ARRAY[rec.token] AND @schema@.lives(rec.session, now) THEN
    RETURN QUERY VALUES (now, NULL::bigint, NULL::integer, NULL::bigint, NULL::bigint, NULL::bigint),
      (NULL, NULL, NULL, rec.fence, NULL, NULL);
    RETURN;
  END IF;
  IF rec.token IS NULL AND cardinality(asked) = 1 THEN
    -- The most frequent poll: one token waits, and nothing of the key is expired or due. One statement reads everything
    -- that the answer needs.
    SELECT least(held.until, head.expires, rec.closed_until) - now, held.capacity,
      (SELECT count(*) FROM @schema@.queue b WHERE b.key = wanted AND b.place < q.place), held.lingers
    INTO check_in, in_use, before, lingers
    FROM @schema@.queue q
    CROSS JOIN LATERAL (SELECT s.expires FROM @schema@.sessions s WHERE s.id = q.session OFFSET 0) own
    CROSS JOIN LATERAL (SELECT f.session FROM @schema@.queue f WHERE f.key = wanted ORDER BY f.place LIMIT 1) first
    CROSS JOIN LATERAL (SELECT s.expires FROM @schema@.sessions s WHERE s.id = first.session OFFSET 0) head
    CROSS JOIN LATERAL (
      SELECT count(*) AS number, min(least(h.deadline, CASE WHEN h.bound THEN s.expires END)) AS until,
        min(h.capacity) FILTER (WHERE h.units < h.capacity) AS capacity, bool_or(h.lingers) AS lingers,
        bool_or(h.deadline <= now OR h.bound AND (s.expires > now) IS NOT TRUE) AS is_over
      FROM @schema@.holds h
      LEFT JOIN LATERAL (SELECT s.expires FROM @schema@.sessions s WHERE s.id = h.session OFFSET 0) s ON true
      WHERE h.key = wanted
    ) held
    WHERE q.key = wanted AND q.token = asked[1] AND own.expires > now AND head.expires > now
      AND held.is_over IS NOT TRUE AND (rec.closed_until > now OR rec.closed_until IS NULL AND held.number > 0)
      AND rec.fence < 9223372036854775807;
    IF FOUND THEN
      IF before = 0 AND lingers THEN PERFORM @schema@.recall(wanted); END IF;
      RETURN QUERY VALUES (now, check_in, in_use, NULL::bigint, NULL::bigint, NULL::bigint),
        (NULL, NULL, NULL, NULL, NULL, before);
      RETURN;
    END IF;
  END IF;
  aheads := @schema@.places(wanted, asked, now);
  IF array_position(aheads, NULL) IS NULL AND rec.token IS NULL AND (rec.closed_until <= now) IS NOT TRUE
    AND (rec.closed_until IS NOT NULL OR EXISTS (SELECT FROM @schema@.holds h WHERE h.key = wanted))
    AND NOT EXISTS (SELECT FROM @schema@.holds h WHERE h.key = wanted
                    AND (h.deadline <= now OR h.bound AND NOT EXISTS
                      (SELECT FROM @schema@.sessions s WHERE s.id = h.session AND s.expires > now)))
    AND @schema@.lives((SELECT q.session FROM @schema@.queue q WHERE q.key = wanted ORDER BY q.place LIMIT 1), now)
  THEN
    IF rec.fence = 9223372036854775807 THEN PERFORM @schema@.next_fence(rec.fence); END IF;
    IF 0 = ANY (aheads) THEN PERFORM @schema@.recall(wanted); END IF;
    RETURN QUERY SELECT now, @schema@.check_in(rec, now), @schema@.in_use(wanted), NULL::bigint, NULL::bigint,
      NULL::bigint;
    RETURN QUERY SELECT NULL::bigint, NULL::bigint, NULL::integer, NULL::bigint, NULL::bigint, a.ahead
      FROM unnest(aheads) a (ahead);
    RETURN;
  END IF;
  rec := @schema@.take(wanted);
  now := @schema@.clock();
  aheads := @schema@.places(wanted, asked, now);
  IF rec.fence = 9223372036854775807 AND array_remove(aheads, NULL) <> '{}'
    AND NOT EXISTS (SELECT FROM @schema@.holds h WHERE h.key = wanted AND h.token = ANY (asked))
  THEN
    PERFORM @schema@.next_fence(rec.fence);
  END IF;
  IF 0 = ANY (aheads) THEN PERFORM @schema@.recall(wanted); END IF;
  RETURN QUERY SELECT now, @schema@.check_in(rec, now), @schema@.in_use(wanted), NULL::bigint, NULL::bigint, NULL::bigint;
  RETURN QUERY SELECT NULL::bigint, NULL::bigint, NULL::integer, h.fence, h.deadline - now, a.ahead
    FROM unnest(asked, aheads) WITH ORDINALITY a (token, ahead, nth)
    LEFT JOIN @schema@.holds h ON h.key = wanted AND h.token = a.token
    ORDER BY a.nth;
  PERFORM @schema@.put(rec);
END $$;

-- Polls one token, for running programs of version 3.
CREATE OR REPLACE FUNCTION @schema@.poll(
  wanted text, asked_token bytea,
  OUT outcome text, OUT at bigint, OUT fence bigint, OUT remaining bigint, OUT number bigint, OUT check_in bigint
) LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
#variable_conflict use_variable
BEGIN
  SELECT max(p.at), max(p.check_in), max(p.fence), max(p.remaining), max(p.number)
  INTO at, check_in, fence, remaining, number FROM @schema@.poll_many(wanted, ARRAY[asked_token]) p;
  outcome := CASE WHEN fence IS NOT NULL THEN 'granted' WHEN number IS NOT NULL THEN 'queued' ELSE 'gone' END;
END $$;

CREATE OR REPLACE FUNCTION @schema@.finish(
  wanted text, asked_token bytea, cooldown bigint, OUT outcome text, OUT at bigint
) LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
  SET enable_bitmapscan = off SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
  rec @schema@.keys;
  heir record;
  passed integer;
BEGIN
  PERFORM @schema@.sees_what_is_new();
  PERFORM @schema@.refuse_unless(cooldown IS NULL OR cooldown = 0 OR @schema@.is_span(cooldown), 'the cooldown');
  PERFORM pg_catalog.pg_advisory_xact_lock(@schema@.turn(wanted, m.secret)) FROM @schema@.meta m;
  IF cooldown IS NULL THEN
    UPDATE @schema@.keys k SET token = NULL, session = NULL, at = NULL, metadata = NULL, trace = NULL
    FROM @schema@.sessions s
    WHERE k.key = wanted AND k.token = asked_token AND NOT k.busy AND s.id = k.session AND s.expires > @schema@.clock();
    IF FOUND THEN
      outcome := 'released';
      at := @schema@.clock();
      RETURN;
    END IF;
    -- The fast path of a hand-off, from one mutex without a deadline to another.
    SELECT * INTO rec FROM @schema@.keys k WHERE k.key = wanted FOR UPDATE;
    at := @schema@.clock();
    IF rec.waiting > 0 AND rec.closed_until IS NULL AND rec.fence < 9223372036854775807 THEN
      SELECT q.place, q.token, q.session, q.metadata, q.trace, q.bound AND q.term IS NULL AND q.capacity = 1 AS is_plain,
        s.owner INTO heir
      FROM @schema@.queue q JOIN @schema@.sessions s ON s.id = q.session
      WHERE q.key = wanted AND s.expires > at ORDER BY q.place LIMIT 1;
      IF heir.is_plain THEN
        DELETE FROM @schema@.holds h USING @schema@.sessions s WHERE h.key = wanted AND h.token = asked_token
          AND h.bound AND h.deadline IS NULL AND h.capacity = 1 AND s.id = h.session AND s.expires > at;
        IF FOUND THEN
          -- The waiters before the heir are expired.
          DELETE FROM @schema@.queue q WHERE q.key = wanted AND q.place <= heir.place;
          GET DIAGNOSTICS passed = ROW_COUNT;
          rec.waiting := rec.waiting - passed;
          rec.fence := greatest(at, rec.fence + 1);
          IF rec.waiting = 0 THEN
            UPDATE @schema@.keys k SET fence = rec.fence, waiting = 0, token = heir.token, session = heir.session,
              at = at, metadata = heir.metadata, trace = heir.trace,
              busy = EXISTS (SELECT FROM @schema@.forced f WHERE f.key = wanted)
            WHERE k.key = wanted;
          ELSE
            INSERT INTO @schema@.holds VALUES (wanted, heir.token, heir.session, true, NULL, rec.fence, 1, 1, heir.owner,
              at, heir.metadata, heir.trace);
            UPDATE @schema@.keys k SET fence = rec.fence, waiting = rec.waiting WHERE k.key = wanted;
          END IF;
          PERFORM @schema@.tell(heir.session, 'G' || encode(heir.token, 'hex') || rec.fence || ' ' || wanted);
          outcome := 'released';
          RETURN;
        END IF;
      END IF;
    END IF;
  END IF;
  rec := @schema@.take(wanted);
  at := @schema@.clock();
  DELETE FROM @schema@.forced f WHERE f.token = asked_token;
  DELETE FROM @schema@.holds h WHERE h.key = wanted AND h.token = asked_token;
  IF FOUND THEN
    outcome := 'released';
    -- `greatest` ignores NULL, so a missing cooldown changes nothing.
    rec.closed_until := greatest(rec.closed_until, at + cooldown);
  ELSE
    DELETE FROM @schema@.queue q WHERE q.key = wanted AND q.token = asked_token;
    outcome := CASE WHEN FOUND THEN 'dequeued' ELSE 'nothing' END;
    rec.waiting := rec.waiting - CASE WHEN FOUND THEN 1 ELSE 0 END;
  END IF;
  PERFORM @schema@.put(rec);
END $$;

-- Runs a batch: many calls for many callers of one process. A call without a session is a `finish`, and a call with one
-- is an `acquire`. With `waits`, which is for the calls of one key, the batch waits for the turn of the first key and
-- runs the first call in any case. Otherwise it waits for no turn. It skips a call whose turn another transaction has,
-- and all calls that would take too long. The answer has a row for each call that was run.
--
-- One statement for all keys does each of the most frequent calls: releases of plain holds, ends of tokens that hold
-- nothing and do not wait, and grants of free keys, including new keys. The functions for one key run the other calls,
-- one by one.
CREATE OR REPLACE FUNCTION @schema@.together(
  keys text[], tokens bytea[], sessions bytea[], units integer[], capacities integer[], bounds boolean[], terms bigint[],
  enqueues boolean[], latest bigint[], metadata text[], traces text[], cooldowns bigint[],
  -- A program of version 2 omits this argument.
  waits boolean DEFAULT false
) RETURNS TABLE (
  place bigint, outcome text, at bigint, fence bigint, remaining bigint, number bigint, check_in bigint, in_use integer
) LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
  SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE
  until bigint;
  -- The places of the calls whose turn was taken, and of the calls that were run.
  turned bigint[];
  easy bigint[] := '{}';
  ends bigint[];
  plain bigint[];
  freed text[] := '{}';
  freed_key text;
  lowest bigint;
  secret bytea := (SELECT m.secret FROM @schema@.meta m);
BEGIN
  PERFORM @schema@.sees_what_is_new();
  PERFORM @schema@.refuse_unless(cardinality(keys) <= 256, 'the number of steps');
  IF array_remove(sessions, NULL) <> '{}' THEN
    PERFORM @schema@.refuse_unless(NOT EXISTS (
      SELECT FROM unnest(tokens, sessions, units, capacities, bounds, terms, enqueues, latest, metadata, traces)
        a (token, session, units, capacity, bound, term, enqueue, not_after, metadata, trace)
      WHERE a.session IS NOT NULL AND @schema@.is_request(a.token, a.session, a.units, a.capacity, a.bound, a.term, a.enqueue,
        a.not_after, a.metadata, a.trace) IS NOT TRUE), 'a part of a request');
  END IF;
  until := @schema@.clock() + 10000;
  IF waits THEN
    PERFORM pg_catalog.pg_advisory_xact_lock(@schema@.turn(keys[1], secret));
    -- All calls are for one key, so a longer run delays no other key.
    until := @schema@.clock() + 50000;
  END IF;
  -- This is a separate statement, because the later statements must see every commit from before a turn was taken.
  turned := ARRAY(SELECT a.place FROM unnest(keys) WITH ORDINALITY a (key, place)
    WHERE pg_catalog.pg_try_advisory_xact_lock(@schema@.turn(a.key, secret)));
  ends := ARRAY(SELECT a.place FROM unnest(sessions, cooldowns) WITH ORDINALITY a (session, cooldown, place)
    WHERE a.session IS NULL AND (a.cooldown IS NULL OR a.cooldown = 0 OR @schema@.is_span(a.cooldown)) AND a.place = ANY (turned));
  IF ends <> '{}' THEN
    -- Release holds that are in the rows of their keys.
    FOR place, at IN
      UPDATE @schema@.keys k SET token = NULL, session = NULL, at = NULL, metadata = NULL, trace = NULL,
        busy = a.cooldown > 0, closed_until = CASE WHEN a.cooldown > 0 THEN @schema@.clock() + a.cooldown END
      FROM (
        SELECT e.key, e.token, coalesce(e.cooldown, 0) AS cooldown, e.place
        FROM unnest(keys, tokens, cooldowns) WITH ORDINALITY e (key, token, cooldown, place) WHERE e.place = ANY (ends) OFFSET 0
      ) a, @schema@.sessions s
      WHERE k.key = a.key AND k.token = a.token AND NOT k.busy AND s.id = k.session AND s.expires > @schema@.clock()
      RETURNING a.place, @schema@.clock()
    LOOP
      outcome := 'released';
      easy := easy || place;
      RETURN NEXT;
    END LOOP;
    IF cardinality(easy) = cardinality(keys) THEN RETURN; END IF;
    ends := ARRAY(SELECT e.place FROM unnest(ends) e (place) WHERE e.place <> ALL (easy));
  END IF;
  IF ends <> '{}' THEN
    -- Release other live holds, of keys without waiters.
    FOR place, at, freed_key IN
      DELETE FROM @schema@.holds h
      USING (
        SELECT e.key, e.token, e.place FROM unnest(keys, tokens, cooldowns) WITH ORDINALITY e (key, token, cooldown, place)
        WHERE e.place = ANY (ends) AND coalesce(e.cooldown, 0) = 0 OFFSET 0
      ) a, @schema@.keys k
      WHERE h.key = a.key AND h.token = a.token AND k.key = a.key AND k.waiting = 0
        AND (h.deadline IS NULL OR h.deadline > @schema@.clock())
        AND (NOT h.bound OR EXISTS (SELECT FROM @schema@.sessions s WHERE s.id = h.session AND s.expires > @schema@.clock()))
        AND NOT EXISTS (SELECT FROM @schema@.forced f WHERE f.token = a.token)
      RETURNING a.place, @schema@.clock(), a.key
    LOOP
      outcome := 'released';
      easy := easy || place;
      freed := freed || freed_key;
      RETURN NEXT;
    END LOOP;
    UPDATE @schema@.keys k SET closed_until = CASE WHEN k.closed_until > @schema@.clock() THEN k.closed_until END,
      busy = coalesce(k.closed_until > @schema@.clock(), false)
        OR EXISTS (SELECT FROM @schema@.holds h WHERE h.key = k.key)
        OR EXISTS (SELECT FROM @schema@.forced f WHERE f.key = k.key)
    WHERE k.key = ANY (freed);
    -- Answer for tokens that hold nothing, of keys without waiters. There is nothing to release and nothing to grant.
    FOR place IN
      SELECT a.place FROM unnest(keys, tokens) WITH ORDINALITY a (key, token, place)
      LEFT JOIN @schema@.keys k ON k.key = a.key
      WHERE a.place = ANY (ends) AND a.place <> ALL (easy)
        AND coalesce(k.waiting, 0) = 0 AND k.token IS DISTINCT FROM a.token
        AND NOT EXISTS (SELECT FROM @schema@.holds h WHERE h.key = a.key AND h.token = a.token)
        AND NOT EXISTS (SELECT FROM @schema@.forced f WHERE f.token = a.token)
    LOOP
      outcome := 'nothing';
      at := @schema@.clock();
      easy := easy || place;
      RETURN NEXT;
    END LOOP;
  END IF;
  plain := ARRAY(SELECT a.place FROM unnest(capacities, bounds, terms) WITH ORDINALITY a (capacity, bound, term, place)
    WHERE a.capacity = 1 AND a.bound AND a.term IS NULL AND a.place = ANY (turned));
  WHILE plain <> '{}' LOOP
    -- Grant mutexes of free keys, to the first of several calls on a key.
    FOR place, at, fence IN
      UPDATE @schema@.keys k SET fence = greatest(@schema@.clock(), coalesce(k.fence, lowest) + 1), token = a.token,
        session = a.session, at = @schema@.clock(), metadata = a.metadata, trace = a.trace
      FROM (
        SELECT DISTINCT ON (e.key) e.*
        FROM unnest(keys, tokens, sessions, latest, metadata, traces)
          WITH ORDINALITY e (key, token, session, not_after, metadata, trace, place)
        WHERE e.place = ANY (plain) ORDER BY e.key, e.place
      ) a, @schema@.sessions s
      WHERE k.key = a.key AND k.token IS NULL AND NOT k.busy AND coalesce(k.fence, lowest) < 9223372036854775807
        AND s.id = a.session AND s.expires > @schema@.clock() AND @schema@.clock() <= a.not_after
      RETURNING a.place, @schema@.clock(), k.fence
    LOOP
      outcome := 'granted';
      easy := easy || place;
      RETURN NEXT;
    END LOOP;
    IF cardinality(easy) = cardinality(keys) THEN RETURN; END IF;
    EXIT WHEN lowest IS NOT NULL;
    plain := ARRAY(SELECT p.place FROM unnest(plain) p (place) WHERE p.place <> ALL (easy));
    -- For new keys one statement inserts the rows and a later one grants them: see `take`.
    INSERT INTO @schema@.keys (key)
      SELECT DISTINCT a.key FROM unnest(keys, sessions) WITH ORDINALITY a (key, session, place)
      WHERE a.place = ANY (plain) AND NOT EXISTS (SELECT FROM @schema@.keys k WHERE k.key = a.key)
        AND EXISTS (SELECT FROM @schema@.sessions s WHERE s.id = a.session AND s.expires > until) AND @schema@.is_key(a.key)
      ON CONFLICT DO NOTHING;
    EXIT WHEN NOT FOUND;
    SELECT m.fence_floor INTO lowest FROM @schema@.meta m;
  END LOOP;
  -- Run the other calls in order. Skip calls that would fail, because an error fails the whole batch.
  FOR place IN
    SELECT a.place FROM unnest(keys) WITH ORDINALITY a (key, place)
    WHERE a.place = ANY (turned) AND a.place <> ALL (easy) AND (waits AND a.place = 1
      OR NOT EXISTS (SELECT FROM @schema@.keys k WHERE k.key = a.key AND k.fence = 9223372036854775807))
    ORDER BY a.place
  LOOP
    EXIT WHEN @schema@.clock() > until AND NOT (waits AND place = 1);
    IF sessions[place] IS NULL THEN
      SELECT f.outcome, f.at, NULL, NULL, NULL, NULL, NULL
      INTO outcome, at, fence, remaining, number, check_in, in_use
      FROM @schema@.finish(keys[place], tokens[place], cooldowns[place]) f;
    ELSE
      SELECT a.outcome, a.at, a.fence, a.remaining, a.number, a.check_in, a.in_use
      INTO outcome, at, fence, remaining, number, check_in, in_use
      FROM @schema@.acquire(keys[place], tokens[place], sessions[place], units[place], capacities[place], bounds[place],
        terms[place], enqueues[place], latest[place], metadata[place], traces[place]) a;
    END IF;
    RETURN NEXT;
  END LOOP;
END $$;

CREATE OR REPLACE FUNCTION @schema@.extend(
  wanted text, asked_token bytea, ttl bigint, OUT outcome text, OUT at bigint
) LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
  SET enable_bitmapscan = off SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
  rec @schema@.keys;
BEGIN
  PERFORM @schema@.refuse_unless(@schema@.is_span(ttl), 'the term');
  rec := @schema@.take(wanted);
  at := @schema@.clock();
  UPDATE @schema@.holds h SET deadline = at + ttl
  WHERE h.key = wanted AND h.token = asked_token AND h.deadline IS NOT NULL;
  outcome := CASE WHEN FOUND THEN 'extended' ELSE 'not_held' END;
  PERFORM @schema@.put(rec);
END $$;

-- Marks a hold as lingering unless a request waits, and raises the newest fence of the key to the clock. The hold stays
-- in `holds` until it ends, because a hold in the row of its key has the newest fence.
CREATE OR REPLACE FUNCTION @schema@.linger(
  wanted text, asked_token bytea, OUT outcome text, OUT at bigint, OUT fence bigint, OUT up_to bigint
) LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
  SET enable_bitmapscan = off SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
  rec @schema@.keys;
  hold @schema@.holds;
BEGIN
  rec := @schema@.take(wanted);
  at := @schema@.clock();
  SELECT * INTO hold FROM @schema@.holds h WHERE h.key = wanted AND h.token = asked_token;
  IF hold.token IS NULL THEN
    outcome := 'gone';
  ELSIF rec.waiting > 0 OR hold.units < hold.capacity OR NOT hold.bound OR hold.deadline IS NOT NULL THEN
    outcome := 'wanted';
  ELSE
    outcome := 'lingers';
    IF NOT hold.lingers THEN
      UPDATE @schema@.holds h SET lingers = true WHERE h.key = wanted AND h.token = asked_token;
    END IF;
    rec.fence := greatest(rec.fence, at);
    fence := hold.fence;
    up_to := rec.fence;
  END IF;
  PERFORM @schema@.put(rec);
END $$;

CREATE OR REPLACE FUNCTION @schema@.adopt(
  wanted text, from_token bytea, to_token bytea, by_session bytea, not_after bigint,
  OUT outcome text, OUT at bigint, OUT fence bigint, OUT remaining bigint, OUT bound boolean
) LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
  SET enable_bitmapscan = off SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
  rec @schema@.keys;
  hold @schema@.holds;
BEGIN
  PERFORM @schema@.refuse_unless(octet_length(to_token) = 16 AND octet_length(by_session) = 16 AND not_after >= 0,
    'a part of the request');
  rec := @schema@.take(wanted);
  at := @schema@.clock();
  SELECT * INTO hold FROM @schema@.holds h WHERE h.key = wanted AND h.token = to_token;
  IF NOT @schema@.lives(by_session, at) THEN
    outcome := 'session_gone';
  ELSIF hold.token IS NULL AND at > not_after THEN
    outcome := 'stale';
  ELSE
    IF hold.token IS NULL THEN
      UPDATE @schema@.holds h SET token = to_token, session = by_session, owner = s.owner
      FROM @schema@.sessions s WHERE h.key = wanted AND h.token = from_token AND s.id = by_session
      RETURNING h.* INTO hold;
      IF hold.lingers THEN
        -- The highest fence has no successor, and the store grants nothing after it.
        IF rec.fence < 9223372036854775807 THEN rec.fence := @schema@.next_fence(rec.fence); END IF;
        UPDATE @schema@.holds h SET fence = rec.fence, lingers = false WHERE h.key = wanted AND h.token = to_token
        RETURNING h.* INTO hold;
      END IF;
    END IF;
    outcome := CASE WHEN hold.token IS NULL THEN 'gone' ELSE 'adopted' END;
    fence := hold.fence;
    remaining := hold.deadline - at;
    bound := hold.bound;
  END IF;
  PERFORM @schema@.put(rec);
END $$;

-- Force-releases the hold with this fence. If there is none, `live` lists the fences of the other holds.
CREATE OR REPLACE FUNCTION @schema@.force_release(
  wanted text, asked_fence bigint, why text, OUT outcome text, OUT at bigint, OUT live text
) LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
  SET enable_bitmapscan = off SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
  rec @schema@.keys;
  hold @schema@.holds;
BEGIN
  PERFORM @schema@.refuse_unless(octet_length(why) <= 4096, 'the reason');
  rec := @schema@.take(wanted);
  at := @schema@.clock();
  DELETE FROM @schema@.holds h WHERE h.key = wanted AND h.fence = asked_fence RETURNING h.* INTO hold;
  IF FOUND THEN
    outcome := 'evicted';
    -- The highest fence has no successor.
    IF rec.fence < 9223372036854775807 THEN rec.fence := @schema@.next_fence(rec.fence); END IF;
    IF @schema@.lives(hold.session, at) THEN
      INSERT INTO @schema@.forced VALUES (hold.token, hold.session, wanted, why, at) ON CONFLICT DO NOTHING;
    END IF;
    PERFORM @schema@.tell(hold.session,
      'F' || encode(hold.token, 'hex') || octet_length(wanted) || ':' || wanted || why);
  ELSE
    outcome := 'no_such_hold';
    SELECT string_agg(h.fence::text, ' ' ORDER BY h.fence) INTO live FROM @schema@.holds h WHERE h.key = wanted;
  END IF;
  PERFORM @schema@.put(rec);
END $$;

CREATE OR REPLACE FUNCTION @schema@.version(OUT version integer, OUT id text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS
$$ SELECT m.version, m.id::text FROM @schema@.meta m $$;

CREATE OR REPLACE FUNCTION @schema@.open_session(
  asked bytea, lives_for bigint, who text, OUT outcome text, OUT at bigint
) LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
  SET enable_bitmapscan = off SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
BEGIN
  PERFORM @schema@.refuse_unless(octet_length(asked) = 16 AND @schema@.is_span(lives_for) AND octet_length(who) <= 128,
    'a part of the session');
  at := @schema@.clock();
  INSERT INTO @schema@.sessions VALUES (asked, who, lives_for, at + lives_for) ON CONFLICT DO NOTHING;
  outcome := CASE WHEN @schema@.lives(asked, @schema@.clock()) THEN 'opened' ELSE 'gone' END;
END $$;

-- Renews a session. The first row reports the session, and the other rows its force-released tokens.
CREATE OR REPLACE FUNCTION @schema@.renew_session(asked bytea)
RETURNS TABLE (outcome text, at bigint, token bytea, key text, reason text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
  SET enable_bitmapscan = off SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
  time bigint;
BEGIN
  UPDATE @schema@.sessions s SET expires = @schema@.clock() + s.ttl WHERE s.id = asked AND s.expires > @schema@.clock();
  time := @schema@.clock();
  IF FOUND AND @schema@.lives(asked, time) THEN
    RETURN QUERY SELECT 'alive'::text, time, NULL::bytea, NULL::text, NULL::text;
    RETURN QUERY SELECT 'lost'::text, time, f.token, f.key::text, f.reason FROM @schema@.forced f WHERE f.session = asked;
  ELSE
    RETURN QUERY SELECT 'gone'::text, time, NULL::bytea, NULL::text, NULL::text;
  END IF;
END $$;

-- Returns whether a session is alive. Only reads.
CREATE OR REPLACE FUNCTION @schema@.session_lives(asked bytea, OUT at bigint, OUT alive boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
  SET enable_bitmapscan = off SET enable_seqscan = off SET jit = off AS $$
BEGIN
  PERFORM @schema@.sees_the_present();
  at := @schema@.clock();
  alive := @schema@.lives(asked, at);
END $$;

-- Ends a session, and grants its keys to their waiters. The transaction takes many turns, so it waits for none of them.
-- It skips a key whose turn another transaction has, and all keys beyond the first 1000, because the server has limited
-- room for the locks of a transaction. The next operation on a skipped key reconciles the key.
CREATE OR REPLACE FUNCTION @schema@.close_session(asked bytea, OUT at bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
  SET enable_bitmapscan = off SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
  secret bytea := (SELECT m.secret FROM @schema@.meta m);
  touched text;
  rec @schema@.keys;
  dropped integer;
BEGIN
  PERFORM @schema@.sees_what_is_new();
  PERFORM @schema@.refuse_unless(octet_length(asked) = 16, 'the session');
  at := @schema@.clock();
  -- Insert a missing row too, so that the session cannot be opened later.
  INSERT INTO @schema@.sessions AS s VALUES (asked, '', 60000000, at)
    ON CONFLICT (id) DO UPDATE SET expires = least(s.expires, excluded.expires);
  DELETE FROM @schema@.forced f WHERE f.session = asked;
  FOR touched IN
    SELECT DISTINCT q.key FROM @schema@.queue q
    WHERE q.session = asked
      OR EXISTS (SELECT FROM @schema@.holds h WHERE h.key = q.key AND h.session = asked)
    ORDER BY q.key LIMIT 1000
  LOOP
    CONTINUE WHEN NOT pg_catalog.pg_try_advisory_xact_lock(@schema@.turn(touched, secret));
    rec := @schema@.take(touched);
    DELETE FROM @schema@.queue q WHERE q.key = touched AND q.session = asked;
    GET DIAGNOSTICS dropped = ROW_COUNT;
    rec.waiting := rec.waiting - dropped;
    PERFORM @schema@.put(rec);
  END LOOP;
  at := @schema@.clock();
END $$;

-- Returns the state of a key: a row for the key, a row for each live hold and a row for each live waiter, in this
-- order.
CREATE OR REPLACE FUNCTION @schema@.state_of(wanted text, now bigint)
RETURNS TABLE (now_is bigint, kind text, of_key text, fence bigint, owner text, units integer, capacity integer,
  bound boolean, since bigint, remaining bigint, metadata text, trace text, lingers boolean)
LANGUAGE sql STABLE AS $$
  SELECT now, kind, of_key, fence, owner, units, capacity, bound, since, remaining, metadata, trace, lingers FROM (
    SELECT 1 AS part, 0::bigint AS place, 'key' AS kind, k.key AS of_key, nullif(k.fence, 0) AS fence, NULL AS owner,
      NULL::integer AS units, NULL::integer AS capacity, NULL::boolean AS bound, NULL::bigint AS since,
      CASE WHEN k.closed_until > now THEN k.closed_until - now END AS remaining, NULL AS metadata, NULL AS trace,
      false AS lingers
    FROM @schema@.keys k WHERE k.key = wanted
    UNION ALL
    SELECT 2, 0, 'hold', k.key, k.fence, s.owner, 1, 1, true, k.at, NULL, k.metadata, k.trace, false
    FROM @schema@.keys k JOIN @schema@.sessions s ON s.id = k.session
    WHERE k.key = wanted AND k.token IS NOT NULL AND s.expires > now
    UNION ALL
    SELECT 2, h.fence, 'hold', h.key, h.fence, h.owner, h.units, h.capacity, h.bound, h.at, h.deadline - now, h.metadata,
      h.trace, h.lingers
    FROM @schema@.holds h
    WHERE h.key = wanted AND (h.deadline IS NULL OR h.deadline > now)
      AND (NOT h.bound OR EXISTS (SELECT FROM @schema@.sessions s WHERE s.id = h.session AND s.expires > now))
    UNION ALL
    SELECT 3, q.place, 'waiter', q.key, NULL, s.owner, q.units, q.capacity, q.bound, q.at, NULL, q.metadata, q.trace, false
    FROM @schema@.queue q JOIN @schema@.sessions s ON s.id = q.session
    WHERE q.key = wanted AND s.expires > now
  ) AS parts ORDER BY part, place
$$;

CREATE OR REPLACE FUNCTION @schema@.inspect(wanted text)
RETURNS TABLE (now_is bigint, kind text, of_key text, fence bigint, owner text, units integer, capacity integer,
  bound boolean, since bigint, remaining bigint, metadata text, trace text, lingers boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
  SET enable_bitmapscan = off SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
BEGIN
  PERFORM @schema@.sees_the_present();
  -- Without waiters, reconciling would not change the visible state. A read waits for no turn.
  IF EXISTS (SELECT FROM @schema@.keys k WHERE k.key = wanted AND k.waiting > 0)
    AND pg_catalog.pg_try_advisory_xact_lock(@schema@.turn(wanted, (SELECT m.secret FROM @schema@.meta m)))
  THEN
    PERFORM @schema@.put(@schema@.take(wanted));
  END IF;
  RETURN QUERY SELECT @schema@.clock(), 'time'::text, wanted, NULL::bigint, NULL::text, NULL::integer, NULL::integer,
    NULL::boolean, NULL::bigint, NULL::bigint, NULL::text, NULL::text, NULL::boolean;
  RETURN QUERY SELECT * FROM @schema@.state_of(wanted, @schema@.clock());
END $$;

-- Returns a page of the keys that have holders or waiters or are closed, in order. The rows are those of `state_of`,
-- except that a key and the hold in its row are one row of the kind `held`. The first row names the key after which the
-- next page begins, if there is a next page. A page reads at most ten rows of `keys` for each key that it may list, and
-- ends with the key at which its holds and waiters reach 20,000.
--
-- The function only reads. It reads each table once, from the first key of the page to the last, and finds sessions by
-- their primary key. `OFFSET 0` keeps the planner from other plans, so the time of a page depends only on its rows, not
-- on the statistics.
DROP FUNCTION IF EXISTS @schema@.list(text, text, bigint);
CREATE OR REPLACE FUNCTION @schema@.list_page(beginning text, after text, most bigint)
RETURNS TABLE (now_is bigint, kind text, of_key text, fence bigint, owner text, units integer, capacity integer,
  bound boolean, since bigint, remaining bigint, metadata text, trace text, lingers boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
  SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
  now bigint := @schema@.clock();
  -- All keys of the page sort before this text.
  until text COLLATE "C" := beginning || repeat(chr(1114111), 200);
  next_is text COLLATE "C";
  listed bigint;
  rows bigint;
  one record;
BEGIN
  PERFORM @schema@.sees_the_present();
  SELECT count(*), max(part.key), coalesce(sum(part.waiting), 0) INTO listed, next_is, rows FROM (
    SELECT looked.key, looked.waiting FROM (
      SELECT k.key, k.waiting, k.busy OR k.token IS NOT NULL AS is_used FROM @schema@.keys k
      WHERE k.key >= beginning AND k.key > after AND k.key < until ORDER BY k.key LIMIT most * 10
    ) looked WHERE looked.is_used LIMIT most
  ) part;
  IF listed < most THEN
    next_is := (SELECT k.key FROM @schema@.keys k WHERE k.key >= beginning AND k.key > after AND k.key < until
                ORDER BY k.key OFFSET most * 10 - 1 LIMIT 1);
  END IF;
  -- `chr(1)` is the lowest character, so no key sorts between the last key of the page and this text.
  IF next_is IS NOT NULL THEN until := next_is || chr(1); END IF;
  IF rows + (SELECT count(*) FROM (
    SELECT FROM @schema@.holds h WHERE h.key >= beginning AND h.key > after AND h.key < until LIMIT 20000
  ) few) >= 20000 THEN
    rows := 0;
    FOR one IN
      SELECT k.key, k.waiting FROM @schema@.keys k
      WHERE k.key >= beginning AND k.key > after AND k.key < until AND k.busy ORDER BY k.key
    LOOP
      rows := rows + one.waiting + (SELECT count(*) FROM @schema@.holds h WHERE h.key = one.key);
      IF rows >= 20000 THEN
        next_is := one.key;
        until := next_is || chr(1);
        EXIT;
      END IF;
    END LOOP;
  END IF;
  RETURN QUERY SELECT now, 'time'::text, next_is::text, NULL::bigint, NULL::text, NULL::integer, NULL::integer,
    NULL::boolean, NULL::bigint, NULL::bigint, NULL::text, NULL::text, NULL::boolean;
  RETURN QUERY SELECT now, r.kind, r.of_key, r.fence, r.owner, r.units, r.capacity, r.bound, r.since, r.remaining, r.metadata,
    r.trace, r.lingers
  FROM (
    SELECT 1 AS part, 0::bigint AS place, CASE WHEN s.expires > now THEN 'held' ELSE 'key' END AS kind, k.key AS of_key,
      nullif(k.fence, 0) AS fence, s.owner, 1 AS units, 1 AS capacity, true AS bound, k.at AS since,
      CASE WHEN k.closed_until > now THEN k.closed_until - now END AS remaining, k.metadata, k.trace, false AS lingers
    FROM @schema@.keys k
    LEFT JOIN LATERAL (SELECT * FROM @schema@.sessions s WHERE s.id = k.session OFFSET 0) s ON k.token IS NOT NULL
    WHERE k.key >= beginning AND k.key > after AND k.key < until AND (k.busy OR k.token IS NOT NULL)
    UNION ALL
    SELECT 2, h.fence, 'hold', h.key, h.fence, h.owner, h.units, h.capacity, h.bound, h.at, h.deadline - now, h.metadata,
      h.trace, h.lingers
    FROM @schema@.holds h
    WHERE h.key >= beginning AND h.key > after AND h.key < until AND (h.deadline IS NULL OR h.deadline > now)
      AND (NOT h.bound OR EXISTS (SELECT FROM @schema@.sessions s WHERE s.id = h.session AND s.expires > now))
    UNION ALL
    SELECT 3, q.place, 'waiter', q.key, NULL, s.owner, q.units, q.capacity, q.bound, q.at, NULL, q.metadata, q.trace, false
    FROM @schema@.queue q
    CROSS JOIN LATERAL (SELECT * FROM @schema@.sessions s WHERE s.id = q.session AND s.expires > now OFFSET 0) s
    WHERE q.key >= beginning AND q.key > after AND q.key < until
  ) r ORDER BY r.of_key COLLATE "C", r.part, r.place;
END $$;

-- Checks a fence in your own transaction. If the hold of `key` with this fence is live, nobody else gets the key until
-- your transaction has ended. Otherwise the function raises SQLSTATE SF001. Keep the transaction short, because other
-- clients that want the key wait for it.
--
-- If the hold lingers, its process hands the key from task to task, each with a higher fence, and the server does not see
-- that. The function then accepts each fence of the hold that is at least as high as the last one that it accepted, and
-- the next task's check waits until your transaction has ended. A task that is late is rejected once the next task has
-- checked its fence, so each transaction must check its fence first.
CREATE OR REPLACE FUNCTION @schema@.check_fence(key text, fence bigint, namespace text DEFAULT '')
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
  SET enable_bitmapscan = off SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
  space text := normalize(namespace, NFC);
  wanted text := CASE WHEN space = '' THEN ':' ELSE octet_length(space) || ':' || space END || normalize(key, NFC);
  rec @schema@.keys;
  now bigint;
BEGIN
  -- The turn puts this call in order with the operations, which do not wait for rows. The row lock makes the server
  -- reject a snapshot that is older than the last operation.
  PERFORM pg_catalog.pg_advisory_xact_lock_shared(@schema@.turn(wanted, m.secret)) FROM @schema@.meta m;
  SELECT * INTO rec FROM @schema@.keys k WHERE k.key = wanted FOR SHARE;
  now := @schema@.clock();
  IF rec.token IS NOT NULL AND rec.fence = check_fence.fence AND @schema@.lives(rec.session, now) THEN RETURN; END IF;
  PERFORM FROM @schema@.holds h WHERE h.key = wanted AND h.fence = check_fence.fence AND NOT h.lingers
    AND (h.deadline IS NULL OR h.deadline > now) AND (NOT h.bound OR @schema@.lives(h.session, now));
  IF FOUND THEN RETURN; END IF;
  -- The update keeps the row locked until the transaction has ended.
  UPDATE @schema@.holds h SET checked = check_fence.fence
  WHERE h.key = wanted AND h.lingers AND h.fence <= check_fence.fence AND h.checked <= check_fence.fence
    AND check_fence.fence <= rec.fence AND @schema@.lives(h.session, now);
  IF NOT FOUND THEN
    RAISE EXCEPTION 'the fence % of % is stale', check_fence.fence, quote_literal(check_fence.key) USING ERRCODE = 'SF001',
      HINT = 'The lock was lost. Do not write.';
  END IF;
END $$;

-- Runs one round of housekeeping: removes expired sessions with their holds and waiters, and keys that are no longer
-- used. Each process calls it from time to time, after a renewal of its session. If several call it at once, one works.
-- It never waits.
CREATE OR REPLACE FUNCTION @schema@.tidy() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s'
  SET enable_bitmapscan = off SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
  now bigint := @schema@.clock();
  secret bytea := (SELECT m.secret FROM @schema@.meta m);
  tidied text;
  last text;
  rec @schema@.keys;
  settled integer := 0;
  highest bigint;
BEGIN
  PERFORM @schema@.sees_what_is_new();
  SELECT m.tidied_to INTO tidied FROM @schema@.meta m FOR UPDATE SKIP LOCKED;
  IF NOT FOUND THEN RETURN; END IF;
  -- The tokens of a live session stay, however old: its next renewal reports them.
  DELETE FROM @schema@.forced f WHERE f.at < now - 3600000000 AND NOT @schema@.lives(f.session, now);
  -- A round visits up to 10,000 keys, because some applications have a key for each item of work. It reconciles up to
  -- 200 keys, because the server has limited room for the locks of a transaction.
  SELECT max(part.key) INTO last
  FROM (SELECT k.key FROM @schema@.keys k WHERE k.key > tidied ORDER BY k.key LIMIT 10000) part;
  FOR rec IN
    SELECT * FROM @schema@.keys k WHERE k.key > tidied AND k.key <= last
      AND (k.busy OR k.token IS NOT NULL
        AND NOT EXISTS (SELECT FROM @schema@.sessions s WHERE s.id = k.session AND s.expires > now))
    ORDER BY k.key LIMIT 200
  LOOP
    settled := settled + 1;
    IF settled = 200 THEN last := rec.key; END IF;
    IF pg_catalog.pg_try_advisory_xact_lock(@schema@.turn(rec.key, secret)) THEN
      PERFORM FROM @schema@.keys k WHERE k.key = rec.key FOR UPDATE SKIP LOCKED;
      IF FOUND THEN PERFORM @schema@.put(@schema@.take(rec.key)); END IF;
    END IF;
  END LOOP;
  -- A key that was granted in the meantime is no longer idle and stays.
  WITH idle AS (
    SELECT k.key FROM @schema@.keys k WHERE k.key > tidied AND k.key <= last
      AND NOT k.busy AND k.token IS NULL AND coalesce(k.fence, 0) < now - 600000000
    FOR UPDATE SKIP LOCKED
  ), gone AS (
    DELETE FROM @schema@.keys k USING idle WHERE k.key = idle.key RETURNING k.fence
  )
  SELECT max(gone.fence) INTO highest FROM gone;
  UPDATE @schema@.meta m SET tidied_to = coalesce(last, ''), fence_floor = greatest(m.fence_floor, highest)
  WHERE m.tidied_to <> coalesce(last, '') OR m.fence_floor < highest;
  DELETE FROM @schema@.sessions s WHERE s.expires + greatest(2 * s.ttl, 60000000) < now
    AND NOT EXISTS (SELECT FROM @schema@.queue q WHERE q.session = s.id);
END $$;

-- The owner grants the rights to call operations by name. Nobody else has any right.
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA @schema@ FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA @schema@ FROM PUBLIC;

-- Operations that are new or changed since an older version become available to the roles that may call the others.
DO $$
DECLARE
  who regrole;
BEGIN
  FOR who IN
    SELECT a.grantee FROM pg_proc p, aclexplode(p.proacl) a
    WHERE p.pronamespace = '@schema@'::regnamespace AND p.proname = 'open_session' AND a.privilege_type = 'EXECUTE'
      AND a.grantee <> p.proowner
  LOOP
    EXECUTE format('GRANT EXECUTE ON FUNCTION @schema@.session_lives, @schema@.renew_session, @schema@.acquire, '
      '@schema@.together, @schema@.poll_many, @schema@.linger, @schema@.force_release, @schema@.inspect, '
      '@schema@.list_page TO %s', who);
  END LOOP;
END $$;

INSERT INTO @schema@.meta (version) VALUES (7) ON CONFLICT (one) DO UPDATE SET version = excluded.version;

COMMIT;
