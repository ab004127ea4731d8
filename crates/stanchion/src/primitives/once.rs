//! One run for all who ask.

use std::ops::Deref;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::runs::{self, Found, RunRecord};
use crate::clock::BootTime;
use crate::error::{Error, ErrorKind, LossCause, Result};
use crate::event::Event;
use crate::fence::Fence;
use crate::guard::{Guard, Released};
use crate::key::Key;
use crate::locks::{Locks, check_duration};
use crate::request::LockRequest;

/// Has something done once by whoever comes first. Made by [`Locks::once`](crate::Locks::once).
///
/// Of all who ask at the same time one runs; the others skip it, or [`wait`](OnceRequest::wait) until it is done. Who comes
/// later skips it too, for as long as the run says: a [`cooldown`](OnceRequest::cooldown) after its end, an
/// [`every`](OnceRequest::every) after its beginning, or its [`slot`](OnceRequest::slot) of a schedule. A record of the last
/// run decides that, by the store's clock; [`Locks::last_run`](crate::Locks::last_run) reads it. It is kept for a day, or for
/// as long as the run closes the key. A run that fails, or whose process dies, does not count: the next who asks runs.
///
/// ```
/// use std::time::Duration;
/// use stanchion::OnceOutcome;
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// # let locks = stanchion::Locks::open("memory:").await?;
/// let report = || locks.once("report").cooldown(Duration::from_secs(300));
/// assert!(matches!(report().run(async |_| Ok(7)).await?, OnceOutcome::Ran(7)));
/// let again: OnceOutcome<i32> = report().run(async |_| unreachable!()).await?;
/// assert!(matches!(again, OnceOutcome::Skipped { .. }));
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
#[derive(Clone, Debug)]
#[must_use = "a request does nothing until it is run"]
pub struct OnceRequest {
    request: LockRequest,
    cooldown: Option<Duration>,
    every: Option<Duration>,
    slot: Option<u64>,
    waits: bool,
    failures_count: bool,
}

/// What came of a request to run once.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnceOutcome<T> {
    /// It was run here.
    Ran(T),
    /// It was not run.
    Skipped {
        /// The run for which it was skipped; while it runs elsewhere, the last run that has ended, if it is known.
        last: Option<RunRecord>,
        /// It runs elsewhere now.
        is_running: bool,
        /// How long until it may be run again, if time decides that.
        opens_in: Option<Duration>,
    },
    /// Somebody else has done it, before or while this waited ([`OnceRequest::wait`]).
    DoneElsewhere {
        /// That run.
        last: RunRecord,
    },
}

impl OnceRequest {
    pub(crate) fn new(request: LockRequest) -> Self {
        Self { request, cooldown: None, every: None, slot: None, waits: false, failures_count: false }
    }

    /// Not again for this long after the end of a run. A body can set it too, from what it found: [`OnceGuard::set_cooldown`].
    pub fn cooldown(mut self, closed: Duration) -> Self {
        self.cooldown = Some(closed);
        self
    }

    /// Once in every such period, for schedules on several machines that fire at about the same time: not again until nine
    /// tenths of it have passed since the last run began. The tenth is for clocks that differ and schedulers that are late.
    pub fn every(mut self, period: Duration) -> Self {
        self.every = Some(period);
        self
    }

    /// For this slot of a schedule: not if a run for this slot, or for a later one, has been done. Any number that rises from
    /// slot to slot: the hour or the day that it is due. Clocks do not matter then, but for naming the slot.
    pub fn slot(mut self, slot: u64) -> Self {
        self.slot = Some(slot);
        self
    }

    /// Waits until it is done, here or elsewhere, instead of skipping it while it runs. If the other fails, this runs.
    pub fn wait(mut self) -> Self {
        self.waits = true;
        self
    }

    /// The same, no longer than this, then [`ErrorKind::Timeout`].
    pub fn wait_at_most(mut self, limit: Duration) -> Self {
        self.request = self.request.wait(limit);
        self.wait()
    }

