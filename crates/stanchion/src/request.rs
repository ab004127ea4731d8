//! Defines [`LockRequest`]: the options of one request for a lock, and the ways to await it.

use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::error::{Error, ErrorKind, LossCause, Result};
use crate::guard::{Guard, Released};
use crate::locks::{Locks, MAX_METADATA_BYTES, check_duration};
use crate::on_lost::OnLost;
use crate::store::{Demand, Lifetime};
use crate::wait;

/// A request for a lock. Await it to wait for the lock; its methods set options first.
///
/// ```
/// # use std::time::Duration;
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// # let locks = stanchion::Locks::open("memory:").await?;
/// let guard = locks.lock("report").wait(Duration::from_secs(5)).metadata("nightly").await?;
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
///
/// # Errors
/// An awaited request fails with
///
/// - [`ErrorKind::Timeout`] at the wait limit, or [`ErrorKind::Busy`] if the limit is zero and the key is not free,
/// - [`ErrorKind::Cancelled`] if the token of [`cancel`](LockRequest::cancel) fires,
/// - [`ErrorKind::Draining`] if the handle is draining or closed,
/// - [`ErrorKind::InvalidArgument`] if the key or an option is out of range,
/// - [`ErrorKind::Indeterminate`] if the store's answer was lost and no retry brought it back,
/// - any other error of the store.
///
/// After every error nothing is held: if the store granted the key, the keeper releases it.
///
/// # Cancel safety
/// A dropped request loses its place in the queue and leaves nothing behind: if the store granted the key, the keeper
/// releases it.
#[derive(Clone, Debug)]
#[must_use = "a request does nothing until it is awaited"]
pub struct LockRequest {
    pub(crate) locks: Locks,
    pub(crate) key: String,
    pub(crate) wait: Option<Duration>,
    pub(crate) ttl: Option<Duration>,
    /// The `ttl` is the time after which the store expires the hold, not the time that the holder can use.
    pub(crate) is_exact: bool,
    pub(crate) max_hold: Option<Duration>,
    pub(crate) heartbeat_within: Option<Duration>,
    pub(crate) cooldown: Option<Duration>,
    pub(crate) metadata: Option<String>,
    pub(crate) trace: Option<String>,
    pub(crate) cancel: Option<CancellationToken>,
    pub(crate) units: u32,
    pub(crate) capacity: u32,
    pub(crate) on_lost: Option<OnLost>,
}

impl LockRequest {
    pub(crate) fn new(locks: Locks, key: String) -> Self {
        Self {
            locks,
            key,
            wait: None,
            ttl: None,
            is_exact: false,
            max_hold: None,
            heartbeat_within: None,
            cooldown: None,
            metadata: None,
            trace: None,
            cancel: None,
            units: 1,
            capacity: 1,
            on_lost: None,
        }
    }

    /// Limits the wait for the lock. Default: no limit.
    ///
    /// At the limit the request fails with [`ErrorKind::Timeout`]. A limit of zero means one attempt, which fails with
    /// [`ErrorKind::Busy`] if the key is not free.
    ///
    /// While the store is unavailable, the request retries until the limit, and then fails with the store's error.
    /// Without a limit, the [`RetryPolicy`](crate::RetryPolicy) limits the request until the store has answered it
    /// once; after that it waits through an outage of any length.
    pub fn wait(mut self, limit: Duration) -> Self {
        self.wait = Some(limit);
        self
    }

