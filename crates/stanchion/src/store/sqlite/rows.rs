//! Reads and writes the rows of keys, holds and waiters.

use rusqlite::{Row, params};

use super::tx::{Tx, session_of, token_of};
use crate::error::Result;
use crate::fence::Fence;
use crate::key::Key;
use crate::store::{Demand, Granted, Lifetime};
use crate::token::{SessionId, TokenId};

/// The row of a key, with sums over its holds and waiters.
#[derive(Clone, Debug)]
pub(super) struct KeyRow {
    /// 0 until the row is inserted.
    pub(super) id: i64,
    pub(super) key: Key,
    pub(super) fence: i64,
    pub(super) used: i64,
    pub(super) holders: i64,
    pub(super) waiting: i64,
    capacity: i64,
    next_deadline: Option<i64>,
    pub(super) closed_until: Option<i64>,
    pub(super) closed_until_wall: Option<i64>,
    pub(super) touched: i64,
}

impl KeyRow {
    /// Returns the smallest capacity of the holds, if they share the key. It is exact after the key was reconciled.
    pub(super) fn in_use(&self) -> Option<u32> {
        let is_exclusive = self.holders == 1 && self.used == self.capacity;
        (self.holders > 0 && !is_exclusive).then(|| u32::try_from(self.capacity).unwrap_or(u32::MAX))
    }

    /// Returns a time that is not later than the earliest deadline of a hold.
    pub(super) fn next_deadline(&self) -> Option<i64> {
        self.next_deadline.filter(|_| self.holders > 0)
    }

    /// Returns whether the deadline of a hold may have passed.
    pub(super) fn is_due(&self, now: i64) -> bool {
        self.next_deadline().is_some_and(|deadline| deadline <= now)
    }

    /// Returns whether a cooldown keeps the key closed.
    pub(super) fn is_closed(&self, now: i64) -> bool {
        self.closed_until.is_some_and(|end| end > now)
    }

    /// Returns whether a request fits next to the holds.
    pub(super) fn has_room(&self, demand: StoredDemand) -> bool {
        self.holders == 0 || self.used + demand.units <= self.capacity.min(demand.capacity)
    }

    /// Lowers the earliest deadline to the deadline of a hold, if that is earlier.
    pub(super) fn note_deadline(&mut self, deadline: i64) {
        self.next_deadline = Some(self.next_deadline().map_or(deadline, |next| next.min(deadline)));
    }

    /// Sets the earliest deadline of all holds.
    pub(super) fn set_deadline(&mut self, deadline: Option<i64>) {
        self.next_deadline = deadline;
    }
}

/// The value of a hold's column `session_bound` that marks the hold as lingering, and session-bound too.
///
/// A program from before this value may share the folder. It reads every value but 0 as session-bound, so nothing breaks:
/// - When it waits behind such a hold, it sends no recall. The holder learns of it from its next `linger`, whose answer is
///   `Wanted`. A recall that it receives is of an unknown kind, and it drops that.
/// - When it adopts such a hold, the fence stays the same, and a resource that has seen a higher one rejects the adopter.
///   The mark stays too, and has no effect, because that program never uses a hold again without a request.
pub(super) const LINGERS: i64 = 2;

/// The columns of a hold that most requests need.
#[derive(Clone, Copy, Debug)]
pub(super) struct HoldRow {
    pub(super) token: TokenId,
    pub(super) fence: i64,
    pub(super) units: i64,
    pub(super) session: SessionId,
    pub(super) session_bound: bool,
    pub(super) lingers: bool,
    pub(super) deadline: Option<i64>,
}

impl HoldRow {
    pub(super) fn granted(&self, now: i64) -> Granted {
        let remaining = self.deadline.map(|deadline| super::tx::until(now, deadline));
        Granted { fence: Fence::new(self.fence.unsigned_abs()), remaining }
    }
}

/// The columns of a waiter that most requests need.
#[derive(Clone, Debug)]
pub(super) struct WaiterRow {
    pub(super) seq: i64,
    pub(super) token: TokenId,
    pub(super) session: SessionId,
    pub(super) demand: StoredDemand,
    pub(super) lifetime: StoredLifetime,
}

