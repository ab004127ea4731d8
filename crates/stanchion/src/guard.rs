//! Guards: what a holder has in its hand.

use std::sync::Arc;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::clock::BootTime;
use crate::command::{Cleanup, Command, HoldCheck};
use crate::error::{Error, ErrorKind, LossCause, Result};
use crate::event::Event;
use crate::fence::Fence;
use crate::key::Key;
use crate::lease::Hold;
use crate::locks::{Locks, check_duration};
use crate::shared::Shared;
use crate::store::{EndOutcome, ExtendOutcome};
use crate::token::{Token, TokenId};

/// A hold, as long as it is not dropped. Dropping it releases in the background, from anywhere: without a runtime, after
/// the runtime has ended, while unwinding.
///
/// What it says of itself is local, without I/O, on a clock that counts suspended time; it errs on the early side.
/// Only the fence protects against a holder that acts too late: send it with every side effect.
#[derive(Debug)]
#[must_use = "dropping a guard releases the lock"]
pub struct Guard {
    locks: Locks,
    hold: Arc<Hold>,
    cooldown: Mutex<Option<Duration>>,
    /// Nothing is left to release: it was released or detached.
    spent: bool,
}

/// What a release found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Released {
    /// The hold ended with this call.
    Now,
    /// It had been lost before. Its last effects may have been fenced out.
    AlreadyLost,
}

impl Guard {
    pub(crate) fn new(locks: Locks, hold: Arc<Hold>, cooldown: Option<Duration>) -> Self {
        Self { locks, hold, cooldown: Mutex::new(cooldown), spent: false }
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.locks.handle.shared
    }

    /// The key.
    pub fn key(&self) -> &Key {
        &self.hold.key
    }

    /// The fence of this hold: send it with every side effect.
    pub fn fence(&self) -> Fence {
        self.hold.fence
    }

    /// Whether the lock is still believed to be held. Local. `false` in a forked child: the hold is its parent's.
    pub fn is_held(&self) -> bool {
        self.shared().is_own_process() && self.loss().is_none()
    }

    /// Why the hold is lost, if it is. Local.
    pub fn loss(&self) -> Option<LossCause> {
        let cause = self.hold.ended(self.shared().clock.now())?;
        if !self.shared().is_own_process() {
            // The parent announces it. A forked child shares its connections and must not act on them.
            return Some(cause);
        }
        // Who looks first announces it: lost is final from here on, whether or not the keeper has come to it.
        self.shared().lose(&self.hold, cause, None);
        Some(cause)
    }

    /// How long until the hold is lost if nothing renews it; zero when it is lost; `None` if nothing but the end of the
    /// process ends it. Local.
    pub fn remaining(&self) -> Option<Duration> {
        self.until(self.hold.stop_by())
    }

    /// How long nobody else can get the key: later than [`remaining`](Guard::remaining) by the time that a holder has to
    /// stop. `None` if nothing but the end of the process ends it. Local.
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

    /// An error if the hold is lost. Local.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`]; [`ErrorKind::Unsupported`] in a forked child, because the hold is its parent's.
    pub fn check(&self) -> Result<()> {
        self.shared().check_process().map_err(|error| self.name(error))?;
        self.loss().map_or(Ok(()), |cause| Err(self.lost_error(cause)))
    }

    /// Waits until the hold is lost. It fires before anybody else can have the key, with no network needed; it does not
    /// fire for a guard that is released.
    ///
    /// # Cancel safety
    /// A dropped future loses nothing: lost is final.
    pub async fn lost(&self) -> LossCause {
        loop {
            if let Some(cause) = self.loss() {
                return cause;
            }
            tokio::select! {
                () = self.hold.lost_token().cancelled() => {}
                // The keeper announces; if its thread is starved, the clock is enough.
                () = self.shared().clock.sleep_until(self.hold.stop_by()) => {}
            }
        }
    }

    /// Fires when the hold is lost. For code that knows nothing of guards.
    pub fn cancel_token(&self) -> CancellationToken {
        self.hold.lost_token().child_token()
    }

