//! A request for a lock.

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

/// A request for a lock: await it to wait for the lock, or give it limits first.
///
/// # Errors
/// When awaited: [`ErrorKind::Timeout`] at the wait limit, [`ErrorKind::Busy`] if that is zero, [`ErrorKind::Cancelled`], [`ErrorKind::Draining`],
/// [`ErrorKind::InvalidArgument`] for a key or an option out of range,
/// [`ErrorKind::Indeterminate`] if the store's answer was lost and could not be had again, and the store's faults. After
/// every error nothing is held: what the request may have got is cleaned up.
///
/// # Cancel safety
/// A dropped request loses its place in the queue and leaves nothing behind: the keeper ends what it may have got.
///
/// ```
/// # use std::time::Duration;
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// # let locks = stanchion::Locks::open("memory:").await?;
/// let guard = locks.lock("report").wait(Duration::from_secs(5)).metadata("nightly").await?;
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
#[derive(Clone, Debug)]
#[must_use = "a request does nothing until it is awaited"]
pub struct LockRequest {
    pub(crate) locks: Locks,
    pub(crate) key: String,
    pub(crate) wait: Option<Duration>,
    pub(crate) ttl: Option<Duration>,
    /// The ttl is the store's time, and not the holder's.
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

    /// Waits no longer than this, then [`ErrorKind::Timeout`]. Zero: one attempt, then [`ErrorKind::Busy`]. Default: no
    /// limit.
    ///
    /// While the store is away, the call keeps trying until the limit, and fails with the store's fault then. Without a limit
    /// the [`RetryPolicy`](crate::RetryPolicy) limits the call until the store has answered it once; from then on it waits
    /// through an outage of any length.
    pub fn wait(mut self, limit: Duration) -> Self {
        self.wait = Some(limit);
        self
    }

    /// A fixed lifetime: the hold lasts this long, whatever becomes of this process, moved only by [`extend`](Guard::extend).
    /// Default: as long as the session lives and the guard is not dropped.
    ///
    /// The holder has all of this time, counted from before the request. Others get the key a little later if it is not
    /// released: the store keeps it for the time in which the holder stops as well ([`Guard::valid_for`]), a quarter of the
    /// lifetime and 5 s at most, and for the [`Drift`](crate::Drift) of clocks. For a hold that is left to expire after an exact
    /// time see [`expires_after`](LockRequest::expires_after).
    pub fn ttl(mut self, ttl: Duration) -> Self {
        (self.ttl, self.is_exact) = (Some(ttl), false);
        self
    }

    /// A fixed lifetime that ends in the store exactly this long after the grant: for a rate limit, whose hold is detached and
    /// left to expire. In place of [`ttl`](LockRequest::ttl).
    ///
    /// The guard itself is lost earlier, by the time that a holder has to stop: after about three quarters of a short lifetime.
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

    /// The hold is lost after this time, however lively the session is: for work that may hang. The holder has all of it, as
    /// with [`ttl`](LockRequest::ttl).
    pub fn max_hold(mut self, longest: Duration) -> Self {
        self.max_hold = Some(longest);
        self
    }

    /// The hold is lost when [`Guard::heartbeat`] was not called for this long: for work that may hang.
    pub fn heartbeat_within(mut self, silence: Duration) -> Self {
        self.heartbeat_within = Some(silence);
        self
    }

    /// After the release the key stays closed for this long.
    pub fn cooldown(mut self, closed: Duration) -> Self {
        self.cooldown = Some(closed);
        self
    }

    /// Text for people who inspect the key: at most 4 KiB.
    pub fn metadata(mut self, text: impl Into<String>) -> Self {
        self.metadata = Some(text.into());
        self
    }

    /// Where the call comes from, for people who inspect the key: at most 4 KiB.
    pub fn trace(mut self, text: impl Into<String>) -> Self {
        self.trace = Some(text.into());
        self
    }

