//! The [`Store`] trait, its implementations, and stores that wrap another store.
//!
//! A store executes single atomic operations. It never waits, retries or renews by itself: its callers do. To write a
//! store, implement [`Store`] and run the conformance suite of `stanchion-testkit` on it.
//!
//! # Rules for every operation
//! A session *ends* when it is closed or when it expires: its ttl passes without a renewal or, with
//! [`Liveness::Process`], its process exits.
//!
//! 1. An operation is atomic, and the operations on one key are linearizable. Each reply carries the store's time.
//! 2. Before an operation evaluates a key, the store *reconciles* the key:
//!    - It removes holds whose deadline has passed, session-bound holds of ended sessions, and waiters of ended
//!      sessions.
//!    - Unless a cooldown keeps the key closed, it then grants the head of the queue, as long as the head fits
//!      ([`Demand::fits`]). No waiter overtakes the head. The store notifies the session of such a grant with a
//!      [`Push`]. Until the caller has polled the token, a store may end such a hold together with the caller's session,
//!      also if the hold has a fixed lifetime: otherwise a waiter that died would keep the key for all of it. `Redis`
//!      does so.
//! 3. Only [`acquire`](Store::acquire) may create a hold or a queue entry. It must not do so after `not_after`, for an
//!    ended session, or for a token that was force-released and not yet released or abandoned by its caller.
//! 4. An ended session never comes back. Renewing a session that the store does not have returns
//!    [`RenewOutcome::Gone`].
//! 5. The fences of a key strictly increase over all grants, even if the store deleted the key's record in between. The
//!    operation that grants also mints the fence.
//! 6. All times are the store's. No decision depends on a client's clock.
//! 7. A store and its driver never resend a request whose reply was lost. The caller counts its calls and their
//!    replies: once all calls of a token are answered, a single release is final. A hidden resend would create the hold
//!    again. One call may send two requests if the first reply says that the store entered nothing (`Redis` does so
//!    after it has reaped an expired session). If the caller drops that call, the second request may arrive after a
//!    release that found the first request's hold.
//!
//! # Rules for holds that linger
//! A holder may keep a hold after its use, to use it again without asking the store. [`linger`](Store::linger) marks such
//! a hold, and whoever wants the key recalls it.
//!
//! 8. [`linger`](Store::linger) marks a live hold that is exclusive ([`Demand::is_exclusive`]), ends with its session
//!    and has no deadline, while no request waits for the key. In the same operation the newest fence of the key becomes
//!    at least the clock that mints fences. The caller uses the fences up to that one for its own grants, so the store
//!    never mints one of them again, however the hold ends.
//! 9. An operation that leaves a request at the head of the queue behind a marked hold sends [`Push::Recall`] to the
//!    session of that hold: when the request enters the queue, and with each poll of the head.
//! 10. A caller that [adopts](Store::adopt) a marked hold gets a new fence, and the mark goes: the old holder may have used
//!     fences above the hold's own.
//! 11. [`force_release`](Store::force_release) names a marked hold by the fence of its grant in the store, and
//!     [`inspect`](Store::inspect) shows that fence.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::error::Result;
use crate::key::Key;
use crate::token::{SessionId, TokenId};

#[cfg(any(feature = "redis", feature = "postgres", feature = "firestore"))]
mod backoff;
#[cfg(any(feature = "postgres", feature = "firestore"))]
mod connection_thread;
mod faulty;
#[cfg(feature = "firestore")]
mod firestore;
mod memory;
mod observed;
mod open;
#[cfg(any(feature = "redis", feature = "postgres"))]
mod outage;
#[cfg(feature = "postgres")]
mod postgres;
mod prefixed;
mod push;
#[cfg(feature = "redis")]
mod redis;
#[cfg(feature = "sqlite")]
mod sqlite;
#[cfg(any(feature = "postgres", feature = "firestore"))]
mod streams;
#[cfg(any(feature = "redis", feature = "postgres"))]
mod tls;
mod types;
mod url;

