//! Locks several keys, all or nothing.
//!
//! # Invariants
//! 1. A call locks its keys one after the other, in the order of their encoded names, not in the caller's order. All
//!    calls use the same order, so they cannot wait for each other in a circle.
//! 2. The keys that were granted so far are in guards. If the call ends early, it drops the guards, which releases the
//!    keys.

use std::convert::Infallible;
use std::future::{Future, IntoFuture};
use std::ops::Deref;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::clock::{BootTime, Clock};
use crate::error::{Error, ErrorKind, LossCause, Result};
use crate::fence::Fence;
use crate::guard::{Guard, Released};
use crate::handle::Handle;
use crate::key::{Key, normal};
use crate::options::Options;
use crate::store::Demand;
use crate::wait;

/// One key of [`Locks::lock_all`](crate::Locks::lock_all), and how it is locked. A string becomes an exclusive request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRequest {
    key: String,
    units: u32,
    capacity: u32,
}

impl KeyRequest {
    fn new(key: impl Into<String>, demand: Demand) -> Self {
        Self { key: key.into(), units: demand.units(), capacity: demand.capacity() }
    }

    /// Requests the key exclusively, as [`Locks::lock`](crate::Locks::lock) does.
    pub fn lock(key: impl Into<String>) -> Self {
        Self::new(key, Demand::MUTEX)
    }

    /// Requests the key for a reader, as [`Locks::read`](crate::Locks::read) does.
    pub fn read(key: impl Into<String>) -> Self {
        Self::new(key, Demand::READ)
    }

    /// Requests the key for a writer, as [`Locks::write`](crate::Locks::write) does.
    pub fn write(key: impl Into<String>) -> Self {
        Self::new(key, Demand::WRITE)
    }

    /// Requests `permits` of the key's `limit`, as [`Locks::semaphore`](crate::Locks::semaphore) does.
    pub fn semaphore(key: impl Into<String>, limit: u32, permits: u32) -> Self {
        Self { key: key.into(), units: permits, capacity: limit }
    }
}

impl<T: Into<String>> From<T> for KeyRequest {
    fn from(key: T) -> Self {
        Self::lock(key)
    }
}

/// A request for several keys. Await it to wait until all of them are held.
///
/// The keys are locked one after the other, in an order that is the same for all callers, so calls with overlapping
/// keys do not deadlock. While the call waits for a key, it keeps the keys that it has. A key that is named twice in the
/// same way is locked once. A caller that already holds one of the keys through another guard waits for itself.
///
/// # Errors
/// - The errors of an awaited [`LockRequest`](crate::LockRequest) for each key; the error names the key.
/// - [`ErrorKind::Lost`] if a key was lost while the call waited for another one.
/// - [`ErrorKind::InvalidArgument`] if there is no key, or if one key is requested in two ways.
///
/// After every error nothing is held.
///
/// # Cancel safety
/// A dropped request releases the keys that it has.
#[derive(Clone, Debug)]
#[must_use = "a request does nothing until it is awaited"]
pub struct LockAllRequest {
    /// The options of all keys. Its own key is not used.
    handle: Arc<Handle>,
    keys: Vec<KeyRequest>,
    options: Options,
}

impl LockAllRequest {
    pub(crate) fn new(handle: Arc<Handle>, keys: Vec<KeyRequest>) -> Self {
        // The keys are requested in an order, which a key that is granted without the store would break.
        Self { handle, keys, options: Options { linger: Some(Duration::ZERO), ..Options::default() } }
    }

    /// Limits the wait for all keys together; at the limit the call fails with [`ErrorKind::Timeout`]. Default: no
    /// limit.
    pub fn wait(mut self, limit: Duration) -> Self {
        self.options.wait = Some(limit);
        self
    }

    /// Sets [`LockRequest::max_hold`](crate::LockRequest::max_hold) for each key, counted from its own grant.
    pub fn max_hold(mut self, longest: Duration) -> Self {
        self.options.max_hold = Some(longest);
        self
    }

    /// Sets [`LockRequest::heartbeat_within`](crate::LockRequest::heartbeat_within) for all keys, counted from when all
    /// are held: see [`Guards::heartbeat`].
    pub fn heartbeat_within(mut self, silence: Duration) -> Self {
        self.options.heartbeat_within = Some(silence);
        self
    }

    /// Sets [`LockRequest::cooldown`](crate::LockRequest::cooldown) for each key.
    pub fn cooldown(mut self, closed: Duration) -> Self {
        self.options.cooldown = Some(closed);
        self
    }

