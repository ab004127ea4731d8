//! Runs the waiting loop, from a request to a grant. Only this module decides how long a call waits and when it polls.
//!
//! # Invariants
//! 1. From before the first request until the caller has the grant, an [`InFlightToken`] stands for the token. If it is dropped at
//!    any point, the keeper releases everything that the token got.
//! 2. A token is requested once. Each further request is a poll, or repeats the same request within its window.
//! 3. A grant is valid only while the session of the request is valid, and a deadline counts from before the request whose answer
//!    stated the remaining time.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::clock::{BootTime, Clock};
use crate::command::{Cleanup, Command};
use crate::error::{Error, ErrorKind, LossCause, Result};
use crate::event::Event;
use crate::guard::Guard;
use crate::key::Key;
use crate::lease::{Hold, NewHold, SessionLease};
use crate::locks::{DURATION_RANGE, Locks};
use crate::on_lost::OnLost;
use crate::polls::{LONG_SILENCE, Trouble};
use crate::request::LockRequest;
use crate::retry::Persistence;
use crate::shared::Shared;
use crate::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, Demand, Granted, Lifetime, PollOutcome, Queued,
    StoreTime,
};
use crate::token::{Token, TokenId};
use crate::waiter::{Waiter, Wakeup};

/// Maximum time for which a request may be on its way. The time is shorter if the session or the lifetime is short.
const MAX_WINDOW: Duration = Duration::from_secs(5);

/// Maximum number of grants that may arrive already expired before the call fails.
const MAX_LATE: u32 = 5;

/// Acquires a key. Returns `None` if the key is busy and the call does not wait.
pub(crate) async fn acquire(request: &LockRequest) -> Result<Option<Guard>> {
    let locks = &request.locks;
    let shared = &locks.handle.shared;
    let key = locks.key(&request.key).map_err(|error| error.with_store(shared.capabilities.name))?;
    shared.observer.telemetry().acquiring(&key, acquire_key(request, key.clone())).await
}

async fn acquire_key(request: &LockRequest, key: Key) -> Result<Option<Guard>> {
    let locks = &request.locks;
    let shared = &locks.handle.shared;
    let name = |error: Error| error.with_key(&key).with_store(shared.capabilities.name);
    let (lifetime, demand) = request.check().map_err(name)?;
    let in_store =
        if request.is_exact { lifetime } else { lifetime.map(|length| shared.config.drift.lengthen(length)) };
    let started = shared.clock.now();
    let enqueue = request.wait != Some(Duration::ZERO);
    let limit = if enqueue { request.wait } else { Some(shared.config.retry.no_wait) };
    let limit_at = limit.map_or(BootTime::NEVER, |limit| started.after(limit));
    let cancelled = async {
        match &request.cancel {
            Some(token) => token.cancelled().await,
            None => std::future::pending().await,
        }
    };
    let trouble = Mutex::new(None);
    let mut call = Call {
        locks,
        key: &key,
        request,
        lifetime,
        in_store,
        demand,
        started,
        enqueue,
        answered: false,
        trouble: &trouble,
        late: 0,
        stale: 0,
        other_limit: None,
    };
    let ended = tokio::select! {
        biased;
        () = cancelled => Some(Err(Error::new(ErrorKind::Cancelled, "the caller cancelled the wait"))),
        () = shared.draining().cancelled() => Some(Err(shared.draining_error())),
        result = call.run() => Some(result),
        () = shared.clock.sleep_until(limit_at) => None,
    };
    ended.unwrap_or_else(|| Err(limit_error(shared, &trouble, enqueue, limit.unwrap_or_default()))).map_err(name)
}

/// Returns the error of a call that reached its wait limit: the store's fault if the store was failing, else a timeout.
fn limit_error(shared: &Shared, trouble: &Mutex<Trouble>, waits: bool, limit: Duration) -> Error {
    let trouble = trouble.lock().unwrap_or_else(PoisonError::into_inner).take();
    let fault = trouble.or_else(|| shared.session_fault());
    fault.unwrap_or_else(|| match waits {
        true => Error::new(ErrorKind::Timeout, format!("not obtained within {limit:?}")),
        false => Error::new(ErrorKind::Unavailable, format!("the store did not answer within {limit:?}")),
    })
}

