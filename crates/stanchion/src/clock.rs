//! The one place where time and randomness come in.
//!
//! Deadlines are kept on a clock that counts suspended time (`CLOCK_BOOTTIME` where the system has it) and that no
//! wall-clock step moves. Wall time is for display only. A [`VirtualClock`] stands in for both in tests.
//!
//! # Invariants
//! 1. A timer fires only when its clock shows its deadline; waking a task early is harmless, because every sleeper looks
//!    at the clock again.
//! 2. A timer that was dropped wakes nobody.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime};

use tokio::sync::Notify;

use crate::error::{Error, ErrorKind, Result};

/// A point on the boot-time clock of this machine, in nanoseconds since boot.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct BootTime(u64);

impl BootTime {
    /// Later than every point in time.
    pub const NEVER: Self = Self(u64::MAX);

    /// From nanoseconds since boot.
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since boot.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// This much later; [`BootTime::NEVER`] if that is out of range.
    #[must_use]
    pub fn after(self, span: Duration) -> Self {
        Self(u64::try_from(span.as_nanos()).ok().and_then(|nanos| self.0.checked_add(nanos)).unwrap_or(u64::MAX))
    }

    /// This much earlier, not before boot.
    #[must_use]
    pub fn before(self, span: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// The time from `earlier` to this point; zero if `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// A clock: the machine's own, or a virtual one. Clones share it.
#[derive(Clone, Debug)]
pub struct Clock {
    source: Source,
    timers: Arc<Timers>,
}

#[derive(Clone, Debug)]
enum Source {
    System,
    Virtual(Arc<AtomicU64>),
}

impl Clock {
    /// The machine's clock. Its timers are driven by the keeper of the handle that it is given to.
    pub fn system() -> Self {
        Self { source: Source::System, timers: Arc::default() }
    }

    /// Now.
    pub fn now(&self) -> BootTime {
        match &self.source {
            Source::System => boot_time(),
            Source::Virtual(now) => BootTime(now.load(Ordering::SeqCst)),
        }
    }

    /// Now on the wall clock, for display and for fences. A virtual clock counts from 2030-01-01.
    #[allow(clippy::disallowed_methods, reason = "this is the clock module")]
    pub fn wall(&self) -> SystemTime {
        match &self.source {
            Source::System => SystemTime::now(),
            Source::Virtual(now) => {
                SystemTime::UNIX_EPOCH
                    + Duration::from_secs(1_893_456_000)
                    + Duration::from_nanos(now.load(Ordering::SeqCst))
            }
        }
    }

    /// Now on the wall clock, in µs since 1970.
    pub fn wall_micros(&self) -> u64 {
        let since = self.wall().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
    }

    /// Waits until the clock shows `deadline`. Works in any executor, or none.
    ///
    /// Somebody has to move it on: a virtual clock its test, the machine's clock the keeper of a handle that was given this
    /// clock. Where no such handle is open it waits for ever.
    pub fn sleep_until(&self, deadline: BootTime) -> Sleep {
        Sleep { clock: self.clone(), deadline, registered: None }
    }

    /// Waits this long.
    pub fn sleep(&self, span: Duration) -> Sleep {
        self.sleep_until(self.now().after(span))
    }

    /// Wakes sleepers of a system clock when their time has come. Never returns; dropping it stops the timers.
    ///
    /// Tokio's timers stop while the machine is suspended, so no nap is longer than `nap`.
    #[allow(clippy::disallowed_methods, reason = "this is the clock module")]
    pub(crate) async fn drive(&self, nap: Duration) {
        let _ends = DriverEnds(&self.timers);
        loop {
            let changed = self.timers.changed.notified();
            let now = self.now();
            match (&self.source, self.timers.fire(now, nap)) {
                // A virtual clock fires its timers itself.
                (Source::Virtual(_), _) | (_, BootTime::NEVER) => changed.await,
                (Source::System, next) => {
                    // Tokio counts in milliseconds and may wake a fraction of one too early: without the extra one
                    // this loop would spin through it.
                    let span = next.since(now) + Duration::from_millis(1);
                    tokio::select! { () = tokio::time::sleep(span) => {}, () = changed => {} }
                }
            }
        }
    }
}

/// A clock that stands still until [`advance`](VirtualClock::advance) is called. For tests.
///
/// ```
/// # use std::time::Duration;
/// use stanchion::VirtualClock;
///
/// let time = VirtualClock::new();
/// let before = time.clock().now();
/// time.advance(Duration::from_secs(60));
/// assert_eq!(time.clock().now().since(before), Duration::from_secs(60));
/// ```
#[derive(Clone, Debug)]
pub struct VirtualClock {
    clock: Clock,
    now: Arc<AtomicU64>,
}

impl VirtualClock {
    /// A clock that shows one hour since boot.
    pub fn new() -> Self {
        let now = Arc::new(AtomicU64::new(3_600_000_000_000));
        Self { clock: Clock { source: Source::Virtual(now.clone()), timers: Arc::default() }, now }
    }

    /// The clock to give to a store and to [`Builder::clock`](crate::Builder::clock).
    pub fn clock(&self) -> Clock {
        self.clock.clone()
    }

    /// Moves the clock on and wakes whoever slept until then.
    pub fn advance(&self, span: Duration) {
        let nanos = u64::try_from(span.as_nanos()).unwrap_or(u64::MAX);
        let now = self.now.fetch_add(nanos, Ordering::SeqCst).saturating_add(nanos);
        self.clock.timers.fire(BootTime(now), Duration::MAX);
    }
}

impl Default for VirtualClock {
    fn default() -> Self {
        Self::new()
    }
}

#[derive(Debug, Default)]
struct Timers {
    pending: Mutex<Pending>,
    next_id: AtomicU64,
    changed: Notify,
}

#[derive(Debug)]
struct Pending {
    wakers: BTreeMap<(BootTime, u64), Waker>,
    /// The driver looks again then, by itself.
    next_look: BootTime,
}

impl Default for Pending {
    fn default() -> Self {
        Self { wakers: BTreeMap::new(), next_look: BootTime::NEVER }
    }
}

impl Timers {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes all that are due; tells when to look again, at most a nap later: never, if there is nothing to wait for.
    fn fire(&self, now: BootTime, nap: Duration) -> BootTime {
        let (due, next_look) = {
            let mut pending = self.lock();
            let later = pending.wakers.split_off(&(BootTime(now.0.saturating_add(1)), 0));
            let due = std::mem::replace(&mut pending.wakers, later);
            let first = pending.wakers.first_key_value().map(|((deadline, _), _)| *deadline);
            pending.next_look = first.map_or(BootTime::NEVER, |first| first.min(now.after(nap)));
            (due, pending.next_look)
        };
        for waker in due.into_values() {
            waker.wake();
        }
        next_look
    }
}

/// Handles may share a clock. What this driver was told of, and what it was not told of because it would look in time, is for
/// another one to look after.
struct DriverEnds<'a>(&'a Timers);

impl Drop for DriverEnds<'_> {
    fn drop(&mut self) {
        self.0.changed.notify_one();
    }
}

