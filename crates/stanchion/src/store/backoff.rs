//! Pauses between the attempts of a driver, and limits each of them.

use std::future::Future;
use std::time::Duration;

use crate::clock::jitter;

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
