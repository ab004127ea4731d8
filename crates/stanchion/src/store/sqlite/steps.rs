//! The atomic steps that change something. Each runs inside the database thread's transaction.

use rusqlite::params;

use super::error::{NAME, error};
use super::read::Place;
use super::rows::{KeyRow, NewHold, WaiterRow, read_hold};
use super::session;
use super::tx::{Tx, micros};
use crate::error::{ErrorKind, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, Cursor, EndOutcome, ExtendOutcome, ForceReleaseOutcome,
    ForceReleaseRequest, KeyState, Listing, LostToken, MAX_WAITERS, OpenOutcome, OpenSession, PollOutcome, Push,
    RenewOutcome,
};
use crate::token::{SessionId, TokenId};
use std::time::Duration;

/// A step that a caller asks for.
#[derive(Clone, Debug)]
pub(super) enum Operation {
    Open(OpenSession),
    RenewSession(SessionId),
    Close(SessionId),
    Lives(SessionId),
    Acquire(AcquireRequest),
    Poll {
        key: Key,
        tokens: Vec<TokenId>,
    },
    End {
        key: Key,
        token: TokenId,
        cooldown: Option<Duration>,
    },
    Extend {
        key: Key,
        token: TokenId,
        ttl: Duration,
    },
    Adopt(AdoptRequest),
    ForceRelease(ForceReleaseRequest),
    Inspect(Key),
    List {
        prefix: String,
        cursor: Option<Cursor>,
        limit: usize,
    },
    /// A watched process has ended.
    Died(i32),
}

/// What a step answers.
#[derive(Debug)]
pub(super) enum Answer {
    Open(OpenOutcome),
    Renewed(RenewOutcome),
    Done,
    Lives(bool),
    Acquire(AcquireOutcome),
    Poll(Vec<PollOutcome>),
    End(EndOutcome),
    Extend(ExtendOutcome),
    Adopt(AdoptOutcome),
    ForceReleased(ForceReleaseOutcome),
    Inspect(KeyState),
    List(Listing),
}

impl Operation {
    /// Whether it changes nothing unless there is something to settle.
    pub(super) fn is_reading(&self) -> bool {
        matches!(
            self,
            Self::RenewSession(_) | Self::Lives(_) | Self::Poll { .. } | Self::Inspect(_) | Self::List { .. }
        )
    }

    /// The key that it is about.
    pub(super) fn key(&self) -> Option<&Key> {
        match self {
            Self::Acquire(request) => Some(&request.key),
            Self::Adopt(request) => Some(&request.key),
            Self::ForceRelease(request) => Some(&request.key),
            Self::Poll { key, .. } | Self::End { key, .. } | Self::Extend { key, .. } | Self::Inspect(key) => Some(key),
            Self::Open(_)
            | Self::RenewSession(_)
            | Self::Close(_)
            | Self::Lives(_)
            | Self::List { .. }
            | Self::Died(_) => None,
        }
    }
}

