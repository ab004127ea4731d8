//! Encodes the parameters of calls, and decodes the rows of answers.

use std::time::{Duration, SystemTime};

use tokio_postgres::Row;
use tokio_postgres::types::FromSql;

use super::error::malformed;
use crate::error::Result;
use crate::fence::Fence;
use crate::key::Key;
use crate::store::{Cursor, DamagedEntry, Granted, HolderState, KeyState, Listing, Reply, StoreTime, WaiterState};

/// Builds the parameters of a call, with their types.
macro_rules! parameters {
    ($($value:expr => $type:ident),* $(,)?) => {
        &[$((&$value as &(dyn tokio_postgres::types::ToSql + Sync), tokio_postgres::types::Type::$type)),*]
    };
}

pub(super) use parameters;

pub(super) fn micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(i64::MAX)
}

pub(super) fn not_after(time: StoreTime) -> i64 {
    i64::try_from(time.as_micros()).unwrap_or(i64::MAX)
}

/// Encodes a fence for the database. A fence beyond the range of the database becomes -1, which no hold has.
pub(super) fn whole_fence(fence: Fence) -> i64 {
    i64::try_from(fence.get()).unwrap_or(-1)
}

pub(super) fn span(micros: i64) -> Duration {
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}

/// Decodes a column. An error means that the schema is not the expected one.
pub(super) fn column<'a, T: FromSql<'a>>(row: &'a Row, name: &str) -> Result<T> {
    row.try_get(name).map_err(|fault| malformed().with_source(fault))
}

pub(super) fn time(row: &Row) -> Result<StoreTime> {
    let micros: i64 = column(row, "at")?;
    Ok(StoreTime::from_micros(u64::try_from(micros).map_err(|_| malformed())?))
}

pub(super) fn fence(row: &Row, name: &str) -> Result<Fence> {
    let fence: i64 = column(row, name)?;
    Ok(Fence::new(u64::try_from(fence).map_err(|_| malformed())?))
}

pub(super) fn granted(row: &Row) -> Result<Granted> {
    Ok(Granted { fence: fence(row, "fence")?, remaining: column::<Option<i64>>(row, "remaining")?.map(span) })
}

pub(super) fn number(row: &Row) -> Result<u32> {
    let number: Option<i64> = column(row, "number")?;
    u32::try_from(number.unwrap_or_default()).map_err(|_| malformed())
}

pub(super) fn in_use(row: &Row) -> Result<Option<u32>> {
    let capacity: Option<i32> = column(row, "in_use")?;
    capacity.map(|capacity| u32::try_from(capacity).map_err(|_| malformed())).transpose()
}

/// The reason why the rows of a key cannot be decoded.
type Problem = String;

/// Decodes the rows of `inspect` and `list_page`: the keys, in order.
pub(super) fn listing(rows: &[Row]) -> Result<Reply<Listing>> {
    let (first, rows) = rows.split_first().ok_or_else(malformed)?;
    let now: i64 = column(first, "now_is")?;
    let time = StoreTime::from_micros(u64::try_from(now).map_err(|_| malformed())?);
    let mut listing =
        Listing { next: column::<Option<String>>(first, "of_key")?.map(Cursor::new), ..Listing::default() };
    for rows in rows.chunk_by(is_of_key) {
        match state(rows) {
            Ok(state) => listing.keys.push(state),
            Err(problem) => {
                let name = rows.first().and_then(|row| row.try_get(OF_KEY).ok()).unwrap_or("?");
                listing.damaged.push(DamagedEntry::new(name, problem));
            }
        }
    }
    Ok(Reply { time, outcome: listing })
}

// The places of the columns of `inspect` and `list_page`. A listing reads many rows, and looking names up takes time.
const NOW_IS: usize = 0;
const KIND: usize = 1;
const OF_KEY: usize = 2;
const FENCE: usize = 3;
const OWNER: usize = 4;
const UNITS: usize = 5;
const CAPACITY: usize = 6;
const BOUND: usize = 7;
const SINCE: usize = 8;
const REMAINING: usize = 9;
const METADATA: usize = 10;
const TRACE: usize = 11;
const LINGERS: usize = 12;

fn is_of_key(one: &Row, next: &Row) -> bool {
    let of_key = |row: &Row| row.try_get::<_, &str>(OF_KEY).ok().map(str::to_owned);
    of_key(one) == of_key(next)
}

/// Decodes the rows of one key.
fn state(rows: &[Row]) -> Result<KeyState, Problem> {
    let (first, others) = rows.split_first().ok_or("its row is missing")?;
    let kind: &str = cell(first, KIND, "kind")?;
    if !matches!(kind, "key" | "held") {
        return Err("its row is missing".into());
    }
    let key = Key::from_encoded(cell(first, OF_KEY, "key")?).map_err(|problem| problem.message().to_owned())?;
    let mut state = KeyState {
        key,
        holders: Vec::new(),
        waiters: Vec::new(),
        last_fence: fence_of(first)?,
        closed_for: cell::<Option<i64>>(first, REMAINING, "closed_until")?.map(span),
    };
    if kind == "held" {
        state.holders.push(holder(first, None)?);
    }
    for row in others {
        if cell::<&str>(row, KIND, "kind")? == "hold" {
            let remaining = cell::<Option<i64>>(row, REMAINING, "deadline")?.map(span);
            state.holders.push(holder(row, remaining)?);
        } else {
            state.waiters.push(WaiterState {
                owner: cell(row, OWNER, "owner")?,
                units: whole(row, UNITS, "units")?,
                capacity: whole(row, CAPACITY, "capacity")?,
                age: age(row)?,
                metadata: cell(row, METADATA, "metadata")?,
                trace: cell(row, TRACE, "trace")?,
            });
        }
    }
    Ok(state)
}

fn holder(row: &Row, remaining: Option<Duration>) -> Result<HolderState, Problem> {
    Ok(HolderState {
        fence: fence_of(row)?.ok_or("a hold has no fence")?,
        owner: cell(row, OWNER, "owner")?,
        units: whole(row, UNITS, "units")?,
        capacity: whole(row, CAPACITY, "capacity")?,
        session_bound: cell(row, BOUND, "bound")?,
        age: age(row)?,
        since: SystemTime::UNIX_EPOCH + span(cell(row, SINCE, "at")?),
        remaining,
        metadata: cell(row, METADATA, "metadata")?,
        trace: cell(row, TRACE, "trace")?,
        lingers: cell(row, LINGERS, "lingers")?,
    })
}

fn cell<'a, T: FromSql<'a>>(row: &'a Row, place: usize, name: &str) -> Result<T, Problem> {
    row.try_get(place).map_err(|_| format!("`{name}` is missing"))
}

fn whole(row: &Row, place: usize, name: &str) -> Result<u32, Problem> {
    u32::try_from(cell::<i32>(row, place, name)?).map_err(|_| format!("`{name}` is negative"))
}

fn fence_of(row: &Row) -> Result<Option<Fence>, Problem> {
    let fence = cell::<Option<i64>>(row, FENCE, "fence")?.map(u64::try_from).transpose();
    fence.map(|fence| fence.map(Fence::new)).map_err(|_| "the fence is negative".into())
}

fn age(row: &Row) -> Result<Duration, Problem> {
    let (now, since): (i64, i64) = (cell(row, NOW_IS, "now_is")?, cell(row, SINCE, "at")?);
    Ok(span(now.saturating_sub(since)))
}
