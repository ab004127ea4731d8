//! `watch`: prints a line for every change that it finds by looking at the keys repeatedly.

use std::collections::BTreeMap;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;
use stanchion::store::{KeyState, Listing};
use stanchion::{Clock, Locks};

use crate::arguments::Watch;
use crate::exit_code;
use crate::message::{Failure, Verbosity};
use crate::output::{Printed, escape, for_people, json_line, millis, print, wall_time};
use crate::store::{StoreChoice, silent, within};

/// A change, as `--json` shows it.
#[derive(Debug, Serialize, PartialEq, Eq)]
struct Change<'a> {
    time: &'a str,
    event: What,
    key: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    fence: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    owner: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    closed_for_ms: Option<u64>,
}

#[derive(Clone, Copy, Debug, Serialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum What {
    /// At the first look: it is held.
    Held,
    Acquired,
    Released,
    Waiting,
    StoppedWaiting,
    Closed,
    Opened,
}

impl What {
    fn word(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Acquired => "acquired",
            Self::Released => "released",
            Self::Waiting => "waiting",
            Self::StoppedWaiting => "stopped waiting",
            Self::Closed => "closed",
            Self::Opened => "opened",
        }
    }
}

/// Maximum time of a look. After it the store counts as away.
const LOOK_WITHIN: Duration = Duration::from_secs(5);

pub(super) fn execute(watch: &Watch, store: &StoreChoice, verbosity: Verbosity) -> Result<u8, Failure> {
    let mut before = None;
    while store.is_unused() {
        if before.replace(Vec::new()).is_none() {
            verbosity.progress(format_args!("no keys in use (store: {})", store.shown()));
        }
        if nobody_reads_within(watch.interval) {
            return Ok(exit_code::OK);
        }
    }
    store.ask(async |locks| Ok(look_for_ever(watch, locks, before, verbosity).await))?
}

async fn look_for_ever(
    watch: &Watch,
    locks: &Locks,
    mut before: Option<Vec<KeyState>>,
    verbosity: Verbosity,
) -> Result<u8, Failure> {
    let clock = Clock::system();
    let mut damaged = Vec::new();
    let mut is_away = false;
    loop {
        let looked = match within(LOOK_WITHIN, locks.list(&watch.prefix)).await {
            Some(Ok(listing)) => Ok(listing),
            Some(Err(fault)) if fault.is_transient() => Err(Failure::from(fault)),
            Some(Err(fault)) => return Err(fault.into()),
            None => Err(silent(LOOK_WITHIN)),
        };
        let Listing { keys: now, damaged: found, .. } = match looked {
            Ok(listing) => listing,
            Err(fault) => {
                if !std::mem::replace(&mut is_away, true) {
                    verbosity.problem(format_args!("{}; watching goes on", fault.message));
                }
                if nobody_reads_within(watch.interval) {
                    return Ok(exit_code::OK);
                }
                continue;
            }
        };
        if std::mem::take(&mut is_away) {
            verbosity.problem("the store answers again");
        }
        if found != damaged {
            super::ls::tell_damaged(&found, verbosity);
            damaged = found;
        }
        let time = wall_time(clock.wall());
        let mut text = String::new();
        for change in changes(before.as_deref(), &now, &time) {
            text += &if watch.json { json_line(&change)? } else { line(&change) };
        }
        if !text.is_empty() && print(&text)? == Printed::NobodyReads {
            return Ok(exit_code::OK);
        }
        before = Some(now);
        // Nothing else is to be done on this thread meanwhile. Without a change nothing is written, and no write fails.
        if nobody_reads_within(watch.interval) {
            return Ok(exit_code::OK);
        }
    }
}

