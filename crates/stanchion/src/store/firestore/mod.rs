//! Firestore: locks in Google's document database, by its own clock.
//!
//! # What is where
//! | document | what |
//! |---|---|
//! | `COLLECTION_keys/ID` | a key that is held, waited for or closed: its record, with its holds and the head of its queue |
//! | `COLLECTION_keys/ID/COLLECTION_pages/N` | the rest of a long queue, 200 waiters a page |
//! | `COLLECTION_sessions/ID` | a session; a beat writes it |
//! | `COLLECTION_sessions/ID/COLLECTION_calls/TOKEN` | a grant to one who waited, or a release by force: the session's listener hears of it |
//!
//! # What one request means
//! A step reads documents, decides, and commits: "if the key's document is still what I read". So of two steps one
//! succeeds, and the other reads again; no lock is left in the service by who dies or gives up between the two. What an
//! acquire writes to a key that nobody has, and what a release deletes, are known beforehand: those are one commit each,
//! with nothing to read.
//!
//! Nobody knows when a commit will be done. What depends on that time is therefore decided by the time that the service
//! gave it, by whoever reads the document (`record.rs`): the fence, the beginning of the term, whether an acquire came too
//! late and never was, whether a beat came too late and its session is dead.

mod config;
mod connect;
mod document;
mod error;
mod list;
mod listen;
mod record;
mod session;
mod step;
mod sweep;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use prost_types::Timestamp;
use tokio::task::AbortHandle;

use self::config::Config;
use self::connect::{Committed, Lane, Refused, Service, Wanted, in_driver, lock, pause};
use self::document::{Names, Only, delete, key_id};
use self::error::{NAME, error, malformed};
use self::record::{KeyRecord, Page, PageName, session_of};
use self::session::Sessions;
use self::step::{Leaf, Loaded, Step, fresh};
use crate::clock::{BootTime, Clock, jitter};
use crate::error::{Error, ErrorKind, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, BeatOutcome, Capabilities, EndOutcome, EvictOutcome,
    EvictRequest, ExtendOutcome, GrantStream, Granted, KeyState, OpenOutcome, OpenSession, PollOutcome, Push,
    PushSender, Reply, Store, StoreTime, push_channel,
};
use crate::token::{SessionId, TokenId};

/// A step that finds the key changed by others tries so often, with longer and longer pauses.
const ROUNDS: u32 = 14;

/// The most pages of queues that are remembered.
const MOST_PAGES: usize = 200;

