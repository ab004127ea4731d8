//! What grants: who is at the head and fits, and who is told of it.

use std::collections::{BTreeMap, BTreeSet};

use super::super::document::{Only, delete, fields, put, text, timestamp};
use super::super::record::{Entry, Hold, session_of, token_of};
use super::{KEPT_AFTER, Step};
use crate::fence::Fence;

/// So many bytes of holds are in a key's document, which may have 1 MiB. There is no more room for a hold then: it waits.
const HOLDS_BYTES: usize = 600_000;

/// A write has a limit to what it carries; who is not called finds its grant when it asks.
const MOST_CALLS: usize = 300;

impl Step<'_> {
    pub(super) fn fits(&self, units: u32, capacity: u32) -> bool {
        let used: u64 = self.record.holds.iter().map(|hold| u64::from(hold.entry.units)).sum();
        let has_room = || self.record.holds.iter().map(prost::Message::encoded_len).sum::<usize>() <= HOLDS_BYTES;
        self.record.closed_until <= self.now && used + u64::from(units) <= u64::from(capacity) && has_room()
    }

    /// What is over is gone, and those at the head that fit are granted.
    pub(crate) fn settle(&mut self) {
        let mut holds = std::mem::take(&mut self.record.holds);
        holds.retain(|hold| {
            hold.deadline.is_none_or(|deadline| deadline > self.now)
                && (!hold.entry.session_bound || self.lives_still(&hold.entry.session, hold.entry.session_lives))
        });
        self.record.holds = holds;
        let mut forced = std::mem::take(&mut self.record.forced);
        forced.retain(|forced| self.lives_still(&forced.session, 0));
        self.record.forced = forced;
        if self.record.closed_until <= self.now {
            self.record.closed_until = 0;
        }
        self.draw_up();
        while let Some(head) = self.record.front.first() {
            if !self.lives_still(&head.session, head.session_lives) {
                // The next ones are asked for with it: a crowd of the dead takes two reads, not one for each.
                self.settle_all();
            } else if self.unknown.borrow().is_empty() && self.fits(head.units, head.capacity) {
                let waiter = self.record.front.remove(0);
                self.draw_up();
                self.grant(waiter, true);
            } else {
                break;
            }
        }
    }

    /// All the dead are gone from the queue, not those at its head alone.
    pub(crate) fn settle_all(&mut self) {
        let mut sessions = BTreeMap::new();
        for waiter in self.waiters() {
            let lives = sessions.entry(&waiter.session).or_insert(waiter.session_lives);
            *lives = waiter.session_lives.max(*lives);
        }
        let is_dead = |(session, lives): &(&Vec<u8>, u64)| !self.lives_still(session, *lives);
        let dead: BTreeSet<_> = sessions.into_iter().filter(is_dead).map(|(session, _)| session.clone()).collect();
        if !dead.is_empty() {
            self.remove_waiters(|waiter| dead.contains(&waiter.session));
        }
    }

    pub(super) fn next_fence(&mut self) -> u64 {
        let last = (self.record.last_fence != 0).then(|| Fence::new(self.record.last_fence));
        self.record.last_fence = Fence::next(last, self.now).get();
        self.record.last_fence
    }

    pub(super) fn grant(&mut self, mut entry: Entry, is_called: bool) {
        let fence = self.next_fence();
        let called = is_called && self.call(&entry.session, &entry.token, fence, None);
        let deadline = entry.length.map(|length| self.now.saturating_add(length));
        entry.at = self.now;
        self.record.holds.push(Hold { entry, fence, deadline, called, former: None });
    }

    /// A document that a session's listener sees.
    pub(super) fn call(&mut self, session: &[u8], token: &[u8], fence: u64, reason: Option<&str>) -> bool {
        let (Ok(session), Ok(token)) = (session_of(session), token_of(token)) else { return false };
        self.calls += 1;
        if self.calls > MOST_CALLS {
            return false;
        }
        let mut said = fields([
            ("key", text(self.key.as_encoded())),
            ("fence", text(fence.to_string())),
            ("expire_at", timestamp(self.now.saturating_add(KEPT_AFTER))),
        ]);
        if let Some(reason) = reason {
            said.insert("forced".to_owned(), text(reason));
        }
        self.others.push(put(self.names.call(session, token), said, Only::Always));
        true
    }

    /// A holder that believes to be alone with its document is told that it is not: its release need not try to delete
    /// it. Only the first who waits tells it, and only one that nobody had to call.
    pub(super) fn tell_holder(&mut self) {
        let [hold] = &mut self.record.holds[..] else { return };
        let (Ok(session), Ok(token)) = (session_of(&hold.entry.session), token_of(&hold.entry.token)) else { return };
        if hold.entry.session_bound && !hold.called {
            hold.called = true;
            let said = fields([
                ("key", text(self.key.as_encoded())),
                ("waited_for", text("")),
                ("expire_at", timestamp(self.now.saturating_add(KEPT_AFTER))),
            ]);
            self.others.push(put(self.names.call(session, token), said, Only::Always));
        }
    }

    pub(super) fn end_call(&mut self, session: &[u8], token: &[u8]) {
        if let (Ok(session), Ok(token)) = (session_of(session), token_of(token)) {
            self.others.push(delete(self.names.call(session, token), Only::Always));
        }
    }
}