/// Adopts a detached hold.
pub(crate) async fn adopt(locks: &Locks, token: Token) -> Result<Guard> {
    let shared = &locks.handle.shared;
    let key = token.key();
    let name = |error: Error| error.with_key(key).with_store(shared.capabilities.name);
    shared.check_process().map_err(name)?;
    let session = tokio::select! {
        biased;
        () = shared.draining().cancelled() => Err(shared.draining_error()),
        session = shared.valid_session() => session,
    };
    let session = session.map_err(name)?;
    let mut in_flight = InFlightToken::new(shared, key, session, None)?;
    let request = AdoptRequest {
        key: key.clone(),
        from: token.id(),
        to: in_flight.token,
        session: in_flight.session.id,
        not_after: in_flight.not_after,
    };
    let mut sent_at = shared.clock.now();
    let step = shared.step(|| {
        sent_at = shared.clock.now();
        shared.store.adopt(request.clone())
    });
    let step = step.await;
    in_flight.unanswered = step.unanswered;
    match step.result.map_err(|error| name(in_flight.in_doubt(error)))?.outcome {
        AdoptOutcome::Adopted { granted, session_bound } => {
            shared.tokens.forget_detached(token.id());
            let lifetime = Grant {
                granted,
                sent_at,
                session_bound,
                heartbeat_within: None,
                length: granted.remaining.map(|remaining| shared.config.drift.usable(remaining)),
                on_lost: None,
            };
            in_flight.hold(locks, lifetime, None).ok_or_else(|| {
                let too_late =
                    || Error::new(ErrorKind::Lost(LossCause::TtlExpired), "taken up with too little time left");
                name(if shared.is_closed() { shared.draining_error() } else { too_late() })
            })
        }
        AdoptOutcome::Gone => {
            in_flight.nothing_was_created();
            Err(name(Error::new(ErrorKind::Lost(LossCause::Missing), "there is no such hold any more")))
        }
        AdoptOutcome::Stale | AdoptOutcome::SessionGone => {
            Err(name(Error::new(ErrorKind::Unavailable, "the hold could not be taken up in time; try again")))
        }
    }
}

/// One call to acquire, with all its tokens.
struct Call<'a> {
    locks: &'a Locks,
    key: &'a Key,
    request: &'a LockRequest,
    /// The lifetime that the caller asked for.
    lifetime: Lifetime,
    /// The lifetime that is requested from the store: longer by the time that the holder cannot use.
    in_store: Lifetime,
    demand: Demand,
    started: BootTime,
    enqueue: bool,
    /// Whether the store has answered this call: from then on the call waits through outages.
    answered: bool,
    /// The fault of the last request, until a request is answered. It becomes the call's error at the wait limit.
    trouble: &'a Mutex<Trouble>,
    /// Number of grants that arrived already expired.
    late: u32,
    /// Number of consecutive requests that reached the store too late.
    stale: u32,
    /// The limit of other users that was last reported because it is not the limit of this call.
    other_limit: Option<u32>,
}

/// The result of one token.
enum Attempt {
    Granted(Guard),
    Busy,
    /// The token is over, and the call goes on with a new token at the end of the queue.
    Retry,
}

/// Notes a fault if it is dropped before the answer to a request has come, and the request has taken long.
struct Silence<'a> {
    trouble: &'a Mutex<Trouble>,
    clock: &'a Clock,
    since: BootTime,
}

impl Drop for Silence<'_> {
    fn drop(&mut self) {
        let silent = self.clock.now().since(self.since);
        if silent >= LONG_SILENCE {
            let trouble = || Error::new(ErrorKind::NetworkTimeout, format!("no answer within {silent:.1?}"));
            // The fault of an earlier request may say more.
            self.trouble.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(trouble);
        }
    }
}

