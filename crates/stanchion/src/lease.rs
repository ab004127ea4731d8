//! Tracks how long a session and a hold are valid, as the holder sees it: without I/O, on the boot-time clock.
//!
//! # Invariants
//! 1. Validity ends no later than the store may give the key to others: a deadline counts from before the request that set it,
//!    less a margin for drift.
//! 2. Lost is final: nothing that arrives later makes a session or a hold valid again, neither a renewal nor an extension.
//! 3. A hold whose validity has ended by the clock is lost for every reader, whether or not the keeper has reported it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::clock::BootTime;
use crate::error::{Error, ErrorKind, LossCause, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::on_lost::OnLost;
use crate::store::StoreTime;
use crate::token::{SessionId, TokenId};

use std::sync::Arc;

/// Number of renewals of a session within its ttl: one every 2 s for the default of 10 s.
pub(crate) const RENEWALS_PER_TTL: u32 = 5;

/// Limits how wrong the rate of a clock may be, and how coarse a store's time may be.
///
/// A lifetime of `ttl` in the store is valid for `ttl − ttl × rate − fixed`. The default is 1 % and 2 ms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drift {
    /// Part of the lifetime, in thousandths.
    pub per_mille: u32,
    /// Fixed part.
    pub fixed: Duration,
}

impl Default for Drift {
    fn default() -> Self {
        Self { per_mille: 10, fixed: Duration::from_millis(2) }
    }
}

impl Drift {
    /// Rejects a drift that leaves too little of a session's `ttl`: the session would be lost before its first renewal.
    pub(crate) fn check(self, ttl: Duration) -> Result<()> {
        let usable = self.shorten(ttl).saturating_sub(grace(ttl));
        if usable > ttl / RENEWALS_PER_TTL {
            return Ok(());
        }
        let message = format!(
            "a drift of {} parts of a thousand and {:?} leaves {usable:?} of the session ttl of {ttl:?}, and a session is \
             renewed every {:?}; lower the drift, or use a longer session ttl",
            self.per_mille,
            self.fixed,
            ttl / RENEWALS_PER_TTL
        );
        Err(Error::new(ErrorKind::InvalidArgument, message))
    }

    /// Returns how long a lifetime of `ttl` is valid.
    pub(crate) fn shorten(self, ttl: Duration) -> Duration {
        let rate = Duration::from_nanos((ttl.as_nanos() as u64 / 1_000).saturating_mul(u64::from(self.per_mille)));
        ttl.saturating_sub(rate).saturating_sub(self.fixed)
    }

    /// Returns the lifetime to request, so that the holder can use all of `ttl` and has the grace after it.
    pub(crate) fn lengthen(self, ttl: Duration) -> Duration {
        let needed = ttl + grace(ttl) + self.fixed;
        let rate = needed.as_micros() * u128::from(self.per_mille) / u128::from(1_000 - self.per_mille.min(999));
        // Stores count in milliseconds, so round up to the next millisecond.
        let millis = (needed.as_micros() + rate).div_ceil(1_000) + 1;
        let lengthened = Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX));
        lengthened.min(LONGEST_IN_STORE).max(ttl)
    }

    /// Returns how much time a holder can use of a lifetime with `remaining` left in the store. The inverse of
    /// [`lengthen`](Self::lengthen).
    pub(crate) fn usable(self, remaining: Duration) -> Duration {
        let believed = self.shorten(remaining);
        // The longest part that leaves its own grace. The candidates follow the cases in the definition of the grace.
        let of_each = [
            believed * 2 / 3,
            believed.saturating_sub(MOST_GRACE),
            believed * 4 / 5,
            believed.saturating_sub(LEAST_GRACE),
        ];
        of_each.into_iter().filter(|part| *part + grace(*part) <= believed).max().unwrap_or_default()
    }
}

/// Time after the end of a lifetime at which the store is certain to have nothing of the hold, even if its clock is wrong.
pub(crate) const LIFETIME_MARGIN: Duration = Duration::from_secs(60);

