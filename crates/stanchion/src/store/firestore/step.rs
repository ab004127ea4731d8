//! One step on a key: what was read, what becomes of it, and what is to be written.
//!
//! The rules are those of the memory store; what differs is that a session may not be known yet. Then the step stops
//! ([`Step::unknown`]), the sessions are read, and it is done again from the start.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use prost::Message as _;
use prost_types::Timestamp;

use super::document::{Names, Only, bytes, delete, fields, put, text, texts, timestamp};
use super::error::malformed;
use super::record::{
    Forced, Former, Hold, KeyRecord, Lost, Page, PageName, SessionRecord, Waiter, session_of, token_of,
};
use crate::error::Result;
use crate::fence::Fence;
use crate::key::Key;
use crate::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, EndOutcome, EvictOutcome, EvictRequest, ExtendOutcome,
    HolderState, KeyState, MAX_WAITERS, PollOutcome, Queued, WaiterState,
};
use crate::token::{SessionId, TokenId};

/// So many waiters, and so many bytes of them, are in one document.
const PAGE_WAITERS: usize = 200;
const PAGE_BYTES: usize = 200_000;

/// So many bytes of holds are in a key's document, which may have 1 MiB. There is no more room for a hold then: it waits.
const HOLDS_BYTES: usize = 600_000;

/// A write has a limit to what it carries; who is not called finds its grant when it asks.
const MOST_CALLS: usize = 300;

/// When a document holds nothing that can matter any more, it may be deleted this much later.
const KEPT_AFTER: u64 = 3_600_000_000;

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
    /// In the service's time; 0: it is dead.
    pub(super) ends: u64,
    pub(super) owner: Arc<str>,
    /// Its document, if it was read in this step.
    pub(super) document: Option<(SessionRecord, Timestamp)>,
}

/// A step that is being done.
pub(super) struct Step<'a> {
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
    calls: usize,
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
}

