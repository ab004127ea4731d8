//! What a step works with: the open transaction, the time, and what is to be done once it is committed.

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

/// What the database thread keeps in memory.
#[derive(Debug)]
pub(super) struct Local {
    pub(super) folder: Folder,
    pub(super) files: SharedFiles,
    /// A file of the store that was deleted or replaced: from then on nothing that is done here counts.
    pub(super) missing: Option<PathBuf>,
    /// When the files are touched next, so that they are not deleted as old.
    pub(super) touch_at: BootTime,
    pub(super) own: HashMap<SessionId, OwnSession>,
    /// Sessions of this handle that have ended: an id is used once.
    pub(super) ended: HashSet<SessionId>,
    pub(super) predecessors: Predecessors,
    pub(super) watcher: Watcher,
    /// Pushes to other handles are sent from here.
    pub(super) outlet: Option<UnixDatagram>,
    /// Write transactions until the next sweep.
    pub(super) sweep_in: u32,
}

impl Local {
    /// Whether the files that are open are the ones that others find. Once they are not, they never are again.
    pub(super) fn are_files_in_place(&mut self) -> bool {
        if self.missing.is_none() {
            self.missing = self.files.missing().map(Path::to_owned);
        }
        self.missing.is_none()
    }

    /// Keeps programs that delete old files away, now and then.
    pub(super) fn look_used(&mut self, now: BootTime) {
        if now < self.touch_at {
            return;
        }
        self.touch_at = now.after(TOUCH_EVERY);
        self.folder.keep_cleaners_away();
        self.files.touch();
        for session in self.own.keys() {
            session::touch_files(&self.folder, *session);
        }
    }
}

/// Interval between two touches. Programs that delete old files think in days.
const TOUCH_EVERY: Duration = Duration::from_secs(600);

/// What follows from steps once they are committed.
#[derive(Debug, Default)]
pub(super) struct Effects {
    pub(super) pushes: Vec<(SessionId, Push)>,
    /// Sessions whose files are made, and whose rows are entered.
    pub(super) opened: Vec<(SessionId, OwnSession)>,
    /// Sessions whose rows are gone.
    pub(super) ended: Vec<SessionId>,
}

/// A step's view of the store.
#[derive(Debug)]
pub(super) struct Tx<'a> {
    pub(super) db: &'a Connection,
    pub(super) local: &'a mut Local,
    pub(super) effects: Effects,
    /// The store's time of the step.
    pub(super) now: i64,
    /// The wall clock at that time.
    pub(super) wall: i64,
    /// What the probes of this transaction said: a session that is found dead stays dead.
    pub(super) probed: HashMap<SessionId, bool>,
    /// Sessions that were found dead and whose rows are still there.
    pub(super) dead: Vec<SessionId>,
    /// Keys that a step has left unsettled.
    pub(super) unsettled: Vec<i64>,
    /// Places in queues that were left by somebody who was not granted.
    pub(super) left: Vec<(i64, i64)>,
}

impl<'a> Tx<'a> {
    pub(super) fn new(db: &'a Connection, local: &'a mut Local) -> Self {
        Self {
            db,
            local,
            effects: Effects::default(),
            now: 0,
            wall: 0,
            probed: HashMap::new(),
            dead: Vec::new(),
            unsettled: Vec::new(),
            left: Vec::new(),
        }
    }

    /// The time of the next step.
    pub(super) fn set_time(&mut self, clock: &crate::clock::Clock) {
        self.now = i64::try_from(clock.now().as_nanos() / 1_000).unwrap_or(i64::MAX);
        self.wall = i64::try_from(clock.wall_micros()).unwrap_or(i64::MAX);
    }

    pub(super) fn time(&self) -> StoreTime {
        StoreTime::from_micros(self.now.unsigned_abs())
    }

    pub(super) fn path(&self) -> &Path {
        &self.local.folder.database
    }

    pub(super) fn failed(&self, cause: rusqlite::Error) -> crate::error::Error {
        from_sqlite("a step", self.path(), cause)
    }