/// Maximum error of the remaining time that a store returns.
const LIFETIME_SLACK: Duration = Duration::from_millis(10);

/// Returns the time between the loss of a hold and the time at which others may get the key: a quarter of the lifetime, 50 ms to
/// 5 s, at most half of the lifetime.
pub(crate) fn grace(lifetime: Duration) -> Duration {
    (lifetime / 4).clamp(LEAST_GRACE, MOST_GRACE).min(lifetime / 2)
}

const LEAST_GRACE: Duration = Duration::from_millis(50);
const MOST_GRACE: Duration = Duration::from_secs(5);

/// Maximum lifetime that is requested from a store: the maximum duration, with its grace and the default drift.
const LONGEST_IN_STORE: Duration = Duration::from_secs(30 * 24 * 60 * 60 / 100 * 102);

/// The validity of a session.
#[derive(Debug)]
pub(crate) struct SessionLease {
    pub(crate) id: SessionId,
    grace: Duration,
    /// Time until which the store keeps the session, in nanoseconds since boot; never over if the session lives with the process.
    until: AtomicU64,
    over: CancellationToken,
}

impl SessionLease {
    pub(crate) fn new(id: SessionId, ttl: Duration, until: BootTime) -> Self {
        Self { id, grace: grace(ttl), until: AtomicU64::new(until.as_nanos()), over: CancellationToken::new() }
    }

    pub(crate) fn valid_until(&self) -> BootTime {
        BootTime::from_nanos(self.until.load(Ordering::Acquire))
    }

    pub(crate) fn stop_by(&self) -> BootTime {
        stop_by(self.valid_until(), self.grace)
    }

    pub(crate) fn is_valid(&self, now: BootTime) -> bool {
        !self.over.is_cancelled() && now < self.stop_by()
    }

    /// Renews the session: the store keeps it until `until`. Returns whether the answer came in time (invariant 2).
    pub(crate) fn renew(&self, now: BootTime, until: BootTime) -> bool {
        if !self.is_valid(now) {
            return false;
        }
        self.until.fetch_max(until.as_nanos(), Ordering::AcqRel);
        true
    }

    pub(crate) fn end(&self) {
        self.over.cancel();
    }

    /// Ends the time in which others cannot have the keys, because the store has ended the session.
    pub(crate) fn gone(&self, now: BootTime) {
        self.until.fetch_min(now.as_nanos(), Ordering::AcqRel);
    }

    /// Fires when the session is over.
    pub(crate) fn over(&self) -> &CancellationToken {
        &self.over
    }
}

/// The validity of a hold.
///
/// Its times are atomics and not behind a mutex, because every check of a guard reads them: in loops of user code, on any thread,
/// and in a forked child, where a thread that does not exist there may hold a mutex for ever. Each time is written by one kind of
/// event and is meaningful by itself; `stop` exists beside `until` for that reason.
#[derive(Debug)]
pub(crate) struct Hold {
    pub(crate) key: Key,
    pub(crate) token: TokenId,
    pub(crate) fence: Fence,
    /// The fence of the store's grant. Lower than `fence` if the hold lingered and was granted again in this process.
    pub(crate) granted: Fence,
    pub(crate) session: Arc<SessionLease>,
    pub(crate) session_bound: bool,
    pub(crate) since: BootTime,
    /// End of the hold's own lifetime, in nanoseconds since boot; never over if the hold has none.
    until: AtomicU64,
    /// Time at which the holder must stop because of the hold's own lifetime, in nanoseconds since boot: earlier than `until` by the
    /// grace.
    stop: AtomicU64,
    /// Latest end of the lifetime that was requested, answered or not, in nanoseconds since boot.
    asked_until: AtomicU64,
    /// Time at which the keeper releases a hold that was lost with a grace, in nanoseconds since boot.
    freed_at: AtomicU64,
    /// Admits one extension at a time: otherwise answers could be applied in another order than in the store.
    pub(crate) extending: tokio::sync::Mutex<()>,
    /// Shortest ttl of an extension whose answer is missing, in nanoseconds. Such an extension may still reach the store after later
    /// extensions, so no extension is valid for longer.
    shortest_unanswered: AtomicU64,
    /// Maximum time between two heartbeats that the holder promised.
    pub(crate) heartbeat_within: Option<Duration>,
    last_heartbeat: AtomicU64,
    /// Store time until which a request of the token may still arrive: the token is over only after this time.
    pub(crate) unanswered_until: Option<StoreTime>,
    /// The policy for the loss of this hold, in place of the handle's policy.
    pub(crate) on_lost: Option<OnLost>,
    /// Time of the last check in the store, in nanoseconds since boot.
    checked_at: AtomicU64,
    /// Whether the holder is releasing the hold: from then on the hold may be gone from the store without being lost.
    releasing: AtomicBool,
    lost: OnceLock<LossCause>,
    /// Made for the first listener, because most holds are released before one listens.
    lost_token: OnceLock<CancellationToken>,
}

