//! The requests and replies of the [`Store`](crate::Store) operations.

use std::time::{Duration, SystemTime};

use crate::error::{Error, ErrorKind, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::token::{SessionId, TokenId};

/// A point on a store's clock, in microseconds. Compare it only with times of the same store.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct StoreTime(u64);

impl StoreTime {
    /// Creates a time from its microseconds.
    pub const fn from_micros(micros: u64) -> Self {
        Self(micros)
    }

    /// Returns the microseconds of this time.
    pub const fn as_micros(self) -> u64 {
        self.0
    }

    /// Returns the time that is `span` later.
    #[must_use]
    pub fn after(self, span: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(span.as_micros()).unwrap_or(u64::MAX)))
    }

    /// Returns the duration from `earlier` to this time, or zero if `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

/// The outcome of an operation, with the store's time at which the store executed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply<T> {
    /// The store's time.
    pub time: StoreTime,
    /// The outcome of the operation.
    pub outcome: T,
}

/// The capabilities of a store. The conformance suite tests each capability that a store declares here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// The store's name in errors and events.
    pub name: &'static str,
    /// The condition under which a session stays open.
    pub liveness: Liveness,
    /// Whether waiters are granted in the order of their requests.
    pub fair: bool,
    /// Whether the store notifies a waiter of its grant. Without this capability waiters poll.
    pub push: bool,
    /// Whether only the store itself can send a push to a session. Without this capability the caller confirms each
    /// pushed grant with a poll, so that a client that may only send messages cannot fake a lock.
    pub authentic_push: bool,
}

impl Capabilities {
    /// Returns the capabilities of a fair store whose sessions must be renewed and whose pushes other clients can send
    /// too.
    pub const fn new(name: &'static str) -> Self {
        Self { name, liveness: Liveness::Renewal, fair: true, push: true, authentic_push: false }
    }

    /// Declares that only the store can send pushes.
    #[must_use]
    pub const fn with_authentic_push(mut self) -> Self {
        self.authentic_push = true;
        self
    }

    /// Sets the kind of liveness.
    #[must_use]
    pub const fn with_liveness(mut self, liveness: Liveness) -> Self {
        self.liveness = liveness;
        self
    }
}

/// The condition under which a session stays open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Liveness {
    /// The session expires when its ttl has passed since its last renewal.
    Renewal,
    /// The session expires when its process exits, with or without renewals. The store notices the exit at once.
    Process,
}

/// A request to open a session.
#[derive(Clone, Debug)]
pub struct OpenSession {
    /// The id of the session, chosen by the client.
    pub session: SessionId,
    /// Time after which the session expires without a renewal. Stores with [`Liveness::Process`] ignore it.
    pub ttl: Duration,
    /// A label for people to read: host, process, program.
    pub owner: String,
}

/// The answer to [`Store::open_session`](crate::Store::open_session).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenOutcome {
    /// The session is open.
    Opened,
    /// A session of this id has ended. Choose another id.
    Gone,
}

/// The answer to [`Store::renew_session`](crate::Store::renew_session).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RenewOutcome {
    /// The session is open.
    Alive {
        /// Tokens of the session that were force-released and that their caller has not released or abandoned yet.
        lost: Vec<LostToken>,
    },
    /// The session has ended or was never opened.
    Gone,
}

/// A hold that was force-released.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LostToken {
    /// The key that was held.
    pub key: Key,
    /// The token of the hold.
    pub token: TokenId,
    /// The reason from the [`ForceReleaseRequest`].
    pub reason: String,
}

/// The share of a key that a hold takes.
///
/// | primitive | units | capacity |
/// |---|---|---|
/// | lock, write | 1 | 1 |
/// | semaphore of n, taking k | k | n |
/// | read | 1 | [`Demand::MAX`] |
///
/// A request fits if the units of the live holds plus its own units are at most the smallest capacity among the live
/// holds and the request ([`Demand::fits`]). Two rules follow:
/// - A request for its whole capacity is exclusive ([`Demand::is_exclusive`]), for any capacity. It fits only if the
///   key has no holder, and no other request fits while it is held.
/// - Users of a key need not agree on its capacity. The smallest capacity counts until the holds with that capacity are
///   released.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Demand {
    units: u32,
    capacity: u32,
}

