//! Runs the waiting loop, from a request to a grant. Only this module decides how long a call waits and when it polls.
//!
//! # Invariants
//! 1. A token is requested once. Each further request is a poll, or repeats the same request within its window.
//! 2. The wait limit is a limit of each thing that the loop waits for. Only the caller and a drain end the loop from outside.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::clock::BootTime;
use crate::command::Command;
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::guard::{AtRelease, Guard};
use crate::handle::Handle;
use crate::in_flight::{Grant, InFlightToken};
use crate::key::Key;
use crate::lease::{Hold, SessionLease};
use crate::lifecycle::Phase;
use crate::linger::{self, Entered, Requester, Turn, TurnWait, Usage};
use crate::options::Options;
use crate::retry::{Patience, out_of_time};
use crate::shared::Shared;
use crate::store::{AcquireOutcome, AcquireRequest, Demand, Granted, Lifetime, PollOutcome, Queued};
use crate::token::TokenId;
use crate::waiter::Wakeup;

/// Maximum time for which an attempt waits for a lingering hold to be given up.
const RECALL_WITHIN: Duration = Duration::from_millis(50);

/// Maximum number of grants that may arrive already expired before the call fails.
const MAX_LATE: u32 = 5;

/// Acquires a key. Returns `None` if the key is busy and the call does not wait.
pub(crate) async fn acquire(handle: &Arc<Handle>, name: &str, options: &Options) -> Result<Option<Guard>> {
    let shared = &handle.shared;
    let key = handle.key(name).map_err(|error| error.with_store(shared.capabilities.name))?;
    shared.observer.telemetry().acquiring(&key, acquire_key(handle, key.clone(), options)).await
}

async fn acquire_key(handle: &Arc<Handle>, key: Key, options: &Options) -> Result<Option<Guard>> {
    let shared = &handle.shared;
    let name = |error: Error| error.with_key(&key).with_store(shared.capabilities.name);
    let (lifetime, demand) = options.check().map_err(name)?;
    let in_store =
        if options.is_exact { lifetime } else { lifetime.map(|length| shared.config.drift.lengthen(length)) };
    let started = shared.clock.now();
    let enqueue = options.wait != Some(Duration::ZERO);
    let limit = if enqueue { options.wait } else { Some(shared.config.retry.no_wait) };
    let usage = options.linger(shared.config.linger).map(|linger| Usage {
        linger,
        heartbeat_within: options.heartbeat_within,
        on_lost: options.on_lost.clone(),
    });
    let mut requester = None;
    let mut turn = None;
    let is_cancelled = || options.cancel.as_ref().is_some_and(CancellationToken::is_cancelled);
    if let Some(usage) = &usage
        && !shared.lifecycle.has_reached(Phase::Draining)
        && !is_cancelled()
    {
        match linger::enter(shared, &key, usage, enqueue) {
            Entered::Granted(hold) => return Ok(Some(local_guard(handle, hold, started))),
            Entered::Request(role) => requester = Some(role),
            Entered::Wait(wait, ahead) => {
                if enqueue {
                    shared.observer.publish(|| Event::Contended { key: key.clone(), ahead });
                }
                turn = Some(wait);
            }
            Entered::Busy => return Ok(None),
            Entered::Plain => {}
        }
    }
    let cancelled = async {
        match &options.cancel {
            Some(token) => token.cancelled().await,
            None => std::future::pending().await,
        }
    };
    let mut call = Call {
        handle,
        key: &key,
        options,
        lifetime,
        in_store,
        demand,
        started,
        enqueue,
        limit_at: limit.map_or(BootTime::NEVER, |limit| started.after(limit)),
        answered: false,
        late: 0,
        stale: 0,
        other_limit: None,
        recalls: false,
        usage,
        turn,
        requester,
    };
    let ended = tokio::select! {
        biased;
        () = cancelled => Err(Error::new(ErrorKind::Cancelled, "the caller cancelled the wait")),
        () = shared.draining() => Err(shared.draining_error()),
        result = call.run() => result,
    };
    if let (Err(error), Some(requester)) = (&ended, call.requester.take())
        && !matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Cancelled)
    {
        requester.failed();
    }
    match ended {
        // The holder did not give up the key at once: it uses it.
        Err(error) if call.recalls && error.kind() == ErrorKind::Timeout => return Ok(None),
        ended => ended,
    }
    .map_err(|error| match error.kind() {
        ErrorKind::Timeout => name(limit_error(shared, enqueue, limit.unwrap_or_default())),
        _ => name(error),
    })
}