    /// Sets [`LockRequest::metadata`](crate::LockRequest::metadata) for each key.
    pub fn metadata(mut self, text: impl Into<String>) -> Self {
        self.options.metadata = Some(text.into());
        self
    }

    /// Sets [`LockRequest::trace`](crate::LockRequest::trace) for each key.
    pub fn trace(mut self, text: impl Into<String>) -> Self {
        self.options.trace = Some(text.into());
        self
    }

    /// Fails the request with [`ErrorKind::Cancelled`] when the token fires.
    pub fn cancel(mut self, token: CancellationToken) -> Self {
        self.options.cancel = Some(token);
        self
    }

    /// Tries once. Returns `None`, and holds nothing, if one of the keys is not free.
    ///
    /// # Errors
    /// The errors of the awaited request, except [`ErrorKind::Timeout`] and [`ErrorKind::Busy`].
    ///
    /// # Cancel safety
    /// The same as for the awaited request.
    pub async fn try_acquire(mut self) -> Result<Option<Guards>> {
        self.options.wait = Some(Duration::ZERO);
        self.acquire().await
    }

    /// Waits for all keys, runs `body` with their guards, and releases them, as
    /// [`LockRequest::run`](crate::LockRequest::run) does.
    ///
    /// If one of the keys is lost, the body's future is dropped at its next await, and the call fails with
    /// [`ErrorKind::Lost`].
    ///
    /// # Errors
    /// The errors of the awaited request, and [`ErrorKind::Lost`].
    ///
    /// # Cancel safety
    /// A dropped future drops the body and releases the keys.
    pub async fn run<T>(self, body: impl AsyncFnOnce(&Guards) -> T) -> Result<T> {
        let guards = self.await?;
        let value = tokio::select! {
            biased;
            value = body(&guards) => value,
            (key, cause) = guards.lost() => return Err(guards.lost_error(&key, cause)),
        };
        guards.check()?;
        for guard in guards.guards {
            let (key, store) = (guard.key().clone(), guard.store_name());
            // If the release failed, an event reports the error and the keeper keeps releasing.
            if let Ok(Released::AlreadyLost) = guard.release().await {
                return Err(lost(&key, store, LossCause::Missing));
            }
        }
        Ok(value)
    }

    /// Returns each key once, in the order of invariant 1.
    fn sorted(&self) -> Result<Vec<(Key, &KeyRequest)>> {
        let mut keys = Vec::with_capacity(self.keys.len());
        for request in &self.keys {
            keys.push((self.handle.key(&request.key)?, request));
        }
        keys.sort_by(|(a, _), (b, _)| a.as_encoded().cmp(b.as_encoded()));
        for pair in keys.windows(2) {
            let [(key, one), (other, another)] = pair else { continue };
            if key == other && (one.units, one.capacity) != (another.units, another.capacity) {
                let message = "one call requests the key in two ways: name it once";
                return Err(Error::new(ErrorKind::InvalidArgument, message).with_key(key));
            }
        }
        keys.dedup_by(|(a, _), (b, _)| a == b);
        if keys.is_empty() {
            return Err(Error::new(ErrorKind::InvalidArgument, "there is no key to lock: name at least one"));
        }
        Ok(keys)
    }

    async fn acquire(self) -> Result<Option<Guards>> {
        let shared = &self.handle.shared;
        let started = shared.clock.now();
        let mut guards = Guards { guards: Vec::with_capacity(self.keys.len()) };
        for (_, key) in self.sorted()? {
            let mut options = self.options.clone();
            (options.units, options.capacity) = (key.units, key.capacity);
            let waited = shared.clock.now().since(started);
            // The rest of the limit is never zero, because a limit of zero means an attempt without waiting.
            let left = |limit: Duration| limit.saturating_sub(waited).max(Duration::from_nanos(1));
            options.wait = options.wait.map(|limit| if limit.is_zero() { limit } else { left(limit) });
            // The caller does nothing under a key until all keys are held, so an early end causes no cooldown.
            options.cooldown = None;
            let granted = tokio::select! {
                biased;
                granted = wait::acquire(&self.handle, &key.key, &options) => granted,
                (key, cause) = guards.lost() => return Err(guards.lost_error(&key, cause)),
                never = guards.keep_alive(&shared.clock, options.heartbeat_within) => match never {},
            };
            match granted? {
                Some(guard) => guards.guards.push(guard),
                None => return Ok(None),
            }
        }
        guards.check()?;
        for guard in &guards.guards {
            guard.set_cooldown(self.options.cooldown)?;
        }
        guards.note_heartbeat(shared.clock.now());
        Ok(Some(guards))
    }
}

