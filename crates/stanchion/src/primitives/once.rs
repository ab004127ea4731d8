//! Runs a body once for all callers that request it.

use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::runs::{self, RunHistory, RunRecord};
use crate::clock::BootTime;
use crate::error::{Error, ErrorKind, LossCause, Result};
use crate::event::Event;
use crate::fence::Fence;
use crate::guard::{Guard, Released};
use crate::key::Key;
use crate::limits::check_duration;
use crate::request::LockRequest;
use crate::shared::Shared;

/// A request to do something once. [`Locks::once`](crate::Locks::once) returns one.
///
/// Of all callers at the same time, one runs the body. The others skip it, or [`wait`](OnceRequest::wait) until it is
/// done. Later callers skip it too, for as long as the run says:
///
/// - a [`cooldown`](OnceRequest::cooldown) after its end,
/// - an [`every`](OnceRequest::every) after its start,
/// - its [`slot`](OnceRequest::slot) of a schedule.
///
/// The store keeps a record of the last run, and its clock decides (ADR 15).
/// [`Locks::last_run`](crate::Locks::last_run) reads the record. The store keeps it for a day, or for as long as the run
/// closes the key. A run that fails, or whose process dies, does not count: the next caller runs the body.
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
    is_forced: bool,
}

/// The result of a [`OnceRequest`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnceOutcome<T> {
    /// This call ran the body.
    Ran(T),
    /// This call skipped the body.
    #[non_exhaustive]
    Skipped {
        /// The run because of which the body was skipped. While another caller runs the body, the last finished run.
        last: Option<RunRecord>,
        /// Whether another caller runs the body now.
        is_running: bool,
        /// Time until the body may run again, if a time decides that.
        opens_in: Option<Duration>,
    },
    /// Another caller ran the body, before or while this call waited ([`OnceRequest::wait`]).
    #[non_exhaustive]
    DoneElsewhere {
        /// The run of the other caller.
        last: RunRecord,
    },
}

impl OnceRequest {
    pub(crate) fn new(request: LockRequest) -> Self {
        // A run ends with a record in the store.
        let request = request.linger(Duration::ZERO);
        Self { request, cooldown: None, every: None, slot: None, waits: false, failures_count: false, is_forced: false }
    }

    /// Sets the time after the end of a run in which nobody runs it again. The body can change it:
    /// [`OnceGuard::set_cooldown`].
    pub fn cooldown(mut self, closed: Duration) -> Self {
        self.cooldown = Some(closed);
        self
    }

    /// Allows one run per period, for schedules that fire on several machines at about the same time.
    ///
    /// Nobody runs it again until nine tenths of the period have passed since the last run started. The last tenth
    /// allows for clocks that differ and for late schedulers.
    pub fn every(mut self, period: Duration) -> Self {
        self.every = Some(period);
        self
    }

    /// Runs only if no run for this slot of a schedule, or for a later slot, has been done.
    ///
    /// A slot is any number that rises, such as the hour or the day for which the run is due. Clocks matter only for
    /// choosing the slot.
    pub fn slot(mut self, slot: u64) -> Self {
        self.slot = Some(slot);
        self
    }

    /// Waits until the run is done, here or elsewhere, instead of skipping it. If the other caller fails, this call
    /// runs the body.
    pub fn wait(mut self) -> Self {
        self.waits = true;
        self
    }

    /// Waits as [`wait`](OnceRequest::wait) does, but fails with [`ErrorKind::Timeout`] after `limit`.
    pub fn wait_at_most(mut self, limit: Duration) -> Self {
        self.request = self.request.wait(limit);
        self.wait()
    }

    /// Counts a failed run like a successful one, so that it is not repeated before its time.
    pub fn failures_count(mut self) -> Self {
        self.failures_count = true;
        self
    }

    /// Runs the body although the records of earlier runs say that it is too early. Two callers still do not run it at
    /// the same time.
    ///
    /// The run is recorded like any other.
    pub fn force(mut self) -> Self {
        self.is_forced = true;
        self
    }

