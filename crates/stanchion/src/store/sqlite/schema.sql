-- The embedded store, version 2. Times are µs: of the boot-time clock, `_wall` columns since 1970.

-- One row. The floor is the fence from which an unknown key counts on: no forgotten fence comes back.
CREATE TABLE meta (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    boot_id TEXT NOT NULL,
    fence_floor INTEGER NOT NULL,
    sweep_after INTEGER NOT NULL
) STRICT;

-- Alive exactly as long as somebody holds the lock of `sessions/<id>.lock`.
CREATE TABLE sessions (
    id BLOB PRIMARY KEY,
    owner TEXT NOT NULL,
    pid INTEGER NOT NULL,
    pid_namespace TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX sessions_by_pid ON sessions (pid);

-- One row a key, with sums over its holds and waiters, so that the common step reads and writes one row.
CREATE TABLE keys (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    fence INTEGER NOT NULL,
    used INTEGER NOT NULL,
    holders INTEGER NOT NULL,
    waiting INTEGER NOT NULL,
    -- Not above the smallest capacity of a hold; means nothing while there are none.
    capacity INTEGER NOT NULL,
    -- Not later than the earliest deadline of a hold; means nothing while there are none.
    next_deadline INTEGER,
    -- Both clocks: the wall clock carries a cooldown over a restart of the machine.
    closed_until INTEGER,
    closed_until_wall INTEGER,
    touched INTEGER NOT NULL
) STRICT;

CREATE TABLE holds (
    key_id INTEGER NOT NULL,
    token BLOB NOT NULL,
    fence INTEGER NOT NULL,
    units INTEGER NOT NULL,
    capacity INTEGER NOT NULL,
    session BLOB NOT NULL,
    session_bound INTEGER NOT NULL,
    deadline INTEGER,
    granted INTEGER NOT NULL,
    granted_wall INTEGER NOT NULL,
    -- Set when the session ends before a fixed term does; until then the session knows it.
    owner TEXT,
    metadata TEXT,
    trace TEXT,
    PRIMARY KEY (key_id, token)
) STRICT, WITHOUT ROWID;
CREATE INDEX holds_by_session ON holds (session);
-- An exclusive hold is alone: it costs nothing here.
CREATE INDEX shared_by_capacity ON holds (key_id, capacity) WHERE units < capacity;

-- The queue of a key is its waiters in order of `seq`.
CREATE TABLE waiters (
    seq INTEGER PRIMARY KEY,
    key_id INTEGER NOT NULL,
    token BLOB NOT NULL,
    session BLOB NOT NULL,
    units INTEGER NOT NULL,
    capacity INTEGER NOT NULL,
    session_bound INTEGER NOT NULL,
    term INTEGER,
    entered INTEGER NOT NULL,
    metadata TEXT,
    trace TEXT
) STRICT;
CREATE INDEX waiters_by_key ON waiters (key_id);
CREATE UNIQUE INDEX waiters_by_token ON waiters (token, key_id);
CREATE INDEX waiters_by_session ON waiters (session);

-- Tokens that were released by force and that their caller has not ended yet.
CREATE TABLE forced (
    token BLOB NOT NULL,
    name TEXT NOT NULL,
    session BLOB NOT NULL,
    reason TEXT NOT NULL,
    PRIMARY KEY (token, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX forced_by_session ON forced (session);
