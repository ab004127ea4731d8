//! The handle.

use std::sync::Arc;
use std::time::Duration;

use crate::belief::Drift;
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, EventStream};
use crate::fence::Fence;
use crate::guard::Guard;
use crate::keeper::{Command, KeeperThread};
use crate::key::{Key, MAX_NAMESPACE_BYTES, namespace_prefix, normal};
use crate::request::LockRequest;
use crate::retry::RetryPolicy;
use crate::shared::{Config, SessionView, Shared};
use crate::store::{Capabilities, EvictOutcome, EvictRequest, KeyState, PollOutcome, Store};
use crate::token::{SessionId, Token};
use crate::wait;

/// The shortest and the longest duration that a call takes.
pub const DURATIONS: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(10)..=Duration::from_secs(30 * 24 * 60 * 60);

/// The longest owner label, in bytes.
pub const MAX_OWNER_BYTES: usize = 128;

/// The longest metadata and the longest trace of a request, in bytes.
pub const MAX_METADATA_BYTES: usize = 4_096;

/// A handle on the locks of one store: cheap to clone, one session for all clones.
///
/// Open one per process and store. It owns a thread, the keeper, that keeps the session alive whatever the user's
/// executor does, so it works in every runtime and in none. When the last clone and the last guard are gone, the session
/// ends; that takes one round trip, for which the last drop waits, one second at most. [`Locks::close`] does it without
/// blocking.
///
/// ```
/// use stanchion::Locks;
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let locks = Locks::open("memory:").await?;
/// let guard = locks.lock("invoice:42").await?;
/// assert!(guard.is_held());
/// guard.release().await?;
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct Locks {
    pub(crate) handle: Arc<Handle>,
}

/// Ends the keeper when the last handle and the last guard are gone.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) shared: Arc<Shared>,
    thread: std::sync::Mutex<KeeperThread>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !self.shared.is_own_process() {
            return;
        }
        self.shared.drain("the handle was dropped");
        self.shared.command(Command::Close);
        let thread = self.thread.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        thread.join_within(Duration::from_secs(1));
    }
}

impl Locks {
    /// Opens the store that the URL names, with a session.
    ///
    /// | URL | store |
    /// |---|---|
    /// | `memory:` | the memory of this process, fresh at each open |
    /// | `sqlite:FOLDER` | the embedded store: processes of this machine that open the same folder |
    /// | `sqlite:` | the same in the user's state folder |
    /// | `redis://HOST`, `rediss://…`, `redis+unix:…`, `redis+sentinel://…`, `redis+cluster://…` | Redis or Valkey: see [`Redis`](crate::store::Redis) (feature `redis`) |
    /// | `postgres://USER@HOST/DATABASE` | PostgreSQL: see [`Postgres`](crate::store::Postgres) (feature `postgres`) |
    /// | `firestore://PROJECT/DATABASE` | Firestore: see [`Firestore`](crate::store::Firestore) (feature `firestore`) |
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a URL that cannot be read, [`ErrorKind::Unsupported`] for a store that this
    /// build lacks, [`ErrorKind::Misconfigured`], [`ErrorKind::Unauthorized`] or [`ErrorKind::Unavailable`] for a store
    /// that cannot be used.
    ///
    /// # Cancel safety
    /// A dropped future leaves nothing behind but, for a moment, a session that ends by itself.
    pub async fn open(url: &str) -> Result<Self> {
        Self::builder(url).open().await
    }

    /// Opens a store with more to say.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// let locks = stanchion::Locks::builder("memory:")
    ///     .namespace("billing")
    ///     .owner("worker-3")
    ///     .session_ttl(Duration::from_secs(5))
    ///     .open()
    ///     .await?;
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    pub fn builder(url: &str) -> Builder {
        Builder::new(Source::Url(url.to_owned()))
    }

    /// Uses a store of one's own, with defaults for the rest.
    ///
    /// # Errors
    /// As [`Locks::open`].
    ///
    /// # Cancel safety
    /// As [`Locks::open`].
    pub async fn with_store(store: impl Store) -> Result<Self> {
        Self::builder_with_store(store).open().await
    }

    /// Uses a store of one's own, with more to say.
    pub fn builder_with_store(store: impl Store) -> Builder {
        Builder::new(Source::Store(Arc::new(store)))
    }

    /// Asks for a key: exclusive, first come first served. Awaiting the request waits until it is granted, unless it is
    /// limited.
    pub fn lock(&self, key: impl Into<String>) -> LockRequest {
        LockRequest::new(self.clone(), key.into())
    }

