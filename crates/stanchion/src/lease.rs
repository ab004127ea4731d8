//! What the holder believes: local, without I/O, on the boot-time clock.
//!
//! # Invariants
//! 1. Belief ends no later than the store may let go: deadlines are counted from before the request that set them, less
//!    a drift margin.
//! 2. Lost is final: nothing that arrives later restores a belief, neither a beat's answer nor an extension.
//! 3. A belief that has run out by the clock is lost for everybody who looks, whether or not the keeper has come to
//!    announce it.

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

/// Renewals of a session within its ttl: one every 2 s for the default of 10 s.
pub(crate) const RENEWALS_PER_TTL: u32 = 5;

/// How much a clock may be wrong in rate, and how coarse a store's time may be.
///
/// A lifetime of `ttl` in the store is believed for `ttl − ttl × rate − fixed`. The default is 1 % and 2 ms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drift {
    /// Parts of a thousand.
    pub per_mille: u32,
    /// A fixed part.
    pub fixed: Duration,
}

impl Default for Drift {
    fn default() -> Self {
        Self { per_mille: 10, fixed: Duration::from_millis(2) }
    }
}

impl Drift {
    /// Refuses a drift that leaves too little of a session's `ttl`: it would be lost before its first renewal.
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

    /// How long a lifetime of `ttl` may be believed.
    pub(crate) fn shorten(self, ttl: Duration) -> Duration {
        let rate = Duration::from_nanos((ttl.as_nanos() as u64 / 1_000).saturating_mul(u64::from(self.per_mille)));
        ttl.saturating_sub(rate).saturating_sub(self.fixed)
    }

    /// The lifetime to ask the store for, so that the holder can use all of `ttl` and has the grace after it.
    pub(crate) fn lengthen(self, ttl: Duration) -> Duration {
        let needed = ttl + grace(ttl) + self.fixed;
        let rate = needed.as_micros() * u128::from(self.per_mille) / u128::from(1_000 - self.per_mille.min(999));
        // Stores count in milliseconds: the next whole one.
        let millis = (needed.as_micros() + rate).div_ceil(1_000) + 1;
        let lengthened = Duration::from_millis(u64::try_from(millis).unwrap_or(u64::MAX));
        lengthened.min(LONGEST_IN_STORE).max(ttl)
    }

    /// How much of a lifetime with so much left in the store a holder can use: [`lengthen`](Self::lengthen) gives the lifetime of
    /// which that is left.
    pub(crate) fn usable(self, remaining: Duration) -> Duration {
        let believed = self.shorten(remaining);
        // The longest that leaves its own grace, piece by piece as that is defined.
        let of_each = [
            believed * 2 / 3,
            believed.saturating_sub(MOST_GRACE),
            believed * 4 / 5,
            believed.saturating_sub(LEAST_GRACE),
        ];
        of_each.into_iter().filter(|part| *part + grace(*part) <= believed).max().unwrap_or_default()
    }
}

/// How coarse the remaining time of a lifetime may be that a store tells.
const LIFETIME_SLACK: Duration = Duration::from_millis(10);

/// The time between "stop" and "others may have it": a quarter of the lifetime, 50 ms to 5 s, never more than half.
pub(crate) fn grace(lifetime: Duration) -> Duration {
    (lifetime / 4).clamp(LEAST_GRACE, MOST_GRACE).min(lifetime / 2)
}

const LEAST_GRACE: Duration = Duration::from_millis(50);
const MOST_GRACE: Duration = Duration::from_secs(5);

/// The longest lifetime that a store is asked for: the longest duration there is, with what belongs to it at the usual drift.
const LONGEST_IN_STORE: Duration = Duration::from_secs(30 * 24 * 60 * 60 / 100 * 102);

/// The belief in a session.
#[derive(Debug)]
pub(crate) struct SessionLease {
    pub(crate) id: SessionId,
    grace: Duration,
    /// Until when the store keeps it, in nanoseconds since boot; never, if it lives with the process.
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