/// Locks in Firestore, in native mode.
///
/// # URL
/// `firestore://PROJECT/DATABASE`; without a database the default one. Options:
///
/// | option | |
/// |---|---|
/// | `collection` | what the names of the collections begin with; `stanchion` |
/// | `emulator` | `host:port` of Google's emulator: plain text, no credentials. `FIRESTORE_EMULATOR_HOST` does the same |
///
/// # Credentials
/// Where the platform keeps them ("application default credentials"): the file that `GOOGLE_APPLICATION_CREDENTIALS` names,
/// that of `gcloud auth application-default login`, workload identity, the metadata server.
///
/// # Rights and rules
/// The account needs the role `roles/datastore.user`, on a database that has nothing but locks if that can be: who may
/// write these documents can take any lock. Accounts pass by security rules; for everybody else:
/// ```text
/// match /databases/{database}/documents {
///   match /stanchion_keys/{document=**} { allow read, write: if false; }
///   match /stanchion_sessions/{document=**} { allow read, write: if false; }
/// }
/// ```
///
/// # Set up
/// Nothing has to be created. Two things save money where keys are many:
/// ```text
/// gcloud firestore fields ttls update expire_at --collection-group=stanchion_keys --enable-ttl
/// gcloud firestore fields ttls update expire_at --collection-group=stanchion_calls --enable-ttl
/// gcloud firestore indexes fields update record --collection-group=stanchion_keys --disable-indexes
/// gcloud firestore indexes fields update record --collection-group=stanchion_sessions --disable-indexes
/// ```
/// Never put a TTL policy on sessions. Without any policy other processes sweep up what is over, with their beats.
///
/// # What it costs
/// | | reads | writes | deletes |
/// |---|---|---|---|
/// | acquire a free key | | 1 | |
/// | release it, nobody waits | | | 1 |
/// | the same with a cooldown | 1 | 1 | |
/// | an hour of a session, with its holds however many (ttl 10 s, a beat every 2 s) | | 1,800 | |
/// | an hour of a held key | | | |
/// | try a key that is held | 1 | | |
/// | begin to wait | 1 | 1 | |
/// | the first who waits for a holder, beside that | 1 | 1 | 1 |
/// | an hour of waiting (asking once a second, in case a call was lost) | 3,600 | | |
/// | a hand-off, with the call | 2 | 2 | |
/// | release after a hand-off | up to 1 | | 2 |
/// | open and close a session | 2 | 2 | |
///
/// A session that has ended, and a holder that is followed by force or by time, cost a few reads more. An attempt that is
/// refused because somebody else was faster may be charged as a read. A longer `session_ttl` makes beats rarer: a minute
/// costs 300 writes an hour. The service sustains one write a second for a document, so a ttl below 5 s is warned of; what
/// is more than that on one key, hand-offs included, gets slower and is tried again.
///
/// # Limits
/// 10,000 waiters a key. About 600 kB of holds a key: who would be one too many waits. Keys in alphabetical order that are
/// written more than 500 times a second meet the limit of the index by which they are listed.
///
/// # What it does not do
/// A database that is restored from a backup, or set back, has the holds of that time, with fences from the restore. Fences
/// keep rising as long as the service's clock does.
#[derive(Clone, Debug)]
pub struct Firestore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    service: Service,
    names: Names,
    sessions: Sessions,
    listeners: Mutex<HashMap<SessionId, Listener>>,
    /// Holds that are ended by deleting their document as it is.
    alone: Mutex<HashMap<(Key, TokenId), Alone>>,
    /// Steps of this handle on one key take turns: they would only get in each other's way.
    turns: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Keys that had a document when they were last looked at, by a hash: it is not tried to create one. Only a guess.
    taken: Vec<AtomicU64>,
    pages: Mutex<HashMap<String, Leaf>>,
    /// The newest time that the service told, and when that was.
    told: Mutex<(u64, BootTime)>,
    swept: Mutex<BootTime>,
    clock: Clock,
}

/// A session's stream, and what fills it.
#[derive(Debug)]
struct Listener {
    pushes: PushSender,
    task: Option<AbortHandle>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// A hold that has its document for itself.
#[derive(Clone, Debug)]
struct Alone {
    written: Timestamp,
    session: SessionId,
    session_bound: bool,
    deadline: Option<u64>,
    called: bool,
}

/// One of several attempts.
#[derive(Clone, Copy, Debug)]
struct Round(u32);

fn rounds() -> impl Iterator<Item = Round> {
    (0..ROUNDS).map(Round)
}

impl Round {
    async fn pause(self) {
        if self.0 > 0 {
            pause(jitter(Duration::from_millis(2 << self.0.min(7)))).await;
        }
    }
}

/// Nothing was done, and it may be tried again.
fn busy() -> Error {
    error(ErrorKind::Unavailable, "too many change this document at once").in_doubt(false)
}

fn reply<T>(time: u64, outcome: T) -> Reply<T> {
    Reply { time: StoreTime::from_micros(time), outcome }
}

impl Firestore {
    /// A store at this URL. Nothing is connected yet.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if the URL is malformed.
    pub fn from_url(url: &str) -> Result<Self> {
        Self::with_clock(url, Clock::system())
    }

