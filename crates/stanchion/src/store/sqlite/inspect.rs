//! Inspects one key, and lists keys page by page.
//!
//! A listing reconciles nothing: it leaves out holds and waiters that have ended.

use std::borrow::Cow;
use std::time::{Duration, SystemTime};

use rusqlite::Row;

use super::error::{error, is_row_error};
use super::rows::{KEY_COLUMNS, KeyRow, LINGERS, read_key};
use super::tx::{Tx, session_of, until};
use crate::error::{Error, ErrorKind, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::store::{Cursor, DamagedEntry, HolderState, KeyState, Listing, MAX_ROWS_PER_PAGE, WaiterState};

/// Maximum number of rows that a page reads for each key of its limit, because the table may have many rows of idle
/// keys.
const ROWS_PER_KEY: usize = 10;

/// Returns the cursor after the row with this name. It is hexadecimal, because a name that another program wrote need
/// not be UTF-8.
fn write_cursor(name: &[u8]) -> Cursor {
    Cursor::new(name.iter().fold(String::with_capacity(2 * name.len()), |hex, byte| hex + &format!("{byte:02x}")))
}

fn read_cursor(cursor: &Cursor) -> Option<Vec<u8>> {
    let pairs = cursor.as_str().as_bytes().chunks(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

/// Returns the lowest name that the page may contain.
///
/// SQLite seeks to one lower bound only. With both the prefix and the cursor in the query, it would read all rows from
/// the prefix to the cursor for each page.
fn first_name(prefix: &str, cursor: Option<&Cursor>) -> Result<Vec<u8>> {
    let prefix = prefix.as_bytes().to_vec();
    let Some(cursor) = cursor else { return Ok(prefix) };
    let mut after =
        read_cursor(cursor).ok_or_else(|| error(ErrorKind::InvalidArgument, "the cursor belongs to another store"))?;
    // A NUL byte makes it the next name in byte order.
    after.push(0);
    Ok(after.max(prefix))
}

/// The reason why a key cannot be read.
#[derive(Debug)]
pub(super) enum Unreadable {
    /// The rows of the key are damaged, as the text describes.
    Entry(String),
    Database(rusqlite::Error),
    Store(Error),
}

impl From<rusqlite::Error> for Unreadable {
    fn from(cause: rusqlite::Error) -> Self {
        if is_row_error(&cause) { Self::Entry(cause.to_string()) } else { Self::Database(cause) }
    }
}

impl From<Error> for Unreadable {
    fn from(fault: Error) -> Self {
        Self::Store(fault)
    }
}

impl Unreadable {
    /// Converts the reason to the error of a request for this key.
    pub(super) fn into_error(self, tx: &Tx<'_>) -> Error {
        match self {
            Self::Entry(problem) => error(ErrorKind::Internal, format!("the row of the key cannot be read: {problem}")),
            Self::Database(cause) => tx.failed(cause),
            Self::Store(fault) => fault,
        }
    }
}

impl Tx<'_> {
    /// Lists a page of keys.
    pub(super) fn list(&mut self, prefix: &str, cursor: Option<&Cursor>, limit: usize) -> Result<Listing> {
        let mut listing = Listing::default();
        let (limit, mut looked, mut shown) = (limit.max(1), 0, 0);
        let first = first_name(prefix, cursor)?;
        let sql = format!("SELECT {KEY_COLUMNS}, name FROM keys WHERE name >= CAST(?1 AS TEXT) ORDER BY name");
        let mut statement = self.statement(&sql)?;
        let mut rows = statement.query([first]).map_err(|cause| self.failed(cause))?;
        while let Some(row) = rows.next().map_err(|cause| self.failed(cause))? {
            let bytes = row.get_ref(10).ok().and_then(|name| name.as_bytes().ok()).unwrap_or_default();
            let name = String::from_utf8_lossy(bytes);
            if !name.starts_with(prefix) {
                break;
            }
            looked += 1;
            let listed = match &name {
                Cow::Borrowed(name) => self.listed(row, name),
                Cow::Owned(_) => Err(Unreadable::Entry("the name is not UTF-8".into())),
            };
            match listed {
                Ok(Some(state)) => {
                    shown += state.holders.len() + state.waiters.len();
                    listing.keys.push(state);
                }
                Ok(None) => {}
                Err(Unreadable::Entry(problem)) => listing.damaged.push(DamagedEntry::new(&*name, problem)),
                Err(fault) => return Err(fault.into_error(self)),
            }
            let found = listing.keys.len() + listing.damaged.len();
            if found >= limit || looked >= limit.saturating_mul(ROWS_PER_KEY) || shown >= MAX_ROWS_PER_PAGE {
                listing.next = Some(write_cursor(bytes));
                break;
            }
        }
        Ok(listing)
    }

    /// Returns the state of the key in a row, or `None` if the key is idle.
    fn listed(&mut self, row: &Row<'_>, name: &str) -> std::result::Result<Option<KeyState>, Unreadable> {
        let key = Key::from_encoded(name).map_err(|problem| Unreadable::Entry(problem.message().to_owned()))?;
        let row = read_key(row, key)?;
        if row.holders == 0 && row.waiting == 0 && !row.is_closed(self.now) {
            return Ok(None);
        }
        let state = self.read_state(&row)?;
        let idle = state.holders.is_empty() && state.waiters.is_empty() && state.closed_for.is_none();
        Ok((!idle).then_some(state))
    }

    /// Inspects a key, or returns `None` if the key must be reconciled first.
    pub(super) fn inspect(&mut self, key: &Key) -> Result<Option<KeyState>> {
        let Some(row) = self.find_key(key)? else {
            return Ok(Some(KeyState {
                key: key.clone(),
                holders: Vec::new(),
                waiters: Vec::new(),
                last_fence: None,
                closed_for: None,
            }));
        };
        let mut all_open = !self.probe_holders(&row)?;
        if row.waiting > 0 {
            for session in self.waiting_sessions(&row)? {
                all_open &= self.is_alive(session)?;
            }
        }
        if !self.is_reconciled(&row) || !all_open {
            return Ok(None);
        }
        self.read_state(&row).map(Some).map_err(|problem| problem.into_error(self))
    }

    /// Reads the state of a key, without expired holds and without holds and waiters of expired sessions.
    fn read_state(&mut self, row: &KeyRow) -> std::result::Result<KeyState, Unreadable> {
        let now = self.now;
        let age = |since: i64| until(since, now);
        let (mut holders, mut waiters): (Vec<HolderState>, Vec<WaiterState>) = (Vec::new(), Vec::new());
        if row.holders > 0 {
            let mut statement = self.db.prepare_cached(
                "SELECT fence, ifnull(holds.owner, ifnull(sessions.owner, '')), units, session_bound, granted,
                     granted_wall, deadline, metadata, trace, holds.session, capacity
                 FROM holds LEFT JOIN sessions ON sessions.id = holds.session WHERE key_id = ?1 ORDER BY fence",
            )?;
            let mut found = statement.query([row.id])?;
            while let Some(hold) = found.next()? {
                let deadline = hold.get::<_, Option<i64>>(6)?;
                let session_bound: i64 = hold.get(3)?;
                let lingers = session_bound == LINGERS;
                let session_bound = session_bound != 0;
                let is_over = deadline.is_some_and(|deadline| deadline <= now);
                if is_over || session_bound && !self.is_alive(session_of(hold, 9)?)? {
                    continue;
                }
                holders.push(HolderState {
                    fence: Fence::new(hold.get::<_, i64>(0)?.unsigned_abs()),
                    owner: hold.get(1)?,
                    units: hold.get(2)?,
                    capacity: hold.get(10)?,
                    session_bound,
                    age: age(hold.get(4)?),
                    since: SystemTime::UNIX_EPOCH + Duration::from_micros(hold.get::<_, i64>(5)?.unsigned_abs()),
                    remaining: deadline.map(|deadline| until(now, deadline)),
                    metadata: hold.get(7)?,
                    trace: hold.get(8)?,
                    lingers,
                });
            }
        }
        if row.waiting > 0 {
            let mut statement = self.db.prepare_cached(
                "SELECT ifnull(sessions.owner, ''), units, entered, metadata, trace, waiters.session, capacity
                 FROM waiters INDEXED BY waiters_by_key LEFT JOIN sessions ON sessions.id = waiters.session
                 WHERE key_id = ?1 ORDER BY seq",
            )?;
            let mut found = statement.query([row.id])?;
            while let Some(waiter) = found.next()? {
                if !self.is_alive(session_of(waiter, 5)?)? {
                    continue;
                }
                waiters.push(WaiterState {
                    owner: waiter.get(0)?,
                    units: waiter.get(1)?,
                    capacity: waiter.get(6)?,
                    age: age(waiter.get(2)?),
                    metadata: waiter.get(3)?,
                    trace: waiter.get(4)?,
                });
            }
        }
        Ok(KeyState {
            holders,
            waiters,
            last_fence: Some(Fence::new(row.fence.unsigned_abs())),
            closed_for: row.closed_until.filter(|end| *end > now).map(|end| until(now, end)),
            key: row.key.clone(),
        })
    }
}
