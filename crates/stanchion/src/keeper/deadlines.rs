//! Loses holds whose own deadline has come: a fixed lifetime, `max_hold` or a heartbeat.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use crate::clock::BootTime;
use crate::lease::Hold;
use crate::shared::Shared;
use crate::token::TokenId;

/// Holds by the time at which the keeper must look at them. A hold whose deadline was moved is looked at too early once, and
/// entered again. A hold that is gone is dropped at that time.
#[derive(Default)]
pub(super) struct Deadlines {
    heap: BinaryHeap<Reverse<Entry>>,
}

struct Entry {
    at: BootTime,
    token: TokenId,
}

impl Deadlines {
    pub(super) fn watch(&mut self, hold: &Arc<Hold>, shared: &Shared) {
        let at = hold.look_at();
        if at != BootTime::NEVER {
            // Before the heap grows, drop the holds that are gone: their deadlines may be days away.
            if self.heap.len() == self.heap.capacity() {
                self.heap.retain(|Reverse(entry)| shared.tokens.hold(entry.token).is_some());
            }
            self.heap.push(Reverse(Entry { at, token: hold.token }));
        }
    }

    pub(super) fn next(&self) -> BootTime {
        self.heap.peek().map_or(BootTime::NEVER, |Reverse(entry)| entry.at)
    }

    /// Loses the holds whose deadline has come.
    pub(super) fn announce(&mut self, shared: &Shared) {
        let now = shared.clock.now();
        while self.next() <= now {
            let Some(Reverse(entry)) = self.heap.pop() else { return };
            // The guard may have released the hold since.
            let Some(hold) = shared.tokens.hold(entry.token) else { continue };
            match hold.ended(now) {
                Some(cause) => shared.lose(&hold, cause, None),
                None => self.watch(&hold, shared),
            }
        }
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "test code")]

    use std::time::Duration;

    use super::*;
    use crate::Locks;

    #[tokio::test]
    async fn released_holds_leave_no_deadlines() {
        let locks = Locks::open("memory:").await.unwrap();
        let shared = &locks.handle.shared;
        let mut deadlines = Deadlines::default();
        for _ in 0..1_000 {
            let guard = locks.lock("k").ttl(Duration::from_secs(3_600)).await.unwrap();
            deadlines.watch(&shared.tokens.holds()[0], shared);
            guard.release().await.unwrap();
        }
        let guard = locks.lock("k").ttl(Duration::from_secs(3_600)).await.unwrap();
        deadlines.watch(&shared.tokens.holds()[0], shared);
        assert!(deadlines.heap.len() < 100, "{}", deadlines.heap.len());
        assert!(deadlines.heap.iter().any(|Reverse(entry)| shared.tokens.hold(entry.token).is_some()));
        drop(guard);
    }
}
