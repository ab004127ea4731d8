//! What is to be written.

use std::collections::BTreeSet;
use std::sync::Arc;

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use prost::Message as _;

use super::super::document::{Only, bytes, delete, fields, put, text, texts, timestamp};
use super::super::error::malformed;
use super::super::record::{Entry, KeyRecord, session_of};
use super::{KEPT_AFTER, Leaf, Loaded, Step, Writes};
use crate::error::Result;
use crate::key::Key;

impl Step<'_> {
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
pub(super) fn sessions<'a>(record: &KeyRecord, waiters: impl Iterator<Item = &'a Entry>) -> BTreeSet<String> {
    let held = record.holds.iter().filter(|hold| hold.entry.session_bound).map(|hold| &hold.entry.session);
    let waiting = waiters.map(|waiter| &waiter.session);
    // Each of them once, before anything is done with them: a queue is long, and few processes are in it.
    let all: BTreeSet<_> = held.chain(waiting).chain(record.forced.iter().map(|forced| &forced.session)).collect();
    all.into_iter().filter_map(|session| session_of(session).ok()).map(|session| session.to_hex()).collect()
}

/// When nothing of a record can matter any more, if time alone decides that. What depends on a session has no such time.
fn expiry(record: &KeyRecord, nobody_waits: bool) -> Option<u64> {
    let depends =
        !nobody_waits || !record.forced.is_empty() || record.holds.iter().any(|hold| hold.entry.session_bound);
    let ends = record.holds.iter().filter_map(|hold| hold.deadline);
    (!depends).then(|| ends.chain([record.closed_until, record.last_fence]).max().unwrap_or_default())
}
