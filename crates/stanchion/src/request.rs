//! Defines [`LockRequest`]: the options of one request for a lock, and the ways to await it.

use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::error::{Error, ErrorKind, LossCause, Result};
use crate::guard::{Guard, Released};
use crate::handle::Handle;
use crate::on_lost::OnLost;
use crate::options::Options;
use crate::store::Demand;
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
    pub(crate) handle: Arc<Handle>,
    pub(crate) key: String,
    pub(crate) options: Options,
}

impl LockRequest {
    pub(crate) fn new(handle: Arc<Handle>, key: String) -> Self {
        Self { handle, key, options: Options::default() }
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
        self.options.wait = Some(limit);
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
        (self.options.ttl, self.options.is_exact) = (Some(ttl), false);
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
        (self.options.ttl, self.options.is_exact) = (Some(ttl), true);
        self
    }

    /// Limits how long the hold may last, even if the session lives. For work that may hang.
    ///
    /// After this time the hold is lost. The holder can use all of it, as with [`ttl`](LockRequest::ttl).
    pub fn max_hold(mut self, longest: Duration) -> Self {
        self.options.max_hold = Some(longest);
        self
    }

    /// Limits the time between calls of [`Guard::heartbeat`]. For work that may hang.
    ///
    /// If no heartbeat comes for this long, the hold is lost.
    pub fn heartbeat_within(mut self, silence: Duration) -> Self {
        self.options.heartbeat_within = Some(silence);
        self
    }

    /// Keeps the key closed to everyone for this long after the release.
    pub fn cooldown(mut self, closed: Duration) -> Self {
        self.options.cooldown = Some(closed);
        self
    }

    /// Keeps the key in this process for up to this long after its release, in case the process wants it again.
    ///
    /// While the key lingers, its next request in this process is granted without asking the store, in about a
    /// microsecond. Calls of this process that wait for the key hand it to each other in the order in which they asked.
    /// Each grant has a fence of its own, higher than all before it. As soon as another process requests the key, the
    /// store recalls it, and this process gives it up.
    ///
    /// Use it for keys that one process uses again and again. Its price:
    ///
    /// - While the key lingers it looks locked: [`is_locked`](crate::Locks::is_locked) returns `true`, and
    ///   [`inspect`](crate::Locks::inspect) shows `lingers`.
    /// - If the process dies or stops while the key lingers, other processes get the key when its session ends.
    /// - A release does not ask the store whether it still had the hold. Call [`Guard::verify`] first if that matters.
    /// - A request of another process waits for one message more, and for at most this long if that message is lost.
    /// - [`inspect`](crate::Locks::inspect) shows the metadata and the fence of the request that the store granted.
    ///
    /// A key lingers only if this process released it less than this long ago already, or if a call of this process
    /// waits for it. If other processes recall it unused, it stops lingering for a while. A key that is used once, or
    /// that processes compete for, therefore costs about as much as without `linger`.
    ///
    /// 10 ms to 30 s; zero means never. Default: [`Builder::linger`](crate::Builder::linger). It needs an exclusive
    /// request without [`ttl`](LockRequest::ttl), [`max_hold`](LockRequest::max_hold) and
    /// [`cooldown`](LockRequest::cooldown).
    ///
    /// ```
    /// # use std::time::Duration;
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// # let locks = stanchion::Locks::open("memory:").await?;
    /// let mut fences = Vec::new();
    /// for _ in 0..100 {
    ///     let guard = locks.lock("shard:7").linger(Duration::from_secs(1)).await?;
    ///     fences.push(guard.fence());
    /// }
    /// assert!(fences.is_sorted_by(|one, next| one < next));
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    pub fn linger(mut self, linger: Duration) -> Self {
        self.options.linger = Some(linger);
        self
    }

    /// Attaches text for people who inspect the key. At most 4 KiB.
    pub fn metadata(mut self, text: impl Into<String>) -> Self {
        self.options.metadata = Some(text.into());
        self
    }

    /// Attaches the origin of the call, such as a trace id, for people who inspect the key. At most 4 KiB.
    pub fn trace(mut self, text: impl Into<String>) -> Self {
        self.options.trace = Some(text.into());
        self
    }

    /// Fails the request with [`ErrorKind::Cancelled`] when the token fires.
    pub fn cancel(mut self, token: CancellationToken) -> Self {
        self.options.cancel = Some(token);
        self
    }

    /// Sets how much of the key is requested. Default: [`Demand::MUTEX`].
    pub fn demand(mut self, demand: Demand) -> Self {
        (self.options.units, self.options.capacity) = (demand.units(), demand.capacity());
        self
    }

    /// Sets the number of permits that the key has.
    pub(crate) fn limit(mut self, limit: u32) -> Self {
        self.options.capacity = limit;
        self
    }

    /// Requests several permits of a [`semaphore`](crate::Locks::semaphore) at once. Default: 1.
    pub fn permits(mut self, permits: u32) -> Self {
        self.options.units = permits;
        self
    }

    /// Sets the action when this hold is lost, in place of [`Builder::on_lost`](crate::Builder::on_lost).
    pub fn on_lost(mut self, policy: OnLost) -> Self {
        self.options.on_lost = Some(policy);
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
        self.options.wait = Some(Duration::ZERO);
        wait::acquire(&self.handle, &self.key, &self.options).await
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

impl IntoFuture for LockRequest {
    type Output = Result<Guard>;
    type IntoFuture = Pin<Box<dyn Future<Output = Result<Guard>> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            match wait::acquire(&self.handle, &self.key, &self.options).await? {
                Some(guard) => Ok(guard),
                // The wait ends without a grant only if the limit is zero.
                None => {
                    let key = self.handle.key(&self.key)?;
                    let message = "the key is locked or has waiters";
                    Err(self.handle.shared.error(ErrorKind::Busy, message).with_key(&key))
                }
            }
        })
    }
}
