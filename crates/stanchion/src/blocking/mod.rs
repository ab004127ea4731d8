//! The same surface without async: calls that block their thread until they are done.
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
//! No runtime is needed: what has to go on meanwhile goes on in threads of the library, and a call waits for it where it
//! was made. Guards, requests and handles are what they are in async code, and [`Locks::from`] and
//! [`as_async`](Locks::as_async) go from one to the other.
//!
//! # In async code
//! A blocking call blocks the thread that it is made on, and with it whatever else that thread should run: make it in
//! `spawn_blocking`, or use the async surface. Made inside a task nevertheless it works, also in a runtime of one thread,
//! because nothing that it needs runs there. It waits for ever only where any mutex would: when the lock is held by a task
//! that would have to run on the blocked thread to release it, and no [`wait`](LockRequest::wait) limits the request. A
//! pool of connections of the user's (`Postgres::from_pool`) must live in another runtime than the one that is blocked.

mod driver;
mod guard;
mod request;

use crate::builder::Builder;
use crate::error::{Error, Result};
use crate::event::{Event, EventStream};
use crate::fence::Fence;
use crate::store::{Capabilities, Cursor, ForceReleaseOutcome, KeyState, Listing, Store};
use crate::token::{SessionId, Token};
use driver::Driver;

pub use guard::Guard;
pub use request::LockRequest;

/// [`stanchion::Locks`](crate::Locks), blocking: cheap to clone, one session for all clones.
#[derive(Clone, Debug)]
pub struct Locks {
    locks: crate::Locks,
    driver: Driver,
}

/// The same handle, with the same session.
impl From<crate::Locks> for Locks {
    fn from(locks: crate::Locks) -> Self {
        Self { locks, driver: Driver::default() }
    }
}

impl Builder {
    /// Opens the handle as a blocking one.
    ///
    /// # Errors
    /// As [`open`](Builder::open).
    pub fn open_blocking(self) -> Result<Locks> {
        let driver = Driver::default();
        let locks = driver.call(self.open())?;
        Ok(Locks { locks, driver })
    }
}

impl Locks {
    /// Opens the store that the URL names, with a session: the URLs are those of [`stanchion::Locks::open`](crate::Locks::open).
    ///
    /// # Errors
    /// As [`stanchion::Locks::open`](crate::Locks::open).
    pub fn open(url: &str) -> Result<Self> {
        Self::builder(url).open_blocking()
    }

    /// Opens a store with more to say; [`open_blocking`](Builder::open_blocking) ends the sentence.
    pub fn builder(url: &str) -> Builder {
        crate::Locks::builder(url)
    }

    /// Uses a store of one's own, with defaults for the rest.
    ///
    /// # Errors
    /// As [`stanchion::Locks::open`](crate::Locks::open).
    pub fn with_store(store: impl Store) -> Result<Self> {
        Self::builder_with_store(store).open_blocking()
    }

    /// Uses a store of one's own, with more to say.
    pub fn builder_with_store(store: impl Store) -> Builder {
        crate::Locks::builder_with_store(store)
    }

    /// The same handle for async code.
    pub fn as_async(&self) -> &crate::Locks {
        &self.locks
    }

    /// Asks for a key: exclusive, first come first served.
    pub fn lock(&self, key: impl Into<String>) -> LockRequest {
        self.request(self.locks.lock(key))
    }

    /// Asks for a key that others may read at the same time.
    pub fn read(&self, key: impl Into<String>) -> LockRequest {
        self.request(self.locks.read(key))
    }

    /// Asks for a key alone that others [`read`](Locks::read).
    pub fn write(&self, key: impl Into<String>) -> LockRequest {
        self.request(self.locks.write(key))
    }

    /// Asks for one of `limit` permits of a key.
    pub fn semaphore(&self, key: impl Into<String>, limit: u32) -> LockRequest {
        self.request(self.locks.semaphore(key, limit))
    }

    /// Waits for what the async surface has: several keys, runs, elections, and what came of a hold.
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
    /// The call's.
    pub fn block_on<T, E>(&self, call: impl AsyncFnOnce(&crate::Locks) -> Result<T, E>) -> Result<T, E>
    where
        E: From<Error>,
    {
        self.driver.call(call(&self.locks))
    }