/// The arguments of [`Hold::new`].
pub(crate) struct NewHold {
    pub(crate) key: Key,
    pub(crate) token: TokenId,
    pub(crate) fence: Fence,
    pub(crate) session: Arc<SessionLease>,
    pub(crate) session_bound: bool,
    pub(crate) since: BootTime,
    /// End and length of the hold's own lifetime, if it has one.
    pub(crate) deadline: Option<(BootTime, Duration)>,
    pub(crate) heartbeat_within: Option<Duration>,
    pub(crate) unanswered_until: Option<StoreTime>,
    pub(crate) on_lost: Option<OnLost>,
}

impl Hold {
    pub(crate) fn new(new: NewHold) -> Self {
        let (until, length) = new.deadline.unwrap_or((BootTime::NEVER, Duration::ZERO));
        Self {
            key: new.key,
            token: new.token,
            fence: new.fence,
            granted: new.fence,
            session: new.session,
            session_bound: new.session_bound,
            since: new.since,
            until: AtomicU64::new(until.as_nanos()),
            stop: AtomicU64::new(stop_by(until, grace(length)).as_nanos()),
            asked_until: AtomicU64::new(0),
            freed_at: AtomicU64::new(u64::MAX),
            extending: tokio::sync::Mutex::new(()),
            shortest_unanswered: AtomicU64::new(u64::MAX),
            heartbeat_within: new.heartbeat_within,
            last_heartbeat: AtomicU64::new(new.since.as_nanos()),
            unanswered_until: new.unanswered_until,
            on_lost: new.on_lost,
            checked_at: AtomicU64::new(new.since.as_nanos()),
            releasing: AtomicBool::new(false),
            lost: OnceLock::new(),
            lost_token: OnceLock::new(),
        }
    }

    /// Returns the hold of the next guard in this process. The hold must end with its session.
    pub(crate) fn granted_again(
        &self,
        since: BootTime,
        fence: Fence,
        heartbeat_within: Option<Duration>,
        on_lost: Option<OnLost>,
    ) -> Self {
        let next = Self::new(NewHold {
            key: self.key.clone(),
            token: self.token,
            fence,
            session: self.session.clone(),
            session_bound: true,
            since,
            deadline: None,
            heartbeat_within,
            unanswered_until: self.unanswered_until,
            on_lost,
        });
        Self { granted: self.granted, ..next }
    }

    /// Returns the time until which others cannot have the key.
    pub(crate) fn valid_until(&self) -> BootTime {
        if matches!(self.lost.get(), Some(LossCause::ForceReleased | LossCause::Missing | LossCause::Closed)) {
            return BootTime::from_nanos(0);
        }
        let own = self.own_until().min(BootTime::from_nanos(self.freed_at.load(Ordering::Acquire)));
        if self.session_bound { own.min(self.session.valid_until()) } else { own }
    }

