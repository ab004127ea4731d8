//! Releases tokens until the store's answer is definite: a bounded number at a time, the others in a queue.
//!
//! # Invariants
//! 1. At most [`IN_FLIGHT`] requests are on their way, and the time limit of an attempt counts from when its request is sent.
//!    If a hundred thousand guards are dropped at once, their tokens wait in this queue, where they only cost memory. In the
//!    store's connections they would time out and delay the renewals.
//! 2. Tokens are cleaned up in the order in which the keeper got them. A token that waits for a later time, or whose attempt
//!    failed, takes no place among the requests: a key that always fails delays no other key.
//! 3. A cleanup that may have overtaken a request of the same token is repeated: soon, because that request is most likely on its
//!    way already, and once more when the request can no longer arrive.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::clock::BootTime;
use crate::command::{Cleanup, Command};
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::key::Key;
use crate::retry::limited;
use crate::shared::Shared;
use crate::store::{EndOutcome, PollOutcome, Reply};
use crate::token::TokenId;

/// Maximum number of requests that are on their way at the same time. A store combines simultaneous requests in three batches of up
/// to 64 operations, so a higher number would not be faster.
pub(super) const IN_FLIGHT: usize = 256;

/// Pauses before a cleanup that may have overtaken a request of its token is repeated.
const REPEATED_AFTER: [Duration; 3] =
    [Duration::from_millis(20), Duration::from_millis(80), Duration::from_millis(320)];
/// Pause before each further repeat.
const REPEATED_EVERY: Duration = Duration::from_secs(1);

/// Maximum number of tokens in cleanup at which a push may still add a token.
const MAX_FOR_PUSHES: usize = 1_024;

/// The tokens to clean up.
pub(super) struct CleanupQueue {
    shared: Arc<Shared>,
    /// Tokens whose request is sent next, in this order.
    ready: VecDeque<Job>,
    /// Tokens whose request is sent at a later time.
    later: BinaryHeap<Reverse<Later>>,
    asking: JoinSet<(Job, Option<Result<Reply<EndOutcome>>>)>,
    /// Tokens that were released once while the handle is being closed, without a definite answer.
    indefinite: Vec<Cleanup>,
}

struct Job {
    cleanup: Cleanup,
    /// Number of failed attempts since the last answer.
    failures: u32,
    /// Number of answers so far that were not definite.
    answers: usize,
    /// Whether the store had something of the token: only a rare second request may still arrive.
    has_found: bool,
}

struct Later {
    at: BootTime,
    job: Job,
}

impl CleanupQueue {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            ready: VecDeque::new(),
            later: BinaryHeap::new(),
            asking: JoinSet::new(),
            indefinite: Vec::new(),
        }
    }

    /// Enters a token to clean up.
    pub(super) fn enter(&mut self, cleanup: Cleanup) {
        let at = cleanup.not_before;
        self.schedule(at, Job { cleanup, failures: 0, answers: 0, has_found: false });
    }

    fn schedule(&mut self, at: BootTime, job: Job) {
        let is_due = at <= self.shared.clock.now();
        // When the handle closes, a token no longer waits for its holder to stop. A token whose attempt failed still waits.
        if is_due || (self.shared.is_closing() && job.failures == 0) {
            self.ready.push_back(job);
        } else {
            self.later.push(Reverse(Later { at, job }));
        }
    }

    /// Sends the next requests, or takes an answer. Dropping the future loses nothing.
    pub(super) async fn progress(&mut self) {
        self.send();
        let next = self.later.peek().map_or(BootTime::NEVER, |Reverse(later)| later.at);
        tokio::select! {
            Some(answered) = self.asking.join_next() => if let Ok((job, answer)) = answered {
                self.answered(job, answer);
            },
            () = self.shared.clock.sleep_until(next) => {}
        }
    }

    fn is_empty(&self) -> bool {
        self.ready.is_empty() && self.later.is_empty() && self.asking.is_empty()
    }

    /// Retries the failed tokens at once, because the store has recovered.
    pub(super) fn retry_now(&mut self) {
        let (failed, others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.later).into_iter().partition(|Reverse(later)| later.job.failures > 0);
        self.later = others.into();
        self.ready.extend(failed.into_iter().map(|Reverse(later)| later.job));
    }

    fn send(&mut self) {
        let now = self.shared.clock.now();
        while let Some(due) = self.later.peek_mut()
            && due.0.at <= now
        {
            let Reverse(due) = std::collections::binary_heap::PeekMut::pop(due);
            self.ready.push_back(due.job);
        }
        while self.asking.len() < IN_FLIGHT
            && let Some(job) = self.ready.pop_front()
        {
            if job.cleanup.is_over(now) {
                self.is_over(&job.cleanup);
            } else {
                let shared = self.shared.clone();
                self.asking.spawn(async move {
                    let answer = ask(&shared, &job.cleanup).await;
                    (job, answer)
                });
            }
        }
        // Return memory to the system after many tokens arrived at once.
        if self.ready.capacity() > 1_024 && self.ready.len() < self.ready.capacity() / 8 {
            self.ready.shrink_to(self.ready.len() * 2);
        }
        if self.later.capacity() > 1_024 && self.later.len() < self.later.capacity() / 8 {
            self.later.shrink_to(self.later.len() * 2);
        }
    }

    fn answered(&mut self, mut job: Job, answer: Option<Result<Reply<EndOutcome>>>) {
        let shared = self.shared.clone();
        let now = shared.clock.now();
        match answer {
            None => self.is_over(&job.cleanup),
            Some(Ok(reply)) => {
                self.is_over(&job.cleanup);
                report_released(&shared, &job.cleanup);
                // The hold is released. A hold of a late request is nobody's work: its release is not reported and leaves no cooldown.
                job.cleanup.released = None;
                job.has_found |= reply.outcome != EndOutcome::Nothing;
                let Some(until) = job.cleanup.unanswered_until.filter(|until| reply.time <= *until) else { return };
                if shared.is_closing() {
                    return self.indefinite.push(job.cleanup);
                }
                // After that time no request can arrive any more.
                let last = until.since(shared.store_time()) + Duration::from_millis(1);
                let soon = REPEATED_AFTER.get(job.answers).copied().unwrap_or(REPEATED_EVERY);
                let pause = if job.has_found { last } else { last.min(soon) };
                job.answers += 1;
                job.failures = 0;
                self.schedule(now.after(pause), job);
            }
            Some(Err(error)) => {
                let error = error.with_key(&job.cleanup.key).with_store(shared.capabilities.name);
                if job.failures == 0 {
                    shared.report(&error);
                }
                let pause = shared.config.retry.pause_after(job.failures);
                job.failures += 1;
                self.schedule(now.after(pause.max(error.retry_after().unwrap_or_default())), job);
            }
        }
    }

    /// Ends the cleanup in the token table: pushes for the token count again.
    fn is_over(&self, cleanup: &Cleanup) {
        self.shared.tokens.end_cleanup(cleanup.token, cleanup.spared.is_some());
    }

    /// Leaves the tokens that end with the session to the closing of the session, so that closing a handle takes one request
    /// however many holds there are.
    pub(super) fn leave_to_session(&mut self) {
        let later = std::mem::take(&mut self.later).into_iter().map(|Reverse(later)| later.job);
        for job in std::mem::take(&mut self.ready).into_iter().chain(later) {
            if !job.cleanup.stays() {
                report_released(&self.shared, &job.cleanup);
            } else if job.answers > 0 {
                self.indefinite.push(job.cleanup);
            } else {
                self.ready.push_back(job);
            }
        }
    }

    /// Cleans up the tokens that are left, without waiting for definite answers.
    pub(super) async fn finish(&mut self) {
        while !self.is_empty() {
            self.progress().await;
        }
    }

    /// Cleans up once more after the session was closed. The store grants no late request from then on, and this cleanup releases
    /// the holds of late requests that arrived before.
    pub(super) fn clean_up_indefinite(&mut self) {
        let indefinite = std::mem::take(&mut self.indefinite);
        for mut cleanup in indefinite.into_iter().filter(|cleanup| cleanup.session.is_none()) {
            cleanup.unanswered_until = None;
            self.enter(cleanup);
        }
    }
}