impl Tx<'_> {
    /// Runs a step in a write transaction.
    pub(super) fn run(&mut self, step: &Operation) -> Result<Answer> {
        let answer = match step {
            Operation::Open(request) => Answer::Open(self.open(request)?),
            Operation::Close(session) => {
                self.reap(*session)?;
                Answer::Done
            }
            Operation::Acquire(request) => Answer::Acquire(self.acquire(request)?),
            Operation::End { key, token, cooldown } => Answer::End(self.end(key, *token, *cooldown)?),
            Operation::Extend { key, token, ttl } => Answer::Extend(self.extend(key, *token, *ttl)?),
            Operation::Adopt(request) => Answer::Adopt(self.adopt(request)?),
            Operation::ForceRelease(request) => Answer::ForceReleased(self.force_release(request)?),
            Operation::Died(pid) => {
                self.probe_process(*pid)?;
                Answer::Done
            }
            Operation::RenewSession(_)
            | Operation::Lives(_)
            | Operation::Poll { .. }
            | Operation::Inspect(_)
            | Operation::List { .. } => self.settle_and_read(step)?,
        };
        self.settle_rest()?;
        Ok(answer)
    }

    /// A reading step has found something to settle: settles it and reads again.
    fn settle_and_read(&mut self, step: &Operation) -> Result<Answer> {
        // Each round settles what the one before it has met.
        for _ in 0..100_000 {
            if let Some(answer) = self.read(step)? {
                return Ok(answer);
            }
            self.settle_rest()?;
        }
        Err(error(ErrorKind::Internal, "a key could not be settled"))
    }

    fn open(&mut self, request: &OpenSession) -> Result<OpenOutcome> {
        let id = request.session;
        if self.local.ended.contains(&id) {
            return Ok(OpenOutcome::Gone);
        }
        let known = self.first("SELECT 1 FROM sessions WHERE id = ?1", [id.as_bytes()], |_| Ok(()))?.is_some();
        if known && self.is_alive(id)? {
            return Ok(OpenOutcome::Opened);
        }
        if known || self.is_own(id) {
            self.reap(id)?;
            return Ok(OpenOutcome::Gone);
        }
        let Some(own) = session::create(&self.local.folder, id)? else { return Ok(OpenOutcome::Gone) };
        self.effects.opened.push((id, own));
        let process = self.local.predecessors.own();
        self.execute(
            "INSERT INTO sessions (id, owner, pid, pid_namespace) VALUES (?1, ?2, ?3, ?4)",
            params![id.as_bytes(), request.owner, process.pid, process.namespace],
        )?;
        self.sweep_sessions(id)?;
        Ok(OpenOutcome::Opened)
    }

    fn acquire(&mut self, request: &AcquireRequest) -> Result<AcquireOutcome> {
        if !self.is_open(request.session)? {
            return Ok(AcquireOutcome::SessionGone);
        }
        if self.is_forced(&request.key, request.token)? {
            return Ok(AcquireOutcome::ForceReleased);
        }
        let mut row = self.key_or_new(&request.key)?;
        let demand = request.demand.into();
        let fits = |tx: &Self, row: &KeyRow| row.waiting == 0 && !row.is_closed(tx.now) && row.has_room(demand);
        // In the common case there is nothing to settle: the dead among other holders do not matter to who fits.
        if row.is_due(self.now) || !fits(self, &row) {
            self.settle(&mut row, true)?;
        }
        if let Some(hold) = self.find_hold(&row, request.token)? {
            return Ok(AcquireOutcome::Granted(hold.granted(self.now)));
        }
        if let Some(waiter) = self.find_waiter(&row, request.token)? {
            let place = self.place_of(&row, &waiter)?;
            return Ok(AcquireOutcome::Queued(self.queued(&row, waiter.token, place)?));
        }
        if self.time() > request.not_after {
            return Ok(AcquireOutcome::Stale);
        }
        if self.next_fence(&row).is_none() {
            return Err(Fence::used_up().with_store(NAME));
        }
        if fits(self, &row) {
            let hold = NewHold {
                token: request.token,
                session: request.session,
                demand,
                lifetime: request.lifetime.into(),
                metadata: request.metadata.as_deref(),
                trace: request.trace.as_deref(),
            };
            if row.closed_until.is_some() {
                (row.closed_until, row.closed_until_wall) = (None, None);
            }
            let is_new = row.id == 0;
            let hold = self.grant(&mut row, &hold)?;
            if !is_new {
                self.save(&mut row)?;
            }
            return Ok(AcquireOutcome::Granted(hold.granted(self.now)));
        }
        if !request.enqueue {
            return Ok(AcquireOutcome::Busy { check_in: self.check_in(&row), in_use: row.in_use() });
        }
        if row.waiting >= i64::from(MAX_WAITERS) {
            self.reap_dead_waiters(&mut row)?;
        }
        if row.waiting >= i64::from(MAX_WAITERS) {
            return Ok(AcquireOutcome::QueueFull { limit: MAX_WAITERS });
        }
        self.enqueue(&mut row, request)
    }

    fn enqueue(&mut self, row: &mut KeyRow, request: &AcquireRequest) -> Result<AcquireOutcome> {
        let waiter = WaiterRow {
            seq: 0,
            token: request.token,
            session: request.session,
            demand: request.demand.into(),
            lifetime: request.lifetime.into(),
        };
        self.execute(
            "INSERT INTO waiters (key_id, token, session, units, capacity, session_bound, term, entered, metadata, trace)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
            params![
                row.id,
                waiter.token.as_bytes(),
                waiter.session.as_bytes(),
                waiter.demand.units,
                waiter.demand.capacity,
                waiter.lifetime.session_bound,
                waiter.lifetime.length,
                self.now,
                request.metadata,
                request.trace
            ],
        )?;
        let waiter = WaiterRow { seq: self.db.last_insert_rowid(), ..waiter };
        let ahead = u32::try_from(row.waiting).unwrap_or(u32::MAX);
        let before = self.session_before(row.id, waiter.seq)?;
        row.waiting += 1;
        row.touched = self.now;
        self.save(row)?;
        let place = Place { ahead, session: waiter.session, before };
        Ok(AcquireOutcome::Queued(self.queued(row, waiter.token, place)?))
    }

    fn end(&mut self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<EndOutcome> {
        self.forget_waiter(token);
        let Some(mut row) = self.find_key(key)? else { return self.end_forced(key, token) };
        if row.is_due(self.now) {
            self.settle(&mut row, false)?;
        }
        if let Some(hold) = self.find_hold(&row, token)? {
            if hold.session_bound && !self.is_alive(hold.session)? {
                return Ok(EndOutcome::Nothing);
            }
            self.remove_hold(&mut row, &hold)?;
            if let Some(cooldown) = cooldown {
                let (end, end_wall) = (self.now + micros(cooldown), self.wall + micros(cooldown));
                row.closed_until = row.closed_until.max(Some(end));
                row.closed_until_wall = row.closed_until_wall.max(Some(end_wall));
            }
            self.save(&mut row)?;
            if row.waiting > 0 {
                self.settle(&mut row, false)?;
                if row.is_closed(self.now) {
                    self.recheck_head(&row)?;
                }
            }
            return Ok(EndOutcome::Released);
        }
        let Some(waiter) = self.find_waiter(&row, token)? else { return self.end_forced(key, token) };
        if !self.is_alive(waiter.session)? {
            return Ok(EndOutcome::Nothing);
        }
        let before = self.session_before(row.id, waiter.seq)?;
        self.remove_waiter(&mut row, &waiter)?;
        self.save(&mut row)?;
        if before.is_none() {
            self.settle(&mut row, false)?;
        }
        // Who stood behind it watched it. If the one before it is of the same process nothing is new.
        if before != Some(waiter.session) {
            self.left.push((row.id, waiter.seq));
        }
        Ok(EndOutcome::Dequeued)
    }

    fn end_forced(&self, key: &Key, token: TokenId) -> Result<EndOutcome> {
        self.execute("DELETE FROM forced WHERE token = ?1 AND name = ?2", params![token.as_bytes(), key.as_encoded()])?;
        Ok(EndOutcome::Nothing)
    }

    fn extend(&mut self, key: &Key, token: TokenId, ttl: Duration) -> Result<ExtendOutcome> {
        let Some(mut row) = self.find_key(key)? else { return Ok(ExtendOutcome::NotHeld) };
        if row.is_due(self.now) {
            self.settle(&mut row, false)?;
        }
        let Some(hold) = self.find_hold(&row, token)? else { return Ok(ExtendOutcome::NotHeld) };
        let Some(before) = hold.deadline else { return Ok(ExtendOutcome::NotHeld) };
        if hold.session_bound && !self.is_alive(hold.session)? {
            return Ok(ExtendOutcome::NotHeld);
        }
        let deadline = self.now + micros(ttl);
        self.execute(
            "UPDATE holds SET deadline = ?3 WHERE key_id = ?1 AND token = ?2",
            params![row.id, token.as_bytes(), deadline],
        )?;
        if row.holders == 1 {
            row.set_deadline(Some(deadline));
        } else {
            row.note_deadline(deadline);
        }
        self.save(&mut row)?;
        if deadline < before {
            self.recheck_head(&row)?;
        }
        Ok(ExtendOutcome::Extended)
    }

    fn adopt(&mut self, request: &AdoptRequest) -> Result<AdoptOutcome> {
        if !self.is_open(request.session)? {
            return Ok(AdoptOutcome::SessionGone);
        }
        let Some(mut row) = self.find_key(&request.key)? else { return Ok(AdoptOutcome::Gone) };
        self.settle(&mut row, true)?;
        let adopted = |hold: super::rows::HoldRow, now| AdoptOutcome::Adopted {
            granted: hold.granted(now),
            session_bound: hold.session_bound,
        };
        if let Some(hold) = self.find_hold(&row, request.to)? {
            return Ok(adopted(hold, self.now));
        }
        if self.time() > request.not_after {
            return Ok(AdoptOutcome::Stale);
        }
        let Some(hold) = self.find_hold(&row, request.from)? else { return Ok(AdoptOutcome::Gone) };
        self.execute(
            "UPDATE holds SET token = ?3, session = ?4, owner = NULL WHERE key_id = ?1 AND token = ?2",
            params![row.id, request.from.as_bytes(), request.to.as_bytes(), request.session.as_bytes()],
        )?;
        // The head watched another process than the one that has it now.
        self.recheck_head(&row)?;
        Ok(adopted(hold, self.now))
    }

    fn force_release(&mut self, request: &ForceReleaseRequest) -> Result<ForceReleaseOutcome> {
        let Some(mut row) = self.find_key(&request.key)? else {
            return Ok(ForceReleaseOutcome::NoSuchHold { live: Vec::new() });
        };
        self.settle(&mut row, true)?;
        let sql =
            "SELECT token, fence, units, session, session_bound, deadline FROM holds WHERE key_id = ?1 ORDER BY fence";
        let holds = self.all(sql, [row.id], read_hold)?;
        let fence_of = |fence: i64| Fence::new(fence.unsigned_abs());
        let Some(hold) = holds.iter().find(|hold| fence_of(hold.fence) == request.fence) else {
            return Ok(ForceReleaseOutcome::NoSuchHold {
                live: holds.iter().map(|hold| fence_of(hold.fence)).collect(),
            });
        };
        self.remove_hold(&mut row, hold)?;
        // Nothing is granted after the highest fence, so it need not be raised.
        row.fence = self.next_fence(&row).unwrap_or(row.fence);
        self.save(&mut row)?;
        if self.is_open(hold.session)? {
            self.execute(
                "INSERT OR REPLACE INTO forced (token, name, session, reason) VALUES (?1, ?2, ?3, ?4)",
                params![hold.token.as_bytes(), request.key.as_encoded(), hold.session.as_bytes(), request.reason],
            )?;
            let lost = LostToken { key: request.key.clone(), token: hold.token, reason: request.reason.clone() };
            self.push(hold.session, Push::ForceReleased(lost));
        }
        self.settle(&mut row, false)?;
        Ok(ForceReleaseOutcome::Released)
    }

    fn is_forced(&self, key: &Key, token: TokenId) -> Result<bool> {
        let sql = "SELECT 1 FROM forced WHERE token = ?1 AND name = ?2";
        Ok(self.first(sql, params![token.as_bytes(), key.as_encoded()], |_| Ok(()))?.is_some())
    }
}