    /// Limits the time in which others cannot have the key, because the lost hold is released at `at`.
    pub(crate) fn is_freed_at(&self, at: BootTime) {
        self.freed_at.fetch_min(at.as_nanos(), Ordering::AcqRel);
    }

    /// Returns the time at which the holder must stop.
    pub(crate) fn stop_by(&self) -> BootTime {
        if self.session_bound { self.own_stop_by().min(self.session.stop_by()) } else { self.own_stop_by() }
    }

    /// Returns the time at which the keeper must look at the hold because of its own lifetime or its heartbeat, not its session.
    pub(crate) fn look_at(&self) -> BootTime {
        self.own_stop_by().min(self.heartbeat_by())
    }

    pub(crate) fn has_deadline(&self) -> bool {
        self.own_until() != BootTime::NEVER
    }

    /// Returns the end of the hold's own lifetime.
    pub(crate) fn own_until(&self) -> BootTime {
        BootTime::from_nanos(self.until.load(Ordering::Acquire))
    }

    /// Returns the time after which the store has nothing of the hold, because its own lifetime is over. Includes extensions without
    /// an answer, and a margin for a wrong clock.
    pub(crate) fn over_at(&self) -> BootTime {
        let asked = BootTime::from_nanos(self.asked_until.load(Ordering::Acquire));
        self.own_until().max(asked).after(LIFETIME_MARGIN)
    }

    fn own_stop_by(&self) -> BootTime {
        BootTime::from_nanos(self.stop.load(Ordering::Acquire))
    }

    fn heartbeat_by(&self) -> BootTime {
        match self.heartbeat_within {
            Some(within) => BootTime::from_nanos(self.last_heartbeat.load(Ordering::Acquire)).after(within),
            None => BootTime::NEVER,
        }
    }

    /// Returns why the hold is lost at `now`, if it is (invariant 3).
    pub(crate) fn ended(&self, now: BootTime) -> Option<LossCause> {
        if let Some(cause) = self.lost.get() {
            Some(*cause)
        } else if self.session_bound && !self.session.is_valid(now) {
            Some(LossCause::SessionExpired)
        } else if now >= self.own_stop_by() {
            Some(if self.session_bound { LossCause::MaxHold } else { LossCause::TtlExpired })
        } else if now >= self.heartbeat_by() {
            Some(LossCause::HeartbeatMissed)
        } else {
            None
        }
    }

    /// Marks the hold as lost. Returns whether this call did that. [`Hold::announce_loss`] must follow.
    pub(crate) fn mark_lost(&self, cause: LossCause) -> bool {
        self.lost.set(cause).is_ok()
    }

    /// Wakes the tasks that wait for the loss.
    pub(crate) fn announce_loss(&self) {
        if let Some(token) = self.lost_token.get() {
            token.cancel();
        }
    }

    #[cfg(test)]
    pub(crate) fn lose(&self, cause: LossCause) -> bool {
        let first = self.mark_lost(cause);
        self.announce_loss();
        first
    }

    /// Marks the hold as being released or detached, before a request is sent.
    pub(crate) fn begin_release(&self) {
        self.releasing.store(true, Ordering::Release);
    }

    pub(crate) fn is_releasing(&self) -> bool {
        self.releasing.load(Ordering::Acquire)
    }

    /// Notes that an extension is about to be sent. Returns the value that [`Hold::extension_answered`] needs for its answer.
    pub(crate) fn extension_sent(&self, ttl: Duration) -> u64 {
        self.shortest_unanswered.fetch_min(nanos(ttl), Ordering::AcqRel)
    }

    /// Notes that a request is sent after which the store may keep the hold until `until`.
    pub(crate) fn may_last_until(&self, until: BootTime) {
        self.asked_until.fetch_max(until.as_nanos(), Ordering::AcqRel);
    }

