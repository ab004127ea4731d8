//! Applies acquire, poll and adopt to a key.

use std::collections::HashMap;
use std::sync::Arc;

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use prost::Message as _;

use super::super::document::{Names, WriteIf};
use super::super::record::{KeyRecord, PageRef, PreviousHolder, StoredEntry, StoredHold, StoredPage};
use super::write::{key_document, sessions};
use super::{KeyUpdate, QueuePage};
use crate::store::{AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, MAX_WAITERS, PollOutcome, Queued};
use crate::token::TokenId;

/// Maximum number of waiters in one document.
const MAX_PAGE_WAITERS: usize = 200;

/// Maximum size in bytes of the waiters in one document.
const MAX_PAGE_BYTES: usize = 200_000;

impl KeyUpdate<'_> {
    /// Applies an acquire. Returns `None` if the key has no document yet and the caller has to create it.
    pub(crate) fn acquire(&mut self, request: &AcquireRequest) -> Option<AcquireOutcome> {
        if !self.is_alive(request.session) {
            return Some(AcquireOutcome::SessionGone);
        }
        if self.record.force_released.iter().any(|released| released.token == request.token.as_bytes()) {
            return Some(AcquireOutcome::ForceReleased);
        }
        if let Some(hold) = self.hold_of(request.token) {
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
            self.is_fence_exhausted.set(true);
            return Some(AcquireOutcome::Busy { check_in: None, in_use: None, lingers: false });
        };
        let goes_now = self.record.front.is_empty() && self.fits(request.demand);
        if !goes_now && !request.enqueue {
            let lingers = self.record.holds.iter().any(|hold| hold.lingers.is_some());
            return Some(AcquireOutcome::Busy { check_in: self.check_in(), in_use: self.in_use(), lingers });
        }
        let alive_until = self.session_states.get(&request.session).map_or(0, |state| state.expires_at);
        let entry = entry(request, self.owner_of(request.session), alive_until, self.now);
        if goes_now {
            self.grant(entry, fence, false);
            return self.hold_of(request.token).map(|hold| AcquireOutcome::Granted(hold.granted(self.now)));
        }
        if self.waiters().count() >= MAX_WAITERS as usize {
            self.drop_expired_waiters();
        }
        if self.waiters().count() >= MAX_WAITERS as usize {
            return Some(AcquireOutcome::QueueFull { limit: MAX_WAITERS });
        }
        if self.record.front.is_empty() {
            self.notify_holder();
        }
        self.push_waiter(entry);
        self.queued(request.token).map(AcquireOutcome::Queued)
    }

    fn push_waiter(&mut self, waiter: StoredEntry) {
        let last = match self.pages.last_mut() {
            Some(queue_page) => &mut Arc::make_mut(&mut queue_page.page).waiters,
            None => &mut self.record.front,
        };
        let bytes: usize = last.iter().map(prost::Message::encoded_len).sum();
        if last.len() < MAX_PAGE_WAITERS && bytes + waiter.encoded_len() <= MAX_PAGE_BYTES {
            last.push(waiter);
        } else {
            // Use a number that no page of this key has ever had, not even a page of an earlier document.
            let number = self.pages.last().map_or(0, |queue_page| queue_page.name.number + 1).max(self.now);
            let page = Arc::new(StoredPage { waiters: vec![waiter], revision: 0 });
            self.pages.push(QueuePage { name: PageRef { number, revision: 0 }, page });
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
            // A waiter whose session has expired counts as gone, wherever it stands.
            if let Some(outcome) = outcomes.get_mut(waiter.token.as_slice())
                && self.is_alive_hinted(&waiter.session, waiter.session_alive_until)
            {
                *outcome = PollOutcome::Queued(Queued { ahead, check_in, in_use });
            }
        }
        let waits = outcomes.values().any(|outcome| matches!(outcome, PollOutcome::Queued(_)));
        self.is_fence_exhausted.set(waits && self.next_fence().is_none());
        let outcome = |token: &TokenId| outcomes.get(token.as_bytes().as_slice()).copied();
        tokens.iter().map(|token| outcome(token).unwrap_or(PollOutcome::Gone)).collect()
    }

    pub(crate) fn adopt(&mut self, request: &AdoptRequest) -> AdoptOutcome {
        if !self.is_alive(request.session) {
            return AdoptOutcome::SessionGone;
        }
        let now = self.now;
        if let Some(hold) = self.hold_of(request.to) {
            return AdoptOutcome::Adopted { granted: hold.granted(now), session_bound: hold.entry.session_bound };
        }
        if now > request.not_after.as_micros() {
            return AdoptOutcome::Stale;
        }
        let (owner, alive_until) = (
            self.owner_of(request.session),
            self.session_states.get(&request.session).map_or(0, |state| state.expires_at),
        );
        // After the highest fence nothing more is granted, so the adopter's fence need not be higher.
        let next_fence = self.next_fence().unwrap_or(self.record.last_fence);
        let Some(hold) = self.record.holds.iter_mut().find(|hold| hold.entry.token == request.from.as_bytes()) else {
            return AdoptOutcome::Gone;
        };
        let was = hold.has_notification.then(|| (hold.entry.session.clone(), hold.entry.token.clone()));
        hold.previous = Some(PreviousHolder {
            token: std::mem::replace(&mut hold.entry.token, request.to.as_bytes().to_vec()),
            session: std::mem::replace(&mut hold.entry.session, request.session.as_bytes().to_vec()),
            owner: std::mem::replace(&mut hold.entry.owner, owner),
            not_after: request.not_after.as_micros(),
            fence: if hold.lingers.is_some() { hold.fence } else { 0 },
            lingers: hold.lingers,
        });
        if hold.lingers.take().is_some() {
            // The old holder may have used all fences up to the last one.
            hold.fence = next_fence;
            self.record.last_fence = next_fence;
        }
        (hold.has_notification, hold.granted_from_queue, hold.entry.session_alive_until) = (false, false, alive_until);
        let adopted = AdoptOutcome::Adopted { granted: hold.granted(now), session_bound: hold.entry.session_bound };
        if let Some((session, token)) = was {
            self.delete_notification(&session, &token);
        }
        adopted
    }
}

/// Returns the write that creates the document of a free key, and the record in it. The commit time becomes its fence.
pub(crate) fn create_document(
    names: &Names,
    request: &AcquireRequest,
    owner: String,
    session_alive_until: u64,
    estimate: u64,
) -> (api::Write, KeyRecord) {
    let hold = StoredHold { entry: entry(request, owner, session_alive_until, 0), ..StoredHold::default() };
    let expires_at =
        (!hold.entry.session_bound).then(|| estimate.saturating_add(hold.entry.length.unwrap_or_default()));
    let record = KeyRecord { revision: 1, holds: vec![hold], ..KeyRecord::default() };
    let sessions = sessions(&record, std::iter::empty());
    let name = names.key(&request.key);
    (key_document(name, &request.key, record.to_bytes(), sessions, expires_at, WriteIf::Missing), record)
}

fn entry(request: &AcquireRequest, owner: String, session_alive_until: u64, now: u64) -> StoredEntry {
    let (session_bound, length) = StoredEntry::lifetime(request.lifetime);
    StoredEntry {
        token: request.token.as_bytes().to_vec(),
        session: request.session.as_bytes().to_vec(),
        session_bound,
        since: now,
        length,
        units: request.demand.units(),
        capacity: request.demand.capacity(),
        owner,
        metadata: request.metadata.clone(),
        trace: request.trace.clone(),
        not_after: request.not_after.as_micros(),
        session_alive_until,
    }
}
