//! Defines [`Locks`], the handle through which a process uses a store's locks.

use std::sync::Arc;
use std::time::Duration;

use crate::adopt::adopt;
use crate::builder::Builder;
use crate::command::Command;
use crate::detached;
use crate::error::{ErrorKind, Result};
use crate::event::Event;
use crate::fence::Fence;
use crate::guard::{Guard, Released};
use crate::handle::Handle;
use crate::key::{namespace_prefix, normal};
use crate::lifecycle::Phase;
use crate::limits::MAX_METADATA_BYTES;
use crate::linger;
use crate::observer::EventStream;
use crate::primitives::{Election, KeyRequest, LockAllRequest, OnceRequest, OwnerStatus, RunListing, RunRecord};
use crate::request::LockRequest;
use crate::shared::SessionView;
use crate::store::{
    Capabilities, Cursor, Demand, ForceReleaseOutcome, ForceReleaseRequest, KeyState, Listing, PollOutcome, Store,
};
use crate::token::{SessionId, Token};

/// A handle on the locks of one store, cheap to clone.
///
/// All clones share one session. Open one handle per process and store.
///
/// The handle owns a thread, the keeper, which renews the session even if the user's executor is blocked. A handle
/// therefore works in every async runtime, and in none.
///
/// # Closing
/// When the last clone and the last guard are gone, the keeper ends the session, which takes one round trip:
///
/// - Inside a tokio runtime, the last drop does not block. The round trip runs in the background. If the runtime ends
///   earlier, its end waits for the round trip, for at most 1 s.
/// - Elsewhere, the last drop waits, for at most 1 s.
///
/// [`Locks::close`] ends the session and waits for that without blocking a thread.
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

impl Locks {
    /// Opens the store that a URL names, with a session.
    ///
    /// | URL | store |
    /// |---|---|
    /// | `memory:` | memory of this process, empty at each open: [`Memory`](crate::store::Memory) |
    /// | `sqlite:FOLDER` | embedded store, shared by the processes of this machine that open the same folder |
    /// | `sqlite:` | embedded store in the user's state folder |
    /// | `redis://HOST`, `rediss://…`, `redis+unix:…`, `redis+sentinel://…`, `redis+cluster://…` | Redis or Valkey: see [`Redis`](crate::store::Redis) (feature `redis`) |
    /// | `postgres://USER@HOST/DATABASE` | PostgreSQL: see [`Postgres`](crate::store::Postgres) (feature `postgres`) |
    /// | `firestore://PROJECT/DATABASE` | Firestore: see [`Firestore`](crate::store::Firestore) (feature `firestore`) |
    ///
    /// The page of each store lists the options that its URL accepts. [`Locks::builder`] has the settings of the
    /// handle.
    ///
    /// # Errors
    /// - [`ErrorKind::InvalidArgument`] if the URL is malformed.
    /// - [`ErrorKind::Unsupported`] if this build lacks the store.
    /// - [`ErrorKind::Misconfigured`], [`ErrorKind::Unauthorized`] or [`ErrorKind::Unavailable`] if the store cannot be
    ///   used.
    ///
    /// # Cancel safety
    /// A dropped future leaves nothing behind, except for a session that the keeper ends a moment later.
    pub async fn open(url: &str) -> Result<Self> {
        Self::builder(url).open().await
    }

    /// Returns a [`Builder`] for configuring the handle before it is opened.
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

    /// Opens a handle on the given store, with default settings.
    ///
    /// This is for stores of your own, and for stores that were configured in code.
    ///
    /// # Errors
    /// The errors of [`Locks::open`].
    ///
    /// # Cancel safety
    /// The same as for [`Locks::open`].
    pub async fn with_store(store: impl Store) -> Result<Self> {
        Self::builder_with_store(store).open().await
    }

    /// Returns a [`Builder`] for configuring a handle on the given store.
    pub fn builder_with_store(store: impl Store) -> Builder {
        Builder::for_store(Arc::new(store))
    }

    /// Requests a key exclusively.
    ///
    /// Await the request to wait until the key is granted, first come, first served. [`LockRequest`] has the options
    /// and lists the errors.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// # let locks = stanchion::Locks::open("memory:").await?;
    /// let guard = locks.lock("invoice:42").wait(Duration::from_secs(5)).await?;
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    pub fn lock(&self, key: impl Into<String>) -> LockRequest {
        LockRequest::new(self.handle.clone(), key.into())
    }

