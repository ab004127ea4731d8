//! The deadlines of single holds: fixed terms, `max_hold`, heartbeats.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::{Arc, Weak};

use crate::belief::Hold;
use crate::clock::BootTime;
use crate::shared::Shared;

/// Holds by the time at which they must be looked at. A hold whose deadline has moved is looked at too early once, and
/// entered again; one that is gone is dropped then.
#[derive(Default)]
pub(super) struct Deadlines {
    heap: BinaryHeap<Reverse<Entry>>,
}

struct Entry {
    at: BootTime,
    hold: Weak<Hold>,
}

impl Deadlines {
    pub(super) fn watch(&mut self, hold: &Arc<Hold>) {
        let at = hold.look_at();
        if at != BootTime::NEVER {
            // Before it grows: those that are gone, whose deadlines may be days away.
            if self.heap.len() == self.heap.capacity() {
                self.heap.retain(|Reverse(entry)| entry.hold.strong_count() > 0);
            }
            self.heap.push(Reverse(Entry { at, hold: Arc::downgrade(hold) }));
        }
    }

    pub(super) fn next(&self) -> BootTime {
        self.heap.peek().map_or(BootTime::NEVER, |Reverse(entry)| entry.at)
    }

    /// Announces the holds whose time is up.
    pub(super) fn announce(&mut self, shared: &Shared) {
        let now = shared.clock.now();
        while self.next() <= now {
            let Some(Reverse(entry)) = self.heap.pop() else { return };
            let Some(hold) = entry.hold.upgrade() else { continue };
            // The guard may have ended it meanwhile.
            if !shared.registry().contains_key(&hold.token) {
                continue;
            }
            match hold.ended(now) {
                Some(cause) => shared.lose(&hold, cause, None),
                None => self.watch(&hold),
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
    use crate::belief::{NewHold, SessionBelief};
    use crate::{Fence, Key, SessionId, TokenId};

    #[test]
    fn holds_that_are_gone_are_not_kept_until_their_deadlines() {
        let session = SessionBelief::new(SessionId::random().unwrap(), Duration::from_secs(10), BootTime::NEVER);
        let session = Arc::new(session);
        let mut deadlines = Deadlines::default();
        let mut last = None;
        for turn in 1..=10_000 {
            let hold = Arc::new(Hold::new(NewHold {
                key: Key::new("", "k").unwrap(),
                token: TokenId::random().unwrap(),
                fence: Fence::new(turn),
                session: session.clone(),
                session_bound: true,
                since: BootTime::from_nanos(1),
                deadline: Some((BootTime::from_nanos(u64::MAX - 1), Duration::from_secs(10))),
                heartbeat_within: None,
                unanswered_until: None,
                on_lost: None,
            }));
            deadlines.watch(&hold);
            last = Some(hold);
        }
        assert!(deadlines.heap.len() < 100, "{}", deadlines.heap.len());
        assert!(deadlines.heap.iter().any(|Reverse(entry)| entry.hold.ptr_eq(&Arc::downgrade(last.as_ref().unwrap()))));
    }
}