#[cfg(feature = "firestore")]
pub use self::firestore::Firestore;
#[cfg(feature = "postgres")]
pub use self::postgres::Postgres;
#[cfg(feature = "redis")]
pub use self::redis::Redis;
pub use faulty::{Fault, Faults, Faulty, Operation};
pub use memory::Memory;
pub use observed::{Observed, OperationDone};
pub use open::open;
pub(crate) use open::shown_scheme;
pub use prefixed::Prefixed;
pub use push::{GrantStream, Push, PushSender, push_channel};
#[cfg(feature = "sqlite")]
pub use sqlite::Sqlite;
pub use types::*;
pub use url::redacted;

/// Executes single atomic operations on keys, holds, queues and sessions.
///
/// The trait is object-safe. It has no default methods, so that a wrapper cannot forget to forward one.
///
/// # Cancel safety
/// If the future of an operation is dropped, the outcome is unknown: the operation may have happened, may still happen,
/// or may never happen. The caller then retries or cleans up. A store must never leave an operation half done.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug + 'static {
    /// Returns the capabilities of this store.
    fn capabilities(&self) -> Capabilities;

    /// Opens a session. A second call with the same id returns the same session, unless that session has ended.
    async fn open_session(&self, request: OpenSession) -> Result<Reply<OpenOutcome>>;

    /// Renews a session, and returns its force-released tokens that the caller has not released yet.
    ///
    /// Never creates a session, and never revives an ended one.
    async fn renew_session(&self, session: SessionId) -> Result<Reply<RenewOutcome>>;

    /// Closes a session, and removes its session-bound holds and its queue entries. Idempotent.
    async fn close_session(&self, session: SessionId) -> Result<Reply<()>>;

    /// Returns whether a session is open, without renewing or ending it.
    ///
    /// Returns `false` for a session that was never opened. From then on a store may refuse to open that session, so
    /// that the answer `false` stays true.
    async fn session_lives(&self, session: SessionId) -> Result<Reply<bool>>;

    /// Requests a hold. Idempotent by token: a second call returns the same grant with the same fence.
    async fn acquire(&self, request: AcquireRequest) -> Result<Reply<AcquireOutcome>>;

    /// Returns the state of each token of a key, in the order of `tokens`. Never creates anything.
    ///
    /// A poll is one operation for any number of tokens: the store reconciles the key once, and all outcomes describe
    /// that moment. A handle polls a key once for all of its calls that wait for the key. For this reason the cost of a
    /// poll must not grow with the number of tokens times the length of the queue.
    async fn poll(&self, key: &Key, tokens: &[TokenId]) -> Result<Reply<Vec<PollOutcome>>>;

    /// Removes the hold or the queue entry of a token that its caller gave up on, if there is one. Idempotent.
    async fn abandon(&self, key: &Key, token: TokenId) -> Result<Reply<EndOutcome>>;

    /// Releases a hold, and closes the key for `cooldown`. Idempotent: a second call returns [`EndOutcome::Nothing`].
    ///
    /// If the token waits in the queue, this call removes its queue entry without a cooldown, as
    /// [`abandon`](Store::abandon) does.
    async fn release(&self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<Reply<EndOutcome>>;

    /// Sets the deadline of a hold to `ttl` from now. Returns [`ExtendOutcome::NotHeld`] for a hold without a deadline.
    async fn extend(&self, key: &Key, token: TokenId, ttl: Duration) -> Result<Reply<ExtendOutcome>>;

    /// Marks a hold as lingering (rule 8), so that its holder may use it again without a request until it is recalled.
    ///
    /// Never creates or ends anything, and sends no push. Repeating it is harmless, however late a repeat arrives: it
    /// confirms that the hold is live, and raises the newest fence. A store whose sessions do not hear of a recall
    /// answers [`LingerOutcome::Wanted`].
    async fn linger(&self, key: &Key, token: TokenId) -> Result<Reply<LingerOutcome>>;

    /// Adopts a detached hold: its token becomes `to`, and a session-bound hold moves to `session`.
    ///
    /// The deadline stays the same, and so does the fence unless the hold lingered (rule 10). The operation is a compare-and-set on `from`, so only one of two
    /// concurrent callers adopts the hold. Idempotent by `to`.
    async fn adopt(&self, request: AdoptRequest) -> Result<Reply<AdoptOutcome>>;

    /// Releases the hold of `key` with this fence, no matter which session has it, and raises the key's fence.
    ///
    /// The operation is a compare-and-set on the fence. The store notifies the session that lost the hold: at once with
    /// a [`Push`], and with each renewal until the caller releases or abandons the token.
    async fn force_release(&self, request: ForceReleaseRequest) -> Result<Reply<ForceReleaseOutcome>>;

    /// Returns the state of one key when the store was queried. It may have changed since.
    async fn inspect(&self, key: &Key) -> Result<Reply<KeyState>>;

    /// Returns one page of the keys whose [`Key::as_encoded`] begins with `prefix` and that have a holder, a waiter or
    /// a running cooldown.
    ///
    /// - The first call passes no cursor, and each further call passes [`Listing::next`]. The listing is complete when
    ///   a page has no next cursor. A page may be empty and still have a next cursor.
    /// - A page does a bounded amount of work: it reads about `limit` keys, at least one, and may return a few more
    ///   than `limit`.
    /// - Keys come in the store's order. A key that is in use during the whole listing is on at least one page. Several
    ///   pages are not a snapshot.
    /// - The operation only reads, so it need not reconcile keys (rule 2). It leaves out holds and waiters of ended
    ///   sessions, and holds whose deadline has passed.
    /// - Entries that cannot be read are named in [`Listing::damaged`]. They do not stop the listing.
    async fn list(&self, prefix: &str, cursor: Option<&Cursor>, limit: usize) -> Result<Reply<Listing>>;

    /// Returns the push stream of a session. The caller calls this once per session, before it opens the session.
    ///
    /// Pushes are hints: a lost push costs time, never correctness. If the stream ends early, the caller polls instead.
    fn grants(&self, session: SessionId) -> GrantStream;
}

