//! Provides time and randomness: the only module that asks the operating system for either.
//!
//! Deadlines use a clock that includes suspend time (`CLOCK_BOOTTIME` if the system has it) and that no change of the
//! wall clock moves. Wall time is for display and fences. In tests a [`VirtualClock`] replaces both.
//!
//! # Invariants
//! 1. A timer fires only when its clock shows its deadline. Waking a task early is harmless, because every sleeper
//!    reads the clock again.
//! 2. A dropped timer wakes nobody.

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
    /// The latest point in time, which is never reached.
    pub const NEVER: Self = Self(u64::MAX);

    /// Creates a point from nanoseconds since boot.
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// Returns the nanoseconds since boot.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// Returns the point that is `span` later, or [`BootTime::NEVER`] if that is out of range.
    #[must_use]
    pub fn after(self, span: Duration) -> Self {
        Self(u64::try_from(span.as_nanos()).ok().and_then(|nanos| self.0.checked_add(nanos)).unwrap_or(u64::MAX))
    }

    /// Returns the point that is `span` earlier, but not before boot.
    #[must_use]
    pub fn before(self, span: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// Returns the time from `earlier` to this point, or zero if `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

/// A source of time: the machine's clock, or a [`VirtualClock`]. Clones share it.
#[derive(Clone, Debug)]
pub struct Clock {
    source: TimeSource,
    timers: Arc<Timers>,
}

#[derive(Clone, Debug)]
enum TimeSource {
    System,
    Virtual(Arc<AtomicU64>),
}

impl Clock {
    /// Returns the machine's clock. The keeper of the handle that uses it drives its timers.
    pub fn system() -> Self {
        Self { source: TimeSource::System, timers: Arc::default() }
    }

    /// Returns the current boot time.
    pub fn now(&self) -> BootTime {
        match &self.source {
            TimeSource::System => boot_time(),
            TimeSource::Virtual(now) => BootTime(now.load(Ordering::SeqCst)),
        }
    }

    /// Returns the current wall-clock time, for display and for fences. A virtual clock starts at 2030-01-01.
    #[allow(clippy::disallowed_methods, reason = "this is the clock module")]
    pub fn wall(&self) -> SystemTime {
        match &self.source {
            TimeSource::System => SystemTime::now(),
            TimeSource::Virtual(now) => {
                SystemTime::UNIX_EPOCH
                    + Duration::from_secs(1_893_456_000)
                    + Duration::from_nanos(now.load(Ordering::SeqCst))
            }
        }
    }

    /// Returns the current wall-clock time in µs since 1970.
    pub fn wall_micros(&self) -> u64 {
        let since = self.wall().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
    }

    /// Returns a future that completes when the clock shows `deadline`. It works in any executor, or none.
    ///
    /// Something must advance the clock: the test for a virtual clock, the keeper of an open handle with this clock for
    /// the machine's clock. Without one, the future never completes.
    pub fn sleep_until(&self, deadline: BootTime) -> Sleep {
        Sleep { clock: self.clone(), deadline, registered: None }
    }

    /// Returns a future that completes after `span`.
    pub fn sleep(&self, span: Duration) -> Sleep {
        self.sleep_until(self.now().after(span))
    }

    /// Wakes the sleepers of a system clock when they are due. Never returns; dropping the future stops the timers.
    ///
    /// Tokio's timers stop while the machine is suspended, so this wakes at least once per `max_sleep`.
    #[allow(clippy::disallowed_methods, reason = "this is the clock module")]
    pub(crate) async fn drive(&self, max_sleep: Duration) {
        let _ends = DriverEnds(&self.timers);
        loop {
            let changed = self.timers.changed.notified();
            let now = self.now();
            match (&self.source, self.timers.fire(now, max_sleep)) {
                // A virtual clock fires its timers itself.
                (TimeSource::Virtual(_), _) | (_, BootTime::NEVER) => changed.await,
                (TimeSource::System, next) => {
                    // Tokio counts in milliseconds and may wake a fraction of a millisecond too early. Without the
                    // extra millisecond, this loop would spin for that fraction.
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
    /// Creates a clock that shows one hour since boot.
    pub fn new() -> Self {
        let now = Arc::new(AtomicU64::new(3_600_000_000_000));
        Self { clock: Clock { source: TimeSource::Virtual(now.clone()), timers: Arc::default() }, now }
    }

    /// Returns the clock to pass to a store and to [`Builder::clock`](crate::Builder::clock).
    pub fn clock(&self) -> Clock {
        self.clock.clone()
    }

    /// Advances the clock by `span`, and wakes the sleepers that are then due.
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
    queue: Mutex<TimerQueue>,
    next_id: AtomicU64,
    changed: Notify,
}

#[derive(Debug)]
struct TimerQueue {
    wakers: BTreeMap<(BootTime, u64), Waker>,
    /// Time at which the driver wakes by itself.
    next_wake: BootTime,
}

impl Default for TimerQueue {
    fn default() -> Self {
        Self { wakers: BTreeMap::new(), next_wake: BootTime::NEVER }
    }
}

impl Timers {
    fn lock(&self) -> MutexGuard<'_, TimerQueue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes all sleepers that are due. Returns when the driver must wake again, at most `max_sleep` later, or `NEVER`
    /// if nobody sleeps.
    fn fire(&self, now: BootTime, max_sleep: Duration) -> BootTime {
        let (due, next_wake) = {
            let mut queue = self.lock();
            let later = queue.wakers.split_off(&(BootTime(now.0.saturating_add(1)), 0));
            let due = std::mem::replace(&mut queue.wakers, later);
            let first = queue.wakers.first_key_value().map(|((deadline, _), _)| *deadline);
            queue.next_wake = first.map_or(BootTime::NEVER, |first| first.min(now.after(max_sleep)));
            (due, queue.next_wake)
        };
        for waker in due.into_values() {
            waker.wake();
        }
        next_wake
    }
}

/// Notifies another driver when this one ends, because handles may share a clock.
///
/// The other driver takes over the notifications that this driver received, and the timers for which nobody notified it
/// because it would have woken in time.
struct DriverEnds<'a>(&'a Timers);

impl Drop for DriverEnds<'_> {
    fn drop(&mut self) {
        self.0.changed.notify_one();
    }
}

/// The future that [`Clock::sleep_until`] returns.
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
            let mut queue = timers.lock();
            let is_new = queue.wakers.insert((self.deadline, id), context.waker().clone()).is_none();
            is_new && self.deadline < queue.next_wake
        };
        // A new timer wakes the driver only if its deadline comes before the driver's next wake. Nearly every operation
        // has a later deadline, and is done before that. A timer wakes the driver only once, because the driver may run
        // in the very task that sleeps here, and would then wake itself forever.
        if is_too_early {
            timers.changed.notify_one();
        }
        // A virtual clock may have advanced between the first check and the entry into the queue.
        let is_virtual = matches!(self.clock.source, TimeSource::Virtual(_));
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

/// Returns 16 bytes of the operating system's randomness.
pub(crate) fn random_bytes() -> Result<[u8; 16]> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| {
        Error::new(ErrorKind::Internal, "the operating system gave no randomness").with_source(error)
    })?;
    Ok(bytes)
}

