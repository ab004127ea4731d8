//! What a service may know of the lock that is held for its request.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::error::{Error, ErrorKind, LossCause, Result};
use crate::fence::Fence;
use crate::guard::Guard;
use crate::key::Key;

/// The lock that is held for a request: an extension of it. Clones look at the same lock, and none keeps it: it is
/// released with the response.
#[derive(Clone, Debug)]
pub struct HeldLock {
    key: Key,
    fence: Fence,
    lost: CancellationToken,
    guard: Weak<Guard>,
}

impl HeldLock {
    pub(super) fn of(guard: &Arc<Guard>) -> Self {
        Self {
            key: guard.key().clone(),
            fence: guard.fence(),
            lost: guard.cancel_token(),
            guard: Arc::downgrade(guard),
        }
    }

    /// The key.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// The fence: send it with every side effect.
    pub fn fence(&self) -> Fence {
        self.fence
    }

    /// Whether the lock is still believed to be held. Local.
    pub fn is_held(&self) -> bool {
        self.guard.upgrade().is_some_and(|guard| guard.is_held())
    }

    /// How long until the hold is lost if nothing renews it; zero when it is lost or released; `None` if nothing but the
    /// end of the process ends it. Local.
    pub fn remaining(&self) -> Option<Duration> {
        self.guard.upgrade().map_or(Some(Duration::ZERO), |guard| guard.remaining())
    }

    /// An error if the hold is lost or released. Local.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`].
    pub fn check(&self) -> Result<()> {
        self.guard()?.check()
    }

    /// A sign of life of the work: see [`heartbeat_within`](crate::LockRequest::heartbeat_within). Local.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`] if the hold is lost or released, [`ErrorKind::Draining`] if the handle is draining.
    pub fn heartbeat(&self) -> Result<()> {
        self.guard()?.heartbeat()
    }

    /// Fires when the hold is lost, for work that the service started elsewhere; not when it is released.
    pub fn cancel_token(&self) -> CancellationToken {
        self.lost.clone()
    }

    fn guard(&self) -> Result<Arc<Guard>> {
        self.guard.upgrade().ok_or_else(|| {
            let message = "it was released with its response";
            Error::new(ErrorKind::Lost(LossCause::Missing), message).with_key(&self.key)
        })
    }
}
