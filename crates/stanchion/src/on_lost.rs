//! What happens when a hold is lost, beside the signal.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::error::LossCause;
use crate::fence::Fence;
use crate::key::Key;

/// What happens when a hold is lost. In every case its guard says so, [`Guard::lost`](crate::Guard::lost) and
/// [`Guard::cancel_token`](crate::Guard::cancel_token) fire, an event is told, and the body of
/// [`LockRequest::run`](crate::LockRequest::run) is dropped; this comes on top.
///
/// ```
/// use std::time::Duration;
/// use stanchion::{Locks, OnLost};
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let builder = Locks::builder("memory:").on_lost(OnLost::hook(|loss| eprintln!("{} is lost: {}", loss.key, loss.cause)));
/// let locks = builder.open().await?;
/// // For work that cannot be stopped otherwise: the process ends, if the guard is not dropped in time.
/// let guard = locks.lock("ledger").on_lost(OnLost::abort_after(Duration::from_secs(1))).await?;
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
#[derive(Clone, Default)]
#[non_exhaustive]
pub enum OnLost {
    /// Nothing more.
    #[default]
    Signal,
    /// This function is called, once for each hold, one after the other, on a thread of its own.
    Hook(Hook),
    /// The process aborts if the guard is still there after this time. A hold lasts for its grace after it was lost (a
    /// quarter of the session's or its own lifetime, 5 s at most), unless it was released by force or is missing in the store:
    /// a shorter time here ends the process before somebody else holds the key. Not done where
    /// [`Locks::close`](crate::Locks::close) was called.
    AbortAfter(Duration),
}

pub(crate) type Hook = Arc<dyn Fn(&Loss) + Send + Sync>;

/// A hold that was lost.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Loss {
    /// The key.
    pub key: Key,
    /// The fence of the hold.
    pub fence: Fence,
    /// Why.
    pub cause: LossCause,
}

impl OnLost {
    /// Calls this function, once for each hold that is lost, one after the other, on a thread of its own: it may block, and the
    /// next call waits for it.
    pub fn hook(hook: impl Fn(&Loss) + Send + Sync + 'static) -> Self {
        Self::Hook(Arc::new(hook))
    }

    /// Aborts the process if the guard is still there after this time.
    pub fn abort_after(grace: Duration) -> Self {
        Self::AbortAfter(grace)
    }
}

impl fmt::Debug for OnLost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal => f.write_str("Signal"),
            Self::Hook(_) => f.write_str("Hook(…)"),
            Self::AbortAfter(grace) => f.debug_tuple("AbortAfter").field(grace).finish(),
        }
    }
}
