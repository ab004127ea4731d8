//! What enters a key: an acquire, an adoption; and what became of them.

use std::collections::HashMap;
use std::sync::Arc;

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use prost::Message as _;

use super::super::document::{Names, Only};
use super::super::record::{Entry, Former, Hold, KeyRecord, Page, PageName};
use super::write::{key_document, sessions};
use super::{Leaf, Operation};
use crate::store::{AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, MAX_WAITERS, PollOutcome, Queued};
use crate::token::TokenId;

/// So many waiters, and so many bytes of them, are in one document.
const PAGE_WAITERS: usize = 200;
const PAGE_BYTES: usize = 200_000;

impl Operation<'_> {
    /// The rules of an acquire; none where a document has to be created.
    pub(crate) fn acquire(&mut self, request: &AcquireRequest) -> Option<AcquireOutcome> {
        if !self.lives(request.session) {
            return Some(AcquireOutcome::SessionGone);
        }
        if self.record.forced.iter().any(|forced| forced.token == request.token.as_bytes()) {
            return Some(AcquireOutcome::ForceReleased);
        }
        if let Some(hold) = self.held(request.token) {
            return Some(AcquireOutcome::Granted(hold.granted(self.now)));
        }
        if let Some(queued) = self.queued(request.token) {
            return Some(AcquireOutcome::Queued(queued));
        }
        if self.now > request.not_after.as_micros() {
            return Some(AcquireOutcome::Stale);
        }
        if self.is_missing() {
            return None;
        }
        let Some(fence) = self.next_fence() else {
            self.is_used_up.set(true);
            return Some(AcquireOutcome::Busy { check_in: None, in_use: None });
        };
        let goes_now = self.record.front.is_empty() && self.fits(request.demand);
        if !goes_now && !request.enqueue {
            return Some(AcquireOutcome::Busy { check_in: self.check_in(), in_use: self.in_use() });
        }
        let lives = self.lives.get(&request.session).map_or(0, |life| life.ends);
        let entry = entry(request, self.owner_of(request.session), lives, self.now);
        if goes_now {
            self.grant(entry, fence, false);
            return self.held(request.token).map(|hold| AcquireOutcome::Granted(hold.granted(self.now)));
        }
        if self.waiters().count() >= MAX_WAITERS as usize {
            self.settle_all();
        }
        if self.waiters().count() >= MAX_WAITERS as usize {
            return Some(AcquireOutcome::QueueFull { limit: MAX_WAITERS });
        }
        if self.record.front.is_empty() {
            self.tell_holder();
        }
        self.push_waiter(entry);
        self.queued(request.token).map(AcquireOutcome::Queued)
    }

    fn push_waiter(&mut self, waiter: Entry) {
        let last = match self.pages.last_mut() {
            Some(leaf) => &mut Arc::make_mut(&mut leaf.page).waiters,
            None => &mut self.record.front,
        };
        let bytes: usize = last.iter().map(prost::Message::encoded_len).sum();
        if last.len() < PAGE_WAITERS && bytes + waiter.encoded_len() <= PAGE_BYTES {
            last.push(waiter);
        } else {
            // Never used before, also by a document that was deleted since.
            let number = self.pages.last().map_or(0, |leaf| leaf.name.number + 1).max(self.now);
            let page = Arc::new(Page { waiters: vec![waiter], revision: 0 });
            self.pages.push(Leaf { name: PageName { number, revision: 0 }, page });
        }
    }

    pub(crate) fn poll(&self, tokens: &[TokenId]) -> Vec<PollOutcome> {
        let mut outcomes: HashMap<&[u8], PollOutcome> =
            tokens.iter().map(|token| (token.as_bytes().as_slice(), PollOutcome::Gone)).collect();
        for hold in &self.record.holds {
            if let Some(outcome) = outcomes.get_mut(hold.entry.token.as_slice()) {
                *outcome = PollOutcome::Granted(hold.granted(self.now));
            }
        }
        let (check_in, in_use) = (self.check_in(), self.in_use());
        for (ahead, waiter) in (0..).zip(self.waiters()) {
            // A waiter whose session is dead is not there, wherever it stands.
            if let Some(outcome) = outcomes.get_mut(waiter.token.as_slice())
                && self.lives_still(&waiter.session, waiter.session_lives)
            {
                *outcome = PollOutcome::Queued(Queued { ahead, check_in, in_use });
            }
        }
        let waits = outcomes.values().any(|outcome| matches!(outcome, PollOutcome::Queued(_)));
        self.is_used_up.set(waits && self.next_fence().is_none());
        let outcome = |token: &TokenId| outcomes.get(token.as_bytes().as_slice()).copied();
        tokens.iter().map(|token| outcome(token).unwrap_or(PollOutcome::Gone)).collect()
    }

    pub(crate) fn adopt(&mut self, request: &AdoptRequest) -> AdoptOutcome {
        if !self.lives(request.session) {
            return AdoptOutcome::SessionGone;
        }
        let now = self.now;
        if let Some(hold) = self.held(request.to) {
            return AdoptOutcome::Adopted { granted: hold.granted(now), session_bound: hold.entry.session_bound };
        }
        if now > request.not_after.as_micros() {
            return AdoptOutcome::Stale;
        }
        let (owner, lives) =
            (self.owner_of(request.session), self.lives.get(&request.session).map_or(0, |life| life.ends));
        let Some(hold) = self.record.holds.iter_mut().find(|hold| hold.entry.token == request.from.as_bytes()) else {
            return AdoptOutcome::Gone;
        };
        let was = hold.called.then(|| (hold.entry.session.clone(), hold.entry.token.clone()));
        hold.former = Some(Former {
            token: std::mem::replace(&mut hold.entry.token, request.to.as_bytes().to_vec()),
            session: std::mem::replace(&mut hold.entry.session, request.session.as_bytes().to_vec()),
            owner: std::mem::replace(&mut hold.entry.owner, owner),
            not_after: request.not_after.as_micros(),
        });
        (hold.called, hold.was_handed_over, hold.entry.session_lives) = (false, false, lives);
        let adopted = AdoptOutcome::Adopted { granted: hold.granted(now), session_bound: hold.entry.session_bound };
        if let Some((session, token)) = was {
            self.end_call(&session, &token);
        }
        adopted
    }
}

/// The document of a key that nobody has: the fence comes from the commit.
pub(crate) fn fresh(
    names: &Names,
    request: &AcquireRequest,
    owner: String,
    session_lives: u64,
    estimate: u64,
) -> api::Write {
    let hold = Hold { entry: entry(request, owner, session_lives, 0), ..Hold::default() };
    let ends = (!hold.entry.session_bound).then(|| estimate.saturating_add(hold.entry.length.unwrap_or_default()));
    let record = KeyRecord { revision: 1, holds: vec![hold], ..KeyRecord::default() };
    let sessions = sessions(&record, std::iter::empty());
    let name = names.key(&request.key);
    key_document(name, &request.key, record.to_bytes(), sessions, ends, Only::IfMissing)
}

fn entry(request: &AcquireRequest, owner: String, session_lives: u64, now: u64) -> Entry {
    let (session_bound, length) = Entry::lifetime(request.lifetime);
    Entry {
        token: request.token.as_bytes().to_vec(),
        session: request.session.as_bytes().to_vec(),
        session_bound,
        at: now,
        length,
        units: request.demand.units(),
        capacity: request.demand.capacity(),
        owner,
        metadata: request.metadata.clone(),
        trace: request.trace.clone(),
        not_after: request.not_after.as_micros(),
        session_lives,
    }
}