    /// The reason, if the handle is draining: finish soon.
    pub fn draining(&self) -> Option<&str> {
        self.locks.draining()
    }

    /// Sets the remaining time of a fixed lifetime, or of `max_hold`, to `ttl` from now; shorter than before, if so wished. The
    /// holder has all of that time, as with [`ttl`](crate::LockRequest::ttl), whatever the request said.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`] if the hold is lost, also when the store says so; [`ErrorKind::InvalidArgument`] if the hold
    /// has no deadline; the store's faults, after which the old deadline counts. An extension without an answer may reach
    /// the store late: from then on no extension of this hold is believed for longer than that one asked for.
    ///
    /// # Cancel safety
    /// If the future is dropped the deadline may have been set in the store; this guard goes by the old one, or by the
    /// new one where that is earlier.
    pub async fn extend(&self, ttl: Duration) -> Result<()> {
        check_duration("the new ttl", ttl).map_err(|error| self.name(error))?;
        self.check()?;
        if !self.hold.has_deadline() {
            let message = "this hold lasts as long as its session and has no deadline to extend; ask for it with a ttl";
            return Err(self.name(Error::new(ErrorKind::InvalidArgument, message)));
        }
        let shared = self.shared();
        shared.check_process()?;
        let _one_at_a_time = self.hold.extending.lock().await;
        let mut sent_at = shared.clock.now();
        let drift = shared.config.drift;
        let in_store = drift.lengthen(ttl);
        let before = self.hold.extension_sent(in_store);
        // A shorter lifetime may count before its answer comes.
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
                shared.observer.tell(|| Event::Extended { key: self.key().clone(), fence: self.fence(), ttl });
                Ok(())
            }
            ExtendOutcome::NotHeld => {
                shared.lose(&self.hold, LossCause::Missing, None);
                self.check()
            }
        }
    }

    /// A sign of life of the work under the lock: see [`heartbeat_within`](crate::LockRequest::heartbeat_within). Local,
    /// cheap enough for a loop: once in a session's ttl the keeper is told to ask the store whether the hold is still there.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`] if the hold is lost, [`ErrorKind::Draining`] if the handle is draining.
    pub fn heartbeat(&self) -> Result<()> {
        self.check()?;
        let now = self.shared().clock.now();
        self.hold.heartbeat(now);
        if self.hold.is_check_due(now, self.shared().config.session_ttl) {
            self.confirm_soon();
        }
        if self.shared().draining().is_cancelled() {
            return Err(self.shared().draining_error().with_key(self.key()));
        }
        Ok(())
    }

    /// A sign of life, and nothing else.
    pub(crate) fn note_heartbeat(&self, now: BootTime) {
        self.hold.heartbeat(now);
    }

    /// Sleeps under the lock, with [`heartbeat`](Guard::heartbeat)s. It ends early, with an error, when the hold is lost or the
    /// handle drains.
    ///
    /// # Errors
    /// As [`Guard::heartbeat`].
    ///
    /// # Cancel safety
    /// A dropped future stops sleeping, and nothing else.
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
                () = shared.draining().cancelled() => {}
                () = shared.clock.sleep_until(until.min(now.after(interval))) => {}
            }
        }
    }

    /// Asks the store whether the hold is there. Not needed for safety: losses are told, and the fence decides. For those who
    /// want to know now.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`] if it is not, or is lost; the store's faults, which say nothing about the hold.
    ///
    /// # Cancel safety
    /// Reads only.
    pub async fn verify(&self) -> Result<()> {
        self.check()?;
        let shared = self.shared();
        shared.check_process()?;
        let check = HoldCheck::new(self.hold.clone());
        shared.confirm(&check).await.map_err(|error| self.name(error))?;
        self.check()
    }

    /// Has the keeper ask the store for it.
    pub(crate) fn confirm_soon(&self) {
        self.shared().command(Command::Verify(HoldCheck::new(self.hold.clone())));
    }

    /// Sets how long the key stays closed after the release, in place of what the request said.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a time out of range.
    pub fn set_cooldown(&self, closed: Option<Duration>) -> Result<()> {
        if let Some(closed) = closed {
            check_duration("the cooldown", closed).map_err(|error| self.name(error))?;
        }
        *self.cooldown.lock().unwrap_or_else(PoisonError::into_inner) = closed;
        Ok(())
    }

    /// Releases and tells what was found.
    ///
    /// # Errors
    /// The store's faults. The hold is given up all the same: the keeper goes on ending it.
    ///
    /// # Cancel safety
    /// If the future is dropped the keeper finishes the release.
    pub async fn release(mut self) -> Result<Released> {
        let shared = self.shared().clone();
        shared.check_process()?;
        if let Some(cause) = self.loss() {
            self.spent = true;
            self.hold.begin_release();
            self.end_early(cause);
            return Ok(Released::AlreadyLost);
        }
        let cooldown = *self.cooldown.lock().unwrap_or_else(PoisonError::into_inner);
        self.hold.begin_release();
        // If this future is dropped, the guard's own drop hands the token to the keeper.
        let step = shared.step(|| shared.store.release(&self.hold.key, self.hold.token, cooldown)).await;
        let reply = step.result.map_err(|error| self.name(error))?;
        self.spent = true;
        if self.hold.unanswered_until.is_some_and(|until| reply.time <= until) {
            // A request of this token may still come: the keeper ends that too.
            shared.clean_up(Cleanup::of_hold(&self.hold, None));
        } else {
            shared.tokens.forget(self.hold.token);
        }
        let repeated_in_time = step.unanswered && self.hold.ended(shared.clock.now()).is_none();
        match reply.outcome {
            EndOutcome::Released => self.tell_released(),
            // The first answer was lost: it was this call that released it.
            EndOutcome::Nothing | EndOutcome::Dequeued if repeated_in_time => self.tell_released(),
            EndOutcome::Nothing | EndOutcome::Dequeued => {
                shared.lose(&self.hold, LossCause::Missing, None);
                return Ok(Released::AlreadyLost);
            }
        }
        Ok(Released::Now)
    }

    /// Frees the key before its grace is over: its holder has stopped.
    fn end_early(&self, cause: LossCause) {
        if cause.leaves_grace() {
            self.shared().clean_up(Cleanup::of_hold(&self.hold, None));
        }
    }

    fn tell_released(&self) {
        let held = self.shared().clock.now().since(self.hold.since);
        self.shared().observer.tell(|| Event::Released { key: self.key().clone(), fence: self.fence(), held });
    }

    /// Lets go of the hold without releasing it: [`Locks::adopt`] takes it up again with the token.
    ///
    /// A fixed lifetime runs on, and outlives this process: by default for a little longer than its ttl
    /// ([`LockRequest::expires_after`](crate::LockRequest::expires_after) is for an exact time). A hold bound to the session lives as long as that does.
    /// `max_hold` still counts in the store; `heartbeat_within` ends with the guard.
    ///
    /// A child that was forked has its parent's guards, and holds nothing: what it detaches is nobody's, and cannot be taken
    /// up.
    pub fn detach(mut self) -> Token {
        if !self.shared().is_own_process() {
            return Token::new(self.hold.key.clone(), TokenId::from_bytes([0; 16]), self.hold.session.id);
        }
        self.spent = true;
        self.hold.begin_release();
        self.shared().detach(&self.hold);
        Token::new(self.hold.key.clone(), self.hold.token, self.hold.session.id)
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
        // A forked child does not own what its parent holds.
        if self.spent || !self.shared().is_own_process() {
            return;
        }
        if let Some(cause) = self.loss() {
            self.hold.begin_release();
            return self.end_early(cause);
        }
        let cooldown = *self.cooldown.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.hold.begin_release();
        let mut cleanup = Cleanup::of_hold(&self.hold, cooldown);
        cleanup.released = Some((self.hold.fence, self.hold.since));
        self.shared().clean_up(cleanup);
    }
}
