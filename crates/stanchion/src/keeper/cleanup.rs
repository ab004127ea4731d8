//! Ending tokens until the store's answer is definite.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::key::Key;
use crate::retry::{limited, sleep_unless_back};
use crate::shared::{End, Shared};
use crate::store::{PollOutcome, StoreTime};
use crate::token::TokenId;

/// Has the store end a token, however long that takes. Gives it back if a request of it may still be on its way.
pub(super) async fn end(shared: Arc<Shared>, mut end: End) -> Option<End> {
    tokio::select! {
        () = shared.clock.sleep_until(end.not_before) => {}
        () = shared.closing.cancelled() => {}
    }
    let reply = ask(&shared, &end).await;
    // What is told of it from now on is heard.
    shared.ending().remove(&end.token);
    if end.spared.is_none() {
        shared.kept().remove(&end.token);
    }
    let reply = reply?;
    tell_released(&shared, &end);
    // The hold is released. Whatever comes late is nobody's work: not told, and nothing is closed behind it.
    end.released = None;
    (!is_definite(&end, reply)).then_some(end)
}

/// Ends a token again when no request of it can come any more. Gives it back if the handle is closed before that.
pub(super) async fn end_again(shared: Arc<Shared>, end: End) -> Option<End> {
    loop {
        let until = end.unanswered_until.unwrap_or(shared.store_time());
        tokio::select! {
            () = shared.clock.sleep(until.since(shared.store_time()) + Duration::from_millis(1)) => {}
            () = shared.closing.cancelled() => return Some(end),
        }
        match ask(&shared, &end).await {
            Some(reply) if !is_definite(&end, reply) => {}
            Some(_) | None => return None,
        }
    }
}

fn is_definite(end: &End, answered: StoreTime) -> bool {
    end.unanswered_until.is_none_or(|until| answered > until)
}

/// Asks until there is an answer; `None` when nothing of the token can be left.
async fn ask(shared: &Arc<Shared>, end: &End) -> Option<StoreTime> {
    let policy = shared.config.retry;
    let mut pauses = policy.endless_pauses();
    let mut reported = false;
    loop {
        let session_over = end.session.as_ref().is_some_and(|session| session.over().is_cancelled());
        if session_over || shared.clock.now() >= end.over_at {
            return None;
        }
        let asked = shared.clock.now();
        match limited(&shared.clock, policy.attempt, surviving(step(shared, end))).await {
            Ok(time) => {
                shared.saw_store_time(time, asked);
                return Some(time);
            }
            Err(error) => {
                let error = error.with_key(&end.key).with_store(shared.capabilities.name);
                if !reported {
                    let (kind, message) = (error.kind(), error.to_string());
                    shared.observer.tell(|| Event::Error { kind, key: Some(end.key.clone()), message });
                    reported = true;
                }
                let pause = pauses.next().unwrap_or(policy.longest_pause);
                let pause = pause.max(error.retry_after().unwrap_or_default());
                sleep_unless_back(&shared.clock, pause, &shared.back).await;
            }
        }
    }
}

/// Gives the store's time of the answer.
async fn step(shared: &Shared, end: &End) -> Result<StoreTime> {
    if let Some(spared) = end.spared {
        let reply = shared.poll(&end.key, end.token).await?;
        let is_other = match reply.outcome {
            PollOutcome::Granted(granted) => granted.fence != spared,
            PollOutcome::Queued(_) => true,
            PollOutcome::Gone => false,
        };
        if !is_other {
            return Ok(reply.time);
        }
    }
    let reply = match end.released {
        Some(_) => shared.store.release(&end.key, end.token, end.cooldown).await,
        None => shared.store.abandon(&end.key, end.token).await,
    };
    Ok(reply?.time)
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

/// Ends a token of which this process knows nothing but its name.
pub(super) fn end_unknown(shared: &Arc<Shared>, key: Key, token: TokenId) {
    let is_known = shared.ending().contains_key(&token);
    if !is_known {
        shared.end(End::of_token(key, token));
    }
}

pub(super) fn tell_released(shared: &Shared, end: &End) {
    if let Some((fence, since)) = end.released {
        let held = shared.clock.now().since(since);
        shared.observer.tell(|| Event::Released { key: end.key.clone(), fence, held });
    }
}
