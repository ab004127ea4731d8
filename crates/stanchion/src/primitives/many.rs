//! Several keys, all or nothing.
//!
//! # Invariants
//! 1. Keys are asked for one after the other, in the order of their encoded names, whatever order the caller gave. Every call
//!    goes the same way, so none waits for one that waits for it.
//! 2. What was granted so far is in guards: whatever ends the call drops them, and that releases.

use std::convert::Infallible;
use std::future::{Future, IntoFuture};
use std::ops::Deref;
use std::pin::Pin;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::clock::{BootTime, Clock};
use crate::error::{Error, ErrorKind, LossCause, Result};
use crate::fence::Fence;
use crate::guard::{Guard, Released};
use crate::key::{Key, normal};
use crate::request::LockRequest;
use crate::store::Demand;
use crate::wait;

/// A key of [`Locks::lock_all`](crate::Locks::lock_all), and how it is wanted. A text is a key that is wanted alone.
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

    /// As [`Locks::lock`](crate::Locks::lock).
    pub fn lock(key: impl Into<String>) -> Self {
        Self::new(key, Demand::MUTEX)
    }

    /// As [`Locks::read`](crate::Locks::read).
    pub fn read(key: impl Into<String>) -> Self {
        Self::new(key, Demand::READ)
    }

    /// As [`Locks::write`](crate::Locks::write).
    pub fn write(key: impl Into<String>) -> Self {
        Self::new(key, Demand::WRITE)
    }

    /// `permits` of a [`Locks::semaphore`](crate::Locks::semaphore) with this limit.
    pub fn semaphore(key: impl Into<String>, limit: u32, permits: u32) -> Self {
        Self { key: key.into(), units: permits, capacity: limit }
    }
}

impl<T: Into<String>> From<T> for KeyRequest {
    fn from(key: T) -> Self {
        Self::lock(key)
    }
}

/// A request for several keys: await it to wait until all of them are held.
///
/// The keys are taken one after the other in one order that is the same for all callers, so calls with overlapping sets do
/// not dead-lock; while it waits for one the call keeps those it has. A caller that holds one of the keys already, by another
/// guard, waits for itself. A key that is named twice in the same way is taken once.
///
/// # Errors
/// As [`LockRequest`] for each key; the error names the key. [`ErrorKind::Lost`] if a key was lost while the call waited for
/// another. [`ErrorKind::InvalidArgument`] for no key, or for one key in two ways. After every error nothing is held.
///
/// # Cancel safety
/// A dropped request releases what it has got.
#[derive(Clone, Debug)]
#[must_use = "a request does nothing until it is awaited"]
pub struct LockAllRequest {
    /// With the options, and without a key.
    pattern: LockRequest,
    wanted: Vec<KeyRequest>,
}

impl LockAllRequest {
    pub(crate) fn new(pattern: LockRequest, wanted: Vec<KeyRequest>) -> Self {
        Self { pattern, wanted }
    }

    /// Waits no longer than this for all of them, then [`ErrorKind::Timeout`]. Default: no limit.
    pub fn wait(mut self, limit: Duration) -> Self {
        self.pattern = self.pattern.wait(limit);
        self
    }

    /// As [`LockRequest::max_hold`], for each key from its own grant on.
    pub fn max_hold(mut self, longest: Duration) -> Self {
        self.pattern = self.pattern.max_hold(longest);
        self
    }

    /// As [`LockRequest::heartbeat_within`], for all keys, from when all are held: see [`Guards::heartbeat`].
    pub fn heartbeat_within(mut self, silence: Duration) -> Self {
        self.pattern = self.pattern.heartbeat_within(silence);
        self
    }

    /// As [`LockRequest::cooldown`], for each key.
    pub fn cooldown(mut self, closed: Duration) -> Self {
        self.pattern = self.pattern.cooldown(closed);
        self
    }

    /// As [`LockRequest::metadata`], for each key.
    pub fn metadata(mut self, text: impl Into<String>) -> Self {
        self.pattern = self.pattern.metadata(text);
        self
    }

    /// As [`LockRequest::trace`], for each key.
    pub fn trace(mut self, text: impl Into<String>) -> Self {
        self.pattern = self.pattern.trace(text);
        self
    }

    /// Gives up with [`ErrorKind::Cancelled`] when this fires.
    pub fn cancel(mut self, token: CancellationToken) -> Self {
        self.pattern = self.pattern.cancel(token);
        self
    }

    /// One attempt: `None` if one of the keys is not free, and then none of them is held.
    ///
    /// # Errors
    /// As the request when awaited, but for the wait limit.
    ///
    /// # Cancel safety
    /// As the request when awaited.
    pub async fn try_acquire(mut self) -> Result<Option<Guards>> {
        self.pattern.wait = Some(Duration::ZERO);
        self.acquire().await
    }

