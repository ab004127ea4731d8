//! Caches this handle's newest view of keys, tokens and queue pages.
//!
//! The cache makes no decisions. It only chooses which request to try first; the commit's precondition detects stale
//! entries.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prost::Message as _;
use prost_types::Timestamp;

use super::Inner;
use super::error::malformed;
use super::record::{KeyRecord, StoredHold, session_of, token_of};
use super::update::{KeyUpdate, LoadedKey, QueuePage, SessionState, Writes};
use crate::error::Result;
use crate::key::Key;
use crate::sync::lock;
use crate::token::{SessionId, TokenId};

/// Maximum number of cached queue pages.
const MAX_CACHED_PAGES: usize = 200;

/// Maximum size in bytes of the record that is cached for a hold without waiters. A process can have many such holds.
const MAX_CACHED_RECORD_BYTES: usize = 1_024;

/// Remembers a yes/no hint per key in a fixed number of slots. A colliding key overwrites the hint.
#[derive(Debug)]
pub(super) struct KeyHint(Vec<AtomicU64>);

impl KeyHint {
    pub(super) fn new() -> Self {
        Self((0..1_024).map(|_| AtomicU64::new(0)).collect())
    }

    fn slot(&self, key: &Key) -> (&AtomicU64, u64) {
        use std::hash::{Hash as _, Hasher as _};
        let mut hasher = std::hash::DefaultHasher::new();
        key.hash(&mut hasher);
        let hash = hasher.finish() | 1;
        (&self.0[(hash >> 32) as usize % self.0.len()], hash)
    }

    pub(super) fn is_set(&self, key: &Key) -> bool {
        let (slot, hash) = self.slot(key);
        slot.load(Ordering::Relaxed) == hash
    }

    pub(super) fn set(&self, key: &Key, is_set: bool) {
        let (slot, hash) = self.slot(key);
        if is_set {
            slot.store(hash, Ordering::Relaxed);
        } else if slot.load(Ordering::Relaxed) == hash {
            slot.store(0, Ordering::Relaxed);
        }
    }
}

/// A token of this handle, from before its acquire is sent until its release.
#[derive(Clone, Debug)]
pub(super) struct CachedToken {
    pub(super) session: SessionId,
    pub(super) document: CachedDocument,
}

/// Newest known document of a key on which this handle has a hold.
#[derive(Clone, Debug)]
pub(super) enum CachedDocument {
    /// The token waits, or shares the key with other holds. The cache is of no use.
    Unknown,
    /// The document contains only this hold, so deleting the document releases it.
    SoleHold(SoleHold),
    /// The document contains this hold and waiters, so the release grants the key to the first waiter.
    HoldWithQueue(Box<HoldWithQueue>),
}

#[derive(Clone, Debug)]
pub(super) struct SoleHold {
    pub(super) written: Timestamp,
    pub(super) session_bound: bool,
    pub(super) deadline: Option<u64>,
    pub(super) has_notification: bool,
    /// The encoded record of the key, unless it is large. Only [`Store::linger`](crate::Store::linger) needs it.
    record: Option<Box<[u8]>>,
}

impl SoleHold {
    /// Returns the key as it was when the document was written.
    pub(super) fn loaded(&self) -> Option<LoadedKey> {
        let record = KeyRecord::decode(self.record.as_deref()?).ok()?;
        Some(LoadedKey { written: Some(self.written), record, pages: Vec::new() })
    }
}

#[derive(Clone, Debug)]
pub(super) struct HoldWithQueue {
    pub(super) loaded: LoadedKey,
    /// A time that the service returned after this document was written, in µs.
    pub(super) now: u64,
    /// Time until which the session at the head of the queue is known to live, in µs.
    head_alive_until: u64,
}

