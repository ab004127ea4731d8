//! What happens when a hold is lost, beside the signal.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::belief::Hold;
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
    /// This function is called, once for each hold, on a thread of its own.
    Hook(Hook),
    /// The process aborts if the guard is still there after this time. A hold lasts for its grace after it was lost (a
    /// quarter of the session's or its own term, 5 s at most), unless it was released by force or is missing in the store:
    /// a shorter time here ends the process before somebody else holds the key. Not done where
    /// [`Locks::close`](crate::Locks::close) was called.
    AbortAfter(Duration),
}

type Hook = Arc<dyn Fn(&Loss) + Send + Sync>;

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
    /// Calls this function, once for each hold that is lost, on a thread of its own: it may block.
    pub fn hook(hook: impl Fn(&Loss) + Send + Sync + 'static) -> Self {
        Self::Hook(Arc::new(hook))
    }

    /// Aborts the process if the guard is still there after this time.
    pub fn abort_after(grace: Duration) -> Self {
        Self::AbortAfter(grace)
    }

    pub(crate) fn carry_out(&self, hold: &Arc<Hold>, cause: LossCause) {
        match self {
            Self::Signal => {}
            Self::Hook(hook) => {
                let (hook, loss) = (hook.clone(), Loss { key: hold.key.clone(), fence: hold.fence, cause });
                on_a_thread(move || hook(&loss));
            }
            Self::AbortAfter(_) if cause == LossCause::Closed => {}
            Self::AbortAfter(grace) => {
                let (grace, hold) = (*grace, hold.clone());
                on_a_thread(move || abort_unless_dropped(grace, &hold, cause));
            }
        }
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

/// Not on the keeper's thread, which has beats to send, nor on the caller's, who only looked.
fn on_a_thread(work: impl FnOnce() + Send + 'static) {
    let work = Arc::new(std::sync::Mutex::new(Some(work)));
    let take = |work: &std::sync::Mutex<Option<_>>| work.lock().ok().and_then(|mut work| work.take());
    let on_thread = work.clone();
    let started = std::thread::Builder::new().name("stanchion-on-lost".into()).spawn(move || {
        if let Some(work) = take(&on_thread) {
            work();
        }
    });
    // Without a thread it is done here: late for others is better than never.
    if started.is_err()
        && let Some(work) = take(&work)
    {
        work();
    }
}

fn abort_unless_dropped(grace: Duration, hold: &Hold, cause: LossCause) {
    std::thread::sleep(grace);
    if !hold.is_let_go() {
        let key = &hold.key;
        eprintln!("stanchion: key `{key}` was lost ({cause}) and its guard is still there after {grace:?}: aborting");
        std::process::abort();
    }
}