    /// One attempt: `None` if another holds the key or waits for it.
    ///
    /// # Errors
    /// As [`LockRequest::try_acquire`].
    pub fn try_lock(&self, key: impl Into<String>) -> Result<Option<Guard>> {
        self.lock(key).try_acquire()
    }

    /// Takes up a detached hold, of this process or another one. Of two that try, one gets it.
    ///
    /// # Errors
    /// As [`stanchion::Locks::adopt`](crate::Locks::adopt).
    pub fn adopt(&self, token: Token) -> Result<Guard> {
        let guard = self.driver.call(self.locks.adopt(token))?;
        Ok(Guard::new(guard, self.driver.clone()))
    }

    /// What is known of a key: holders, waiters, fences. About the past: stale when read.
    ///
    /// # Errors
    /// As [`stanchion::Locks::inspect`](crate::Locks::inspect).
    pub fn inspect(&self, key: impl Into<String>) -> Result<KeyState> {
        self.driver.call(self.locks.inspect(key))
    }

    /// Returns the keys of this handle's namespace that are held, waited for or closed and begin with `prefix`, each once
    /// and in order, with the entries there that cannot be read. About the past, and not one snapshot.
    ///
    /// # Errors
    /// The store's faults. That an entry is damaged is none.
    pub fn list(&self, prefix: &str) -> Result<Listing> {
        self.driver.call(self.locks.list(prefix))
    }

    /// Returns a page of [`list`](Self::list): the first one without a cursor, and the one at [`Listing::next`] with it.
    ///
    /// # Errors
    /// As [`stanchion::Locks::list_page`](crate::Locks::list_page).
    pub fn list_page(&self, prefix: &str, cursor: Option<&Cursor>) -> Result<Listing> {
        self.driver.call(self.locks.list_page(prefix, cursor))
    }

    /// Whether somebody held the key a moment ago. Do not decide on it: ask for the lock.
    ///
    /// # Errors
    /// As [`inspect`](Locks::inspect).
    pub fn is_locked(&self, key: impl Into<String>) -> Result<bool> {
        self.driver.call(self.locks.is_locked(key))
    }

    /// Whether the token held its key a moment ago. Do not decide on it: check the fence at the resource.
    ///
    /// # Errors
    /// The store's faults.
    pub fn owns(&self, token: &Token) -> Result<bool> {
        self.driver.call(self.locks.owns(token))
    }

    /// Releases the hold of `key` that has this fence, whoever has it. For people who know that its holder is dead or
    /// wrong.
    ///
    /// # Errors
    /// As [`stanchion::Locks::force_release`](crate::Locks::force_release).
    pub fn force_release(
        &self,
        key: impl Into<String>,
        fence: Fence,
        reason: impl Into<String>,
    ) -> Result<ForceReleaseOutcome> {
        self.driver.call(self.locks.force_release(key, fence, reason))
    }

    /// The events of this handle from now on. The iterator waits for the next one, and ends when the handle is gone.
    pub fn events(&self) -> Events {
        Events(self.locks.events())
    }

    /// What the store said so far of settings that may lose locks, for people. Empty is good.
    pub fn warnings(&self) -> Vec<String> {
        self.locks.warnings()
    }

    /// No new holds from now on: waiting calls end with [`ErrorKind::Draining`](crate::ErrorKind::Draining), guards see
    /// [`draining`](crate::Guard::draining). Holds stay. Cannot be undone; the first reason stays.
    pub fn drain(&self, reason: &str) {
        self.locks.drain(reason);
    }

    /// The reason, if this handle is draining.
    pub fn draining(&self) -> Option<&str> {
        self.locks.draining()
    }

    /// Releases everything at once and ends the session. Guards that still live are lost.
    ///
    /// # Errors
    /// None yet: what could not be ended in the store within 5 s dies with the session.
    pub fn close(&self) -> Result<()> {
        self.driver.call(self.locks.close())
    }

    /// The current session, if one is open. It changes when a session is lost.
    pub fn session(&self) -> Option<SessionId> {
        self.locks.session()
    }

    /// What the store can do.
    pub fn capabilities(&self) -> Capabilities {
        self.locks.capabilities()
    }

    /// A blocking request of an async one.
    fn request(&self, request: crate::LockRequest) -> LockRequest {
        LockRequest::new(request, self.driver.clone())
    }
}

/// The events of one handle, as an iterator that waits.
#[derive(Debug)]
pub struct Events(EventStream);

impl Iterator for Events {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        driver::park(self.0.next())
    }
}
