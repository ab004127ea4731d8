//! Holds the state that a handle, its requests, its guards and its keeper share.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};

use crate::clock::{BootTime, Clock};
use crate::command::{Cleanup, Command, HoldCheck};
use crate::error::{Error, ErrorKind, LossCause, Result};
use crate::event::Event;
use crate::key::Key;
use crate::lease::{Drift, Hold, SessionLease};
use crate::lifecycle::{Lifecycle, Phase};
use crate::linger::{self, Lingering};
use crate::loss_executor::LossExecutor;
use crate::observer::Observer;
use crate::on_lost::OnLost;
use crate::polls::Polls;
use crate::retry::{Patience, Repeated, RetryPolicy, repeat};
use crate::store::{Capabilities, Cursor, KeyState, Listing, PollOutcome, Reply, Store, StoreTime};
use crate::store_clock::StoreClock;
use crate::telemetry::{KeyRedaction, Telemetry};
use crate::token::{SessionId, TokenId, TokenMaker};
use crate::tokens::TokenTable;

/// The configuration of a handle.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) namespace: String,
    pub(crate) owner: String,
    pub(crate) session_ttl: Duration,
    pub(crate) drift: Drift,
    pub(crate) retry: RetryPolicy,
    pub(crate) on_lost: OnLost,
    pub(crate) key_redaction: KeyRedaction,
    /// The time for which holds linger unless their request says otherwise.
    pub(crate) linger: Option<Duration>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) capabilities: Capabilities,
    pub(crate) clock: Clock,
    pub(crate) config: Config,
    pub(crate) observer: Observer,
    /// The session as the keeper sees it.
    pub(crate) session: watch::Sender<SessionView>,
    /// The last session that the keeper requested, whether or not the store has answered.
    requested_session: Mutex<Option<SessionId>>,
    token_maker: TokenMaker,
    pub(crate) tokens: TokenTable,
    pub(crate) lingering: Lingering,
    /// The keys that the keeper polls for waiting calls.
    pub(crate) polls: Polls,
    store_clock: StoreClock,
    commands: mpsc::UnboundedSender<Command>,
    losses: LossExecutor,
    pub(crate) lifecycle: Lifecycle,
    /// Notified when the store is available again: pauses after faults end.
    pub(crate) store_recovered: Notify,
    /// The process that opened the handle: a forked child must not use it.
    process: u32,
}

#[derive(Clone, Debug)]
pub(crate) enum SessionView {
    /// No session is open; with the last error of opening one, if there was an error.
    Opening(Option<Error>),
    Open(Arc<SessionLease>),
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
            lingering: Lingering::default(),
            polls: Polls::new(capabilities.push),
            store_clock: StoreClock::default(),
            commands,
            losses: LossExecutor::default(),
            lifecycle: Lifecycle::new(),
            store_recovered: Notify::new(),
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

