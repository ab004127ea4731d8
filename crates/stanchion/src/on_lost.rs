//! Policies for the loss of a hold.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::error::LossCause;
use crate::fence::Fence;
use crate::key::Key;

/// Chooses the reaction to the loss of a hold, in addition to the signals.
///
/// The signals come in every case: the guard reports the loss, [`Guard::lost`](crate::Guard::lost) and
/// [`Guard::cancel_token`](crate::Guard::cancel_token) fire, an event is reported, and the body of
/// [`LockRequest::run`](crate::LockRequest::run) is dropped.
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
    /// Does nothing more.
    #[default]
    Signal,
    /// Calls this function once for each lost hold, one call after the other, on a thread of its own.
    Hook(Hook),
    /// Aborts the process if the guard still exists after this time.
    ///
    /// A lost hold keeps the key for its grace (a quarter of the session's or its own lifetime, 5 s at most), unless it was
    /// force-released or is missing in the store. A time that is shorter than the grace ends the process before another process
    /// holds the key. The process is not aborted if [`Locks::close`](crate::Locks::close) was called.
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
    /// The cause of the loss.
    pub cause: LossCause,
}

impl OnLost {
    /// Returns a policy that calls this function once for each lost hold, one call after the other, on a thread of its own. The
    /// function may block; the next call waits for it.
    pub fn hook(hook: impl Fn(&Loss) + Send + Sync + 'static) -> Self {
        Self::Hook(Arc::new(hook))
    }

    /// Returns a policy that aborts the process if the guard still exists after this time.
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
