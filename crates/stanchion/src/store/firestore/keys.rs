//! Runs operations on a key: read, apply the rules, commit, and retry if another client committed in between.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;

use super::cache::{CachedDocument, CachedToken};
use super::connect::{CallerWatch, CommitError, Committed, Lane};
use super::document::{WriteIf, delete, key_id};
use super::error::{error, malformed};
use super::record::{KeyRecord, PageRef, StoredPage};
use super::update::{KeyUpdate, LoadedKey, QueuePage, Writes, create_document};
use super::{Inner, reply};
use crate::clock::jitter;
use crate::error::{Error, ErrorKind, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::store::backoff::sleep;
use crate::store::{
    AcquireOutcome, AcquireRequest, EndOutcome, Granted, LingerOutcome, PollOutcome, Queued, Reply, StoreTime,
};
use crate::sync::lock;
use crate::token::TokenId;

/// Maximum number of attempts of an operation whose key keeps changing. The delay between them grows.
const MAX_ATTEMPTS: u32 = 14;

/// Number of an attempt, starting at 0.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attempt(u32);

pub(super) fn attempts() -> impl Iterator<Item = Attempt> {
    (0..MAX_ATTEMPTS).map(Attempt)
}

impl Attempt {
    pub(super) async fn pause(self) {
        if self.0 > 0 {
            sleep(jitter(Duration::from_millis(2 << self.0.min(7)))).await;
        }
    }
}

/// Reports that concurrent writers prevented an operation. Nothing was changed, and the caller may retry.
pub(super) fn contended() -> Error {
    error(ErrorKind::Unavailable, "too many clients write this document at once").in_doubt(false)
}

/// Gives one operation of this handle exclusive use of a key. The last guard removes the key's mutex.
pub(super) struct KeyGuard<'a> {
    inner: &'a Inner,
    id: String,
    guard: Option<tokio::sync::OwnedMutexGuard<()>>,
}

impl Drop for KeyGuard<'_> {
    fn drop(&mut self) {
        drop(self.guard.take());
        let mut key_mutexes = lock(&self.inner.key_mutexes);
        if key_mutexes.get(&self.id).is_some_and(|mutex| Arc::strong_count(mutex) == 1) {
            key_mutexes.remove(&self.id);
        }
    }
}

/// Completes an answer with the time of its commit, which raised the last fence.
fn raised(outcome: LingerOutcome, committed: u64) -> LingerOutcome {
    match outcome {
        LingerOutcome::Lingers { fence, up_to } => {
            LingerOutcome::Lingers { fence, up_to: up_to.max(Fence::new(committed)) }
        }
        other => other,
    }
}

