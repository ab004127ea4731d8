//! Ends tokens until the store's answer is definite: a bounded number at a time, the others in a queue.
//!
//! # Invariants
//! 1. At most [`IN_FLIGHT`] requests are on their way, and an attempt's time limit counts from when its request is sent.
//!    A hundred thousand guards that are dropped at once therefore wait here, where they cost memory and nothing else, and
//!    not in the store's connections, where they would time out and stand before the renewals.
//! 2. Tokens are ended in the order in which the keeper was told of them. A token that has to wait for a later time, or
//!    whose attempt failed, takes no place among the requests meanwhile: a key that always fails delays no other.
//! 3. An end that a request of the same token may overtake is repeated: soon, because that request is most likely on its
//!    way already, and once more when it can come no more.

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

/// Maximum number of requests that are on their way at the same time. The stores combine what is asked at the same time, in
/// three calls of up to 64 steps, so more of them would not be faster.
pub(super) const IN_FLIGHT: usize = 256;

/// Pauses before an end is repeated that may have overtaken a request of its token; after these, every second.
const REPEATED_AFTER: [Duration; 3] =
    [Duration::from_millis(20), Duration::from_millis(80), Duration::from_millis(320)];
const REPEATED_EVERY: Duration = Duration::from_secs(1);

/// Maximum number of tokens that are being ended when a push may add one.
const MOST_FOR_PUSHES: usize = 1_024;

/// The tokens to be ended.
pub(super) struct CleanupQueue {
    shared: Arc<Shared>,
    /// To be asked for, in this order.
    ready: VecDeque<Job>,
    /// To be asked for at a later time.
    later: BinaryHeap<Reverse<Later>>,
    asking: JoinSet<(Job, Option<Result<Reply<EndOutcome>>>)>,
    /// Ended once while the handle is being closed, without certainty.
    indefinite: Vec<Cleanup>,
}

struct Job {
    cleanup: Cleanup,
    /// Attempts without an answer, since the last answer.
    failures: u32,
    /// Answers so far that were not definite.
    answers: usize,
    /// Something of the token was found and ended: what may still come is a rare second request.
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

    /// Enters a token to be ended.
    pub(super) fn enter(&mut self, cleanup: Cleanup) {
        let at = cleanup.not_before;
        self.schedule(at, Job { cleanup, failures: 0, answers: 0, has_found: false });
    }

    fn schedule(&mut self, at: BootTime, job: Job) {
        let is_due = at <= self.shared.clock.now();
        // What waits for its holder to stop waits no longer when the handle is closed; what has failed does.
        if is_due || (self.shared.closing.is_cancelled() && job.failures == 0) {
            self.ready.push_back(job);
        } else {
            self.later.push(Reverse(Later { at, job }));
        }
    }

    /// Does what is next: sends requests, or takes an answer. Dropped, it loses nothing.
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

    /// The store is there again: what has failed is tried at once.
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
        // What came at once leaves its room behind.
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
                tell_released(&shared, &job.cleanup);
                // The hold is released. Whatever comes late is nobody's work: not told, and nothing is closed behind it.
                job.cleanup.released = None;
                job.has_found |= reply.outcome != EndOutcome::Nothing;
                let Some(until) = job.cleanup.unanswered_until.filter(|until| reply.time <= *until) else { return };
                if shared.closing.is_cancelled() {
                    return self.indefinite.push(job.cleanup);
                }
                // By then none can come any more.
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

    /// What is told of the token from now on is heard.
    fn is_over(&self, cleanup: &Cleanup) {
        self.shared.tokens.end_cleanup(cleanup.token, cleanup.spared.is_some());
    }

    /// The handle is being closed, and its session with it: what ends with the session is left to that, so that closing
    /// takes one step however many holds there are.
    pub(super) fn leave_to_session(&mut self) {
        let later = std::mem::take(&mut self.later).into_iter().map(|Reverse(later)| later.job);
        for job in std::mem::take(&mut self.ready).into_iter().chain(later) {
            if !job.cleanup.stays() {
                tell_released(&self.shared, &job.cleanup);
            } else if job.answers > 0 {
                self.indefinite.push(job.cleanup);
            } else {
                self.ready.push_back(job);
            }
        }
    }

    /// Ends what is left, without certainty.
    pub(super) async fn finish(&mut self) {
        while !self.is_empty() {
            self.progress().await;
        }
    }

    /// With the session ended no late request of its tokens is granted: what such requests got before that is ended.
    pub(super) fn clean_up_indefinite(&mut self) {
        let indefinite = std::mem::take(&mut self.indefinite);
        for mut cleanup in indefinite.into_iter().filter(|cleanup| cleanup.session.is_none()) {
            cleanup.unanswered_until = None;
            self.enter(cleanup);
        }
    }
}

/// One attempt; `None` if nothing of the token can be left before there is an answer.
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

/// A panic of the store is a fault like any other: what has to be ended is not forgotten for it.
pub(super) async fn surviving<T>(step: impl Future<Output = Result<T>>) -> Result<T> {
    let mut step = pin!(step);
    std::future::poll_fn(|context| {
        catch_unwind(AssertUnwindSafe(|| step.as_mut().poll(context)))
            .unwrap_or_else(|_| Poll::Ready(Err(Error::new(ErrorKind::Internal, "the store panicked"))))
    })
    .await
}

/// Ends a token of which this process knows nothing but its name: its session is told of it, and its call is over.
///
/// While many tokens are being ended it is dropped. That loses nothing: a forced release is told by every beat until its token
/// is ended, a grant that a failover restored is published again whenever a waiter of the key asks, and without a waiter
/// nobody misses the key before the session ends.
pub(super) fn clean_up_unknown(shared: &Arc<Shared>, key: Key, token: TokenId) {
    if shared.tokens.begin_cleanup_of_unknown(token, MOST_FOR_PUSHES) {
        shared.command(Command::Cleanup(Cleanup::of_token(key, token)));
    }
}

fn tell_released(shared: &Shared, cleanup: &Cleanup) {
    if let Some((fence, since)) = cleanup.released {
        let held = shared.clock.now().since(since);
        shared.observer.tell(|| Event::Released { key: cleanup.key.clone(), fence, held });
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
