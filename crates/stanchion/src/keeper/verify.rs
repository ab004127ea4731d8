//! Checks that the store still has the holds of this handle. A hold that the store does not have under its fence is lost.
//!
//! A check has one of three reasons, by urgency:
//! 1. a message about one hold;
//! 2. a store that may have forgotten grants, after a failover;
//! 3. a slow round over all holds, which finds holds that were deleted by hand. The round sends a fixed number of requests at each
//!    renewal, however many holds there are.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::task::JoinSet;

use crate::command::HoldCheck;
use crate::shared::Shared;
use crate::token::TokenId;

/// Maximum number of requests that are on their way at the same time.
const IN_FLIGHT: usize = 64;

/// Maximum number of holds that are checked at a renewal.
const ROUND_AT_ONCE: usize = 16;

/// The holds to check.
pub(super) struct Verification {
    shared: Arc<Shared>,
    /// Holds that a message was about.
    told: VecDeque<HoldCheck>,
    /// All holds at the time of a failover.
    all: Vec<TokenId>,
    /// Holds that are left in the slow round.
    round: Vec<TokenId>,
    asking: JoinSet<()>,
}

impl Verification {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, told: VecDeque::new(), all: Vec::new(), round: Vec::new(), asking: JoinSet::new() }
    }

    pub(super) fn one(&mut self, check: HoldCheck) {
        self.told.push_back(check);
    }

    /// Checks every hold, also the holds that were checked a moment ago.
    pub(super) fn all(&mut self) {
        self.all = self.shared.tokens.held();
    }

    /// Starts the next part of the slow round. Skips holds that were checked lately.
    pub(super) fn next_part(&mut self) {
        if self.round.is_empty() {
            self.round = self.shared.tokens.held();
        }
        let current = self.shared.requested_session();
        let now = self.shared.clock.now();
        // Between one and two renewals.
        let interval = self.shared.config.session_ttl * 3 / (2 * crate::lease::RENEWALS_PER_TTL);
        let mut left = ROUND_AT_ONCE;
        while left > 0
            && let Some(token) = self.round.pop()
        {
            let Some(hold) = self.shared.tokens.hold(token) else { continue };
            // Fixed lifetimes outlive the session that requested them, and then no renewal reports a forced release.
            let is_survivor = !hold.session_bound && Some(hold.session.id) != current;
            if hold.is_check_due(now, if is_survivor { interval / 3 } else { interval }) {
                self.told.push_back(HoldCheck::new(hold));
                left -= 1;
            }
        }
    }

    /// Sends the next requests, or takes an answer. Dropping the future loses nothing.
    pub(super) async fn progress(&mut self) {
        while self.asking.len() < IN_FLIGHT
            && let Some(check) = self.pop()
        {
            let shared = self.shared.clone();
            self.asking.spawn(async move {
                let _ = shared.confirm(&check).await; // after a fault the next round checks the hold again
            });
        }
        if self.asking.join_next().await.is_none() {
            std::future::pending().await
        }
    }

    #[cfg(test)]
    pub(super) async fn finish(&mut self) {
        while !(self.told.is_empty() && self.all.is_empty() && self.asking.is_empty()) {
            self.progress().await;
        }
    }

    fn pop(&mut self) -> Option<HoldCheck> {
        // A hold that was released since needs no check.
        let is_held = |token| self.shared.tokens.hold(token).is_some();
        while let Some(check) = self.told.pop_front() {
            if is_held(check.hold.token) {
                return Some(check);
            }
        }
        self.told.shrink_to(ROUND_AT_ONCE);
        while let Some(token) = self.all.pop() {
            if let Some(hold) = self.shared.tokens.hold(token) {
                return Some(HoldCheck::new(hold));
            }
        }
        None
    }
}