    /// A beat was answered: it is kept until `until`. Tells whether that came in time (invariant 2).
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

    /// The store has ended it: nothing is kept from others any more.
    pub(crate) fn gone(&self, now: BootTime) {
        self.until.fetch_min(now.as_nanos(), Ordering::AcqRel);
    }

    /// Fires when the session is over.
    pub(crate) fn over(&self) -> &CancellationToken {
        &self.over
    }
}

/// The belief in a hold.
#[derive(Debug)]
pub(crate) struct Hold {
    pub(crate) key: Key,
    pub(crate) token: TokenId,
    pub(crate) fence: Fence,
    pub(crate) session: Arc<SessionLease>,
    pub(crate) session_bound: bool,
    pub(crate) since: BootTime,
    /// The end of its own lifetime, in nanoseconds since boot; never, if it has none.
    until: AtomicU64,
    /// When it has to be given up by its own lifetime, in nanoseconds since boot: earlier than `until` by the grace. A value of its
    /// own, so that nobody sees half of an extension.
    stop: AtomicU64,
    /// The latest end of the lifetime that was asked for, answered or not, in nanoseconds since boot.
    asked_until: AtomicU64,
    /// Where it was lost with a grace: when the store is told to end it, in nanoseconds since boot.
    freed_at: AtomicU64,
    /// One extension at a time: answers would otherwise be believed in another order than the store has.
    pub(crate) extending: tokio::sync::Mutex<()>,
    /// The shortest ttl of an extension whose answer is missing, in nanoseconds: it may still reach the store, after
    /// later ones, so no belief reaches further.
    shortest_unanswered: AtomicU64,
    /// The longest silence that the holder promised, and when it last gave a sign.
    pub(crate) heartbeat_within: Option<Duration>,
    last_heartbeat: AtomicU64,
    /// A request that made this hold may still be on its way: its token is over only after this time of the store.
    pub(crate) unanswered_until: Option<StoreTime>,
    /// In place of what the handle says.
    pub(crate) on_lost: Option<OnLost>,
    /// When the store was last asked for it, in nanoseconds since boot.
    checked_at: AtomicU64,
    /// Its holder gives it up: from then on it may be gone from the store, and is not lost by that.
    releasing: AtomicBool,
    lost: OnceLock<LossCause>,
    /// Made when somebody listens: most holds are released before.
    lost_token: OnceLock<CancellationToken>,
}

/// What [`Hold::new`] needs.
pub(crate) struct NewHold {
    pub(crate) key: Key,
    pub(crate) token: TokenId,
    pub(crate) fence: Fence,
    pub(crate) session: Arc<SessionLease>,
    pub(crate) session_bound: bool,
    pub(crate) since: BootTime,
    /// The end of its own lifetime and the lifetime's length, if it has one.
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

    /// Until when others cannot have it.
    pub(crate) fn valid_until(&self) -> BootTime {
        if matches!(self.lost.get(), Some(LossCause::ForceReleased | LossCause::Missing | LossCause::Closed)) {
            return BootTime::from_nanos(0);
        }
        let own = self.own_until().min(BootTime::from_nanos(self.freed_at.load(Ordering::Acquire)));
        if self.session_bound { own.min(self.session.valid_until()) } else { own }
    }

    /// Lost, and kept from others until then.
    pub(crate) fn is_freed_at(&self, at: BootTime) {
        self.freed_at.fetch_min(at.as_nanos(), Ordering::AcqRel);
    }

    /// When it has to be given up.
    pub(crate) fn stop_by(&self) -> BootTime {
        if self.session_bound { self.own_stop_by().min(self.session.stop_by()) } else { self.own_stop_by() }
    }

    /// When the keeper has to look at it: its own lifetime or its heartbeat, not its session.
    pub(crate) fn look_at(&self) -> BootTime {
        self.own_stop_by().min(self.heartbeat_by())
    }

    pub(crate) fn has_deadline(&self) -> bool {
        self.own_until() != BootTime::NEVER
    }

