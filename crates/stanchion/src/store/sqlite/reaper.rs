//! Reaps expired sessions, and deletes the rows of idle keys.

use rusqlite::params;

use super::rows::KeyRow;
use super::tx::{Tx, session_of};
use crate::error::Result;
use crate::token::SessionId;

/// Number of keys that a sweep checks.
const KEYS_PER_SWEEP: i64 = 128;
/// Time after which the row of an idle key is deleted, in microseconds (one hour).
const IDLE_MICROS: i64 = 3_600_000_000;
/// Number of sessions that are probed when a session is opened, so that expired sessions do not accumulate.
const PROBED_SESSIONS: i64 = 8;

impl Tx<'_> {
    /// Reaps the expired sessions among the waiters of a key.
    pub(super) fn reap_expired_waiters(&mut self, row: &mut KeyRow) -> Result<()> {
        for session in self.waiting_sessions(row)? {
            self.is_alive(session)?;
        }
        self.reap_expired(row)
    }

    /// Reaps the sessions that were found expired, and reads `row` again.
    pub(super) fn reap_expired(&mut self, row: &mut KeyRow) -> Result<()> {
        if self.expired.is_empty() {
            return Ok(());
        }
        self.save(row)?;
        while let Some(session) = self.expired.pop() {
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

    /// Reaps a session: deletes its session-bound holds, its queue entries and its force-released tokens. Its keys stay
    /// unreconciled.
    pub(super) fn reap(&mut self, session: SessionId) -> Result<()> {
        let id = session.as_bytes();
        self.probed.insert(session, false);
        self.expired.retain(|expired| *expired != session);
        let waited_for = "SELECT DISTINCT holds.key_id FROM holds JOIN keys ON keys.id = holds.key_id
             WHERE holds.session = ?1 AND holds.session_bound AND keys.waiting > 0";
        self.unreconciled.extend(self.all(waited_for, [id], |row| row.get::<_, i64>(0))?);
        self.execute(
            "UPDATE keys SET used = used - ended.units, holders = holders - ended.holds
             FROM (SELECT key_id, sum(units) AS units, count(*) AS holds FROM holds
                   WHERE session = ?1 AND session_bound GROUP BY key_id) AS ended WHERE keys.id = ended.key_id",
            [id],
        )?;
        self.execute("DELETE FROM holds WHERE session = ?1 AND session_bound", [id])?;
        // A hold with a fixed lifetime outlives its session, so it keeps the owner.
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
            self.unreconciled.append(&mut keys);
            self.vacated.extend(left);
        }
        self.execute("DELETE FROM forced WHERE session = ?1", [id])?;
        self.execute("DELETE FROM sessions WHERE id = ?1", [id])?;
        self.unreconciled.sort_unstable();
        self.unreconciled.dedup();
        self.effects.ended.push(session);
        Ok(())
    }

    /// Records the expired sessions of a process that has exited.
    pub(super) fn probe_process(&mut self, pid: i32) -> Result<()> {
        for session in self.all("SELECT id FROM sessions WHERE pid = ?1", [pid], |row| session_of(row, 0))? {
            self.is_alive(session)?;
        }
        Ok(())
    }

    /// Probes a few sessions after a random id, so that a session that expires while no waiter depends on it is reaped
    /// eventually.
    pub(super) fn sweep_sessions(&mut self, from: SessionId) -> Result<()> {
        let sql = "SELECT id FROM sessions WHERE id > ?1 ORDER BY id LIMIT ?2";
        for session in self.all(sql, params![from.as_bytes(), PROBED_SESSIONS], |row| session_of(row, 0))? {
            self.is_alive(session)?;
        }
        Ok(())
    }

    /// Checks the next few keys, deletes the rows of idle keys, and raises the floor to their highest fence.
    pub(super) fn sweep_keys(&mut self) -> Result<()> {
        let from = self.first("SELECT sweep_after FROM meta", [], |row| row.get::<_, i64>(0))?.unwrap_or(0);
        let ids =
            self.all("SELECT id FROM keys WHERE id > ?1 ORDER BY id LIMIT ?2", [from, KEYS_PER_SWEEP], |row| {
                row.get(0)
            })?;
        let mut floor = 0;
        for id in &ids {
            let Some(mut row) = self.find_key_by_id(*id)? else { continue };
            if row.touched + IDLE_MICROS > self.now {
                continue;
            }
            self.reconcile(&mut row, true)?;
            if row.holders == 0 && row.waiting == 0 && row.closed_until.is_none() {
                floor = floor.max(row.fence);
                self.execute("DELETE FROM keys WHERE id = ?1", [id])?;
            }
        }
        let next =
            if ids.len() < usize::try_from(KEYS_PER_SWEEP).unwrap_or(0) { 0 } else { ids.last().copied().unwrap_or(0) };
        if floor > 0 || next != from {
            self.execute("UPDATE meta SET fence_floor = max(fence_floor, ?1), sweep_after = ?2", [floor, next])?;
        }
        self.reconcile_rest()
    }
}