/// The future of [`Clock::sleep_until`].
#[derive(Debug)]
#[must_use = "a sleep does nothing until it is awaited"]
pub struct Sleep {
    clock: Clock,
    deadline: BootTime,
    registered: Option<u64>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.deadline == BootTime::NEVER {
            return Poll::Pending;
        }
        if self.clock.now() >= self.deadline {
            return Poll::Ready(());
        }
        let timers = self.clock.timers.clone();
        let id = *self.registered.get_or_insert_with(|| timers.next_id.fetch_add(1, Ordering::Relaxed));
        let is_too_early = {
            let mut pending = timers.lock();
            let is_new = pending.wakers.insert((self.deadline, id), context.waker().clone()).is_none();
            is_new && self.deadline < pending.next_look
        };
        // Only a deadline before the driver's next look is worth waking it: nearly every step has a later one, and is over
        // before that. Once: the driver may run in the very task that sleeps here, and would wake itself for ever.
        if is_too_early {
            timers.changed.notify_one();
        }
        // A virtual clock may have been moved on between the look and the entry.
        let is_virtual = matches!(self.clock.source, Source::Virtual(_));
        if is_virtual && self.clock.now() >= self.deadline { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(id) = self.registered {
            self.clock.timers.lock().wakers.remove(&(self.deadline, id));
        }
    }
}

/// 16 bytes of the operating system's randomness.
pub(crate) fn random_bytes() -> Result<[u8; 16]> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| {
        Error::new(ErrorKind::Internal, "the operating system gave no randomness").with_source(error)
    })?;
    Ok(bytes)
}

/// A seed for jitter; quality does not matter.
pub(crate) fn jitter_seed() -> u64 {
    random_bytes().map_or(1, |bytes| {
        u64::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]])
    })
}

/// About this long: between three and five quarters of it, so that many sleepers do not wake together.
pub(crate) fn jitter(span: Duration) -> Duration {
    let part = u32::try_from(jitter_seed() % 512).unwrap_or(0);
    span * (768 + part) / 1_024
}

#[cfg(any(target_os = "linux", target_os = "android"))]
const BOOT_CLOCK: rustix::time::ClockId = rustix::time::ClockId::Boottime;
// Elsewhere the monotonic clock is the best there is: on macOS and the BSDs it may stop in suspend.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
const BOOT_CLOCK: rustix::time::ClockId = rustix::time::ClockId::Monotonic;