    /// The end of its own lifetime.
    pub(crate) fn own_until(&self) -> BootTime {
        BootTime::from_nanos(self.until.load(Ordering::Acquire))
    }

    /// When the store has nothing of it any more, because its own lifetime has run out, an extension without an answer included:
    /// with a slack for a clock that is wrong.
    pub(crate) fn over_at(&self) -> BootTime {
        let asked = BootTime::from_nanos(self.asked_until.load(Ordering::Acquire));
        self.own_until().max(asked).after(Duration::from_secs(60))
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

    /// Why the belief has ended by `now`, if it has (invariant 3).
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

    /// Ends the belief. Tells whether this call did it.
    pub(crate) fn lose(&self, cause: LossCause) -> bool {
        let first = self.lost.set(cause).is_ok();
        if let Some(token) = self.lost_token.get() {
            token.cancel();
        }
        first
    }

    /// It is about to be released or handed on: said before anything is sent.
    pub(crate) fn begin_release(&self) {
        self.releasing.store(true, Ordering::Release);
    }

    pub(crate) fn is_releasing(&self) -> bool {
        self.releasing.load(Ordering::Acquire)
    }

    /// An extension is about to be asked for. Gives what [`Hold::extension_answered`] needs when its answer has come.
    pub(crate) fn extension_sent(&self, ttl: Duration) -> u64 {
        self.shortest_unanswered.fetch_min(nanos(ttl), Ordering::AcqRel)
    }

    /// A request is sent that may make it last until then.
    pub(crate) fn may_last_until(&self, until: BootTime) {
        self.asked_until.fetch_max(until.as_nanos(), Ordering::AcqRel);
    }

    /// Every request of an extension was answered: it can come no more.
    pub(crate) fn extension_answered(&self, before: u64) {
        self.shortest_unanswered.store(before, Ordering::Release);
    }

    /// How long from its question an extension may be believed.
    pub(crate) fn usable_extension(&self, ttl: Duration) -> Duration {
        ttl.min(Duration::from_nanos(self.shortest_unanswered.load(Ordering::Acquire)))
    }

    /// Sets the end of the lifetime anew, unless the hold was lost meanwhile (invariant 2).
    pub(crate) fn extend(&self, now: BootTime, until: BootTime, length: Duration) -> bool {
        if self.ended(now).is_some() {
            return false;
        }
        self.until.store(until.as_nanos(), Ordering::Release);
        self.stop.store(stop_by(until, grace(length)).as_nanos(), Ordering::Release);
        true
    }

    /// Whether the store keeps it for less long than is believed, by an answer that it ends at `ends` by the latest. Not where
    /// an extension has been answered, or has counted, since the end of its lifetime was `before`.
    pub(crate) fn has_less(&self, before: BootTime, ends: BootTime) -> bool {
        before != BootTime::NEVER && self.own_until() == before && ends.after(LIFETIME_SLACK) < before
    }

    pub(crate) fn heartbeat(&self, now: BootTime) {
        self.last_heartbeat.fetch_max(now.as_nanos(), Ordering::AcqRel);
    }

    /// Whether the store has not been asked for it for so long. Of several who ask, one hears yes.
    pub(crate) fn is_check_due(&self, now: BootTime, interval: Duration) -> bool {
        let last = self.checked_at.load(Ordering::Acquire);
        now.since(BootTime::from_nanos(last)) >= interval
            && self.checked_at.compare_exchange(last, now.as_nanos(), Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Fires when the hold is lost.
    pub(crate) fn lost_token(&self) -> &CancellationToken {
        let token = self.lost_token.get_or_init(CancellationToken::new);
        // Lost before it was made, or while it was: whoever comes second sees what the other did.
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
    fn lifetime_is_shortened_by_the_drift() {
        assert_eq!(Drift::default().shorten(Duration::from_secs(10)), Duration::from_millis(9_898));
        assert_eq!(Drift::default().shorten(Duration::from_millis(1)), Duration::ZERO);
    }

    #[test]
    fn holder_can_use_the_requested_time() {
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
