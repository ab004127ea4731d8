//! Wakes a call that waits for a key.

use std::sync::{Mutex, PoisonError};

use tokio::sync::Notify;

use crate::clock::BootTime;
use crate::error::Error;
use crate::fence::Fence;
use crate::key::Key;
use crate::store::Granted;

/// A call that waits for a key, as the keeper sees it.
#[derive(Debug)]
pub(crate) struct Waiter {
    pub(crate) key: Key,
    /// Whether the hold that the call is granted ends with the session.
    pub(crate) session_bound: bool,
    wakeup: Mutex<Option<Wakeup>>,
    notify: Notify,
}

/// The reason why a waiting call is woken.
#[derive(Debug)]
pub(crate) enum Wakeup {
    /// Something may have changed: the call polls its token.
    Recheck,
    /// The keeper's polls failed, and the call gives up.
    Failed(Error),
    /// A grant was pushed.
    Granted(Fence),
    /// A poll that was sent at this time found the grant.
    Polled(Granted, BootTime),
    /// A poll found that the store has nothing of the token.
    Gone,
}

impl Wakeup {
    /// A wakeup replaces another one of the same or a lower rank: it says at least as much, and is newer.
    fn rank(&self) -> u8 {
        match self {
            Self::Recheck => 0,
            Self::Failed(_) => 1,
            Self::Granted(_) => 2,
            // A token that is gone after its grant was pushed had the grant, and the grant is over.
            Self::Polled(..) | Self::Gone => 3,
        }
    }
}

impl Waiter {
    pub(crate) fn new(key: Key, session_bound: bool) -> Self {
        Self { key, session_bound, wakeup: Mutex::default(), notify: Notify::new() }
    }

    /// Wakes the call.
    pub(crate) fn notify(&self, wakeup: Wakeup) {
        let mut current = self.wakeup.lock().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_none_or(|current| current.rank() <= wakeup.rank()) {
            *current = Some(wakeup);
        }
        drop(current);
        self.notify.notify_one();
    }

    /// Waits for the next wakeup. Dropping the future loses none.
    pub(crate) async fn next(&self) -> Wakeup {
        loop {
            let notified = self.notify.notified();
            if let Some(wakeup) = self.take() {
                return wakeup;
            }
            notified.await;
        }
    }

    /// Takes the wakeup that has arrived, if one has.
    pub(crate) fn take(&self) -> Option<Wakeup> {
        self.wakeup.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
