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
//! with nothing to read. A holder that somebody waits for is told the key's record, so that its release reads nothing either.
//!
//! Nobody knows when a commit will be done. What depends on that time is therefore decided by the time that the service
//! gave it, by whoever reads the document (`record.rs`): the fence, the beginning of the lifetime, whether an acquire came too
//! late and never was, whether a beat came too late and its session is dead.

mod config;
mod connect;
mod document;
mod error;
mod keys;
mod known;
mod list;
mod listen;
mod record;
mod session;
mod step;
mod sweep;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;

use self::config::Config;
use self::connect::{Interest, Service, in_driver, lock};
use self::document::Names;
use self::error::NAME;
use self::known::{Guess, Known};
use self::listen::Listener;
use self::session::Sessions;
use self::step::{Leaf, Operation};
use crate::clock::{BootTime, Clock};
use crate::error::Result;
use crate::key::Key;
use crate::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, Capabilities, Cursor, EndOutcome, ExtendOutcome,
    ForceReleaseOutcome, ForceReleaseRequest, GrantStream, KeyState, Listing, OpenOutcome, OpenSession, PollOutcome,
    RenewOutcome, Reply, Store, StoreTime, push_channel,
};
use crate::token::{SessionId, TokenId};

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
/// gcloud firestore indexes fields update record --collection-group=stanchion_calls --disable-indexes
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
/// | an hour of waiting for a key, in one process (a poll a second, in case a call was lost) | 3,600 | | |
/// | a hand-off, with the call, where the holder knows who is next | 1 | 2 | |
/// | the same where somebody came to wait since it was told | 2 | 2 | |
/// | an hour of holding what somebody waits for (whether the next one lives) | 600 | | |
/// | release after a hand-off | | | 2 |
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
    /// What its acquires entered.
    known: Mutex<HashMap<(Key, TokenId), Known>>,
    /// Steps of this handle on one key take turns: they would only get in each other's way.
    turns: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Keys that had a document when they were last looked at: it is not tried to create one.
    taken: Guess,
    /// Keys whose document was another than was known when a hold was ended: it is read first.
    crowded: Guess,
    pages: Mutex<HashMap<String, Leaf>>,
    /// The newest time that the service told, and when that was.
    told: Mutex<(u64, BootTime)>,
    swept: Mutex<BootTime>,
    clock: Clock,
}

fn reply<T>(time: u64, outcome: T) -> Reply<T> {
    Reply { time: StoreTime::from_micros(time), outcome }
}

