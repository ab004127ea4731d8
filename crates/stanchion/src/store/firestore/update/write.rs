//! Derives the writes of an operation from its changes.

use std::collections::BTreeSet;
use std::sync::Arc;

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use prost::Message as _;

use super::super::document::{WriteIf, bytes, delete, fields, ids, put, text, timestamp};
use super::super::error::malformed;
use super::super::record::{KeyRecord, StoredEntry, session_of};
use super::{DELETION_DELAY, KeyUpdate, LoadedKey, QueuePage, Writes};
use crate::error::Result;
use crate::key::Key;
use crate::token::SessionId;

impl KeyUpdate<'_> {
    /// Returns the writes and the key as it is after them, or no writes if nothing has changed. The first write is the
    /// one of the key's document. Each commit requires the document to be unchanged and changes it, so two competing
    /// operations never both succeed.
    pub(crate) fn writes(mut self) -> Result<(Writes, LoadedKey)> {
        let revision = self.record.revision.wrapping_add(1);
        let mut changed = Vec::new();
        for queue_page in &mut self.pages {
            let before = self.before.pages.iter().find(|before| before.name.number == queue_page.name.number);
            let is_same =
                |before: &QueuePage| Arc::ptr_eq(&before.page, &queue_page.page) || before.page == queue_page.page;
            if !before.is_some_and(is_same) {
                queue_page.name.revision = revision;
                Arc::make_mut(&mut queue_page.page).revision = revision;
                changed.push(queue_page.clone());
            }
        }
        self.record.pages = self.pages.iter().map(|queue_page| queue_page.name).collect();
        let is_changed =
            self.record != self.before.record || !self.other_writes.is_empty() || !self.notifications.is_empty();
        let is_written = is_changed || self.is_always_written;
        // A fence that is ahead of the clock must stay in the document.
        let is_empty = self.is_idle() && self.record.force_released.is_empty() && self.record.last_fence < self.now;
        let Some(written) = self.before.written else {
            // Only an acquire creates a document, and its commit time becomes the fence. A document created here might
            // be committed after another client had the key, and would contain an older fence.
            return if is_changed { Err(malformed()) } else { Ok((Vec::new(), self.before.clone())) };
        };
        let name = self.names.key(self.key);
        let mut writes = Vec::new();
        if is_empty {
            writes.push(delete(name.clone(), WriteIf::Unchanged(written)));
        } else if is_written {
            self.record.revision = revision;
            writes.push(self.document(name.clone(), WriteIf::Unchanged(written)));
        } else {
            return Ok((writes, self.before.clone()));
        }
        for queue_page in changed {
            let record = fields([("record", bytes(queue_page.page.encode_to_vec()))]);
            writes.push(put(self.names.page(&name, queue_page.name.number), record, WriteIf::Always));
        }
        for before in &self.before.pages {
            if !self.pages.iter().any(|queue_page| queue_page.name.number == before.name.number) {
                writes.push(delete(self.names.page(&name, before.name.number), WriteIf::Always));
            }
        }
        writes.append(&mut self.other_writes);
        writes.extend(self.notifications());
        let written = None;
        Ok((writes, LoadedKey { written, record: self.record, pages: self.pages }))
    }

    fn document(&self, name: String, write_if: WriteIf) -> api::Write {
        let expires_at = expiry(&self.record, self.waiters().next().is_none());
        let sessions = sessions(&self.record, self.waiters());
        key_document(name, self.key, self.record.to_bytes(), sessions, expires_at, write_if)
    }
}

pub(super) fn key_document(
    name: String,
    key: &Key,
    record: Vec<u8>,
    sessions: BTreeSet<SessionId>,
    expires_at: Option<u64>,
    write_if: WriteIf,
) -> api::Write {
    let mut all =
        fields([("key", text(key.as_encoded())), ("sessions", ids(sessions.into_iter())), ("record", bytes(record))]);
    if let Some(expires_at) = expires_at {
        all.insert("expire_at".to_owned(), timestamp(expires_at.saturating_add(DELETION_DELAY)));
    }
    put(name, all, write_if)
}

/// Returns the sessions that this record depends on. The reaper finds the keys of a session by this field.
pub(super) fn sessions<'a>(record: &KeyRecord, waiters: impl Iterator<Item = &'a StoredEntry>) -> BTreeSet<SessionId> {
    let held = record.holds.iter().filter(|hold| hold.entry.session_bound).flat_map(|hold| {
        // The commit time decides whether an adoption takes effect, so include both holders.
        [Some(&hold.entry.session), hold.previous.as_ref().map(|previous| &previous.session)].into_iter().flatten()
    });
    let waiting = waiters.map(|waiter| &waiter.session);
    // Remove duplicates before decoding: a queue can be long, but it belongs to few processes.
    let all: BTreeSet<_> =
        held.chain(waiting).chain(record.force_released.iter().map(|released| &released.session)).collect();
    all.into_iter().filter_map(|session| session_of(session).ok()).collect()
}

