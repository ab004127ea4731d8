//! Defines the blocking [`LockRequest`].

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::driver::Driver;
use super::guard::Guard;
use crate::error::Result;
use crate::on_lost::OnLost;
use crate::request::conclude;
use crate::store::Demand;

/// A request for a lock, for blocking code. Set its options, then [`acquire`](LockRequest::acquire) it.
///
/// # Errors
/// The errors of [`stanchion::LockRequest`](crate::LockRequest). After every error nothing is held: if the store
/// granted the key, the keeper releases it.
#[derive(Clone, Debug)]
#[must_use = "a request does nothing until it is acquired or run"]
pub struct LockRequest {
    request: crate::LockRequest,
    driver: Driver,
}

impl LockRequest {
    pub(super) fn new(request: crate::LockRequest, driver: Driver) -> Self {
        Self { request, driver }
    }

    /// Limits the wait for the lock. Default: no limit.
    ///
    /// At the limit the request fails with [`ErrorKind::Timeout`](crate::ErrorKind::Timeout). A limit of zero means one
    /// attempt, which fails with [`ErrorKind::Busy`](crate::ErrorKind::Busy) if the key is not free.
    pub fn wait(self, limit: Duration) -> Self {
        self.with(|request| request.wait(limit))
    }

    /// Gives the hold a fixed lifetime, as [`stanchion::LockRequest::ttl`](crate::LockRequest::ttl) does.
    ///
    /// It does not depend on this process. Only [`extend`](Guard::extend) changes it.
    pub fn ttl(self, ttl: Duration) -> Self {
        self.with(|request| request.ttl(ttl))
    }

    /// Gives the hold a fixed lifetime that ends in the store exactly this long after the grant, as
    /// [`stanchion::LockRequest::expires_after`](crate::LockRequest::expires_after) does.
    pub fn expires_after(self, ttl: Duration) -> Self {
        self.with(|request| request.expires_after(ttl))
    }

    /// Limits how long the hold may last, even if the session lives. For work that may hang.
    pub fn max_hold(self, longest: Duration) -> Self {
        self.with(|request| request.max_hold(longest))
    }

    /// Limits the time between calls of [`heartbeat`](crate::Guard::heartbeat). For work that may hang.
    pub fn heartbeat_within(self, silence: Duration) -> Self {
        self.with(|request| request.heartbeat_within(silence))
    }

    /// Keeps the key closed to everyone for this long after the release.
    pub fn cooldown(self, closed: Duration) -> Self {
        self.with(|request| request.cooldown(closed))
    }

    /// Keeps the key in this process for up to this long after its release, in case the process wants it again.
    ///
    /// [`stanchion::LockRequest::linger`](crate::LockRequest::linger) has the rules and the price.
    pub fn linger(self, linger: Duration) -> Self {
        self.with(|request| request.linger(linger))
    }

    /// Attaches text for people who inspect the key. At most 4 KiB.
    pub fn metadata(self, text: impl Into<String>) -> Self {
        self.with(|request| request.metadata(text))
    }

    /// Attaches the origin of the call, such as a trace id, for people who inspect the key. At most 4 KiB.
    pub fn trace(self, text: impl Into<String>) -> Self {
        self.with(|request| request.trace(text))
    }

    /// Fails the request with [`ErrorKind::Cancelled`](crate::ErrorKind::Cancelled) when the token fires, on any thread.
    pub fn cancel(self, token: CancellationToken) -> Self {
        self.with(|request| request.cancel(token))
    }

    /// Sets how much of the key is requested. Default: [`Demand::MUTEX`].
    pub fn demand(self, demand: Demand) -> Self {
        self.with(|request| request.demand(demand))
    }

    /// Requests several permits of a [`semaphore`](super::Locks::semaphore) at once. Default: 1.
    pub fn permits(self, permits: u32) -> Self {
        self.with(|request| request.permits(permits))
    }

    /// Sets the action when this hold is lost, in place of [`Builder::on_lost`](crate::Builder::on_lost).
    pub fn on_lost(self, policy: OnLost) -> Self {
        self.with(|request| request.on_lost(policy))
    }

    /// Blocks until the lock is granted.
    ///
    /// # Errors
    /// The errors of [`stanchion::LockRequest`](crate::LockRequest).
    pub fn acquire(self) -> Result<Guard> {
        let guard = self.driver.call(async { self.request.await })?;
        Ok(Guard::new(guard, self.driver))
    }

    /// Tries once. If someone else holds the lock or waits for it, you get `None`, not an error. A wait limit is
    /// ignored.
    ///
    /// # Errors
    /// The errors of [`acquire`](LockRequest::acquire), except [`ErrorKind::Timeout`](crate::ErrorKind::Timeout) and
    /// [`ErrorKind::Busy`](crate::ErrorKind::Busy).
    pub fn try_acquire(self) -> Result<Option<Guard>> {
        let guard = self.driver.call(self.request.try_acquire())?;
        Ok(guard.map(|guard| Guard::new(guard, self.driver)))
    }

    /// Waits for the lock, runs `body` with its guard, and releases the lock.
    ///
    /// A running function cannot be dropped when the lock is lost. Long work should look at one of these now and then:
    /// [`check`](crate::Guard::check), [`is_held`](crate::Guard::is_held), [`heartbeat`](crate::Guard::heartbeat),
    /// [`cancel_token`](crate::Guard::cancel_token).
    ///
    /// The call returns the body's value, and an error of the release does not replace it. If the lock was lost by the
    /// time the body ended, the call fails with [`ErrorKind::Lost`](crate::ErrorKind::Lost), because the resource may
    /// have rejected the last writes of the body.
    ///
    /// # Errors
    /// The errors of [`acquire`](LockRequest::acquire), and [`ErrorKind::Lost`](crate::ErrorKind::Lost).
    pub fn run<T>(self, body: impl FnOnce(&Guard) -> T) -> Result<T> {
        let guard = self.acquire()?;
        let value = body(&guard);
        let (guard, driver) = guard.into_parts();
        driver.call(conclude(guard, Ok(value)))
    }

    fn with(mut self, change: impl FnOnce(crate::LockRequest) -> crate::LockRequest) -> Self {
        self.request = change(self.request);
        self
    }
}