    /// Notes that every request of an extension was answered, so that none can arrive any more.
    pub(crate) fn extension_answered(&self, before: u64) {
        self.shortest_unanswered.store(before, Ordering::Release);
    }

    /// Returns how long an extension is valid, from the time when its request was sent.
    pub(crate) fn usable_extension(&self, ttl: Duration) -> Duration {
        ttl.min(Duration::from_nanos(self.shortest_unanswered.load(Ordering::Acquire)))
    }

    /// Sets a new end of the lifetime, unless the hold has been lost (invariant 2).
    pub(crate) fn extend(&self, now: BootTime, until: BootTime, length: Duration) -> bool {
        if self.ended(now).is_some() {
            return false;
        }
        self.until.store(until.as_nanos(), Ordering::Release);
        self.stop.store(stop_by(until, grace(length)).as_nanos(), Ordering::Release);
        true
    }

    /// Returns whether the store keeps the hold for a shorter time than this process expects. `ends` is the latest end by the
    /// store's answer. Returns `false` if an extension has changed the end of the lifetime since it was `before`.
    pub(crate) fn has_less(&self, before: BootTime, ends: BootTime) -> bool {
        before != BootTime::NEVER && self.own_until() == before && ends.after(LIFETIME_SLACK) < before
    }

    pub(crate) fn heartbeat(&self, now: BootTime) {
        self.last_heartbeat.fetch_max(now.as_nanos(), Ordering::AcqRel);
    }

