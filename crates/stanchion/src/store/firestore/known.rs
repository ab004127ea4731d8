//! What a handle knows without asking. None of it decides anything: it chooses what is tried first.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prost_types::Timestamp;

use super::Inner;
use super::connect::lock;
use super::error::malformed;
use super::record::{Hold, KeyRecord, session_of, token_of};
use super::step::{Leaf, Life, Loaded, Operation, Writes};
use crate::error::Result;
use crate::key::Key;
use crate::token::{SessionId, TokenId};

/// The most pages of queues that are remembered.
const MOST_PAGES: usize = 200;

/// Something that may be so of a key.
#[derive(Debug)]
pub(super) struct Guess(Vec<AtomicU64>);

impl Guess {
    pub(super) fn new() -> Self {
        Self((0..1_024).map(|_| AtomicU64::new(0)).collect())
    }

    fn place(&self, key: &Key) -> (&AtomicU64, u64) {
        use std::hash::{Hash as _, Hasher as _};
        let mut hasher = std::hash::DefaultHasher::new();
        key.hash(&mut hasher);
        let hash = hasher.finish() | 1;
        (&self.0[(hash >> 32) as usize % self.0.len()], hash)
    }

    pub(super) fn is(&self, key: &Key) -> bool {
        let (place, hash) = self.place(key);
        place.load(Ordering::Relaxed) == hash
    }

    pub(super) fn set(&self, key: &Key, is: bool) {
        let (place, hash) = self.place(key);
        if is {
            place.store(hash, Ordering::Relaxed);
        } else if place.load(Ordering::Relaxed) == hash {
            place.store(0, Ordering::Relaxed);
        }
    }
}

/// What an acquire of this handle entered, from before it is sent until it is ended.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) session: SessionId,
    pub(super) document: KnownDocument,
}

/// The document of a key that one hold of this handle has.
#[derive(Clone, Debug)]
pub(super) enum KnownDocument {
    /// Nothing that helps: it waits, or holds together with others.
    Unknown,
    /// There is nothing else in it: deleting it ends the hold.
    Alone(Alone),
    /// Others wait: the next is granted as soon as this one ends.
    WaitedFor(Box<WaitedFor>),
}

#[derive(Clone, Debug)]
pub(super) struct Alone {
    pub(super) written: Timestamp,
    pub(super) session_bound: bool,
    pub(super) deadline: Option<u64>,
    pub(super) called: bool,
}

#[derive(Clone, Debug)]
pub(super) struct WaitedFor {
    pub(super) loaded: Loaded,
    /// A time that the service has told since.
    pub(super) now: u64,
    /// The session at the head of the queue lives until then at least.
    head_lives: u64,
}

impl KnownDocument {
    pub(super) fn of(loaded: &Loaded, now: u64) -> Self {
        let Some(written) = loaded.written else { return Self::Unknown };
        if let Some(hold) = loaded.only_hold(now) {
            let Hold { deadline, called, .. } = *hold;
            Self::Alone(Alone { written, session_bound: hold.entry.session_bound, deadline, called })
        } else if loaded.is_waited_for() {
            let head_lives = loaded.record.front.first().map_or(0, |head| head.session_lives);
            Self::WaitedFor(Box::new(WaitedFor { loaded: loaded.clone(), now, head_lives }))
        } else {
            Self::Unknown
        }
    }

    pub(super) fn written(&self) -> Option<Timestamp> {
        match self {
            Self::Unknown => None,
            Self::Alone(alone) => Some(alone.written),
            Self::WaitedFor(waited_for) => waited_for.loaded.written,
        }
    }

    fn is_newer_than(&self, other: &Self) -> bool {
        let order = |written: Option<Timestamp>| written.map(|at| (at.seconds, at.nanos));
        order(self.written()) > order(other.written())
    }
}

impl Inner {
    pub(super) fn tell(&self, time: u64) {
        let mut told = lock(&self.told);
        if time > told.0 {
            *told = (time, self.clock.now());
        }
    }

    /// About what the service's clock shows. For what is kept longer than needed, or tried first, never for a decision.
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

    /// A token is about to be entered.
    pub(super) fn expect(&self, key: &Key, token: TokenId, session: SessionId) {
        let known = Known { session, document: KnownDocument::Unknown };
        lock(&self.known).entry((key.clone(), token)).or_insert(known);
    }

    pub(super) fn forget(&self, key: &Key, token: TokenId) -> Option<Known> {
        lock(&self.known).remove(&(key.clone(), token))
    }