    pub(super) fn statement(&self, sql: &str) -> Result<CachedStatement<'a>> {
        self.db.prepare_cached(sql).map_err(|cause| self.failed(cause))
    }

    /// Runs a statement that changes rows; tells how many.
    pub(super) fn execute(&self, sql: &str, params: impl Params) -> Result<usize> {
        self.statement(sql)?.execute(params).map_err(|cause| self.failed(cause))
    }

    /// The first row, if there is one.
    pub(super) fn first<T>(
        &self,
        sql: &str,
        params: impl Params,
        read: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Option<T>> {
        self.statement(sql)?.query_row(params, read).optional().map_err(|cause| self.failed(cause))
    }

    /// All rows.
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

    /// Whether this handle has opened the session, and not ended it.
    pub(super) fn is_own(&self, session: SessionId) -> bool {
        self.local.own.contains_key(&session) || self.effects.opened.iter().any(|(opened, _)| *opened == session)
    }

    /// Whether others find the file of a session of this handle. Without it they take the session for dead, so it is.
    fn is_in_place(&mut self, session: SessionId) -> bool {
        let local = &*self.local;
        let is_in_place = local.own.get(&session).is_none_or(|own| session::is_in_place(&local.folder, session, own));
        if !is_in_place {
            let path = session::lock_path(&local.folder, session);
            self.push(session, Push::Warning(was_deleted(&path)));
        }
        is_in_place
    }

    /// Whether the process of a session lives. One of the dead is noted for [`settle_rest`](Self::settle_rest).
    pub(super) fn is_alive(&mut self, session: SessionId) -> Result<bool> {
        let alive = match self.probed.get(&session) {
            Some(alive) => *alive,
            None if self.is_own(session) => {
                let alive = self.is_in_place(session);
                self.probed.insert(session, alive);
                alive
            }
            None => {
                let alive = session::is_alive(&self.local.folder, session)?;
                self.probed.insert(session, alive);
                alive
            }
        };
        if !alive && !self.dead.contains(&session) {
            self.dead.push(session);
        }
        Ok(alive)
    }

    /// Whether a session may act: its row is there and its process lives.
    pub(super) fn is_open(&mut self, session: SessionId) -> Result<bool> {
        let known = self.first("SELECT 1 FROM sessions WHERE id = ?1", [session.as_bytes()], |_| Ok(()))?;
        Ok(known.is_some() && self.is_alive(session)?)
    }

    /// The processes of sessions; `None` for one that is not known.
    pub(super) fn processes(&self, sessions: &[SessionId]) -> Result<Vec<Process>> {
        let mut found = Vec::with_capacity(sessions.len());
        for session in sessions.iter().filter(|session| !self.is_own(**session)) {
            let sql = "SELECT pid, pid_namespace FROM sessions WHERE id = ?1";
            let read = |row: &Row<'_>| Ok(Process { pid: row.get(0)?, namespace: row.get(1)? });
            found.extend(self.first(sql, [session.as_bytes()], read)?);
        }
        Ok(found)
    }

    /// A push, sent once the transaction is committed.
    pub(super) fn push(&mut self, session: SessionId, push: Push) {
        self.effects.pushes.push((session, push));
    }

    /// The token waits no more.
    pub(super) fn forget_waiter(&mut self, token: TokenId) {
        self.local.predecessors.forget(&mut self.local.watcher, token);
    }
}

/// A duration in µs.
pub(super) fn micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(i64::MAX / 4).min(i64::MAX / 4)
}

/// The span from `now` to `end`; nothing if that has passed.
pub(super) fn until(now: i64, end: i64) -> Duration {
    Duration::from_micros(end.saturating_sub(now).max(0).unsigned_abs())
}

pub(super) fn token_of(row: &Row<'_>, column: usize) -> rusqlite::Result<TokenId> {
    row.get(column).map(TokenId::from_bytes)
}

pub(super) fn session_of(row: &Row<'_>, column: usize) -> rusqlite::Result<SessionId> {
    row.get(column).map(SessionId::from_bytes)
}
