//! Defines [`Event`], what can happen to the locks of a handle.

use std::time::Duration;

use crate::error::{ErrorKind, LossCause};
use crate::fence::Fence;
use crate::key::Key;
use crate::token::SessionId;

/// Something that happened to the locks of one handle. [`Locks::events`](crate::Locks::events) returns a stream of
/// them.
///
/// Fields may be added: match with `..`.
///
/// ```
/// use stanchion::Event;
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// # let locks = stanchion::Locks::open("memory:").await?;
/// let mut events = locks.events();
/// let guard = locks.lock("report").await?;
/// match events.next().await {
///     Some(Event::Acquired { key, fence, .. }) => println!("{key} is held under fence {fence}"),
///     Some(Event::Lost { key, cause, .. }) => println!("{key} was lost: {cause}"),
///     _ => {}
/// }
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A lock was granted.
    #[non_exhaustive]
    Acquired {
        /// The key.
        key: Key,
        /// The fence of the hold.
        fence: Fence,
        /// Time from the call to the grant.
        waited: Duration,
        /// Whether the key lingered in this process, and was granted without a request to the store.
        is_local: bool,
    },
    /// A call started to wait for a key.
    #[non_exhaustive]
    Contended {
        /// The key.
        key: Key,
        /// Number of waiters before this call in the queue.
        ahead: u32,
    },
    /// A call waits or was rejected, and the holders use another limit of the key than the call.
    ///
    /// The smaller limit applies until the holders with the other one are gone.
    #[non_exhaustive]
    LimitsDiffer {
        /// The key.
        key: Key,
        /// The smallest limit among the holders. Readers count as [`Demand::MAX`](crate::store::Demand::MAX).
        in_use: u32,
        /// The limit of the call.
        asked: u32,
    },
    /// A guard changed its deadline with [`Guard::extend`](crate::Guard::extend).
    #[non_exhaustive]
    Extended {
        /// The key.
        key: Key,
        /// The fence of the hold.
        fence: Fence,
        /// The remaining time that the guard set.
        ttl: Duration,
    },
    /// A guard released its lock.
    #[non_exhaustive]
    Released {
        /// The key.
        key: Key,
        /// The fence of the hold.
        fence: Fence,
        /// Time from the grant to the release.
        held: Duration,
    },
    /// A hold that [lingered](crate::LockRequest::linger) ended.
    #[non_exhaustive]
    LingerEnded {
        /// The key.
        key: Key,
        /// Number of grants in this process that needed no request.
        grants: u64,
        /// The cause of the end.
        end: LingerEnd,
    },
    /// A lock was lost.
    #[non_exhaustive]
    Lost {
        /// The key.
        key: Key,
        /// The fence of the hold.
        fence: Fence,
        /// The cause of the loss.
        cause: LossCause,
        /// The reason that was given to a force-release.
        reason: Option<String>,
    },
    /// This handle force-released a hold.
    #[non_exhaustive]
    ForceReleased {
        /// The key.
        key: Key,
        /// The fence of the hold that ended.
        fence: Fence,
        /// The reason that was given.
        reason: String,
    },
    /// The session ended. Its holds are lost, and the keeper opens another session.
    #[non_exhaustive]
    SessionLost {
        /// The session that ended.
        session: SessionId,
    },
    /// A request failed in the background, or will be retried.
    #[non_exhaustive]
    Error {
        /// The kind of the error.
        kind: ErrorKind,
        /// The key of the request.
        key: Option<Key>,
        /// The text of the error.
        message: String,
    },
    /// The store may lose locks as it is configured, or works with reduced features.
    ///
    /// [`Locks::warnings`](crate::Locks::warnings) returns all warnings so far.
    #[non_exhaustive]
    Warning {
        /// The problem and how to solve it.
        message: String,
    },
    /// The handle started to drain, and takes no new holds.
    #[non_exhaustive]
    Draining {
        /// The reason that was given.
        reason: String,
    },
    /// The listener was too slow, and events were dropped here.
    #[non_exhaustive]
    Missed {
        /// Number of dropped events.
        count: u64,
    },
}

/// The cause of the end of a hold that [lingered](crate::LockRequest::linger).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LingerEnd {
    /// Another process requested the key.
    Recalled,
    /// No call of this process used the key in time.
    Unused,
    /// The caller, a drain or the end of the handle released it.
    Released,
    /// The hold was lost: its session ended, it was force-released, or the store lost it.
    Lost,
}

impl LingerEnd {
    /// Returns the name of the cause in metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Recalled => "recalled",
            Self::Unused => "unused",
            Self::Released => "released",
            Self::Lost => "lost",
        }
    }
}
