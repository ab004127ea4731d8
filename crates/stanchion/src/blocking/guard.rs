//! Defines the blocking [`Guard`].

use std::ops::Deref;
use std::time::Duration;

use super::driver::{Driver, park};
use crate::error::{LossCause, Result};
use crate::guard::Released;
use crate::token::Token;

/// A lock that is held, for blocking code. Dropping the guard releases the lock in the background, without waiting.
///
/// It dereferences to [`stanchion::Guard`](crate::Guard), whose methods without I/O work in blocking code: key, fence,
/// [`is_held`](crate::Guard::is_held), [`check`](crate::Guard::check), [`heartbeat`](crate::Guard::heartbeat) and so
/// on.
#[derive(Debug)]
#[must_use = "dropping a guard releases the lock"]
pub struct Guard {
    guard: crate::Guard,
    driver: Driver,
}

impl Deref for Guard {
    type Target = crate::Guard;

    fn deref(&self) -> &crate::Guard {
        &self.guard
    }
}

impl Guard {
    pub(super) fn new(guard: crate::Guard, driver: Driver) -> Self {
        Self { guard, driver }
    }

    pub(super) fn into_parts(self) -> (crate::Guard, Driver) {
        (self.guard, self.driver)
    }

    /// Returns the same guard for async code.
    pub fn into_async(self) -> crate::Guard {
        self.guard
    }

    /// Blocks until the lock is lost, and returns why. For a thread that watches the work of another thread.
    ///
    /// It returns before anyone else can get the key, without a network.
    pub fn lost(&self) -> LossCause {
        park(self.guard.lost())
    }

    /// Sets the remaining time of a fixed lifetime, or of `max_hold`, to `ttl` from now. The new time may be shorter.
    ///
    /// # Errors
    /// The errors of [`stanchion::Guard::extend`](crate::Guard::extend).
    pub fn extend(&self, ttl: Duration) -> Result<()> {
        self.driver.call(self.guard.extend(ttl))
    }

    /// Releases the lock, and returns whether it was still held.
    ///
    /// # Errors
    /// Any error of the store. The lock is given up all the same: the keeper keeps releasing it.
    pub fn release(self) -> Result<Released> {
        self.driver.call(self.guard.release())
    }

    /// Gives up the guard without releasing the lock, and returns the token with which
    /// [`Locks::adopt`](super::Locks::adopt) takes the hold over.
    ///
    /// [`stanchion::Guard::detach`](crate::Guard::detach) has the rules.
    pub fn detach(self) -> Token {
        self.guard.detach()
    }
}
