-- The tables of the embedded store, version 2. Times are microseconds of the boot-time clock; in `_wall` columns,
-- microseconds since 1970.

-- This table has one row. Fences of a key without a row continue from the floor, so that no fence of a deleted row
-- comes back.
CREATE TABLE meta (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    boot_id TEXT NOT NULL,
    fence_floor INTEGER NOT NULL,
    sweep_after INTEGER NOT NULL
) STRICT;

-- A session is open as long as a process holds the lock of `sessions/<id>.lock`.
CREATE TABLE sessions (
    id BLOB PRIMARY KEY,
    owner TEXT NOT NULL,
    pid INTEGER NOT NULL,
    pid_namespace TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX sessions_by_pid ON sessions (pid);

-- One row for each key, with sums over its holds and waiters, so that the most common requests read and write one row.
CREATE TABLE keys (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    fence INTEGER NOT NULL,
    used INTEGER NOT NULL,
    holders INTEGER NOT NULL,
    waiting INTEGER NOT NULL,
    -- At most the smallest capacity of the holds. It has no meaning without holds.
    capacity INTEGER NOT NULL,
    -- At most the earliest deadline of the holds. It has no meaning without holds.
    next_deadline INTEGER,
    -- The end of the cooldown on both clocks, because only the wall clock survives a restart of the machine.
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
    -- 0: outlives its session. 1: ends with it. 2: ends with it, and lingers.
    session_bound INTEGER NOT NULL,
    deadline INTEGER,
    granted INTEGER NOT NULL,
    granted_wall INTEGER NOT NULL,
    -- Set when the session ends before a fixed lifetime does. Until then the row of the session has the owner.
    owner TEXT,
    metadata TEXT,
    trace TEXT,
    PRIMARY KEY (key_id, token)
) STRICT, WITHOUT ROWID;
CREATE INDEX holds_by_session ON holds (session);
-- An exclusive hold is the only hold of its key, so this index leaves it out.
CREATE INDEX shared_by_capacity ON holds (key_id, capacity) WHERE units < capacity;

-- The queue of a key consists of its waiters in the order of `seq`.
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

-- Force-released tokens that their caller has not released or abandoned yet.
CREATE TABLE forced (
    token BLOB NOT NULL,
    name TEXT NOT NULL,
    session BLOB NOT NULL,
    reason TEXT NOT NULL,
    PRIMARY KEY (token, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX forced_by_session ON forced (session);
