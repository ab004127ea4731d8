//! What the steps of a store ask and answer.

use std::time::{Duration, SystemTime};

use crate::error::{Error, ErrorKind, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::token::{SessionId, TokenId};

/// A point on a store's clock, in µs. Compare it only with times of the same store.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct StoreTime(u64);

impl StoreTime {
    /// From microseconds.
    pub const fn from_micros(micros: u64) -> Self {
        Self(micros)
    }

    /// Microseconds.
    pub const fn as_micros(self) -> u64 {
        self.0
    }

    /// This much later.
    #[must_use]
    pub fn after(self, span: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(span.as_micros()).unwrap_or(u64::MAX)))
    }

    /// The time from `earlier` to this point; zero if `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

/// An answer, with the store's time at which the step was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply<T> {
    /// The store's time.
    pub time: StoreTime,
    /// What happened.
    pub outcome: T,
}

/// What a store can do. The conformance suite runs what is declared here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// The store's name, as errors and events show it.
    pub name: &'static str,
    /// How a session lives.
    pub liveness: Liveness,
    /// Waiters are granted in the order in which they asked.
    pub fair: bool,
    /// A grant is pushed to a waiter. Without it waiters poll.
    pub push: bool,
    /// Only the store itself can send a push to a session. Without it a pushed grant is confirmed by a poll after it was
    /// believed, so that one who may only send messages gives nobody a lock.
    pub authentic_push: bool,
}

impl Capabilities {
    /// The capabilities of a fair store with sessions that must beat, and with pushes that others may send too.
    pub const fn new(name: &'static str) -> Self {
        Self { name, liveness: Liveness::Renewal, fair: true, push: true, authentic_push: false }
    }

    /// The same with pushes that only the store can send.
    #[must_use]
    pub const fn with_authentic_push(mut self) -> Self {
        self.authentic_push = true;
        self
    }

    /// The same with this kind of liveness.
    #[must_use]
    pub const fn with_liveness(mut self, liveness: Liveness) -> Self {
        self.liveness = liveness;
        self
    }
}

/// How a session lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Liveness {
    /// Until its ttl has passed since the last beat.
    Renewal,
    /// As long as its process lives, beaten or not; its end is known at once.
    Process,
}

/// A session to be opened.
#[derive(Clone, Debug)]
pub struct OpenSession {
    /// Its identity, chosen by the client.
    pub session: SessionId,
    /// How long it lives without a beat (ignored where [`Liveness::Process`]).
    pub ttl: Duration,
    /// Who it is, for people to read: host, process, program.
    pub owner: String,
}

/// The answer to [`Store::open_session`](crate::Store::open_session).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenOutcome {
    /// It is open.
    Opened,
    /// A session of this id has ended. Choose another id.
    Gone,
}

/// The answer to [`Store::beat`](crate::Store::beat).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RenewOutcome {
    /// It lives; these tokens were taken from it by force and have not been ended yet.
    Alive {
        /// What was lost.
        lost: Vec<LostToken>,
    },
    /// It is dead or was never opened.
    Gone,
}

/// A hold that was released by force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostToken {
    /// The key that was held.
    pub key: Key,
    /// The token that is over.
    pub token: TokenId,
    /// The reason that was given.
    pub reason: String,
}

/// How much of a key a hold takes.
///
/// | primitive | units | capacity |
/// |---|---|---|
/// | lock, write | 1 | 1 |
/// | semaphore of n, taking k | k | n |
/// | read | 1 | [`Demand::MAX`] |
///
/// A request fits when the units of the live holds plus its own are at most the smallest capacity among the live holds and
/// its own ([`Demand::fits`]). Two rules follow from this one:
/// - A request for the whole of its capacity is exclusive ([`Demand::is_exclusive`]), whatever that capacity is. It fits only
///   when nobody holds the key, and nothing fits beside it.
/// - Users of a key need not agree on its capacity. The smaller one holds until the holders of the other are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Demand {
    units: u32,
    capacity: u32,
}

impl Demand {
    /// The largest number of units and the largest capacity: 2^31 − 1.
    pub const MAX: u32 = i32::MAX as u32;
    /// One at a time.
    pub const MUTEX: Self = Self { units: 1, capacity: 1 };
    /// Shared with other readers.
    pub const READ: Self = Self { units: 1, capacity: Self::MAX };
    /// One at a time, the same as [`MUTEX`](Self::MUTEX): an exclusive request excludes readers too.
    pub const WRITE: Self = Self::MUTEX;

    /// `units` of a key of `capacity`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] unless `1 ≤ units ≤ capacity ≤ 2^31 − 1`.
    pub fn new(units: u32, capacity: u32) -> Result<Self> {
        if units == 0 || units > capacity || capacity > Self::MAX {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "{units} units of a capacity of {capacity}: units must be 1 or more and at most the capacity, which is at most {}",
                    Self::MAX
                ),
            ));
        }
        Ok(Self { units, capacity })
    }

    /// The units it takes.
    pub const fn units(self) -> u32 {
        self.units
    }

    /// The capacity it expects the key to have.
    pub const fn capacity(self) -> u32 {
        self.capacity
    }

    /// Returns whether it takes the whole key, whatever the capacity of other users is.
    pub const fn is_exclusive(self) -> bool {
        self.units == self.capacity
    }

    /// Returns whether a request fits beside these live holds. A store's rule, as code.
    pub fn fits(self, held: impl IntoIterator<Item = Self>) -> bool {
        let add =
            |(used, capacity): (u64, u32), hold: Self| (used + u64::from(hold.units), capacity.min(hold.capacity));
        let (used, capacity) = held.into_iter().fold((u64::from(self.units), self.capacity), add);
        used <= u64::from(capacity)
    }
}