    /// A run that fails counts like one that succeeds: it is not tried again before its time.
    pub fn failures_count(mut self) -> Self {
        self.failures_count = true;
        self
    }

    /// As [`LockRequest::max_hold`].
    pub fn max_hold(mut self, longest: Duration) -> Self {
        self.request = self.request.max_hold(longest);
        self
    }

    /// As [`LockRequest::heartbeat_within`].
    pub fn heartbeat_within(mut self, silence: Duration) -> Self {
        self.request = self.request.heartbeat_within(silence);
        self
    }

    /// As [`LockRequest::metadata`].
    pub fn metadata(mut self, text: impl Into<String>) -> Self {
        self.request = self.request.metadata(text);
        self
    }

    /// As [`LockRequest::trace`].
    pub fn trace(mut self, text: impl Into<String>) -> Self {
        self.request = self.request.trace(text);
        self
    }

    /// As [`LockRequest::cancel`].
    pub fn cancel(mut self, token: CancellationToken) -> Self {
        self.request = self.request.cancel(token);
        self
    }

    /// Runs `body`, unless it is not to be run now. Its error is returned as it is, and its run does not count. As with
    /// [`LockRequest::run`] the body's future is dropped when the lock is lost, and the run does not count.
    ///
    /// If the run cannot be recorded that is told by an event and nothing else, because it was done: it may be done again.
    ///
    /// # Errors
    /// The body's; as [`LockRequest::run`].
    ///
    /// # Cancel safety
    /// A dropped future drops the body and releases; the run does not count.
    pub async fn run<T, E>(self, body: impl AsyncFnOnce(&OnceGuard) -> Result<T, E>) -> Result<OnceOutcome<T>, E>
    where
        E: From<Error>,
    {
        let turn = match self.begin().await? {
            OnceOutcome::Ran(turn) => turn,
            OnceOutcome::Skipped { last, is_running, opens_in } => {
                return Ok(OnceOutcome::Skipped { last, is_running, opens_in });
            }
            OnceOutcome::DoneElsewhere { last } => return Ok(OnceOutcome::DoneElsewhere { last }),
        };
        let result = tokio::select! {
            biased;
            result = body(&turn) => result,
            cause = turn.lost() => return Err(turn.lost_error(cause).into()),
        };
        match result {
            Ok(value) => {
                if turn.finish(true).await? == Released::AlreadyLost {
                    let message = "lost while it was in use: the store no longer has it";
                    return Err(Error::new(ErrorKind::Lost(LossCause::Missing), message).into());
                }
                Ok(OnceOutcome::Ran(value))
            }
            Err(error) => {
                // The body's error is what counts, whatever becomes of the release.
                let _told_by_an_event = turn.finish(false).await;
                Err(error)
            }
        }
    }

    /// The turn to run, for those who cannot put the body into a closure: [`OnceOutcome::Ran`] has it, and
    /// [`OnceGuard::finish`] ends it.
    ///
    /// # Errors
    /// As the request for a lock.
    ///
    /// # Cancel safety
    /// A dropped future leaves nothing behind.
    pub async fn begin(self) -> Result<OnceOutcome<OnceGuard>> {
        for (what, span) in [("the cooldown", self.cooldown), ("the period", self.every)] {
            if let Some(span) = span {
                check_duration(what, span)?;
            }
        }
        let locks = &self.request.locks;
        let key = locks.key(&self.request.key)?;
        let first = runs::last_run(locks, &key).await?;
        let before = first.done.as_ref().map(|run| run.fence);
        if let Some(outcome) = self.done(&first, before) {
            return Ok(outcome);
        }
        let guard =
            if self.waits { Some(self.request.clone().await?) } else { self.request.clone().try_acquire().await? };
        let Some(guard) = guard else {
            return Ok(OnceOutcome::Skipped { last: first.run, is_running: true, opens_in: None });
        };
        // It may have been done before this had the lock.
        let found = runs::last_run(locks, &key).await?;
        if let Some(outcome) = self.done(&found, before) {
            guard.release().await?;
            return Ok(outcome);
        }
        let shared = &locks.handle.shared;
        let (began, wall) = (shared.clock.now(), shared.clock.wall());
        let Self { cooldown, every, slot, failures_count, .. } = self;
        let cooldown = Mutex::new(cooldown);
        let locks = self.request.locks;
        Ok(OnceOutcome::Ran(OnceGuard { locks, guard, key, began, wall, cooldown, every, slot, failures_count, found }))
    }