    /// One attempt: `None` if another holds the key or waits for it.
    ///
    /// # Errors
    /// As [`LockRequest`] when awaited, but for the wait limit.
    ///
    /// # Cancel safety
    /// A dropped future leaves no hold behind: the keeper ends what it may have got.
    pub async fn try_lock(&self, key: impl Into<String>) -> Result<Option<Guard>> {
        self.lock(key).try_acquire().await
    }

    /// Takes up a detached hold, of this process or another one. Of two that try, one gets it.
    ///
    /// A hold bound to a session moves to this handle's; a fixed term keeps its deadline. The fence stays.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`] if there is no such hold any more, else as for a lock.
    ///
    /// # Cancel safety
    /// If the future is dropped after the hold was taken up, the keeper releases it.
    pub async fn adopt(&self, token: Token) -> Result<Guard> {
        wait::adopt(self, token).await
    }

    /// What is known of a key: holders, waiters, fences. About the past: stale when read.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a key that is not one; the store's faults.
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn inspect(&self, key: impl Into<String>) -> Result<KeyState> {
        let shared = &self.handle.shared;
        let key = self.key(&key.into())?;
        let step = shared.step(|| shared.store.inspect(&key)).await;
        step.result.map(|reply| reply.outcome).map_err(|error| error.with_key(&key))
    }

    /// The keys of this handle's namespace that are held, waited for or closed and begin with `prefix`, in order. About
    /// the past, and not one snapshot.
    ///
    /// # Errors
    /// The store's faults.
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn list(&self, prefix: &str) -> Result<Vec<KeyState>> {
        const PAGE: usize = 500;
        let shared = &self.handle.shared;
        shared.check_process()?;
        let prefix = namespace_prefix(&shared.config.namespace) + &normal(prefix);
        let mut keys: Vec<KeyState> = Vec::new();
        loop {
            let after = keys.last().map(|state| state.key.clone());
            let page = shared.step(|| shared.store.list(&prefix, after.as_ref(), PAGE)).await.result?.outcome;
            let is_last = page.len() < PAGE;
            keys.extend(page);
            if is_last {
                return Ok(keys);
            }
        }
    }

    /// Whether somebody held the key a moment ago. Do not decide on it: ask for the lock.
    ///
    /// # Errors
    /// As [`Locks::inspect`].
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn is_locked(&self, key: impl Into<String>) -> Result<bool> {
        Ok(!self.inspect(key).await?.holders.is_empty())
    }

    /// Whether the token held its key a moment ago. Do not decide on it: check the fence at the resource.
    ///
    /// # Errors
    /// The store's faults.
    ///
    /// # Cancel safety
    /// Creates nothing.
    pub async fn owns(&self, token: &Token) -> Result<bool> {
        let shared = &self.handle.shared;
        shared.check_process()?;
        let step = shared.step(|| shared.store.poll(token.key(), token.id())).await;
        let outcome = step.result.map_err(|error| error.with_key(token.key()))?.outcome;
        Ok(matches!(outcome, PollOutcome::Granted(_)))
    }

    /// Releases the hold of `key` that has this fence, whoever has it. For people who know that its holder is dead or
    /// wrong: it is told, by message and by its next beat, but may act until then; the fence protects what checks it.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a key that is not one or a reason that is empty or too long; the store's
    /// faults. That no live hold has this fence is an answer.
    ///
    /// # Cancel safety
    /// If the future is dropped the hold may have been released or not.
    pub async fn force_release(
        &self,
        key: impl Into<String>,
        fence: Fence,
        reason: impl Into<String>,
    ) -> Result<EvictOutcome> {
        let shared = &self.handle.shared;
        let key = self.key(&key.into())?;
        let reason = reason.into();
        if reason.trim().is_empty() || reason.len() > MAX_METADATA_BYTES {
            let message = format!("a forced release needs a reason of 1 to {MAX_METADATA_BYTES} bytes");
            return Err(shared.error(ErrorKind::InvalidArgument, message).with_key(&key));
        }
        let request = EvictRequest { key: key.clone(), fence, reason: reason.clone() };
        let step = shared.step(|| shared.store.evict(request.clone())).await;
        let mut outcome = step.result.map_err(|error| error.with_key(&key))?.outcome;
        // The first answer was lost, and the repeat found nothing to do: fences are never used again.
        if step.unanswered && matches!(outcome, EvictOutcome::NoSuchHold { .. }) {
            outcome = EvictOutcome::Evicted;
        }
        if outcome == EvictOutcome::Evicted {
            shared.observer.tell(|| Event::TakenOver { key, fence, reason });
        }
        Ok(outcome)
    }

    /// The events of this handle from now on.
    pub fn events(&self) -> EventStream {
        self.handle.shared.observer.listen()
    }