/// Forwards every operation to the shared store.
#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<S: Store + ?Sized> Store for Arc<S> {
    fn capabilities(&self) -> Capabilities {
        (**self).capabilities()
    }
    async fn open_session(&self, request: OpenSession) -> Result<Reply<OpenOutcome>> {
        (**self).open_session(request).await
    }
    async fn renew_session(&self, session: SessionId) -> Result<Reply<RenewOutcome>> {
        (**self).renew_session(session).await
    }
    async fn close_session(&self, session: SessionId) -> Result<Reply<()>> {
        (**self).close_session(session).await
    }
    async fn session_lives(&self, session: SessionId) -> Result<Reply<bool>> {
        (**self).session_lives(session).await
    }
    async fn acquire(&self, request: AcquireRequest) -> Result<Reply<AcquireOutcome>> {
        (**self).acquire(request).await
    }
    async fn poll(&self, key: &Key, tokens: &[TokenId]) -> Result<Reply<Vec<PollOutcome>>> {
        (**self).poll(key, tokens).await
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
    async fn linger(&self, key: &Key, token: TokenId) -> Result<Reply<LingerOutcome>> {
        (**self).linger(key, token).await
    }
    async fn adopt(&self, request: AdoptRequest) -> Result<Reply<AdoptOutcome>> {
        (**self).adopt(request).await
    }
    async fn force_release(&self, request: ForceReleaseRequest) -> Result<Reply<ForceReleaseOutcome>> {
        (**self).force_release(request).await
    }
    async fn inspect(&self, key: &Key) -> Result<Reply<KeyState>> {
        (**self).inspect(key).await
    }
    async fn list(&self, prefix: &str, cursor: Option<&Cursor>, limit: usize) -> Result<Reply<Listing>> {
        (**self).list(prefix, cursor, limit).await
    }
    fn grants(&self, session: SessionId) -> GrantStream {
        (**self).grants(session)
    }
}
