//! The same API without async: calls that block their thread until they are done.
//!
//! ```
//! use std::time::Duration;
//! use stanchion::blocking::Locks;
//!
//! # fn charge(_fence: stanchion::Fence) {}
//! let locks = Locks::open("memory:")?; // or sqlite:FOLDER, redis://HOST, …
//! let guard = locks.lock("invoice:42").wait(Duration::from_secs(5)).acquire()?;
//! charge(guard.fence());
//! guard.release()?; // or drop(guard): released in the background
//!
//! let total = locks.lock("report").run(|guard| {
//!     (0..1_000u64).take_while(|_| guard.is_held()).sum::<u64>()
//! })?;
//! # assert_eq!(total, 499_500);
//! locks.close()?;
//! # Ok::<(), stanchion::Error>(())
//! ```
//!
//! No runtime is needed: threads of the library do all background work. Guards, requests and handles behave as in async
//! code. [`Locks::from`] and [`as_async`](Locks::as_async) convert between the two.
//!
//! # In async code
//! A blocking call blocks its thread, and everything else that this thread should run. In async code, make the call in
//! `spawn_blocking`, or use the async API.
//!
//! A blocking call inside a task works all the same, even in a runtime with one thread, because it needs nothing that
//! runs there. It deadlocks only where every mutex would: if the lock is held by a task that must run on the blocked
//! thread to release it, and no [`wait`](LockRequest::wait) limits the request. If you pass your own connection pool
//! (`Postgres::from_pool`), the pool must live in another runtime than the blocked one.

mod driver;
mod guard;
mod request;

use std::time::Duration;

use crate::builder::Builder;
use crate::error::{Error, Result};
use crate::event::Event;
use crate::fence::Fence;
use crate::guard::Released;
use crate::observer::EventStream;
use crate::store::{Capabilities, Cursor, ForceReleaseOutcome, KeyState, Listing, Store};
use crate::token::{SessionId, Token};
use driver::Driver;

pub use guard::Guard;
pub use request::LockRequest;

/// A handle on the locks of one store, for blocking code: see [`stanchion::Locks`](crate::Locks).
///
/// It is cheap to clone, and all clones share one session.
#[derive(Clone, Debug)]
pub struct Locks {
    locks: crate::Locks,
    driver: Driver,
}

/// Converts an async handle into a blocking one with the same session.
impl From<crate::Locks> for Locks {
    fn from(locks: crate::Locks) -> Self {
        Self { locks, driver: Driver::default() }
    }
}

impl Builder {
    /// Connects to the store, and opens a handle for blocking code.
    ///
    /// # Errors
    /// The errors of [`open`](Builder::open).
    pub fn open_blocking(self) -> Result<Locks> {
        let driver = Driver::default();
        let locks = driver.call(self.open())?;
        Ok(Locks { locks, driver })
    }
}

impl Locks {
    /// Opens the store that a URL names, with a session. [`stanchion::Locks::open`](crate::Locks::open) lists the URLs.
    ///
    /// # Errors
    /// The errors of [`stanchion::Locks::open`](crate::Locks::open).
    pub fn open(url: &str) -> Result<Self> {
        Self::builder(url).open_blocking()
    }

    /// Returns a [`Builder`] for configuring the handle. [`open_blocking`](Builder::open_blocking) opens it.
    pub fn builder(url: &str) -> Builder {
        crate::Locks::builder(url)
    }

    /// Opens a handle on the given store, with default settings.
    ///
    /// # Errors
    /// The errors of [`stanchion::Locks::open`](crate::Locks::open).
    pub fn with_store(store: impl Store) -> Result<Self> {
        Self::builder_with_store(store).open_blocking()
    }

    /// Returns a [`Builder`] for configuring a handle on the given store.
    pub fn builder_with_store(store: impl Store) -> Builder {
        crate::Locks::builder_with_store(store)
    }

    /// Returns the same handle for async code.
    pub fn as_async(&self) -> &crate::Locks {
        &self.locks
    }

