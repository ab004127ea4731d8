//! The checks of an open store. Each holds keys of its own, bound to a session, so that nothing stays if it is interrupted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use stanchion::store::KeyState;
use stanchion::{Clock, Guard, Locks};

use crate::exit_code;
use crate::message::Failure;
use crate::output::for_people;
use crate::store::{pause, within};

/// Maximum time for one step of a check.
pub(super) const STEP_WITHIN: Duration = Duration::from_secs(5);

/// Interval between two looks at something that is about to change.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Number of queries from which the clock of the store is estimated: the fastest one counts.
const CLOCK_QUERIES: u32 = 5;

/// Number of hand-offs. A poll may hide one push, and not all of them.
const HAND_OFFS: u32 = 3;

/// Number of locks from which the latency is taken.
const LATENCY_LOCKS: usize = 11;

/// Acquires, renews and releases a key. Returns whether the session needed a renewal.
pub(super) async fn rights(locks: &Locks, key: &str) -> Result<bool, Failure> {
    let guard = acquire(locks, key).await?;
    let is_renewed = renewal(&guard).await;
    let released = step("release", async { guard.release().await }).await;
    let is_renewed = is_renewed?;
    released.map(|_| is_renewed)
}

async fn acquire(locks: &Locks, key: &str) -> Result<Guard, Failure> {
    step("acquire", async { locks.lock(key).wait(STEP_WITHIN).await }).await
}

/// Waits until the keeper has renewed the session. Returns false if the store needs no renewals.
async fn renewal(guard: &Guard) -> Result<bool, Failure> {
    let Some(mut left) = guard.remaining() else { return Ok(false) };
    loop {
        pause(LOOK_EVERY).await;
        match guard.remaining() {
            // Only a renewal makes it longer.
            Some(now) if now > left => return Ok(true),
            Some(now) if guard.is_held() => left = now,
            _ => {
                let message = "renew: the store did not renew the session before it ended";
                return Err(Failure::new(exit_code::UNAVAILABLE, message));
            }
        }
    }
}

/// The difference between the store's clock and this machine's.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClockOffset {
    /// Positive if the store's clock is ahead.
    pub(super) micros: i64,
    /// Maximum error of the estimate: half of a round trip.
    pub(super) uncertainty: Duration,
}

/// Estimates the store's wall clock: the time of a grant and its age, in one answer.
pub(super) async fn clock_offset(locks: &Locks, key: &str) -> Result<ClockOffset, Failure> {
    let guard = acquire(locks, key).await?;
    let mut best: Option<ClockOffset> = None;
    for _ in 0..CLOCK_QUERIES {
        let (wall, sent_at) = (Clock::system().wall_micros(), Clock::system().now());
        let KeyState { holders, .. } = step("inspect", locks.inspect(key)).await?;
        let uncertainty = Clock::system().now().since(sent_at) / 2;
        let Some(hold) = holders.into_iter().find(|hold| hold.fence == guard.fence()) else {
            return Err(Failure::new(exit_code::INTERNAL, "the store does not show the key that is held"));
        };
        let theirs = hold.since.duration_since(std::time::UNIX_EPOCH).unwrap_or_default() + hold.age;
        let micros = |span: Duration| i64::try_from(span.as_micros()).unwrap_or(i64::MAX);
        let ours = Duration::from_micros(wall) + uncertainty;
        let found = ClockOffset { micros: micros(theirs).saturating_sub(micros(ours)), uncertainty };
        if best.is_none_or(|best| found.uncertainty < best.uncertainty) {
            best = Some(found);
        }
    }
    step("release", async { guard.release().await }).await?;
    best.ok_or_else(|| Failure::new(exit_code::INTERNAL, "the clock was not queried"))
}

/// A hand-off from one handle to another.
#[derive(Clone, Copy, Debug)]
pub(super) struct HandOff {
    /// Time from the begin of the release to the grant.
    pub(super) took: Duration,
    /// Whether the waiter got the key before any poll was answered.
    pub(super) is_pushed: bool,
}

/// Hands a key from one handle to another. Returns the fastest pushed hand-off or, if none was pushed, the fastest one.
/// `polls` counts the answered polls of the waiter.
pub(super) async fn hand_off(locks: &Locks, waiter: &Locks, polls: &AtomicU64, key: &str) -> Result<HandOff, Failure> {
    let clock = Clock::system();
    let mut best: Option<HandOff> = None;
    for _ in 0..HAND_OFFS {
        let guard = acquire(locks, key).await?;
        let wait = async {
            let guard = step("wait", async { waiter.lock(key).wait(STEP_WITHIN).await }).await?;
            Ok::<_, Failure>((guard, clock.now(), polls.load(Ordering::Relaxed)))
        };
        let release = async {
            while step("inspect", locks.inspect(key)).await?.waiters.is_empty() {
                pause(LOOK_EVERY).await;
            }
            let (released_at, polls) = (clock.now(), polls.load(Ordering::Relaxed));
            step("release", async { guard.release().await }).await?;
            Ok::<_, Failure>((released_at, polls))
        };
        let ((guard, granted_at, polls_after), (released_at, polls_before)) = tokio::try_join!(wait, release)?;
        step("release", async { guard.release().await }).await?;
        let found = HandOff { took: granted_at.since(released_at), is_pushed: polls_after == polls_before };
        if best.is_none_or(|best| (!found.is_pushed, found.took) < (!best.is_pushed, best.took)) {
            best = Some(found);
        }
    }
    best.ok_or_else(|| Failure::new(exit_code::INTERNAL, "the key was not handed off"))
}

/// Returns the median time of an acquire or a release.
pub(super) async fn latency(locks: &Locks, key: &str) -> Result<Duration, Failure> {
    let clock = Clock::system();
    let mut steps = Vec::new();
    for _ in 0..LATENCY_LOCKS {
        let asked_at = clock.now();
        let guard = acquire(locks, key).await?;
        let granted_at = clock.now();
        step("release", async { guard.release().await }).await?;
        steps.extend([granted_at.since(asked_at), clock.now().since(granted_at)]);
    }
    steps.sort();
    Ok(steps[steps.len() / 2])
}

/// Returns the outcome of a step, or a failure that names it.
async fn step<T>(name: &str, work: impl Future<Output = stanchion::Result<T>>) -> Result<T, Failure> {
    let failed = |failure: Failure| Failure::new(failure.code, format!("{name}: {}", failure.message));
    match within(STEP_WITHIN, work).await {
        Some(outcome) => outcome.map_err(|error| failed(error.into())),
        None => {
            let message = format!("the store did not answer within {}", for_people(STEP_WITHIN));
            Err(failed(Failure::new(exit_code::UNAVAILABLE, message)))
        }
    }
}
