//! Defines [`Guard`], a lock that is held.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::clock::BootTime;
use crate::command::{Cleanup, Command, HoldCheck};
use crate::error::{Error, ErrorKind, LossCause, Result};
use crate::event::Event;
use crate::fence::Fence;
use crate::handle::Handle;
use crate::key::Key;
use crate::lease::Hold;
use crate::lifecycle::Phase;
use crate::limits::check_duration;
use crate::linger;
use crate::shared::Shared;
use crate::store::{EndOutcome, ExtendOutcome};
use crate::token::{Token, TokenId};

/// A lock that is held. Dropping the guard releases the lock.
///
/// The drop does not wait: the keeper releases the lock in the background. A guard can be dropped anywhere: without a
/// runtime, after the runtime has ended, while unwinding.
///
/// The accessors do no I/O and use a clock that includes suspend time. They may report a loss slightly early, never
/// late.
///
/// Only the [`fence`](Guard::fence) protects against a holder that acts too late, such as a process that was paused:
/// send it with every side effect, and let the resource reject lower ones.
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// # let locks = stanchion::Locks::open("memory:").await?;
/// # async fn write(_row: u32, _fence: stanchion::Fence) {}
/// let guard = locks.lock("import").await?;
/// for row in 0..3 {
///     guard.check()?; // stops if the lock is lost
///     write(row, guard.fence()).await;
/// }
/// guard.release().await?;
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
#[derive(Debug)]
#[must_use = "dropping a guard releases the lock"]
pub struct Guard {
    handle: Arc<Handle>,
    hold: Arc<Hold>,
    at_release: Mutex<AtRelease>,
    /// The guard was released or detached, so dropping it releases nothing.
    spent: bool,
}

/// The effects of a release besides freeing the key.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct AtRelease {
    pub(crate) cooldown: Option<Duration>,
    /// Whether the hold may stay in this process.
    pub(crate) may_linger: bool,
}

/// The result of a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Released {
    /// The hold ended with this call.
    Now,
    /// The hold had been lost before. The resource may have rejected its last writes.
    AlreadyLost,
}

impl Guard {
    pub(crate) fn new(handle: Arc<Handle>, hold: Arc<Hold>, at_release: AtRelease) -> Self {
        Self { handle, hold, at_release: Mutex::new(at_release), spent: false }
    }

    pub(crate) fn hold(&self) -> &Arc<Hold> {
        &self.hold
    }

