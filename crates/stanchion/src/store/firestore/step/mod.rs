//! One step on a key: what was read, what becomes of it, and what is to be written.
//!
//! The rules are those of the memory store; what differs is that a session may not be known yet. Then the step stops
//! ([`Operation::unknown`]), the sessions are read, and it is done again from the start.

mod end;
mod enter;
mod grant;
mod write;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use prost_types::Timestamp;

pub(super) use self::enter::fresh;
use self::grant::Call;
use super::document::Names;
use super::record::{Entry, Hold, KeyRecord, Page, PageName, SessionRecord, session_of};
use crate::fence::Fence;
use crate::key::Key;
use crate::store::{Demand, HolderState, KeyState, Queued, WaiterState};
use crate::token::{SessionId, TokenId};

/// When a document holds nothing that can matter any more, it may be deleted this much later.
const KEPT_AFTER: u64 = 3_600_000_000;

/// What a commit writes.
pub(super) type Writes = Vec<api::Write>;

/// What was read of a key.
#[derive(Clone, Debug, Default)]
pub(super) struct Loaded {
    /// When its document was last written; none: there is none.
    pub(super) written: Option<Timestamp>,
    pub(super) record: KeyRecord,
    pub(super) pages: Vec<Leaf>,
}

/// A page of the queue.
#[derive(Clone, Debug)]
pub(super) struct Leaf {
    pub(super) name: PageName,
    pub(super) page: Arc<Page>,
}

/// What is known of a session.
#[derive(Clone, Debug)]
pub(super) struct Life {
    /// Until when it lives at least, in the service's time; 0: it was found dead.
    pub(super) ends: u64,
    pub(super) owner: Arc<str>,
    /// Its document, if it was read in this step.
    pub(super) document: Option<(SessionRecord, Timestamp)>,
}

/// A step that is being done.
pub(super) struct Operation<'a> {
    key: &'a Key,
    names: &'a Names,
    before: &'a Loaded,
    lives: &'a HashMap<SessionId, Life>,
    pub(super) now: u64,
    record: KeyRecord,
    pages: Vec<Leaf>,
    unknown: RefCell<BTreeSet<SessionId>>,
    /// Beside the key's documents.
    others: Vec<api::Write>,
    calls: Vec<Call>,
    /// What this grants begins with its commit: nobody knows how long before that was read.
    from_the_commit: bool,
    /// Also if nothing changes.
    is_written_anew: bool,
    /// There is no fence for what was asked: the step fails, and writes nothing.
    is_used_up: Cell<bool>,
}

impl Loaded {
    /// The one hold of a key that has nothing else, so that deleting its document ends it.
    pub(super) fn only_hold(&self, now: u64) -> Option<&Hold> {
        let record = &self.record;
        let is_plain = record.front.is_empty() && record.forced.is_empty() && record.closed_until == 0;
        match &record.holds[..] {
            // A fence ahead of the clock has to be remembered.
            [hold] if is_plain && record.last_fence <= now => Some(hold),
            _ => None,
        }
    }

    /// One holds it and others wait, and nothing else: who is next depends on no time.
    pub(super) fn is_waited_for(&self) -> bool {
        let record = &self.record;
        let is_plain = record.forced.is_empty() && record.closed_until == 0 && record.pages.len() == self.pages.len();
        record.holds.len() == 1 && !record.front.is_empty() && is_plain
    }
}

impl<'a> Operation<'a> {
    pub(super) fn new(
        key: &'a Key,
        names: &'a Names,
        before: &'a Loaded,
        lives: &'a HashMap<SessionId, Life>,
        now: u64,
    ) -> Self {
        Self {
            key,
            names,
            before,
            lives,
            now,
            record: before.record.clone(),
            pages: before.pages.clone(),
            unknown: RefCell::default(),
            others: Vec::new(),
            calls: Vec::new(),
            from_the_commit: false,
            is_written_anew: false,
            is_used_up: Cell::new(false),
        }
    }

    /// Whether the step fails because the key's fences are used up.
    pub(super) fn is_used_up(&self) -> bool {
        self.is_used_up.get()
    }

    /// What the document says beside its record may be old: it is written though the record stays as it is.
    pub(super) fn write_anew(&mut self) {
        self.is_written_anew = true;
    }

    /// What this step grants begins when it is committed.
    pub(super) fn grant_from_the_commit_on(&mut self) {
        self.from_the_commit = true;
    }

    /// Whether this is still the document that was written then.
    pub(super) fn is_still(&self, written: Option<Timestamp>) -> bool {
        self.before.written == written
    }

    /// The key has no document.
    pub(super) fn is_missing(&self) -> bool {
        self.before.written.is_none()
    }

    /// Sessions that have to be read before this step can be done.
    pub(super) fn unknown(&self) -> Vec<SessionId> {
        self.unknown.borrow().iter().copied().collect()
    }

    /// Whether a session lives. One that is not known is taken to live, and the step is done again. So is one that lived
    /// when it was looked at, and has not been found dead: it may have been beaten since.
    pub(super) fn lives(&self, session: SessionId) -> bool {
        match self.lives.get(&session).map(|life| life.ends) {
            Some(0) => false,
            Some(ends) if ends > self.now => true,
            _ => {
                self.unknown.borrow_mut().insert(session);
                true
            }
        }
    }

