//! Tracks how far a handle is on its way from open to closed.
//!
//! # Invariants
//! 1. The phase only moves forward.
//! 2. A task that waits for a phase is woken when the handle reaches it, also if the handle skips phases.

use std::pin::pin;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use tokio::sync::Notify;

/// A phase of a handle's life. A later phase includes the earlier ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Phase {
    Running,
    /// No call gets a new hold. Existing holds stay.
    Draining,
    /// No hold is valid any more, and the keeper cleans up without waiting for graces.
    Closing,
    /// The keeper has ended, and every hold has been lost: from here on nothing drives the timers.
    Closed,
}

#[derive(Debug)]
pub(crate) struct Lifecycle {
    phase: AtomicU8,
    changed: Notify,
    drain_reason: OnceLock<String>,
}

impl Lifecycle {
    pub(crate) fn new() -> Self {
        Self { phase: AtomicU8::new(Phase::Running as u8), changed: Notify::new(), drain_reason: OnceLock::new() }
    }

    /// Moves on to `phase`, unless the handle is there already or further.
    pub(crate) fn advance(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, Ordering::AcqRel);
        self.changed.notify_waiters();
    }

    pub(crate) fn has_reached(&self, phase: Phase) -> bool {
        self.phase.load(Ordering::Acquire) >= phase as u8
    }

    /// Waits until the handle reaches `phase`.
    pub(crate) async fn reached(&self, phase: Phase) {
        let mut changed = pin!(self.changed.notified());
        loop {
            // A change between the look and the wait must not be missed, so the wait begins first.
            changed.as_mut().enable();
            if self.has_reached(phase) {
                return;
            }
            changed.as_mut().await;
            changed.set(self.changed.notified());
        }
    }

    /// Starts to drain. Returns whether the reason is the first one, which is the one that stays.
    pub(crate) fn drain(&self, reason: &str) -> bool {
        let is_first = self.drain_reason.set(reason.to_owned()).is_ok();
        self.advance(Phase::Draining);
        is_first
    }

    pub(crate) fn drain_reason(&self) -> Option<&str> {
        self.drain_reason.get().map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::Pin;
    use std::task::{Context, Waker};

    fn is_ready(future: &mut Pin<Box<impl Future<Output = ()>>>) -> bool {
        future.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn phase_only_moves_forward() {
        let lifecycle = Lifecycle::new();
        assert!(lifecycle.has_reached(Phase::Running) && !lifecycle.has_reached(Phase::Draining));
        lifecycle.advance(Phase::Closing);
        lifecycle.advance(Phase::Draining);
        assert!(lifecycle.has_reached(Phase::Closing) && !lifecycle.has_reached(Phase::Closed));
        assert!(lifecycle.drain("first") && !lifecycle.drain("second"));
        assert_eq!(lifecycle.drain_reason(), Some("first"));
    }

    #[test]
    fn waiters_wake_at_their_phase() {
        let lifecycle = Lifecycle::new();
        let mut draining = Box::pin(lifecycle.reached(Phase::Draining));
        let mut closed = Box::pin(lifecycle.reached(Phase::Closed));
        assert!(!is_ready(&mut draining) && !is_ready(&mut closed));
        lifecycle.advance(Phase::Closing);
        assert!(is_ready(&mut draining) && !is_ready(&mut closed));
        lifecycle.advance(Phase::Closed);
        assert!(is_ready(&mut closed));
        assert!(is_ready(&mut Box::pin(lifecycle.reached(Phase::Running))), "reached already");
    }
}