    fn at_release(&self) -> MutexGuard<'_, AtRelease> {
        self.at_release.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the hold in this process after its release, if it may linger. Returns the cooldown for a release in the store
    /// otherwise.
    fn linger(&self) -> ControlFlow<(), Option<Duration>> {
        let at_release = *self.at_release();
        if at_release.may_linger {
            if at_release.cooldown.is_some() {
                linger::remove(self.shared(), &self.hold);
            } else if linger::give_back(self.shared(), &self.hold, || self.report_released()) {
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(at_release.cooldown)
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.handle.shared
    }

    /// Returns the key.
    pub fn key(&self) -> &Key {
        &self.hold.key
    }

    /// Returns the fence of this hold. Send it with every side effect.
    pub fn fence(&self) -> Fence {
        self.hold.fence
    }

    /// Returns whether the lock is held, by the holder's clock. Does no I/O.
    ///
    /// It is `false` in a forked child, because the parent holds the lock.
    pub fn is_held(&self) -> bool {
        self.shared().is_own_process() && self.loss().is_none()
    }

    /// Returns why the lock was lost, or `None` while it is held. Does no I/O.
    pub fn loss(&self) -> Option<LossCause> {
        let cause = self.hold.ended(self.shared().clock.now())?;
        if !self.shared().is_own_process() {
            // The parent announces the loss. A forked child shares the parent's connections and must not act on them.
            return Some(cause);
        }
        // The first caller that sees the loss announces it. The loss is final from here on, even if the keeper has not
        // noticed it yet.
        self.shared().lose(&self.hold, cause, None);
        Some(cause)
    }

    /// Returns the time until the lock is lost unless something renews it. Does no I/O.
    ///
    /// It is zero after a loss, and `None` if the hold ends only with the process.
    pub fn remaining(&self) -> Option<Duration> {
        self.until(self.hold.stop_by())
    }

    /// Returns the time for which nobody else can get the key. Does no I/O.
    ///
    /// This is longer than [`remaining`](Guard::remaining) by the time in which a holder stops after a loss. `None` if
    /// the hold ends only with the process.
    pub fn valid_for(&self) -> Option<Duration> {
        let until = self.hold.valid_until();
        (until != BootTime::NEVER).then(|| until.since(self.shared().clock.now()))
    }

    fn until(&self, end: BootTime) -> Option<Duration> {
        if !self.is_held() {
            return Some(Duration::ZERO);
        }
        (end != BootTime::NEVER).then(|| end.since(self.shared().clock.now()))
    }

    /// Returns an error if the lock is lost. Does no I/O.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`]; [`ErrorKind::Unsupported`] in a forked child, because the parent holds the lock.
    pub fn check(&self) -> Result<()> {
        self.shared().check_process().map_err(|error| self.name(error))?;
        self.loss().map_or(Ok(()), |cause| Err(self.lost_error(cause)))
    }

    /// Waits until the lock is lost, and returns why.
    ///
    /// It returns before anyone else can get the key, without a network. It never returns for a lock that is released
    /// in time.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// # let locks = stanchion::Locks::open("memory:").await?;
    /// # async fn work() {}
    /// let guard = locks.lock("import").await?;
    /// tokio::select! {
    ///     () = work() => guard.release().await.map(drop)?,
    ///     cause = guard.lost() => eprintln!("stopped: {cause}"),
    /// }
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    ///
    /// # Cancel safety
    /// A dropped future misses nothing, because a loss is final.
    pub async fn lost(&self) -> LossCause {
        loop {
            if let Some(cause) = self.loss() {
                return cause;
            }
            tokio::select! {
                () = self.hold.lost_token().cancelled() => {}
                // The keeper announces losses. If its thread is starved, the clock alone is enough.
                () = self.shared().clock.sleep_until(self.hold.stop_by()) => {}
            }
        }
    }

    /// Returns a token that is cancelled when the lock is lost. Pass it to code that knows nothing of guards.
    pub fn cancel_token(&self) -> CancellationToken {
        self.hold.lost_token().child_token()
    }

    /// Returns the reason if the handle is draining, so that the holder can finish soon.
    pub fn draining(&self) -> Option<&str> {
        self.handle.shared.lifecycle.drain_reason()
    }

    /// Sets the remaining time of a fixed lifetime, or of `max_hold`, to `ttl` from now. The new time may be shorter.
    ///
    /// The holder can use all of that time, as with [`ttl`](crate::LockRequest::ttl), also if the request used
    /// [`expires_after`](crate::LockRequest::expires_after).
    ///
    /// # Errors
    /// - [`ErrorKind::Lost`] if the lock is lost, or the store no longer has the hold.
    /// - [`ErrorKind::InvalidArgument`] if the hold has no deadline, or `ttl` is out of range.
    /// - Any other error of the store. The old deadline then applies. If the answer to an extension was lost, the store
    ///   may apply that extension late: from then on, this guard does not trust any extension for longer than that one.
    ///
    /// # Cancel safety
    /// If the future is dropped, the store may or may not have applied the new deadline. The guard uses the earlier of
    /// the two.
    pub async fn extend(&self, ttl: Duration) -> Result<()> {
        check_duration("the new ttl", ttl).map_err(|error| self.name(error))?;
        self.check()?;
        if !self.hold.has_deadline() {
            let message = "this hold lasts as long as its session and has no deadline to extend; request it with a ttl";
            return Err(self.name(Error::new(ErrorKind::InvalidArgument, message)));
        }
        let shared = self.shared();
        shared.check_process()?;
        let _one_at_a_time = self.hold.extending.lock().await;
        let mut sent_at = shared.clock.now();
        let drift = shared.config.drift;
        let in_store = drift.lengthen(ttl);
        let before = self.hold.extension_sent(in_store);
        // The store may apply a shorter lifetime before its answer arrives.
        let at_least = sent_at.after(drift.shorten(in_store));
        if at_least < self.hold.own_until() {
            self.hold.extend(sent_at, at_least, ttl);
            shared.command(Command::Watch(self.hold.clone()));
        }
        let step = shared.step(|| {
            sent_at = shared.clock.now();
            self.hold.may_last_until(sent_at.after(in_store));
            shared.store.extend(&self.hold.key, self.hold.token, in_store)
        });
        let step = step.await;
        if !step.unanswered {
            self.hold.extension_answered(before);
        }
        let reply = step.result.map_err(|error| self.name(error))?;
        match reply.outcome {
            ExtendOutcome::Extended => {
                let until = sent_at.after(drift.shorten(self.hold.usable_extension(in_store)));
                if !self.hold.extend(shared.clock.now(), until, ttl) {
                    return self.check();
                }
                shared.command(Command::Watch(self.hold.clone()));
                shared.observer.publish(|| Event::Extended { key: self.key().clone(), fence: self.fence(), ttl });
                Ok(())
            }
            ExtendOutcome::NotHeld => {
                shared.lose(&self.hold, LossCause::Missing, None);
                self.check()
            }
        }
    }

    /// Reports that the work under the lock makes progress: see
    /// [`heartbeat_within`](crate::LockRequest::heartbeat_within).
    ///
    /// Does no I/O, and is cheap enough for a loop. Once per session ttl it also has the keeper verify the hold in the
    /// store.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`] if the lock is lost, [`ErrorKind::Draining`] if the handle is draining.
    pub fn heartbeat(&self) -> Result<()> {
        self.check()?;
        let now = self.shared().clock.now();
        self.hold.heartbeat(now);
        if self.hold.is_check_due(now, self.shared().config.session_ttl) {
            self.confirm_soon();
        }
        if self.shared().lifecycle.has_reached(Phase::Draining) {
            return Err(self.shared().draining_error().with_key(self.key()));
        }
        Ok(())
    }

    /// Records a heartbeat, without any check.
    pub(crate) fn note_heartbeat(&self, now: BootTime) {
        self.hold.heartbeat(now);
    }

    /// Sleeps under the lock and sends [`heartbeat`](Guard::heartbeat)s. It returns early, with an error, if the lock
    /// is lost or the handle drains.
    ///
    /// # Errors
    /// The errors of [`Guard::heartbeat`].
    ///
    /// # Cancel safety
    /// A dropped future only stops sleeping.
    pub async fn sleep(&self, span: Duration) -> Result<()> {
        let shared = self.shared();
        let until = shared.clock.now().after(span);
        let interval = self.hold.heartbeat_within.map_or(shared.config.session_ttl, |within| within / 3);
        loop {
            self.heartbeat()?;
            let now = shared.clock.now();
            if now >= until {
                return Ok(());
            }
            tokio::select! {
                _ = self.lost() => {}
                () = shared.draining() => {}
                () = shared.clock.sleep_until(until.min(now.after(interval))) => {}
            }
        }
    }

    /// Queries the store whether it still has the hold.
    ///
    /// Safety does not need this, because losses are reported and the resource checks the fence. It is for callers that
    /// want to know at once.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`] if the hold is gone or was lost before; any error of the store, which says nothing about the
    /// hold.
    ///
    /// # Cancel safety
    /// Only reads.
    pub async fn verify(&self) -> Result<()> {
        self.check()?;
        let shared = self.shared();
        shared.check_process()?;
        let check = HoldCheck::new(self.hold.clone());
        shared.confirm(&check).await.map_err(|error| self.name(error))?;
        self.check()
    }

    /// Has the keeper query the store for this hold.
    pub(crate) fn confirm_soon(&self) {
        self.shared().command(Command::Verify(HoldCheck::new(self.hold.clone())));
    }

    /// Sets how long the key stays closed after the release, in place of
    /// [`LockRequest::cooldown`](crate::LockRequest::cooldown).
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if the time is out of range.
    pub fn set_cooldown(&self, closed: Option<Duration>) -> Result<()> {
        if let Some(closed) = closed {
            check_duration("the cooldown", closed).map_err(|error| self.name(error))?;
        }
        self.at_release().cooldown = closed;
        Ok(())
    }

    /// Releases the lock in the store when this guard is released, so that it does not [linger](crate::LockRequest::linger).
    pub fn forbid_linger(&self) {
        self.at_release().may_linger = false;
        if self.shared().is_own_process() {
            linger::remove(self.shared(), &self.hold);
        }
    }

    /// Releases the lock, and returns whether it was still held.
    ///
    /// # Errors
    /// Any error of the store. The lock is given up all the same: the keeper keeps releasing it.
    ///
    /// # Cancel safety
    /// If the future is dropped, the keeper finishes the release.
    pub async fn release(mut self) -> Result<Released> {
        let shared = self.shared().clone();
        shared.check_process()?;
        if let Some(cause) = self.loss() {
            self.spent = true;
            self.hold.begin_release();
            self.end_early(cause);
            return Ok(Released::AlreadyLost);
        }
        self.hold.begin_release();
        let ControlFlow::Continue(cooldown) = self.linger() else {
            self.spent = true;
            return Ok(Released::Now);
        };
        // If this future is dropped, the guard's own drop hands the token to the keeper.
        let step = shared.step(|| shared.store.release(&self.hold.key, self.hold.token, cooldown)).await;
        let reply = step.result.map_err(|error| self.name(error))?;
        self.spent = true;
        if self.hold.unanswered_until.is_some_and(|until| reply.time <= until) {
            // An acquire request of this token may still reach the store. The keeper cleans up after that too.
            shared.clean_up(Cleanup::of_hold(&self.hold, None));
        } else {
            shared.tokens.forget(self.hold.token);
        }
        let repeated_in_time = step.unanswered && self.hold.ended(shared.clock.now()).is_none();
        match reply.outcome {
            EndOutcome::Released => self.report_released(),
            // The answer to the first attempt was lost, so this call released the hold.
            EndOutcome::Nothing | EndOutcome::Dequeued if repeated_in_time => self.report_released(),
            EndOutcome::Nothing | EndOutcome::Dequeued => {
                shared.lose(&self.hold, LossCause::Missing, None);
                return Ok(Released::AlreadyLost);
            }
        }
        Ok(Released::Now)
    }

    /// Releases a lost hold before its grace is over, because its holder has stopped.
    fn end_early(&self, cause: LossCause) {
        if cause.leaves_grace() {
            self.shared().clean_up(Cleanup::of_hold(&self.hold, None));
        }
    }

    fn report_released(&self) {
        let held = self.shared().clock.now().since(self.hold.since);
        self.shared().observer.publish(|| Event::Released { key: self.key().clone(), fence: self.fence(), held });
    }

    /// Returns the token of this hold, with which another handle can [release](crate::Locks::release) or
    /// [adopt](crate::Locks::adopt) it. The guard keeps the lock until then, and is lost afterwards.
    ///
    /// Keep the token secret: anybody with it can release the lock. In a forked child it identifies no hold, because the
    /// guards belong to the parent.
    ///
    /// ```
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// # let locks = stanchion::Locks::open("memory:").await?;
    /// let guard = locks.lock("import").await?;
    /// locks.release(&guard.token(), None).await?; // what an operator's tool would do
    /// assert!(!guard.is_held());
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    pub fn token(&self) -> Token {
        let id = if self.shared().is_own_process() { self.hold.token } else { TokenId::from_bytes([0; 16]) };
        Token::new(self.hold.key.clone(), id, self.hold.session.id)
    }

    /// Gives up the guard without releasing the lock, and returns the token with which
    /// [`Locks::adopt`](crate::Locks::adopt) takes the hold over.
    ///
    /// - A fixed lifetime continues and outlives this process. By default it lasts a little longer than its ttl;
    ///   [`LockRequest::expires_after`](crate::LockRequest::expires_after) makes it exact.
    /// - A hold that is bound to the session lives as long as the session.
    /// - `max_hold` still applies in the store. `heartbeat_within` ends with the guard.
    ///
    /// In a forked child the guards belong to the parent: the returned token identifies no hold and cannot be adopted.
    pub fn detach(mut self) -> Token {
        if self.shared().is_own_process() {
            self.spent = true;
            self.hold.begin_release();
            linger::remove(self.shared(), &self.hold);
            self.shared().detach(&self.hold);
        }
        self.token()
    }

    pub(crate) fn store_name(&self) -> &'static str {
        self.shared().capabilities.name
    }

    fn lost_error(&self, cause: LossCause) -> Error {
        self.name(Error::lost(cause))
    }

    fn name(&self, error: Error) -> Error {
        error.with_key(&self.hold.key).with_store(self.store_name())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // A forked child does not own its parent's holds.
        if self.spent || !self.shared().is_own_process() {
            return;
        }
        if let Some(cause) = self.loss() {
            self.hold.begin_release();
            return self.end_early(cause);
        }
        self.hold.begin_release();
        let ControlFlow::Continue(cooldown) = self.linger() else { return };
        let mut cleanup = Cleanup::of_hold(&self.hold, cooldown);
        cleanup.released = Some((self.hold.fence, self.hold.since));
        self.shared().clean_up(cleanup);
    }
}