    /// Requests a key exclusively, first come, first served.
    pub fn lock(&self, key: impl Into<String>) -> LockRequest {
        self.request(self.locks.lock(key))
    }

    /// Requests a key that other readers may hold at the same time.
    pub fn read(&self, key: impl Into<String>) -> LockRequest {
        self.request(self.locks.read(key))
    }

    /// Requests a key exclusively that others [`read`](Locks::read).
    pub fn write(&self, key: impl Into<String>) -> LockRequest {
        self.request(self.locks.write(key))
    }

    /// Requests one of `limit` permits of a key.
    pub fn semaphore(&self, key: impl Into<String>, limit: u32) -> LockRequest {
        self.request(self.locks.semaphore(key, limit))
    }

    /// Blocks on a call of the async API, for everything that this module does not have: several keys, runs, elections,
    /// the status of a hold.
    ///
    /// ```
    /// use stanchion::{Error, blocking::Locks};
    ///
    /// let locks = Locks::open("memory:")?;
    /// let accounts = locks.block_on(async |locks| locks.lock_all(["account:1", "account:2"]).await)?;
    /// assert!(accounts.is_held());
    /// locks.block_on(async |locks| locks.once("report").run(async |_| Ok::<_, Error>(())).await)?;
    /// let leadership = locks.block_on(async |locks| locks.elect("scheduler").campaign().await)?;
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// The errors of the call.
    pub fn block_on<T, E>(&self, call: impl AsyncFnOnce(&crate::Locks) -> Result<T, E>) -> Result<T, E>
    where
        E: From<Error>,
    {
        self.driver.call(call(&self.locks))
    }

    /// Tries once to lock a key. If someone else holds the lock or waits for it, you get `None`, not an error.
    ///
    /// # Errors
    /// The errors of [`LockRequest::try_acquire`].
    pub fn try_lock(&self, key: impl Into<String>) -> Result<Option<Guard>> {
        self.lock(key).try_acquire()
    }

    /// Takes over a detached hold with its token, in this process or another one. If several callers try, exactly one
    /// succeeds.
    ///
    /// # Errors
    /// The errors of [`stanchion::Locks::adopt`](crate::Locks::adopt).
    pub fn adopt(&self, token: Token) -> Result<Guard> {
        let guard = self.driver.call(self.locks.adopt(token))?;
        Ok(Guard::new(guard, self.driver.clone()))
    }

    /// Releases the hold of a token, in this process or another one, and keeps its key closed for `cooldown`. Returns
    /// whether the token still held its key.
    ///
    /// # Errors
    /// The errors of [`stanchion::Locks::release`](crate::Locks::release).
    pub fn release(&self, token: &Token, cooldown: Option<Duration>) -> Result<Released> {
        self.driver.call(self.locks.release(token, cooldown))
    }

    /// Sets the remaining time of a detached hold to `ttl` from now, without adopting it. The new time may be shorter.
    ///
    /// # Errors
    /// The errors of [`stanchion::Locks::extend`](crate::Locks::extend).
    pub fn extend(&self, token: &Token, ttl: Duration) -> Result<()> {
        self.driver.call(self.locks.extend(token, ttl))
    }

    /// Releases the key if it [lingers](crate::LockRequest::linger) in this process unused. Returns whether it did.
    ///
    /// # Errors
    /// The errors of [`stanchion::Locks::release_lingering`](crate::Locks::release_lingering).
    pub fn release_lingering(&self, key: impl Into<String>) -> Result<bool> {
        self.driver.call(self.locks.release_lingering(key))
    }

    /// Releases every key that [lingers](crate::LockRequest::linger) in this process unused. Returns their number.
    ///
    /// # Errors
    /// The errors of [`stanchion::Locks::release_all_lingering`](crate::Locks::release_all_lingering).
    pub fn release_all_lingering(&self) -> Result<usize> {
        self.driver.call(self.locks.release_all_lingering())
    }

    /// Returns the holders, waiters and fences of a key when the store was queried. For display only.
    ///
    /// # Errors
    /// The errors of [`stanchion::Locks::inspect`](crate::Locks::inspect).
    pub fn inspect(&self, key: impl Into<String>) -> Result<KeyState> {
        self.driver.call(self.locks.inspect(key))
    }