    /// Sets [`LockRequest::max_hold`] for the run.
    pub fn max_hold(mut self, longest: Duration) -> Self {
        self.request = self.request.max_hold(longest);
        self
    }

    /// Sets [`LockRequest::heartbeat_within`] for the run.
    pub fn heartbeat_within(mut self, silence: Duration) -> Self {
        self.request = self.request.heartbeat_within(silence);
        self
    }

    /// Sets [`LockRequest::metadata`] for the run.
    pub fn metadata(mut self, text: impl Into<String>) -> Self {
        self.request = self.request.metadata(text);
        self
    }

    /// Sets [`LockRequest::trace`] for the run.
    pub fn trace(mut self, text: impl Into<String>) -> Self {
        self.request = self.request.trace(text);
        self
    }

    /// Fails the request with [`ErrorKind::Cancelled`] when the token fires.
    pub fn cancel(mut self, token: CancellationToken) -> Self {
        self.request = self.request.cancel(token);
        self
    }

    /// Runs `body` unless the rules say to skip it.
    ///
    /// If the body returns an error, the call returns that error, and the run does not count. If the lock is lost, the
    /// body's future is dropped at its next await, as in [`LockRequest::run`], and the run does not count.
    ///
    /// If the store cannot record the run, an event reports that, and the call still succeeds because the body ran.
    /// Another caller may then run it again.
    ///
    /// # Errors
    /// The body's errors, and those of [`LockRequest::run`].
    ///
    /// # Cancel safety
    /// A dropped future drops the body and releases the lock. The run does not count.
    pub async fn run<T, E>(self, body: impl AsyncFnOnce(&OnceGuard) -> Result<T, E>) -> Result<OnceOutcome<T>, E>
    where
        E: From<Error>,
    {
        let guard = match self.begin().await? {
            OnceOutcome::Ran(guard) => guard,
            OnceOutcome::Skipped { last, is_running, opens_in } => {
                return Ok(OnceOutcome::Skipped { last, is_running, opens_in });
            }
            OnceOutcome::DoneElsewhere { last } => return Ok(OnceOutcome::DoneElsewhere { last }),
        };
        let result = tokio::select! {
            biased;
            result = body(&guard) => result,
            cause = guard.lost() => return Err(guard.lost_error(cause).into()),
        };
        match result {
            Ok(value) => {
                if guard.finish(true).await? == Released::AlreadyLost {
                    let message = "the lock was lost while it was in use: the store no longer has it";
                    return Err(Error::new(ErrorKind::Lost(LossCause::Missing), message).into());
                }
                Ok(OnceOutcome::Ran(value))
            }
            Err(error) => {
                let _ = guard.finish(false).await; // the body's error matters more, and an event reports this one
                Err(error)
            }
        }
    }

    /// Starts a run without a closure: [`OnceOutcome::Ran`] contains the guard, and [`OnceGuard::finish`] ends the run.
    ///
    /// # Errors
    /// The errors of an awaited [`LockRequest`].
    ///
    /// # Cancel safety
    /// A dropped future leaves nothing behind.
    pub async fn begin(self) -> Result<OnceOutcome<OnceGuard>> {
        for (what, span) in [("the cooldown", self.cooldown), ("the period", self.every)] {
            if let Some(span) = span {
                check_duration(what, span)?;
            }
        }
        let shared = self.request.handle.shared.clone();
        let key = self.request.handle.key(&self.request.key)?;
        let first = runs::last_run(&shared, &key).await?;
        let before = first.done.as_ref().map(|run| run.fence);
        if let Some(outcome) = self.outcome_without_run(&first, before) {
            return Ok(outcome);
        }
        let guard =
            if self.waits { Some(self.request.clone().await?) } else { self.request.clone().try_acquire().await? };
        let Some(guard) = guard else {
            return Ok(OnceOutcome::Skipped { last: first.run, is_running: true, opens_in: None });
        };
        // Another caller may have finished a run before this call got the lock.
        let history = runs::last_run(&shared, &key).await?;
        if let Some(outcome) = self.outcome_without_run(&history, before) {
            guard.release().await?;
            return Ok(outcome);
        }
        let (began, wall) = (shared.clock.now(), shared.clock.wall());
        let Self { cooldown, every, slot, failures_count, .. } = self;
        let cooldown = Mutex::new(cooldown);
        Ok(OnceOutcome::Ran(OnceGuard {
            shared,
            guard,
            key,
            began,
            wall,
            cooldown,
            every,
            slot,
            failures_count,
            history,
        }))
    }

