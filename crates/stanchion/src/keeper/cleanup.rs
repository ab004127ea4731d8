//! Ending tokens until the store's answer is definite.

use std::sync::Arc;
use std::time::Duration;

use crate::event::Event;
use crate::key::Key;
use crate::retry::{limited, sleep_unless_back};
use crate::shared::{End, Shared};
use crate::store::StoreTime;
use crate::token::TokenId;

/// Has the store end a token, however long that takes. Gives it back if a request of it may still be on its way.
pub(super) async fn end(shared: Arc<Shared>, end: End) -> Option<End> {
    let _is_ending = IsEnding { shared: shared.clone(), token: end.token };
    tokio::select! {
        () = shared.clock.sleep_until(end.not_before) => {}
        () = shared.closing.cancelled() => {}
    }
    let reply = ask(&shared, &end).await;
    shared.kept().remove(&end.token);
    let reply = reply?;
    tell_released(&shared, &end);
    (!is_definite(&end, reply)).then_some(end)
}

/// However its end goes, by a panic of the store too: what is told of the token after that is heard.
struct IsEnding {
    shared: Arc<Shared>,
    token: TokenId,
}

impl Drop for IsEnding {
    fn drop(&mut self) {
        self.shared.ending().remove(&self.token);
    }
}

/// Ends a token again when no request of it can come any more.
pub(super) async fn end_again(shared: Arc<Shared>, end: End) {
    loop {
        let until = end.unanswered_until.unwrap_or(shared.store_time());
        shared.clock.sleep(until.since(shared.store_time()) + Duration::from_millis(1)).await;
        match ask(&shared, &end).await {
            Some(reply) if !is_definite(&end, reply) => {}
            Some(_) | None => return,
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
        let step = async {
            match end.released {
                Some(_) => shared.store.release(&end.key, end.token, end.cooldown).await,
                None => shared.store.abandon(&end.key, end.token).await,
            }
        };
        match limited(&shared.clock, policy.attempt, step).await {
            Ok(reply) => {
                shared.saw_store_time(reply.time, asked);
                return Some(reply.time);
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

/// Ends a token of which this process knows nothing but its name.
pub(super) fn end_unknown(shared: &Arc<Shared>, key: Key, token: TokenId) {
    if shared.ending().insert(token, ()).is_none() {
        shared.command(super::Command::End(End::of_token(key, token)));
    }
}

pub(super) fn tell_released(shared: &Shared, end: &End) {
    if let Some((fence, since)) = end.released {
        let held = shared.clock.now().since(since);
        shared.observer.tell(|| Event::Released { key: end.key.clone(), fence, held });
    }
}
