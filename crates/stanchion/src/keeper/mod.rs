//! Runs the keeper of a handle: one OS thread with a runtime of its own.
//!
//! The keeper renews the session, receives grants, polls for waiting calls, cleans up after dropped futures and guards, and
//! reports losses. User code that blocks every thread of its own executor does not block the keeper.
//!
//! # Invariants
//! 1. Only the keeper renews a session, and only the keeper declares a session over.
//! 2. The keeper keeps releasing a token until the store's answer is definite: the answer comes when no request of the token can be
//!    on its way any more, or after the time until which such a request may act.
//! 3. The keeper never calls user code and never waits for it. It wakes tasks only while it holds no lock, because waking may drop a
//!    task and its guards.
//! 4. However the keeper ends, also by a panic of a store, every hold is lost and every waiting call fails, because without the
//!    keeper nothing drives the timers.

mod cleanup;
mod deadlines;
mod linger;
mod polling;
mod session;
mod verify;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::clock::Clock;
use crate::command::{Cleanup, Command, HoldCheck};
use crate::error::{Error, ErrorKind, LossCause, Result};
use crate::lifecycle::Phase;
use crate::linger as local;
use crate::shared::{SessionView, Shared};
use crate::store::{GrantStream, PollOutcome, Push};
use crate::thread::{self, Ending};
use crate::tokens::TokenState;
use crate::waiter::Wakeup;
use cleanup::CleanupQueue;
use deadlines::Deadlines;
use linger::LingerRequests;
use verify::Verification;

/// Maximum time for which closing waits for a store that does not answer, and the part of it for the tokens.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);
const END_WITHIN: Duration = Duration::from_secs(2);

/// Minimum time between two checks of a hold because of messages: many messages about a hold cost few requests.
const TOLD_AGAIN_AFTER: Duration = Duration::from_millis(20);

/// Maximum sleep of a timer: the system's timers stop while the machine is suspended.
const MAX_TIMER_SLEEP: Duration = Duration::from_millis(500);

/// Starts the keeper's thread. `setup` runs on the thread, inside its runtime, and makes the state that the keeper shares with the
/// handle. The keeper drives `clock` from the start.
pub(crate) fn start<S, F>(clock: Clock, setup: S) -> Result<(Ending, oneshot::Receiver<Result<Unclaimed>>)>
where
    S: FnOnce(mpsc::UnboundedSender<Command>) -> F + Send + 'static,
    F: Future<Output = Result<Shared>> + 'static,
{
    let (mut tell, shared) = oneshot::channel();
    // The thread makes the runtime. Otherwise the caller's async code would drop the runtime if no thread can be started.
    let run = move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(fault) => {
                let error = Error::new(ErrorKind::Internal, "the system has no resources for the keeper's runtime");
                let _ = tell.send(Err(error.with_source(fault))); // the opener may have given up
                return;
            }
        };
        let (commands, inbox) = mpsc::unbounded_channel();
        runtime.block_on(async move {
            let opened = tokio::select! {
                opened = setup(commands) => opened,
                () = tell.closed() => return,
                () = clock.drive(MAX_TIMER_SLEEP) => return,
            };
            match opened {
                Ok(shared) => {
                    let shared = Arc::new(shared);
                    // If the opener gave up, the handle comes back, and dropping it closes it.
                    drop(tell.send(Ok(Unclaimed(Some(shared.clone())))));
                    keep(shared, inbox).await;
                }
                Err(error) => {
                    let _ = tell.send(Err(error)); // the opener may have given up
                }
            }
        });
        // Do not wait for a name that is being resolved.
        runtime.shutdown_background();
    };
    let ending = thread::spawn("stanchion-keeper", run).map_err(|fault| {
        Error::new(ErrorKind::Internal, "the system has no thread for the keeper").with_source(fault)
    })?;
    Ok((ending, shared))
}

/// Ends every hold and every waiting call when it is dropped (invariant 4).
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.drain("the keeper has ended");
        self.0.lose_all(false);
        self.0.session.send_replace(SessionView::Opening(None));
        self.0.lifecycle.advance(Phase::Closed);
    }
}

/// A handle that was opened, until its opener takes it. If the opener has given up, the handle is closed.
#[derive(Debug)]
pub(crate) struct Unclaimed(Option<Arc<Shared>>);

impl Unclaimed {
    pub(crate) fn shared(&self) -> Option<&Arc<Shared>> {
        self.0.as_ref()
    }