    /// Tries once to lock a key. If someone else holds the lock or waits for it, you get `None`, not an error.
    ///
    /// # Errors
    /// The errors of an awaited [`LockRequest`], except [`ErrorKind::Timeout`] and [`ErrorKind::Busy`].
    ///
    /// If the store does not answer within [`RetryPolicy::no_wait`](crate::RetryPolicy::no_wait), 1 s by default, the
    /// call fails with a transient error ([`ErrorKind::Unavailable`], [`ErrorKind::NetworkTimeout`] or
    /// [`ErrorKind::Indeterminate`]), whether or not the key is free.
    ///
    /// # Cancel safety
    /// A dropped future leaves no hold behind: if the store granted one, the keeper releases it.
    pub async fn try_lock(&self, key: impl Into<String>) -> Result<Option<Guard>> {
        self.lock(key).try_acquire().await
    }

    /// Requests a key that other readers may hold at the same time.
    ///
    /// A [`lock`](Locks::lock) or [`write`](Locks::write) of the key excludes readers. Readers and writers wait in one
    /// queue, so neither starves.
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

    /// Requests a key exclusively, as [`lock`](Locks::lock) does. Use it for a key that others [`read`](Locks::read).
    pub fn write(&self, key: impl Into<String>) -> LockRequest {
        self.lock(key).demand(Demand::WRITE)
    }