/// Waits for `span`; returns whether the reader of stdout has gone.
fn nobody_reads_within(span: Duration) -> bool {
    let span = Timespec::try_from(span).ok();
    let stdout = std::io::stdout();
    let mut watched = [PollFd::new(&stdout, PollFlags::empty())];
    // A signal ends the wait early, and the next look comes sooner.
    let happened = poll(&mut watched, span.as_ref()).unwrap_or(0);
    happened > 0 && watched[0].revents().intersects(PollFlags::ERR | PollFlags::HUP)
}

/// Returns the differences between two looks. At the first look a hold is no change.
fn changes<'a>(before: Option<&'a [KeyState]>, now: &'a [KeyState], time: &'a str) -> Vec<Change<'a>> {
    let first = before.is_none();
    let mut by_key: BTreeMap<&str, (Option<&KeyState>, Option<&KeyState>)> = BTreeMap::new();
    for state in before.unwrap_or_default() {
        by_key.entry(state.key.as_encoded()).or_default().0 = Some(state);
    }
    for state in now {
        by_key.entry(state.key.as_encoded()).or_default().1 = Some(state);
    }
    let mut out = Vec::new();
    for (old, new) in by_key.into_values() {
        let Some(key) = new.or(old).map(|state| state.key.name()) else { continue };
        let change = |event| Change { time, event, key, fence: None, owner: None, closed_for_ms: None };
        let (old_holders, new_holders) = (holders(old), holders(new));
        for (fence, owner) in old_holders.iter().filter(|holder| !new_holders.contains(holder)) {
            out.push(Change { fence: Some(*fence), owner: Some(owner), ..change(What::Released) });
        }
        match (old.and_then(|state| state.closed_for), new.and_then(|state| state.closed_for)) {
            (None, Some(left)) => out.push(Change { closed_for_ms: Some(millis(left)), ..change(What::Closed) }),
            (Some(_), None) => out.push(change(What::Opened)),
            _ => {}
        }
        let acquired = if first { What::Held } else { What::Acquired };
        for (fence, owner) in new_holders.iter().filter(|holder| !old_holders.contains(holder)) {
            out.push(Change { fence: Some(*fence), owner: Some(owner), ..change(acquired) });
        }
        let (old_waiters, new_waiters) = (waiters(old), waiters(new));
        for owner in beyond(&new_waiters, &old_waiters) {
            out.push(Change { owner: Some(owner), ..change(What::Waiting) });
        }
        for owner in beyond(&old_waiters, &new_waiters) {
            // A granted waiter has stopped waiting too, but its grant is printed already.
            if !new_holders.iter().any(|(_, holder)| *holder == owner) {
                out.push(Change { owner: Some(owner), ..change(What::StoppedWaiting) });
            }
        }
    }
    out
}

fn holders(state: Option<&KeyState>) -> Vec<(u64, &str)> {
    state.map(|state| state.holders.iter().map(|h| (h.fence.get(), h.owner.as_str())).collect()).unwrap_or_default()
}

fn waiters(state: Option<&KeyState>) -> Vec<&str> {
    state.map(|state| state.waiters.iter().map(|w| w.owner.as_str()).collect()).unwrap_or_default()
}

/// Returns the elements that are in `these` more often than in `those`.
fn beyond<'a>(these: &[&'a str], those: &[&str]) -> Vec<&'a str> {
    let mut those = those.to_vec();
    let mut more = Vec::new();
    for one in these {
        match those.iter().position(|other| other == one) {
            Some(at) => drop(those.swap_remove(at)),
            None => more.push(*one),
        }
    }
    more
}

fn line(change: &Change<'_>) -> String {
    let mut out = format!("{}  {:15}  {}", change.time, change.event.word(), escape(change.key));
    if let Some(fence) = change.fence {
        out += &format!("  fence {fence}");
    }
    if let Some(owner) = change.owner {
        out += &format!("  {}", escape(owner));
    }
    if let Some(left) = change.closed_for_ms {
        out += &format!("  for {}", for_people(std::time::Duration::from_millis(left)));
    }
    out + "\n"
}