impl IntoFuture for LockAllRequest {
    type Output = Result<Guards>;
    type IntoFuture = Pin<Box<dyn Future<Output = Result<Guards>> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let limit = self.options.wait.unwrap_or_default();
            let shared = self.handle.shared.clone();
            let message = format!("not all keys were obtained within {limit:?}");
            match self.acquire().await {
                Ok(Some(guards)) => Ok(guards),
                // The wait ends without a grant only if the limit is zero.
                Ok(None) => Err(shared.error(ErrorKind::Busy, "not all keys are free, and the call does not wait")),
                Err(error) if error.kind() == ErrorKind::Timeout => Err(error.restate(ErrorKind::Timeout, message)),
                Err(error) => Err(error),
            }
        })
    }
}

/// The guards of several keys, in the order of the keys. Dropping it releases all of them.
///
/// It dereferences to a slice of [`Guard`]s.
#[derive(Debug)]
#[must_use = "dropping the guards releases the locks"]
pub struct Guards {
    guards: Vec<Guard>,
}

impl Deref for Guards {
    type Target = [Guard];

    fn deref(&self) -> &[Guard] {
        &self.guards
    }
}

impl Guards {
    /// Returns the fence of a key, or `None` if the key is not among them. Each key has its own fence.
    pub fn fence(&self, key: &str) -> Option<Fence> {
        let name = normal(key);
        self.guards.iter().find(|guard| guard.key().name() == name).map(Guard::fence)
    }

    /// Returns whether all locks are held, by the holder's clock. Does no I/O.
    pub fn is_held(&self) -> bool {
        self.guards.iter().all(Guard::is_held)
    }

    /// Returns an error if one of the locks is lost. Does no I/O.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`].
    pub fn check(&self) -> Result<()> {
        self.guards.iter().try_for_each(Guard::check)
    }

    /// Returns the time until the first of the locks is lost unless something renews it: see [`Guard::remaining`].
    pub fn remaining(&self) -> Option<Duration> {
        self.guards.iter().filter_map(Guard::remaining).min()
    }

    /// Waits until one of the locks is lost, and returns its key and the cause.
    ///
    /// # Cancel safety
    /// The same as for [`Guard::lost`].
    pub async fn lost(&self) -> (Key, LossCause) {
        let mut waiting: Vec<_> = self.guards.iter().map(|guard| (guard.key(), Box::pin(guard.lost()))).collect();
        std::future::poll_fn(|context| {
            for (key, lost) in &mut waiting {
                if let std::task::Poll::Ready(cause) = lost.as_mut().poll(context) {
                    return std::task::Poll::Ready(((*key).clone(), cause));
                }
            }
            std::task::Poll::Pending
        })
        .await
    }

    /// Calls [`Guard::heartbeat`] for each key.
    ///
    /// # Errors
    /// The errors of [`Guard::heartbeat`].
    pub fn heartbeat(&self) -> Result<()> {
        self.guards.iter().try_for_each(Guard::heartbeat)
    }

    /// Releases all locks. Returns [`Released::AlreadyLost`] if one of them had been lost.
    ///
    /// # Errors
    /// The first error of the store. All locks are given up all the same: the keeper keeps releasing them.
    ///
    /// # Cancel safety
    /// If the future is dropped, the keeper finishes the release.
    pub async fn release(self) -> Result<Released> {
        let mut outcome = Ok(Released::Now);
        for guard in self.guards {
            match guard.release().await {
                Ok(Released::Now) => {}
                Ok(Released::AlreadyLost) => outcome = outcome.map(|_| Released::AlreadyLost),
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        outcome
    }

    /// Sends heartbeats for work that has not begun, while the call still waits for the last of its keys.
    async fn keep_alive(&self, clock: &Clock, within: Option<Duration>) -> Infallible {
        let Some(within) = within else { return std::future::pending().await };
        loop {
            clock.sleep(within / 3).await;
            self.note_heartbeat(clock.now());
        }
    }

    fn note_heartbeat(&self, now: BootTime) {
        self.guards.iter().for_each(|guard| guard.note_heartbeat(now));
    }

    fn lost_error(&self, key: &Key, cause: LossCause) -> Error {
        let store = self.guards.first().map_or("", Guard::store_name);
        lost(key, store, cause)
    }
}

fn lost(key: &Key, store: &'static str, cause: LossCause) -> Error {
    Error::lost(cause).with_key(key).with_store(store)
}
