//! Polls the keys that calls of this handle wait for.
//!
//! The keeper sends these polls, although calls send their other requests themselves. A call can be dropped at any point, or
//! not be polled by its executor, and then the other calls would have to notice that and take over. No call waits for such a
//! poll, so the detour through another thread costs nothing.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::task::JoinSet;

use super::cleanup::surviving;
use crate::key::Key;
use crate::shared::{Shared, polled_too_few};

/// Maximum number of polls that are on their way. A store may have few connections for them, and a poll that queues for a
/// connection would look like a poll without an answer.
const AT_ONCE: usize = 64;

/// Polls each key when it is due. Never returns.
pub(super) async fn poll_keys(shared: Arc<Shared>) {
    let (mut due, mut polling) = (VecDeque::new(), JoinSet::new());
    loop {
        let (taken, next) = shared.polls.take_due(shared.clock.now());
        due.extend(taken);
        let look_again = shared.clock.sleep_until(next);
        tokio::pin!(look_again);
        loop {
            while polling.len() < AT_ONCE
                && let Some(key) = due.pop_front()
            {
                polling.spawn(poll(shared.clone(), key));
            }
            tokio::select! {
                () = &mut look_again => break,
                () = shared.polls.earlier() => break,
                Some(_) = polling.join_next() => {}
            }
        }
    }
}

async fn poll(shared: Arc<Shared>, key: Key) {
    let mut sent = (Arc::default(), shared.clock.now());
    let step = shared.step(|| {
        let now = shared.clock.now();
        let tokens: Arc<[_]> = shared.polls.begin(&key, now).into();
        sent = (tokens.clone(), now);
        let (shared, key) = (&shared, &key);
        async move {
            let reply = surviving(shared.store.poll(key, &tokens)).await;
            let reply = reply.and_then(|reply| {
                let is_whole = reply.outcome.len() == tokens.len();
                if is_whole { Ok(reply) } else { Err(polled_too_few()) }
            });
            reply.inspect_err(|error| shared.polls.attempt_failed(key, error))
        }
    });
    let result = step.await.result;
    let (tokens, sent_at) = sent;
    match result {
        Ok(reply) => {
            let outcomes = tokens.iter().copied().zip(reply.outcome);
            shared.polls.answered(&key, sent_at, outcomes, shared.clock.now());
        }
        Err(error) => shared.polls.failed(&key, &error, shared.clock.now()),
    }
}