    /// The same of one that is known to live until then at least.
    fn lives_still(&self, session: &[u8], at_least: u64) -> bool {
        session_of(session).is_ok_and(|session| match self.lives.get(&session) {
            None if at_least > self.now => true,
            _ => self.lives(session),
        })
    }

    /// The document of a session, as this step read it.
    fn document_of(&self, session: SessionId) -> Option<&'a (SessionRecord, Timestamp)> {
        let document = self.lives.get(&session).and_then(|life| life.document.as_ref());
        if document.is_none() {
            self.unknown.borrow_mut().insert(session);
        }
        document
    }

    pub(super) fn owner_of(&self, session: SessionId) -> String {
        self.lives.get(&session).map(|life| life.owner.to_string()).unwrap_or_default()
    }

    // The queue.

    fn waiters(&self) -> impl Iterator<Item = &Entry> {
        self.record.front.iter().chain(self.pages.iter().flat_map(|leaf| &leaf.page.waiters))
    }

    fn place(&self, token: TokenId) -> Option<usize> {
        self.waiters().position(|waiter| waiter.token == token.as_bytes())
    }

    fn remove_waiters(&mut self, mut remove: impl FnMut(&Entry) -> bool) {
        self.record.front.retain(|waiter| !remove(waiter));
        for leaf in &mut self.pages {
            if leaf.page.waiters.iter().any(&mut remove) {
                Arc::make_mut(&mut leaf.page).waiters.retain(|waiter| !remove(waiter));
            }
        }
        self.draw_up();
    }

    /// The head of the queue is in the key's document.
    fn draw_up(&mut self) {
        self.pages.retain(|leaf| !leaf.page.waiters.is_empty());
        if self.record.front.is_empty() && !self.pages.is_empty() {
            self.record.front = Arc::unwrap_or_clone(self.pages.remove(0).page).waiters;
        }
    }

    // What is there.

    /// The sessions of its holders that depend on one, and of its waiters.
    pub(super) fn sessions(&self) -> impl Iterator<Item = &[u8]> {
        let bound = self.record.holds.iter().map(|hold| &hold.entry).filter(|entry| entry.session_bound);
        bound.chain(self.waiters()).map(|entry| &*entry.session)
    }

    fn held(&self, token: TokenId) -> Option<&Hold> {
        self.record.holds.iter().find(|hold| hold.entry.token == token.as_bytes())
    }

    /// The smallest capacity of the holds, if they share the key.
    fn in_use(&self) -> Option<u32> {
        let shared = self.record.holds.iter().map(|hold| hold.entry.demand()).filter(|demand| !demand.is_exclusive());
        shared.map(Demand::capacity).min()
    }

    /// When time alone may change something for a waiter.
    fn check_in(&self) -> Option<Duration> {
        let deadlines = self.record.holds.iter().filter_map(|hold| hold.deadline);
        let sessions = self.record.holds.iter().filter(|hold| hold.entry.session_bound).filter_map(|hold| {
            let session = session_of(&hold.entry.session).ok()?;
            Some(self.lives.get(&session).map_or(hold.entry.session_lives, |life| life.ends))
        });
        let closed = (self.record.closed_until != 0).then_some(self.record.closed_until);
        deadlines.chain(sessions).chain(closed).min().map(|at| span(at.saturating_sub(self.now)))
    }

    fn queued(&self, token: TokenId) -> Option<Queued> {
        let ahead = self.place(token)?;
        let ahead = u32::try_from(ahead).unwrap_or(u32::MAX);
        Some(Queued { ahead, check_in: self.check_in(), in_use: self.in_use() })
    }

    /// One holds it, whose document time alone does not end.
    pub(super) fn is_held_by_one_session(&self) -> bool {
        matches!(&self.record.holds[..], [hold] if hold.entry.session_bound)
    }

    /// Nothing is held, waited for or closed.
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
                    age: span(self.now.saturating_sub(waiter.at)),
                    metadata: waiter.metadata.clone(),
                    trace: waiter.trace.clone(),
                })
                .collect(),
            last_fence: (self.record.last_fence != 0).then(|| Fence::new(self.record.last_fence)),
            closed_for: (self.record.closed_until != 0)
                .then(|| span(self.record.closed_until.saturating_sub(self.now))),
        }
    }

    fn holder(&self, hold: &Hold) -> HolderState {
        HolderState {
            fence: Fence::new(hold.fence),
            owner: hold.entry.owner.clone(),
            units: hold.entry.units,
            capacity: hold.entry.capacity,
            session_bound: hold.entry.session_bound,
            age: span(self.now.saturating_sub(hold.entry.at)),
            since: SystemTime::UNIX_EPOCH + span(hold.entry.at),
            remaining: hold.granted(self.now).remaining,
            metadata: hold.entry.metadata.clone(),
            trace: hold.entry.trace.clone(),
        }
    }
}

fn span(micros: u64) -> Duration {
    Duration::from_micros(micros)
}

fn in_micros(span: Duration) -> u64 {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}
