//! Puts load on the store, and times each step.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use stanchion::{BootTime, Clock, Guard, Locks};
use tokio::task::JoinSet;

use super::histogram::Histogram;
use crate::exit_code;
use crate::message::Failure;
use crate::store::pause;

/// Interval between two looks at a queue that fills.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Times of acquires and releases.
#[derive(Debug, Default)]
pub(super) struct Pairs {
    pub(super) both: Histogram,
    pub(super) acquire: Histogram,
    pub(super) release: Histogram,
    /// Length of the measurement.
    pub(super) span: Duration,
}

/// Acquires and releases keys in `tasks` tasks, each with a key of its own.
pub(super) async fn pairs(locks: &Locks, key: &str, tasks: usize, length: Duration) -> Result<Pairs, Failure> {
    let clock = Clock::system();
    // The first request of a connection takes longer.
    locks.lock(key).await?.release().await?;
    let started = clock.now();
    let end = started.after(length);
    let mut running = JoinSet::new();
    for task in 0..tasks {
        running.spawn(pairs_of_task(locks.clone(), format!("{key}/{task}"), end));
    }
    let mut all = Pairs::default();
    while let Some(done) = running.join_next().await {
        let pairs = done.map_err(ended)??;
        all.both.add(&pairs.both);
        all.acquire.add(&pairs.acquire);
        all.release.add(&pairs.release);
    }
    all.span = clock.now().since(started);
    Ok(all)
}

async fn pairs_of_task(locks: Locks, key: String, end: BootTime) -> stanchion::Result<Pairs> {
    let clock = Clock::system();
    let mut pairs = Pairs::default();
    let mut begun = clock.now();
    while begun < end {
        let guard = locks.lock(key.as_str()).await?;
        let granted = clock.now();
        guard.release().await?;
        let released = clock.now();
        pairs.acquire.record(granted.since(begun));
        pairs.release.record(released.since(granted));
        pairs.both.record(released.since(begun));
        begun = released;
    }
    Ok(pairs)
}

/// Hands one key from waiter to waiter, with a queue of `waiters`. Returns the times, and their sum: the queue is filled
/// again in between.
pub(super) async fn hand_offs(
    locks: &Locks,
    key: &str,
    waiters: usize,
    length: Duration,
) -> Result<(Histogram, Duration), Failure> {
    let clock = Clock::system();
    let (mut times, mut sum) = (Histogram::default(), Duration::ZERO);
    let end = clock.now().after(length);
    let mut guard = locks.lock(key).await?;
    while clock.now() < end {
        let round = Arc::new(Round { released_at: Mutex::new(clock.now()), left: AtomicUsize::new(waiters) });
        let mut waiting = JoinSet::new();
        for _ in 0..waiters {
            waiting.spawn(wait(locks.clone(), key.to_owned(), round.clone()));
        }
        // If the hold was ended by force, the release below says so.
        while guard.is_held() && locks.inspect(key).await?.waiters.len() < waiters {
            pause(LOOK_EVERY).await;
        }
        round.releasing(&clock);
        guard.release().await?;
        let mut last = None;
        while let Some(done) = waiting.join_next().await {
            let (took, guard) = done.map_err(ended)??;
            times.record(took);
            sum += took;
            last = last.or(guard);
        }
        guard = match last {
            Some(last) => last,
            None => locks.lock(key).await?,
        };
    }
    guard.release().await?;
    Ok((times, sum))
}

/// A queue that is served once.
#[derive(Debug)]
struct Round {
    released_at: Mutex<BootTime>,
    /// Number of waiters that have not got the key.
    left: AtomicUsize,
}

impl Round {
    /// Takes the time of a release that is about to be sent.
    fn releasing(&self, clock: &Clock) {
        *self.released_at.lock().unwrap_or_else(PoisonError::into_inner) = clock.now();
    }
}

/// Waits for the key. Returns the time of the hand-off, and the guard of the last waiter; the others release it.
async fn wait(locks: Locks, key: String, round: Arc<Round>) -> stanchion::Result<(Duration, Option<Guard>)> {
    let clock = Clock::system();
    let guard = locks.lock(key.as_str()).await?;
    let released_at = *round.released_at.lock().unwrap_or_else(PoisonError::into_inner);
    let took = clock.now().since(released_at);
    if round.left.fetch_sub(1, Ordering::Relaxed) == 1 {
        return Ok((took, Some(guard)));
    }
    round.releasing(&clock);
    guard.release().await?;
    Ok((took, None))
}

fn ended(error: tokio::task::JoinError) -> Failure {
    Failure::new(exit_code::INTERNAL, format!("a task of the measurement has ended: {error}"))
}
