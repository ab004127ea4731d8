//! Executes the requests that change something, inside a transaction of the database thread.

use std::time::Duration;

use rusqlite::params;

use super::error::{NAME, error};
use super::read::Place;
use super::request::{Answer, Request};
use super::rows::{KeyRow, LINGERS, NewHold, WaiterRow, read_hold};
use super::session;
use super::tx::{Tx, micros};
use crate::error::{ErrorKind, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, EndOutcome, ExtendOutcome, ForceReleaseOutcome,
    ForceReleaseRequest, LingerOutcome, LostToken, MAX_WAITERS, OpenOutcome, OpenSession, Push,
};
use crate::token::TokenId;

impl Tx<'_> {
    /// Executes a request in a write transaction.
    pub(super) fn run(&mut self, request: &Request) -> Result<Answer> {
        let answer = match request {
            Request::Open(request) => Answer::Open(self.open(request)?),
            Request::Close(session) => {
                self.reap(*session)?;
                Answer::Done
            }
            Request::Acquire(request) => Answer::Acquire(self.acquire(request)?),
            Request::Release { key, token, cooldown } => Answer::Release(self.release(key, *token, *cooldown)?),
            Request::Extend { key, token, ttl } => Answer::Extend(self.extend(key, *token, *ttl)?),
            Request::Linger { key, token } => Answer::Linger(self.linger(key, *token)?),
            Request::Adopt(request) => Answer::Adopt(self.adopt(request)?),
            Request::ForceRelease(request) => Answer::ForceRelease(self.force_release(request)?),
            Request::ProcessExited(pid) => {
                self.probe_process(*pid)?;
                Answer::Done
            }
            Request::RenewSession(_)
            | Request::SessionLives(_)
            | Request::Poll { .. }
            | Request::Inspect(_)
            | Request::List { .. } => self.reconcile_and_read(request)?,
        };
        self.reconcile_rest()?;
        Ok(answer)
    }

    /// Executes a reading request, and reconciles keys until the request can be answered.
    fn reconcile_and_read(&mut self, request: &Request) -> Result<Answer> {
        // Each round reconciles the keys that the round before found.
        for _ in 0..100_000 {
            if let Some(answer) = self.read(request)? {
                return Ok(answer);
            }
            self.reconcile_rest()?;
        }
        Err(error(ErrorKind::Internal, "a key could not be reconciled"))
    }

    /// Opens a session of this handle.
    fn open(&mut self, request: &OpenSession) -> Result<OpenOutcome> {
        let id = request.session;
        if self.state.ended.contains(&id) {
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
        let Some(own) = session::create(&self.state.folder, id)? else { return Ok(OpenOutcome::Gone) };
        self.effects.opened.push((id, own));
        let process = self.state.predecessors.own();
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
        // Usually there is nothing to reconcile: a request that fits is not affected by expired sessions of other
        // holders.
        if row.is_due(self.now) || !fits(self, &row) {
            self.reconcile(&mut row, true)?;
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
            let lingers = self.find_lingering_hold(&row)?.is_some();
            return Ok(AcquireOutcome::Busy { check_in: self.check_in(&row), in_use: row.in_use(), lingers });
        }
        if row.waiting >= i64::from(MAX_WAITERS) {
            self.reap_expired_waiters(&mut row)?;
        }
        if row.waiting >= i64::from(MAX_WAITERS) {
            return Ok(AcquireOutcome::QueueFull { limit: MAX_WAITERS });
        }
        self.enqueue(&mut row, request)
    }

    /// Appends a waiter to the queue.
    fn enqueue(&mut self, row: &mut KeyRow, request: &AcquireRequest) -> Result<AcquireOutcome> {
        let waiter = WaiterRow {
            seq: 0,
            token: request.token,
            session: request.session,
            demand: request.demand.into(),
            lifetime: request.lifetime.into(),
        };
        self.execute(
            "INSERT INTO waiters (key_id, token, session, units, capacity, session_bound, term, entered, metadata,
                 trace) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
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

    /// Releases the hold or removes the queue entry of a token.
    fn release(&mut self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<EndOutcome> {
        self.forget_waiter(token);
        let Some(mut row) = self.find_key(key)? else { return self.forget_forced(key, token) };
        if row.is_due(self.now) {
            self.reconcile(&mut row, false)?;
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
                self.reconcile(&mut row, false)?;
                if row.is_closed(self.now) {
                    self.recheck_head(&row)?;
                }
            }
            return Ok(EndOutcome::Released);
        }
        let Some(waiter) = self.find_waiter(&row, token)? else { return self.forget_forced(key, token) };
        if !self.is_alive(waiter.session)? {
            return Ok(EndOutcome::Nothing);
        }
        let before = self.session_before(row.id, waiter.seq)?;
        self.remove_waiter(&mut row, &waiter)?;
        self.save(&mut row)?;
        if before.is_none() {
            self.reconcile(&mut row, false)?;
        }
        // The next waiter watched this one and needs a new predecessor, unless the waiter before belongs to the same
        // session.
        if before != Some(waiter.session) {
            self.vacated.push((row.id, waiter.seq));
        }
        Ok(EndOutcome::Dequeued)
    }

    /// Forgets a force-released token, because its caller releases it.
    fn forget_forced(&self, key: &Key, token: TokenId) -> Result<EndOutcome> {
        self.execute("DELETE FROM forced WHERE token = ?1 AND name = ?2", params![token.as_bytes(), key.as_encoded()])?;
        Ok(EndOutcome::Nothing)
    }

    fn extend(&mut self, key: &Key, token: TokenId, ttl: Duration) -> Result<ExtendOutcome> {
        let Some(mut row) = self.find_key(key)? else { return Ok(ExtendOutcome::NotHeld) };
        if row.is_due(self.now) {
            self.reconcile(&mut row, false)?;
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

    fn linger(&mut self, key: &Key, token: TokenId) -> Result<LingerOutcome> {
        let Some(mut row) = self.find_key(key)? else { return Ok(LingerOutcome::Gone) };
        self.reconcile(&mut row, true)?;
        let Some(hold) = self.find_hold(&row, token)? else { return Ok(LingerOutcome::Gone) };
        let is_exclusive = row.holders == 1 && row.in_use().is_none();
        let can_linger = is_exclusive && hold.session_bound && hold.deadline.is_none();
        if row.waiting > 0 || !can_linger || !session::has_socket(&self.state.folder, hold.session) {
            return Ok(LingerOutcome::Wanted);
        }
        if !hold.lingers {
            self.execute(
                "UPDATE holds SET session_bound = ?3 WHERE key_id = ?1 AND token = ?2",
                params![row.id, token.as_bytes(), LINGERS],
            )?;
        }
        // Fences follow the wall clock, unlike the times of the answers.
        row.fence = row.fence.max(self.wall);
        self.save(&mut row)?;
        let number = |fence: i64| Fence::new(fence.unsigned_abs());
        Ok(LingerOutcome::Lingers { fence: number(hold.fence), up_to: number(row.fence) })
    }

    fn adopt(&mut self, request: &AdoptRequest) -> Result<AdoptOutcome> {
        if !self.is_open(request.session)? {
            return Ok(AdoptOutcome::SessionGone);
        }
        let Some(mut row) = self.find_key(&request.key)? else { return Ok(AdoptOutcome::Gone) };
        self.reconcile(&mut row, true)?;
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
        let Some(mut hold) = self.find_hold(&row, request.from)? else { return Ok(AdoptOutcome::Gone) };
        if hold.lingers {
            // After the highest fence the store grants nothing more, so the adopter's fence need not be higher.
            row.fence = self.next_fence(&row).unwrap_or(row.fence);
            hold.fence = row.fence;
            self.save(&mut row)?;
        }
        self.execute(
            "UPDATE holds SET token = ?3, session = ?4, owner = NULL, fence = ?5, session_bound = ?6
             WHERE key_id = ?1 AND token = ?2",
            params![
                row.id,
                request.from.as_bytes(),
                request.to.as_bytes(),
                request.session.as_bytes(),
                hold.fence,
                hold.session_bound
            ],
        )?;
        // The head watches the process of the old holder, and must watch the new one instead.
        self.recheck_head(&row)?;
        Ok(adopted(hold, self.now))
    }

    fn force_release(&mut self, request: &ForceReleaseRequest) -> Result<ForceReleaseOutcome> {
        let Some(mut row) = self.find_key(&request.key)? else {
            return Ok(ForceReleaseOutcome::NoSuchHold { live: Vec::new() });
        };
        self.reconcile(&mut row, true)?;
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
        // The highest fence cannot be raised, and need not be: the store grants nothing after it.
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
        self.reconcile(&mut row, false)?;
        Ok(ForceReleaseOutcome::Released)
    }

    fn is_forced(&self, key: &Key, token: TokenId) -> Result<bool> {
        let sql = "SELECT 1 FROM forced WHERE token = ?1 AND name = ?2";
        Ok(self.first(sql, params![token.as_bytes(), key.as_encoded()], |_| Ok(()))?.is_some())
    }
}