impl<'a> Step<'a> {
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
            calls: 0,
        }
    }

    /// The key has no document.
    pub(super) fn is_missing(&self) -> bool {
        self.before.written.is_none()
    }

    /// Sessions that have to be read before this step can be done.
    pub(super) fn unknown(&self) -> Vec<SessionId> {
        self.unknown.borrow().iter().copied().collect()
    }

    /// Whether a session lives. One that is not known is taken to live, and the step is done again.
    pub(super) fn lives(&self, session: SessionId) -> bool {
        match self.lives.get(&session) {
            Some(life) => life.ends > self.now,
            None => {
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

    fn waiters(&self) -> impl Iterator<Item = &Waiter> {
        self.record.front.iter().chain(self.pages.iter().flat_map(|leaf| &leaf.page.waiters))
    }

    fn place(&self, token: TokenId) -> Option<usize> {
        self.waiters().position(|waiter| waiter.token == token.as_bytes())
    }

    fn remove_waiters(&mut self, mut remove: impl FnMut(&Waiter) -> bool) {
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

    fn push_waiter(&mut self, waiter: Waiter) {
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

    // What every step does first and last.

    fn demand_in_use(&self) -> Option<u32> {
        let held = self.record.holds.first().map(|hold| hold.capacity);
        held.or_else(|| self.record.front.first().map(|waiter| waiter.capacity))
    }

    fn fits(&self, units: u32, capacity: u32) -> bool {
        let used: u64 = self.record.holds.iter().map(|hold| u64::from(hold.units)).sum();
        let has_room = || self.record.holds.iter().map(prost::Message::encoded_len).sum::<usize>() <= HOLDS_BYTES;
        self.record.closed_until <= self.now && used + u64::from(units) <= u64::from(capacity) && has_room()
    }

    /// What is over is gone, and those at the head that fit are granted.
    pub(super) fn settle(&mut self) {
        let mut holds = std::mem::take(&mut self.record.holds);
        holds.retain(|hold| {
            hold.deadline.is_none_or(|deadline| deadline > self.now)
                && (!hold.session_bound || self.lives_still(&hold.session, hold.session_lives))
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
    pub(super) fn settle_all(&mut self) {
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

    fn next_fence(&mut self) -> u64 {
        let last = (self.record.last_fence != 0).then(|| Fence::new(self.record.last_fence));
        self.record.last_fence = Fence::next(last, self.now).get();
        self.record.last_fence
    }

    fn grant(&mut self, waiter: Waiter, is_called: bool) {
        let fence = self.next_fence();
        let called = is_called && self.call(&waiter.session, &waiter.token, fence, None);
        self.record.holds.push(Hold {
            token: waiter.token,
            session: waiter.session,
            session_bound: waiter.session_bound,
            fence,
            at: self.now,
            deadline: waiter.length.map(|length| self.now.saturating_add(length)),
            length: None,
            units: waiter.units,
            capacity: waiter.capacity,
            owner: waiter.owner,
            metadata: waiter.metadata,
            trace: waiter.trace,
            not_after: waiter.not_after,
            session_lives: waiter.session_lives,
            called,
            former: None,
        });
    }

    /// A document that a session's listener sees.
    fn call(&mut self, session: &[u8], token: &[u8], fence: u64, reason: Option<&str>) -> bool {
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
    fn tell_holder(&mut self) {
        let [hold] = &mut self.record.holds[..] else { return };
        let (Ok(session), Ok(token)) = (session_of(&hold.session), token_of(&hold.token)) else { return };
        if hold.session_bound && !hold.called {
            hold.called = true;
            let said = fields([
                ("key", text(self.key.as_encoded())),
                ("waited_for", text("")),
                ("expire_at", timestamp(self.now.saturating_add(KEPT_AFTER))),
            ]);
            self.others.push(put(self.names.call(session, token), said, Only::Always));
        }
    }

    fn end_call(&mut self, session: &[u8], token: &[u8]) {
        if let (Ok(session), Ok(token)) = (session_of(session), token_of(token)) {
            self.others.push(delete(self.names.call(session, token), Only::Always));
        }
    }

    // The answers.

    fn held(&self, token: TokenId) -> Option<&Hold> {
        self.record.holds.iter().find(|hold| hold.token == token.as_bytes())
    }

    /// When time alone may change something for a waiter.
    fn check_in(&self) -> Option<Duration> {
        let deadlines = self.record.holds.iter().filter_map(|hold| hold.deadline);
        let sessions = self.record.holds.iter().filter(|hold| hold.session_bound).filter_map(|hold| {
            let session = session_of(&hold.session).ok()?;
            Some(self.lives.get(&session).map_or(hold.session_lives, |life| life.ends))
        });
        let closed = (self.record.closed_until != 0).then_some(self.record.closed_until);
        deadlines.chain(sessions).chain(closed).min().map(|at| span(at.saturating_sub(self.now)))
    }

    fn queued(&self, token: TokenId) -> Option<Queued> {
        let ahead = self.place(token)?;
        Some(Queued { ahead: u32::try_from(ahead).unwrap_or(u32::MAX), check_in: self.check_in() })
    }

    /// The rules of an acquire; none where a document has to be created.
    pub(super) fn acquire(&mut self, request: &AcquireRequest) -> Option<AcquireOutcome> {
        if !self.lives(request.session) {
            return Some(AcquireOutcome::SessionGone);
        }
        if self.record.forced.iter().any(|forced| forced.token == request.token.as_bytes()) {
            return Some(AcquireOutcome::Forced);
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
        if let Some(in_use) = self.demand_in_use().filter(|in_use| *in_use != request.demand.capacity()) {
            return Some(AcquireOutcome::CapacityMismatch { in_use });
        }
        if self.is_missing() {
            return None;
        }
        let (units, capacity) = (request.demand.units(), request.demand.capacity());
        let goes_now = self.record.front.is_empty() && self.fits(units, capacity);
        if !goes_now && !request.enqueue {
            return Some(AcquireOutcome::Busy { check_in: self.check_in() });
        }
        let lives = self.lives.get(&request.session).map_or(0, |life| life.ends);
        let waiter = waiter(request, self.owner_of(request.session), lives, self.now);
        if goes_now {
            self.grant(waiter, false);
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
        self.push_waiter(waiter);
        self.queued(request.token).map(AcquireOutcome::Queued)
    }

    pub(super) fn poll(&self, token: TokenId) -> PollOutcome {
        if let Some(hold) = self.held(token) {
            return PollOutcome::Granted(hold.granted(self.now));
        }
        // A waiter whose session is dead is not there, wherever it stands.
        let waiter = self.waiters().find(|waiter| waiter.token == token.as_bytes());
        if waiter.is_some_and(|waiter| !self.lives_still(&waiter.session, waiter.session_lives)) {
            return PollOutcome::Gone;
        }
        self.queued(token).map_or(PollOutcome::Gone, PollOutcome::Queued)
    }

    pub(super) fn end(&mut self, token: TokenId, cooldown: Option<Duration>) -> EndOutcome {
        self.end_forced(token);
        if let Some(at) = self.record.holds.iter().position(|hold| hold.token == token.as_bytes()) {
            let hold = self.record.holds.remove(at);
            if hold.called {
                self.end_call(&hold.session, &hold.token);
            }
            if let Some(cooldown) = cooldown {
                let until = self.now.saturating_add(in_micros(cooldown));
                self.record.closed_until = self.record.closed_until.max(until);
            }
            EndOutcome::Released
        } else if self.place(token).is_some() {
            self.remove_waiters(|waiter| waiter.token == token.as_bytes());
            EndOutcome::Dequeued
        } else {
            EndOutcome::Nothing
        }
    }

    /// What was forced out is told no more.
    fn end_forced(&mut self, token: TokenId) {
        let Some(at) = self.record.forced.iter().position(|forced| forced.token == token.as_bytes()) else { return };
        let forced = self.record.forced.remove(at);
        self.end_call(&forced.session, &forced.token);
        let Ok(session) = session_of(&forced.session) else { return };
        if let Some((record, written)) = self.document_of(session) {
            let mut record = record.clone();
            record.lost.retain(|lost| lost.token != forced.token);
            self.rewrite_session(session, record, *written);
        }
    }

    /// Writes a session's document without moving its end.
    fn rewrite_session(&mut self, session: SessionId, mut record: SessionRecord, written: Timestamp) {
        let Ok(at) = super::document::micros(written) else { return };
        record.expires = record.ends(at);
        record.beaten_before = 0;
        if record.expires != 0 {
            let document =
                super::session::document(self.names, session, &record, record.expires, Only::IfStill(written));
            self.others.push(document);
        }
    }

    pub(super) fn extend(&mut self, token: TokenId, ttl: Duration) -> ExtendOutcome {
        let deadline = self.now.saturating_add(in_micros(ttl));
        let hold = self.record.holds.iter_mut().find(|hold| hold.token == token.as_bytes() && hold.deadline.is_some());
        match hold {
            Some(hold) => {
                hold.deadline = Some(deadline);
                ExtendOutcome::Extended
            }
            None => ExtendOutcome::NotHeld,
        }
    }

    pub(super) fn adopt(&mut self, request: &AdoptRequest) -> AdoptOutcome {
        if !self.lives(request.session) {
            return AdoptOutcome::SessionGone;
        }
        let now = self.now;
        if let Some(hold) = self.held(request.to) {
            return AdoptOutcome::Adopted { granted: hold.granted(now), session_bound: hold.session_bound };
        }
        if now > request.not_after.as_micros() {
            return AdoptOutcome::Stale;
        }
        let (owner, lives) =
            (self.owner_of(request.session), self.lives.get(&request.session).map_or(0, |life| life.ends));
        let Some(hold) = self.record.holds.iter_mut().find(|hold| hold.token == request.from.as_bytes()) else {
            return AdoptOutcome::Gone;
        };
        let was = hold.called.then(|| (hold.session.clone(), hold.token.clone()));
        hold.former = Some(Former {
            token: std::mem::replace(&mut hold.token, request.to.as_bytes().to_vec()),
            session: std::mem::replace(&mut hold.session, request.session.as_bytes().to_vec()),
            owner: std::mem::replace(&mut hold.owner, owner),
            not_after: request.not_after.as_micros(),
        });
        (hold.called, hold.session_lives) = (false, lives);
        let adopted = AdoptOutcome::Adopted { granted: hold.granted(now), session_bound: hold.session_bound };
        if let Some((session, token)) = was {
            self.end_call(&session, &token);
        }
        adopted
    }

    pub(super) fn evict(&mut self, request: &EvictRequest) -> EvictOutcome {
        let Some(at) = self.record.holds.iter().position(|hold| hold.fence == request.fence.get()) else {
            return EvictOutcome::NoSuchHold {
                live: self.record.holds.iter().map(|hold| Fence::new(hold.fence)).collect(),
            };
        };
        let hold = self.record.holds.remove(at);
        self.next_fence();
        let Ok(session) = session_of(&hold.session) else { return EvictOutcome::Evicted };
        if self.lives(session)
            && let Some((record, written)) = self.document_of(session)
        {
            let mut record = record.clone();
            let lost = Lost {
                key: self.key.as_encoded().to_owned(),
                token: hold.token.clone(),
                reason: request.reason.clone(),
            };
            record.lost.push(lost);
            self.rewrite_session(session, record, *written);
            self.record.forced.push(Forced { token: hold.token.clone(), session: hold.session.clone() });
            self.call(&hold.session, &hold.token, hold.fence, Some(&request.reason));
        } else if hold.called {
            self.end_call(&hold.session, &hold.token);
        }
        EvictOutcome::Evicted
    }

    /// Nothing is held, waited for or closed.
    pub(super) fn is_idle(&self) -> bool {
        self.record.holds.is_empty() && self.record.front.is_empty() && self.record.closed_until == 0
    }

    pub(super) fn state(&self) -> KeyState {
        KeyState {
            key: self.key.clone(),
            capacity: self.demand_in_use(),
            holders: self.record.holds.iter().map(|hold| self.holder(hold)).collect(),
            waiters: self
                .waiters()
                .map(|waiter| WaiterState {
                    owner: waiter.owner.clone(),
                    units: waiter.units,
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
            owner: hold.owner.clone(),
            units: hold.units,
            session_bound: hold.session_bound,
            age: span(self.now.saturating_sub(hold.at)),
            since: SystemTime::UNIX_EPOCH + span(hold.at),
            remaining: hold.granted(self.now).remaining,
            metadata: hold.metadata.clone(),
            trace: hold.trace.clone(),
        }
    }

    /// What is to be written, and how the key is then; nothing if nothing has changed. The first write is that of the
    /// key's document: every commit finds it as it was read, and changes it, so two steps never both succeed.
    pub(super) fn writes(mut self) -> Result<(Vec<api::Write>, Loaded)> {
        let revision = self.record.revision.wrapping_add(1);
        let mut changed = Vec::new();
        for leaf in &mut self.pages {
            let before = self.before.pages.iter().find(|before| before.name.number == leaf.name.number);
            let is_same = |before: &Leaf| Arc::ptr_eq(&before.page, &leaf.page) || before.page == leaf.page;
            if !before.is_some_and(is_same) {
                leaf.name.revision = revision;
                Arc::make_mut(&mut leaf.page).revision = revision;
                changed.push(leaf.clone());
            }
        }
        self.record.pages = self.pages.iter().map(|leaf| leaf.name).collect();
        let is_changed = self.record != self.before.record || !self.others.is_empty();
        // A fence that is ahead of the clock has to be remembered.
        let is_empty = self.is_idle() && self.record.forced.is_empty() && self.record.last_fence < self.now;
        let Some(written) = self.before.written else {
            // Only an acquire makes a document, with a fence from its commit. What is written here might come after
            // others have had the key, with an older one.
            return if is_changed { Err(malformed()) } else { Ok((Vec::new(), self.before.clone())) };
        };
        let name = self.names.key(self.key);
        let mut writes = Vec::new();
        if is_empty {
            writes.push(delete(name.clone(), Only::IfStill(written)));
        } else if is_changed {
            self.record.revision = revision;
            writes.push(self.document(name.clone(), Only::IfStill(written)));
        } else {
            return Ok((writes, self.before.clone()));
        }
        for leaf in changed {
            let record = fields([("record", bytes(leaf.page.encode_to_vec()))]);
            writes.push(put(self.names.page(&name, leaf.name.number), record, Only::Always));
        }
        for before in &self.before.pages {
            if !self.pages.iter().any(|leaf| leaf.name.number == before.name.number) {
                writes.push(delete(self.names.page(&name, before.name.number), Only::Always));
            }
        }
        writes.append(&mut self.others);
        let written = None;
        Ok((writes, Loaded { written, record: self.record, pages: self.pages }))
    }

    fn document(&self, name: String, only: Only) -> api::Write {
        let ends = expiry(&self.record, self.waiters().next().is_none());
        let sessions = sessions(&self.record, self.waiters());
        key_document(name, self.key, self.record.to_bytes(), sessions, ends, only)
    }
}

/// The document of a key that nobody has: the fence comes from the commit.
pub(super) fn fresh(
    names: &Names,
    request: &AcquireRequest,
    owner: String,
    session_lives: u64,
    estimate: u64,
) -> api::Write {
    let waiter = waiter(request, owner, session_lives, 0);
    let hold = Hold {
        token: waiter.token,
        session: waiter.session,
        session_bound: waiter.session_bound,
        fence: 0,
        at: 0,
        deadline: None,
        length: waiter.length,
        units: waiter.units,
        capacity: waiter.capacity,
        owner: waiter.owner,
        metadata: waiter.metadata,
        trace: waiter.trace,
        not_after: waiter.not_after,
        session_lives: waiter.session_lives,
        called: false,
        former: None,
    };
    let ends = (!hold.session_bound).then(|| estimate.saturating_add(hold.length.unwrap_or_default()));
    let record = KeyRecord { revision: 1, holds: vec![hold], ..KeyRecord::default() };
    let sessions = sessions(&record, std::iter::empty());
    let name = names.key(&request.key);
    key_document(name, &request.key, record.to_bytes(), sessions, ends, Only::IfMissing)
}

fn key_document(
    name: String,
    key: &Key,
    record: Vec<u8>,
    sessions: BTreeSet<String>,
    ends: Option<u64>,
    only: Only,
) -> api::Write {
    let mut all =
        fields([("key", text(key.as_encoded())), ("sessions", texts(sessions.into_iter())), ("record", bytes(record))]);
    if let Some(ends) = ends {
        all.insert("expire_at".to_owned(), timestamp(ends.saturating_add(KEPT_AFTER)));
    }
    put(name, all, only)
}

/// The sessions that this record depends on: what ends with them is found by this field.
fn sessions<'a>(record: &KeyRecord, waiters: impl Iterator<Item = &'a Waiter>) -> BTreeSet<String> {
    let held = record.holds.iter().filter(|hold| hold.session_bound).map(|hold| &hold.session);
    let waiting = waiters.map(|waiter| &waiter.session);
    // Each of them once, before anything is done with them: a queue is long, and few processes are in it.
    let all: BTreeSet<_> = held.chain(waiting).chain(record.forced.iter().map(|forced| &forced.session)).collect();
    all.into_iter().filter_map(|session| session_of(session).ok()).map(|session| session.to_hex()).collect()
}

/// When nothing of a record can matter any more, if time alone decides that. What depends on a session has no such time.
fn expiry(record: &KeyRecord, nobody_waits: bool) -> Option<u64> {
    let depends = !nobody_waits || !record.forced.is_empty() || record.holds.iter().any(|hold| hold.session_bound);
    let ends = record.holds.iter().filter_map(|hold| hold.deadline);
    (!depends).then(|| ends.chain([record.closed_until, record.last_fence]).max().unwrap_or_default())
}

fn waiter(request: &AcquireRequest, owner: String, session_lives: u64, now: u64) -> Waiter {
    let (session_bound, length) = Waiter::term(request.term);
    Waiter {
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

fn span(micros: u64) -> Duration {
    Duration::from_micros(micros)
}

fn in_micros(span: Duration) -> u64 {
    u64::try_from(span.as_micros()).unwrap_or(u64::MAX)
}