    pub(crate) fn claim(mut self) -> Option<Arc<Shared>> {
        self.0.take()
    }
}

impl Drop for Unclaimed {
    fn drop(&mut self) {
        if let Some(shared) = &self.0 {
            shared.command(Command::Close);
        }
    }
}

async fn keep(shared: Arc<Shared>, mut inbox: mpsc::UnboundedReceiver<Command>) {
    let _ended = Ended(shared.clone());
    let clock = shared.clock.clone();
    let mut cleanups = CleanupQueue::new(shared.clone());
    let mut verification = Verification::new(shared.clone());
    let mut deadlines = Deadlines::default();
    let mut lingers = LingerRequests::new(shared.clone());
    let mut pushes = None;
    let polling = tokio::spawn(polling::poll_keys(shared.clone()));
    {
        let drive = clock.drive(MAX_TIMER_SLEEP);
        let sessions = session::maintain_session(shared.clone());
        tokio::pin!(drive, sessions);
        loop {
            let next_deadline = deadlines.next();
            tokio::select! {
                // Work that must be on time comes first, work that may be much comes last.
                biased;
                () = &mut drive => {}
                () = &mut sessions => {}
                () = clock.sleep_until(next_deadline) => deadlines.announce(&shared),
                command = inbox.recv() => match command {
                    Some(Command::Cleanup(cleanup)) => cleanups.enter(cleanup),
                    Some(Command::Watch(hold)) => deadlines.watch(&hold, &shared),
                    Some(Command::Verify(check)) => verification.one(check),
                    Some(Command::VerifyNext) => verification.next_part(),
                    Some(Command::VerifyAll) => {
                        cleanups.retry_now();
                        verification.all();
                        lingers.all();
                    }
                    Some(Command::Linger(hold)) => lingers.enter(hold),
                    Some(Command::QueryDetached) => { tokio::spawn(forget_adopted(shared.clone())); }
                    Some(Command::Listen(stream)) => {
                        let mut old = pushes.replace(stream);
                        report_warnings(&shared, &mut old).await;
                    }
                    Some(Command::Close) | None => break,
                },
                push = next_push(&mut pushes) => match push {
                    Some(push) => receive(&shared, push),
                    None => pushes = None,
                },
                () = lingers.progress() => {}
                () = cleanups.progress() => {}
                () = verification.progress() => {}
            }
        }
    }
    report_warnings(&shared, &mut pushes).await;
    polling.abort();
    // The session's task has stopped, so nothing renews the session from here on.
    tokio::select! {
        () = close(&shared, &mut inbox, cleanups) => {}
        () = clock.drive(MAX_TIMER_SLEEP) => {}
        () = real_time_limit(CLOSE_WITHIN) => {}
    }
}

/// Reports the warnings that have arrived, without waiting: the store may have sent why it ended the session.
async fn report_warnings(shared: &Arc<Shared>, pushes: &mut Option<GrantStream>) {
    while let Some(push) = push_that_is_there(pushes).await {
        if matches!(push, Push::Warning(_)) {
            receive(shared, push);
        }
    }
}

/// Returns a push that has arrived already, without waiting.
async fn push_that_is_there(pushes: &mut Option<GrantStream>) -> Option<Push> {
    tokio::select! {
        biased;
        push = next_push(pushes) => push,
        () = std::future::ready(()) => None,
    }
}

/// Waits in real time: closing is limited also under a virtual clock that does not advance.
#[allow(clippy::disallowed_methods, reason = "a limit on shutting down, not a deadline of the protocol")]
async fn real_time_limit(limit: Duration) {
    tokio::time::sleep(limit).await;
}

async fn close(shared: &Arc<Shared>, inbox: &mut mpsc::UnboundedReceiver<Command>, mut cleanups: CleanupQueue) {
    shared.lose_all(true);
    let session = match shared.session.send_replace(SessionView::Opening(None)) {
        SessionView::Open(session) => Some(session),
        SessionView::Opening(_) => None,
    };
    clean_up_what_stays(inbox, &mut cleanups).await;
    // Once the session is closed, the store rejects late requests of its tokens. This includes a session that was requested and
    // is not answered yet.
    if let Some(id) = shared.requested_session() {
        session::close(shared, id).await;
    }
    if let Some(session) = session {
        session.end();
    }
    cleanups.clean_up_indefinite();
    // Fixed lifetimes that were granted to calls whose futures have not been polled since.
    for (token, waiter) in shared.tokens.waiting() {
        if !waiter.session_bound {
            cleanups.enter(Cleanup::of_token(waiter.key.clone(), token));
        }
    }
    // Cleanups that arrived since, from calls that gave up because the handle closes.
    inbox.close();
    clean_up_what_stays(inbox, &mut cleanups).await;
}