impl CachedDocument {
    pub(super) fn of(loaded: &LoadedKey, now: u64) -> Self {
        let Some(written) = loaded.written else { return Self::Unknown };
        if let Some(hold) = loaded.only_hold(now) {
            let StoredHold { deadline, has_notification, .. } = *hold;
            let is_small = loaded.record.encoded_len() <= MAX_CACHED_RECORD_BYTES;
            let record = is_small.then(|| loaded.record.encode_to_vec().into_boxed_slice());
            let session_bound = hold.entry.session_bound;
            Self::SoleHold(SoleHold { written, session_bound, deadline, has_notification, record })
        } else if loaded.is_sole_hold_with_queue() {
            let head_alive_until = loaded.record.front.first().map_or(0, |head| head.session_alive_until);
            Self::HoldWithQueue(Box::new(HoldWithQueue { loaded: loaded.clone(), now, head_alive_until }))
        } else {
            Self::Unknown
        }
    }

    pub(super) fn written(&self) -> Option<Timestamp> {
        match self {
            Self::Unknown => None,
            Self::SoleHold(sole) => Some(sole.written),
            Self::HoldWithQueue(with_queue) => with_queue.loaded.written,
        }
    }

    fn is_newer_than(&self, other: &Self) -> bool {
        let order = |written: Option<Timestamp>| written.map(|at| (at.seconds, at.nanos));
        order(self.written()) > order(other.written())
    }
}

impl Inner {
    pub(super) fn observe_time(&self, time: u64) {
        let mut latest = lock(&self.latest_time);
        if time > latest.0 {
            *latest = (time, self.clock.now());
        }
    }

    /// Estimates the service's current time in µs. Use it for retention times and to choose what to try first, never
    /// for a decision.
    pub(super) fn estimate_time(&self) -> u64 {
        let (time, at) = *lock(&self.latest_time);
        time.saturating_add(u64::try_from(self.clock.now().since(at).as_micros()).unwrap_or_default())
    }

    pub(super) fn cache_pages(&self, key: &str, pages: &[QueuePage]) {
        if pages.is_empty() {
            return;
        }
        let mut cached_pages = lock(&self.pages);
        if cached_pages.len() + pages.len() > MAX_CACHED_PAGES {
            cached_pages.clear();
        }
        for queue_page in pages {
            cached_pages.insert(self.names.page(key, queue_page.name.number), queue_page.clone());
        }
    }

    /// Starts caching for a token that is about to be entered.
    pub(super) fn track(&self, key: &Key, token: TokenId, session: SessionId) {
        let cached = CachedToken { session, document: CachedDocument::Unknown };
        lock(&self.tokens).entry((key.clone(), token)).or_insert(cached);
    }

    pub(super) fn untrack(&self, key: &Key, token: TokenId) -> Option<CachedToken> {
        lock(&self.tokens).remove(&(key.clone(), token))
    }

    /// Caches a key's document for the tokens of this handle that hold it.
    pub(super) fn cache_key(&self, key: &Key, loaded: &LoadedKey, now: u64) {
        for hold in &loaded.record.holds {
            let Ok(token) = token_of(&hold.entry.token) else { continue };
            if let Some(cached) = lock(&self.tokens).get_mut(&(key.clone(), token)) {
                cached.document = CachedDocument::of(loaded, now);
            }
        }
    }

    /// Caches the record that another client pushed to a holder in the commit that wrote the key's document.
    pub(super) fn cache_pushed_record(&self, key: &Key, token: TokenId, pushed: Option<(KeyRecord, Timestamp, u64)>) {
        let mut cached = lock(&self.tokens);
        let Some(cached) = cached.get_mut(&(key.clone(), token)) else { return };
        let Some((record, written, now)) = pushed else {
            cached.document = CachedDocument::Unknown;
            return;
        };
        let is_held_by_token = matches!(&record.holds[..], [hold] if hold.entry.token == token.as_bytes());
        let document = CachedDocument::of(&LoadedKey { written: Some(written), record, pages: Vec::new() }, now);
        if is_held_by_token && document.is_newer_than(&cached.document) {
            cached.document = document;
        }
    }

