//! Stores locks in Google Firestore and takes every time from the service's clock.
//!
//! # Documents
//! | document | contents |
//! |---|---|
//! | `COLLECTION_keys/ID` | a key that has a holder, waiters or a cooldown: its record, with the holds and the head of the queue |
//! | `COLLECTION_keys/ID/COLLECTION_pages/N` | the rest of a long queue, 200 waiters per page |
//! | `COLLECTION_sessions/ID` | a session; each renewal writes it |
//! | `COLLECTION_sessions/ID/COLLECTION_calls/TOKEN` | a notification of a grant from the queue, of a waiter, of a recall or of a force-release; the session's listener receives it |
//!
//! # How an operation works
//! An operation reads documents, applies the rules, and commits under the condition that the key's document is
//! unchanged. If two operations compete, one succeeds and the other reads again. The service keeps no lock between the
//! two requests, so a client that dies or gives up between them blocks nobody. Two operations need no read because
//! their result is known beforehand: an acquire of a free key creates the document, and a release without waiters
//! deletes it; each is one commit. A holder with waiters receives the key's record in a notification, so its release
//! reads nothing either. A mark of a lingering hold is one commit too, if this process wrote the key's document last.
//!
//! A client cannot know when its commit will happen. Everything that depends on that time is therefore computed from
//! the commit time that the service returns, by each client that reads the document (`record.rs`): the fence, the start
//! of the lifetime, whether an acquire came too late and never took effect, and whether a renewal came too late and its
//! session has expired.

mod cache;
mod config;
mod connect;
mod document;
mod error;
mod keys;
mod list;
mod push;
mod reaper;
mod record;
mod session;
mod update;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;

use self::cache::{CachedToken, KeyHint};
use self::config::Config;
use self::connect::{CallerWatch, Service, run_on_driver};
use self::document::Names;
use self::error::NAME;
use self::session::SessionCache;
use self::update::{KeyUpdate, QueuePage};
use crate::clock::{BootTime, Clock};
use crate::error::Result;
use crate::key::Key;
use crate::store::streams::Streams;
use crate::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, Capabilities, Cursor, EndOutcome, ExtendOutcome,
    ForceReleaseOutcome, ForceReleaseRequest, GrantStream, KeyState, LingerOutcome, Listing, OpenOutcome, OpenSession,
    PollOutcome, Push, RenewOutcome, Reply, Store, StoreTime,
};
use crate::sync::lock;
use crate::token::{SessionId, TokenId};

/// Stores locks in Firestore in native mode.
///
/// # URL
/// `firestore://PROJECT/DATABASE`. Without a database it means `(default)`. Options:
///
/// | option | meaning |
/// |---|---|
/// | `collection` | prefix of the collection names; default `stanchion` |
/// | `emulator` | `host:port` of Google's emulator, which is used in plain text and without credentials. The variable `FIRESTORE_EMULATOR_HOST` has the same effect |
///
/// # Credentials
/// The store uses "application default credentials": the file in `GOOGLE_APPLICATION_CREDENTIALS`, the file that
/// `gcloud auth application-default login` writes, workload identity, or the metadata server.
///
/// # Permissions and security rules
/// The account needs the role `roles/datastore.user`. Use a database that contains nothing but locks if you can,
/// because anyone with write access to these documents can take any lock. Security rules do not apply to service
/// accounts. For all other clients, deny access:
/// ```text
/// match /databases/{database}/documents {
///   match /stanchion_keys/{document=**} { allow read, write: if false; }
///   match /stanchion_sessions/{document=**} { allow read, write: if false; }
/// }
/// ```
///
/// # Setup
/// There is nothing to create. If you have many keys, two settings save money: TTL policies and no index on `record`.
/// ```text
/// gcloud firestore fields ttls update expire_at --collection-group=stanchion_keys --enable-ttl
/// gcloud firestore fields ttls update expire_at --collection-group=stanchion_calls --enable-ttl
/// gcloud firestore indexes fields update record --collection-group=stanchion_keys --disable-indexes
/// gcloud firestore indexes fields update record --collection-group=stanchion_sessions --disable-indexes
/// gcloud firestore indexes fields update record --collection-group=stanchion_calls --disable-indexes
/// ```
/// Never put a TTL policy on sessions. If there is no TTL policy, processes delete expired documents of others while
/// they renew their own sessions.
///
/// # Costs
/// | operation | reads | writes | deletes |
/// |---|---|---|---|
/// | acquire a free key | | 1 | |
/// | release a key without waiters | | | 1 |
/// | release a key without waiters, with a cooldown | 1 | 1 | |
/// | keep a session for an hour, with any number of holds (ttl 10 s, renewed every 2 s) | | 1,800 | |
/// | hold a key for an hour | | | |
/// | try to lock a key that is held | 1 | | |
/// | join the queue | 1 | 1 | |
/// | join an empty queue, in addition | 1 | 1 | 1 |
/// | wait for a key for an hour, per process (one poll per second, in case a notification is lost) | 3,600 | | |
/// | hand off a key, if the holder knows the next waiter (includes the notification) | 1 | 2 | |
/// | hand off a key, if a waiter joined since the holder was notified | 2 | 2 | |
/// | mark a hold as lingering | | 1 | |
/// | wait behind a lingering hold for an hour, in addition (each poll of the head repeats the recall) | | 3,600 | |
/// | hold a key with waiters for an hour (checks that the next waiter is alive) | 600 | | |
/// | release a key after a hand-off | | | 2 |
/// | open and close a session | 2 | 2 | |
///
/// An expired session, a force-release and a hold that times out cost a few more reads. An attempt that fails because
/// another client was faster may be charged as a read. A longer `session_ttl` makes renewals rarer: with one minute
/// they cost 300 writes per hour. The service sustains one write per second to a document. The store therefore warns
/// about a ttl below 5 s, and operations on one key beyond that rate, hand-offs included, become slower and are
/// retried.
///
/// # Limits
/// A key can have 10,000 waiters and about 600 kB of holds. If its holds are that large, a further request waits. If you
/// write keys in alphabetical order more than 500 times per second, you reach the limit of the index that `list` uses.
///
/// # Backups
/// A database that is restored or rewound contains the holds of that time, and fences continue from the restore. Fences
/// keep rising as long as the service's clock does.
#[derive(Clone, Debug)]
pub struct Firestore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    service: Service,
    names: Names,
    sessions: SessionCache,
    streams: Streams,
    /// Tokens that this handle has entered, with the newest known version of their key's document.
    tokens: Mutex<HashMap<(Key, TokenId), CachedToken>>,
    /// Serializes this handle's operations on the same key, because concurrent ones would only make each other retry.
    key_mutexes: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Hint: the key had a document when this handle last read it, so do not try to create one.
    has_document: KeyHint,
    /// Hint: the cached document was outdated at the last release, so read the document first.
    read_first: KeyHint,
    pages: Mutex<HashMap<String, QueuePage>>,
    /// Newest time that the service returned, in µs, and the local time of that response.
    latest_time: Mutex<(u64, BootTime)>,
    last_reaped: Mutex<BootTime>,
    clock: Clock,
}

