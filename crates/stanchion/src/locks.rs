//! The handle.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::builder::Builder;
use crate::command::Command;
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, EventStream};
use crate::fence::Fence;
use crate::guard::Guard;
use crate::key::{Key, namespace_prefix, normal};
use crate::primitives::{Election, KeyRequest, LockAllRequest, OnceRequest, OwnerStatus, RunRecord};
use crate::request::LockRequest;
use crate::shared::{SessionView, Shared};
use crate::store::{
    Capabilities, Cursor, Demand, ForceReleaseOutcome, ForceReleaseRequest, KeyState, Listing, PollOutcome, Store,
};
use crate::thread::Ending;
use crate::token::{SessionId, Token};
use crate::wait;

/// The shortest and the longest duration that a call takes.
pub const DURATION_RANGE: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(10)..=Duration::from_secs(30 * 24 * 60 * 60);

/// The longest owner label, in bytes.
pub const MAX_OWNER_BYTES: usize = 128;

/// The longest metadata and the longest trace of a request, in bytes.
pub const MAX_METADATA_BYTES: usize = 4_096;

/// Maximum time for which the drop of the last handle waits for its session to end.
const DROP_WITHIN: Duration = Duration::from_secs(1);

/// A handle on the locks of one store: cheap to clone, one session for all clones.
///
/// Open one per process and store. It owns a thread, the keeper, that keeps the session alive whatever the user's
/// executor does, so it works in every runtime and in none. When the last clone and the last guard are gone, the keeper
/// ends the session; that takes one round trip. Inside a tokio runtime the last drop does not block: the round trip goes on
/// in the background, and if the runtime ends before it is done, the end of the runtime waits, one second at most. Elsewhere
/// the last drop itself waits, one second at most. [`Locks::close`] ends the session and waits for it without blocking.
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
    thread: Mutex<Option<Ending>>,
}

impl Handle {
    pub(crate) fn new(shared: Arc<Shared>, thread: Ending) -> Self {
        let mut handles = handles();
        handles.retain(|handle| handle.strong_count() > 0);
        handles.push(Arc::downgrade(&shared));
        Self { shared, thread: Mutex::new(Some(thread)) }
    }
}

/// The handles of this process.
fn handles() -> MutexGuard<'static, Vec<Weak<Shared>>> {
    static HANDLES: Mutex<Vec<Weak<Shared>>> = Mutex::new(Vec::new());
    HANDLES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Drains every handle that is open in this process: see [`Locks::drain`]. For a signal that tells the process to end.
