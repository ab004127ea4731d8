//! The store trait: where the truth is kept.
//!
//! A store does single atomic steps. It never retries, waits or renews: waiting, repeating and liveness have owners of
//! their own. To write a store, implement [`Store`] and run the conformance suite of `stanchion-testkit` on it.
//!
//! # Rules that every step keeps
//! 1. A step is atomic, and steps on one key are linearizable. Its answer tells the store's time.
//! 2. Before a step looks at a key it settles it: holds whose session is dead or whose deadline has passed are gone,
//!    waiters whose session is dead are gone, and while the head of the queue fits, and the key is not closed by a
//!    cooldown, it is granted. A grant made this way is told to its session by a [`Push`].
//! 3. Only [`acquire`](Store::acquire) may create a hold or a queue entry; only until `not_after`; never for a session
//!    that is dead or for a token that was forced out.
//! 4. A dead session never lives again; a session that a beat names and that is not there is [`BeatOutcome::Gone`].
//! 5. Fences of a key strictly increase over all grants, also over those of deleted or forgotten records. The fence is
//!    minted in the step that grants.
//! 6. Times are the store's: the client's clock decides nothing.
//! 7. One call, one request: a store and its driver never send a request again by themselves. The caller counts which of
//!    its requests were answered, and when all were, one answer ends a token. A repeat that it does not know of would
//!    create the hold anew.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::error::{Error, ErrorKind, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::token::{SessionId, TokenId};

mod faulty;
mod memory;
#[cfg(feature = "sqlite")]
mod sqlite;

pub use faulty::{Fault, Faults, Faulty, Step};
pub use memory::Memory;
#[cfg(feature = "sqlite")]
pub use sqlite::Sqlite;

/// A store: single atomic steps on keys, holds, queues and sessions.
///
/// Object-safe, and without default methods, so that a wrapper cannot forget one.
///
/// # Cancel safety
/// A dropped future of any step leaves its outcome unknown: the step may have happened, may still happen, or may not.
/// The caller repeats or cleans up; the store must not leave a half-done step.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug + 'static {
    /// What this store can do.
    fn capabilities(&self) -> Capabilities;

    /// Opens a session. Repeating it with the same id is the same session, unless that has ended.
    async fn open_session(&self, request: OpenSession) -> Result<Reply<OpenOutcome>>;

    /// Renews a session and tells what it has lost by force since. Never creates or revives one.
    async fn beat(&self, session: SessionId) -> Result<Reply<BeatOutcome>>;

    /// Ends a session with everything that depends on it: its session holds, its queue entries. Idempotent.
    async fn close_session(&self, session: SessionId) -> Result<Reply<()>>;

    /// Asks for a hold. Idempotent by token: asked again it gives the same answer, the same fence included.
    async fn acquire(&self, request: AcquireRequest) -> Result<Reply<AcquireOutcome>>;

    /// Asks what became of a token. Never creates anything.
    async fn poll(&self, key: &Key, token: TokenId) -> Result<Reply<PollOutcome>>;

    /// Ends a token that its caller gave up on, whatever it had: a hold, a queue entry, nothing. Idempotent.
    async fn abandon(&self, key: &Key, token: TokenId) -> Result<Reply<EndOutcome>>;

    /// Ends a hold and closes the key for `cooldown`. Idempotent: the second time there is nothing to end.
    ///
    /// Like [`abandon`](Store::abandon) it ends a queue entry of the token too, then without a cooldown.
    async fn release(&self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<Reply<EndOutcome>>;

    /// Sets the deadline of a hold to `ttl` from now. A hold without a deadline is [`ExtendOutcome::NotHeld`].
    async fn extend(&self, key: &Key, token: TokenId, ttl: Duration) -> Result<Reply<ExtendOutcome>>;

    /// Takes up a detached hold: its token becomes `to`, and a hold bound to a session moves to `session`. The fence
    /// and the deadline stay. Compare-and-set on `from`: of two that try, one gets it. Idempotent by `to`.
    async fn adopt(&self, request: AdoptRequest) -> Result<Reply<AdoptOutcome>>;

    /// Ends the hold of `key` that has this fence, whoever has it; compare-and-set on the fence. Raises the key's
    /// fence. The session that lost it is told by a [`Push`] at once and by its beats until the token is ended.
    async fn evict(&self, request: EvictRequest) -> Result<Reply<EvictOutcome>>;

    /// What is known of one key. Stale when read.
    async fn inspect(&self, key: &Key) -> Result<Reply<KeyState>>;

    /// Keys that are held, waited for or closed, in order of [`Key::as_encoded`], that begin with `prefix` and come
    /// after `after`; at most `limit`. Not one snapshot over several pages.
    async fn list(&self, prefix: &str, after: Option<&Key>, limit: usize) -> Result<Reply<Vec<KeyState>>>;

    /// The push stream of a session. Called once per session, before it is opened. Pushes are hints: a lost one costs
    /// time, never correctness. The stream may end early; then the caller lives by polling.
    fn grants(&self, session: SessionId) -> GrantStream;
}

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
}

