//! What is to be written.

use std::collections::BTreeSet;
use std::sync::Arc;

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use prost::Message as _;

use super::super::document::{Only, bytes, delete, fields, ids, put, text, timestamp};
use super::super::error::malformed;
use super::super::record::{Entry, KeyRecord, session_of};
use super::{KEPT_AFTER, Leaf, Loaded, Operation, Writes};
use crate::error::Result;
use crate::key::Key;
use crate::token::SessionId;

impl Operation<'_> {
    /// What is to be written, and how the key is then; nothing if nothing has changed. The first write is that of the
    /// key's document: every commit finds it as it was read, and changes it, so two steps never both succeed.
    pub(crate) fn writes(mut self) -> Result<(Writes, Loaded)> {
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
        let is_changed = self.record != self.before.record || !self.others.is_empty() || !self.calls.is_empty();
        let is_written = is_changed || self.is_written_anew;
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
        } else if is_written {
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
        writes.extend(self.calls());
        let written = None;
        Ok((writes, Loaded { written, record: self.record, pages: self.pages }))
    }

    fn document(&self, name: String, only: Only) -> api::Write {
        let ends = expiry(&self.record, self.waiters().next().is_none());
        let sessions = sessions(&self.record, self.waiters());
        key_document(name, self.key, self.record.to_bytes(), sessions, ends, only)
    }
}

pub(super) fn key_document(
    name: String,
    key: &Key,
    record: Vec<u8>,
    sessions: BTreeSet<SessionId>,
    ends: Option<u64>,
    only: Only,
) -> api::Write {
    let mut all =
        fields([("key", text(key.as_encoded())), ("sessions", ids(sessions.into_iter())), ("record", bytes(record))]);
    if let Some(ends) = ends {
        all.insert("expire_at".to_owned(), timestamp(ends.saturating_add(KEPT_AFTER)));
    }
    put(name, all, only)
}

/// The sessions that this record depends on: what ends with them is found by this field.
pub(super) fn sessions<'a>(record: &KeyRecord, waiters: impl Iterator<Item = &'a Entry>) -> BTreeSet<SessionId> {
    let held = record.holds.iter().filter(|hold| hold.entry.session_bound).flat_map(|hold| {
        // Whose it is, where it is adopted, the commit decides.
        [Some(&hold.entry.session), hold.former.as_ref().map(|former| &former.session)].into_iter().flatten()
    });
    let waiting = waiters.map(|waiter| &waiter.session);
    // Each of them once, before anything is done with them: a queue is long, and few processes are in it.
    let all: BTreeSet<_> = held.chain(waiting).chain(record.forced.iter().map(|forced| &forced.session)).collect();
    all.into_iter().filter_map(|session| session_of(session).ok()).collect()
}

/// When nothing of a record can matter any more, if time alone decides that. What depends on a session has no such time.
fn expiry(record: &KeyRecord, nobody_waits: bool) -> Option<u64> {
    let depends =
        !nobody_waits || !record.forced.is_empty() || record.holds.iter().any(|hold| hold.entry.session_bound);
    let ends = record.holds.iter().filter_map(|hold| hold.deadline);
    (!depends).then(|| ends.chain([record.closed_until, record.last_fence]).max().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "test code")]

    use std::collections::HashMap;

    use super::super::super::document::Names;
    use super::super::super::record::{Hold, Page, PageName};
    use super::super::Life;
    use super::*;
    use crate::store::{AcquireOutcome, EndOutcome, MAX_WAITERS};
    use crate::token::TokenId;

    /// What a document may have.
    const MOST_BYTES: usize = 1_048_576;

    /// As much text as there may be, and each of it from another process.
    fn entry(number: u32) -> Entry {
        let mut id = vec![0; 16];
        id[..4].copy_from_slice(&number.to_be_bytes());
        Entry {
            token: id.clone(),
            session: id,
            session_bound: true,
            at: u64::MAX,
            units: 1,
            capacity: i32::MAX as u32,
            owner: "o".repeat(128),
            metadata: Some("m".repeat(4_096)),
            trace: Some("t".repeat(4_096)),
            session_lives: u64::MAX,
            ..Entry::default()
        }
    }

    /// As a damaged document may have it.
    #[test]
    fn highest_fence_is_granted_once() {
        let (names, key) = (Names::new("projects/p/databases/d", "stanchion"), Key::new("", "job").unwrap());
        let mut loaded = Loaded { written: Some(prost_types::Timestamp::default()), ..Loaded::default() };
        loaded.record.last_fence = u64::MAX - 1;
        let session = crate::token::SessionId::from_bytes([0; 16]);
        let alive = Life { ends: u64::MAX, owner: "o".into(), document: None };
        let lives = HashMap::from([(session, alive)]);
        let request = |number| crate::store::AcquireRequest {
            key: key.clone(),
            token: TokenId::from_bytes([number; 16]),
            session,
            demand: crate::store::Demand::MUTEX,
            lifetime: crate::store::Lifetime::Session { max_hold: None },
            enqueue: true,
            not_after: crate::store::StoreTime::from_micros(u64::MAX),
            metadata: None,
            trace: None,
        };
        let mut step = Operation::new(&key, &names, &loaded, &lives, 1);
        let outcome = step.acquire(&request(1)).unwrap();
        assert!(matches!(outcome, AcquireOutcome::Granted(granted) if granted.fence.get() == u64::MAX), "{outcome:?}");
        assert!(!step.is_used_up());
        step.acquire(&request(2));
        assert!(step.is_used_up() && step.record.front.is_empty());
        // One that waited before.
        step.record.front.push(Entry { token: vec![3; 16], session: vec![0; 16], ..entry(0) });
        assert_eq!(step.end(TokenId::from_bytes([1; 16]), None), EndOutcome::Released);
        step.settle();
        assert!(step.record.holds.is_empty() && step.record.front.len() == 1);
        let step = Operation::new(&key, &names, &loaded, &lives, 1);
        assert!(!step.is_used_up());
    }

    #[test]
    fn the_fullest_key_fits_its_document() {
        let mut numbers = 0..;
        let mut next = || entry(numbers.next().unwrap());
        let names = Names::new("projects/p/databases/d", "stanchion");
        let key = Key::new(&"n".repeat(128), &"k".repeat(512)).unwrap();
        let mut full = Loaded { written: Some(prost_types::Timestamp::default()), ..Loaded::default() };
        let bytes = |holds: &[Hold]| holds.iter().map(prost::Message::encoded_len).sum::<usize>();
        while bytes(&full.record.holds) <= super::super::grant::HOLDS_BYTES {
            let hold = Hold { entry: next(), fence: u64::MAX, deadline: Some(u64::MAX), ..Hold::default() };
            full.record.holds.push(hold);
        }
        let page = |number| {
            let name = PageName { number, revision: 1 };
            Leaf { name, page: Arc::new(Page { waiters: (0..23).map(|_| next()).collect(), revision: 1 }) }
        };
        full.pages = (0..u64::from(MAX_WAITERS) / 23).map(page).collect();
        full.record.front = full.pages[0].page.waiters.clone();
        full.record.pages = full.pages.iter().map(|leaf| leaf.name).collect();
        let lives = HashMap::new();
        let mut step = Operation::new(&key, &names, &full, &lives, 1);
        let first = TokenId::from_bytes([0; 16]);
        assert_eq!(step.end(first, None), EndOutcome::Released);
        step.settle();
        let (writes, _) = step.writes().unwrap();
        let document = writes[0].encoded_len();
        assert!(document <= MOST_BYTES, "{document}");
    }
}
