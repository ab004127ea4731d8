//! The context of a request: the open transaction, the time, and the effects that follow its commit.

use std::collections::{HashMap, HashSet};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{CachedStatement, Connection, OptionalExtension, Params, Row};

use super::error::from_sqlite;
use super::folder::{Folder, SharedFiles, was_deleted};
use super::predecessors::{Predecessors, Process};
use super::session::{self, OwnSession};
use super::watch::Watcher;
use crate::clock::BootTime;
use crate::error::Result;
use crate::store::{Push, StoreTime};
use crate::token::{SessionId, TokenId};

/// The memory of the database thread.
#[derive(Debug)]
pub(super) struct WorkerState {
    pub(super) folder: Folder,
    pub(super) files: SharedFiles,
    /// A file of the store that was deleted or replaced. From then on other processes do not see any change of this
    /// handle.
    pub(super) missing: Option<PathBuf>,
    /// Time of the next touch of the files, so that the system does not delete them as old.
    pub(super) touch_at: BootTime,
    /// Open sessions of this handle.
    pub(super) own: HashMap<SessionId, OwnSession>,
    /// Sessions of this handle that have ended, so that their ids are not used again.
    pub(super) ended: HashSet<SessionId>,
    pub(super) predecessors: Predecessors,
    pub(super) watcher: Watcher,
    /// The socket that sends pushes to other handles.
    pub(super) push_socket: Option<UnixDatagram>,
    /// Number of write transactions until the next sweep.
    pub(super) sweep_in: u32,
}

impl WorkerState {
    /// Returns whether the open files are still the files that other processes open. Once this is `false`, it stays
    /// `false`.
    pub(super) fn are_files_in_place(&mut self) -> bool {
        if self.missing.is_none() {
            self.missing = self.files.missing().map(Path::to_owned);
        }
        self.missing.is_none()
    }

    /// Updates the times of the files when that is due, so that the system does not delete them as old.
    pub(super) fn touch_files_if_due(&mut self, now: BootTime) {
        if now < self.touch_at {
            return;
        }
        self.touch_at = now.after(TOUCH_INTERVAL);
        self.folder.lock_folders();
        self.files.touch();
        for session in self.own.keys() {
            session::touch_files(&self.folder, *session);
        }
    }
}

/// Interval between two touches of the files. Programs that delete old files keep them for days.
const TOUCH_INTERVAL: Duration = Duration::from_secs(600);

/// The actions that follow the commit of a transaction.
#[derive(Debug, Default)]
pub(super) struct Effects {
    pub(super) pushes: Vec<(SessionId, Push)>,
    /// Sessions whose files were created and whose rows were inserted.
    pub(super) opened: Vec<(SessionId, OwnSession)>,
    /// Sessions whose rows were deleted.
    pub(super) ended: Vec<SessionId>,
}

/// A transaction, as requests use it.
#[derive(Debug)]
pub(super) struct Tx<'a> {
    pub(super) db: &'a Connection,
    pub(super) state: &'a mut WorkerState,
    pub(super) effects: Effects,
    /// The store's time of the request, in microseconds.
    pub(super) now: i64,
    /// The wall-clock time of the request, in microseconds.
    pub(super) wall: i64,
    /// Whether each probed session is open. A session that this transaction found expired stays expired.
    pub(super) probed: HashMap<SessionId, bool>,
    /// Expired sessions whose rows still exist.
    pub(super) expired: Vec<SessionId>,
    /// Ids of keys that a request left unreconciled.
    pub(super) unreconciled: Vec<i64>,
    /// Key ids and places of waiters that left a queue without a grant.
    pub(super) vacated: Vec<(i64, i64)>,
}

impl<'a> Tx<'a> {
    pub(super) fn new(db: &'a Connection, state: &'a mut WorkerState) -> Self {
        Self {
            db,
            state,
            effects: Effects::default(),
            now: 0,
            wall: 0,
            probed: HashMap::new(),
            expired: Vec::new(),
            unreconciled: Vec::new(),
            vacated: Vec::new(),
        }
    }

    /// Sets the time of the next request.
    pub(super) fn set_time(&mut self, clock: &crate::clock::Clock) {
        self.now = i64::try_from(clock.now().as_nanos() / 1_000).unwrap_or(i64::MAX);
        self.wall = i64::try_from(clock.wall_micros()).unwrap_or(i64::MAX);
    }

    pub(super) fn time(&self) -> StoreTime {
        StoreTime::from_micros(self.now.unsigned_abs())
    }

    pub(super) fn path(&self) -> &Path {
        &self.state.folder.database
    }

