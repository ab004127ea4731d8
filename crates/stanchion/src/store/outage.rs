//! Keeps callers from connecting to a server that cannot be reached.

use std::time::Duration;

use super::backoff::Backoff;
use crate::clock::BootTime;
use crate::error::{Error, Result};

/// A server that cannot be reached. During the pauses between attempts, callers get the last fault at once, so that a thousand
/// tasks make no storm of connections.
#[derive(Debug)]
pub(super) struct Outage {
    pauses: Backoff,
    /// Time of the next attempt, and the fault of the last one.
    pause: Option<(BootTime, Error)>,
}

impl Outage {
    /// A server that was not tried yet, or that was reached.
    pub(super) const NONE: Self =
        Self { pauses: Backoff::new(Duration::from_millis(20), Duration::from_secs(1)), pause: None };

    /// # Errors
    /// The last fault, until the pause after it is over.
    pub(super) fn check(&self, now: BootTime) -> Result<()> {
        match &self.pause {
            Some((next, fault)) if now < *next => Err(fault.clone().in_doubt(false)),
            _ => Ok(()),
        }
    }

    /// Notes an attempt that failed.
    pub(super) fn failed(&mut self, fault: &Error, now: BootTime) {
        self.pause = Some((now.after(self.pauses.next()), fault.clone()));
    }

    /// Ends the pause, so that the next caller tries again.
    #[cfg(any(test, feature = "redis"))]
    pub(super) fn end_pause(&mut self) {
        self.pause = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn pause_returns_the_last_fault() {
        let mut outage = Outage::NONE;
        let mut now = BootTime::from_nanos(1);
        assert!(outage.check(now).is_ok());
        let mut longest = Duration::ZERO;
        for _ in 0..12 {
            outage.failed(&Error::new(ErrorKind::Unavailable, "refused").in_doubt(true), now);
            let fault = outage.check(now).unwrap_err();
            assert!(fault.message() == "refused" && !fault.is_in_doubt());
            let start = now;
            while outage.check(now).is_err() {
                now = now.after(Duration::from_millis(1));
            }
            longest = longest.max(now.since(start));
        }
        assert!((Duration::from_millis(500)..Duration::from_secs(2)).contains(&longest), "{longest:?}");
        outage.failed(&Error::new(ErrorKind::Unavailable, "refused"), now);
        outage.end_pause();
        assert!(outage.check(now).is_ok());
    }
}