    /// Returns the outcome of this call if it must not run the body.
    ///
    /// Unless the run is forced, it must not if
    ///
    /// - the last run that counts still closes the key,
    /// - that run is another one than before this call, or
    /// - a run for this slot or a later one was done.
    fn outcome_without_run<T>(&self, history: &RunHistory, before: Option<Fence>) -> Option<OnceOutcome<T>> {
        let done = history.done.as_ref().filter(|_| !self.is_forced)?;
        let opens_in = done.closed_still_for();
        let last = match self.slot {
            _ if opens_in.is_some() => done,
            Some(slot) => history.slot_done.as_ref().filter(|done| done.slot >= Some(slot))?,
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

/// The lock of one run, which the body of [`OnceRequest::run`] gets. It dereferences to its [`Guard`].
///
/// ```
/// use std::time::Duration;
/// use stanchion::{Error, OnceOutcome};
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// # let locks = stanchion::Locks::open("memory:").await?;
/// let outcome = locks.once("feed").run(async |run| {
///     // The body decides how long the feed is not read again.
///     run.set_cooldown(Some(Duration::from_secs(60)))?;
///     Ok::<_, Error>(run.fence())
/// });
/// assert!(matches!(outcome.await?, OnceOutcome::Ran(_)));
///
/// // Without a closure:
/// if let OnceOutcome::Ran(run) = locks.once("mail").begin().await? {
///     run.finish(true).await?;
/// }
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
#[derive(Debug)]
#[must_use = "dropping it releases the lock, and the run does not count"]
pub struct OnceGuard {
    shared: Arc<Shared>,
    guard: Guard,
    key: Key,
    began: BootTime,
    wall: std::time::SystemTime,
    cooldown: Mutex<Option<Duration>>,
    every: Option<Duration>,
    slot: Option<u64>,
    failures_count: bool,
    history: RunHistory,
}

impl Deref for OnceGuard {
    type Target = Guard;

    fn deref(&self) -> &Guard {
        &self.guard
    }
}

impl OnceGuard {
    /// Returns the last run before this one, if the store has its record.
    pub fn last(&self) -> Option<&RunRecord> {
        self.history.run.as_ref()
    }

    /// Sets the time after this run in which nobody runs it again, in place of [`OnceRequest::cooldown`]. `None` means
    /// no cooldown.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if the time is out of range.
    pub fn set_cooldown(&self, closed: Option<Duration>) -> Result<()> {
        if let Some(closed) = closed {
            check_duration("the cooldown", closed)?;
        }
        *self.cooldown.lock().unwrap_or_else(PoisonError::into_inner) = closed;
        Ok(())
    }

    /// Ends the run: records it, and releases the lock.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`] if the lock was lost before, and then the run does not count; the errors of
    /// [`Guard::release`].
    ///
    /// # Cancel safety
    /// If the future is dropped, the run may or may not have been recorded; the keeper finishes the release.
    pub async fn finish(self, succeeded: bool) -> Result<Released> {
        self.guard.check()?;
        let shared = self.shared;
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
        if let Err(error) = runs::record(&shared, &self.guard, &run, self.history).await {
            let (kind, message) = (error.kind(), format!("the run could not be recorded: {error}"));
            shared.observer.publish(|| Event::Error { kind, key: Some(self.key.clone()), message });
        }
        self.guard.release().await
    }

    fn lost_error(&self, cause: LossCause) -> Error {
        Error::lost(cause).with_key(&self.key).with_store(self.guard.store_name())
    }
}