/// How long a hold lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// As long as the session lives, and never longer than `max_hold` from the grant if that is set.
    Session {
        /// A deadline of its own, counted from the grant.
        max_hold: Option<Duration>,
    },
    /// This long from the grant, whatever becomes of the session once it is granted.
    Fixed(Duration),
}

impl Lifetime {
    /// The same lifetime with another length, if it has one.
    pub(crate) fn map(self, change: impl FnOnce(Duration) -> Duration) -> Self {
        match self {
            Self::Session { max_hold } => Self::Session { max_hold: max_hold.map(change) },
            Self::Fixed(ttl) => Self::Fixed(change(ttl)),
        }
    }

    /// The length of the lifetime from its grant, if it has a deadline.
    pub fn length(self) -> Option<Duration> {
        match self {
            Self::Session { max_hold } => max_hold,
            Self::Fixed(ttl) => Some(ttl),
        }
    }
}

/// A request for a hold.
#[derive(Clone, Debug)]
pub struct AcquireRequest {
    /// What to hold.
    pub key: Key,
    /// The identity of this call.
    pub token: TokenId,
    /// Who asks. A waiter lives as long as its session, also one for a fixed lifetime.
    pub session: SessionId,
    /// How much of the key.
    pub demand: Demand,
    /// For how long.
    pub lifetime: Lifetime,
    /// Whether to enter the queue if it does not fit now.
    pub enqueue: bool,
    /// After this time of the store the request does nothing ([`AcquireOutcome::Stale`]).
    pub not_after: StoreTime,
    /// Text for people who inspect the key, at most 4 KiB.
    pub metadata: Option<String>,
    /// Where the call comes from, for people who inspect the key, at most 4 KiB.
    pub trace: Option<String>,
}

/// A grant: the key is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granted {
    /// The fence of the hold.
    pub fence: Fence,
    /// How much of its lifetime is left at the time of the answer, if the hold has a deadline.
    pub remaining: Option<Duration>,
}

/// A place in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queued {
    /// How many are before it.
    pub ahead: u32,
    /// Ask again after this time, because then something may have changed that nobody would push: a deadline passes, a
    /// cooldown ends. `None`: at the waiter's own pace.
    pub check_in: Option<Duration>,
    /// Smallest capacity of the live holds, if they share the key. If it is not the capacity of the request, the limits of
    /// the users differ.
    pub in_use: Option<u32>,
}

/// The answer to [`Store::acquire`](crate::Store::acquire).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcquireOutcome {
    /// It is held.
    Granted(Granted),
    /// It waits in the queue.
    Queued(Queued),
    /// It does not fit now, and was not to wait. Nothing was entered.
    Busy {
        /// How long until a deadline or a cooldown may free the key, if one will.
        check_in: Option<Duration>,
        /// As [`Queued::in_use`].
        in_use: Option<u32>,
    },
    /// The store's time is past `not_after`. Nothing was changed.
    Stale,
    /// This token was released by force. It will never be granted again.
    ForceReleased,
    /// The session is dead. Nothing was entered.
    SessionGone,
    /// The queue is full. Nothing was entered.
    QueueFull {
        /// The most waiters that a key may have.
        limit: u32,
    },
}

/// The most waiters that one key may have.
pub const MAX_WAITERS: u32 = 10_000;

/// The answer to [`Store::poll`](crate::Store::poll).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollOutcome {
    /// It is held.
    Granted(Granted),
    /// It waits.
    Queued(Queued),
    /// There is nothing of this token: it was ended, forced out, expired, or lost with its session.
    Gone,
}

/// The answer to [`Store::release`](crate::Store::release) and [`Store::abandon`](crate::Store::abandon).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndOutcome {
    /// A live hold ended.
    Released,
    /// A queue entry ended.
    Dequeued,
    /// There was nothing to end.
    Nothing,
}

/// The answer to [`Store::extend`](crate::Store::extend).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtendOutcome {
    /// The deadline is `ttl` from the time of the answer.
    Extended,
    /// There is no live hold of this token, or it has no deadline.
    NotHeld,
}

/// A request to take up a detached hold.
#[derive(Clone, Debug)]
pub struct AdoptRequest {
    /// The key that is held.
    pub key: Key,
    /// The token that was detached.
    pub from: TokenId,
    /// The token of this call.
    pub to: TokenId,
    /// Who takes it up.
    pub session: SessionId,
    /// After this time of the store the request does nothing ([`AdoptOutcome::Stale`]).
    pub not_after: StoreTime,
}