    /// Gives the hold a fixed lifetime, which does not depend on this process. Only [`Guard::extend`] changes it.
    ///
    /// Default: the hold lasts until the guard is dropped or the session ends.
    ///
    /// The holder can use all of this time, counted from before the request was sent. If it does not release, other
    /// callers get the key a little later, because the store also adds
    ///
    /// - the time in which the holder stops ([`Guard::valid_for`]): a quarter of the lifetime, at most 5 s,
    /// - the [`Drift`](crate::Drift) of clocks.
    ///
    /// For a hold that must expire after an exact time, use [`expires_after`](LockRequest::expires_after). ADR 20 has the
    /// reasons.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        (self.ttl, self.is_exact) = (Some(ttl), false);
        self
    }

    /// Gives the hold a fixed lifetime that ends in the store exactly this long after the grant.
    ///
    /// This is for rate limits, which detach the hold and let it expire. It replaces [`ttl`](LockRequest::ttl).
    ///
    /// The guard is lost earlier, so that its holder has time to stop: after about three quarters of a short lifetime.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// # let locks = stanchion::Locks::open("memory:").await?;
    /// // At most one call a minute.
    /// if let Some(guard) = locks.lock("call").expires_after(Duration::from_secs(60)).try_acquire().await? {
    ///     guard.detach();
    /// }
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    pub fn expires_after(mut self, ttl: Duration) -> Self {
        (self.ttl, self.is_exact) = (Some(ttl), true);
        self
    }

    /// Limits how long the hold may last, even if the session lives. For work that may hang.
    ///
    /// After this time the hold is lost. The holder can use all of it, as with [`ttl`](LockRequest::ttl).
    pub fn max_hold(mut self, longest: Duration) -> Self {
        self.max_hold = Some(longest);
        self
    }

    /// Limits the time between calls of [`Guard::heartbeat`]. For work that may hang.
    ///
    /// If no heartbeat comes for this long, the hold is lost.
    pub fn heartbeat_within(mut self, silence: Duration) -> Self {
        self.heartbeat_within = Some(silence);
        self
    }

    /// Keeps the key closed to everyone for this long after the release.
    pub fn cooldown(mut self, closed: Duration) -> Self {
        self.cooldown = Some(closed);
        self
    }

    /// Attaches text for people who inspect the key. At most 4 KiB.
    pub fn metadata(mut self, text: impl Into<String>) -> Self {
        self.metadata = Some(text.into());
        self
    }

    /// Attaches the origin of the call, such as a trace id, for people who inspect the key. At most 4 KiB.
    pub fn trace(mut self, text: impl Into<String>) -> Self {
        self.trace = Some(text.into());
        self
    }

    /// Fails the request with [`ErrorKind::Cancelled`] when the token fires.
    pub fn cancel(mut self, token: CancellationToken) -> Self {
        self.cancel = Some(token);
        self
    }

    /// Sets how much of the key is requested. Default: [`Demand::MUTEX`].
    pub fn demand(mut self, demand: Demand) -> Self {
        (self.units, self.capacity) = (demand.units(), demand.capacity());
        self
    }

    /// Requests several permits of a [`semaphore`](Locks::semaphore) at once. Default: 1.
    pub fn permits(mut self, permits: u32) -> Self {
        self.units = permits;
        self
    }

    /// Sets the action when this hold is lost, in place of [`Builder::on_lost`](crate::Builder::on_lost).
    pub fn on_lost(mut self, policy: OnLost) -> Self {
        self.on_lost = Some(policy);
        self
    }

    /// Tries once. If someone else holds the lock or waits for it, you get `None`, not an error. A wait limit is
    /// ignored.
    ///
    /// # Errors
    /// The errors of the awaited request, except [`ErrorKind::Timeout`] and [`ErrorKind::Busy`].
    ///
    /// # Cancel safety
    /// The same as for the awaited request.
    pub async fn try_acquire(mut self) -> Result<Option<Guard>> {
        self.wait = Some(Duration::ZERO);
        wait::acquire(&self).await
    }

    /// Waits for the lock, runs `body` with its guard, and releases the lock.
    ///
    /// If the lock is lost while the body runs, the body's future is dropped at its next await, and the call fails with
    /// [`ErrorKind::Lost`].
    ///
    /// The call returns the body's value, which may be an error of the body's own. An error of the release does not
    /// replace it: the keeper keeps releasing, and an event reports the error. If the hold was lost by the time the
    /// body ended, the call fails with [`ErrorKind::Lost`], because the resource may have rejected the last writes of
    /// the body.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// # let locks = stanchion::Locks::open("memory:").await?;
    /// let fence = locks.lock("report").run(async |guard| guard.fence()).await?;
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// The errors of the awaited request, and [`ErrorKind::Lost`].
    ///
    /// # Cancel safety
    /// A dropped future drops the body and releases the lock.
    pub async fn run<T>(self, body: impl AsyncFnOnce(&Guard) -> T) -> Result<T> {
        let guard = self.await?;
        let finished = tokio::select! {
            biased;
            value = body(&guard) => Ok(value),
            cause = guard.lost() => Err(cause),
        };
        conclude(guard, finished).await
    }

    /// Validates the options, but not the key.
    pub(crate) fn check(&self) -> Result<(Lifetime, Demand)> {
        let demand = Demand::new(self.units, self.capacity)?;
        if let Some(wait) = self.wait.filter(|wait| !wait.is_zero()) {
            check_wait(wait)?;
        }
        let durations = [
            ("the ttl", self.ttl),
            ("max_hold", self.max_hold),
            ("heartbeat_within", self.heartbeat_within),
            ("the cooldown", self.cooldown),
        ];
        for (what, span) in durations {
            if let Some(span) = span {
                check_duration(what, span)?;
            }
        }
        for (what, text) in [("the metadata", &self.metadata), ("the trace", &self.trace)] {
            let length = text.as_ref().map_or(0, String::len);
            if length > MAX_METADATA_BYTES {
                let message = format!("{what} has {length} bytes, the longest allowed is {MAX_METADATA_BYTES}");
                return Err(Error::new(ErrorKind::InvalidArgument, message));
            }
        }
        match (self.ttl, self.max_hold) {
            (Some(_), Some(_)) => {
                let message = "a request has a ttl or a max_hold, not both: a fixed lifetime ends by itself";
                Err(Error::new(ErrorKind::InvalidArgument, message))
            }
            (Some(ttl), None) => Ok((Lifetime::Fixed(ttl), demand)),
            (None, max_hold) => Ok((Lifetime::Session { max_hold }, demand)),
        }
    }
}