impl Call<'_> {
    fn shared(&self) -> &Arc<Shared> {
        &self.locks.handle.shared
    }

    /// Remembers the result of a request, also if the request is given up because no answer comes.
    async fn heeding<T>(&self, sent_at: BootTime, question: impl Future<Output = Result<T>>) -> Result<T> {
        let silence = Silence { trouble: self.trouble, clock: &self.shared().clock, since: sent_at };
        let answer = question.await;
        std::mem::forget(silence);
        let trouble = answer.as_ref().err().cloned();
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
        answer
    }

    /// Returns how long a request of this call is retried: until the wait limit if there is one, and otherwise within the policy
    /// until the store has answered once.
    fn persistence(&self) -> Persistence {
        if self.enqueue && (self.answered || self.request.wait.is_some()) {
            Persistence::Endless
        } else {
            Persistence::Policy
        }
    }

    async fn session(&self) -> Result<Arc<SessionLease>> {
        match self.persistence() {
            Persistence::Policy => self.shared().valid_session().await,
            Persistence::Endless => self.shared().valid_session_by(BootTime::NEVER).await,
        }
    }

    async fn run(&mut self) -> Result<Option<Guard>> {
        loop {
            match self.attempt().await {
                Ok(Attempt::Granted(guard)) => return Ok(Some(guard)),
                Ok(Attempt::Busy) => return Ok(None),
                Ok(Attempt::Retry) if self.late < MAX_LATE && self.stale < MAX_LATE => {}
                Ok(Attempt::Retry) => {
                    let message = "the store answers too slowly for so short a lifetime; ask for a longer ttl";
                    return Err(Error::new(ErrorKind::Unavailable, message));
                }
                Err(error) => return Err(error),
            }
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
            metadata: self.request.metadata.clone(),
            trace: self.request.trace.clone(),
        };
        let mut sent_at = self.started;
        let step = shared.step_with(self.persistence(), || {
            sent_at = shared.clock.now();
            self.heeding(sent_at, shared.store.acquire(request.clone()))
        });
        let step = step.await;
        in_flight.unanswered = step.unanswered;
        let reply = match step.result {
            Ok(reply) => reply,
            Err(error) => return Err(in_flight.in_doubt(error)),
        };
        self.answered = true;
        self.stale = if reply.outcome == AcquireOutcome::Stale { self.stale + 1 } else { 0 };
        match reply.outcome {
            AcquireOutcome::Granted(granted) => Ok(self.granted(in_flight, granted, sent_at)),
            AcquireOutcome::Queued(queued) => {
                shared.observer.tell(|| Event::Contended { key: self.key.clone(), ahead: queued.ahead });
                self.compare_limits(queued.in_use);
                Box::pin(self.wait(in_flight, queued)).await
            }
            AcquireOutcome::Busy { in_use, .. } => {
                in_flight.nothing_was_created();
                self.compare_limits(in_use);
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
            self.shared().observer.tell(|| Event::LimitsDiffer { key: self.key.clone(), in_use, asked });
        }
    }

    /// Waits for another session, because the store says that the session is gone. The keeper learns that with its next renewal.
    async fn session_change(&self, in_flight: &InFlightToken) {
        let soon = self.shared().config.session_ttl / 10;
        tokio::select! {
            () = in_flight.session.over().cancelled() => {}
            () = self.shared().clock.sleep(soon) => {}
        }
    }

    /// Waits in the queue until a push, a poll or the end of the session ends the wait.
    async fn wait(&mut self, in_flight: InFlightToken, queued: Queued) -> Result<Attempt> {
        let shared = self.shared().clone();
        let _waiting = Waiting::new(&shared, &in_flight, queued, self.trouble);
        loop {
            let wakeup = tokio::select! {
                biased;
                () = in_flight.session.over().cancelled() => return Ok(Attempt::Retry),
                wakeup = in_flight.waiter.next() => wakeup,
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
            let step = shared.step_with(self.persistence(), || {
                sent_at = shared.clock.now();
                self.heeding(sent_at, shared.poll(self.key, in_flight.token))
            });
            match step.await.result {
                Ok(reply) => match reply.outcome {
                    PollOutcome::Granted(granted) => return Ok(self.granted(in_flight, granted, sent_at)),
                    PollOutcome::Queued(still) => {
                        self.compare_limits(still.in_use);
                        shared.polls.learned(self.key, still, shared.clock.now());
                    }
                    PollOutcome::Gone => return Ok(Attempt::Retry),
                },
                // The keeper goes on polling.
                Err(error) if error.is_transient() => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn granted(&mut self, in_flight: InFlightToken, granted: Granted, sent_at: BootTime) -> Attempt {
        let grant = Grant {
            granted,
            sent_at,
            session_bound: matches!(self.lifetime, Lifetime::Session { .. }),
            heartbeat_within: self.request.heartbeat_within,
            length: self.lifetime.length(),
            on_lost: self.request.on_lost.clone(),
        };
        let fence = granted.fence;
        match in_flight.hold(self.locks, grant, self.request.cooldown) {
            Some(guard) => {
                let shared = self.shared();
                let waited = shared.clock.now().since(self.started);
                shared.observer.tell(|| Event::Acquired { key: self.key.clone(), fence, waited });
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
    trouble: &'a Mutex<Trouble>,
}

impl<'a> Waiting<'a> {
    fn new(shared: &'a Shared, in_flight: &InFlightToken, queued: Queued, trouble: &'a Mutex<Trouble>) -> Self {
        shared.polls.enter(in_flight.token, &in_flight.waiter, queued, shared.clock.now());
        Self { shared, key: in_flight.key.clone(), token: in_flight.token, trouble }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        // In a forked child another thread may hold these locks for ever.
        if !self.shared.is_own_process() {
            return;
        }
        let polls = self.shared.polls.leave(&self.key, self.token, self.shared.clock.now());
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        *trouble = trouble.take().or(polls);
    }
}

/// Returns how long a request may be on its way: less than the shortest lifetime that depends on it.
fn window(shared: &Shared, lifetime: Option<Lifetime>) -> Duration {
    let shortest = lifetime
        .and_then(Lifetime::length)
        .map_or(shared.config.session_ttl, |length| length.min(shared.config.session_ttl));
    MAX_WINDOW.min(shortest / 2)
}

/// A token between its first request and its grant (invariant 1).
struct InFlightToken {
    shared: Arc<Shared>,
    key: Key,
    token: TokenId,
    session: Arc<SessionLease>,
    not_after: StoreTime,
    waiter: Arc<Waiter>,
    /// Length of the lifetime, if the hold does not end with the session.
    fixed: Option<Duration>,
    /// Whether a request of this token that may create state has not been answered.
    unanswered: bool,
    /// Whether nothing is left to release, because a guard has the token or the token got nothing.
    spent: bool,
}

/// A grant, with the values that its hold is made of.
struct Grant {
    granted: Granted,
    /// Time before the request was sent whose answer stated the grant.
    sent_at: BootTime,
    session_bound: bool,
    heartbeat_within: Option<Duration>,
    /// Length of the part of the lifetime that the holder can use, if there is a deadline.
    length: Option<Duration>,
    on_lost: Option<OnLost>,
}

impl InFlightToken {
    fn new(shared: &Arc<Shared>, key: &Key, session: Arc<SessionLease>, lifetime: Option<Lifetime>) -> Result<Self> {
        let token = shared.new_token(session.id)?;
        let not_after = shared.store_time().after(window(shared, lifetime));
        let waiter = Arc::new(Waiter::new(key.clone(), matches!(lifetime, Some(Lifetime::Session { .. }))));
        shared.tokens.enter_waiting(token, waiter.clone());
        // Until the first answer has come, the request counts as unanswered.
        let unanswered = true;
        let fixed = match lifetime {
            Some(Lifetime::Fixed(ttl)) => Some(ttl),
            // An adopted hold may have any lifetime.
            None => Some(*DURATION_RANGE.end()),
            Some(Lifetime::Session { .. }) => None,
        };
        let (shared, key) = (shared.clone(), key.clone());
        Ok(Self { shared, key, token, session, not_after, waiter, fixed, unanswered, spent: false })
    }

    /// Returns the error with which the call fails. The drop of `self` schedules the cleanup of everything that the token got.
    fn in_doubt(&mut self, error: Error) -> Error {
        if !self.unanswered || !error.is_transient() {
            return error;
        }
        let message = format!("the outcome is not known, the library cleans up behind it: {}", error.message());
        let token = Token::new(self.key.clone(), self.token, self.session.id);
        error.restate(ErrorKind::Indeterminate, message).with_token(token)
    }

    /// Forgets the token, if no other request is on its way: the store answered that it entered nothing.
    fn nothing_was_created(&mut self) {
        if !self.unanswered {
            self.shared.tokens.forget(self.token);
            self.spent = true;
        }
    }

    /// Turns the grant into a guard, if the hold is still valid.
    fn hold(mut self, locks: &Locks, grant: Grant, cooldown: Option<Duration>) -> Option<Guard> {
        let now = self.shared.clock.now();
        let drift = self.shared.config.drift;
        let deadline = grant
            .granted
            .remaining
            .map(|remaining| (grant.sent_at.after(drift.shorten(remaining)), grant.length.unwrap_or(remaining)));
        let hold = Arc::new(Hold::new(NewHold {
            key: self.key.clone(),
            token: self.token,
            fence: grant.granted.fence,
            session: self.session.clone(),
            session_bound: grant.session_bound,
            since: now,
            deadline,
            heartbeat_within: grant.heartbeat_within,
            unanswered_until: self.unanswered.then_some(self.not_after),
            on_lost: grant.on_lost,
        }));
        let is_valid = || hold.ended(now).is_none() && !self.shared.is_closed();
        self.shared.tokens.grant(&hold, is_valid).then(|| {
            self.spent = true;
            if hold.look_at() != BootTime::NEVER {
                self.shared.command(Command::Watch(hold.clone()));
            }
            Guard::new(locks.clone(), hold, cooldown)
        })
    }
}

impl Drop for InFlightToken {
    fn drop(&mut self) {
        if self.spent || !self.shared.is_own_process() {
            return;
        }
        self.shared.clean_up(Cleanup {
            key: self.key.clone(),
            token: self.token,
            cooldown: None,
            unanswered_until: self.unanswered.then_some(self.not_after),
            session: self.fixed.is_none().then(|| self.session.clone()),
            not_before: BootTime::from_nanos(0),
            over_at: self.fixed.map_or(BootTime::NEVER, |ttl| self.shared.clock.now().after(ttl + MAX_WINDOW * 2)),
            released: None,
            spared: None,
        });
    }
}