    /// Why it is not to be run, if so: the last run that counts closes it still or is another one than before this call, or a
    /// run for this slot or a later one was done.
    fn done<T>(&self, found: &Found, before: Option<Fence>) -> Option<OnceOutcome<T>> {
        let done = found.done.as_ref()?;
        let opens_in = done.closed_still_for();
        let last = match self.slot {
            _ if opens_in.is_some() => done,
            Some(slot) => found.slot_done.as_ref().filter(|done| done.slot >= Some(slot))?,
            None => Some(done).filter(|done| Some(done.fence) != before)?,
        };
        let last = last.clone();
        Some(if self.waits {
            OnceOutcome::DoneElsewhere { last }
        } else {
            OnceOutcome::Skipped { last: Some(last), is_running: false, opens_in }
        })
    }
}

/// A turn to run: what the body of [`OnceRequest::run`] gets. It has what its [`Guard`] has.
#[derive(Debug)]
#[must_use = "a turn that is dropped releases the lock, and its run does not count"]
pub struct OnceGuard {
    locks: Locks,
    guard: Guard,
    key: Key,
    began: BootTime,
    wall: std::time::SystemTime,
    cooldown: Mutex<Option<Duration>>,
    every: Option<Duration>,
    slot: Option<u64>,
    failures_count: bool,
    found: Found,
}

impl Deref for OnceGuard {
    type Target = Guard;

    fn deref(&self) -> &Guard {
        &self.guard
    }
}

impl OnceGuard {
    /// The run before this one, if it is known.
    pub fn last(&self) -> Option<&RunRecord> {
        self.found.run.as_ref()
    }

    /// Sets how long it is not to be run again after this run, in place of what the request said. `None`: not at all.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a time out of range.
    pub fn set_cooldown(&self, closed: Option<Duration>) -> Result<()> {
        if let Some(closed) = closed {
            check_duration("the cooldown", closed)?;
        }
        *self.cooldown.lock().unwrap_or_else(PoisonError::into_inner) = closed;
        Ok(())
    }

    /// Ends the turn: records the run, and releases.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`] if the lock was lost before: then the run does not count. As [`Guard::release`].
    ///
    /// # Cancel safety
    /// If the future is dropped the run may have been recorded or not; the keeper finishes the release.
    pub async fn finish(self, succeeded: bool) -> Result<Released> {
        self.guard.check()?;
        let shared = self.locks.handle.shared.clone();
        let took = shared.clock.now().since(self.began);
        let counts = succeeded || self.failures_count;
        let cooldown = self.cooldown.into_inner().unwrap_or_else(PoisonError::into_inner);
        let since_began = self.every.map(|period| (period / 10 * 9).saturating_sub(took));
        let closed_for = cooldown.max(since_began).filter(|_| counts).unwrap_or_default();
        let run = RunRecord {
            slot: self.slot,
            began: self.wall,
            took,
            age: Duration::ZERO,
            succeeded,
            closed_for,
            owner: shared.config.owner.clone(),
            fence: self.guard.fence(),
            counts,
        };
        if let Err(error) = runs::record(&self.locks, &self.guard, &run, self.found).await {
            let (kind, message) = (error.kind(), format!("the run could not be recorded: {error}"));
            shared.observer.tell(|| Event::Error { kind, key: Some(self.key.clone()), message });
        }
        self.guard.release().await
    }

    fn lost_error(&self, cause: LossCause) -> Error {
        Error::lost(cause).with_key(&self.key).with_store(self.guard.store_name())
    }
}