/// Releases the lock after the work under it ended, and returns the work's value or the loss.
///
/// [`LockRequest::run`] documents the rules.
pub(crate) async fn conclude<T>(guard: Guard, finished: Result<T, LossCause>) -> Result<T> {
    let (key, store) = (guard.key().clone(), guard.store_name());
    let lost = |cause| Error::lost(cause).with_key(&key).with_store(store);
    let value = finished.map_err(lost)?;
    if let Some(cause) = guard.loss() {
        return Err(lost(cause));
    }
    match guard.release().await {
        Ok(Released::AlreadyLost) => Err(lost(LossCause::Missing)),
        // If the release failed, an event reports the error and the keeper keeps releasing.
        Ok(Released::Now) | Err(_) => Ok(value),
    }
}

/// Rejects a wait limit of more than 30 days. A limit may be shorter than other durations.
fn check_wait(wait: Duration) -> Result<()> {
    if wait <= *crate::locks::DURATION_RANGE.end() {
        return Ok(());
    }
    let message =
        format!("the wait limit is {wait:?}, but at most 30 days are allowed; leave it out to wait without a limit");
    Err(Error::new(ErrorKind::InvalidArgument, message))
}

impl IntoFuture for LockRequest {
    type Output = Result<Guard>;
    type IntoFuture = Pin<Box<dyn Future<Output = Result<Guard>> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            match wait::acquire(&self).await? {
                Some(guard) => Ok(guard),
                // The wait ends without a grant only if the limit is zero.
                None => {
                    let key = self.locks.key(&self.key)?;
                    let message = "the key is locked or has waiters";
                    Err(self.locks.handle.shared.error(ErrorKind::Busy, message).with_key(&key))
                }
            }
        })
    }
}
