//! Applies one operation to a key: keeps the documents as they were read, changes a copy, and derives the writes.
//!
//! The rules are the ones of the memory store, with one difference: a session's state may not be known yet. The
//! operation then lists the sessions to read ([`KeyUpdate::unread_sessions`]) and is repeated from the start.

mod acquire;
mod grant;
mod release;
mod write;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use prost_types::Timestamp;

pub(super) use self::acquire::create_document;
use self::grant::PendingNotification;
use super::document::Names;
use super::record::{KeyRecord, PageRef, SessionRecord, StoredEntry, StoredHold, StoredPage, session_of};
use crate::fence::Fence;
use crate::key::Key;
use crate::store::{Demand, HolderState, KeyState, Queued, WaiterState};
use crate::token::{SessionId, TokenId};

/// Time in µs after which a document may be deleted once its contents cannot matter any more.
const DELETION_DELAY: u64 = 3_600_000_000;

/// The writes of one commit.
pub(super) type Writes = Vec<api::Write>;

/// A key as it was read.
#[derive(Clone, Debug, Default)]
pub(super) struct LoadedKey {
    /// `update_time` of the key's document, or `None` if there is no document.
    pub(super) written: Option<Timestamp>,
    pub(super) record: KeyRecord,
    pub(super) pages: Vec<QueuePage>,
}

/// A page of the queue.
#[derive(Clone, Debug)]
pub(super) struct QueuePage {
    pub(super) name: PageRef,
    pub(super) page: Arc<StoredPage>,
}

/// State of a session when it was last read.
#[derive(Clone, Debug)]
pub(super) struct SessionState {
    /// Time in µs of the service's clock until which the session lives at least; 0 means that it has expired.
    pub(super) expires_at: u64,
    pub(super) owner: Arc<str>,
    /// Document of the session, if this operation has read it.
    pub(super) document: Option<(SessionRecord, Timestamp)>,
}

/// An operation on a key in progress.
pub(super) struct KeyUpdate<'a> {
    key: &'a Key,
    names: &'a Names,
    before: &'a LoadedKey,
    session_states: &'a HashMap<SessionId, SessionState>,
    pub(super) now: u64,
    record: KeyRecord,
    pages: Vec<QueuePage>,
    unread: RefCell<BTreeSet<SessionId>>,
    /// Writes to documents other than the key's own.
    other_writes: Vec<api::Write>,
    notifications: Vec<PendingNotification>,
    /// Grants start at the commit, because the key's document was read an unknown time ago.
    is_granted_at_commit: bool,
    /// The key's document is written even if its record stays the same.
    is_always_written: bool,
    /// No fence is left for the requested grant, so the operation fails without writing.
    is_fence_exhausted: Cell<bool>,
}

impl LoadedKey {
    /// Returns the hold of a key that has nothing else, so that deleting its document releases the hold.
    pub(super) fn only_hold(&self, now: u64) -> Option<&StoredHold> {
        let record = &self.record;
        let is_plain = record.front.is_empty() && record.force_released.is_empty() && record.closed_until == 0;
        match &record.holds[..] {
            // A fence that is ahead of the clock must stay in the document.
            [hold] if is_plain && record.last_fence <= now => Some(hold),
            _ => None,
        }
    }

    /// Returns whether the key has exactly one hold, some waiters and nothing else, so that the next holder does not
    /// depend on time.
    pub(super) fn is_sole_hold_with_queue(&self) -> bool {
        let record = &self.record;
        let is_plain =
            record.force_released.is_empty() && record.closed_until == 0 && record.pages.len() == self.pages.len();
        record.holds.len() == 1 && !record.front.is_empty() && is_plain
    }
}

impl<'a> KeyUpdate<'a> {
    pub(super) fn new(
        key: &'a Key,
        names: &'a Names,
        before: &'a LoadedKey,
        session_states: &'a HashMap<SessionId, SessionState>,
        now: u64,
    ) -> Self {
        Self {
            key,
            names,
            before,
            session_states,
            now,
            record: before.record.clone(),
            pages: before.pages.clone(),
            unread: RefCell::default(),
            other_writes: Vec::new(),
            notifications: Vec::new(),
            is_granted_at_commit: false,
            is_always_written: false,
            is_fence_exhausted: Cell::new(false),
        }
    }

    /// Returns whether the operation fails because the key's fences are used up.
    pub(super) fn is_fence_exhausted(&self) -> bool {
        self.is_fence_exhausted.get()
    }

    /// Writes the document even if its record stays the same, because its other fields may be outdated.
    pub(super) fn always_write(&mut self) {
        self.is_always_written = true;
    }

    /// Lets the grants of this operation start at its commit.
    pub(super) fn grant_at_commit(&mut self) {
        self.is_granted_at_commit = true;
    }

    /// Returns whether the document still has this `update_time`.
    pub(super) fn is_still(&self, written: Option<Timestamp>) -> bool {
        self.before.written == written
    }

    /// Returns whether the key has no document.
    pub(super) fn is_missing(&self) -> bool {
        self.before.written.is_none()
    }

    /// Returns the sessions that must be read before this operation can be decided.
    pub(super) fn unread_sessions(&self) -> Vec<SessionId> {
        self.unread.borrow().iter().copied().collect()
    }

    /// Returns whether a session is alive. A session of unknown state counts as alive, and the operation is repeated
    /// after reading it. The same applies when the known lifetime is over without proof of expiry, because the session
    /// may have been renewed since.
    pub(super) fn is_alive(&self, session: SessionId) -> bool {
        match self.session_states.get(&session).map(|state| state.expires_at) {
            Some(0) => false,
            Some(expires_at) if expires_at > self.now => true,
            _ => {
                self.unread.borrow_mut().insert(session);
                true
            }
        }
    }