/// Returns a seed for jitter, whose quality does not matter.
pub(crate) fn jitter_seed() -> u64 {
    random_bytes().map_or(1, |bytes| {
        u64::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]])
    })
}

/// Returns between three and five quarters of `span`, so that many sleepers do not wake together.
pub(crate) fn jitter(span: Duration) -> Duration {
    let part = u32::try_from(jitter_seed() % 512).unwrap_or(0);
    span * (768 + part) / 1_024
}

#[cfg(any(target_os = "linux", target_os = "android"))]
const BOOT_CLOCK: rustix::time::ClockId = rustix::time::ClockId::Boottime;
// Other systems have only the monotonic clock, which may stop during suspend on macOS and the BSDs.
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
    fn virtual_sleep_ends_exactly_at_its_deadline() {
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
    fn dropped_sleep_leaves_no_timer() {
        let time = VirtualClock::new();
        let clock = time.clock();
        let mut sleep = Box::pin(clock.sleep(Duration::from_secs(1)));
        assert!(sleep.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        assert_eq!(clock.timers.lock().wakers.len(), 1);
        drop(sleep);
        assert_eq!(clock.timers.lock().wakers.len(), 0);
    }

    #[tokio::test]
    async fn driven_sleep_does_not_end_early() {
        let clock = Clock::system();
        let start = clock.now();
        tokio::select! {
            () = clock.drive(Duration::from_millis(500)) => {},
            () = clock.sleep(Duration::from_millis(30)) => {},
        }
        assert!(clock.now().since(start) >= Duration::from_millis(30));
    }

    #[tokio::test]
    async fn driver_in_the_sleeping_task_does_not_spin() {
        let clock = Clock::system();
        let polls = AtomicUsize::new(0);
        let (mut drive, mut sleep) =
            (Box::pin(clock.drive(Duration::from_secs(60))), Box::pin(clock.sleep(Duration::from_millis(100))));
        std::future::poll_fn(|context| {
            polls.fetch_add(1, Ordering::SeqCst);
            let _ = drive.as_mut().poll(context); // never ready
            sleep.as_mut().poll(context)
        })
        .await;
        assert!(polls.load(Ordering::SeqCst) < 20, "{polls:?} polls");
    }

    #[tokio::test]
    async fn only_earlier_deadlines_wake_the_driver() {
        let clock = Clock::system();
        let woken = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(woken.clone());
        let mut drive = Box::pin(clock.drive(Duration::from_secs(60)));
        // The test polls the driver by hand. The driver sleeps after each poll.
        let mut poll_driver = || assert!(drive.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        poll_driver();
        let mut sleeps = Vec::new();
        // (deadline of a new sleep in seconds, number of wakes of the driver), one after the other:
        // the first one at all; within `max_sleep`; two later ones; an earlier one; the same again.
        for (deadline, wakes) in [(3_600, 1), (30, 1), (40, 0), (3_500, 0), (20, 1), (20, 0)] {
            let before = woken.0.load(Ordering::SeqCst);
            let mut sleep = Box::pin(clock.sleep(Duration::from_secs(deadline)));
            for _ in 0..2 {
                assert!(sleep.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            }
            assert_eq!(woken.0.load(Ordering::SeqCst) - before, wakes, "{deadline} s");
            sleeps.push(sleep);
            poll_driver();
        }
    }

    #[tokio::test]
    async fn ending_driver_wakes_the_next() {
        let clock = Clock::system();
        let [woken, others] = [0, 0].map(|_| Arc::new(Count(AtomicUsize::new(0))));
        let [waker, others_waker] = [woken.clone(), others.clone()].map(Waker::from);
        let mut ends = Box::pin(clock.drive(Duration::from_secs(60)));
        let mut stays = Box::pin(clock.drive(Duration::from_secs(60)));
        assert!(ends.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
        assert!(stays.as_mut().poll(&mut Context::from_waker(&others_waker)).is_pending());
        let mut sleep = Box::pin(clock.sleep(Duration::from_secs(20)));
        assert!(sleep.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        assert_eq!(
            (woken.0.load(Ordering::SeqCst), others.0.load(Ordering::SeqCst)),
            (1, 0),
            "the first driver was notified"
        );
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
