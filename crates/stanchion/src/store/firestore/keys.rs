//! Steps on keys: what is read, decided and committed, until nobody else came between.

use std::sync::Arc;
use std::time::Duration;

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;

use super::connect::{Committed, Interest, Lane, Refused, lock, pause};
use super::document::{Only, delete, key_id};
use super::error::{error, malformed};
use super::known::{Alone, Known, KnownDocument};
use super::record::{KeyRecord, Page, PageName};
use super::step::{Leaf, Loaded, Operation, Writes, fresh};
use super::{Inner, reply};
use crate::clock::jitter;
use crate::error::{Error, ErrorKind, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::store::{AcquireOutcome, AcquireRequest, EndOutcome, Granted, PollOutcome, Reply, StoreTime};
use crate::token::TokenId;

/// A step that finds the key changed by others tries so often, with longer and longer pauses.
const ROUNDS: u32 = 14;

/// One of several attempts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Round(u32);

pub(super) fn rounds() -> impl Iterator<Item = Round> {
    (0..ROUNDS).map(Round)
}

impl Round {
    pub(super) async fn pause(self) {
        if self.0 > 0 {
            pause(jitter(Duration::from_millis(2 << self.0.min(7)))).await;
        }
    }
}

/// Nothing was done, and it may be tried again.
pub(super) fn busy() -> Error {
    error(ErrorKind::Unavailable, "too many change this document at once").in_doubt(false)
}

/// The turn of a step. The last one takes its mutex with it.
pub(super) struct Turn<'a> {
    inner: &'a Inner,
    id: String,
    guard: Option<tokio::sync::OwnedMutexGuard<()>>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        drop(self.guard.take());
        let mut turns = lock(&self.inner.turns);
        if turns.get(&self.id).is_some_and(|mutex| Arc::strong_count(mutex) == 1) {
            turns.remove(&self.id);
        }
    }
}

