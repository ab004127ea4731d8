//! Guards.

use std::ops::Deref;
use std::time::Duration;

use super::driver::{Driver, park};
use crate::error::{LossCause, Result};
use crate::guard::Released;
use crate::token::Token;

/// A hold, as long as it is not dropped. Dropping it releases in the background, without waiting.
///
/// What is local is that of [`stanchion::Guard`](crate::Guard): key, fence, [`is_held`](crate::Guard::is_held),
/// [`check`](crate::Guard::check), [`heartbeat`](crate::Guard::heartbeat) and so on.
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

    /// The same guard for async code.
    pub fn into_async(self) -> crate::Guard {
        self.guard
    }

    /// Waits until the hold is lost: for a thread that watches over another's work. It fires before anybody else can have
    /// the key, with no network needed.
    pub fn lost(&self) -> LossCause {
        park(self.guard.lost())
    }

    /// Sets the remaining time of a fixed lifetime, or of `max_hold`, to `ttl` from now; shorter than before, if so wished.
    ///
    /// # Errors
    /// As [`stanchion::Guard::extend`](crate::Guard::extend).
    pub fn extend(&self, ttl: Duration) -> Result<()> {
        self.driver.call(self.guard.extend(ttl))
    }

    /// Releases and tells what was found.
    ///
    /// # Errors
    /// The store's faults. The hold is given up all the same: the keeper goes on ending it.
    pub fn release(self) -> Result<Released> {
        self.driver.call(self.guard.release())
    }

    /// Lets go of the hold without releasing it: [`Locks::adopt`](super::Locks::adopt) takes it up again with the token.
    pub fn detach(self) -> Token {
        self.guard.detach()
    }
}