fn boot_time() -> BootTime {
    let time = rustix::time::clock_gettime(BOOT_CLOCK);
    BootTime((time.tv_sec as u64) * 1_000_000_000 + time.tv_nsec as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    struct Count(AtomicUsize);
    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_virtual_sleep_ends_when_the_clock_is_moved_on_and_not_before() {
        let time = VirtualClock::new();
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(count.clone());
        let mut context = Context::from_waker(&waker);
        let mut sleep = Box::pin(time.clock().sleep(Duration::from_secs(10)));
        assert!(sleep.as_mut().poll(&mut context).is_pending());
        time.advance(Duration::from_secs(9));
        assert_eq!(count.0.load(Ordering::SeqCst), 0);
        time.advance(Duration::from_secs(1));
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        assert!(sleep.as_mut().poll(&mut context).is_ready());
    }

    #[test]
    fn a_dropped_sleep_leaves_no_timer() {
        let time = VirtualClock::new();
        let clock = time.clock();
        let mut sleep = Box::pin(clock.sleep(Duration::from_secs(1)));
        assert!(sleep.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        assert_eq!(clock.timers.lock().wakers.len(), 1);
        drop(sleep);
        assert_eq!(clock.timers.lock().wakers.len(), 0);
    }

    #[tokio::test]
    async fn a_system_sleep_ends_on_time_when_driven() {
        let clock = Clock::system();
        let start = clock.now();
        tokio::select! {
            () = clock.drive(Duration::from_millis(500)) => {},
            () = clock.sleep(Duration::from_millis(30)) => {},
        }
        assert!(clock.now().since(start) >= Duration::from_millis(30));
    }

    #[tokio::test]
    async fn a_driver_in_the_task_that_sleeps_does_not_wake_itself_for_ever() {
        let clock = Clock::system();
        let polls = AtomicUsize::new(0);
        let (mut drive, mut sleep) =
            (Box::pin(clock.drive(Duration::from_secs(60))), Box::pin(clock.sleep(Duration::from_millis(100))));
        std::future::poll_fn(|context| {
            polls.fetch_add(1, Ordering::SeqCst);
            let _never_ready = drive.as_mut().poll(context);
            sleep.as_mut().poll(context)
        })
        .await;
        assert!(polls.load(Ordering::SeqCst) < 20, "{polls:?} polls");
    }

    #[tokio::test]
    async fn only_a_deadline_before_its_next_look_wakes_the_driver() {
        let clock = Clock::system();
        let woken = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(woken.clone());
        let mut drive = Box::pin(clock.drive(Duration::from_secs(60)));
        // It is polled by hand, and asleep after each poll.
        let mut look = || assert!(drive.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        look();
        let mut sleeps = Vec::new();
        // In seconds. Nothing to wait for; within a nap; later; at the end of the nap; earlier; the same again.
        for (deadline, wakes) in [(3_600, 1), (30, 1), (40, 0), (3_500, 0), (20, 1), (20, 0)] {
            let before = woken.0.load(Ordering::SeqCst);
            let mut sleep = Box::pin(clock.sleep(Duration::from_secs(deadline)));
            for _ in 0..2 {
                assert!(sleep.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            }
            assert_eq!(woken.0.load(Ordering::SeqCst) - before, wakes, "{deadline} s");
            sleeps.push(sleep);
            look();
        }
    }

    #[tokio::test]
    async fn when_a_driver_ends_another_one_looks() {
        let clock = Clock::system();
        let [woken, others] = [0, 0].map(|_| Arc::new(Count(AtomicUsize::new(0))));
        let [waker, others_waker] = [woken.clone(), others.clone()].map(Waker::from);
        let mut ends = Box::pin(clock.drive(Duration::from_secs(60)));
        let mut stays = Box::pin(clock.drive(Duration::from_secs(60)));
        assert!(ends.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        assert!(stays.as_mut().poll(&mut Context::from_waker(&others_waker)).is_pending());
        let mut sleep = Box::pin(clock.sleep(Duration::from_secs(20)));
        assert!(sleep.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        assert_eq!((woken.0.load(Ordering::SeqCst), others.0.load(Ordering::SeqCst)), (1, 0), "the first was told");
        assert!(ends.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        drop(ends);
        assert_eq!(others.0.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn boot_time_arithmetic_saturates() {
        assert_eq!(BootTime(5).after(Duration::MAX), BootTime::NEVER);
        assert_eq!(BootTime(5).before(Duration::from_secs(1)), BootTime(0));
        assert_eq!(BootTime(5).since(BootTime(9)), Duration::ZERO);
    }
}