    /// Gives up with [`ErrorKind::Cancelled`] when this fires.
    pub fn cancel(mut self, token: CancellationToken) -> Self {
        self.cancel = Some(token);
        self
    }

    /// Takes so much of the key: default [`Demand::MUTEX`].
    pub fn demand(mut self, demand: Demand) -> Self {
        (self.units, self.capacity) = (demand.units(), demand.capacity());
        self
    }

    /// Takes so many permits of a [`semaphore`](Locks::semaphore) at once. Default: one.
    pub fn permits(mut self, permits: u32) -> Self {
        self.units = permits;
        self
    }

    /// What happens when this hold is lost, in place of what the handle says ([`Builder::on_lost`](crate::Builder::on_lost)).
    pub fn on_lost(mut self, policy: OnLost) -> Self {
        self.on_lost = Some(policy);
        self
    }

    /// One attempt: `None` if another holds the key or waits for it. A wait limit is ignored.
    ///
    /// # Errors
    /// As the request when awaited, but for the wait limit.
    ///
    /// # Cancel safety
    /// As the request when awaited.
    pub async fn try_acquire(mut self) -> Result<Option<Guard>> {
        self.wait = Some(Duration::ZERO);
        wait::acquire(&self).await
    }

    /// Waits for the lock, runs `body` with its guard and releases. When the lock is lost the body's future is dropped at
    /// its next await and the call fails with [`ErrorKind::Lost`].
    ///
    /// What the body returns is returned, an error of its own too: a failing release does not mask it (the keeper goes on
    /// trying, and an event tells). If the hold was gone when the body ended, that is [`ErrorKind::Lost`], because the
    /// last effects of the body may have been fenced out.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// # let locks = stanchion::Locks::open("memory:").await?;
    /// let fence = locks.lock("report").run(async |guard| guard.fence()).await?;
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// As the request when awaited, and [`ErrorKind::Lost`].
    ///
    /// # Cancel safety
    /// A dropped future drops the body and releases.
    pub async fn run<T>(self, body: impl AsyncFnOnce(&Guard) -> T) -> Result<T> {
        let guard = self.await?;
        let finished = tokio::select! {
            biased;
            value = body(&guard) => Ok(value),
            cause = guard.lost() => Err(cause),
        };
        conclude(guard, finished).await
    }

    /// Checks the options, not the key.
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

/// Releases after the work under the lock has ended, with its value or because the lock was lost: what
/// [`LockRequest::run`] says of both.
pub(crate) async fn conclude<T>(guard: Guard, finished: Result<T, LossCause>) -> Result<T> {
    let (key, store) = (guard.key().clone(), guard.store_name());
    let lost = |cause| Error::lost(cause).with_key(&key).with_store(store);
    let value = finished.map_err(lost)?;
    if let Some(cause) = guard.loss() {
        return Err(lost(cause));
    }
    match guard.release().await {
        Ok(Released::AlreadyLost) => Err(lost(LossCause::Missing)),
        // A release that failed is told by an event, and the keeper goes on with it.
        Ok(Released::Now) | Err(_) => Ok(value),
    }
}

/// A wait limit may be short, even shorter than other durations, but not absurdly long.
fn check_wait(wait: Duration) -> Result<()> {
    if wait <= *crate::locks::DURATION_RANGE.end() {
        return Ok(());
    }
    let message =
        format!("the wait limit is {wait:?}: it must be at most 30 days; leave it out to wait without a limit");
    Err(Error::new(ErrorKind::InvalidArgument, message))
}

impl IntoFuture for LockRequest {
    type Output = Result<Guard>;
    type IntoFuture = Pin<Box<dyn Future<Output = Result<Guard>> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            match wait::acquire(&self).await? {
                Some(guard) => Ok(guard),
                // Only a limit of zero ends without a grant.
                None => {
                    let key = self.locks.key(&self.key)?;
                    let message = "another holds it or waits for it";
                    Err(self.locks.handle.shared.error(ErrorKind::Busy, message).with_key(&key))
                }
            }
        })
    }
}
