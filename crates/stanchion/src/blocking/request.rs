//! A request for a lock.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::driver::Driver;
use super::guard::Guard;
use crate::error::Result;
use crate::on_lost::OnLost;
use crate::request::conclude;
use crate::store::Demand;

/// A request for a lock: give it limits, then [`acquire`](LockRequest::acquire) it.
///
/// # Errors
/// Those of [`stanchion::LockRequest`](crate::LockRequest). After every error nothing is held: what the request may have
/// got is cleaned up.
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

    /// Waits no longer than this, then [`ErrorKind::Timeout`](crate::ErrorKind::Timeout). Zero: one attempt, then
    /// [`ErrorKind::Busy`](crate::ErrorKind::Busy). Default: no limit.
    pub fn wait(self, limit: Duration) -> Self {
        self.with(|request| request.wait(limit))
    }

    /// A fixed lifetime: the hold lasts this long from the grant, whatever becomes of this process, moved only by
    /// [`extend`](Guard::extend).
    pub fn ttl(self, ttl: Duration) -> Self {
        self.with(|request| request.ttl(ttl))
    }

    /// A fixed lifetime that ends in the store exactly this long after the grant: as
    /// [`stanchion::LockRequest::expires_after`](crate::LockRequest::expires_after).
    pub fn expires_after(self, ttl: Duration) -> Self {
        self.with(|request| request.expires_after(ttl))
    }

    /// The hold is lost after this time, however lively the session is: for work that may hang.
    pub fn max_hold(self, longest: Duration) -> Self {
        self.with(|request| request.max_hold(longest))
    }

    /// The hold is lost when [`heartbeat`](crate::Guard::heartbeat) was not called for this long: for work that may hang.
    pub fn heartbeat_within(self, silence: Duration) -> Self {
        self.with(|request| request.heartbeat_within(silence))
    }

    /// After the release the key stays closed for this long.
    pub fn cooldown(self, closed: Duration) -> Self {
        self.with(|request| request.cooldown(closed))
    }

    /// Text for people who inspect the key: at most 4 KiB.
    pub fn metadata(self, text: impl Into<String>) -> Self {
        self.with(|request| request.metadata(text))
    }

    /// Where the call comes from, for people who inspect the key: at most 4 KiB.
    pub fn trace(self, text: impl Into<String>) -> Self {
        self.with(|request| request.trace(text))
    }

    /// Gives up with [`ErrorKind::Cancelled`](crate::ErrorKind::Cancelled) when this fires, on whatever thread.
    pub fn cancel(self, token: CancellationToken) -> Self {
        self.with(|request| request.cancel(token))
    }

    /// Takes so much of the key: default [`Demand::MUTEX`].
    pub fn demand(self, demand: Demand) -> Self {
        self.with(|request| request.demand(demand))
    }

    /// Takes so many permits of a [`semaphore`](super::Locks::semaphore) at once. Default: one.
    pub fn permits(self, permits: u32) -> Self {
        self.with(|request| request.permits(permits))
    }

    /// What happens when this hold is lost, in place of what the handle says.
    pub fn on_lost(self, policy: OnLost) -> Self {
        self.with(|request| request.on_lost(policy))
    }

    /// Waits for the lock.
    ///
    /// # Errors
    /// Those of [`stanchion::LockRequest`](crate::LockRequest).
    pub fn acquire(self) -> Result<Guard> {
        let guard = self.driver.call(async { self.request.await })?;
        Ok(Guard::new(guard, self.driver))
    }

    /// One attempt: `None` if another holds the key or waits for it. A wait limit is ignored.
    ///
    /// # Errors
    /// As [`acquire`](LockRequest::acquire), but for the wait limit.
    pub fn try_acquire(self) -> Result<Option<Guard>> {
        let guard = self.driver.call(self.request.try_acquire())?;
        Ok(guard.map(|guard| Guard::new(guard, self.driver)))
    }

    /// Waits for the lock, runs `body` with its guard and releases.
    ///
    /// A function that runs cannot be dropped. It is told when the lock is lost, by [`check`](crate::Guard::check),
    /// [`is_held`](crate::Guard::is_held), [`heartbeat`](crate::Guard::heartbeat) and
    /// [`cancel_token`](crate::Guard::cancel_token): long work looks at one of them now and then. If the hold was gone when
    /// the body ended, the call fails with [`ErrorKind::Lost`](crate::ErrorKind::Lost), because the last effects of the body
    /// may have been fenced out. Else what the body returns is returned, and a failing release does not mask it.
    ///
    /// # Errors
    /// As [`acquire`](LockRequest::acquire), and [`ErrorKind::Lost`](crate::ErrorKind::Lost).
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
