//! Reconciles a key before a request evaluates it: removes expired holds and everything of expired sessions, then
//! grants the waiters that fit.
//!
//! # Invariants
//! 1. After each writing request the store has granted every head that fits. If a queue has room at its front, then
//!    since that request time has passed or a process has exited, and only then a reading request must reconcile.
//! 2. At each commit, the sums in the row of a key match its holds and waiters.
//! 3. The request that finds an expired session reaps all of it.

use super::rows::{KeyRow, NewHold, WaiterRow};
use super::tx::{Tx, session_of};
use crate::error::Result;
use crate::fence::Fence;
use crate::store::Push;
use crate::token::SessionId;

/// Maximum number of holds of a key whose sessions are read from the holds. With more holds, the query looks for the
/// holds of each session instead.
const MAX_HOLDS_READ: i64 = 64;

impl Tx<'_> {
    /// Removes expired holds and waiters, and grants the waiters that fit. With `thorough`, probes the holders even if
    /// the key has no waiters.
    pub(super) fn reconcile(&mut self, row: &mut KeyRow, thorough: bool) -> Result<()> {
        if row.id == 0 {
            return Ok(());
        }
        let mut changed = false;
        if row.is_due(self.now) {
            self.remove_expired_holds(row)?;
            changed = true;
        }
        changed |= self.refresh_capacity(row)?;
        if row.closed_until.is_some() && !row.is_closed(self.now) {
            (row.closed_until, row.closed_until_wall) = (None, None);
            changed = true;
        }
        let (mut probe, mut probed, mut granted) = (thorough, false, false);
        loop {
            if probe && !probed {
                probed = true;
                self.probe_holders(row)?;
                self.reap_expired(row)?;
            }
            if row.waiting == 0 {
                break;
            }
            let Some(head) = self.head(row)? else {
                // The sum contradicts the rows. The rows are right.
                row.waiting = 0;
                changed = true;
                break;
            };
            if !self.is_alive(head.session)? {
                self.reap_expired(row)?;
                continue;
            }
            // Waiters of expired sessions were removed first, because they must go during a cooldown too.
            if row.is_closed(self.now) || self.next_fence(row).is_none() {
                break;
            }
            if !row.has_room(head.demand) {
                if probed {
                    break;
                }
                probe = true;
                continue;
            }
            self.grant_waiter(row, &head)?;
            (changed, granted) = (true, true);
        }
        if changed {
            self.save(row)?;
        }
        // The new head already watches the granted process, but it must poll to learn of other holders and of
        // deadlines.
        if granted && (row.holders > 1 || row.next_deadline().is_some()) {
            self.recheck_head(row)?;
        }
        Ok(())
    }

    /// Reconciles every key that a request left unreconciled, and reaps every session that was found expired.
    pub(super) fn reconcile_rest(&mut self) -> Result<()> {
        loop {
            if let Some(session) = self.expired.pop() {
                self.reap(session)?;
            } else if let Some(id) = self.unreconciled.pop() {
                if let Some(mut row) = self.find_key_by_id(id)? {
                    self.reconcile(&mut row, true)?;
                }
            } else {
                break;
            }
        }
        // A waiter that was behind a removed one has a new predecessor to watch.
        let mut notified = Vec::new();
        for (key_id, seq) in std::mem::take(&mut self.vacated) {
            if let Some(next) = self.waiter_after(key_id, seq)?
                && !notified.contains(&next.token)
            {
                notified.push(next.token);
                self.push(next.session, Push::Recheck { token: next.token });
            }
        }
        Ok(())
    }

    /// Notifies the head of the queue that it should poll, for changes that cause no other push.
    pub(super) fn recheck_head(&mut self, row: &KeyRow) -> Result<()> {
        if row.waiting > 0
            && let Some(head) = self.head(row)?
        {
            self.push(head.session, Push::Recheck { token: head.token });
        }
        Ok(())
    }

    /// Returns the sessions of the session-bound holds of a key.
    pub(super) fn holding_sessions(&self, row: &KeyRow) -> Result<Vec<SessionId>> {
        let sql = if row.holders <= MAX_HOLDS_READ {
            "SELECT DISTINCT session FROM holds WHERE key_id = ?1 AND session_bound"
        } else {
            "SELECT id FROM sessions WHERE EXISTS (SELECT 1 FROM holds INDEXED BY holds_by_session
                 WHERE session = sessions.id AND key_id = ?1 AND session_bound)"
        };
        self.all(sql, [row.id], |found| session_of(found, 0))
    }

    /// Records the expired sessions among the holders, and returns whether there are any.
    pub(super) fn probe_holders(&mut self, row: &KeyRow) -> Result<bool> {
        let mut any_expired = false;
        if row.holders > 0 {
            for session in self.holding_sessions(row)? {
                any_expired |= !self.is_alive(session)?;
            }
        }
        Ok(any_expired)
    }

    /// Removes the holds of a key whose deadline has passed.
    fn remove_expired_holds(&mut self, row: &mut KeyRow) -> Result<()> {
        let sql = "DELETE FROM holds WHERE key_id = ?1 AND deadline <= ?2 RETURNING units";
        for units in self.all(sql, [row.id, self.now], |found| found.get::<_, i64>(0))? {
            row.used -= units;
            row.holders -= 1;
        }
        // The stored deadline was only a lower bound. Make it exact.
        let next = self.first("SELECT min(deadline) FROM holds WHERE key_id = ?1", [row.id], |found| found.get(0))?;
        row.set_deadline(next.flatten());
        Ok(())
    }

    /// Moves a waiter from the queue to a hold, and notifies its session.
    fn grant_waiter(&mut self, row: &mut KeyRow, waiter: &WaiterRow) -> Result<()> {
        let texts = self.first("SELECT metadata, trace FROM waiters WHERE seq = ?1", [waiter.seq], |found| {
            Ok((found.get::<_, Option<String>>(0)?, found.get::<_, Option<String>>(1)?))
        })?;
        let (metadata, trace) = texts.unwrap_or_default();
        self.remove_waiter(row, waiter)?;
        let hold = NewHold {
            token: waiter.token,
            session: waiter.session,
            demand: waiter.demand,
            lifetime: waiter.lifetime,
            metadata: metadata.as_deref(),
            trace: trace.as_deref(),
        };
        let hold = self.grant(row, &hold)?;
        let fence = Fence::new(hold.fence.unsigned_abs());
        self.push(waiter.session, Push::Granted { key: row.key.clone(), token: waiter.token, fence });
        Ok(())
    }
}
