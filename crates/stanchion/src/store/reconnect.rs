//! Provides the drivers of servers with a thread for their connections, and with the pauses between attempts to connect.

use std::future::Future;
use std::sync::Mutex;
use std::time::Duration;

use tokio::runtime::Handle;

use crate::clock::{BootTime, jitter};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::lock;
use crate::thread::RuntimeThread;

/// The runtime of a store's connections, on a thread that starts with the first connection.
#[derive(Debug)]
pub(super) struct ConnectionThread {
    name: &'static str,
    thread: Mutex<Option<RuntimeThread>>,
}

impl ConnectionThread {
    pub(super) const fn new(name: &'static str) -> Self {
        Self { name, thread: Mutex::new(None) }
    }

    /// Returns the runtime, and starts its thread if necessary.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] if the system has no thread left.
    pub(super) fn runtime(&self) -> Result<Handle> {
        let mut thread = lock(&self.thread);
        if let Some(thread) = &*thread {
            return Ok(thread.runtime.clone());
        }
        let started = RuntimeThread::start(self.name).map_err(|fault| {
            let message = format!("cannot start the thread for the connections: {fault}");
            Error::new(ErrorKind::Unavailable, message)
        })?;
        Ok(thread.insert(started).runtime.clone())
    }
}

/// Pauses between attempts: each is twice as long as the one before, up to a limit, and they vary a little so that many clients
/// do not come back at the same moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backoff {
    shortest: Duration,
    longest: Duration,
    next: Duration,
}

impl Backoff {
    pub(super) const fn new(shortest: Duration, longest: Duration) -> Self {
        Self { shortest, longest, next: shortest }
    }

    /// Begins again with the shortest pause, because an attempt succeeded.
    pub(super) fn reset(&mut self) {
        self.next = self.shortest;
    }

    /// Returns the length of the next pause.
    pub(super) fn next(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.longest);
        jitter(pause)
    }

    /// Sleeps for the next pause.
    pub(super) async fn pause(&mut self) {
        sleep(self.next()).await;
    }
}

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
    pub(super) fn end_pause(&mut self) {
        self.pause = None;
    }
}

/// Sleeps between attempts.
#[allow(clippy::disallowed_methods, reason = "a pause between attempts to connect, not a deadline of the protocol")]
pub(super) async fn sleep(pause: Duration) {
    tokio::time::sleep(pause).await;
}

/// Returns the outcome of the work, or `None` if it takes longer than the limit.
#[allow(clippy::disallowed_methods, reason = "a limit on a connection, not a deadline of the protocol")]
pub(super) async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(limit, work).await.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn pauses_double_up_to_the_longest() {
        let mut pauses = Backoff::new(Duration::from_millis(20), Duration::from_millis(100));
        let lengths: Vec<_> = (0..5).map(|_| pauses.next()).collect();
        for (length, expected) in lengths.iter().zip([20, 40, 80, 100, 100]) {
            let expected = Duration::from_millis(expected);
            assert!(*length >= expected / 2 && *length <= expected * 2, "{lengths:?}");
        }
        pauses.reset();
        assert!(pauses.next() <= Duration::from_millis(40));
    }
}