    /// What the store said so far of settings that may lose locks, for people. Empty is good.
    pub fn warnings(&self) -> Vec<String> {
        self.handle.shared.warnings()
    }

    /// No new holds from now on: waiting calls end with [`ErrorKind::Draining`], guards see
    /// [`draining`](Guard::draining). Holds stay. Cannot be undone; the first reason stays.
    pub fn drain(&self, reason: &str) {
        self.handle.shared.drain(reason);
    }

    /// The reason, if this handle is draining.
    pub fn draining(&self) -> Option<&str> {
        self.handle.shared.drain_reason()
    }

    /// Releases everything at once and ends the session. Guards that still live are lost.
    ///
    /// # Errors
    /// None yet: what could not be ended in the store within 5 s dies with the session.
    ///
    /// # Cancel safety
    /// Closing goes on when the future is dropped.
    pub async fn close(&self) -> Result<()> {
        let shared = &self.handle.shared;
        shared.check_process()?;
        shared.drain("the handle was closed");
        shared.command(Command::Close);
        shared.closed.cancelled().await;
        Ok(())
    }

    /// The current session, if one is open. It changes when a session is lost.
    pub fn session(&self) -> Option<SessionId> {
        match &*self.handle.shared.session.borrow() {
            SessionView::Open(session) => Some(session.id),
            _ => None,
        }
    }

    /// What the store can do.
    pub fn capabilities(&self) -> Capabilities {
        self.handle.shared.capabilities
    }

    pub(crate) fn key(&self, name: &str) -> Result<Key> {
        let shared = &self.handle.shared;
        shared.check_process()?;
        Key::new(&shared.config.namespace, name)
    }
}

/// How to open a handle.
#[derive(Debug)]
#[must_use = "a builder does nothing until it is opened"]
pub struct Builder {
    source: Source,
    namespace: String,
    owner: Option<String>,
    session_ttl: Duration,
    drift: Drift,
    retry: RetryPolicy,
    clock: Clock,
}

enum Source {
    Url(String),
    Store(Arc<dyn Store>),
}

impl std::fmt::Debug for Source {
    /// Without the URL, which may hold a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Url(url) => write!(f, "Url({}:…)", scheme(url)),
            Self::Store(store) => write!(f, "Store({})", store.capabilities().name),
        }
    }
}

impl Builder {
    fn new(source: Source) -> Self {
        Self {
            source,
            namespace: String::new(),
            owner: None,
            session_ttl: Duration::from_secs(10),
            drift: Drift::default(),
            retry: RetryPolicy::default(),
            clock: Clock::system(),
        }
    }