/// Makes the guard of a hold that was granted in this process.
fn local_guard(handle: &Arc<Handle>, hold: Arc<Hold>, started: BootTime) -> Guard {
    let shared = &handle.shared;
    if hold.look_at() != BootTime::NEVER {
        shared.command(Command::Watch(hold.clone()));
    }
    shared.observer.publish(|| Event::Acquired {
        key: hold.key.clone(),
        fence: hold.fence,
        waited: hold.since.since(started),
        is_local: true,
    });
    Guard::new(handle.clone(), hold, AtRelease { cooldown: None, may_linger: true })
}

/// Returns the error of a call that reached its wait limit without a fault of its requests.
fn limit_error(shared: &Shared, waits: bool, limit: Duration) -> Error {
    shared.session_fault().unwrap_or_else(|| match waits {
        true => Error::new(ErrorKind::Timeout, format!("not obtained within {limit:?}")),
        false => Error::new(ErrorKind::Unavailable, format!("the store did not answer within {limit:?}")),
    })
}

/// One call to acquire, with all its tokens.
struct Call<'a> {
    handle: &'a Arc<Handle>,
    key: &'a Key,
    options: &'a Options,
    /// The lifetime that the caller asked for.
    lifetime: Lifetime,
    /// The lifetime that is requested from the store: longer by the time that the holder cannot use.
    in_store: Lifetime,
    demand: Demand,
    started: BootTime,
    enqueue: bool,
    limit_at: BootTime,
    /// Whether the store has answered this call: from then on the call waits through outages.
    answered: bool,
    /// Number of grants that arrived already expired.
    late: u32,
    /// Number of consecutive requests that reached the store too late.
    stale: u32,
    /// The limit of other users that was last reported because it is not the limit of this call.
    other_limit: Option<u32>,
    /// Whether an attempt that does not wait has entered the queue, so that the store recalls a lingering hold.
    recalls: bool,
    /// How the call uses the key, if the key may linger.
    usage: Option<Usage>,
    /// The call waits for its turn in this process.
    turn: Option<TurnWait<'a>>,
    /// The role of the call that requests the key for this process.
    requester: Option<Requester<'a>>,
}

/// The result of one token.
enum Attempt {
    Granted(Guard),
    Busy,
    /// The token is over, and the call goes on with a new token at the end of the queue.
    Retry,
}

impl<'a> Call<'a> {
    fn shared(&self) -> &Arc<Shared> {
        &self.handle.shared
    }

    fn is_over(&self) -> bool {
        self.shared().clock.now() >= self.limit_at
    }

    /// Returns how long a request of this call is retried: until the wait limit, and within the policy too if there is no limit and
    /// the store has not answered yet.
    fn patience(&self) -> Patience {
        let is_endless = self.enqueue && (self.answered || self.options.wait.is_some());
        Patience { by_policy: !is_endless, until: self.limit_at }
    }

    async fn session(&self) -> Result<Arc<SessionLease>> {
        let Patience { by_policy, until } = self.patience();
        let shared = self.shared();
        let policy = if by_policy { shared.clock.now().after(shared.config.retry.total) } else { BootTime::NEVER };
        shared.valid_session_by(until.min(policy)).await
    }

    async fn run(&mut self) -> Result<Option<Guard>> {
        if let Some(turn) = self.turn.take()
            && let Some(guard) = Box::pin(self.wait_here(turn)).await?
        {
            return Ok(Some(guard));
        }
        loop {
            match self.attempt().await? {
                Attempt::Granted(guard) => return Ok(Some(guard)),
                Attempt::Busy => return Ok(None),
                Attempt::Retry if self.is_over() => return Err(out_of_time()),
                Attempt::Retry if self.late < MAX_LATE && self.stale < MAX_LATE => {}
                Attempt::Retry => {
                    let message = "the store answers too slowly for so short a lifetime; ask for a longer ttl";
                    return Err(Error::new(ErrorKind::Unavailable, message));
                }
            }
        }
    }