    /// Returns whether the last check was at least `interval` ago. Of several concurrent callers, one gets `true`.
    pub(crate) fn is_check_due(&self, now: BootTime, interval: Duration) -> bool {
        let last = self.checked_at.load(Ordering::Acquire);
        now.since(BootTime::from_nanos(last)) >= interval
            && self.checked_at.compare_exchange(last, now.as_nanos(), Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Fires when the hold is lost.
    pub(crate) fn lost_token(&self) -> &CancellationToken {
        let token = self.lost_token.get_or_init(CancellationToken::new);
        // The hold may have been lost before the token was made, or at the same time: the later of the two threads sees the work of
        // the earlier one.
        if self.lost.get().is_some() {
            token.cancel();
        }
        token
    }
}

fn stop_by(until: BootTime, grace: Duration) -> BootTime {
    if until == BootTime::NEVER { until } else { until.before(grace) }
}

fn nanos(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> BootTime {
        BootTime::from_nanos(millis * 1_000_000)
    }

    fn session(until: BootTime) -> Arc<SessionLease> {
        Arc::new(SessionLease::new(SessionId::from_bytes([1; 16]), Duration::from_secs(10), until))
    }

    fn hold(session: Arc<SessionLease>, deadline: Option<(BootTime, Duration)>, session_bound: bool) -> Hold {
        Hold::new(NewHold {
            key: Key::new("", "k").unwrap(),
            token: TokenId::from_bytes([2; 16]),
            fence: Fence::new(1),
            session,
            session_bound,
            since: at(0),
            deadline,
            heartbeat_within: None,
            unanswered_until: None,
            on_lost: None,
        })
    }

    #[test]
    fn drift_shortens_the_lifetime() {
        assert_eq!(Drift::default().shorten(Duration::from_secs(10)), Duration::from_millis(9_898));
        assert_eq!(Drift::default().shorten(Duration::from_millis(1)), Duration::ZERO);
    }

    #[test]
    fn holder_has_all_of_its_time() {
        let month = Duration::from_secs(30 * 24 * 60 * 60);
        let mut spans: Vec<_> = (10..3_000).map(Duration::from_millis).collect();
        spans.extend((3..100).map(Duration::from_secs));
        spans.extend([Duration::from_secs(3_600), month / 2, month]);
        for drift in [Drift::default(), Drift { per_mille: 0, fixed: Duration::ZERO }] {
            for asked in &spans {
                let in_store = drift.lengthen(*asked);
                let (own, used) = (drift.shorten(in_store), drift.usable(in_store));
                assert!(own >= *asked + grace(*asked), "{asked:?}: {in_store:?} in the store are {own:?}");
                assert!(
                    used >= *asked && used <= *asked + asked.mul_f64(0.03) + Duration::from_millis(5),
                    "{asked:?}: {used:?}"
                );
                assert!(in_store <= asked.mul_f64(1.55) + Duration::from_millis(6) && in_store <= LONGEST_IN_STORE);
            }
        }
    }

    #[test]
    fn usable_part_leaves_its_grace() {
        for millis in 0..60_000 {
            let remaining = Duration::from_millis(millis);
            let used = Drift::default().usable(remaining);
            assert!(used + grace(used) <= Drift::default().shorten(remaining), "{remaining:?}: {used:?}");
        }
    }

    #[test]
    fn late_renewal_changes_nothing() {
        let session = session(at(10_000));
        assert!(session.renew(at(7_000), at(12_000)), "in time");
        assert_eq!(session.stop_by(), at(9_500));
        assert!(!session.renew(at(9_500), at(20_000)), "too late");
        assert!(!session.is_valid(at(9_500)));
        assert_eq!(session.valid_until(), at(12_000));
    }

    #[test]
    fn hold_ends_with_session_or_own_lifetime() {
        let bound = hold(session(at(10_000)), Some((at(60_000), Duration::from_secs(60))), true);
        assert_eq!(bound.ended(at(7_499)), None);
        assert_eq!(bound.ended(at(7_500)), Some(LossCause::SessionExpired));
        let capped = hold(session(BootTime::NEVER), Some((at(4_000), Duration::from_secs(4))), true);
        assert_eq!(capped.ended(at(3_000)), Some(LossCause::MaxHold));
        let fixed = hold(session(at(100)), Some((at(4_000), Duration::from_secs(4))), false);
        assert_eq!(fixed.ended(at(2_999)), None, "a fixed lifetime does not need its session");
        assert_eq!(fixed.ended(at(3_000)), Some(LossCause::TtlExpired));
    }

    #[test]
    fn late_extension_changes_nothing() {
        let fixed = hold(session(BootTime::NEVER), Some((at(4_000), Duration::from_secs(4))), false);
        assert!(fixed.extend(at(1_000), at(8_000), Duration::from_secs(7)));
        assert_eq!(fixed.ended(at(4_000)), None);
        assert!(!fixed.extend(at(8_000), at(20_000), Duration::from_secs(7)));
        assert_eq!(fixed.ended(at(8_000)), Some(LossCause::TtlExpired));
        assert!(fixed.lose(LossCause::TtlExpired));
        assert!(!fixed.extend(at(1), at(90_000), Duration::from_secs(7)), "lost is final");
        assert!(!fixed.lose(LossCause::ForceReleased), "the first cause stays");
    }

    #[test]
    fn readers_see_whole_extensions() {
        let fixed = Arc::new(hold(session(BootTime::NEVER), Some((at(60_000), Duration::from_secs(60))), false));
        let looking = std::thread::spawn({
            let fixed = fixed.clone();
            move || (0..2_000_000).all(|_| fixed.ended(at(1)).is_none())
        });
        while !looking.is_finished() {
            assert!(fixed.extend(at(1), at(2_000), Duration::from_secs(2)));
            assert!(fixed.extend(at(1), at(60_000), Duration::from_secs(60)));
        }
        assert!(looking.join().unwrap());
    }

    #[test]
    fn unanswered_extension_delays_the_end() {
        let fixed = hold(session(BootTime::NEVER), Some((at(4_000), Duration::from_secs(4))), false);
        assert_eq!(fixed.over_at(), at(64_000));
        fixed.may_last_until(at(100_000));
        fixed.may_last_until(at(50_000));
        assert_eq!((fixed.over_at(), fixed.valid_until()), (at(160_000), at(4_000)));
    }
}
