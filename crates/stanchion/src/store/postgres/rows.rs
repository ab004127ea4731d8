//! What a step is asked with, and what its rows tell.

use std::time::{Duration, SystemTime};

use tokio_postgres::Row;
use tokio_postgres::types::FromSql;

use super::error::malformed;
use crate::error::Result;
use crate::fence::Fence;
use crate::key::Key;
use crate::store::{Granted, HolderState, KeyState, Reply, StoreTime, WaiterState};

/// The parameters of a call, with their types.
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

/// A fence as the database has it. One that it cannot have is none that it has.
pub(super) fn whole_fence(fence: Fence) -> i64 {
    i64::try_from(fence.get()).unwrap_or(-1)
}

pub(super) fn span(micros: i64) -> Duration {
    Duration::from_micros(u64::try_from(micros).unwrap_or(0))
}

/// A column, which is as the schema says.
pub(super) fn column<'a, T: FromSql<'a>>(row: &'a Row, name: &str) -> Result<T> {
    row.try_get(name).map_err(|fault| malformed().with_source(fault))
}

pub(super) fn time(row: &Row) -> Result<StoreTime> {
    let micros: i64 = column(row, "at")?;
    Ok(StoreTime::from_micros(u64::try_from(micros).map_err(|_| malformed())?))
}

pub(super) fn fence(row: &Row) -> Result<Fence> {
    let fence: i64 = column(row, "fence")?;
    Ok(Fence::new(u64::try_from(fence).map_err(|_| malformed())?))
}

pub(super) fn granted(row: &Row) -> Result<Granted> {
    Ok(Granted { fence: fence(row)?, remaining: column::<Option<i64>>(row, "remaining")?.map(span) })
}

pub(super) fn number(row: &Row) -> Result<u32> {
    let number: Option<i64> = column(row, "number")?;
    u32::try_from(number.unwrap_or_default()).map_err(|_| malformed())
}

/// The keys that rows tell of, in order.
pub(super) fn states(rows: &[Row]) -> Result<Reply<Vec<KeyState>>> {
    let mut states: Vec<KeyState> = Vec::new();
    let mut answered = None;
    for row in rows {
        let now: i64 = column(row, "now_is")?;
        let kind: &str = column(row, "kind")?;
        if kind == "time" {
            answered = Some(StoreTime::from_micros(u64::try_from(now).map_err(|_| malformed())?));
            continue;
        }
        let remaining: Option<Duration> = column::<Option<i64>>(row, "remaining")?.map(span);
        if kind == "key" {
            let last_fence = column::<Option<i64>>(row, "fence")?.map(|_| fence(row)).transpose()?;
            states.push(KeyState {
                key: Key::from_encoded(column(row, "of_key")?)?,
                capacity: None,
                holders: Vec::new(),
                waiters: Vec::new(),
                last_fence,
                closed_for: remaining,
            });
            continue;
        }
        let state = states.last_mut().ok_or_else(malformed)?;
        let whole = |name| column::<i32>(row, name).and_then(|number| u32::try_from(number).map_err(|_| malformed()));
        state.capacity.get_or_insert(whole("capacity")?);
        let since: i64 = column(row, "since")?;
        let (owner, units, age) = (column(row, "owner")?, whole("units")?, span(now - since));
        let (metadata, trace) = (column(row, "metadata")?, column(row, "trace")?);
        if kind == "hold" {
            state.holders.push(HolderState {
                fence: fence(row)?,
                owner,
                units,
                session_bound: column(row, "bound")?,
                age,
                since: SystemTime::UNIX_EPOCH + span(since),
                remaining,
                metadata,
                trace,
            });
        } else {
            state.waiters.push(WaiterState { owner, units, age, metadata, trace });
        }
    }
    Ok(Reply { time: answered.ok_or_else(malformed)?, outcome: states })
}