    /// Returns the writes that release a hold and grant its key to the head of the queue, provided that the document is
    /// unchanged. Returns `None` if the document must be read first.
    pub(super) fn hand_off(
        &self,
        key: &Key,
        token: TokenId,
        with_queue: &HoldWithQueue,
    ) -> Result<Option<(Writes, LoadedKey)>> {
        let HoldWithQueue { loaded, now, .. } = with_queue;
        let head = loaded.record.front.first().ok_or_else(malformed)?;
        let session = session_of(&head.session)?;
        let mut session_states = self.sessions.snapshot();
        let expires_at = match session_states.get(&session) {
            // The session has expired for good.
            Some(state) if state.expires_at == 0 => return Ok(None),
            Some(state) => state.expires_at.max(with_queue.head_alive_until),
            None => with_queue.head_alive_until,
        };
        // A grant to an expired session would be undone by the next reader, but until then the other waiters would lose
        // time.
        if expires_at <= self.estimate_time() {
            return Ok(None);
        }
        session_states.insert(session, SessionState { expires_at, owner: "".into(), document: None });
        let mut update = KeyUpdate::new(key, &self.names, loaded, &session_states, *now);
        update.grant_at_commit();
        update.release(token, None);
        update.reconcile();
        if !update.unread_sessions().is_empty() || !update.is_held_by_one_session() {
            return Ok(None);
        }
        update.writes().map(Some)
    }

    /// Checks, at a renewal, that the next waiters for this handle's holds are alive. The check runs in the background.
    pub(super) fn refresh_queue_heads(self: &Arc<Self>, session: SessionId) {
        let within = self.sessions.ttl(session) / 4;
        if let Ok(runtime) = self.service.runtime() {
            let inner = self.clone();
            runtime.spawn(async move { drop(inner.read_queue_heads(within).await) });
        }
    }

    /// Reads the sessions at the heads of queues whose known lifetime ends within `within` µs.
    async fn read_queue_heads(&self, within: u64) -> Result<()> {
        let soon = self.estimate_time().saturating_add(within);
        let mut heads = Vec::new();
        for (entry, cached) in lock(&self.tokens).iter() {
            if let CachedDocument::HoldWithQueue(with_queue) = &cached.document
                && with_queue.head_alive_until <= soon
                && let Some(head) = with_queue.loaded.record.front.first()
            {
                heads.push((entry.clone(), session_of(&head.session)?));
            }
        }
        if heads.is_empty() {
            return Ok(());
        }
        let mut sessions: Vec<_> = heads.iter().map(|(_, session)| *session).collect();
        sessions.sort_unstable();
        sessions.dedup();
        let (session_states, now) = self.sessions.read(&self.service, &self.names, &sessions).await?;
        self.observe_time(now);
        let session_states: std::collections::HashMap<_, _> = session_states.into_iter().collect();
        for (entry, session) in heads {
            if let Some(cached) = lock(&self.tokens).get_mut(&entry)
                && let CachedDocument::HoldWithQueue(with_queue) = &mut cached.document
                && with_queue.loaded.record.front.first().is_some_and(|head| head.session == session.as_bytes())
            {
                match session_states.get(&session).map_or(0, |state| state.expires_at) {
                    // This key must be reconciled first.
                    0 => cached.document = CachedDocument::Unknown,
                    expires_at => (with_queue.head_alive_until, with_queue.now) = (expires_at, now.max(with_queue.now)),
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "test code")]

    use super::*;
    use crate::store::{Firestore, Store as _};

    #[tokio::test]
    async fn failed_close_forgets_tokens() {
        // No server listens on this port.
        let store = Firestore::from_url("firestore://p?emulator=127.0.0.1:1").unwrap();
        let session = SessionId::random().unwrap();
        store.inner.track(&Key::new("", "k").unwrap(), TokenId::random().unwrap(), session);
        store.close_session(session).await.unwrap_err();
        assert!(lock(&store.inner.tokens).is_empty());
    }
}