    /// Waits for the call's turn in this process. Returns `None` if the call is to request the key from the store.
    async fn wait_here(&mut self, mut wait: TurnWait<'a>) -> Result<Option<Guard>> {
        let turn = tokio::select! {
            biased;
            turn = wait.turn() => turn,
            () = self.shared().clock.sleep_until(self.limit_at) => return Err(out_of_time()),
        };
        match turn {
            Turn::Granted(hold) => {
                let guard = local_guard(self.handle, hold, self.started);
                // A hold that was lost on its way to this call is of no use.
                Ok(guard.is_held().then_some(guard))
            }
            Turn::Request => {
                self.requester = Some(wait.requester());
                Ok(None)
            }
            Turn::Plain => Ok(None),
        }
    }

    /// Runs one token from its first request to its end.
    async fn attempt(&mut self) -> Result<Attempt> {
        let shared = self.shared().clone();
        let session = self.session().await?;
        let mut in_flight = InFlightToken::new(&shared, self.key, session, Some(self.in_store))?;
        let request = AcquireRequest {
            key: self.key.clone(),
            token: in_flight.token,
            session: in_flight.session.id,
            demand: self.demand,
            lifetime: self.in_store,
            enqueue: self.enqueue,
            not_after: in_flight.not_after,
            metadata: self.options.metadata.clone(),
            trace: self.options.trace.clone(),
        };
        let mut sent_at = self.started;
        let step = shared.step_with(self.patience(), || {
            sent_at = shared.clock.now();
            shared.store.acquire(request.clone())
        });
        let step = step.await;
        in_flight.unanswered = step.unanswered;
        let reply = match step.result {
            Ok(reply) => reply,
            // At the wait limit the store's own fault says more than that its outcome is not known.
            Err(error) if self.is_over() => return Err(error),
            Err(error) => return Err(in_flight.in_doubt(error)),
        };
        self.answered = true;
        self.stale = if reply.outcome == AcquireOutcome::Stale { self.stale + 1 } else { 0 };
        match reply.outcome {
            AcquireOutcome::Granted(granted) => Ok(self.granted(in_flight, granted, sent_at)),
            AcquireOutcome::Queued(queued) => {
                shared.observer.publish(|| Event::Contended { key: self.key.clone(), ahead: queued.ahead });
                self.compare_limits(queued.in_use);
                Box::pin(self.wait(in_flight, queued)).await
            }
            AcquireOutcome::Busy { in_use, lingers, .. } => {
                in_flight.nothing_was_created();
                self.compare_limits(in_use);
                // The holder may not be using the key, and gives it up for a request that waits.
                if lingers && shared.capabilities.push && !self.recalls {
                    (self.recalls, self.enqueue) = (true, true);
                    self.limit_at = self.limit_at.min(shared.clock.now().after(RECALL_WITHIN));
                    return Ok(Attempt::Retry);
                }
                Ok(Attempt::Busy)
            }
            // The request missed its window, or the session ended before it arrived. The keeper opens another session.
            AcquireOutcome::Stale | AcquireOutcome::ForceReleased => Ok(Attempt::Retry),
            AcquireOutcome::SessionGone => {
                self.session_change(&in_flight).await;
                Ok(Attempt::Retry)
            }
            AcquireOutcome::QueueFull { limit } => {
                in_flight.nothing_was_created();
                Err(Error::new(ErrorKind::RateLimited, format!("{limit} wait for the key already")))
            }
        }
    }

    /// Reports once that the holders share the key with another limit than this call's limit.
    fn compare_limits(&mut self, in_use: Option<u32>) {
        let asked = self.demand.capacity();
        let is_news = in_use != self.other_limit && !self.demand.is_exclusive();
        if let Some(in_use) = in_use.filter(|in_use| *in_use != asked && is_news) {
            self.other_limit = Some(in_use);
            self.shared().observer.publish(|| Event::LimitsDiffer { key: self.key.clone(), in_use, asked });
        }
    }

    /// Waits for another session, because the store says that the session is gone. The keeper learns that with its next renewal.
    async fn session_change(&self, in_flight: &InFlightToken) {
        let shared = self.shared();
        let soon = shared.clock.now().after(shared.config.session_ttl / 10);
        tokio::select! {
            () = in_flight.session.over().cancelled() => {}
            () = shared.clock.sleep_until(soon.min(self.limit_at)) => {}
        }
    }

