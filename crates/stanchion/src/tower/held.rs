//! Gives a service access to the lock that is held for its request.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::error::{Error, ErrorKind, LossCause, Result};
use crate::fence::Fence;
use crate::guard::Guard;
use crate::key::Key;

/// The lock that is held for a request, as an extension of the request.
///
/// Clones refer to the same lock, and none of them keeps it: the layer releases it with the response.
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

    /// Returns the key.
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Returns the fence. Send it with every side effect.
    pub fn fence(&self) -> Fence {
        self.fence
    }

    /// Returns whether the lock is held, by the holder's clock. Does no I/O.
    pub fn is_held(&self) -> bool {
        self.guard.upgrade().is_some_and(|guard| guard.is_held())
    }

    /// Returns the time until the lock is lost unless something renews it. Does no I/O.
    ///
    /// It is zero after a loss or a release, and `None` if the hold ends only with the process.
    pub fn remaining(&self) -> Option<Duration> {
        self.guard.upgrade().map_or(Some(Duration::ZERO), |guard| guard.remaining())
    }

    /// Returns an error if the lock is lost or released. Does no I/O.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`].
    pub fn check(&self) -> Result<()> {
        self.guard()?.check()
    }

    /// Reports that the work makes progress: see [`heartbeat_within`](crate::LockRequest::heartbeat_within). Does no
    /// I/O.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`] if the lock is lost or released, [`ErrorKind::Draining`] if the handle is draining.
    pub fn heartbeat(&self) -> Result<()> {
        self.guard()?.heartbeat()
    }

    /// Returns a token that is cancelled when the lock is lost, but not when it is released. For work that the service
    /// started elsewhere.
    pub fn cancel_token(&self) -> CancellationToken {
        self.lost.clone()
    }

    fn guard(&self) -> Result<Arc<Guard>> {
        self.guard.upgrade().ok_or_else(|| {
            let message = "the lock was released with the response";
            Error::new(ErrorKind::Lost(LossCause::Missing), message).with_key(&self.key)
        })
    }
}