impl Demand {
    /// Maximum number of units, and maximum capacity: 2^31 − 1.
    pub const MAX: u32 = i32::MAX as u32;
    /// The demand of an exclusive lock.
    pub const MUTEX: Self = Self { units: 1, capacity: 1 };
    /// The demand of a read lock, which other readers can share.
    pub const READ: Self = Self { units: 1, capacity: Self::MAX };
    /// The demand of a write lock. It equals [`MUTEX`](Self::MUTEX), because an exclusive request excludes readers too.
    pub const WRITE: Self = Self::MUTEX;

    /// Creates a demand for `units` of a key with this `capacity`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] unless `1 ≤ units ≤ capacity ≤ 2^31 − 1`.
    pub fn new(units: u32, capacity: u32) -> Result<Self> {
        if units == 0 || units > capacity || capacity > Self::MAX {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!(
                    "{units} units of a capacity of {capacity} are invalid: the units must be between 1 and the \
                     capacity, and the capacity at most {}",
                    Self::MAX
                ),
            ));
        }
        Ok(Self { units, capacity })
    }

    /// Returns the number of units that the hold takes.
    pub const fn units(self) -> u32 {
        self.units
    }

    /// Returns the capacity that the caller expects the key to have.
    pub const fn capacity(self) -> u32 {
        self.capacity
    }

    /// Returns whether the demand takes the whole key, even if other users expect another capacity.
    pub const fn is_exclusive(self) -> bool {
        self.units == self.capacity
    }

    /// Returns whether a request with this demand fits next to the live holds. Every store follows this rule.
    pub fn fits(self, held: impl IntoIterator<Item = Self>) -> bool {
        let add =
            |(used, capacity): (u64, u32), hold: Self| (used + u64::from(hold.units), capacity.min(hold.capacity));
        let (used, capacity) = held.into_iter().fold((u64::from(self.units), self.capacity), add);
        used <= u64::from(capacity)
    }
}

/// The lifetime of a hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// The hold ends with its session, or `max_hold` after the grant if that comes first.
    Session {
        /// Maximum time that the hold lasts from its grant.
        max_hold: Option<Duration>,
    },
    /// The hold ends this long after its grant, even if the session ends before.
    Fixed(Duration),
}

impl Lifetime {
    /// Replaces the length of the lifetime, if it has one, with the result of `change`.
    pub(crate) fn map(self, change: impl FnOnce(Duration) -> Duration) -> Self {
        match self {
            Self::Session { max_hold } => Self::Session { max_hold: max_hold.map(change) },
            Self::Fixed(ttl) => Self::Fixed(change(ttl)),
        }
    }

    /// Returns the length of the lifetime, counted from the grant, or `None` without a deadline.
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
    /// The key to hold.
    pub key: Key,
    /// The token that identifies this call.
    pub token: TokenId,
    /// The session of the caller. A waiter is removed when its session ends, even if it requests a fixed lifetime.
    pub session: SessionId,
    /// The share of the key to take.
    pub demand: Demand,
    /// The lifetime of the hold.
    pub lifetime: Lifetime,
    /// Whether to enter the queue if the request does not fit now.
    pub enqueue: bool,
    /// The store's time after which the request does nothing ([`AcquireOutcome::Stale`]).
    pub not_after: StoreTime,
    /// Text for people who inspect the key, at most 4 KiB.
    pub metadata: Option<String>,
    /// The trace context of the call, for people who inspect the key, at most 4 KiB.
    pub trace: Option<String>,
}

/// A grant of a hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granted {
    /// The fence of the hold.
    pub fence: Fence,
    /// Time from the reply to the deadline of the hold, if it has one.
    pub remaining: Option<Duration>,
}

/// A place in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queued {
    /// Number of waiters before this one.
    pub ahead: u32,
    /// Time after which the waiter polls again, because then a deadline passes or a cooldown ends, and the store sends
    /// no push for that. With `None` the waiter uses its own poll interval.
    pub check_in: Option<Duration>,
    /// Smallest capacity of the live holds, if they share the key. If it is not the capacity of the request, the users
    /// of the key disagree on its capacity.
    pub in_use: Option<u32>,
}