    /// Waits in the queue until a push, a poll, the wait limit or the end of the session ends the wait.
    async fn wait(&mut self, in_flight: InFlightToken, queued: Queued) -> Result<Attempt> {
        let shared = self.shared().clone();
        let _waiting = Waiting::new(&shared, &in_flight, queued);
        loop {
            let wakeup = tokio::select! {
                biased;
                () = in_flight.session.over().cancelled() => return Ok(Attempt::Retry),
                wakeup = in_flight.waiter.next() => wakeup,
                () = shared.clock.sleep_until(self.limit_at) => {
                    return Err(shared.polls.fault(self.key, shared.clock.now()).unwrap_or_else(out_of_time));
                }
            };
            match wakeup {
                // Only the store knows when a deadline starts, so a grant with a deadline is polled below.
                Wakeup::Granted(fence) if self.lifetime.length().is_none() => {
                    let granted = Granted { fence, remaining: None };
                    let attempt = self.granted(in_flight, granted, shared.clock.now());
                    // Take the grant at once, so that hand-offs are fast, and check it afterwards.
                    if let Attempt::Granted(guard) = &attempt
                        && !shared.capabilities.authentic_push
                    {
                        guard.confirm_soon();
                    }
                    return Ok(attempt);
                }
                Wakeup::Polled(granted, sent_at) => return Ok(self.granted(in_flight, granted, sent_at)),
                // If an answer was missing, a request may still be on its way. The keeper releases the hold of such a request.
                Wakeup::Gone => return Ok(Attempt::Retry),
                Wakeup::Failed(error) => return Err(error),
                Wakeup::Granted(_) | Wakeup::Recheck => {}
            }
            let mut sent_at = self.started;
            let step = shared.step_with(self.patience(), || {
                sent_at = shared.clock.now();
                shared.poll(self.key, in_flight.token)
            });
            match step.await.result?.outcome {
                PollOutcome::Granted(granted) => return Ok(self.granted(in_flight, granted, sent_at)),
                PollOutcome::Queued(still) => {
                    self.compare_limits(still.in_use);
                    shared.polls.learned(self.key, still, shared.clock.now());
                }
                PollOutcome::Gone => return Ok(Attempt::Retry),
            }
        }
    }

    fn granted(&mut self, in_flight: InFlightToken, granted: Granted, sent_at: BootTime) -> Attempt {
        let grant = Grant {
            granted,
            sent_at,
            session_bound: matches!(self.lifetime, Lifetime::Session { .. }),
            heartbeat_within: self.options.heartbeat_within,
            length: self.lifetime.length(),
            on_lost: self.options.on_lost.clone(),
        };
        let fence = granted.fence;
        let at_release = AtRelease { cooldown: self.options.cooldown, may_linger: self.requester.is_some() };
        match in_flight.hold(self.handle, grant, at_release) {
            Some(guard) => {
                if let (Some(requester), Some(usage)) = (self.requester.take(), &self.usage) {
                    requester.granted(guard.hold(), usage.linger);
                }
                let shared = self.shared();
                let waited = shared.clock.now().since(self.started);
                shared.observer.publish(|| {
                    let (key, is_local) = (self.key.clone(), false);
                    Event::Acquired { key, fence, waited, is_local }
                });
                Attempt::Granted(guard)
            }
            // Too little time is left: the hold is released and not used.
            None => {
                self.late += 1;
                Attempt::Retry
            }
        }
    }
}

/// Has the keeper poll the token of a call until this value is dropped.
struct Waiting<'a> {
    shared: &'a Shared,
    key: Key,
    token: TokenId,
}

impl<'a> Waiting<'a> {
    fn new(shared: &'a Shared, in_flight: &InFlightToken, queued: Queued) -> Self {
        shared.polls.enter(in_flight.token, &in_flight.waiter, queued, shared.clock.now());
        Self { shared, key: in_flight.key.clone(), token: in_flight.token }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        // In a forked child another thread may hold this lock for ever.
        if self.shared.is_own_process() {
            self.shared.polls.leave(&self.key, self.token);
        }
    }
}