/// A [`Demand`] in the types of the columns.
#[derive(Clone, Copy, Debug)]
pub(super) struct StoredDemand {
    pub(super) units: i64,
    pub(super) capacity: i64,
}

impl From<Demand> for StoredDemand {
    fn from(demand: Demand) -> Self {
        Self { units: demand.units().into(), capacity: demand.capacity().into() }
    }
}

/// A [`Lifetime`] in the types of the columns.
#[derive(Clone, Copy, Debug)]
pub(super) struct StoredLifetime {
    pub(super) session_bound: bool,
    pub(super) length: Option<i64>,
}

impl From<Lifetime> for StoredLifetime {
    fn from(lifetime: Lifetime) -> Self {
        Self {
            session_bound: matches!(lifetime, Lifetime::Session { .. }),
            length: lifetime.length().map(super::tx::micros),
        }
    }
}

/// A hold to insert.
#[derive(Debug)]
pub(super) struct NewHold<'a> {
    pub(super) token: TokenId,
    pub(super) session: SessionId,
    pub(super) demand: StoredDemand,
    pub(super) lifetime: StoredLifetime,
    pub(super) metadata: Option<&'a str>,
    pub(super) trace: Option<&'a str>,
}

/// The columns of a key, in the order of `read_key`.
pub(super) const KEY_COLUMNS: &str =
    "id, fence, used, holders, waiting, capacity, next_deadline, closed_until, closed_until_wall, touched";

// The order of the columns is that of `read_key`.
const KEY_BY_NAME: &str = "SELECT id, fence, used, holders, waiting, capacity, next_deadline, closed_until,
     closed_until_wall, touched FROM keys WHERE name = ?1";
const KEY_BY_ID: &str = "SELECT id, fence, used, holders, waiting, capacity, next_deadline, closed_until,
     closed_until_wall, touched, name FROM keys WHERE id = ?1";