    /// What a step saw of a key. Only what is neither ended nor strange is kept.
    pub(super) fn remember(&self, key: &Key, loaded: &Loaded, now: u64) {
        for hold in &loaded.record.holds {
            let Ok(token) = token_of(&hold.entry.token) else { continue };
            if let Some(known) = lock(&self.known).get_mut(&(key.clone(), token)) {
                known.document = KnownDocument::of(loaded, now);
            }
        }
    }

    /// What a hold was told by who wrote its key's document, in the same commit.
    pub(super) fn remember_told(&self, key: &Key, token: TokenId, told: Option<(KeyRecord, Timestamp, u64)>) {
        let mut known = lock(&self.known);
        let Some(known) = known.get_mut(&(key.clone(), token)) else { return };
        let Some((record, written, now)) = told else {
            known.document = KnownDocument::Unknown;
            return;
        };
        let is_its = matches!(&record.holds[..], [hold] if hold.entry.token == token.as_bytes());
        let document = KnownDocument::of(&Loaded { written: Some(written), record, pages: Vec::new() }, now);
        if is_its && document.is_newer_than(&known.document) {
            known.document = document;
        }
    }

    /// What ends a hold and grants its key to the head of the queue, if the document is still what it was. None: it has to be
    /// read.
    pub(super) fn hand_over(
        &self,
        key: &Key,
        token: TokenId,
        waited_for: &WaitedFor,
    ) -> Result<Option<(Writes, Loaded)>> {
        let WaitedFor { loaded, now, .. } = waited_for;
        let head = loaded.record.front.first().ok_or_else(malformed)?;
        let session = session_of(&head.session)?;
        let mut lives = self.sessions.known();
        let ends = match lives.get(&session) {
            // Dead for certain.
            Some(life) if life.ends == 0 => return Ok(None),
            Some(life) => life.ends.max(waited_for.head_lives),
            None => waited_for.head_lives,
        };
        // A grant to the dead is undone by whoever finds it, and costs those who wait the time until then.
        if ends <= self.estimate() {
            return Ok(None);
        }
        lives.insert(session, Life { ends, owner: "".into(), document: None });
        let mut step = Operation::new(key, &self.names, loaded, &lives, *now);
        step.grant_from_the_commit_on();
        step.end(token, None);
        step.settle();
        if !step.unknown().is_empty() || !step.is_held_by_one_session() {
            return Ok(None);
        }
        step.writes().map(Some)
    }

    /// With a beat: whether those live who are granted what this handle holds when it lets go. Nobody waits for it.
    pub(super) fn look_ahead(self: &Arc<Self>, session: SessionId) {
        let within = self.sessions.ttl(session) / 4;
        if let Ok(runtime) = self.service.runtime() {
            let inner = self.clone();
            runtime.spawn(async move { drop(inner.look_at_heads(within).await) });
        }
    }

    /// Whether those at the heads of queues live, where what is known of that runs out.
    async fn look_at_heads(&self, within: u64) -> Result<()> {
        let soon = self.estimate().saturating_add(within);
        let mut heads = Vec::new();
        for (whose, known) in lock(&self.known).iter() {
            if let KnownDocument::WaitedFor(waited_for) = &known.document
                && waited_for.head_lives <= soon
                && let Some(head) = waited_for.loaded.record.front.first()
            {
                heads.push((whose.clone(), session_of(&head.session)?));
            }
        }
        if heads.is_empty() {
            return Ok(());
        }
        let mut sessions: Vec<_> = heads.iter().map(|(_, session)| *session).collect();
        sessions.sort_unstable();
        sessions.dedup();
        let (lives, now) = self.sessions.read(&self.service, &self.names, &sessions).await?;
        self.tell(now);
        let lives: std::collections::HashMap<_, _> = lives.into_iter().collect();
        for (whose, session) in heads {
            if let Some(known) = lock(&self.known).get_mut(&whose)
                && let KnownDocument::WaitedFor(waited_for) = &mut known.document
                && waited_for.loaded.record.front.first().is_some_and(|head| head.session == session.as_bytes())
            {
                match lives.get(&session).map_or(0, |life| life.ends) {
                    // Somebody has to settle this key first.
                    0 => known.document = KnownDocument::Unknown,
                    ends => (waited_for.head_lives, waited_for.now) = (ends, now.max(waited_for.now)),
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
    async fn what_a_session_had_is_forgotten_also_where_it_cannot_be_closed() {
        // Nobody listens there.
        let store = Firestore::from_url("firestore://p?emulator=127.0.0.1:1").unwrap();
        let session = SessionId::random().unwrap();
        store.inner.expect(&Key::new("", "k").unwrap(), TokenId::random().unwrap(), session);
        store.close_session(session).await.unwrap_err();
        assert!(lock(&store.inner.known).is_empty());
    }
}