///
/// ```standalone_crate
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let locks = stanchion::Locks::open("memory:").await?;
/// let guard = locks.lock("job").await?;
/// stanchion::drain("SIGTERM");
/// assert_eq!(guard.draining(), Some("SIGTERM"));
/// assert!(locks.lock("another").await.is_err());
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
pub fn drain(reason: &str) {
    // Draining wakes whoever waits, who may open a handle: not under the lock.
    let handles = handles().clone();
    for handle in handles.iter().filter_map(Weak::upgrade).filter(|handle| handle.is_own_process()) {
        handle.drain(reason);
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !self.shared.is_own_process() {
            return;
        }
        self.shared.drain("the handle was dropped");
        self.shared.command(Command::Close);
        // So that the session has ended when the process exits after this.
        if let Some(thread) = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            thread.wait(DROP_WITHIN);
        }
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
        Builder::for_url(url)
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
        Builder::for_store(Arc::new(store))
    }

    /// Asks for a key: exclusive, first come first served. Awaiting the request waits until it is granted, unless it is
    /// limited.
    pub fn lock(&self, key: impl Into<String>) -> LockRequest {
        LockRequest::new(self.clone(), key.into())
    }

    /// One attempt: `None` if another holds the key or waits for it.
    ///
    /// # Errors
    /// As [`LockRequest`] when awaited, but for the wait limit. A store that does not answer within
    /// [`RetryPolicy::no_wait`](crate::RetryPolicy::no_wait), 1 s by default, is a transient fault
    /// ([`ErrorKind::Unavailable`], [`ErrorKind::NetworkTimeout`] or [`ErrorKind::Indeterminate`]), whether or not the key is
    /// free.
    ///
    /// # Cancel safety
    /// A dropped future leaves no hold behind: the keeper ends what it may have got.
    pub async fn try_lock(&self, key: impl Into<String>) -> Result<Option<Guard>> {
        self.lock(key).try_acquire().await
    }

    /// Asks for a key that others may read at the same time. A [`lock`](Locks::lock) or [`write`](Locks::write) of the key
    /// excludes readers. All of them wait in one queue, so neither readers nor writers starve.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// # let locks = stanchion::Locks::open("memory:").await?;
    /// let (one, another) = (locks.read("catalogue").await?, locks.read("catalogue").await?);
    /// assert!(locks.write("catalogue").try_acquire().await?.is_none());
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    pub fn read(&self, key: impl Into<String>) -> LockRequest {
        self.lock(key).demand(Demand::READ)
    }

    /// Asks for a key alone, the same as [`lock`](Locks::lock). Reads well beside [`read`](Locks::read).
    pub fn write(&self, key: impl Into<String>) -> LockRequest {
        self.lock(key).demand(Demand::WRITE)
    }

    /// Asks for one of `limit` permits of a key, or for several of them at once ([`LockRequest::permits`]).
    ///
    /// Calls with another limit are welcome, as in a rolling deploy that changes the limit: the smaller limit holds until the
    /// holders of the other are gone, and [`Event::LimitsDiffer`](crate::Event::LimitsDiffer) reports it. A call for all
    /// permits is exclusive, as a [`lock`](Locks::lock) is. A reader of the key counts as one permit.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// # let locks = stanchion::Locks::open("memory:").await?;
    /// let two = locks.semaphore("gpu", 3).permits(2).await?;
    /// let one = locks.semaphore("gpu", 3).await?;
    /// assert!(locks.semaphore("gpu", 3).try_acquire().await?.is_none());
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    pub fn semaphore(&self, key: impl Into<String>, limit: u32) -> LockRequest {
        LockRequest { units: 1, capacity: limit, ..self.lock(key) }
    }

    /// Asks for several keys, all or nothing: see [`LockAllRequest`].
    ///
    /// ```
    /// use stanchion::KeyRequest;
    ///
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// # let locks = stanchion::Locks::open("memory:").await?;
    /// let guards = locks.lock_all(["account:1", "account:2"]).await?;
    /// assert!(guards.fence("account:1").is_some());
    /// drop(guards);
    /// let mixed = locks.lock_all([KeyRequest::read("prices"), KeyRequest::lock("order:7")]).await?;
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    pub fn lock_all<W: Into<KeyRequest>>(&self, keys: impl IntoIterator<Item = W>) -> LockAllRequest {
        LockAllRequest::new(self.lock(""), keys.into_iter().map(Into::into).collect())
    }

    /// Has something done once by whoever comes first, and not again for a while: see [`OnceRequest`].
    pub fn once(&self, key: impl Into<String>) -> OnceRequest {
        OnceRequest::new(self.lock(key))
    }

    /// What is known of the last run of [`once`](Locks::once) under this key.
    ///
    /// # Errors
    /// As [`Locks::inspect`].
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn last_run(&self, key: impl Into<String>) -> Result<Option<RunRecord>> {
        let key = self.key(&key.into())?;
        Ok(crate::primitives::last_run(self, &key).await?.run)
    }

    /// Stands for election under this key: see [`Election`].
    pub fn elect(&self, key: impl Into<String>) -> Election {
        Election::new(self.lock(key))
    }

    /// What has become of the hold of a token, and of its process.
    ///
    /// # Errors
    /// The store's faults.
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn status(&self, token: &Token) -> Result<OwnerStatus> {
        crate::primitives::status(self, token).await
    }

    /// Whether one with this owner label holds the key or waits for it, or somebody else has it. A label is no proof: two
    /// processes may have the same one. [`OwnerStatus::Dead`] is not told apart from [`OwnerStatus::Nobody`] here.
    ///
    /// # Errors
    /// As [`Locks::inspect`].
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn status_of_owner(&self, key: impl Into<String>, owner: &str) -> Result<OwnerStatus> {
        let KeyState { holders, waiters, .. } = self.inspect(key).await?;
        Ok(if holders.iter().any(|holder| holder.owner == owner) {
            OwnerStatus::Running
        } else if waiters.iter().any(|waiter| waiter.owner == owner) {
            OwnerStatus::Waiting
        } else if holders.is_empty() {
            OwnerStatus::Nobody
        } else {
            OwnerStatus::SomeoneElse { holders }
        })
    }

    /// Takes up a detached hold, of this process or another one. Of two that try, one gets it.
    ///
    /// A hold bound to a session moves to this handle's; a fixed lifetime keeps its deadline. The fence stays.
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

    /// Returns the keys of this handle's namespace that are held, waited for or closed and begin with `prefix`, each once
    /// and in order, with the entries there that cannot be read. About the past, and not one snapshot.
    ///
    /// It reads page after page; [`list_page`](Self::list_page) gives each as it comes.
    ///
    /// # Errors
    /// The store's faults. That an entry is damaged is none.
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn list(&self, prefix: &str) -> Result<Listing> {
        let mut pages: Vec<Listing> = Vec::new();
        loop {
            let cursor = pages.last().and_then(|page| page.next.as_ref());
            let page = self.list_page(prefix, cursor).await?;
            let is_last = page.next.is_none();
            pages.push(page);
            if is_last {
                return Ok(Listing::merge(pages));
            }
        }
    }

    /// Returns a page of [`list`](Self::list): the first one without a cursor, and the one at [`Listing::next`] with it.
    ///
    /// Pages come in the store's order, and a store may repeat a key. A page may be empty and not be the last one.
    ///
    /// # Errors
    /// The store's faults; [`ErrorKind::InvalidArgument`] for a cursor that another store made.
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn list_page(&self, prefix: &str, cursor: Option<&Cursor>) -> Result<Listing> {
        /// Number of keys that a page looks at, about: some milliseconds of the store's time.
        const PAGE: usize = 1_000;
        let shared = &self.handle.shared;
        shared.check_process()?;
        let prefix = namespace_prefix(&shared.config.namespace) + &normal(prefix);
        let page = shared.step(|| shared.store.list(&prefix, cursor, PAGE)).await;
        page.result.map(|reply| reply.outcome)
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
        let step = shared.step(|| shared.poll(token.key(), token.id())).await;
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
    ) -> Result<ForceReleaseOutcome> {
        let shared = &self.handle.shared;
        let key = self.key(&key.into())?;
        let reason = reason.into();
        if reason.trim().is_empty() || reason.len() > MAX_METADATA_BYTES {
            let message = format!("a forced release needs a reason of 1 to {MAX_METADATA_BYTES} bytes");
            return Err(shared.error(ErrorKind::InvalidArgument, message).with_key(&key));
        }
        let request = ForceReleaseRequest { key: key.clone(), fence, reason: reason.clone() };
        let step = shared.step(|| shared.store.force_release(request.clone())).await;
        let mut outcome = step.result.map_err(|error| error.with_key(&key))?.outcome;
        // The first answer was lost, and the repeat found nothing to do: fences are never used again.
        if step.unanswered && matches!(outcome, ForceReleaseOutcome::NoSuchHold { .. }) {
            outcome = ForceReleaseOutcome::Released;
        }
        if outcome == ForceReleaseOutcome::Released {
            shared.observer.tell(|| Event::ForceReleased { key, fence, reason });
        }
        Ok(outcome)
    }

    /// The events of this handle from now on.
    pub fn events(&self) -> EventStream {
        self.handle.shared.observer.listen()
    }

    /// What the store said so far of settings that may lose locks, for people. Empty is good.
    pub fn warnings(&self) -> Vec<String> {
        self.handle.shared.observer.warnings()
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

pub(crate) fn check_duration(what: &str, span: Duration) -> Result<()> {
    if DURATION_RANGE.contains(&span) {
        return Ok(());
    }
    let message = format!("{what} is {span:?}: it must be between 10 ms and 30 days");
    Err(Error::new(ErrorKind::InvalidArgument, message))
}