/// Returns when a record cannot matter any more, if time alone decides that. A record that depends on a session has no
/// such time.
fn expiry(record: &KeyRecord, nobody_waits: bool) -> Option<u64> {
    let depends =
        !nobody_waits || !record.force_released.is_empty() || record.holds.iter().any(|hold| hold.entry.session_bound);
    let expires_at = record.holds.iter().filter_map(|hold| hold.deadline);
    (!depends).then(|| expires_at.chain([record.closed_until, record.last_fence]).max().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "test code")]

    use std::collections::HashMap;

    use super::super::super::document::Names;
    use super::super::super::record::{PageRef, StoredHold, StoredPage};
    use super::super::SessionState;
    use super::*;
    use crate::store::{AcquireOutcome, EndOutcome, MAX_WAITERS};
    use crate::token::TokenId;

    /// Maximum size of a document in bytes.
    const MAX_DOCUMENT_BYTES: usize = 1_048_576;

    /// Returns an entry with texts of maximum length and a session of its own.
    fn entry(number: u32) -> StoredEntry {
        let mut id = vec![0; 16];
        id[..4].copy_from_slice(&number.to_be_bytes());
        StoredEntry {
            token: id.clone(),
            session: id,
            session_bound: true,
            since: u64::MAX,
            units: 1,
            capacity: i32::MAX as u32,
            owner: "o".repeat(128),
            metadata: Some("m".repeat(4_096)),
            trace: Some("t".repeat(4_096)),
            session_alive_until: u64::MAX,
            ..StoredEntry::default()
        }
    }

    /// Starts with the highest fences, which only a damaged document can contain.
    #[test]
    fn highest_fence_is_granted_once() {
        let (names, key) = (Names::new("projects/p/databases/d", "stanchion"), Key::new("", "job").unwrap());
        let mut loaded = LoadedKey { written: Some(prost_types::Timestamp::default()), ..LoadedKey::default() };
        loaded.record.last_fence = u64::MAX - 1;
        let session = crate::token::SessionId::from_bytes([0; 16]);
        let alive = SessionState { expires_at: u64::MAX, owner: "o".into(), document: None };
        let session_states = HashMap::from([(session, alive)]);
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
        let mut update = KeyUpdate::new(&key, &names, &loaded, &session_states, 1);
        let outcome = update.acquire(&request(1)).unwrap();
        assert!(matches!(outcome, AcquireOutcome::Granted(granted) if granted.fence.get() == u64::MAX), "{outcome:?}");
        assert!(!update.is_fence_exhausted());
        update.acquire(&request(2));
        assert!(update.is_fence_exhausted() && update.record.front.is_empty());
        // This waiter joined before the fences were used up.
        update.record.front.push(StoredEntry { token: vec![3; 16], session: vec![0; 16], ..entry(0) });
        assert_eq!(update.release(TokenId::from_bytes([1; 16]), None), EndOutcome::Released);
        update.reconcile();
        assert!(update.record.holds.is_empty() && update.record.front.len() == 1);
        let update = KeyUpdate::new(&key, &names, &loaded, &session_states, 1);
        assert!(!update.is_fence_exhausted());
    }

    #[test]
    fn fullest_key_fits_in_one_document() {
        let mut numbers = 0..;
        let mut next = || entry(numbers.next().unwrap());
        let names = Names::new("projects/p/databases/d", "stanchion");
        let key = Key::new(&"n".repeat(128), &"k".repeat(512)).unwrap();
        let mut full = LoadedKey { written: Some(prost_types::Timestamp::default()), ..LoadedKey::default() };
        let bytes = |holds: &[StoredHold]| holds.iter().map(prost::Message::encoded_len).sum::<usize>();
        while bytes(&full.record.holds) <= super::super::grant::MAX_HOLDS_BYTES {
            let hold = StoredHold { entry: next(), fence: u64::MAX, deadline: Some(u64::MAX), ..StoredHold::default() };
            full.record.holds.push(hold);
        }
        let page = |number| {
            let name = PageRef { number, revision: 1 };
            QueuePage { name, page: Arc::new(StoredPage { waiters: (0..23).map(|_| next()).collect(), revision: 1 }) }
        };
        full.pages = (0..u64::from(MAX_WAITERS) / 23).map(page).collect();
        full.record.front = full.pages[0].page.waiters.clone();
        full.record.pages = full.pages.iter().map(|queue_page| queue_page.name).collect();
        let session_states = HashMap::new();
        let mut update = KeyUpdate::new(&key, &names, &full, &session_states, 1);
        let first = TokenId::from_bytes([0; 16]);
        assert_eq!(update.release(first, None), EndOutcome::Released);
        update.reconcile();
        let (writes, _) = update.writes().unwrap();
        let document = writes[0].encoded_len();
        assert!(document <= MAX_DOCUMENT_BYTES, "{document}");
    }
}