impl Firestore {
    /// A store at this URL. Nothing is connected yet.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) if the URL is malformed.
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
            known: Mutex::default(),
            turns: Mutex::default(),
            taken: Guess::new(),
            crowded: Guess::new(),
            pages: Mutex::default(),
            told: Mutex::new((0, clock.now())),
            swept: Mutex::new(clock.now()),
            clock,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Runs a step where connections live.
    async fn run<T, F>(&self, work: impl FnOnce(Arc<Inner>, Interest) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let inner = self.inner.clone();
        in_driver(&self.inner.service, move |wanted| work(inner, wanted)).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Store for Firestore {
    fn capabilities(&self) -> Capabilities {
        // A session reads a document of its own; one who may write that may write the locks too.
        Capabilities::new(NAME).with_authentic_push()
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

    async fn renew_session(&self, session: SessionId) -> Result<Reply<RenewOutcome>> {
        self.run(async move |inner: Arc<Inner>, wanted: Interest| {
            let done = inner.sessions.renew_session(&inner.service, &inner.names, session, &wanted).await?;
            inner.tell(done.time.as_micros());
            inner.look_ahead(session);
            inner.tidy();
            Ok(done)
        })
        .await
    }

    async fn close_session(&self, session: SessionId) -> Result<Reply<()>> {
        // First: whether it is answered or not, nobody hears this session any more, and nobody ends what it has.
        lock(&self.inner.listeners).remove(&session);
        lock(&self.inner.known).retain(|_, known| known.session != session);
        self.run(async move |inner: Arc<Inner>, wanted: Interest| {
            let time = inner.sessions.close(&inner.service, &inner.names, session).await?;
            inner.settle_keys_of(session, &wanted).await?;
            Ok(reply(time.max(lock(&inner.told).0), ()))
        })
        .await
    }

    async fn session_lives(&self, session: SessionId) -> Result<Reply<bool>> {
        self.run(async move |inner: Arc<Inner>, _wanted: Interest| {
            let (read, now) = inner.sessions.read(&inner.service, &inner.names, &[session]).await?;
            inner.tell(now);
            Ok(reply(now, read.iter().any(|(_, life)| life.ends != 0)))
        })
        .await
    }

    async fn acquire(&self, request: AcquireRequest) -> Result<Reply<AcquireOutcome>> {
        self.run(async move |inner: Arc<Inner>, wanted: Interest| {
            let done = inner.acquire(&request, &wanted).await?;
            let is_entered = matches!(done.outcome, AcquireOutcome::Granted(_) | AcquireOutcome::Queued(_));
            if is_entered && inner.sessions.is_closed(request.session) {
                let time = inner.take_back(&request.key, request.token).await?;
                return Ok(Reply { time, outcome: AcquireOutcome::SessionGone });
            }
            Ok(done)
        })
        .await
    }

    async fn poll(&self, key: &Key, tokens: &[TokenId]) -> Result<Reply<Vec<PollOutcome>>> {
        let (key, tokens) = (key.clone(), tokens.to_vec());
        self.run(async move |inner: Arc<Inner>, wanted: Interest| {
            inner.step(&key, &wanted, |step| step.poll(&tokens)).await
        })
        .await
    }

    async fn abandon(&self, key: &Key, token: TokenId) -> Result<Reply<EndOutcome>> {
        self.release(key, token, None).await
    }

    async fn release(&self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<Reply<EndOutcome>> {
        let key = key.clone();
        self.run(async move |inner: Arc<Inner>, wanted: Interest| inner.end(&key, token, cooldown, &wanted).await).await
    }

    async fn extend(&self, key: &Key, token: TokenId, ttl: Duration) -> Result<Reply<ExtendOutcome>> {
        let key = key.clone();
        self.run(async move |inner: Arc<Inner>, wanted: Interest| {
            let _turn = inner.turn(&key).await;
            inner.step(&key, &wanted, |step| step.extend(token, ttl)).await
        })
        .await
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Reply<AdoptOutcome>> {
        self.run(async move |inner: Arc<Inner>, wanted: Interest| {
            let turn = inner.turn(&request.key).await;
            inner.expect(&request.key, request.to, request.session);
            let done = inner.step(&request.key, &wanted, |step| step.adopt(&request)).await?;
            if !matches!(done.outcome, AdoptOutcome::Adopted { .. }) {
                inner.forget(&request.key, request.to);
            }
            if matches!(done.outcome, AdoptOutcome::Adopted { .. }) && done.time > request.not_after {
                // It was committed too late, or was adopted before and is asked for again.
                let poll = inner.step(&request.key, &wanted, |step| step.poll(&[request.to])).await?;
                if poll.outcome == [PollOutcome::Gone] {
                    return Ok(Reply { time: poll.time, outcome: AdoptOutcome::Stale });
                }
            }
            drop(turn);
            if matches!(done.outcome, AdoptOutcome::Adopted { session_bound: true, .. })
                && inner.sessions.is_closed(request.session)
            {
                // It was adopted, and ended with its session.
                inner.take_back(&request.key, request.to).await?;
            }
            Ok(done)
        })
        .await
    }

    async fn force_release(&self, request: ForceReleaseRequest) -> Result<Reply<ForceReleaseOutcome>> {
        self.run(async move |inner: Arc<Inner>, wanted: Interest| {
            let _turn = inner.turn(&request.key).await;
            inner.step(&request.key, &wanted, |step| step.force_release(&request)).await
        })
        .await
    }

    async fn inspect(&self, key: &Key) -> Result<Reply<KeyState>> {
        let key = key.clone();
        self.run(async move |inner: Arc<Inner>, wanted: Interest| {
            let look = |step: &mut Operation<'_>| {
                step.settle_all();
                step.settle();
                step.state()
            };
            inner.step(&key, &wanted, look).await
        })
        .await
    }

    async fn list(&self, prefix: &str, cursor: Option<&Cursor>, limit: usize) -> Result<Reply<Listing>> {
        let (prefix, cursor) = (prefix.to_owned(), cursor.cloned());
        self.run(async move |inner: Arc<Inner>, _| inner.list(&prefix, cursor.as_ref(), limit).await).await
    }

    fn grants(&self, session: SessionId) -> GrantStream {
        let (pushes, stream) = push_channel();
        lock(&self.inner.listeners).insert(session, Listener { pushes, task: None });
        stream
    }
}
