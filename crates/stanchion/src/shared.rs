//! What a handle, its requests, its guards and its keeper share.

use std::future::Future;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::clock::{BootTime, Clock};
use crate::command::{Cleanup, Command, HoldCheck};
use crate::error::{Error, ErrorKind, LossCause, Result};
use crate::event::{Event, Observer};
use crate::key::Key;
use crate::lease::{Drift, Hold, SessionLease};
use crate::loss_executor::LossExecutor;
use crate::on_lost::OnLost;
use crate::polls::Polls;
use crate::retry::{Persistence, Repeated, RetryPolicy, repeat};
use crate::store::{Capabilities, PollOutcome, Reply, Store, StoreTime};
use crate::store_clock::StoreClock;
use crate::telemetry::{KeyRedaction, Telemetry};
use crate::token::{SessionId, TokenId, TokenMaker};
use crate::tokens::TokenTable;

/// What a handle was configured with.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) namespace: String,
    pub(crate) owner: String,
    pub(crate) session_ttl: Duration,
    pub(crate) drift: Drift,
    pub(crate) retry: RetryPolicy,
    pub(crate) on_lost: OnLost,
    pub(crate) key_redaction: KeyRedaction,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) capabilities: Capabilities,
    pub(crate) clock: Clock,
    pub(crate) config: Config,
    pub(crate) observer: Observer,
    /// What the keeper has of a session.
    pub(crate) session: watch::Sender<SessionView>,
    /// The session that was asked for last, answered or not.
    requested_session: Mutex<Option<SessionId>>,
    token_maker: TokenMaker,
    pub(crate) tokens: TokenTable,
    /// What the keeper polls for those who wait.
    pub(crate) polls: Polls,
    store_clock: StoreClock,
    commands: mpsc::UnboundedSender<Command>,
    losses: LossExecutor,
    drain_reason: OnceLock<String>,
    draining: CancellationToken,
    /// Fires when the handle is being closed: what waits to be ended is ended at once.
    pub(crate) closing: CancellationToken,
    /// Told when the store is there again after it was away: pauses after faults end.
    pub(crate) store_recovered: Notify,
    /// Fires when the keeper has ended: nobody drives the timers any more.
    pub(crate) closed: CancellationToken,
    /// The process that opened the handle: a forked child must not use it.
    process: u32,
}

#[derive(Clone, Debug)]
pub(crate) enum SessionView {
    /// None yet, or none any more; the last error, if there was one.
    Opening(Option<Error>),
    Open(Arc<SessionLease>),
    Closed,
}

impl Shared {
    pub(crate) fn new(
        store: Arc<dyn Store>,
        clock: Clock,
        config: Config,
        commands: mpsc::UnboundedSender<Command>,
    ) -> Result<Self> {
        #[cfg(feature = "metrics")]
        let store = crate::telemetry::measured(store);
        let capabilities = store.capabilities();
        Ok(Self {
            store,
            capabilities,
            clock,
            observer: Observer::new(Telemetry { store: capabilities.name, keys: config.key_redaction }),
            config,
            session: watch::Sender::new(SessionView::Opening(None)),
            requested_session: Mutex::default(),
            token_maker: TokenMaker::new()?,
            tokens: TokenTable::new(),
            polls: Polls::new(capabilities.push),
            store_clock: StoreClock::default(),
            commands,
            losses: LossExecutor::default(),
            drain_reason: OnceLock::new(),
            draining: CancellationToken::new(),
            closing: CancellationToken::new(),
            store_recovered: Notify::new(),
            closed: CancellationToken::new(),
            process: std::process::id(),
        })
    }

    pub(crate) fn request_session(&self, id: SessionId) {
        *self.requested_session.lock().unwrap_or_else(PoisonError::into_inner) = Some(id);
    }