/// The answer to [`Store::acquire`](crate::Store::acquire).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcquireOutcome {
    /// The token holds the key.
    Granted(Granted),
    /// The token waits in the queue.
    Queued(Queued),
    /// The request does not fit now, and `enqueue` is `false`. The store entered nothing.
    Busy {
        /// Time until a deadline or the end of a cooldown may free the key, if the key has one.
        check_in: Option<Duration>,
        /// Smallest capacity of the live holds, if they share the key ([`Queued::in_use`]).
        in_use: Option<u32>,
        /// Whether the key's hold lingers: its holder may not be using it, and gives it up for a request that waits.
        lingers: bool,
    },
    /// The store's time is past `not_after`. The store changed nothing.
    Stale,
    /// The token was force-released. The store never grants it again.
    ForceReleased,
    /// The session has ended. The store entered nothing.
    SessionGone,
    /// The queue is full. The store entered nothing.
    QueueFull {
        /// Maximum number of waiters of a key.
        limit: u32,
    },
}

/// Maximum number of waiters of one key.
pub const MAX_WAITERS: u32 = 10_000;

/// The answer to [`Store::poll`](crate::Store::poll).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollOutcome {
    /// The token holds the key.
    Granted(Granted),
    /// The token waits in the queue.
    Queued(Queued),
    /// The token has neither a hold nor a queue entry: it was released, force-released, expired, or lost with its
    /// session.
    Gone,
}

/// The answer to [`Store::release`](crate::Store::release) and [`Store::abandon`](crate::Store::abandon).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndOutcome {
    /// The store released a live hold.
    Released,
    /// The store removed a queue entry.
    Dequeued,
    /// The token had neither a hold nor a queue entry.
    Nothing,
}

/// The answer to [`Store::extend`](crate::Store::extend).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtendOutcome {
    /// The deadline is now `ttl` after the time of the reply.
    Extended,
    /// The token has no live hold, or its hold has no deadline.
    NotHeld,
}

/// The answer to [`Store::linger`](crate::Store::linger).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LingerOutcome {
    /// The hold is live and marked.
    Lingers {
        /// The fence of the hold. If the holder knows another one, the store granted the token again after it lost its
        /// data, perhaps after other holders: the hold that the holder knows is lost.
        fence: Fence,
        /// The newest fence of the key. The holder may use the fences above its last one, up to this one.
        up_to: Fence,
    },
    /// The hold is live and not marked: a request waits for the key, or the hold cannot linger.
    Wanted,
    /// The token has no live hold.
    Gone,
}

/// A request to adopt a detached hold.
#[derive(Clone, Debug)]
pub struct AdoptRequest {
    /// The key of the hold.
    pub key: Key,
    /// The detached token.
    pub from: TokenId,
    /// The token of this call.
    pub to: TokenId,
    /// The session that adopts the hold.
    pub session: SessionId,
    /// The store's time after which the request does nothing ([`AdoptOutcome::Stale`]).
    pub not_after: StoreTime,
}

/// The answer to [`Store::adopt`](crate::Store::adopt).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdoptOutcome {
    /// The new token holds the key.
    Adopted {
        /// The grant, with the remaining lifetime.
        granted: Granted,
        /// Whether the hold ends with the session.
        session_bound: bool,
    },
    /// The old token has no live hold.
    Gone,
    /// The store's time is past `not_after`. The store changed nothing.
    Stale,
    /// The session has ended.
    SessionGone,
}

/// A request to force-release a hold.
#[derive(Clone, Debug)]
pub struct ForceReleaseRequest {
    /// The key.
    pub key: Key,
    /// The fence of the hold to release.
    pub fence: Fence,
    /// The reason that the holder gets to read.
    pub reason: String,
}

/// The answer to [`Store::force_release`](crate::Store::force_release).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForceReleaseOutcome {
    /// The store released the hold.
    Released,
    /// No live hold of the key has this fence.
    NoSuchHold {
        /// The fences of the live holds.
        live: Vec<Fence>,
    },
}

/// The state of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyState {
    /// The key.
    pub key: Key,
    /// Live holds, oldest grant first.
    pub holders: Vec<HolderState>,
    /// The queue, head first.
    pub waiters: Vec<WaiterState>,
    /// The newest fence, if the store still has it.
    pub last_fence: Option<Fence>,
    /// Time until the cooldown of the key ends, if one is running.
    pub closed_for: Option<Duration>,
}