impl Tx<'_> {
    /// Returns the row of a key, or `None` if the key has no row.
    pub(super) fn find_key(&self, key: &Key) -> Result<Option<KeyRow>> {
        self.first(KEY_BY_NAME, [key.as_encoded()], |row| read_key(row, key.clone()))
    }

    /// Returns the row of a key, or a new row that is not inserted yet. The fences of a new row continue from the
    /// floor.
    pub(super) fn key_or_new(&self, key: &Key) -> Result<KeyRow> {
        if let Some(row) = self.find_key(key)? {
            return Ok(row);
        }
        let floor = self.first("SELECT fence_floor FROM meta", [], |row| row.get(0))?;
        Ok(KeyRow {
            id: 0,
            key: key.clone(),
            fence: floor.unwrap_or(0),
            used: 0,
            holders: 0,
            waiting: 0,
            capacity: 0,
            next_deadline: None,
            closed_until: None,
            closed_until_wall: None,
            touched: self.now,
        })
    }

    /// Returns the row with this id.
    pub(super) fn find_key_by_id(&self, id: i64) -> Result<Option<KeyRow>> {
        let name = |row: &Row<'_>| row.get::<_, String>(10);
        let Some(name) = self.first(KEY_BY_ID, [id], name)? else { return Ok(None) };
        let key = Key::from_encoded(&name)?;
        self.first(KEY_BY_ID, [id], |row| read_key(row, key))
    }

    /// Inserts or updates the row of a key.
    pub(super) fn save(&self, row: &mut KeyRow) -> Result<()> {
        if row.id == 0 {
            self.execute(
                "INSERT INTO keys (name, fence, used, holders, waiting, capacity, next_deadline, closed_until,
                     closed_until_wall, touched) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
                params![
                    row.key.as_encoded(),
                    row.fence,
                    row.used,
                    row.holders,
                    row.waiting,
                    row.capacity,
                    row.next_deadline,
                    row.closed_until,
                    row.closed_until_wall,
                    row.touched
                ],
            )?;
            row.id = self.db.last_insert_rowid();
        } else {
            self.execute(
                "UPDATE keys SET fence = ?2, used = ?3, holders = ?4, waiting = ?5, capacity = ?6, next_deadline = ?7,
                     closed_until = ?8, closed_until_wall = ?9, touched = ?10 WHERE id = ?1",
                params![
                    row.id,
                    row.fence,
                    row.used,
                    row.holders,
                    row.waiting,
                    row.capacity,
                    row.next_deadline,
                    row.closed_until,
                    row.closed_until_wall,
                    row.touched
                ],
            )?;
        }
        Ok(())
    }

    /// Returns the fence of the next grant, or `None` after the highest number of the column.
    pub(super) fn next_fence(&self, row: &KeyRow) -> Option<i64> {
        let next = Fence::next(Some(Fence::new(row.fence.unsigned_abs())), self.wall.unsigned_abs())?;
        i64::try_from(next.get()).ok()
    }

    /// Mints a fence and inserts a hold. The caller saves the key's row.
    pub(super) fn grant(&self, row: &mut KeyRow, hold: &NewHold<'_>) -> Result<HoldRow> {
        row.fence = self.next_fence(row).ok_or_else(Fence::used_up)?;
        let StoredDemand { units, capacity } = hold.demand;
        row.capacity = if row.holders == 0 { capacity } else { row.capacity.min(capacity) };
        row.used += units;
        row.holders += 1;
        row.touched = self.now;
        let deadline = hold.lifetime.length.map(|length| self.now.saturating_add(length));
        match deadline {
            // For the first hold, replace the deadline that earlier holds left in the row.
            _ if row.holders == 1 => row.next_deadline = deadline,
            Some(deadline) => row.note_deadline(deadline),
            None => {}
        }
        if row.id == 0 {
            self.save(row)?;
        }
        self.execute(
            "INSERT INTO holds (key_id, token, fence, units, capacity, session, session_bound, deadline, granted,
                 granted_wall, metadata, trace) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
            params![
                row.id,
                hold.token.as_bytes(),
                row.fence,
                units,
                capacity,
                hold.session.as_bytes(),
                hold.lifetime.session_bound,
                deadline,
                self.now,
                self.wall,
                hold.metadata,
                hold.trace
            ],
        )?;
        Ok(HoldRow {
            token: hold.token,
            fence: row.fence,
            units,
            session: hold.session,
            session_bound: hold.lifetime.session_bound,
            lingers: false,
            deadline,
        })
    }

    /// Makes the capacity in the row exact, because after a hold was removed it is only a lower bound. Returns whether
    /// the capacity changed; the caller then saves the row.
    pub(super) fn refresh_capacity(&self, row: &mut KeyRow) -> Result<bool> {
        // A hold with capacity 1 is the only hold, so the capacity is exact.
        if row.holders == 0 || row.capacity == 1 {
            return Ok(false);
        }
        let sql = "SELECT capacity FROM holds INDEXED BY shared_by_capacity
             WHERE key_id = ?1 AND units < capacity ORDER BY capacity LIMIT 1";
        // Without a result the only hold is exclusive, and the row has its capacity.
        let smallest = self.first(sql, [row.id], |found| found.get(0))?.unwrap_or(row.capacity);
        Ok(std::mem::replace(&mut row.capacity, smallest) != smallest)
    }

    /// Returns the hold of a token.
    pub(super) fn find_hold(&self, row: &KeyRow, token: TokenId) -> Result<Option<HoldRow>> {
        if row.holders == 0 {
            return Ok(None);
        }
        self.first(
            "SELECT token, fence, units, session, session_bound, deadline FROM holds WHERE key_id = ?1 AND token = ?2",
            params![row.id, token.as_bytes()],
            read_hold,
        )
    }

    /// Returns the hold of a key if it lingers.
    pub(super) fn find_lingering_hold(&self, row: &KeyRow) -> Result<Option<HoldRow>> {
        // Such a hold is exclusive.
        if row.holders != 1 || row.in_use().is_some() {
            return Ok(None);
        }
        self.first(
            "SELECT token, fence, units, session, session_bound, deadline FROM holds
             WHERE key_id = ?1 AND session_bound = ?2",
            [row.id, LINGERS],
            read_hold,
        )
    }

    /// Deletes a hold. The caller saves the key's row.
    pub(super) fn remove_hold(&self, row: &mut KeyRow, hold: &HoldRow) -> Result<()> {
        self.execute("DELETE FROM holds WHERE key_id = ?1 AND token = ?2", params![row.id, hold.token.as_bytes()])?;
        row.used -= hold.units;
        row.holders -= 1;
        Ok(())
    }

    /// Returns the queue entry of a token.
    pub(super) fn find_waiter(&self, row: &KeyRow, token: TokenId) -> Result<Option<WaiterRow>> {
        if row.waiting == 0 {
            return Ok(None);
        }
        self.first(
            "SELECT seq, token, session, units, capacity, session_bound, term FROM waiters
             WHERE token = ?2 AND key_id = ?1",
            params![row.id, token.as_bytes()],
            read_waiter,
        )
    }

    /// Returns the first waiter of the queue.
    pub(super) fn head(&self, row: &KeyRow) -> Result<Option<WaiterRow>> {
        self.waiter_after(row.id, i64::MIN)
    }

    /// Returns the first waiter after this place in the queue.
    pub(super) fn waiter_after(&self, key_id: i64, seq: i64) -> Result<Option<WaiterRow>> {
        self.first(
            "SELECT seq, token, session, units, capacity, session_bound, term FROM waiters INDEXED BY waiters_by_key
             WHERE key_id = ?1 AND seq > ?2 ORDER BY seq LIMIT 1",
            [key_id, seq],
            read_waiter,
        )
    }

    /// Returns the session of the waiter directly before this place in the queue.
    pub(super) fn session_before(&self, key_id: i64, seq: i64) -> Result<Option<SessionId>> {
        self.first(
            "SELECT session FROM waiters INDEXED BY waiters_by_key
             WHERE key_id = ?1 AND seq < ?2 ORDER BY seq DESC LIMIT 1",
            [key_id, seq],
            |row| session_of(row, 0),
        )
    }

    /// Deletes a waiter from the queue. The caller saves the key's row.
    pub(super) fn remove_waiter(&mut self, row: &mut KeyRow, waiter: &WaiterRow) -> Result<()> {
        self.execute("DELETE FROM waiters WHERE seq = ?1", [waiter.seq])?;
        row.waiting -= 1;
        self.forget_waiter(waiter.token);
        Ok(())
    }
}