impl Inner {
    /// Waits until no other operation of this handle uses the key.
    pub(super) async fn lock_key(&self, key: &Key) -> KeyGuard<'_> {
        let id = key_id(key);
        let mutex = lock(&self.key_mutexes).entry(id.clone()).or_default().clone();
        let guard = mutex.lock_owned().await;
        KeyGuard { inner: self, id, guard: Some(guard) }
    }

    /// Reads a key's document and queue pages. The returned time, in µs, is not later than any of these reads.
    pub(super) async fn load(&self, key: &Key) -> Result<(LoadedKey, u64)> {
        // Read again if the queue changes between the two requests.
        for attempt in attempts() {
            attempt.pause().await;
            let (documents, now) = self.service.read(Lane::Keys, &[self.names.key(key)]).await?;
            let loaded = match documents.first().and_then(Option::as_ref) {
                Some(document) => self.load_pages(document).await?,
                None => Some((LoadedKey::default(), 0)),
            };
            if let Some((loaded, later)) = loaded {
                self.has_document.set(key, loaded.written.is_some());
                self.observe_time(now.max(later));
                return Ok((loaded, now));
            }
        }
        Err(contended())
    }

    /// Reads the queue pages of a key's document. Returns `None` if a page no longer matches the document.
    pub(super) async fn load_pages(&self, document: &api::Document) -> Result<Option<(LoadedKey, u64)>> {
        let (mut record, written) = KeyRecord::read(document)?;
        let named = std::mem::take(&mut record.pages);
        let names: Vec<_> = named.iter().map(|name| self.names.page(&document.name, name.number)).collect();
        let mut queue_pages: Vec<Option<QueuePage>> = {
            let cached_pages = lock(&self.pages);
            let from_cache = |(name, id): (&PageRef, &String)| {
                cached_pages.get(id).filter(|queue_page| queue_page.name == *name).cloned()
            };
            named.iter().zip(&names).map(from_cache).collect()
        };
        let missing: Vec<_> = (0..queue_pages.len()).filter(|at| queue_pages[*at].is_none()).collect();
        let mut time = 0;
        if !missing.is_empty() {
            let missing_names: Vec<_> = missing.iter().map(|at| names[*at].clone()).collect();
            let (documents, now) = self.service.read(Lane::Keys, &missing_names).await?;
            time = now;
            for (at, page) in missing.into_iter().zip(documents) {
                let Some(page) = page else { return Ok(None) };
                let page = StoredPage::read(&page)?;
                if page.revision != named[at].revision {
                    return Ok(None);
                }
                queue_pages[at] = Some(QueuePage { name: named[at], page: Arc::new(page) });
            }
        }
        let pages: Vec<QueuePage> = queue_pages.into_iter().flatten().collect();
        self.cache_pages(&document.name, &pages);
        record.pages = named;
        Ok(Some((LoadedKey { written: Some(written), record, pages }, time)))
    }

    /// Runs one operation on a key: reads it, reconciles, applies `decide`, reconciles again, and commits. Retries if
    /// another client changes the key in between, so `decide` may be called several times.
    pub(super) async fn update<T>(
        &self,
        key: &Key,
        caller: &CallerWatch,
        mut decide: impl FnMut(&mut KeyUpdate<'_>) -> T + Send,
    ) -> Result<Reply<T>> {
        for attempt in attempts() {
            attempt.pause().await;
            caller.check()?;
            let (loaded, read) = self.load(key).await?;
            let mut now = read;
            let mut session_states = self.sessions.snapshot();
            let (writes, after, outcome) = loop {
                let mut update = KeyUpdate::new(key, &self.names, &loaded, &session_states, now);
                update.reconcile();
                let outcome = decide(&mut update);
                update.reconcile();
                let unread = update.unread_sessions();
                if unread.is_empty() {
                    if update.is_fence_exhausted() {
                        return Err(Fence::used_up());
                    }
                    let (writes, after) = update.writes()?;
                    break (writes, after, outcome);
                }
                let (found, later) = self.sessions.read(&self.service, &self.names, &unread).await?;
                session_states.extend(found);
                now = now.max(later);
            };
            if writes.is_empty() {
                self.cache_key(key, &loaded, now);
                self.observe_time(now);
                // Return the time of the read of the key: its sessions were read later, and the key may have changed
                // since.
                return Ok(reply(read, outcome));
            }
            caller.check()?;
            if let Some(time) = self.commit(key, writes, after).await? {
                return Ok(reply(time, outcome));
            }
        }
        Err(contended())
    }

    /// Commits the writes of an operation. Returns `None` if another client changed the key first; then nothing was
    /// written.
    async fn commit(&self, key: &Key, writes: Writes, mut after: LoadedKey) -> Result<Option<u64>> {
        let Committed { time, written } = match self.service.commit(Lane::Keys, writes).await {
            Ok(done) => done,
            Err(CommitError::Changed | CommitError::Contended) => return Ok(None),
            Err(CommitError::Fault(fault)) => return Err(fault),
        };
        self.observe_time(time);
        after.written = written.first().copied().flatten();
        self.has_document.set(key, after.written.is_some());
        after.record.apply_commit_time(time);
        for queue_page in &mut after.pages {
            Arc::make_mut(&mut queue_page.page).apply_commit_time(time);
        }
        self.cache_pages(&self.names.key(key), &after.pages);
        self.cache_key(key, &after, time);
        Ok(Some(time))
    }

    /// Creates the document of a free key with the hold in it, in one request. Returns `None` if the key has a
    /// document.
    async fn create(&self, request: &AcquireRequest, owner: String) -> Result<Option<Reply<AcquireOutcome>>> {
        let alive_until = self.sessions.expires_at(request.session);
        let (write, mut record) = create_document(&self.names, request, owner, alive_until, self.estimate_time());
        let (time, written) = match self.service.commit(Lane::Keys, vec![write]).await {
            Ok(Committed { time, written }) => (time, written.first().copied().flatten().ok_or_else(malformed)?),
            Err(CommitError::Changed | CommitError::Contended) => {
                self.has_document.set(&request.key, true);
                return Ok(None);
            }
            Err(CommitError::Fault(fault)) => return Err(fault),
        };
        self.observe_time(time);
        if time > request.not_after.as_micros() {
            // The hold never existed, because each reader compares the commit time with `not_after`. Delete the
            // document to save space.
            let name = self.names.key(&request.key);
            drop(self.service.commit(Lane::Keys, vec![delete(name, WriteIf::Unchanged(written))]).await);
            return Ok(Some(reply(time, AcquireOutcome::Stale)));
        }
        record.apply_commit_time(time);
        let document = CachedDocument::of(&LoadedKey { written: Some(written), record, pages: Vec::new() }, time);
        let cached = CachedToken { session: request.session, document };
        lock(&self.tokens).insert((request.key.clone(), request.token), cached);
        let length = request.lifetime.length();
        let granted = Granted { fence: Fence::new(time), remaining: length };
        Ok(Some(reply(time, AcquireOutcome::Granted(granted))))
    }

    pub(super) async fn acquire(
        &self,
        request: &AcquireRequest,
        caller: &CallerWatch,
    ) -> Result<Reply<AcquireOutcome>> {
        let _guard = self.lock_key(&request.key).await;
        caller.check()?;
        self.track(&request.key, request.token, request.session);
        let done = self.acquire_with_lock(request, caller).await;
        // After an error with an unknown outcome the token may be entered; the keeper will release it, so keep it in
        // the cache.
        let is_not_entered =
            |done: &Reply<_>| !matches!(done.outcome, AcquireOutcome::Granted(_) | AcquireOutcome::Queued(_));
        if done.as_ref().is_ok_and(is_not_entered) {
            self.untrack(&request.key, request.token);
        }
        done
    }

    async fn acquire_with_lock(&self, request: &AcquireRequest, caller: &CallerWatch) -> Result<Reply<AcquireOutcome>> {
        let mut owner =
            self.sessions.owner_if_valid(request.session).filter(|_| !self.has_document.is_set(&request.key));
        for attempt in attempts() {
            attempt.pause().await;
            caller.check()?;
            if let Some(owner) = owner.take()
                && let Some(done) = self.create(request, owner).await?
            {
                return Ok(done);
            }
            let mut found = None;
            let decided = self.update(&request.key, caller, |update| {
                found = Some(update.owner_of(request.session));
                update.acquire(request)
            });
            let Reply { time, outcome } = decided.await?;
            match outcome {
                Some(AcquireOutcome::Granted(_) | AcquireOutcome::Queued(_))
                    if time.as_micros() > request.not_after.as_micros()
                        && !self.is_present(request, caller).await? =>
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
        Err(contended())
    }

    /// Returns whether the token of a late acquire is present, which means that an earlier call had entered it.
    async fn is_present(&self, request: &AcquireRequest, caller: &CallerWatch) -> Result<bool> {
        let poll = self.update(&request.key, caller, |update| update.poll(&[request.token])).await?;
        Ok(poll.outcome != [PollOutcome::Gone])
    }

    /// Releases a token that entered a session while the session was being closed: `close_session` reconciled the keys
    /// before the token was there.
    pub(super) async fn release_orphan(&self, key: &Key, token: TokenId) -> Result<StoreTime> {
        let caller_token = Arc::new(());
        let ended = self.release(key, token, None, &CallerWatch::of(&caller_token)).await;
        // The token was entered in any case, so a failure here leaves its outcome unknown.
        ended.map(|ended| ended.time).map_err(|fault| fault.in_doubt(true))
    }

    /// Polls tokens. If one of them is the head of the queue, this recalls a hold that lingers.
    pub(super) async fn poll(
        self: &Arc<Self>,
        key: &Key,
        tokens: &[TokenId],
        caller: &CallerWatch,
    ) -> Result<Reply<Vec<PollOutcome>>> {
        let mut recall = None;
        let decide = |update: &mut KeyUpdate<'_>| {
            let outcomes = update.poll(tokens);
            let is_head = |outcome: &PollOutcome| matches!(outcome, PollOutcome::Queued(Queued { ahead: 0, .. }));
            recall = if outcomes.iter().any(is_head) { update.repeated_recall() } else { None };
            outcomes
        };
        let polled = self.update(key, caller, decide).await?;
        if let Some(recall) = recall {
            // The recall is a hint, so the poll does not wait for it. A failed one is repeated by the next poll.
            let inner = self.clone();
            tokio::spawn(async move { drop(inner.service.commit(Lane::Keys, vec![recall]).await) });
        }
        Ok(polled)
    }

    /// Marks a hold as lingering, with one commit and no read if this handle knows the key's document.
    pub(super) async fn linger(&self, key: &Key, token: TokenId, caller: &CallerWatch) -> Result<Reply<LingerOutcome>> {
        let _guard = self.lock_key(key).await;
        caller.check()?;
        let hears_recalls = self.streams.is_heard();
        let known = match lock(&self.tokens).get(&(key.clone(), token)) {
            Some(CachedToken { session, document: CachedDocument::SoleHold(sole) }) if hears_recalls => {
                sole.loaded().map(|loaded| (*session, loaded))
            }
            _ => None,
        };
        if let Some((session, loaded)) = known {
            let session_states = HashMap::new();
            let mut update = KeyUpdate::new(key, &self.names, &loaded, &session_states, self.estimate_time());
            let outcome = update.linger(token, hears_recalls);
            if matches!(outcome, LingerOutcome::Lingers { .. }) {
                let (writes, after) = update.writes()?;
                // If the session may have expired, it has to be read.
                if let Some(time) = self.commit(key, writes, after).await?
                    && self.sessions.expires_at(session) > time
                {
                    return Ok(reply(time, raised(outcome, time)));
                }
                caller.check()?;
            }
        }
        let Reply { time, outcome } = self.update(key, caller, |update| update.linger(token, hears_recalls)).await?;
        Ok(Reply { time, outcome: raised(outcome, time.as_micros()) })
    }

    pub(super) async fn release(
        &self,
        key: &Key,
        token: TokenId,
        cooldown: Option<Duration>,
        caller: &CallerWatch,
    ) -> Result<Reply<EndOutcome>> {
        let _guard = self.lock_key(key).await;
        caller.check()?;
        let cached = self.untrack(key, token);
        let cooldown = cooldown.filter(|cooldown| !cooldown.is_zero());
        // A cooldown starts at a time that has to be read, so it cannot use the cached document.
        let Some(CachedToken { session, document }) = cached.filter(|_| cooldown.is_none()) else {
            return self.update(key, caller, |update| update.release(token, cooldown)).await;
        };
        let is_over = |session_bound, deadline: Option<u64>, time| {
            deadline.is_some_and(|deadline| deadline <= time)
                || (session_bound && self.sessions.expires_at(session) <= time)
        };
        let ended = |is_over| if is_over { EndOutcome::Nothing } else { EndOutcome::Released };
        let seen = document.written();
        match document {
            _ if self.read_first.is_set(key) => {}
            CachedDocument::Unknown => {}
            CachedDocument::SoleHold(sole) => {
                let mut writes = vec![delete(self.names.key(key), WriteIf::Unchanged(sole.written))];
                if sole.has_notification {
                    writes.push(delete(self.names.notification(session, token), WriteIf::Always));
                }
                if let Some(time) = self.commit(key, writes, LoadedKey::default()).await? {
                    return Ok(reply(time, ended(is_over(sole.session_bound, sole.deadline, time))));
                }
                self.read_first.set(key, true);
            }
            CachedDocument::HoldWithQueue(with_queue) => {
                if let Some(hold) = with_queue.loaded.record.holds.first()
                    && let Some((writes, after)) = self.hand_off(key, token, &with_queue)?
                {
                    if let Some(time) = self.commit(key, writes, after).await? {
                        return Ok(reply(time, ended(is_over(hold.entry.session_bound, hold.deadline, time))));
                    }
                    self.read_first.set(key, true);
                }
            }
        }
        let mut was_seen = false;
        let decide = |update: &mut KeyUpdate<'_>| {
            was_seen = seen.is_some() && update.is_still(seen);
            update.release(token, None)
        };
        let done = self.update(key, caller, decide).await?;
        if was_seen {
            self.read_first.set(key, false);
        }
        Ok(done)
    }
}
