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
