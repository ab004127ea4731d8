//! Sends the requests to linger, and releases lingering holds whose lease is over.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;

use tokio::task::JoinSet;

use super::cleanup::surviving;
use crate::clock::BootTime;
use crate::lease::Hold;
use crate::linger as local;
use crate::retry::limited;
use crate::shared::Shared;

/// Maximum number of requests that are on their way at the same time.
const IN_FLIGHT: usize = 64;

/// The holds that linger or are about to.
pub(super) struct LingerRequests {
    shared: Arc<Shared>,
    due: VecDeque<Arc<Hold>>,
    asking: JoinSet<Option<LeaseEnd>>,
    /// Ends of leases. A lease that was renewed has a later end here too.
    ends: BinaryHeap<Reverse<LeaseEnd>>,
}

struct LeaseEnd {
    at: BootTime,
    hold: Arc<Hold>,
}

impl LingerRequests {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, due: VecDeque::new(), asking: JoinSet::new(), ends: BinaryHeap::new() }
    }

    pub(super) fn enter(&mut self, hold: Arc<Hold>) {
        self.due.push_back(hold);
    }

    /// Has every hold confirmed, because the store may have forgotten it.
    pub(super) fn all(&mut self) {
        if self.shared.lingering.is_used() {
            self.due.extend(local::ask_for_all(&self.shared));
        }
    }

    /// Sends the next requests, or handles an answer or the end of a lease. Dropping the future loses nothing.
    pub(super) async fn progress(&mut self) {
        while self.asking.len() < IN_FLIGHT
            && let Some(hold) = self.due.pop_front()
        {
            let shared = self.shared.clone();
            self.asking.spawn(async move { ask(&shared, hold).await });
        }
        let next = self.ends.peek().map_or(BootTime::NEVER, |Reverse(end)| end.at);
        tokio::select! {
            Some(answered) = self.asking.join_next() => {
                if let Ok(Some(end)) = answered {
                    self.ends.push(Reverse(end));
                }
            }
            () = self.shared.clock.sleep_until(next) => {
                let now = self.shared.clock.now();
                while let Some(end) = self.ends.peek_mut()
                    && end.0.at <= now
                {
                    let Reverse(end) = std::collections::binary_heap::PeekMut::pop(end);
                    local::lease_ended(&self.shared, &end.hold);
                }
            }
        }
    }
}

/// Sends one request to linger. Returns the end of the lease, if the hold lingers on.
async fn ask(shared: &Shared, hold: Arc<Hold>) -> Option<LeaseEnd> {
    let sent_at = shared.clock.now();
    let request = surviving(shared.store.linger(&hold.key, hold.token));
    let answer = match limited(&shared.clock, shared.config.retry.attempt, request).await {
        Ok(reply) => {
            shared.saw_store_time(reply.time, sent_at);
            Some(reply.outcome)
        }
        Err(error) => {
            shared.report(&error.with_key(&hold.key).with_store(shared.capabilities.name));
            None
        }
    };
    let at = local::answered(shared, &hold, sent_at, answer)?;
    Some(LeaseEnd { at, hold })
}

impl PartialEq for LeaseEnd {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl Eq for LeaseEnd {}

impl PartialOrd for LeaseEnd {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for LeaseEnd {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}
