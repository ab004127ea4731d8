//! Opens a session, renews it, and replaces it after a loss.

use std::sync::Arc;
use std::time::Duration;

use super::cleanup;
use crate::clock::BootTime;
use crate::command::Command;
use crate::error::{Error, ErrorKind, LossCause, Result};
use crate::event::Event;
use crate::lease::{RENEWALS_PER_TTL, SessionLease};
use crate::linger;
use crate::retry::{limited, sleep_unless_recovered};
use crate::shared::{SessionView, Shared};
use crate::store::{Liveness, LostToken, OpenOutcome, OpenSession, RenewOutcome};
use crate::token::SessionId;
use crate::tokens::TokenState;
use crate::waiter::Wakeup;

/// Keeps a session open, and opens another session when the session is lost. Never returns.
pub(super) async fn maintain_session(shared: Arc<Shared>) {
    loop {
        let (session, opened) = open(&shared).await;
        shared.session.send_replace(SessionView::Open(session.clone()));
        renew_until_over(&shared, &session, opened).await;
        session.end();
        shared.session.send_replace(SessionView::Opening(None));
        shared.observer.publish(|| Event::SessionLost { session: session.id });
        linger::end_of_session(&shared, Some(session.id));
        for hold in shared.tokens.holds() {
            if hold.session_bound && hold.session.id == session.id {
                shared.lose(&hold, LossCause::SessionExpired, None);
            }
        }
        shared.tokens.end_of_session();
        // Close the old session in the store, but only after its holders have had their time to stop.
        let old = shared.clone();
        let valid_until = session.valid_until().min(shared.clock.now().after(shared.config.session_ttl));
        tokio::spawn(async move {
            old.clock.sleep_until(valid_until).await;
            close(&old, session.id).await;
        });
    }
}

/// Opens a session. Returns it with the time at which its first request was sent.
async fn open(shared: &Arc<Shared>) -> (Arc<SessionLease>, BootTime) {
    let mut pauses = shared.config.retry.endless_pauses();
    let mut requested = None;
    loop {
        let error = match open_once(shared, &mut requested).await {
            Ok(opened) => return opened,
            Err(error) => error.with_store(shared.capabilities.name),
        };
        shared.session.send_replace(SessionView::Opening(Some(error.clone())));
        shared.report(&error);
        let pause = pauses.next().unwrap_or(shared.config.retry.longest_pause);
        let pause = pause.max(error.retry_after().unwrap_or_default());
        sleep_unless_recovered(&shared.clock, pause, &shared.store_recovered).await;
    }
}

/// Tries once to open a session. `requested` is the session that was requested without an answer, with the time of its first
/// request. The same session is requested again, so that no session stays open that nobody knows. Its validity counts from the
/// first request, because that request may have opened it.
async fn open_once(
    shared: &Arc<Shared>,
    requested: &mut Option<(SessionId, BootTime)>,
) -> Result<(Arc<SessionLease>, BootTime)> {
    let ttl = shared.config.session_ttl;
    let (id, first_sent_at) = match *requested {
        Some(requested) => requested,
        None => {
            let id = SessionId::random()?;
            shared.request_session(id);
            shared.command(Command::Listen(shared.store.grants(id)));
            *requested.insert((id, shared.clock.now()))
        }
    };
    let request = OpenSession { session: id, ttl, owner: shared.config.owner.clone() };
    let sent_at = shared.clock.now();
    let reply = limited(&shared.clock, shared.config.retry.attempt, shared.store.open_session(request)).await?;
    shared.saw_store_time(reply.time, sent_at);
    *requested = None;
    let lease = SessionLease::new(id, ttl, valid_until(shared, first_sent_at));
    match reply.outcome {
        OpenOutcome::Gone => Err(Error::new(ErrorKind::Unavailable, "the session ended while it was being opened")),
        OpenOutcome::Opened if lease.is_valid(shared.clock.now()) => Ok((Arc::new(lease), first_sent_at)),
        OpenOutcome::Opened => {
            let old = shared.clone();
            tokio::spawn(async move { close(&old, id).await });
            Err(Error::new(ErrorKind::NetworkTimeout, "opening the session took longer than it would be valid"))
        }
    }
}

fn valid_until(shared: &Shared, sent_at: BootTime) -> BootTime {
    match shared.capabilities.liveness {
        Liveness::Renewal => sent_at.after(shared.config.drift.shorten(shared.config.session_ttl)),
        Liveness::Process => BootTime::NEVER,
    }
}

/// Renews the session until it is over.
async fn renew_until_over(shared: &Arc<Shared>, session: &SessionLease, opened: BootTime) {
    let interval = shared.config.session_ttl / RENEWALS_PER_TTL;
    let mut next = opened.after(interval);
    loop {
        let stop_by = session.stop_by();
        tokio::select! {
            () = shared.clock.sleep_until(next.min(stop_by)) => {}
            // A store that has recovered may lack the last renewals.
            () = shared.store_recovered.notified() => {}
        }
        let sent_at = shared.clock.now();
        if !session.is_valid(sent_at) {
            return;
        }
        let answer = tokio::select! {
            biased;
            answer = limited(&shared.clock, interval, shared.store.renew_session(session.id)) => answer,
            // The loss of the session is reported on time, also while a renewal hangs.
            () = shared.clock.sleep_until(stop_by) => return,
        };
        match answer {
            Ok(reply) => {
                // An answer that is read too late changes nothing, even if its request was sent in time.
                if !session.renew(shared.clock.now(), valid_until(shared, sent_at)) {
                    return;
                }
                shared.saw_store_time(reply.time, sent_at);
                match reply.outcome {
                    RenewOutcome::Alive { lost } => {
                        for lost in lost {
                            force_released(shared, lost);
                        }
                        shared.command(Command::VerifyNext);
                    }
                    RenewOutcome::Gone => return session.gone(shared.clock.now()),
                }
                next = sent_at.after(interval);
            }
            Err(error) => {
                let error = error.with_store(shared.capabilities.name);
                shared.report(&error);
                next = shared.clock.now().after((interval / 4).max(Duration::from_millis(10)));
            }
        }
    }
}

/// Handles a token of this session that was force-released.
pub(super) fn force_released(shared: &Arc<Shared>, lost: LostToken) {
    match shared.tokens.get(lost.token) {
        Some(TokenState::Held(hold)) => shared.lose(&hold, LossCause::ForceReleased, Some(lost.reason)),
        Some(TokenState::Lingering(hold)) => linger::forget(shared, &hold),
        // The waiter does not know yet that it had been granted: its poll finds that the token is gone.
        Some(TokenState::Waiting(waiter)) => waiter.notify(Wakeup::Recheck),
        // The guard is gone, and only the store still has the token.
        Some(TokenState::Detached(_)) | None => cleanup::clean_up_unknown(shared, lost.key, lost.token),
        Some(TokenState::CleaningUp(_)) => {}
    }
}

/// Closes a session in the store. If no attempt is answered, the session expires by itself.
pub(super) async fn close(shared: &Arc<Shared>, session: SessionId) {
    let mut pauses = shared.config.retry.pauses();
    while let Err(error) =
        limited(&shared.clock, shared.config.retry.attempt, shared.store.close_session(session)).await
    {
        let error = error.with_store(shared.capabilities.name);
        shared.report(&error);
        // A permanent fault does not go away by waiting.
        let Some(pause) = pauses.next().filter(|_| error.is_transient()) else { return };
        shared.clock.sleep(pause).await;
    }
}