    /// Returns whether a session is alive, without reading it if it is known to live until `at_least`.
    fn is_alive_hinted(&self, session: &[u8], at_least: u64) -> bool {
        session_of(session).is_ok_and(|session| match self.session_states.get(&session) {
            None if at_least > self.now => true,
            _ => self.is_alive(session),
        })
    }

    /// Returns a session's document as this operation read it.
    fn document_of(&self, session: SessionId) -> Option<&'a (SessionRecord, Timestamp)> {
        let document = self.session_states.get(&session).and_then(|state| state.document.as_ref());
        if document.is_none() {
            self.unread.borrow_mut().insert(session);
        }
        document
    }

    pub(super) fn owner_of(&self, session: SessionId) -> String {
        self.session_states.get(&session).map(|state| state.owner.to_string()).unwrap_or_default()
    }

    // Queue.

    fn waiters(&self) -> impl Iterator<Item = &StoredEntry> {
        self.record.front.iter().chain(self.pages.iter().flat_map(|queue_page| &queue_page.page.waiters))
    }

    fn queue_position(&self, token: TokenId) -> Option<usize> {
        self.waiters().position(|waiter| waiter.token == token.as_bytes())
    }

    fn remove_waiters(&mut self, mut remove: impl FnMut(&StoredEntry) -> bool) {
        self.record.front.retain(|waiter| !remove(waiter));
        for queue_page in &mut self.pages {
            if queue_page.page.waiters.iter().any(&mut remove) {
                Arc::make_mut(&mut queue_page.page).waiters.retain(|waiter| !remove(waiter));
            }
        }
        self.refill_front();
    }

    /// Moves a page into the key's document if the head of the queue is empty.
    fn refill_front(&mut self) {
        self.pages.retain(|queue_page| !queue_page.page.waiters.is_empty());
        if self.record.front.is_empty() && !self.pages.is_empty() {
            self.record.front = Arc::unwrap_or_clone(self.pages.remove(0).page).waiters;
        }
    }

    // Contents.

    /// Returns the sessions on which holds and waiters of this key depend.
    pub(super) fn sessions(&self) -> impl Iterator<Item = &[u8]> {
        let bound = self.record.holds.iter().map(|hold| &hold.entry).filter(|entry| entry.session_bound);
        bound.chain(self.waiters()).map(|entry| &*entry.session)
    }

    fn hold_of(&self, token: TokenId) -> Option<&StoredHold> {
        self.record.holds.iter().find(|hold| hold.entry.token == token.as_bytes())
    }

    /// Returns the smallest capacity of the holds, if they share the key.
    fn in_use(&self) -> Option<u32> {
        let shared = self.record.holds.iter().map(|hold| hold.entry.demand()).filter(|demand| !demand.is_exclusive());
        shared.map(Demand::capacity).min()
    }

    /// Returns the time until a waiter's position may change without any client's action.
    fn check_in(&self) -> Option<Duration> {
        let deadlines = self.record.holds.iter().filter_map(|hold| hold.deadline);
        let sessions = self.record.holds.iter().filter(|hold| hold.entry.session_bound).filter_map(|hold| {
            let session = session_of(&hold.entry.session).ok()?;
            Some(self.session_states.get(&session).map_or(hold.entry.session_alive_until, |state| state.expires_at))
        });
        let closed = (self.record.closed_until != 0).then_some(self.record.closed_until);
        deadlines.chain(sessions).chain(closed).min().map(|at| span(at.saturating_sub(self.now)))
    }

    fn queued(&self, token: TokenId) -> Option<Queued> {
        let ahead = self.queue_position(token)?;
        let ahead = u32::try_from(ahead).unwrap_or(u32::MAX);
        Some(Queued { ahead, check_in: self.check_in(), in_use: self.in_use() })
    }

    /// Returns whether the key has exactly one hold and it depends on a session.
    pub(super) fn is_held_by_one_session(&self) -> bool {
        matches!(&self.record.holds[..], [hold] if hold.entry.session_bound)
    }

    /// Returns whether the key has no holder, no waiter and no cooldown.
    pub(super) fn is_idle(&self) -> bool {
        self.record.holds.is_empty() && self.record.front.is_empty() && self.record.closed_until == 0
    }

    pub(super) fn state(&self) -> KeyState {
        KeyState {
            key: self.key.clone(),
            holders: self.record.holds.iter().map(|hold| self.holder(hold)).collect(),
            waiters: self
                .waiters()
                .map(|waiter| WaiterState {
                    owner: waiter.owner.clone(),
                    units: waiter.units,
                    capacity: waiter.capacity,
                    age: span(self.now.saturating_sub(waiter.since)),
                    metadata: waiter.metadata.clone(),
                    trace: waiter.trace.clone(),
                })
                .collect(),
            last_fence: (self.record.last_fence != 0).then(|| Fence::new(self.record.last_fence)),
            closed_for: (self.record.closed_until != 0)
                .then(|| span(self.record.closed_until.saturating_sub(self.now))),
        }
    }

    fn holder(&self, hold: &StoredHold) -> HolderState {
        HolderState {
            fence: Fence::new(hold.fence),
            owner: hold.entry.owner.clone(),
            units: hold.entry.units,
            capacity: hold.entry.capacity,
            session_bound: hold.entry.session_bound,
            age: span(self.now.saturating_sub(hold.entry.since)),
            since: SystemTime::UNIX_EPOCH + span(hold.entry.since),
            remaining: hold.granted(self.now).remaining,
            metadata: hold.entry.metadata.clone(),
            trace: hold.entry.trace.clone(),
            lingers: hold.lingers.is_some(),
        }
    }
}

fn span(micros: u64) -> Duration {
    Duration::from_micros(micros)
}

fn in_micros(span: Duration) -> u64 {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}