    /// Returns the keys of this handle's namespace that begin with `prefix` and are held, waited for or in cooldown.
    ///
    /// Each key appears once, in order. Entries that cannot be read are listed too. The result is not one snapshot.
    ///
    /// # Errors
    /// Any error of the store. A damaged entry is not an error.
    pub fn list(&self, prefix: &str) -> Result<Listing> {
        self.driver.call(self.locks.list(prefix))
    }

    /// Returns one page of [`list`](Self::list): the first page without a cursor, the next one with the cursor in
    /// [`Listing::next`].
    ///
    /// # Errors
    /// The errors of [`stanchion::Locks::list_page`](crate::Locks::list_page).
    pub fn list_page(&self, prefix: &str, cursor: Option<&Cursor>) -> Result<Listing> {
        self.driver.call(self.locks.list_page(prefix, cursor))
    }

    /// Returns whether the key was locked when the store was queried.
    ///
    /// For display only: to make a decision, use [`try_lock`](Locks::try_lock).
    ///
    /// # Errors
    /// The errors of [`inspect`](Locks::inspect).
    pub fn is_locked(&self, key: impl Into<String>) -> Result<bool> {
        self.driver.call(self.locks.is_locked(key))
    }

    /// Returns whether the token held its key when the store was queried.
    ///
    /// For display only: to protect a resource, let the resource check the fence.
    ///
    /// # Errors
    /// Any error of the store.
    pub fn owns(&self, token: &Token) -> Result<bool> {
        self.driver.call(self.locks.owns(token))
    }

    /// Releases the hold of `key` with this fence, even if another process holds it.
    ///
    /// For people who know that the holder is dead or wrong.
    ///
    /// # Errors
    /// The errors of [`stanchion::Locks::force_release`](crate::Locks::force_release).
    pub fn force_release(
        &self,
        key: impl Into<String>,
        fence: Fence,
        reason: impl Into<String>,
    ) -> Result<ForceReleaseOutcome> {
        self.driver.call(self.locks.force_release(key, fence, reason))
    }

    /// Returns an iterator of this handle's events from now on. It blocks until the next event, and ends when the
    /// handle is gone.
    pub fn events(&self) -> Events {
        Events(self.locks.events())
    }

    /// Returns the store's warnings so far about settings that may lose locks, as text for people. An empty list is
    /// good.
    pub fn warnings(&self) -> Vec<String> {
        self.locks.warnings()
    }

    /// Stops new holds: waiting calls and later ones fail with [`ErrorKind::Draining`](crate::ErrorKind::Draining).
    ///
    /// Existing holds stay, and [`draining`](crate::Guard::draining) shows them the reason. Draining cannot be undone.
    /// If it is called again, the first reason stays.
    pub fn drain(&self, reason: &str) {
        self.locks.drain(reason);
    }

    /// Returns the reason if this handle is draining.
    pub fn draining(&self) -> Option<&str> {
        self.locks.draining()
    }

    /// Releases all holds and ends the session. Guards that still exist are lost.
    ///
    /// # Errors
    /// The errors of [`stanchion::Locks::close`](crate::Locks::close).
    pub fn close(&self) -> Result<()> {
        self.driver.call(self.locks.close())
    }

    /// Returns the current session if one is open. After a session is lost, the keeper opens another one.
    pub fn session(&self) -> Option<SessionId> {
        self.locks.session()
    }

    /// Returns the capabilities of the store.
    pub fn capabilities(&self) -> Capabilities {
        self.locks.capabilities()
    }

    /// Makes a blocking request from an async one.
    fn request(&self, request: crate::LockRequest) -> LockRequest {
        LockRequest::new(request, self.driver.clone())
    }
}

/// An iterator of one handle's events that blocks until the next one.
#[derive(Debug)]
pub struct Events(EventStream);

impl Iterator for Events {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        driver::park(self.0.next())
    }
}
