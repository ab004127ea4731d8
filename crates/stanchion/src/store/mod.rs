//! The store trait: where the truth is kept.
//!
//! A store does single atomic steps. It never retries, waits or renews: waiting, repeating and liveness have owners of
//! their own. To write a store, implement [`Store`] and run the conformance suite of `stanchion-testkit` on it.
//!
//! # Rules that every step keeps
//! 1. A step is atomic, and steps on one key are linearizable. Its answer tells the store's time.
//! 2. Before a step looks at a key it settles it: holds whose session is dead or whose deadline has passed are gone,
//!    waiters whose session is dead are gone, and while the head of the queue fits ([`Demand::fits`]), and the key is not
//!    closed by a cooldown, it is granted. Nobody passes the head. A grant made this way is told to its session by a [`Push`].
//! 3. Only [`acquire`](Store::acquire) may create a hold or a queue entry; only until `not_after`; never for a session
//!    that is dead, or for a token that was forced out and has not been ended.
//! 4. A dead session never lives again; a session that a beat names and that is not there is [`RenewOutcome::Gone`].
//! 5. Fences of a key strictly increase over all grants, also over those of deleted or forgotten records. The fence is
//!    minted in the step that grants.
//! 6. Times are the store's: the client's clock decides nothing.
//! 7. A store and its driver never send a request again after its answer was lost. The caller counts which of its calls
//!    were answered, and when all were, one answer ends a token. A repeat that it does not know of would create the hold
//!    again. One call may ask twice if the first answer says that nothing was entered (`Redis` does, after it has reaped a
//!    dead session): if that call is given up, the second request may come after an end that found the first one's hold.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::error::Result;
use crate::key::Key;
use crate::token::{SessionId, TokenId};

mod faulty;
#[cfg(feature = "firestore")]
mod firestore;
mod memory;
mod observed;
#[cfg(feature = "postgres")]
mod postgres;
mod prefixed;
mod push;
#[cfg(feature = "redis")]
mod redis;
#[cfg(feature = "sqlite")]
mod sqlite;
#[cfg(feature = "postgres")]
mod streams;
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
pub use prefixed::Prefixed;
pub use push::{GrantStream, Push, PushSender, push_channel};
#[cfg(feature = "sqlite")]
pub use sqlite::Sqlite;
pub use types::*;
pub use url::redacted;

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
    async fn renew_session(&self, session: SessionId) -> Result<Reply<RenewOutcome>>;

    /// Ends a session with everything that depends on it: its session holds, its queue entries. Idempotent.
    async fn close_session(&self, session: SessionId) -> Result<Reply<()>>;

    /// Whether a session lives. Renews nothing and ends nothing. `false` for one that never was; a store may refuse to open
    /// that one from then on, so that nobody who was told of its death is wrong.
    async fn session_lives(&self, session: SessionId) -> Result<Reply<bool>>;

    /// Asks for a hold. Idempotent by token: asked again it gives the same answer, the same fence included.
    async fn acquire(&self, request: AcquireRequest) -> Result<Reply<AcquireOutcome>>;

    /// Returns what became of tokens of a key, in the order of `tokens`. Never creates anything.
    ///
    /// It is one step, however many tokens there are: the key is settled once, and all outcomes are of that moment. A handle
    /// polls a key once for all of its calls that wait for it, so the cost of a poll must not grow with the product of the
    /// tokens and the queue.
    async fn poll(&self, key: &Key, tokens: &[TokenId]) -> Result<Reply<Vec<PollOutcome>>>;

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
    async fn force_release(&self, request: ForceReleaseRequest) -> Result<Reply<ForceReleaseOutcome>>;

    /// What is known of one key. Stale when read.
    async fn inspect(&self, key: &Key) -> Result<Reply<KeyState>>;

    /// Returns a page of the keys that are held, waited for or closed and whose [`Key::as_encoded`] begins with `prefix`.
    ///
    /// - The listing begins without a cursor, goes on with [`Listing::next`], and is over when there is none. A page may
    ///   find nothing and have a next one all the same.
    /// - A page does a bounded amount of work, whatever it finds: it looks at about `limit` keys, at one or more of them,
    ///   and may return a few more than that.
    /// - Keys come in the store's order. A key that is in use during the whole listing is on a page; a store may repeat it on
    ///   a later one. Several pages are no snapshot.
    /// - It reads only, so it need not keep rule 2, but it leaves out what is over: holds and waiters whose session is dead,
    ///   holds whose deadline has passed.
    /// - What cannot be read is named in [`Listing::damaged`] and ends nothing.
    async fn list(&self, prefix: &str, cursor: Option<&Cursor>, limit: usize) -> Result<Reply<Listing>>;

    /// The push stream of a session. Called once per session, before it is opened. Pushes are hints: a lost one costs
    /// time, never correctness. The stream may end early; then the caller lives by polling.
    fn grants(&self, session: SessionId) -> GrantStream;
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