    /// Keeps the keys of this handle apart from those of other namespaces. Default: none. At most 128 bytes.
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.namespace = normal(namespace).into_owned();
        self
    }

    /// Who this is, for people who inspect keys. Default: program, host and process. At most 128 bytes.
    pub fn owner(mut self, owner: &str) -> Self {
        self.owner = Some(owner.to_owned());
        self
    }

    /// How long the session lives without a beat; it beats five times in that time. Default: 10 s. A dead process's
    /// holds are free after this time (at once, in stores where sessions live with the process).
    pub fn session_ttl(mut self, ttl: Duration) -> Self {
        self.session_ttl = ttl;
        self
    }

    /// How far clocks may drift. Default: 1 % and 2 ms.
    pub fn drift(mut self, drift: Drift) -> Self {
        self.drift = drift;
        self
    }

    /// How steps are repeated after faults.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = policy;
        self
    }

    /// The clock by which this handle believes and waits. Default: the machine's. For tests.
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Opens the handle: the store is reached and the session is open.
    ///
    /// # Errors
    /// As [`Locks::open`]; [`ErrorKind::InvalidArgument`] for settings out of range.
    ///
    /// # Cancel safety
    /// As [`Locks::open`].
    pub async fn open(self) -> Result<Locks> {
        check_duration("the session ttl", self.session_ttl)?;
        if self.namespace.len() > MAX_NAMESPACE_BYTES || self.namespace.contains('\0') {
            let message = format!("a namespace has at most {MAX_NAMESPACE_BYTES} bytes and no NUL");
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        if self.drift.per_mille >= 500 || self.retry.attempts == 0 {
            let message = "drift must be below 500 parts of a thousand, and a step needs one attempt or more";
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        let owner = self.owner.unwrap_or_else(default_owner);
        if owner.len() > MAX_OWNER_BYTES {
            let message =
                format!("the owner label has {} bytes, the longest allowed is {MAX_OWNER_BYTES}", owner.len());
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        let config = Config {
            namespace: self.namespace,
            owner,
            session_ttl: self.session_ttl,
            drift: self.drift,
            retry: self.retry,
        };
        let (source, clock) = (self.source, self.clock);
        let (thread, shared) = KeeperThread::start(move |commands| async move {
            let store = match source {
                Source::Url(url) => open_store(&url).await?,
                Source::Store(store) => store,
            };
            Ok(Shared::new(store, clock, config, commands))
        })?;
        let ended = || Error::new(ErrorKind::Internal, "the keeper ended while it was opening the store");
        let shared = shared.await.map_err(|_| ended())??.claim().ok_or_else(ended)?;
        let locks = Locks { handle: Arc::new(Handle { shared, thread: std::sync::Mutex::new(thread) }) };
        // An error drops the handle, which ends the keeper.
        locks.handle.shared.believed_session().await?;
        Ok(locks)
    }
}

pub(crate) fn check_duration(what: &str, span: Duration) -> Result<()> {
    if DURATIONS.contains(&span) {
        return Ok(());
    }
    let message = format!("{what} is {span:?}: it must be between 10 ms and 30 days");
    Err(Error::new(ErrorKind::InvalidArgument, message))
}

fn scheme(url: &str) -> &str {
    url.split_once(':').map_or("", |(scheme, _)| scheme)
}

async fn open_store(url: &str) -> Result<Arc<dyn Store>> {
    match scheme(url) {
        "memory" if url == "memory:" => Ok(Arc::new(crate::store::Memory::new())),
        "memory" => Err(Error::new(ErrorKind::InvalidArgument, "the memory store's URL is `memory:` and nothing more")),
        #[cfg(feature = "sqlite")]
        "sqlite" => Ok(Arc::new(crate::store::Sqlite::from_url(url)?)),
        #[cfg(not(feature = "sqlite"))]
        "sqlite" => Err(not_built("sqlite")),
        #[cfg(feature = "redis")]
        redis if is_redis(redis) => Ok(Arc::new(crate::store::Redis::from_url(url)?)),
        #[cfg(not(feature = "redis"))]
        redis if is_redis(redis) => Err(not_built(redis)),
        #[cfg(feature = "postgres")]
        "postgres" | "postgresql" => Ok(Arc::new(crate::store::Postgres::from_url(url)?)),
        #[cfg(not(feature = "postgres"))]
        known @ ("postgres" | "postgresql") => Err(not_built(known)),
        #[cfg(feature = "firestore")]
        "firestore" => Ok(Arc::new(crate::store::Firestore::from_url(url)?)),
        #[cfg(not(feature = "firestore"))]
        "firestore" => Err(not_built("firestore")),
        "" => {
            let message = format!("a store's URL begins with its scheme: one of {}", stores());
            Err(Error::new(ErrorKind::InvalidArgument, message))
        }
        unknown => {
            let unknown: String = unknown.chars().filter(|c| !c.is_control()).take(32).collect();
            let message = format!("there is no store for `{unknown}:` URLs; the schemes are {}", stores());
            Err(Error::new(ErrorKind::InvalidArgument, message))
        }
    }
}

/// `redis+sentinel` and the like are of the family too.
fn is_redis(scheme: &str) -> bool {
    matches!(scheme.split('+').next(), Some("redis" | "rediss"))
}

#[cfg(not(all(feature = "sqlite", feature = "redis", feature = "postgres", feature = "firestore")))]
fn not_built(scheme: &str) -> Error {
    Error::new(ErrorKind::Unsupported, format!("this build has no store for `{scheme}:` URLs; it has {}", stores()))
}

fn stores() -> String {
    let redis = "`redis:` (with `rediss:`, `redis+unix:`, `redis+sentinel:`, `redis+cluster:`)";
    let all = [
        (true, "`memory:`"),
        (cfg!(feature = "sqlite"), "`sqlite:`"),
        (cfg!(feature = "redis"), redis),
        (cfg!(feature = "postgres"), "`postgres:`"),
        (cfg!(feature = "firestore"), "`firestore:`"),
    ];
    let built: Vec<_> = all.into_iter().filter(|(is_built, _)| *is_built).map(|(_, name)| name).collect();
    built.join(", ")
}

/// Program, host and process.
fn default_owner() -> String {
    let program = std::env::args_os().next().map(std::path::PathBuf::from);
    let program = program.as_deref().and_then(std::path::Path::file_name).map(|name| name.to_string_lossy());
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let process = std::process::id();
    let label = format!("{}@{host}/{process}", program.as_deref().unwrap_or("?"));
    let start = label.len().saturating_sub(MAX_OWNER_BYTES);
    let start = (start..label.len()).find(|at| label.is_char_boundary(*at)).unwrap_or(0);
    label[start..].to_owned()
}