    /// Waits for all keys, runs `body` and releases. As [`LockRequest::run`]: when one of the keys is lost the body's future
    /// is dropped, and the call fails with [`ErrorKind::Lost`].
    ///
    /// # Errors
    /// As the request when awaited.
    ///
    /// # Cancel safety
    /// A dropped future drops the body and releases.
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
            // A release that failed is told by an event, and the keeper goes on with it.
            if let Ok(Released::AlreadyLost) = guard.release().await {
                return Err(lost(&key, store, LossCause::Missing));
            }
        }
        Ok(value)
    }

    /// In the one order (invariant 1), each key once.
    fn sorted(&self) -> Result<Vec<(Key, &KeyRequest)>> {
        let mut keys = Vec::with_capacity(self.wanted.len());
        for wanted in &self.wanted {
            keys.push((self.pattern.locks.key(&wanted.key)?, wanted));
        }
        keys.sort_by(|(a, _), (b, _)| a.as_encoded().cmp(b.as_encoded()));
        for pair in keys.windows(2) {
            let [(key, one), (other, another)] = pair else { continue };
            if key == other && (one.units, one.capacity) != (another.units, another.capacity) {
                let message = "the key is wanted in two ways by one call: name it once";
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
        let shared = self.pattern.locks.handle.shared.clone();
        let started = shared.clock.now();
        let mut guards = Guards { guards: Vec::with_capacity(self.wanted.len()) };
        for (_, wanted) in self.sorted()? {
            let mut request = self.pattern.clone();
            (request.key, request.units, request.capacity) = (wanted.key.clone(), wanted.units, wanted.capacity);
            let waited = shared.clock.now().since(started);
            // What is left of the limit; a limit that is over by now is not one attempt without waiting.
            let left = |limit: Duration| limit.saturating_sub(waited).max(Duration::from_nanos(1));
            request.wait = request.wait.map(|limit| if limit.is_zero() { limit } else { left(limit) });
            // Nothing is done under a key before all are held, so nothing is closed behind it.
            request.cooldown = None;
            let granted = tokio::select! {
                biased;
                granted = wait::acquire(&request) => granted,
                (key, cause) = guards.lost() => return Err(guards.lost_error(&key, cause)),
                never = guards.keep_alive(&shared.clock, request.heartbeat_within) => match never {},
            };
            match granted? {
                Some(guard) => guards.guards.push(guard),
                None => return Ok(None),
            }
        }
        guards.check()?;
        for guard in &guards.guards {
            guard.set_cooldown(self.pattern.cooldown)?;
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
            let limit = self.pattern.wait.unwrap_or_default();
            let shared = self.pattern.locks.handle.shared.clone();
            let message = format!("not all keys were obtained within {limit:?}");
            match self.acquire().await {
                Ok(Some(guards)) => Ok(guards),
                // Only a limit of zero ends so.
                Ok(None) => Err(shared.error(ErrorKind::Busy, "not all keys are free, and this was not to wait")),
                Err(error) if error.kind() == ErrorKind::Timeout => Err(error.restate(ErrorKind::Timeout, message)),
                Err(error) => Err(error),
            }
        })
    }
}

/// The guards of several keys, in the order of the keys. Dropping it releases all of them.
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
    /// The fence of this key: each key has its own. `None` for a key that is not among them.
    pub fn fence(&self, key: &str) -> Option<Fence> {
        let name = normal(key);
        self.guards.iter().find(|guard| guard.key().name() == name).map(Guard::fence)
    }

    /// Whether all of them are still believed to be held. Local.
    pub fn is_held(&self) -> bool {
        self.guards.iter().all(Guard::is_held)
    }

    /// An error if one of them is lost. Local.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`].
    pub fn check(&self) -> Result<()> {
        self.guards.iter().try_for_each(Guard::check)
    }

    /// How long until the first of them is lost if nothing renews it: see [`Guard::remaining`].
    pub fn remaining(&self) -> Option<Duration> {
        self.guards.iter().filter_map(Guard::remaining).min()
    }

    /// Waits until one of them is lost.
    ///
    /// # Cancel safety
    /// As [`Guard::lost`].
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

    /// [`Guard::heartbeat`] of each.
    ///
    /// # Errors
    /// As [`Guard::heartbeat`].
    pub fn heartbeat(&self) -> Result<()> {
        self.guards.iter().try_for_each(Guard::heartbeat)
    }

    /// Releases all of them. [`Released::AlreadyLost`] if one of them had been lost.
    ///
    /// # Errors
    /// The first of the store's faults. All are given up all the same: the keeper goes on ending them.
    ///
    /// # Cancel safety
    /// If the future is dropped the keeper finishes the release.
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

    /// Gives signs of life for work that has not begun: the last of the keys is still waited for.
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