    /// The same with another clock. It measures how long ago something was, and decides nothing.
    ///
    /// # Errors
    /// As [`from_url`](Self::from_url).
    pub fn with_clock(url: &str, clock: Clock) -> Result<Self> {
        let config = Config::from_url(url)?;
        let inner = Inner {
            names: Names::new(&config.database, &config.collection),
            service: Service::new(config),
            sessions: Sessions::new(clock.clone()),
            listeners: Mutex::default(),
            alone: Mutex::default(),
            turns: Mutex::default(),
            taken: (0..1_024).map(|_| AtomicU64::new(0)).collect(),
            pages: Mutex::default(),
            told: Mutex::new((0, clock.now())),
            swept: Mutex::new(clock.now()),
            clock,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Runs a step where connections live.
    async fn run<T, F>(&self, work: impl FnOnce(Arc<Inner>, Wanted) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let inner = self.inner.clone();
        in_driver(&self.inner.service, move |wanted| work(inner, wanted)).await
    }
}

impl Inner {
    /// Waits for the turn of a step on this key.
    async fn turn(&self, key: &Key) -> Turn<'_> {
        let id = key_id(key);
        let mutex = lock(&self.turns).entry(id.clone()).or_default().clone();
        let guard = mutex.lock_owned().await;
        Turn { inner: self, id, guard: Some(guard) }
    }

    fn guess(&self, key: &Key) -> (&AtomicU64, u64) {
        use std::hash::{Hash as _, Hasher as _};
        let mut hasher = std::hash::DefaultHasher::new();
        key.hash(&mut hasher);
        let hash = hasher.finish() | 1;
        (&self.taken[(hash >> 32) as usize % self.taken.len()], hash)
    }

    fn seems_taken(&self, key: &Key) -> bool {
        let (place, hash) = self.guess(key);
        place.load(Ordering::Relaxed) == hash
    }

    fn seems(&self, key: &Key, is_taken: bool) {
        let (place, hash) = self.guess(key);
        if is_taken {
            place.store(hash, Ordering::Relaxed);
        } else if place.load(Ordering::Relaxed) == hash {
            place.store(0, Ordering::Relaxed);
        }
    }

    fn tell(&self, time: u64) {
        let mut told = lock(&self.told);
        if time > told.0 {
            *told = (time, self.clock.now());
        }
    }

    /// About what the service's clock shows. For what is kept longer than needed, never for a decision.
    fn estimate(&self) -> u64 {
        let (time, at) = *lock(&self.told);
        time.saturating_add(u64::try_from(self.clock.now().since(at).as_micros()).unwrap_or_default())
    }

    /// Reads all of a key.
    async fn load(&self, key: &Key) -> Result<(Loaded, u64)> {
        // A queue that changes between the two requests is read again.
        for round in rounds() {
            round.pause().await;
            let (documents, now) = self.service.read(Lane::Steps, &[self.names.key(key)]).await?;
            let loaded = match documents.first().and_then(Option::as_ref) {
                Some(document) => self.load_rest(document).await?,
                None => Some((Loaded::default(), 0)),
            };
            if let Some((loaded, later)) = loaded {
                self.seems(key, loaded.written.is_some());
                self.tell(now.max(later));
                return Ok((loaded, now.max(later)));
            }
        }
        Err(busy())
    }

    /// What belongs to a key's document: its pages. None if they are not what the document says any more.
    async fn load_rest(&self, document: &api::Document) -> Result<Option<(Loaded, u64)>> {
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

    fn remember_pages(&self, key: &str, pages: &[Leaf]) {
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

    /// One step on a key: read, settled, decided, settled, committed. Until nobody else came between.
    async fn step<T>(
        &self,
        key: &Key,
        wanted: &Wanted,
        mut decide: impl FnMut(&mut Step<'_>) -> T + Send,
    ) -> Result<Reply<T>> {
        for round in rounds() {
            round.pause().await;
            wanted.check()?;
            let (loaded, mut now) = self.load(key).await?;
            let mut lives = self.sessions.known();
            let (writes, mut after, outcome) = loop {
                let mut step = Step::new(key, &self.names, &loaded, &lives, now);
                step.settle();
                let outcome = decide(&mut step);
                step.settle();
                let unknown = step.unknown();
                if unknown.is_empty() {
                    let (writes, after) = step.writes()?;
                    break (writes, after, outcome);
                }
                let (read, later) = self.sessions.read(&self.service, &self.names, &unknown).await?;
                lives.extend(read);
                now = now.max(later);
            };
            if writes.is_empty() {
                self.remember(key, &loaded, now);
                self.tell(now);
                return Ok(reply(now, outcome));
            }
            wanted.check()?;
            match self.service.commit(Lane::Steps, writes).await {
                Ok(Committed { time, written }) => {
                    after.written = written.first().copied().flatten();
                    self.seems(key, after.written.is_some());
                    after.record.settle_commit(time);
                    for leaf in &mut after.pages {
                        Arc::make_mut(&mut leaf.page).settle_commit(time);
                    }
                    self.remember_pages(&self.names.key(key), &after.pages);
                    self.remember(key, &after, now);
                    self.tell(time);
                    return Ok(reply(time, outcome));
                }
                Err(Refused::Changed | Refused::Contended) => {}
                Err(Refused::Fault(fault)) => return Err(fault),
            }
        }
        Err(busy())
    }

    /// A hold of this handle that has its document for itself is ended by one request.
    fn remember(&self, key: &Key, loaded: &Loaded, now: u64) {
        let Some(written) = loaded.written else { return };
        let Some(hold) = loaded.only_hold(now) else {
            for token in loaded.record.holds.iter().filter_map(|hold| record::token_of(&hold.token).ok()) {
                self.is_not_alone(key, token);
            }
            return;
        };
        let (Ok(token), Ok(session)) = (record::token_of(&hold.token), session_of(&hold.session)) else { return };
        if self.sessions.ends(session) != 0 {
            let (session_bound, deadline, called) = (hold.session_bound, hold.deadline, hold.called);
            lock(&self.alone).insert((key.clone(), token), Alone { written, session, session_bound, deadline, called });
        }
    }

    /// The document of this hold says more than that by now.
    fn is_not_alone(&self, key: &Key, token: TokenId) {
        lock(&self.alone).remove(&(key.clone(), token));
    }

    /// Creates the document of a key that nobody has: the hold, in one request. None: somebody has it.
    async fn create(&self, request: &AcquireRequest, owner: String) -> Result<Option<Reply<AcquireOutcome>>> {
        let lives = self.sessions.ends(request.session);
        let write = fresh(&self.names, request, owner, lives, self.estimate());
        let (time, written) = match self.service.commit(Lane::Steps, vec![write]).await {
            Ok(Committed { time, written }) => (time, written.first().copied().flatten().ok_or_else(malformed)?),
            Err(Refused::Changed | Refused::Contended) => {
                self.seems(&request.key, true);
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
        let length = request.term.length();
        let session_bound = matches!(request.term, crate::store::Term::Session { .. });
        let deadline = length.map(|length| StoreTime::from_micros(time).after(length).as_micros());
        let alone = Alone { written, session: request.session, session_bound, deadline, called: false };
        lock(&self.alone).insert((request.key.clone(), request.token), alone);
        let granted = Granted { fence: Fence::new(time), remaining: length };
        Ok(Some(reply(time, AcquireOutcome::Granted(granted))))
    }

    async fn acquire(&self, request: &AcquireRequest, wanted: &Wanted) -> Result<Reply<AcquireOutcome>> {
        let _turn = self.turn(&request.key).await;
        wanted.check()?;
        let mut owner = self.sessions.owner_if_alive(request.session).filter(|_| !self.seems_taken(&request.key));
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
                    granted.remaining = granted.remaining.map(|left| left.min(request.term.length().unwrap_or(left)));
                    return Ok(Reply { time, outcome: AcquireOutcome::Granted(granted) });
                }
                Some(outcome) => return Ok(Reply { time, outcome }),
                None => owner = found,
            }
        }
        Err(busy())
    }

    /// Whether what was written late was there before.
    async fn was_entered(&self, request: &AcquireRequest, wanted: &Wanted) -> Result<bool> {
        let poll = self.step(&request.key, wanted, |step| step.poll(request.token)).await?;
        Ok(poll.outcome != PollOutcome::Gone)
    }

    async fn end(
        &self,
        key: &Key,
        token: TokenId,
        cooldown: Option<Duration>,
        wanted: &Wanted,
    ) -> Result<Reply<EndOutcome>> {
        let _turn = self.turn(key).await;
        wanted.check()?;
        let alone = lock(&self.alone).remove(&(key.clone(), token));
        let cooldown = cooldown.filter(|cooldown| !cooldown.is_zero());
        if let (Some(alone), None) = (alone, cooldown) {
            let mut writes = vec![delete(self.names.key(key), Only::IfStill(alone.written))];
            if alone.called {
                writes.push(delete(self.names.call(alone.session, token), Only::Always));
            }
            match self.service.commit(Lane::Steps, writes).await {
                Ok(Committed { time, .. }) => {
                    self.tell(time);
                    self.seems(key, false);
                    let is_over = alone.deadline.is_some_and(|deadline| deadline <= time)
                        || (alone.session_bound && self.sessions.ends(alone.session) <= time);
                    return Ok(reply(time, if is_over { EndOutcome::Nothing } else { EndOutcome::Released }));
                }
                Err(Refused::Changed | Refused::Contended) => {}
                Err(Refused::Fault(fault)) => return Err(fault),
            }
        }
        self.step(key, wanted, |step| step.end(token, cooldown)).await
    }

    async fn listen(self: &Arc<Self>, session: SessionId) -> Result<()> {
        let pushes = lock(&self.listeners)
            .get(&session)
            .filter(|listener| listener.task.is_none())
            .map(|listener| listener.pushes.clone());
        if let Some(pushes) = pushes {
            let task = listen::start(self, session, pushes).await?;
            match lock(&self.listeners).get_mut(&session) {
                Some(listener) => listener.task = Some(task),
                None => task.abort(),
            }
        }
        Ok(())
    }

    fn warn(&self, session: SessionId, warning: String) {
        if let Some(listener) = lock(&self.listeners).get(&session) {
            listener.pushes.send(Push::Warning(warning));
        }
    }
}

/// The turn of a step. The last one takes its mutex with it.
struct Turn<'a> {
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

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Store for Firestore {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(NAME)
    }

    async fn open_session(&self, request: OpenSession) -> Result<Reply<OpenOutcome>> {
        self.run(async move |inner: Arc<Inner>, _| {
            inner.listen(request.session).await?;
            if let Some(warning) = session::too_fast(request.ttl) {
                inner.warn(request.session, warning);
            }
            let done = inner.sessions.open(&inner.service, &inner.names, request).await?;
            inner.tell(done.time.as_micros());
            Ok(done)
        })
        .await
    }

    async fn beat(&self, session: SessionId) -> Result<Reply<BeatOutcome>> {
        self.run(async move |inner: Arc<Inner>, wanted: Wanted| {
            let done = inner.sessions.beat(&inner.service, &inner.names, session, &wanted).await?;
            inner.tell(done.time.as_micros());
            inner.tidy();
            Ok(done)
        })
        .await
    }

    async fn close_session(&self, session: SessionId) -> Result<Reply<()>> {
        self.run(async move |inner: Arc<Inner>, wanted: Wanted| {
            let time = inner.sessions.close(&inner.service, &inner.names, session).await?;
            lock(&inner.alone).retain(|_, alone| alone.session != session);
            inner.settle_keys_of(session, &wanted).await?;
            lock(&inner.listeners).remove(&session);
            Ok(reply(time.max(lock(&inner.told).0), ()))
        })
        .await
    }

    async fn session_lives(&self, session: SessionId) -> Result<Reply<bool>> {
        self.run(async move |inner: Arc<Inner>, _wanted: Wanted| {
            let (read, now) = inner.sessions.read(&inner.service, &inner.names, &[session]).await?;
            inner.tell(now);
            Ok(reply(now, read.iter().any(|(_, life)| life.ends != 0)))
        })
        .await
    }

    async fn acquire(&self, request: AcquireRequest) -> Result<Reply<AcquireOutcome>> {
        self.run(async move |inner: Arc<Inner>, wanted: Wanted| {
            let done = inner.acquire(&request, &wanted).await?;
            let is_entered = matches!(done.outcome, AcquireOutcome::Granted(_) | AcquireOutcome::Queued(_));
            if is_entered && inner.sessions.is_closed(request.session) {
                // Closed while this was on its way: what was settled then did not have this yet.
                let waits = Arc::new(());
                let ended = inner.end(&request.key, request.token, None, &Wanted::by(&waits)).await?;
                return Ok(Reply { time: ended.time, outcome: AcquireOutcome::SessionGone });
            }
            Ok(done)
        })
        .await
    }

    async fn poll(&self, key: &Key, token: TokenId) -> Result<Reply<PollOutcome>> {
        let key = key.clone();
        self.run(async move |inner: Arc<Inner>, wanted: Wanted| {
            inner.step(&key, &wanted, |step| step.poll(token)).await
        })
        .await
    }

    async fn abandon(&self, key: &Key, token: TokenId) -> Result<Reply<EndOutcome>> {
        self.release(key, token, None).await
    }

    async fn release(&self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<Reply<EndOutcome>> {
        let key = key.clone();
        self.run(async move |inner: Arc<Inner>, wanted: Wanted| inner.end(&key, token, cooldown, &wanted).await).await
    }

    async fn extend(&self, key: &Key, token: TokenId, ttl: Duration) -> Result<Reply<ExtendOutcome>> {
        let key = key.clone();
        self.run(async move |inner: Arc<Inner>, wanted: Wanted| {
            let _turn = inner.turn(&key).await;
            inner.step(&key, &wanted, |step| step.extend(token, ttl)).await
        })
        .await
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Reply<AdoptOutcome>> {
        self.run(async move |inner: Arc<Inner>, wanted: Wanted| {
            let _turn = inner.turn(&request.key).await;
            let done = inner.step(&request.key, &wanted, |step| step.adopt(&request)).await?;
            if matches!(done.outcome, AdoptOutcome::Adopted { .. }) && done.time > request.not_after {
                // It was committed too late, or was adopted before and is asked for again.
                let poll = inner.step(&request.key, &wanted, |step| step.poll(request.to)).await?;
                if poll.outcome == PollOutcome::Gone {
                    return Ok(Reply { time: poll.time, outcome: AdoptOutcome::Stale });
                }
            }
            Ok(done)
        })
        .await
    }

    async fn evict(&self, request: EvictRequest) -> Result<Reply<EvictOutcome>> {
        self.run(async move |inner: Arc<Inner>, wanted: Wanted| {
            let _turn = inner.turn(&request.key).await;
            inner.step(&request.key, &wanted, |step| step.evict(&request)).await
        })
        .await
    }

    async fn inspect(&self, key: &Key) -> Result<Reply<KeyState>> {
        let key = key.clone();
        self.run(async move |inner: Arc<Inner>, wanted: Wanted| {
            let look = |step: &mut Step<'_>| {
                step.settle_all();
                step.settle();
                step.state()
            };
            inner.step(&key, &wanted, look).await
        })
        .await
    }

    async fn list(&self, prefix: &str, after: Option<&Key>, limit: usize) -> Result<Reply<Vec<KeyState>>> {
        let (prefix, after) = (prefix.to_owned(), after.cloned());
        self.run(async move |inner: Arc<Inner>, wanted: Wanted| {
            inner.list(&prefix, after.as_ref(), limit, &wanted).await
        })
        .await
    }

    fn grants(&self, session: SessionId) -> GrantStream {
        let (pushes, stream) = push_channel();
        lock(&self.inner.listeners).insert(session, Listener { pushes, task: None });
        stream
    }
}
