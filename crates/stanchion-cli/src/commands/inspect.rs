//! `inspect`: all that is known of one key.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use serde::Serialize;
use stanchion::RunRecord;
use stanchion::store::{Demand, KeyState};

use crate::arguments::Inspect;
use crate::exit_code;
use crate::message::{Failure, Verbosity, quoted_key};
use crate::output::{KeyRecord, RunLine, escape, for_people, json_line, limit, print, wall_time};
use crate::store::StoreChoice;

pub(super) fn execute(inspect: &Inspect, store: &StoreChoice, verbosity: Verbosity) -> Result<u8, Failure> {
    super::check_key(&inspect.key)?;
    let key = inspect.key.as_str();
    if inspect.check {
        let state = store.ask(async |locks| locks.inspect(key).await)?;
        if is_free(&state) {
            return Ok(exit_code::OK);
        }
        let why = crate::report::describe(&state, Demand::MUTEX);
        verbosity.note(format_args!("key `{}` is not free: {why}", quoted_key(key)));
        return Ok(exit_code::NOT_OBTAINED);
    }
    let (state, last) = store.ask(async |locks| Ok((locks.inspect(key).await?, locks.last_run(key).await?)))?;
    let text = if inspect.json {
        json_line(&InspectRecord { key: KeyRecord::from(&state), last_run: last.as_ref().map(RunLine::from) })?
    } else {
        describe(&state, last.as_ref())
    };
    print(&text)?;
    Ok(exit_code::OK)
}

/// Returns whether an exclusive request would be granted.
fn is_free(state: &KeyState) -> bool {
    state.holders.is_empty() && state.waiters.is_empty() && state.closed_for.is_none()
}

/// The object that `--json` prints: the key as `ls` shows it, and its last run.
#[derive(Serialize)]
struct InspectRecord<'a> {
    #[serde(flatten)]
    key: KeyRecord<'a>,
    last_run: Option<RunLine<'a>>,
}

fn describe(state: &KeyState, last: Option<&RunRecord>) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = write_all(state, &mut out).and_then(|()| last.map_or(Ok(()), |last| write_run(last, &mut out)));
    out
}

fn write_run(last: &RunRecord, out: &mut String) -> std::fmt::Result {
    let word = if last.succeeded { "succeeded" } else { "failed" };
    let (age, took, began) = (for_people(last.age), for_people(last.took), wall_time(last.began));
    writeln!(out, "last run {word} {age} ago, after {took}; by {}", escape(&last.owner))?;
    let slot = last.slot.map(|slot| format!(", slot {slot}")).unwrap_or_default();
    writeln!(out, "           begun {began}, fence {}{slot}", last.fence.get())?;
    match last.closed_still_for() {
        Some(left) => writeln!(out, "           not again for another {}", for_people(left)),
        None => Ok(()),
    }
}

fn write_all(state: &KeyState, out: &mut String) -> std::fmt::Result {
    writeln!(out, "key      {}", escape(state.key.name()))?;
    let word = match (state.holders.is_empty(), state.closed_for) {
        (false, _) if state.holders.iter().any(|holder| holder.lingers) => {
            "held, and lingers: its process may not be using it".to_owned()
        }
        (false, _) => "held".to_owned(),
        (true, Some(left)) => format!("closed for another {}", for_people(left)),
        (true, None) => "free".to_owned(),
    };
    writeln!(out, "state    {word}")?;
    if let Some(capacity) = state.capacity().filter(|capacity| *capacity > 1) {
        let capacity = if capacity == Demand::MAX { "shared".to_owned() } else { capacity.to_string() };
        writeln!(out, "capacity {capacity}")?;
    }
    // An exclusive request takes the whole key, whatever its limit.
    let holders = state.holders.iter().map(|holder| (holder.units, holder.capacity));
    let all = holders.chain(state.waiters.iter().map(|waiter| (waiter.units, waiter.capacity)));
    let limits: BTreeSet<_> = all.filter(|(units, capacity)| units < capacity).map(|(_, capacity)| capacity).collect();
    if limits.len() > 1 {
        let limits: Vec<_> = limits.into_iter().map(limit).collect();
        writeln!(out, "limits   differ: {}", limits.join(", "))?;
        writeln!(out, "           the smaller one holds until the holders of the other are gone")?;
    }
    if let Some(fence) = state.last_fence {
        writeln!(out, "fence    {} (the newest)", fence.get())?;
    }
    for holder in &state.holders {
        let (since, age) = (wall_time(holder.since), for_people(holder.age));
        writeln!(out, "holder   {}", escape(&holder.owner))?;
        writeln!(out, "           fence {}, since {since} ({age})", holder.fence.get())?;
        if let Some(left) = holder.remaining {
            writeln!(out, "           for another {} at most", for_people(left))?;
        }
        texts(out, holder.metadata.as_deref(), holder.trace.as_deref())?;
    }
    for (place, waiter) in state.waiters.iter().enumerate() {
        writeln!(out, "waiter {} {}, for {}", place + 1, escape(&waiter.owner), for_people(waiter.age))?;
        texts(out, waiter.metadata.as_deref(), waiter.trace.as_deref())?;
    }
    Ok(())
}

fn texts(out: &mut String, metadata: Option<&str>, trace: Option<&str>) -> std::fmt::Result {
    for (name, text) in [("metadata", metadata), ("trace", trace)] {
        if let Some(text) = text {
            writeln!(out, "           {name}: {}", escape(text))?;
        }
    }
    Ok(())
}