impl Inner {
    /// Waits for the turn of a step on this key.
    pub(super) async fn turn(&self, key: &Key) -> Turn<'_> {
        let id = key_id(key);
        let mutex = lock(&self.turns).entry(id.clone()).or_default().clone();
        let guard = mutex.lock_owned().await;
        Turn { inner: self, id, guard: Some(guard) }
    }

    /// Reads all of a key, as it was at this time.
    pub(super) async fn load(&self, key: &Key) -> Result<(Loaded, u64)> {
        // A queue that changes between the two requests is read again.
        for round in rounds() {
            round.pause().await;
            let (documents, now) = self.service.read(Lane::Steps, &[self.names.key(key)]).await?;
            let loaded = match documents.first().and_then(Option::as_ref) {
                Some(document) => self.load_rest(document).await?,
                None => Some((Loaded::default(), 0)),
            };
            if let Some((loaded, later)) = loaded {
                self.taken.set(key, loaded.written.is_some());
                self.tell(now.max(later));
                return Ok((loaded, now));
            }
        }
        Err(busy())
    }

    /// What belongs to a key's document: its pages. None if they are not what the document says any more.
    pub(super) async fn load_rest(&self, document: &api::Document) -> Result<Option<(Loaded, u64)>> {
        let (mut record, written) = KeyRecord::read(document)?;
        let named = std::mem::take(&mut record.pages);
        let names: Vec<_> = named.iter().map(|name| self.names.page(&document.name, name.number)).collect();
        let mut leaves: Vec<Option<Leaf>> = {
            let remembered = lock(&self.pages);
            let at_hand =
                |(name, place): (&PageName, &String)| remembered.get(place).filter(|leaf| leaf.name == *name).cloned();
            named.iter().zip(&names).map(at_hand).collect()
        };
        let missing: Vec<_> = (0..leaves.len()).filter(|at| leaves[*at].is_none()).collect();
        let mut time = 0;
        if !missing.is_empty() {
            let wanted: Vec<_> = missing.iter().map(|at| names[*at].clone()).collect();
            let (documents, now) = self.service.read(Lane::Steps, &wanted).await?;
            time = now;
            for (at, page) in missing.into_iter().zip(documents) {
                let Some(page) = page else { return Ok(None) };
                let page = Page::read(&page)?;
                if page.revision != named[at].revision {
                    return Ok(None);
                }
                leaves[at] = Some(Leaf { name: named[at], page: Arc::new(page) });
            }
        }
        let pages: Vec<Leaf> = leaves.into_iter().flatten().collect();
        self.remember_pages(&document.name, &pages);
        record.pages = named;
        Ok(Some((Loaded { written: Some(written), record, pages }, time)))
    }

    /// One step on a key: read, settled, decided, settled, committed. Until nobody else came between.
    pub(super) async fn step<T>(
        &self,
        key: &Key,
        wanted: &Interest,
        mut decide: impl FnMut(&mut Operation<'_>) -> T + Send,
    ) -> Result<Reply<T>> {
        for round in rounds() {
            round.pause().await;
            wanted.check()?;
            let (loaded, read) = self.load(key).await?;
            let mut now = read;
            let mut lives = self.sessions.known();
            let (writes, after, outcome) = loop {
                let mut step = Operation::new(key, &self.names, &loaded, &lives, now);
                step.settle();
                let outcome = decide(&mut step);
                step.settle();
                let unknown = step.unknown();
                if unknown.is_empty() {
                    if step.is_used_up() {
                        return Err(Fence::used_up());
                    }
                    let (writes, after) = step.writes()?;
                    break (writes, after, outcome);
                }
                let (found, later) = self.sessions.read(&self.service, &self.names, &unknown).await?;
                lives.extend(found);
                now = now.max(later);
            };
            if writes.is_empty() {
                self.remember(key, &loaded, now);
                self.tell(now);
                // Since the key was read, before its sessions were, somebody may have come.
                return Ok(reply(read, outcome));
            }
            wanted.check()?;
            if let Some(time) = self.commit(key, writes, after).await? {
                return Ok(reply(time, outcome));
            }
        }
        Err(busy())
    }

    /// Commits what a step has decided. None: somebody else came before it, and nothing was done.
    async fn commit(&self, key: &Key, writes: Writes, mut after: Loaded) -> Result<Option<u64>> {
        let Committed { time, written } = match self.service.commit(Lane::Steps, writes).await {
            Ok(done) => done,
            Err(Refused::Changed | Refused::Contended) => return Ok(None),
            Err(Refused::Fault(fault)) => return Err(fault),
        };
        self.tell(time);
        after.written = written.first().copied().flatten();
        self.taken.set(key, after.written.is_some());
        after.record.settle_commit(time);
        for leaf in &mut after.pages {
            Arc::make_mut(&mut leaf.page).settle_commit(time);
        }
        self.remember_pages(&self.names.key(key), &after.pages);
        self.remember(key, &after, time);
        Ok(Some(time))
    }

    /// Creates the document of a key that nobody has: the hold, in one request. None: somebody has it.
    async fn create(&self, request: &AcquireRequest, owner: String) -> Result<Option<Reply<AcquireOutcome>>> {
        let lives = self.sessions.ends(request.session);
        let write = fresh(&self.names, request, owner, lives, self.estimate());
        let (time, written) = match self.service.commit(Lane::Steps, vec![write]).await {
            Ok(Committed { time, written }) => (time, written.first().copied().flatten().ok_or_else(malformed)?),
            Err(Refused::Changed | Refused::Contended) => {
                self.taken.set(&request.key, true);
                return Ok(None);
            }
            Err(Refused::Fault(fault)) => return Err(fault),
        };
        self.tell(time);
        if time > request.not_after.as_micros() {
            // It never was: everybody who reads it sees that. It need not stay, either.
            let name = self.names.key(&request.key);
            drop(self.service.commit(Lane::Steps, vec![delete(name, Only::IfStill(written))]).await);
            return Ok(Some(reply(time, AcquireOutcome::Stale)));
        }
        let length = request.lifetime.length();
        let session_bound = matches!(request.lifetime, crate::store::Lifetime::Session { .. });
        let deadline = length.map(|length| StoreTime::from_micros(time).after(length).as_micros());
        let alone = KnownDocument::Alone(Alone { written, session_bound, deadline, called: false });
        let known = Known { session: request.session, document: alone };
        lock(&self.known).insert((request.key.clone(), request.token), known);
        let granted = Granted { fence: Fence::new(time), remaining: length };
        Ok(Some(reply(time, AcquireOutcome::Granted(granted))))
    }

    pub(super) async fn acquire(&self, request: &AcquireRequest, wanted: &Interest) -> Result<Reply<AcquireOutcome>> {
        let _turn = self.turn(&request.key).await;
        wanted.check()?;
        self.expect(&request.key, request.token, request.session);
        let done = self.enter(request, wanted).await;
        // In doubt it may have been entered, and will be ended.
        let is_out = |done: &Reply<_>| !matches!(done.outcome, AcquireOutcome::Granted(_) | AcquireOutcome::Queued(_));
        if done.as_ref().is_ok_and(is_out) {
            self.forget(&request.key, request.token);
        }
        done
    }

    async fn enter(&self, request: &AcquireRequest, wanted: &Interest) -> Result<Reply<AcquireOutcome>> {
        let mut owner = self.sessions.owner_if_alive(request.session).filter(|_| !self.taken.is(&request.key));
        for round in rounds() {
            round.pause().await;
            wanted.check()?;
            if let Some(owner) = owner.take()
                && let Some(done) = self.create(request, owner).await?
            {
                return Ok(done);
            }
            let mut found = None;
            let decided = self.step(&request.key, wanted, |step| {
                found = Some(step.owner_of(request.session));
                step.acquire(request)
            });
            let Reply { time, outcome } = decided.await?;
            match outcome {
                Some(AcquireOutcome::Granted(_) | AcquireOutcome::Queued(_))
                    if time.as_micros() > request.not_after.as_micros()
                        && !self.was_entered(request, wanted).await? =>
                {
                    return Ok(Reply { time, outcome: AcquireOutcome::Stale });
                }
                Some(AcquireOutcome::Granted(mut granted)) => {
                    granted.remaining =
                        granted.remaining.map(|left| left.min(request.lifetime.length().unwrap_or(left)));
                    return Ok(Reply { time, outcome: AcquireOutcome::Granted(granted) });
                }
                Some(outcome) => return Ok(Reply { time, outcome }),
                None => owner = found,
            }
        }
        Err(busy())
    }

    /// Whether what was written late was there before.
    async fn was_entered(&self, request: &AcquireRequest, wanted: &Interest) -> Result<bool> {
        let poll = self.step(&request.key, wanted, |step| step.poll(&[request.token])).await?;
        Ok(poll.outcome != [PollOutcome::Gone])
    }

    /// Ends what entered a session that was closed while it was on its way: what was settled then did not have it yet.
    pub(super) async fn take_back(&self, key: &Key, token: TokenId) -> Result<StoreTime> {
        let waits = Arc::new(());
        let ended = self.end(key, token, None, &Interest::by(&waits)).await;
        // Entered it is, whatever its end may be.
        ended.map(|ended| ended.time).map_err(|fault| fault.in_doubt(true))
    }

    pub(super) async fn end(
        &self,
        key: &Key,
        token: TokenId,
        cooldown: Option<Duration>,
        wanted: &Interest,
    ) -> Result<Reply<EndOutcome>> {
        let _turn = self.turn(key).await;
        wanted.check()?;
        let known = self.forget(key, token);
        let cooldown = cooldown.filter(|cooldown| !cooldown.is_zero());
        // The beginning of a cooldown is a time that has to be read.
        let Some(Known { session, document }) = known.filter(|_| cooldown.is_none()) else {
            return self.step(key, wanted, |step| step.end(token, cooldown)).await;
        };
        let is_over = |session_bound, deadline: Option<u64>, time| {
            deadline.is_some_and(|deadline| deadline <= time) || (session_bound && self.sessions.ends(session) <= time)
        };
        let ended = |is_over| if is_over { EndOutcome::Nothing } else { EndOutcome::Released };
        let seen = document.written();
        match document {
            _ if self.crowded.is(key) => {}
            KnownDocument::Unknown => {}
            KnownDocument::Alone(alone) => {
                let mut writes = vec![delete(self.names.key(key), Only::IfStill(alone.written))];
                if alone.called {
                    writes.push(delete(self.names.call(session, token), Only::Always));
                }
                if let Some(time) = self.commit(key, writes, Loaded::default()).await? {
                    return Ok(reply(time, ended(is_over(alone.session_bound, alone.deadline, time))));
                }
                self.crowded.set(key, true);
            }
            KnownDocument::WaitedFor(waited_for) => {
                if let Some(hold) = waited_for.loaded.record.holds.first()
                    && let Some((writes, after)) = self.hand_over(key, token, &waited_for)?
                {
                    if let Some(time) = self.commit(key, writes, after).await? {
                        return Ok(reply(time, ended(is_over(hold.entry.session_bound, hold.deadline, time))));
                    }
                    self.crowded.set(key, true);
                }
            }
        }
        let mut was_seen = false;
        let decide = |step: &mut Operation<'_>| {
            was_seen = seen.is_some() && step.is_still(seen);
            step.end(token, None)
        };
        let done = self.step(key, wanted, decide).await?;
        if was_seen {
            self.crowded.set(key, false);
        }
        Ok(done)
    }
}