/// Cleans up the tokens that do not end with the session: those with a fixed lifetime or a cooldown.
async fn clean_up_what_stays(inbox: &mut mpsc::UnboundedReceiver<Command>, cleanups: &mut CleanupQueue) {
    while let Ok(command) = inbox.try_recv() {
        if let Command::Cleanup(cleanup) = command {
            cleanups.enter(cleanup);
        }
    }
    cleanups.leave_to_session();
    tokio::select! {
        () = cleanups.finish() => {}
        () = real_time_limit(END_WITHIN) => {}
    }
}

async fn next_push(pushes: &mut Option<GrantStream>) -> Option<Push> {
    match pushes {
        Some(stream) => stream.next().await,
        None => std::future::pending().await,
    }
}

/// Handles a message. If others than the store can send messages, a message is only a hint: a poll confirms the state of a hold,
/// and tokens that this session did not make are ignored.
fn receive(shared: &Arc<Shared>, push: Push) {
    match push {
        Push::Granted { key, token, fence } => match shared.tokens.get(token) {
            Some(TokenState::Waiting(waiter)) => waiter.notify(Wakeup::Granted(fence)),
            // An answer has given the call its grant already, unless a failover made another grant of it.
            Some(TokenState::Held(hold) | TokenState::Lingering(hold)) if hold.granted == fence => {}
            Some(TokenState::Lingering(hold)) => shared.command(Command::Linger(hold)),
            Some(TokenState::Held(hold)) => check_soon(shared, HoldCheck::new(hold)),
            Some(TokenState::Detached(_) | TokenState::CleaningUp(_)) => {}
            // The call or its hold has ended, and a failover forgot that: nobody will use this grant.
            None if shared.has_made(token) => cleanup::clean_up_unknown(shared, key, token),
            None => {}
        },
        Push::ForceReleased(lost) => match shared.tokens.get(lost.token) {
            Some(TokenState::Held(hold)) if !shared.capabilities.authentic_push => {
                check_soon(shared, HoldCheck { hold, cause: LossCause::ForceReleased, reason: Some(lost.reason) });
            }
            Some(TokenState::Waiting(_) | TokenState::Held(_) | TokenState::Lingering(_)) => {
                session::force_released(shared, lost);
            }
            // The next renewal reports a true forced release.
            Some(TokenState::Detached(_) | TokenState::CleaningUp(_)) | None => {}
        },
        Push::Recheck { token } => {
            if let Some(waiter) = shared.tokens.waiter(token) {
                waiter.notify(Wakeup::Recheck);
            }
        }
        // A recall of a token that was released since has nothing to do.
        Push::Recall { token } => {
            if let Some(hold) = shared.tokens.held_or_lingering(token) {
                local::recalled(shared, &hold);
            }
        }
        Push::RecheckAll => shared.polls.poll_all(shared.clock.now()),
        Push::VerifyAll => {
            shared.store_recovered.notify_waiters();
            shared.polls.poll_all(shared.clock.now());
            shared.command(Command::VerifyAll);
        }
        Push::Warning(message) => shared.observer.warn(message),
    }
}

/// Checks a hold because of a message, unless the hold was checked just before. The slow round or the next renewal finds the
/// change that a skipped message was about.
fn check_soon(shared: &Shared, check: HoldCheck) {
    if check.hold.is_check_due(shared.clock.now(), TOLD_AGAIN_AFTER) {
        shared.command(Command::Verify(check));
    }
}

/// Forgets the detached tokens that the store does not have any more, for example because another handle adopted the hold.
async fn forget_adopted(shared: Arc<Shared>) {
    for (token, detached) in shared.tokens.detached() {
        match shared.step(|| shared.poll(&detached.key, token)).await.result {
            Ok(reply) if reply.outcome == PollOutcome::Gone => shared.tokens.forget_detached(token),
            Ok(_) => {}
            // The next query comes when more holds have been detached.
            Err(_) => return,
        }
    }
    shared.tokens.detached_were_queried();
}

#[cfg(test)]
mod tests;
