//! `wait`: returns when a key is free, without taking it.
//!
//! It looks at the key. Queueing and releasing at once would be notified and fair, but it would take a fence, delay others
//! for a moment, and create the store.

use std::time::Duration;

use stanchion::store::{Demand, KeyState};
use stanchion::{Clock, Key, Locks};

use crate::arguments::Wait;
use crate::exit_code;
use crate::message::{Failure, Verbosity, quoted_key};
use crate::output::for_people;
use crate::report::{WaitReport, describe};
use crate::store::{NO_WAIT_WITHIN, StoreChoice, pause, silent, within};

/// Interval between the first two looks; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(25);

/// Maximum interval between two looks.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The result of a wait.
enum Waited {
    Free,
    Busy(KeyState),
    /// The store did not answer.
    Silent,
}

pub(super) fn execute(wait: &Wait, store: &StoreChoice, verbosity: Verbosity) -> Result<u8, Failure> {
    let key = store.key(&wait.key)?;
    let limit = wait.limit.span();
    let started = Clock::system().now();
    // Also where nothing is waited for, a store that works has time to answer.
    let open_within = limit.map(|limit| limit.max(NO_WAIT_WITHIN));
    let waited = store.ask_within(open_within, async |locks| {
        let left = limit.map(|limit| limit.saturating_sub(Clock::system().now().since(started)));
        let mut report = WaitReport::new(locks, key.name(), None, Demand::MUTEX, verbosity.describe_wait_after());
        let mut attempt = std::pin::pin!(until_free(locks, &key, left));
        loop {
            tokio::select! {
                biased;
                waited = &mut attempt => return waited,
                line = report.next() => verbosity.report(line),
            }
        }
    })?;
    match waited {
        Waited::Free => Ok(exit_code::OK),
        Waited::Busy(state) => {
            let limit = limit.filter(|limit| !limit.is_zero());
            let within = limit.map(|limit| format!(" within {}", for_people(limit))).unwrap_or_default();
            let why = match state.waiters.len() {
                waiters @ 1.. if state.holders.is_empty() => format!("{waiters} wait for it"),
                _ => describe(&state, Demand::MUTEX),
            };
            verbosity.problem(format_args!("key `{}` was not free{within}: {why}", quoted_key(key.name())));
            Ok(wait.limit.busy_exit_code)
        }
        Waited::Silent => Err(silent(limit.unwrap_or_default().max(NO_WAIT_WITHIN))),
    }
}

/// Looks at the key until it is free, for `limit` at most and at least once. An outage after the first answer, or within the
/// limit, is waited out.
async fn until_free(locks: &Locks, key: &Key, limit: Option<Duration>) -> stanchion::Result<Waited> {
    let clock = Clock::system();
    let end = limit.map(|limit| clock.now().after(limit));
    let mut next_pause = FIRST_PAUSE;
    let mut has_answered = false;
    loop {
        let left = end.map(|end| end.since(clock.now()));
        let look = locks.inspect(key.name());
        let seen = match left {
            Some(left) => within(left.max(NO_WAIT_WITHIN), look).await,
            None => Some(look.await),
        };
        let is_last = end.is_some_and(|end| clock.now() >= end);
        match seen {
            Some(Ok(state)) if is_free(&state) => return Ok(Waited::Free),
            Some(Ok(state)) if is_last => return Ok(Waited::Busy(state)),
            Some(Ok(_)) => has_answered = true,
            Some(Err(fault)) if is_last || !fault.is_transient() || (end.is_none() && !has_answered) => {
                return Err(fault);
            }
            Some(Err(_)) => {}
            None if is_last => return Ok(Waited::Silent),
            None => {}
        }
        let rest = end.map_or(Duration::MAX, |end| end.since(clock.now()));
        pause(next_pause.min(rest)).await;
        next_pause = LONGEST_PAUSE.min(next_pause * 2);
    }
}

fn is_free(state: &KeyState) -> bool {
    state.holders.is_empty() && state.waiters.is_empty() && state.closed_for.is_none()
}