    /// Converts an error of SQLite.
    pub(super) fn failed(&self, cause: rusqlite::Error) -> crate::error::Error {
        from_sqlite("executing a request", self.path(), cause)
    }

    /// Returns a prepared statement from the cache.
    pub(super) fn statement(&self, sql: &str) -> Result<CachedStatement<'a>> {
        self.db.prepare_cached(sql).map_err(|cause| self.failed(cause))
    }

    /// Executes a statement that changes rows, and returns their number.
    pub(super) fn execute(&self, sql: &str, params: impl Params) -> Result<usize> {
        self.statement(sql)?.execute(params).map_err(|cause| self.failed(cause))
    }

    /// Returns the first row of a query, if there is one.
    pub(super) fn first<T>(
        &self,
        sql: &str,
        params: impl Params,
        read: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Option<T>> {
        self.statement(sql)?.query_row(params, read).optional().map_err(|cause| self.failed(cause))
    }

    /// Returns all rows of a query.
    pub(super) fn all<T>(
        &self,
        sql: &str,
        params: impl Params,
        read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>> {
        let mut statement = self.statement(sql)?;
        let rows = statement.query_map(params, read).and_then(Iterator::collect);
        rows.map_err(|cause| self.failed(cause))
    }

    /// Returns whether this handle opened the session and has not ended it.
    pub(super) fn is_own(&self, session: SessionId) -> bool {
        self.state.own.contains_key(&session) || self.effects.opened.iter().any(|(opened, _)| *opened == session)
    }

    /// Returns whether other processes find the lock file of a session of this handle. If they do not, the session has
    /// expired for them, so it has expired here too.
    fn is_in_place(&mut self, session: SessionId) -> bool {
        let state = &*self.state;
        let is_in_place = state.own.get(&session).is_none_or(|own| session::is_in_place(&state.folder, session, own));
        if !is_in_place {
            let path = session::lock_path(&state.folder, session);
            self.push(session, Push::Warning(was_deleted(&path)));
        }
        is_in_place
    }

    /// Returns whether the lock of a session is held. Records an expired session for
    /// [`reconcile_rest`](Self::reconcile_rest).
    pub(super) fn is_alive(&mut self, session: SessionId) -> Result<bool> {
        let alive = match self.probed.get(&session) {
            Some(alive) => *alive,
            None if self.is_own(session) => {
                let alive = self.is_in_place(session);
                self.probed.insert(session, alive);
                alive
            }
            None => {
                let alive = session::is_alive(&self.state.folder, session)?;
                self.probed.insert(session, alive);
                alive
            }
        };
        if !alive && !self.expired.contains(&session) {
            self.expired.push(session);
        }
        Ok(alive)
    }

    /// Returns whether a session is open: its row exists, and its lock is held.
    pub(super) fn is_open(&mut self, session: SessionId) -> Result<bool> {
        let known = self.first("SELECT 1 FROM sessions WHERE id = ?1", [session.as_bytes()], |_| Ok(()))?;
        Ok(known.is_some() && self.is_alive(session)?)
    }

    /// Returns the processes of sessions of other handles. Leaves out sessions without a row.
    pub(super) fn processes(&self, sessions: &[SessionId]) -> Result<Vec<Process>> {
        let mut found = Vec::with_capacity(sessions.len());
        for session in sessions.iter().filter(|session| !self.is_own(**session)) {
            let sql = "SELECT pid, pid_namespace FROM sessions WHERE id = ?1";
            let read = |row: &Row<'_>| Ok(Process { pid: row.get(0)?, namespace: row.get(1)? });
            found.extend(self.first(sql, [session.as_bytes()], read)?);
        }
        Ok(found)
    }

    /// Adds a push that is sent after the commit.
    pub(super) fn push(&mut self, session: SessionId, push: Push) {
        self.effects.pushes.push((session, push));
    }

    /// Ends the watches of a token that no longer waits.
    pub(super) fn forget_waiter(&mut self, token: TokenId) {
        self.state.predecessors.forget(&mut self.state.watcher, token);
    }
}

/// Converts a duration to microseconds. The result is small enough to be added to a time.
pub(super) fn micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(i64::MAX / 4).min(i64::MAX / 4)
}

/// Returns the time from `now` to `end`, or zero if `end` has passed.
pub(super) fn until(now: i64, end: i64) -> Duration {
    Duration::from_micros(end.saturating_sub(now).max(0).unsigned_abs())
}

pub(super) fn token_of(row: &Row<'_>, column: usize) -> rusqlite::Result<TokenId> {
    row.get(column).map(TokenId::from_bytes)
}

pub(super) fn session_of(row: &Row<'_>, column: usize) -> rusqlite::Result<SessionId> {
    row.get(column).map(SessionId::from_bytes)
}