/// The answer to [`Store::adopt`](crate::Store::adopt).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdoptOutcome {
    /// It is held under the new token.
    Adopted {
        /// The grant, with what is left of its lifetime.
        granted: Granted,
        /// Whether it lives with the session.
        session_bound: bool,
    },
    /// There is no live hold of the old token.
    Gone,
    /// The store's time is past `not_after`. Nothing was changed.
    Stale,
    /// The session is dead.
    SessionGone,
}

/// A request to release by force.
#[derive(Clone, Debug)]
pub struct ForceReleaseRequest {
    /// The key.
    pub key: Key,
    /// The fence of the hold that is to end.
    pub fence: Fence,
    /// Why, for the one who loses it.
    pub reason: String,
}

/// The answer to [`Store::evict`](crate::Store::evict).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForceReleaseOutcome {
    /// The hold ended.
    Released,
    /// No live hold has this fence; these are the fences that are live.
    NoSuchHold {
        /// The fences of the live holds.
        live: Vec<Fence>,
    },
}

/// What is known of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyState {
    /// The key.
    pub key: Key,
    /// Live holds, oldest grant first.
    pub holders: Vec<HolderState>,
    /// The queue, head first.
    pub waiters: Vec<WaiterState>,
    /// The newest fence, if the store still knows it.
    pub last_fence: Option<Fence>,
    /// How long a cooldown still keeps the key closed.
    pub closed_for: Option<Duration>,
}

impl KeyState {
    /// Returns the limit that counts: the smallest capacity of the live holds or, without holds, the capacity of the head of
    /// the queue. `None` if nobody holds the key or waits for it.
    pub fn capacity(&self) -> Option<u32> {
        let of_holds = self.holders.iter().map(|holder| holder.capacity).min();
        of_holds.or_else(|| self.waiters.first().map(|waiter| waiter.capacity))
    }
}

/// What is known of a hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HolderState {
    /// Its fence.
    pub fence: Fence,
    /// Who has it, for people to read.
    pub owner: String,
    /// How many units it takes.
    pub units: u32,
    /// The capacity it was requested with.
    pub capacity: u32,
    /// Whether it ends with its session.
    pub session_bound: bool,
    /// The time since its grant.
    pub age: Duration,
    /// The wall clock at its grant, for display.
    pub since: SystemTime,
    /// What is left of its lifetime in the store, if it has a deadline. Longer than what its holder may still use by the time
    /// that the holder has to stop.
    pub remaining: Option<Duration>,
    /// Text of the holder.
    pub metadata: Option<String>,
    /// Where the call came from.
    pub trace: Option<String>,
}

/// What is known of a waiter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaiterState {
    /// Who waits, for people to read.
    pub owner: String,
    /// How many units it asks for.
    pub units: u32,
    /// The capacity it was requested with.
    pub capacity: u32,
    /// The time since it entered the queue.
    pub age: Duration,
    /// Text of the waiter.
    pub metadata: Option<String>,
    /// Where the call came from.
    pub trace: Option<String>,
}

/// Keys that a listing found: a page of them, or all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// Keys that are held, waited for or closed.
    pub keys: Vec<KeyState>,
    /// Entries that the store holds and this program cannot read.
    pub damaged: Vec<DamagedEntry>,
    /// The cursor of the next page, or `None` after the last one.
    pub next: Option<Cursor>,
}

impl Listing {
    /// Returns all of these pages as one listing: each key once, in order, and without a next page.
    #[must_use]
    pub fn merge(pages: impl IntoIterator<Item = Self>) -> Self {
        let mut all = Self::default();
        for mut page in pages {
            all.keys.append(&mut page.keys);
            all.damaged.append(&mut page.damaged);
        }
        // A store has an order of its own, and may repeat a key.
        all.keys.sort_by(|one, other| one.key.cmp(&other.key));
        all.keys.dedup_by(|one, other| one.key == other.key);
        all.damaged.sort();
        all.damaged.dedup();
        all
    }

    /// Returns whether nothing was found, neither a key nor a damaged entry.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.damaged.is_empty()
    }

    /// Returns the number of keys, damaged entries not included.
    pub fn len(&self) -> usize {
        self.keys.len()
    }
}

/// An entry of a store that cannot be read: somebody else wrote it, or it is broken.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DamagedEntry {
    /// The name under which the store keeps it: [`Key::as_encoded`] if it is the name of a key. Bytes that are not UTF-8 are
    /// replaced.
    pub name: String,
    /// A lowercase fragment that says what is wrong with it.
    pub problem: String,
}

impl DamagedEntry {
    /// An entry of this name with this problem.
    pub fn new(name: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { name: name.into(), problem: problem.into() }
    }
}

/// The place at which a listing goes on. Opaque: only the store that made it can read it, for the same prefix.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cursor(String);

impl Cursor {
    /// A cursor with this text, for authors of stores.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Returns the text that the store gave it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Maximum number of holds and waiters on one page, a last key with many of them aside: a page is answered within the time
/// of one request.
#[cfg(any(feature = "firestore", feature = "redis", feature = "sqlite"))]
pub(crate) const MAX_ROWS_PER_PAGE: usize = 20_000;