    /// Requests one of `limit` permits of a key. [`LockRequest::permits`] requests several at once.
    ///
    /// Calls may use different limits, as in a rolling deploy that changes the limit: the smaller limit applies until
    /// the holders with the other one are gone, and [`Event::LimitsDiffer`] reports that.
    ///
    /// A request for all permits is exclusive, like a [`lock`](Locks::lock). A reader of the key counts as one permit
    /// (ADR 22).
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
        self.lock(key).limit(limit)
    }

    /// Requests several keys, all or nothing. [`LockAllRequest`] describes the order and lists the errors.
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
        LockAllRequest::new(self.handle.clone(), keys.into_iter().map(Into::into).collect())
    }

    /// Requests that something is done once by the first caller, and not again for a while. [`OnceRequest`] describes
    /// the rules.
    pub fn once(&self, key: impl Into<String>) -> OnceRequest {
        OnceRequest::new(self.lock(key))
    }

    /// Returns the record of the last [`once`](Locks::once) run under this key, or `None` if there is no record.
    ///
    /// Records are kept for a day, or for as long as the run closes the key.
    ///
    /// # Errors
    /// The errors of [`Locks::inspect`]; [`ErrorKind::Misconfigured`] if a newer version of stanchion wrote the record.
    ///
    /// # Cancel safety
    /// Only reads.
    pub async fn last_run(&self, key: impl Into<String>) -> Result<Option<RunRecord>> {
        let key = self.handle.key(&key.into())?;
        Ok(crate::primitives::last_run(&self.handle.shared, &key).await?.run)
    }

    /// Returns the last [`once`](Locks::once) run of each key that begins with `prefix`, as far as the store has records.
    ///
    /// Records that cannot be read are listed too. The result is not one snapshot, as with [`list`](Locks::list).
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// # let locks = stanchion::Locks::open("memory:").await?;
    /// locks.once("report:daily").run(async |_| Ok::<_, stanchion::Error>(())).await?;
    /// for (key, run) in locks.list_runs("report:").await?.runs {
    ///     println!("{key}: {} s ago, by {}", run.age.as_secs(), run.owner);
    /// }
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// Any error of the store. A damaged record is not an error.
    ///
    /// # Cancel safety
    /// Only reads.
    pub async fn list_runs(&self, prefix: &str) -> Result<RunListing> {
        crate::primitives::list_runs(&self.handle.shared, prefix).await
    }

    /// Deletes the records of the [`once`](Locks::once) runs under this key, so that the next caller runs the body.
    /// Returns whether there was a record.
    ///
    /// A run that is in progress is recorded when it ends. [`OnceRequest::force`] runs the body once, without deleting
    /// anything first.
    ///
    /// ```
    /// use stanchion::OnceOutcome;
    ///
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// # let locks = stanchion::Locks::open("memory:").await?;
    /// let daily = || locks.once("report").slot(20_261_130).run(async |_| Ok::<_, stanchion::Error>(()));
    /// daily().await?;
    /// assert!(locks.forget_run("report").await?);
    /// assert!(matches!(daily().await?, OnceOutcome::Ran(())));
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// The errors of [`Locks::last_run`].
    ///
    /// # Cancel safety
    /// If the future is dropped, the records may or may not have been deleted. Repeat the call.
    pub async fn forget_run(&self, key: impl Into<String>) -> Result<bool> {
        let key = self.handle.key(&key.into())?;
        crate::primitives::forget_run(&self.handle.shared, &key).await
    }

    /// Returns an [`Election`] under this key, in which this handle can be a candidate or an observer.
    pub fn elect(&self, key: impl Into<String>) -> Election {
        Election::new(self.lock(key))
    }

    /// Returns the status of a token's hold, and of the process that made the hold.
    ///
    /// # Errors
    /// Any error of the store.
    ///
    /// # Cancel safety
    /// Only reads.
    pub async fn status(&self, token: &Token) -> Result<OwnerStatus> {
        crate::primitives::status(&self.handle.shared, token).await
    }

    /// Returns whether an owner with this label holds the key or waits for it.
    ///
    /// A label proves nothing: two processes may use the same one. This call returns [`OwnerStatus::Nobody`] also where
    /// [`status`](Locks::status) would return [`OwnerStatus::Dead`].
    ///
    /// # Errors
    /// The errors of [`Locks::inspect`].
    ///
    /// # Cancel safety
    /// Only reads.
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

    /// Takes over a detached hold with its token, in this process or another one.
    ///
    /// If several callers adopt the same hold, exactly one succeeds (ADR 2). A hold that is bound to a session moves
    /// to this handle's session; a fixed lifetime keeps its deadline. The fence stays the same.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// # let locks = stanchion::Locks::open("memory:").await?;
    /// let guard = locks.lock("upload:7").await?;
    /// let fence = guard.fence();
    /// let token = guard.detach().to_string(); // store it, or send it to another process
    /// let guard = locks.adopt(token.parse()?).await?;
    /// assert_eq!(guard.fence(), fence);
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::Lost`] if there is no such hold any more; otherwise the errors of an awaited [`LockRequest`].
    ///
    /// # Cancel safety
    /// If the future is dropped after the hold was adopted, the keeper releases the hold.
    pub async fn adopt(&self, token: Token) -> Result<Guard> {
        adopt(&self.handle, token).await
    }

    /// Releases the hold of a token, in this process or another one, and keeps its key closed for `cooldown`.
    ///
    /// The result says whether the token still held its key. [`Released::AlreadyLost`] means that the hold had ended
    /// before: it was released, adopted, force-released or lost, or it expired. If an answer of the store was lost and
    /// the repeated request finds nothing, the result is [`Released::Now`].
    ///
    /// The hold may still have a guard, as with [`Guard::token`]: that guard is lost with
    /// [`LossCause::Missing`](crate::LossCause::Missing). A guard of another handle finds out when its keeper verifies
    /// the hold, within about two renewals of the session.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use stanchion::Released;
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// # let locks = stanchion::Locks::open("memory:").await?;
    /// let token = locks.lock("upload:7").ttl(Duration::from_secs(600)).await?.detach();
    /// assert_eq!(locks.release(&token, None).await?, Released::Now);
    /// assert_eq!(locks.release(&token, None).await?, Released::AlreadyLost);
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if the cooldown is out of range; any error of the store. The hold may then remain:
    /// call again.
    ///
    /// # Cancel safety
    /// If the future is dropped, the hold may or may not have been released. Another call is safe.
    pub async fn release(&self, token: &Token, cooldown: Option<Duration>) -> Result<Released> {
        detached::release(&self.handle.shared, token, cooldown).await
    }

    /// Sets the remaining time of a detached hold to `ttl` from now, without adopting it. The new time may be shorter.
    ///
    /// The user of the hold can use all of that time, as with [`LockRequest::ttl`]. Afterwards the store keeps the key
    /// locked for a grace, as it does after a guard's lifetime.
    ///
    /// No guard learns of the new time. If a guard has the hold, call [`Guard::extend`].
    ///
    /// ```
    /// # use std::time::Duration;
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// # let locks = stanchion::Locks::open("memory:").await?;
    /// let token = locks.lock("upload:7").ttl(Duration::from_secs(60)).await?.detach();
    /// locks.extend(&token, Duration::from_secs(600)).await?;
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// - [`ErrorKind::Lost`] if the token holds nothing any more.
    /// - [`ErrorKind::InvalidArgument`] if the hold has no deadline, if a guard of this handle has it, or if `ttl` is out
    ///   of range.
    /// - Any other error of the store. The store may then have applied the new time, or may still apply it later, after
    ///   the time of a later call.
    ///
    /// # Cancel safety
    /// If the future is dropped, the store may or may not have applied the new time.
    pub async fn extend(&self, token: &Token, ttl: Duration) -> Result<()> {
        detached::extend(&self.handle.shared, token, ttl).await
    }

    /// Returns the holders, waiters and fences of a key when the store was queried.
    ///
    /// For display only: the state may have changed by the time you read it.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if the key is malformed; any error of the store.
    ///
    /// # Cancel safety
    /// Only reads.
    pub async fn inspect(&self, key: impl Into<String>) -> Result<KeyState> {
        let key = self.handle.key(&key.into())?;
        self.handle.shared.inspect(&key).await
    }

    /// Returns the keys of this handle's namespace that begin with `prefix` and are held, waited for or in cooldown.
    ///
    /// Each key appears once, in order. Entries that cannot be read are listed too. The result is not one snapshot: it
    /// is read page by page. [`list_page`](Self::list_page) returns each page as it arrives.
    ///
    /// # Errors
    /// Any error of the store. A damaged entry is not an error.
    ///
    /// # Cancel safety
    /// Only reads.
    pub async fn list(&self, prefix: &str) -> Result<Listing> {
        let shared = &self.handle.shared;
        shared.list(&(namespace_prefix(&shared.config.namespace) + &normal(prefix))).await
    }

    /// Returns one page of [`list`](Self::list): the first page without a cursor, the next one with the cursor in
    /// [`Listing::next`].
    ///
    /// Pages arrive in the store's order, and a store may repeat a key. A page may be empty without being the last one.
    ///
    /// # Errors
    /// Any error of the store; [`ErrorKind::InvalidArgument`] if another store made the cursor.
    ///
    /// # Cancel safety
    /// Only reads.
    pub async fn list_page(&self, prefix: &str, cursor: Option<&Cursor>) -> Result<Listing> {
        let shared = &self.handle.shared;
        shared.list_page(&(namespace_prefix(&shared.config.namespace) + &normal(prefix)), cursor).await
    }

    /// Returns whether the key was locked when the store was queried.
    ///
    /// For display only: to make a decision, use [`try_lock`](Locks::try_lock).
    ///
    /// # Errors
    /// The errors of [`Locks::inspect`].
    ///
    /// # Cancel safety
    /// Only reads.
    pub async fn is_locked(&self, key: impl Into<String>) -> Result<bool> {
        Ok(!self.inspect(key).await?.holders.is_empty())
    }

    /// Returns whether the token held its key when the store was queried.
    ///
    /// For display only: to protect a resource, let the resource check the fence.
    ///
    /// # Errors
    /// Any error of the store.
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

    /// Releases the hold of `key` with this fence, even if another process holds it.
    ///
    /// For people who know that the holder is dead or wrong. The holder is notified by a message, and again by its next
    /// session renewal. It may act until then, and only a fence check at the resource stops it.
    ///
    /// The outcome says whether a live hold had this fence. [`Locks::inspect`] shows the fences.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if the key is malformed, or if the reason is blank or longer than
    /// [`MAX_METADATA_BYTES`]; any error of the store.
    ///
    /// # Cancel safety
    /// If the future is dropped, the hold may or may not have been released.
    pub async fn force_release(
        &self,
        key: impl Into<String>,
        fence: Fence,
        reason: impl Into<String>,
    ) -> Result<ForceReleaseOutcome> {
        let shared = &self.handle.shared;
        let key = self.handle.key(&key.into())?;
        let reason = reason.into();
        if reason.trim().is_empty() || reason.len() > MAX_METADATA_BYTES {
            let message = format!("force-release needs a reason of 1 to {MAX_METADATA_BYTES} bytes");
            return Err(shared.error(ErrorKind::InvalidArgument, message).with_key(&key));
        }
        let request = ForceReleaseRequest { key: key.clone(), fence, reason: reason.clone() };
        let step = shared.step(|| shared.store.force_release(request.clone())).await;
        let mut outcome = step.result.map_err(|error| error.with_key(&key))?.outcome;
        // The answer to the first attempt was lost, and the retry found nothing to do. Fences are never reused, so the
        // first attempt released the hold.
        if step.unanswered && matches!(outcome, ForceReleaseOutcome::NoSuchHold { .. }) {
            outcome = ForceReleaseOutcome::Released;
        }
        if outcome == ForceReleaseOutcome::Released {
            shared.observer.publish(|| Event::ForceReleased { key, fence, reason });
        }
        Ok(outcome)
    }

    /// Releases the key if it [lingers](LockRequest::linger) in this process unused. Returns whether it did.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// # let locks = stanchion::Locks::open("memory:").await?;
    /// for _ in 0..2 {
    ///     drop(locks.lock("shard:7").linger(Duration::from_secs(10)).await?);
    /// }
    /// locks.release_lingering("shard:7").await?;
    /// assert!(!locks.is_locked("shard:7").await?);
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if the key is malformed; any error of the store. The key lingers no more in any
    /// case: the keeper keeps releasing it.
    ///
    /// # Cancel safety
    /// If the future is dropped, the keeper finishes the release.
    pub async fn release_lingering(&self, key: impl Into<String>) -> Result<bool> {
        let key = self.handle.key(&key.into())?;
        linger::release_unused(&self.handle.shared, &key).await
    }

    /// Releases every key that [lingers](LockRequest::linger) in this process unused. Returns their number.
    ///
    /// # Errors
    /// The first error of [`Locks::release_lingering`]. All keys are released in any case.
    ///
    /// # Cancel safety
    /// The same as for [`Locks::release_lingering`]. Keys whose turn has not come may linger on.
    pub async fn release_all_lingering(&self) -> Result<usize> {
        let shared = &self.handle.shared;
        shared.check_process()?;
        let (mut count, mut first_error) = (0, None);
        for key in linger::unused_keys(shared) {
            match linger::release_unused(shared, &key).await {
                Ok(has_lingered) => count += usize::from(has_lingered),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        first_error.map_or(Ok(count), Err)
    }

    /// Returns a stream of this handle's events from now on.
    pub fn events(&self) -> EventStream {
        self.handle.shared.observer.listen()
    }

    /// Returns the store's warnings so far about settings that may lose locks, as text for people. Does no I/O.
    ///
    /// An empty list is good. [`Event::Warning`] reports each of them as it arrives.
    pub fn warnings(&self) -> Vec<String> {
        self.handle.shared.observer.warnings()
    }

    /// Stops new holds: waiting calls and later ones fail with [`ErrorKind::Draining`].
    ///
    /// Existing holds stay, and [`Guard::draining`] shows them the reason, so that they can finish. Draining cannot be
    /// undone. If it is called again, the first reason stays.
    pub fn drain(&self, reason: &str) {
        self.handle.shared.drain(reason);
    }

    /// Returns the reason if this handle is draining.
    pub fn draining(&self) -> Option<&str> {
        self.handle.shared.lifecycle.drain_reason()
    }

    /// Releases all holds and ends the session. Guards that still exist are lost with
    /// [`LossCause::Closed`](crate::LossCause::Closed).
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] in a forked child. If the store does not answer within 5 s, that is not an error: the
    /// remaining holds end when the session expires.
    ///
    /// # Cancel safety
    /// If the future is dropped, closing continues in the background.
    pub async fn close(&self) -> Result<()> {
        let shared = &self.handle.shared;
        shared.check_process()?;
        shared.drain("the handle was closed");
        shared.command(Command::Close);
        shared.lifecycle.reached(Phase::Closed).await;
        Ok(())
    }

    /// Returns the current session if one is open. After a session is lost, the keeper opens another one.
    pub fn session(&self) -> Option<SessionId> {
        match &*self.handle.shared.session.borrow() {
            SessionView::Open(session) => Some(session.id),
            _ => None,
        }
    }

    /// Returns the capabilities of the store.
    pub fn capabilities(&self) -> Capabilities {
        self.handle.shared.capabilities
    }
}
