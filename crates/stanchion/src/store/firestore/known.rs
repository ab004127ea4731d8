//! What a handle knows without asking. None of it decides anything: it chooses what is tried first.

use std::sync::atomic::{AtomicU64, Ordering};

use prost_types::Timestamp;

use super::Inner;
use super::connect::lock;
use super::record::{session_of, token_of};
use super::step::{Leaf, Loaded};
use crate::key::Key;
use crate::token::{SessionId, TokenId};

/// The most pages of queues that are remembered.
const MOST_PAGES: usize = 200;

/// A hold that has its document for itself.
#[derive(Clone, Debug)]
pub(super) struct Alone {
    pub(super) written: Timestamp,
    pub(super) session: SessionId,
    pub(super) session_bound: bool,
    pub(super) deadline: Option<u64>,
    pub(super) called: bool,
}

impl Inner {
    fn guess(&self, key: &Key) -> (&AtomicU64, u64) {
        use std::hash::{Hash as _, Hasher as _};
        let mut hasher = std::hash::DefaultHasher::new();
        key.hash(&mut hasher);
        let hash = hasher.finish() | 1;
        (&self.taken[(hash >> 32) as usize % self.taken.len()], hash)
    }

    pub(super) fn seems_taken(&self, key: &Key) -> bool {
        let (place, hash) = self.guess(key);
        place.load(Ordering::Relaxed) == hash
    }

    pub(super) fn seems(&self, key: &Key, is_taken: bool) {
        let (place, hash) = self.guess(key);
        if is_taken {
            place.store(hash, Ordering::Relaxed);
        } else if place.load(Ordering::Relaxed) == hash {
            place.store(0, Ordering::Relaxed);
        }
    }

    pub(super) fn tell(&self, time: u64) {
        let mut told = lock(&self.told);
        if time > told.0 {
            *told = (time, self.clock.now());
        }
    }

    /// About what the service's clock shows. For what is kept longer than needed, never for a decision.
    pub(super) fn estimate(&self) -> u64 {
        let (time, at) = *lock(&self.told);
        time.saturating_add(u64::try_from(self.clock.now().since(at).as_micros()).unwrap_or_default())
    }

    pub(super) fn remember_pages(&self, key: &str, pages: &[Leaf]) {
        if pages.is_empty() {
            return;
        }
        let mut remembered = lock(&self.pages);
        if remembered.len() + pages.len() > MOST_PAGES {
            remembered.clear();
        }
        for leaf in pages {
            remembered.insert(self.names.page(key, leaf.name.number), leaf.clone());
        }
    }

    /// A hold of this handle that has its document for itself is ended by one request.
    pub(super) fn remember(&self, key: &Key, loaded: &Loaded, now: u64) {
        let Some(written) = loaded.written else { return };
        let Some(hold) = loaded.only_hold(now) else {
            for token in loaded.record.holds.iter().filter_map(|hold| token_of(&hold.entry.token).ok()) {
                self.is_not_alone(key, token);
            }
            return;
        };
        let (Ok(token), Ok(session)) = (token_of(&hold.entry.token), session_of(&hold.entry.session)) else { return };
        if self.sessions.ends(session) != 0 {
            let (session_bound, deadline, called) = (hold.entry.session_bound, hold.deadline, hold.called);
            lock(&self.alone).insert((key.clone(), token), Alone { written, session, session_bound, deadline, called });
        }
    }

    /// The document of this hold says more than that by now.
    pub(super) fn is_not_alone(&self, key: &Key, token: TokenId) {
        lock(&self.alone).remove(&(key.clone(), token));
    }
}