/// Tries once to release a token. Returns `None` if nothing of the token can be left, although no answer came.
async fn ask(shared: &Arc<Shared>, cleanup: &Cleanup) -> Option<Result<Reply<EndOutcome>>> {
    let sent_at = shared.clock.now();
    let answer = limited(&shared.clock, shared.config.retry.attempt, surviving(step(shared, cleanup))).await;
    if let Ok(reply) = &answer {
        shared.saw_store_time(reply.time, sent_at);
    } else if cleanup.is_over(shared.clock.now()) {
        return None;
    }
    Some(answer)
}

async fn step(shared: &Shared, cleanup: &Cleanup) -> Result<Reply<EndOutcome>> {
    if let Some(spared) = cleanup.spared {
        let reply = shared.poll(&cleanup.key, cleanup.token).await?;
        let is_other = match reply.outcome {
            PollOutcome::Granted(granted) => granted.fence != spared,
            PollOutcome::Queued(_) => true,
            PollOutcome::Gone => false,
        };
        if !is_other {
            return Ok(Reply { time: reply.time, outcome: EndOutcome::Nothing });
        }
    }
    match cleanup.released {
        Some(_) => shared.store.release(&cleanup.key, cleanup.token, cleanup.cooldown).await,
        None => shared.store.abandon(&cleanup.key, cleanup.token).await,
    }
}

/// Turns a panic of the store into an error, so that the token is not forgotten.
pub(super) async fn surviving<T>(step: impl Future<Output = Result<T>>) -> Result<T> {
    let mut step = pin!(step);
    std::future::poll_fn(|context| {
        catch_unwind(AssertUnwindSafe(|| step.as_mut().poll(context)))
            .unwrap_or_else(|_| Poll::Ready(Err(Error::new(ErrorKind::Internal, "the store panicked"))))
    })
    .await
}

/// Cleans up a token that a message or a renewal named and that this process does not use any more.
///
/// While many tokens are in cleanup the token is dropped, which loses nothing:
/// 1. every renewal reports a forced release until its token is released;
/// 2. a store publishes a grant that a failover restored again when a waiter polls the key;
/// 3. without a waiter nobody needs the key before the session ends.
pub(super) fn clean_up_unknown(shared: &Arc<Shared>, key: Key, token: TokenId) {
    if shared.tokens.begin_cleanup_of_unknown(token, MAX_FOR_PUSHES) {
        shared.command(Command::Cleanup(Cleanup::of_token(key, token)));
    }
}

fn report_released(shared: &Shared, cleanup: &Cleanup) {
    if let Some((fence, since)) = cleanup.released {
        let held = shared.clock.now().since(since);
        shared.observer.publish(|| Event::Released { key: cleanup.key.clone(), fence, held });
    }
}

impl PartialEq for Later {
    fn eq(&self, other: &Self) -> bool {
        self.at == other.at
    }
}

impl Eq for Later {}

impl PartialOrd for Later {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Later {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.at.cmp(&other.at)
    }
}
