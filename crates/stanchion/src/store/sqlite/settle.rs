//! Settling: what time and death have changed is carried out before a step looks at a key.
//!
//! # Invariants
//! 1. After each write step the heads that fit are granted. So a queue with room at its front means that time has
//!    passed or a process has died since, and only then a reading step has anything to settle.
//! 2. The sums in a key's row are those of its holds and waiters at every commit.
//! 3. A session that was found dead is reaped as a whole, in the step that found it.

use rusqlite::params;

use super::rows::{KeyRow, NewHold, WaiterRow};
use super::tx::{Tx, session_of};
use crate::error::Result;
use crate::fence::Fence;
use crate::store::Push;
use crate::token::SessionId;

/// Up to so many holds are read to know their sessions; for more the sessions are asked for their holds.
const FEW_HOLDS: i64 = 64;
/// Keys that a sweep looks at, and how long a key has been idle when its row is dropped: an hour.
const SWEPT_KEYS: i64 = 128;
const IDLE: i64 = 3_600_000_000;
/// Sessions that are probed when one is opened, so that the dead do not gather.
const SWEPT_SESSIONS: i64 = 8;

impl Tx<'_> {
    /// Drops what is over and grants heads that fit. `thorough`: probes the holders also where nobody waits for them.
    pub(super) fn settle(&mut self, row: &mut KeyRow, thorough: bool) -> Result<()> {
        if row.id == 0 {
            return Ok(());
        }
        let mut changed = false;
        if row.is_due(self.now) {
            self.drop_expired(row)?;
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
                self.reap_found(row)?;
            }
            if row.waiting == 0 {
                break;
            }
            let Some(head) = self.head(row)? else {
                // The sums say otherwise than the rows: believe the rows.
                row.waiting = 0;
                changed = true;
                break;
            };
            if !self.is_alive(head.session)? {
                self.reap_found(row)?;
                continue;
            }
            // The dead go during a cooldown too.
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
        // The next in the queue watches the one that was granted. Other holders and deadlines it has to learn of.
        if granted && (row.holders > 1 || row.next_deadline().is_some()) {
            self.recheck_head(row)?;
        }
        Ok(())
    }

    /// Settles every key that a step has left unsettled, and reaps every session that was found dead.
    pub(super) fn settle_rest(&mut self) -> Result<()> {
        loop {
            if let Some(session) = self.dead.pop() {
                self.reap(session)?;
            } else if let Some(id) = self.unsettled.pop() {
                if let Some(mut row) = self.find_key_by_id(id)? {
                    self.settle(&mut row, true)?;
                }
            } else {
                break;
            }
        }
        // Who stood behind somebody that left the queue has another neighbour now.
        let mut told = Vec::new();
        for (key_id, seq) in std::mem::take(&mut self.left) {
            if let Some(next) = self.waiter_after(key_id, seq)?
                && !told.contains(&next.token)
            {
                told.push(next.token);
                self.push(next.session, Push::Recheck { token: next.token });
            }
        }
        Ok(())
    }

    /// The head of the queue has something to learn that nobody would tell it.
    pub(super) fn recheck_head(&mut self, row: &KeyRow) -> Result<()> {
        if row.waiting > 0
            && let Some(head) = self.head(row)?
        {
            self.push(head.session, Push::Recheck { token: head.token });
        }
        Ok(())
    }

    /// Sessions whose death would free something of this key.
    pub(super) fn holding_sessions(&self, row: &KeyRow) -> Result<Vec<SessionId>> {
        let sql = if row.holders <= FEW_HOLDS {
            "SELECT DISTINCT session FROM holds WHERE key_id = ?1 AND session_bound"
        } else {
            "SELECT id FROM sessions WHERE EXISTS (SELECT 1 FROM holds INDEXED BY holds_by_session
                 WHERE session = sessions.id AND key_id = ?1 AND session_bound)"
        };
        self.all(sql, [row.id], |found| session_of(found, 0))
    }

    /// Notes the holders that are dead; tells whether there are any.
    pub(super) fn probe_holders(&mut self, row: &KeyRow) -> Result<bool> {
        let mut any_dead = false;
        if row.holders > 0 {
            for session in self.holding_sessions(row)? {
                any_dead |= !self.is_alive(session)?;
            }
        }
        Ok(any_dead)
    }

    /// Reaps the sessions that were found dead while `row` was in hand.
    pub(super) fn reap_found(&mut self, row: &mut KeyRow) -> Result<()> {
        if self.dead.is_empty() {
            return Ok(());
        }
        self.save(row)?;
        while let Some(session) = self.dead.pop() {
            self.reap(session)?;
        }
        if let Some(fresh) = self.find_key_by_id(row.id)? {
            *row = fresh;
        }
        if self.refresh_capacity(row)? {
            self.save(row)?;
        }
        Ok(())
    }

    /// Ends a session with its session holds, its queue entries and what it has lost. The keys are left unsettled.
    pub(super) fn reap(&mut self, session: SessionId) -> Result<()> {
        let id = session.as_bytes();
        self.probed.insert(session, false);
        self.dead.retain(|dead| *dead != session);
        let waited_for = "SELECT DISTINCT holds.key_id FROM holds JOIN keys ON keys.id = holds.key_id
             WHERE holds.session = ?1 AND holds.session_bound AND keys.waiting > 0";
        self.unsettled.extend(self.all(waited_for, [id], |row| row.get::<_, i64>(0))?);
        self.execute(
            "UPDATE keys SET used = used - ended.units, holders = holders - ended.holds
             FROM (SELECT key_id, sum(units) AS units, count(*) AS holds FROM holds
                   WHERE session = ?1 AND session_bound GROUP BY key_id) AS ended WHERE keys.id = ended.key_id",
            [id],
        )?;
        self.execute("DELETE FROM holds WHERE session = ?1 AND session_bound", [id])?;
        // A fixed lifetime outlives its session: it keeps the name of its owner.
        self.execute(
            "UPDATE holds SET owner = ifnull(owner, (SELECT owner FROM sessions WHERE id = ?1)) WHERE session = ?1",
            [id],
        )?;
        let left =
            self.all("SELECT key_id, seq FROM waiters WHERE session = ?1", [id], |row| Ok((row.get(0)?, row.get(1)?)))?;
        if !left.is_empty() {
            self.execute(
                "UPDATE keys SET waiting = waiting - ended.waiters
                 FROM (SELECT key_id, count(*) AS waiters FROM waiters WHERE session = ?1 GROUP BY key_id) AS ended
                 WHERE keys.id = ended.key_id",
                [id],
            )?;
            self.execute("DELETE FROM waiters WHERE session = ?1", [id])?;
            let mut keys: Vec<i64> = left.iter().map(|(key_id, _)| *key_id).collect();
            keys.dedup();
            self.unsettled.append(&mut keys);
            self.left.extend(left);
        }
        self.execute("DELETE FROM forced WHERE session = ?1", [id])?;
        self.execute("DELETE FROM sessions WHERE id = ?1", [id])?;
        self.unsettled.sort_unstable();
        self.unsettled.dedup();
        self.effects.ended.push(session);
        Ok(())
    }

    /// Notes the dead sessions of a process that has been seen to end.
    pub(super) fn probe_process(&mut self, pid: i32) -> Result<()> {
        for session in self.all("SELECT id FROM sessions WHERE pid = ?1", [pid], |row| session_of(row, 0))? {
            self.is_alive(session)?;
        }
        Ok(())
    }

    /// Probes a few sessions from a random point on: whoever dies without leaving a waiter is met here some day.
    pub(super) fn sweep_sessions(&mut self, from: SessionId) -> Result<()> {
        let sql = "SELECT id FROM sessions WHERE id > ?1 ORDER BY id LIMIT ?2";
        for session in self.all(sql, params![from.as_bytes(), SWEPT_SESSIONS], |row| session_of(row, 0))? {
            self.is_alive(session)?;
        }
        Ok(())
    }

    /// Looks at the next few keys and drops the rows of the idle. Their fences are below the floor from then on.
    pub(super) fn sweep_keys(&mut self) -> Result<()> {
        let from = self.first("SELECT sweep_after FROM meta", [], |row| row.get::<_, i64>(0))?.unwrap_or(0);
        let ids =
            self.all("SELECT id FROM keys WHERE id > ?1 ORDER BY id LIMIT ?2", [from, SWEPT_KEYS], |row| row.get(0))?;
        let mut floor = 0;
        for id in &ids {
            let Some(mut row) = self.find_key_by_id(*id)? else { continue };
            if row.touched + IDLE > self.now {
                continue;
            }
            self.settle(&mut row, true)?;
            if row.holders == 0 && row.waiting == 0 && row.closed_until.is_none() {
                floor = floor.max(row.fence);
                self.execute("DELETE FROM keys WHERE id = ?1", [id])?;
            }
        }
        let next =
            if ids.len() < usize::try_from(SWEPT_KEYS).unwrap_or(0) { 0 } else { ids.last().copied().unwrap_or(0) };
        if floor > 0 || next != from {
            self.execute("UPDATE meta SET fence_floor = max(fence_floor, ?1), sweep_after = ?2", [floor, next])?;
        }
        self.settle_rest()
    }

    fn drop_expired(&mut self, row: &mut KeyRow) -> Result<()> {
        let sql = "DELETE FROM holds WHERE key_id = ?1 AND deadline <= ?2 RETURNING units";
        for units in self.all(sql, [row.id, self.now], |found| found.get::<_, i64>(0))? {
            row.used -= units;
            row.holders -= 1;
        }
        // A lower bound has passed, or a deadline: now it is exact.
        let next = self.first("SELECT min(deadline) FROM holds WHERE key_id = ?1", [row.id], |found| found.get(0))?;
        row.set_deadline(next.flatten());
        Ok(())
    }

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