fn reply<T>(time: u64, outcome: T) -> Reply<T> {
    Reply { time: StoreTime::from_micros(time), outcome }
}

impl Firestore {
    /// Creates a store for this URL without connecting.
    ///
    /// # Errors
    /// Returns [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) if the URL is malformed.
    pub fn from_url(url: &str) -> Result<Self> {
        Self::with_clock(url, Clock::system())
    }

    /// Creates a store with its own clock, for tests. The clock only measures elapsed time and never decides about a
    /// lock.
    ///
    /// # Errors
    /// Returns the errors of [`from_url`](Self::from_url).
    pub fn with_clock(url: &str, clock: Clock) -> Result<Self> {
        let config = Config::from_url(url)?;
        let inner = Inner {
            names: Names::new(&config.database, &config.collection),
            service: Service::new(config),
            sessions: SessionCache::new(clock.clone()),
            streams: Streams::default(),
            tokens: Mutex::default(),
            key_mutexes: Mutex::default(),
            has_document: KeyHint::new(),
            read_first: KeyHint::new(),
            pages: Mutex::default(),
            latest_time: Mutex::new((0, clock.now())),
            last_reaped: Mutex::new(clock.now()),
            clock,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Runs an operation on the store's own runtime.
    async fn run<T, F>(&self, work: impl FnOnce(Arc<Inner>, CallerWatch) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let inner = self.inner.clone();
        run_on_driver(&self.inner.service, move |caller| work(inner, caller)).await
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Store for Firestore {
    fn capabilities(&self) -> Capabilities {
        // A session's listener reads only its own collection, and a client that can write there can write the locks
        // too.
        Capabilities::new(NAME).with_authentic_push()
    }

    async fn open_session(&self, request: OpenSession) -> Result<Reply<OpenOutcome>> {
        self.run(async move |inner: Arc<Inner>, _| {
            inner.listen(request.session).await?;
            if let Some(warning) = session::renewal_rate_warning(request.ttl) {
                inner.streams.tell(request.session, Push::Warning(warning));
            }
            let done = inner.sessions.open(&inner.service, &inner.names, request).await?;
            inner.observe_time(done.time.as_micros());
            Ok(done)
        })
        .await
    }

    async fn renew_session(&self, session: SessionId) -> Result<Reply<RenewOutcome>> {
        self.run(async move |inner: Arc<Inner>, caller: CallerWatch| {
            let done = inner.sessions.renew_session(&inner.service, &inner.names, session, &caller).await?;
            inner.observe_time(done.time.as_micros());
            inner.refresh_queue_heads(session);
            inner.reap_if_due();
            Ok(done)
        })
        .await
    }

    async fn close_session(&self, session: SessionId) -> Result<Reply<()>> {
        // Do this first: even if the request fails, nobody reads this session's notifications any more, and nobody
        // releases its tokens.
        self.inner.streams.end(session);
        lock(&self.inner.tokens).retain(|_, cached| cached.session != session);
        self.run(async move |inner: Arc<Inner>, caller: CallerWatch| {
            let time = inner.sessions.close(&inner.service, &inner.names, session).await?;
            inner.reconcile_keys_of(session, &caller).await?;
            Ok(reply(time.max(lock(&inner.latest_time).0), ()))
        })
        .await
    }

    async fn session_lives(&self, session: SessionId) -> Result<Reply<bool>> {
        self.run(async move |inner: Arc<Inner>, _: CallerWatch| {
            let (read, now) = inner.sessions.read(&inner.service, &inner.names, &[session]).await?;
            inner.observe_time(now);
            Ok(reply(now, read.iter().any(|(_, state)| state.expires_at != 0)))
        })
        .await
    }

    async fn acquire(&self, request: AcquireRequest) -> Result<Reply<AcquireOutcome>> {
        self.run(async move |inner: Arc<Inner>, caller: CallerWatch| {
            let done = inner.acquire(&request, &caller).await?;
            let is_entered = matches!(done.outcome, AcquireOutcome::Granted(_) | AcquireOutcome::Queued(_));
            if is_entered && inner.sessions.is_closed(request.session) {
                let time = inner.release_orphan(&request.key, request.token).await?;
                return Ok(Reply { time, outcome: AcquireOutcome::SessionGone });
            }
            Ok(done)
        })
        .await
    }

    async fn poll(&self, key: &Key, tokens: &[TokenId]) -> Result<Reply<Vec<PollOutcome>>> {
        let (key, tokens) = (key.clone(), tokens.to_vec());
        self.run(async move |inner: Arc<Inner>, caller: CallerWatch| inner.poll(&key, &tokens, &caller).await).await
    }

    async fn abandon(&self, key: &Key, token: TokenId) -> Result<Reply<EndOutcome>> {
        self.release(key, token, None).await
    }

    async fn release(&self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<Reply<EndOutcome>> {
        let key = key.clone();
        self.run(async move |inner: Arc<Inner>, caller: CallerWatch| {
            inner.release(&key, token, cooldown, &caller).await
        })
        .await
    }

    async fn extend(&self, key: &Key, token: TokenId, ttl: Duration) -> Result<Reply<ExtendOutcome>> {
        let key = key.clone();
        self.run(async move |inner: Arc<Inner>, caller: CallerWatch| {
            let _guard = inner.lock_key(&key).await;
            inner.update(&key, &caller, |update| update.extend(token, ttl)).await
        })
        .await
    }

    async fn linger(&self, key: &Key, token: TokenId) -> Result<Reply<LingerOutcome>> {
        let key = key.clone();
        self.run(async move |inner: Arc<Inner>, caller: CallerWatch| inner.linger(&key, token, &caller).await).await
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Reply<AdoptOutcome>> {
        self.run(async move |inner: Arc<Inner>, caller: CallerWatch| {
            let guard = inner.lock_key(&request.key).await;
            inner.track(&request.key, request.to, request.session);
            let done = inner.update(&request.key, &caller, |update| update.adopt(&request)).await?;
            if !matches!(done.outcome, AdoptOutcome::Adopted { .. }) {
                inner.untrack(&request.key, request.to);
            }
            if matches!(done.outcome, AdoptOutcome::Adopted { .. }) && done.time > request.not_after {
                // Either the commit was too late, or an earlier call adopted the hold and this one repeats it.
                let poll = inner.update(&request.key, &caller, |update| update.poll(&[request.to])).await?;
                if poll.outcome == [PollOutcome::Gone] {
                    return Ok(Reply { time: poll.time, outcome: AdoptOutcome::Stale });
                }
            }
            drop(guard);
            if matches!(done.outcome, AdoptOutcome::Adopted { session_bound: true, .. })
                && inner.sessions.is_closed(request.session)
            {
                // The hold was adopted, but its session was closed in the meantime.
                inner.release_orphan(&request.key, request.to).await?;
            }
            Ok(done)
        })
        .await
    }

    async fn force_release(&self, request: ForceReleaseRequest) -> Result<Reply<ForceReleaseOutcome>> {
        self.run(async move |inner: Arc<Inner>, caller: CallerWatch| {
            let _guard = inner.lock_key(&request.key).await;
            inner.update(&request.key, &caller, |update| update.force_release(&request)).await
        })
        .await
    }

    async fn inspect(&self, key: &Key) -> Result<Reply<KeyState>> {
        let key = key.clone();
        self.run(async move |inner: Arc<Inner>, caller: CallerWatch| {
            let describe = |update: &mut KeyUpdate<'_>| {
                update.drop_expired_waiters();
                update.reconcile();
                update.state()
            };
            inner.update(&key, &caller, describe).await
        })
        .await
    }

    async fn list(&self, prefix: &str, cursor: Option<&Cursor>, limit: usize) -> Result<Reply<Listing>> {
        let (prefix, cursor) = (prefix.to_owned(), cursor.cloned());
        self.run(async move |inner: Arc<Inner>, _| inner.list(&prefix, cursor.as_ref(), limit).await).await
    }

    fn grants(&self, session: SessionId) -> GrantStream {
        self.inner.streams.begin(session)
    }
}