impl KeyState {
    /// Returns the capacity that counts: the smallest capacity of the live holds or, without holds, the capacity of the
    /// head of the queue. Returns `None` if the key has neither a holder nor a waiter.
    pub fn capacity(&self) -> Option<u32> {
        let of_holds = self.holders.iter().map(|holder| holder.capacity).min();
        of_holds.or_else(|| self.waiters.first().map(|waiter| waiter.capacity))
    }
}

/// The state of a hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HolderState {
    /// The fence of the hold.
    pub fence: Fence,
    /// The label of the holder's session.
    pub owner: String,
    /// Number of units that the hold takes.
    pub units: u32,
    /// The capacity in the holder's request.
    pub capacity: u32,
    /// Whether the hold ends with its session.
    pub session_bound: bool,
    /// Time since the grant.
    pub age: Duration,
    /// The wall-clock time of the grant, for display.
    pub since: SystemTime,
    /// Time until the store's deadline of the hold, if it has one. The holder must stop earlier, so its own remaining
    /// time is shorter.
    pub remaining: Option<Duration>,
    /// The metadata of the holder's request.
    pub metadata: Option<String>,
    /// The trace context of the holder's request.
    pub trace: Option<String>,
    /// Whether the holder may keep the hold without using it, until it is recalled. Its grants in its own process have
    /// higher fences than [`fence`](Self::fence).
    pub lingers: bool,
}

/// The state of a waiter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaiterState {
    /// The label of the waiter's session.
    pub owner: String,
    /// Number of units that the waiter requests.
    pub units: u32,
    /// The capacity in the waiter's request.
    pub capacity: u32,
    /// Time since the waiter entered the queue.
    pub age: Duration,
    /// The metadata of the waiter's request.
    pub metadata: Option<String>,
    /// The trace context of the waiter's request.
    pub trace: Option<String>,
}

/// The keys of a listing: one page of them, or all merged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// Keys that have a holder, a waiter or a running cooldown.
    pub keys: Vec<KeyState>,
    /// Entries of the store that this program cannot read.
    pub damaged: Vec<DamagedEntry>,
    /// The cursor of the next page, or `None` after the last one.
    pub next: Option<Cursor>,
}

impl Listing {
    /// Merges pages into one listing that has each key once, in order, and no next page.
    #[must_use]
    pub fn merge(pages: impl IntoIterator<Item = Self>) -> Self {
        let mut all = Self::default();
        for mut page in pages {
            all.keys.append(&mut page.keys);
            all.damaged.append(&mut page.damaged);
        }
        // Each store has its own order, and may repeat a key.
        all.keys.sort_by(|one, other| one.key.cmp(&other.key));
        all.keys.dedup_by(|one, other| one.key == other.key);
        all.damaged.sort();
        all.damaged.dedup();
        all
    }

    /// Returns whether the listing has neither a key nor a damaged entry.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.damaged.is_empty()
    }

    /// Returns the number of keys, without the damaged entries.
    pub fn len(&self) -> usize {
        self.keys.len()
    }
}

/// An entry of a store that cannot be read, because it is damaged or another program wrote it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DamagedEntry {
    /// The name of the entry in the store: [`Key::as_encoded`] if it is the name of a key. Bytes that are not UTF-8 are
    /// replaced.
    pub name: String,
    /// A lowercase fragment that describes the problem.
    pub problem: String,
}

impl DamagedEntry {
    /// Creates an entry with this name and this problem.
    pub fn new(name: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { name: name.into(), problem: problem.into() }
    }
}

/// The place at which a listing continues.
///
/// A cursor is opaque: only the store that created it can read it, and only for the prefix of that listing.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cursor(String);

impl Cursor {
    /// Creates a cursor with this text, for authors of stores.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Returns the text of the cursor.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Maximum number of holds and waiters on one page, apart from the last key of the page. The limit keeps the time for a
/// page within the time limit of one request.
#[cfg(any(feature = "firestore", feature = "redis", feature = "sqlite"))]
pub(crate) const MAX_ROWS_PER_PAGE: usize = 20_000;
