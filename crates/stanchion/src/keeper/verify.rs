//! Asks the store whether holds are still there: a hold that it does not have under the believed fence is lost.
//!
//! Three occasions, by urgency: a message about one hold, a store that may have forgotten something, and a slow round over
//! all holds, which finds what somebody deleted by hand. The round costs a fixed number of requests a beat, however many
//! holds there are.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::task::JoinSet;

use crate::command::HoldCheck;
use crate::shared::Shared;
use crate::token::TokenId;

/// Maximum number of requests that are on their way at the same time.
const IN_FLIGHT: usize = 64;

/// Maximum number of holds that the store is asked for at a beat.
const ROUND_AT_ONCE: usize = 16;

/// The holds to ask for.
pub(super) struct Verification {
    shared: Arc<Shared>,
    /// Those of which a message told.
    told: VecDeque<HoldCheck>,
    /// After a failover: all that were held then.
    all: Vec<TokenId>,
    /// The rest of the slow round.
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

    /// Asks for every hold, also for those that it has asked for a moment ago.
    pub(super) fn all(&mut self) {
        self.all = self.shared.tokens.held();
    }

    /// The next part of the slow round. Holds that were asked for lately are passed over.
    pub(super) fn next_part(&mut self) {
        if self.round.is_empty() {
            self.round = self.shared.tokens.held();
        }
        let current = self.shared.requested_session();
        let now = self.shared.clock.now();
        // Every second beat.
        let interval = self.shared.config.session_ttl * 3 / (2 * crate::lease::RENEWALS_PER_TTL);
        let mut left = ROUND_AT_ONCE;
        while left > 0
            && let Some(token) = self.round.pop()
        {
            let Some(hold) = self.shared.tokens.hold(token) else { continue };
            // Fixed lifetimes outlive the session that asked for them, and then no beat tells of their forced release.
            let is_survivor = !hold.session_bound && Some(hold.session.id) != current;
            if hold.is_check_due(now, if is_survivor { interval / 3 } else { interval }) {
                self.told.push_back(HoldCheck::new(hold));
                left -= 1;
            }
        }
    }

    /// Does what is next: sends requests, or takes an answer. Dropped, it loses nothing.
    pub(super) async fn progress(&mut self) {
        while self.asking.len() < IN_FLIGHT
            && let Some(check) = self.pop()
        {
            let shared = self.shared.clone();
            self.asking.spawn(async move {
                let _asked_again_in_the_next_round = shared.confirm(&check).await;
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
        // What was released meanwhile has been confirmed by that.
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