pub(super) fn read_key(row: &Row<'_>, key: Key) -> rusqlite::Result<KeyRow> {
    Ok(KeyRow {
        id: row.get(0)?,
        key,
        fence: row.get(1)?,
        used: row.get(2)?,
        holders: row.get(3)?,
        waiting: row.get(4)?,
        capacity: row.get(5)?,
        next_deadline: row.get(6)?,
        closed_until: row.get(7)?,
        closed_until_wall: row.get(8)?,
        touched: row.get(9)?,
    })
}

pub(super) fn read_hold(row: &Row<'_>) -> rusqlite::Result<HoldRow> {
    let session_bound: i64 = row.get(4)?;
    Ok(HoldRow {
        token: token_of(row, 0)?,
        fence: row.get(1)?,
        units: row.get(2)?,
        session: session_of(row, 3)?,
        session_bound: session_bound != 0,
        lingers: session_bound == LINGERS,
        deadline: row.get(5)?,
    })
}

fn read_waiter(row: &Row<'_>) -> rusqlite::Result<WaiterRow> {
    Ok(WaiterRow {
        seq: row.get(0)?,
        token: token_of(row, 1)?,
        session: session_of(row, 2)?,
        demand: StoredDemand { units: row.get(3)?, capacity: row.get(4)? },
        lifetime: StoredLifetime { session_bound: row.get(5)?, length: row.get(6)? },
    })
}