impl Capabilities {
    /// The capabilities of a fair store with push and sessions that must beat.
    pub const fn new(name: &'static str) -> Self {
        Self { name, liveness: Liveness::Beat, fair: true, push: true }
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
    Beat,
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

/// The answer to [`Store::open_session`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenOutcome {
    /// It is open.
    Opened,
    /// A session of this id has ended. Choose another id.
    Gone,
}

/// The answer to [`Store::beat`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BeatOutcome {
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

/// How much of a key a hold takes. A request fits when the units of the live holds and its own are at most `capacity`.
///
/// | primitive | units | capacity |
/// |---|---|---|
/// | mutex | 1 | 1 |
/// | semaphore of n, taking k | k | n |
/// | read | 1 | [`Demand::MAX`] |
/// | write | [`Demand::MAX`] | [`Demand::MAX`] |
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
    /// Alone, on a key that readers share.
    pub const WRITE: Self = Self { units: Self::MAX, capacity: Self::MAX };

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
}

/// How long a hold lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Term {
    /// As long as the session lives, and never longer than `max_hold` from the grant if that is set.
    Session {
        /// A deadline of its own, counted from the grant.
        max_hold: Option<Duration>,
    },
    /// This long from the grant, whatever becomes of the session once it is granted.
    Fixed(Duration),
}

impl Term {
    /// The length of the term from its grant, if it has a deadline.
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
    /// Who asks. A waiter lives as long as its session, also one for a fixed term.
    pub session: SessionId,
    /// How much of the key.
    pub demand: Demand,
    /// For how long.
    pub term: Term,
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
    /// How much of its term is left at the time of the answer, if the hold has a deadline.
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
}

/// The answer to [`Store::acquire`].
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
    },
    /// The store's time is past `not_after`. Nothing was changed.
    Stale,
    /// This token was released by force. It will never be granted again.
    Forced,
    /// The session is dead. Nothing was entered.
    SessionGone,
    /// The key is in use with another capacity. Nothing was entered.
    CapacityMismatch {
        /// The capacity that the holds and waiters of the key have.
        in_use: u32,
    },
    /// The queue is full. Nothing was entered.
    QueueFull {
        /// The most waiters that a key may have.
        limit: u32,
    },
}

/// The most waiters that one key may have.
pub const MAX_WAITERS: u32 = 10_000;

/// The answer to [`Store::poll`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollOutcome {
    /// It is held.
    Granted(Granted),
    /// It waits.
    Queued(Queued),
    /// There is nothing of this token: it was ended, forced out, expired, or lost with its session.
    Gone,
}

/// The answer to [`Store::release`] and [`Store::abandon`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndOutcome {
    /// A live hold ended.
    Released,
    /// A queue entry ended.
    Dequeued,
    /// There was nothing to end.
    Nothing,
}

/// The answer to [`Store::extend`].
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

/// The answer to [`Store::adopt`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdoptOutcome {
    /// It is held under the new token.
    Adopted {
        /// The grant, with what is left of its term.
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
pub struct EvictRequest {
    /// The key.
    pub key: Key,
    /// The fence of the hold that is to end.
    pub fence: Fence,
    /// Why, for the one who loses it.
    pub reason: String,
}

/// The answer to [`Store::evict`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EvictOutcome {
    /// The hold ended.
    Evicted,
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
    /// The capacity that its holds and waiters have, if there are any.
    pub capacity: Option<u32>,
    /// Live holds, oldest grant first.
    pub holders: Vec<HolderState>,
    /// The queue, head first.
    pub waiters: Vec<WaiterState>,
    /// The newest fence, if the store still knows it.
    pub last_fence: Option<Fence>,
    /// How long a cooldown still keeps the key closed.
    pub closed_for: Option<Duration>,
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
    /// Whether it ends with its session.
    pub session_bound: bool,
    /// The time since its grant.
    pub age: Duration,
    /// The wall clock at its grant, for display.
    pub since: SystemTime,
    /// What is left of its term, if it has a deadline.
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
    /// The time since it entered the queue.
    pub age: Duration,
    /// Text of the waiter.
    pub metadata: Option<String>,
    /// Where the call came from.
    pub trace: Option<String>,
}