    /// Returns whether this handle made the token for a call in its current session.
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
            cleanup.spared = Some(hold.granted);
            self.command(Command::Cleanup(cleanup));
        }
    }

    /// Reports a fault of the store after which the keeper tries again.
    pub(crate) fn report(&self, error: &Error) {
        self.observer.publish(|| Event::Error {
            kind: error.kind(),
            key: error.key().cloned(),
            message: error.to_string(),
        });
    }

    pub(crate) fn error(&self, kind: ErrorKind, message: impl Into<String>) -> Error {
        Error::new(kind, message).with_store(self.capabilities.name)
    }

    /// Rejects a child process that was forked after the handle was opened: it would share its parent's connections.
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

    /// Runs an operation of the store within the retry policy. Takes the store's time from the answer, and adds the store's name
    /// to an error.
    pub(crate) async fn step<T, F>(&self, attempt: impl FnMut() -> F) -> Repeated<Reply<T>>
    where
        F: Future<Output = Result<Reply<T>>>,
    {
        self.step_with(Patience::POLICY, attempt).await
    }

    /// Runs an operation of the store, and retries it for as long as `patience` says.
    pub(crate) async fn step_with<T, F>(&self, patience: Patience, mut attempt: impl FnMut() -> F) -> Repeated<Reply<T>>
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
            repeated = repeat(&self.clock, &self.config.retry, patience, &self.store_recovered, attempt) => repeated,
            () = self.lifecycle.reached(Phase::Closed) => Repeated { result: Err(self.draining_error()), unanswered: true },
        };
        repeated.result = repeated.result.map_err(|error| error.with_store(self.capabilities.name));
        if let Ok(reply) = &repeated.result {
            self.saw_store_time(reply.time, sent_at);
        }
        repeated
    }

    /// Polls one token, once.
    pub(crate) async fn poll(&self, key: &Key, token: TokenId) -> Result<Reply<PollOutcome>> {
        let Reply { time, outcome } = self.store.poll(key, &[token]).await?;
        let outcome = outcome.into_iter().next().ok_or_else(polled_too_few)?;
        Ok(Reply { time, outcome })
    }

    /// Returns the state of a key.
    pub(crate) async fn inspect(&self, key: &Key) -> Result<KeyState> {
        let step = self.step(|| self.store.inspect(key)).await;
        step.result.map(|reply| reply.outcome).map_err(|error| error.with_key(key))
    }

    /// Returns the keys whose encoded form begins with `prefix`.
    pub(crate) async fn list(&self, prefix: &str) -> Result<Listing> {
        let mut pages: Vec<Listing> = Vec::new();
        loop {
            let cursor = pages.last().and_then(|page| page.next.as_ref());
            let page = self.list_page(prefix, cursor).await?;
            let is_last = page.next.is_none();
            pages.push(page);
            if is_last {
                return Ok(Listing::merge(pages));
            }
        }
    }

    /// Returns one page of [`list`](Self::list).
    pub(crate) async fn list_page(&self, prefix: &str, cursor: Option<&Cursor>) -> Result<Listing> {
        /// Approximate number of keys that the store reads for one page, which takes it some milliseconds.
        const PAGE: usize = 1_000;
        self.check_process()?;
        let page = self.step(|| self.store.list(prefix, cursor, PAGE)).await;
        page.result.map(|reply| reply.outcome)
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
        if self.lifecycle.drain(reason) {
            self.observer.publish(|| Event::Draining { reason: reason.to_owned() });
            linger::drain(self);
        }
    }

    /// Waits until the handle is draining.
    pub(crate) async fn draining(&self) {
        self.lifecycle.reached(Phase::Draining).await;
    }

    pub(crate) fn draining_error(&self) -> Error {
        let reason = self.lifecycle.drain_reason().unwrap_or("closed");
        self.error(ErrorKind::Draining, format!("the handle takes no new holds: {reason}"))
    }

    /// Returns a session that is valid now. Waits for the keeper to open one, within the retry policy.
    pub(crate) async fn valid_session(&self) -> Result<Arc<SessionLease>> {
        self.valid_session_by(self.clock.now().after(self.config.retry.total)).await
    }

    /// Returns a session that is valid now. Waits for the keeper to open one, until `give_up_at`.
    pub(crate) async fn valid_session_by(&self, give_up_at: BootTime) -> Result<Arc<SessionLease>> {
        if self.is_closing() {
            return Err(self.draining_error());
        }
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
                // A permanent fault does not go away by waiting.
                SessionView::Opening(Some(error)) if !error.is_transient() => {
                    return Err(error.clone().in_doubt(false));
                }
                SessionView::Open(_) | SessionView::Opening(_) => {}
            }
            tokio::select! {
                _ = views.changed() => {}
                () = self.lifecycle.reached(Phase::Closing) => return Err(self.draining_error()),
                () = self.clock.sleep_until(give_up_at) => {
                    let waited = self.clock.now().since(started);
                    let silent = || self.error(ErrorKind::Unavailable, format!("the store did not answer within {waited:.1?}"));
                    return Err(self.session_fault().unwrap_or_else(silent));
                },
            }
        }
    }

    /// Returns whether no hold is valid any more, because the keeper has ended or is about to.
    pub(crate) fn is_closing(&self) -> bool {
        self.lifecycle.has_reached(Phase::Closing)
    }

    /// Returns the fault because of which no session is open, if there is one.
    pub(crate) fn session_fault(&self) -> Option<Error> {
        match &*self.session.borrow() {
            SessionView::Opening(error) => error.clone().map(|error| error.in_doubt(false)),
            SessionView::Open(_) => None,
        }
    }

    /// Polls the token of a hold, and loses the hold unless the store has its grant under the same fence. A place in the queue,
    /// or another fence, means that the store forgot the grant, or that the grant was made up. A hold that its holder is
    /// releasing is not lost: the release is why the store does not have it.
    pub(crate) async fn confirm(&self, check: &HoldCheck) -> Result<()> {
        let hold = &check.hold;
        let until = hold.own_until();
        let mut sent_at = self.clock.now();
        let poll = self.step(|| {
            sent_at = self.clock.now();
            self.poll(&hold.key, hold.token)
        });
        match poll.await.result?.outcome {
            PollOutcome::Granted(granted) if granted.fence == hold.granted => {
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

    /// Ends the validity of all holds, and loses them. `is_asked` says whether a caller closes the handle.
    pub(crate) fn lose_all(&self, is_asked: bool) {
        self.lifecycle.advance(Phase::Closing);
        linger::end_of_session(self, None);
        for hold in self.tokens.holds() {
            // A caller that closes the handle says that its work is over. A keeper that ended by a defect does not say that.
            self.lose_by(&hold, LossCause::Closed, None, !is_asked);
        }
    }

    /// Loses a hold: notifies its holder, reports the loss, and schedules cleanup of the token.
    pub(crate) fn lose(&self, hold: &Arc<Hold>, cause: LossCause, reason: Option<String>) {
        self.lose_by(hold, cause, reason, true);
    }

    fn lose_by(&self, hold: &Arc<Hold>, cause: LossCause, reason: Option<String>, may_abort: bool) {
        let (is_first, current) = linger::mark_lost(self, hold, cause);
        hold.announce_loss();
        if !is_first {
            return;
        }
        let policy = hold.on_lost.as_ref().unwrap_or(&self.config.on_lost);
        if may_abort || !matches!(policy, OnLost::AbortAfter(_)) {
            self.losses.carry_out(policy, hold, cause);
        }
        // A session hold is gone with its session. Every other token must be cleaned up. If the holder notices the loss before the
        // store does, cleanup starts after the grace in which the holder stops, or when the guard is dropped before that.
        let is_gone = hold.session_bound && cause == LossCause::SessionExpired;
        if is_gone {
            self.tokens.forget(hold.token);
        } else if !cause.leaves_grace() {
            self.tokens.begin_cleanup(hold.token);
        } else if self.tokens.begin_grace(hold, self.clock.now()) {
            self.command(Command::QueryDetached);
        }
        self.observer.publish(|| {
            let reason = reason.clone();
            Event::Lost { key: hold.key.clone(), fence: hold.fence, cause, reason }
        });
        if !is_gone {
            let mut cleanup = Cleanup::of_hold(hold, None);
            if cause.leaves_grace() {
                cleanup.not_before = match hold.heartbeat_within {
                    // The work hangs, so it has no use for the rest of the lifetime.
                    Some(within) if cause == LossCause::HeartbeatMissed => {
                        hold.valid_until().min(self.clock.now().after(crate::lease::grace(within)))
                    }
                    _ => hold.valid_until(),
                };
                hold.is_freed_at(cleanup.not_before);
            }
            self.command(Command::Cleanup(cleanup));
        }
        if let Some(current) = current {
            self.lose_by(&current, cause, reason, may_abort);
        }
    }
}

/// Returns the error of a poll with too few outcomes: a store may be code of others, so its answers are counted.
pub(crate) fn polled_too_few() -> Error {
    Error::new(ErrorKind::Internal, "the store answered a poll with fewer outcomes than tokens")
}