    pub(crate) fn requested_session(&self) -> Option<SessionId> {
        *self.requested_session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn new_token(&self, session: SessionId) -> Result<TokenId> {
        self.token_maker.make(session)
    }

    /// Whether this handle made the token for a call in its current session.
    pub(crate) fn has_made(&self, token: TokenId) -> bool {
        self.requested_session().is_some_and(|session| self.token_maker.has_made(token, session))
    }

    pub(crate) fn command(&self, command: Command) {
        let _the_keeper_has_ended = self.commands.send(command);
    }

    /// Schedules cleanup of a token. Until it finishes, pushes for this token are ignored.
    pub(crate) fn clean_up(&self, cleanup: Cleanup) {
        self.tokens.begin_cleanup(cleanup.token);
        self.command(Command::Cleanup(cleanup));
    }

    /// Detaches a hold: no guard has it any more, and it must stay in the store.
    pub(crate) fn detach(&self, hold: &Hold) {
        let has_late_request = hold.unanswered_until.is_some();
        let is_query_due = self.tokens.detach(hold, has_late_request, self.clock.now());
        if is_query_due {
            self.command(Command::QueryDetached);
        }
        if has_late_request {
            // A request that arrives after another handle has adopted the hold makes a second hold of the same token.
            let mut cleanup = Cleanup::of_hold(hold, None);
            cleanup.spared = Some(hold.fence);
            self.command(Command::Cleanup(cleanup));
        }
    }

    /// Reports a fault of the store after which the keeper tries again.
    pub(crate) fn report(&self, error: &Error) {
        self.observer.tell(|| Event::Error {
            kind: error.kind(),
            key: error.key().cloned(),
            message: error.to_string(),
        });
    }

    pub(crate) fn error(&self, kind: ErrorKind, message: impl Into<String>) -> Error {
        Error::new(kind, message).with_store(self.capabilities.name)
    }

    /// Refuses a child that was forked after the handle was opened: it would share the parent's connections.
    pub(crate) fn check_process(&self) -> Result<()> {
        if self.is_own_process() {
            return Ok(());
        }
        let message = format!(
            "this handle was opened by process {}, and this is a fork of it: open a handle of its own after the fork",
            self.process
        );
        Err(self.error(ErrorKind::Unsupported, message))
    }

    pub(crate) fn is_own_process(&self) -> bool {
        std::process::id() == self.process
    }

    /// Repeats a step after faults, learns the store's time from its answer, and names the store in its error.
    pub(crate) async fn step<T, F>(&self, attempt: impl FnMut() -> F) -> Repeated<Reply<T>>
    where
        F: Future<Output = Result<Reply<T>>>,
    {
        self.step_with(Persistence::Policy, attempt).await
    }

    /// The same, repeated for as long as `persistence` says.
    pub(crate) async fn step_with<T, F>(
        &self,
        persistence: Persistence,
        mut attempt: impl FnMut() -> F,
    ) -> Repeated<Reply<T>>
    where
        F: Future<Output = Result<Reply<T>>>,
    {
        let mut sent_at = self.clock.now();
        let attempt = || {
            sent_at = self.clock.now();
            attempt()
        };
        let mut repeated = tokio::select! {
            biased;
            repeated = repeat(&self.clock, &self.config.retry, persistence, &self.store_recovered, attempt) => repeated,
            () = self.closed.cancelled() => Repeated { result: Err(self.draining_error()), unanswered: true },
        };
        repeated.result = repeated.result.map_err(|error| error.with_store(self.capabilities.name));
        if let Ok(reply) = &repeated.result {
            self.saw_store_time(reply.time, sent_at);
        }
        repeated
    }

    /// Asks the store once what became of one token.
    pub(crate) async fn poll(&self, key: &Key, token: TokenId) -> Result<Reply<PollOutcome>> {
        let Reply { time, outcome } = self.store.poll(key, &[token]).await?;
        let outcome = outcome.into_iter().next().ok_or_else(polled_too_few)?;
        Ok(Reply { time, outcome })
    }

    /// Takes the store's time from the answer to a request that was sent at `sent_at`.
    pub(crate) fn saw_store_time(&self, time: StoreTime, sent_at: BootTime) {
        self.store_clock.observe(time, sent_at, &self.clock);
    }

    /// Returns an estimate of the store's time that, except for drift, is never ahead of the store.
    pub(crate) fn store_time(&self) -> StoreTime {
        self.store_clock.now(&self.clock)
    }

    pub(crate) fn drain(&self, reason: &str) {
        if self.drain_reason.set(reason.to_owned()).is_ok() {
            self.observer.tell(|| Event::Draining { reason: reason.to_owned() });
        }
        self.draining.cancel();
    }

    pub(crate) fn draining(&self) -> &CancellationToken {
        &self.draining
    }

    pub(crate) fn drain_reason(&self) -> Option<&str> {
        self.drain_reason.get().map(String::as_str)
    }

    pub(crate) fn draining_error(&self) -> Error {
        let reason = self.drain_reason().unwrap_or("closed");
        self.error(ErrorKind::Draining, format!("the handle takes no new holds: {reason}"))
    }

    /// Returns a session that is believed now. Waits for the keeper to open one, within the retry policy.
    pub(crate) async fn valid_session(&self) -> Result<Arc<SessionLease>> {
        self.valid_session_by(self.clock.now().after(self.config.retry.total)).await
    }

    /// The same, with a time after which it gives up.
    pub(crate) async fn valid_session_by(&self, give_up_at: BootTime) -> Result<Arc<SessionLease>> {
        if let SessionView::Open(session) = &*self.session.borrow()
            && session.is_valid(self.clock.now())
        {
            return Ok(session.clone());
        }
        let mut views = self.session.subscribe();
        let started = self.clock.now();
        loop {
            match &*views.borrow_and_update() {
                SessionView::Open(session) if session.is_valid(self.clock.now()) => return Ok(session.clone()),
                SessionView::Closed => return Err(self.draining_error()),
                // What does not pass is not waited for.
                SessionView::Opening(Some(error)) if !error.is_transient() => {
                    return Err(error.clone().in_doubt(false));
                }
                SessionView::Open(_) | SessionView::Opening(_) => {}
            }
            tokio::select! {
                changed = views.changed() => if changed.is_err() {
                    return Err(self.error(ErrorKind::Internal, "the keeper has ended"));
                },
                () = self.clock.sleep_until(give_up_at) => {
                    let waited = self.clock.now().since(started);
                    let silent = || self.error(ErrorKind::Unavailable, format!("the store did not answer within {waited:.1?}"));
                    return Err(self.session_fault().unwrap_or_else(silent));
                },
            }
        }
    }

    /// No hold is believed any more: the keeper has ended, or is about to.
    pub(crate) fn is_closed(&self) -> bool {
        matches!(*self.session.borrow(), SessionView::Closed)
    }

    /// Why there is no session, if that is so.
    pub(crate) fn session_fault(&self) -> Option<Error> {
        match &*self.session.borrow() {
            SessionView::Opening(error) => error.clone().map(|error| error.in_doubt(false)),
            _ => None,
        }
    }

    /// Asks the store for a hold. Anything but a grant under the believed fence is a loss: a place in the queue or another
    /// fence is what a store has that forgot the grant, or what somebody made up. Unless its holder gave it up meanwhile:
    /// then that is why.
    pub(crate) async fn confirm(&self, check: &HoldCheck) -> Result<()> {
        let hold = &check.hold;
        let until = hold.own_until();
        let mut sent_at = self.clock.now();
        let poll = self.step(|| {
            sent_at = self.clock.now();
            self.poll(&hold.key, hold.token)
        });
        match poll.await.result?.outcome {
            PollOutcome::Granted(granted) if granted.fence == hold.fence => {
                if let Some(remaining) = granted.remaining
                    && hold.has_less(until, self.clock.now().after(remaining))
                {
                    // The store forgot an extension.
                    let ends = sent_at.after(self.config.drift.shorten(remaining));
                    hold.extend(self.clock.now(), ends, remaining);
                    self.command(Command::Watch(hold.clone()));
                }
            }
            _ if hold.is_releasing() => {}
            _ => self.lose(hold, check.cause, check.reason.clone()),
        }
        Ok(())
    }

    /// Ends the belief in a hold, tells everybody, and has its token ended in the store.
    pub(crate) fn lose(&self, hold: &Arc<Hold>, cause: LossCause, reason: Option<String>) {
        if !hold.lose(cause) {
            return;
        }
        let policy = hold.on_lost.as_ref().unwrap_or(&self.config.on_lost);
        // Where the keeper has ended by a defect, nobody said that the work is over.
        if !(cause == LossCause::Closed && self.closing.is_cancelled() && matches!(policy, OnLost::AbortAfter(_))) {
            self.losses.carry_out(policy, hold, cause);
        }
        // With its session a session hold is gone. Everything else has a token that must be ended: where the holder
        // knows first, after the grace in which it stops, or by its guard when that is dropped before.
        let is_gone = hold.session_bound && cause == LossCause::SessionExpired;
        if is_gone {
            self.tokens.forget(hold.token);
        } else if !cause.leaves_grace() {
            self.tokens.begin_cleanup(hold.token);
        } else if self.tokens.begin_grace(hold, self.clock.now()) {
            self.command(Command::QueryDetached);
        }
        self.observer.tell(|| Event::Lost { key: hold.key.clone(), fence: hold.fence, cause, reason });
        if !is_gone {
            let mut cleanup = Cleanup::of_hold(hold, None);
            if cause.leaves_grace() {
                cleanup.not_before = match hold.heartbeat_within {
                    // Its work hangs: whatever is left of its lifetime is of no use to it.
                    Some(within) if cause == LossCause::HeartbeatMissed => {
                        hold.valid_until().min(self.clock.now().after(crate::lease::grace(within)))
                    }
                    _ => hold.valid_until(),
                };
                hold.is_freed_at(cleanup.not_before);
            }
            self.command(Command::Cleanup(cleanup));
        }
    }
}

/// A store is code of others: what it answers is counted.
pub(crate) fn polled_too_few() -> Error {
    Error::new(ErrorKind::Internal, "the store answered a poll with fewer outcomes than tokens")
}