/// A message to a session. A hint: it may come late, twice or never.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Push {
    /// A waiting token was granted.
    Granted {
        /// The key.
        key: Key,
        /// The token.
        token: TokenId,
        /// The fence of the hold.
        fence: Fence,
    },
    /// A hold was released by force.
    Forced(LostToken),
    /// Something may have changed for this waiting token: ask.
    Recheck {
        /// The token.
        token: TokenId,
    },
    /// Messages may have been lost: ask for every waiting token.
    RecheckAll,
}

/// The push stream of a session.
#[derive(Debug)]
pub struct GrantStream {
    pushes: mpsc::UnboundedReceiver<Push>,
    /// While set, pushes get lost: for tests.
    lossy: Option<Arc<AtomicBool>>,
}

/// The sending half of a [`GrantStream`], for store authors. Clones send to the same stream.
#[derive(Clone, Debug)]
pub struct PushSender(mpsc::UnboundedSender<Push>);

/// A stream and its sending half.
pub fn push_channel() -> (PushSender, GrantStream) {
    let (sender, receiver) = mpsc::unbounded_channel();
    (PushSender(sender), GrantStream { pushes: receiver, lossy: None })
}

impl PushSender {
    /// Sends a push, from any thread, without blocking. Whether somebody still listens does not matter.
    pub fn send(&self, push: Push) {
        let _nobody_listens = self.0.send(push);
    }
}

impl GrantStream {
    /// The next push; `None` when the stream has ended.
    ///
    /// # Cancel safety
    /// A dropped future loses no push.
    pub async fn next(&mut self) -> Option<Push> {
        std::future::poll_fn(|context| self.poll_push(context)).await
    }

    fn lossy(mut self, lossy: Arc<AtomicBool>) -> Self {
        self.lossy = Some(lossy);
        self
    }

    fn poll_push(&mut self, context: &mut Context<'_>) -> Poll<Option<Push>> {
        loop {
            let push = std::task::ready!(self.pushes.poll_recv(context));
            let lost = self.lossy.as_ref().is_some_and(|lossy| lossy.load(Ordering::SeqCst));
            if push.is_none() || !lost {
                return Poll::Ready(push);
            }
        }
    }
}

impl futures_core::Stream for GrantStream {
    type Item = Push;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Push>> {
        self.poll_push(context)
    }
}

/// A shared store is a store.
#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<S: Store + ?Sized> Store for Arc<S> {
    fn capabilities(&self) -> Capabilities {
        (**self).capabilities()
    }
    async fn open_session(&self, request: OpenSession) -> Result<Reply<OpenOutcome>> {
        (**self).open_session(request).await
    }
    async fn beat(&self, session: SessionId) -> Result<Reply<BeatOutcome>> {
        (**self).beat(session).await
    }
    async fn close_session(&self, session: SessionId) -> Result<Reply<()>> {
        (**self).close_session(session).await
    }
    async fn acquire(&self, request: AcquireRequest) -> Result<Reply<AcquireOutcome>> {
        (**self).acquire(request).await
    }
    async fn poll(&self, key: &Key, token: TokenId) -> Result<Reply<PollOutcome>> {
        (**self).poll(key, token).await
    }
    async fn abandon(&self, key: &Key, token: TokenId) -> Result<Reply<EndOutcome>> {
        (**self).abandon(key, token).await
    }
    async fn release(&self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<Reply<EndOutcome>> {
        (**self).release(key, token, cooldown).await
    }
    async fn extend(&self, key: &Key, token: TokenId, ttl: Duration) -> Result<Reply<ExtendOutcome>> {
        (**self).extend(key, token, ttl).await
    }
    async fn adopt(&self, request: AdoptRequest) -> Result<Reply<AdoptOutcome>> {
        (**self).adopt(request).await
    }
    async fn evict(&self, request: EvictRequest) -> Result<Reply<EvictOutcome>> {
        (**self).evict(request).await
    }
    async fn inspect(&self, key: &Key) -> Result<Reply<KeyState>> {
        (**self).inspect(key).await
    }
    async fn list(&self, prefix: &str, after: Option<&Key>, limit: usize) -> Result<Reply<Vec<KeyState>>> {
        (**self).list(prefix, after, limit).await
    }
    fn grants(&self, session: SessionId) -> GrantStream {
        (**self).grants(session)
    }
}
