//! What grants: who is at the head and fits, and who is told of it.

use std::collections::{BTreeMap, BTreeSet};

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use prost::Message as _;

use super::super::document::{Fields, Only, bytes, delete, fields, put, text, timestamp};
use super::super::record::{Entry, Hold, session_of, token_of};
use super::{KEPT_AFTER, Operation};
use crate::fence::Fence;
use crate::store::Demand;

/// So many bytes of holds are in a key's document, which may have 1 MiB. There is no more room for a hold then: it waits.
pub(super) const HOLDS_BYTES: usize = 600_000;

/// A write has a limit to what it carries; who is not called finds its grant when it asks.
const MOST_CALLS: usize = 300;

/// A call carries the key's record if it is not longer.
const CARRIED_BYTES: usize = 50_000;

/// A document that calls a token.
pub(super) struct Call {
    name: String,
    said: Fields,
    /// Not of one that was taken by force.
    is_holders: bool,
}

impl Operation<'_> {
    pub(super) fn fits(&self, demand: Demand) -> bool {
        let held = self.record.holds.iter().map(|hold| hold.entry.demand());
        let has_room = || self.record.holds.iter().map(prost::Message::encoded_len).sum::<usize>() <= HOLDS_BYTES;
        self.record.closed_until <= self.now && demand.fits(held) && has_room()
    }

    /// What is over is gone, and those at the head that fit are granted.
    pub(crate) fn settle(&mut self) {
        self.end_what_is_over();
        while let Some(head) = self.record.front.first() {
            if !self.lives_still(&head.session, head.session_lives) {
                // The next ones are asked for with it: a crowd of the dead takes two reads, not one for each.
                self.settle_all();
            } else if self.unknown.borrow().is_empty()
                && self.fits(head.demand())
                && let Some(fence) = self.next_fence()
            {
                let waiter = self.record.front.remove(0);
                self.draw_up();
                self.grant(waiter, fence, true);
            } else {
                break;
            }
        }
    }

    /// Ends the holds and the cooldown that time or death has ended. Grants nothing.
    pub(crate) fn end_what_is_over(&mut self) {
        for hold in std::mem::take(&mut self.record.holds) {
            if hold.deadline.is_some_and(|deadline| deadline <= self.now) {
                // What calls those of the dead is swept with their sessions; this session may live on for weeks.
                if hold.called && self.others.len() < MOST_CALLS {
                    self.end_call(&hold.entry.session, &hold.entry.token);
                }
            } else if !hold.entry.session_bound || self.lives_still(&hold.entry.session, hold.entry.session_lives) {
                self.record.holds.push(hold);
            }
        }
        let mut forced = std::mem::take(&mut self.record.forced);
        forced.retain(|forced| self.lives_still(&forced.session, 0));
        self.record.forced = forced;
        if self.record.closed_until <= self.now {
            self.record.closed_until = 0;
        }
        self.draw_up();
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

    /// The fence of the next grant, if there is one.
    pub(super) fn next_fence(&self) -> Option<u64> {
        let last = (self.record.last_fence != 0).then(|| Fence::new(self.record.last_fence));
        Fence::next(last, self.now).map(Fence::get)
    }

    pub(super) fn grant(&mut self, mut entry: Entry, fence: u64, is_called: bool) {
        self.record.last_fence = fence;
        let called = is_called && self.call(&entry.session, &entry.token, Some(fence), None);
        let mut deadline = None;
        entry.at = if self.from_the_commit { 0 } else { self.now };
        if !self.from_the_commit {
            deadline = entry.length.map(|length| self.now.saturating_add(length));
        }
        self.record.holds.push(Hold { entry, fence, deadline, called, was_handed_over: called, former: None });
    }

    /// A document that a session's listener sees. Whether there is room for it.
    pub(super) fn call(&mut self, session: &[u8], token: &[u8], fence: Option<u64>, reason: Option<&str>) -> bool {
        let (Ok(session), Ok(token)) = (session_of(session), token_of(token)) else { return false };
        if self.calls.len() >= MOST_CALLS {
            return false;
        }
        let mut said = fields([
            ("key", text(self.key.as_encoded())),
            ("expire_at", timestamp(self.now.saturating_add(KEPT_AFTER))),
        ]);
        if let Some(fence) = fence {
            said.insert("fence".to_owned(), text(fence.to_string()));
        }
        if let Some(reason) = reason {
            said.insert("forced".to_owned(), text(reason));
        }
        let name = self.names.call(session, token);
        self.calls.retain(|call| call.name != name);
        self.calls.push(Call { name, said, is_holders: reason.is_none() });
        true
    }

    /// A holder is told that somebody waits: what it knows of its key's document is not so any more. The first who waits
    /// tells it.
    pub(super) fn tell_holder(&mut self) {
        let [hold] = &mut self.record.holds[..] else { return };
        if hold.entry.session_bound {
            hold.called = true;
            let (session, token) = (hold.entry.session.clone(), hold.entry.token.clone());
            // What this replaces may not have been heard yet.
            let fence = hold.was_handed_over.then_some(hold.fence);
            self.call(&session, &token, fence, None);
        }
    }

    /// The documents that call. The one who holds a key gets its record, too, and need not read it to let go.
    pub(super) fn calls(&mut self) -> impl Iterator<Item = api::Write> + use<> {
        let calls = std::mem::take(&mut self.calls);
        let is_small = self.record.encoded_len() <= CARRIED_BYTES && self.record.pages.is_empty();
        let record = (is_small && self.record.holds.len() == 1).then(|| bytes(self.record.to_bytes()));
        calls.into_iter().map(move |Call { name, mut said, is_holders }| {
            if let Some(record) = record.clone().filter(|_| is_holders) {
                said.insert("record".to_owned(), record);
            }
            put(name, said, Only::Always)
        })
    }

    pub(super) fn end_call(&mut self, session: &[u8], token: &[u8]) {
        if let (Ok(session), Ok(token)) = (session_of(session), token_of(token)) {
            let name = self.names.call(session, token);
            self.calls.retain(|call| call.name != name);
            self.others.push(delete(name, Only::Always));
        }
    }
}
