//! Receives pushes: one subscription for each session, on a connection of its own.

use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::StreamExt;

use super::Inner;
use super::scripts::PUBLISH;
use crate::clock::jitter;
use crate::fence::Fence;
use crate::key::Key;
use crate::store::backoff::{Backoff, sleep};
use crate::store::{LostToken, Push, PushSender};
use crate::token::{SessionId, TokenId};

pub(super) const SHORTEST_PAUSE: Duration = Duration::from_millis(20);
/// Longest pause between attempts to subscribe. It is short because there is one attempt for the whole process, and its
/// success ends the pauses of all tasks that wait for the server.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Pause after a rejected attempt, which succeeds only after somebody changes the server's settings.
const REFUSED_PAUSE: Duration = Duration::from_secs(3);

/// Maximum length of a message in bytes: a key of 512 bytes, each of which may be escaped as three, and a reason.
const MAX_MESSAGE_LENGTH: usize = 64 * 1024;

/// Pauses before the waiters are polled again after a recovery. The holder that has to react to a waiter's poll may
/// learn of the recovery a little later.
const RECHECK_DELAYS: [Duration; 3] =
    [Duration::from_millis(50), Duration::from_millis(150), Duration::from_millis(300)];

/// Listens for a session until the task is aborted. `tried` fires when the first attempt is over.
pub(super) async fn listen(
    inner: Weak<Inner>,
    session: SessionId,
    pushes: PushSender,
    tried: tokio::sync::oneshot::Sender<()>,
) {
    let mut tried = Some(tried);
    let mut pauses = Backoff::new(SHORTEST_PAUSE, LONGEST_PAUSE);
    let mut is_first = true;
    let mut has_warned = false;
    let mut can_publish = None;
    loop {
        let Some(strong) = inner.upgrade() else { return };
        let subscribed = strong.manager.listen(&strong.names.session(session)).await;
        let (names, manager) = (strong.names.clone(), strong.manager.clone());
        drop(strong);
        let mut is_refused = false;
        match subscribed {
            Ok(mut pubsub) => {
                drop(tried.take());
                set_hears_pushes(&inner, session, can_publish == Some(true));
                if !is_first {
                    report_recovery(&pushes);
                }
                is_first = false;
                pauses.reset();
                let channel = names.session(session);
                let key_of = |name: &str| names.key_of(name)?.ok();
                let messages = pubsub.on_message().for_each(async |message| {
                    // Unreadable messages come from somebody else.
                    if let Some(push) = read(message.get_payload_bytes(), key_of) {
                        pushes.send(push);
                    }
                });
                // The client's queue is unbounded, so everything it has read is taken at once. A flood of messages then
                // waits at the server.
                let messages = tokio::task::unconstrained(messages);
                tokio::select! {
                    () = messages => {}
                    () = manager.watch_recoveries(&channel, || report_recovery(&pushes)) => {}
                    () = check_publishing(&inner, session, &pushes, &mut can_publish) => {}
                }
                set_hears_pushes(&inner, session, false);
            }
            Err(error) => {
                drop(tried.take());
                if !has_warned {
                    pushes.send(Push::Warning(format!(
                        "notifications unavailable, falling back to polling once per second: {}",
                        error.message()
                    )));
                    has_warned = true;
                }
                is_first = false;
                is_refused = !error.is_transient();
            }
        }
        if is_refused {
            sleep(jitter(REFUSED_PAUSE)).await;
        } else {
            pauses.pause().await;
        }
    }
}

/// Requests a check of everything after a recovery: messages were missed, and the server may have lost data.
fn report_recovery(pushes: &PushSender) {
    pushes.send(Push::VerifyAll);
    let pushes = pushes.clone();
    tokio::spawn(async move {
        for pause in RECHECK_DELAYS {
            sleep(pause).await;
            pushes.send(Push::RecheckAll);
        }
    });
}

fn set_hears_pushes(inner: &Weak<Inner>, session: SessionId, hears: bool) {
    if let Some(inner) = inner.upgrade() {
        inner.sessions.set_hears_pushes(session, hears);
    }
}

/// Publishes a message to the own channel until the server accepts or rejects it, from a script as for all messages.
/// Users of other processes most likely have the same rights. Never returns.
async fn check_publishing(
    inner: &Weak<Inner>,
    session: SessionId,
    pushes: &PushSender,
    can_publish: &mut Option<bool>,
) {
    let mut pauses = Backoff::new(SHORTEST_PAUSE, REFUSED_PAUSE);
    while *can_publish != Some(true) {
        let Some(strong) = inner.upgrade() else { break };
        let channel = strong.names.session(session);
        let mut command = PUBLISH.by_hash(1);
        command.arg(&channel);
        let answer = strong.manager.run(strong.manager.target(&channel), &PUBLISH, command).await;
        drop(strong);
        match answer {
            Ok(_) => {
                *can_publish = Some(true);
                set_hears_pushes(inner, session, true);
            }
            Err(error) if error.is_transient() => pauses.pause().await,
            Err(error) => {
                if can_publish.is_none() {
                    let why = error.message();
                    let message =
                        format!("notifications cannot be sent, falling back to polling once per second: {why}");
                    pushes.send(Push::Warning(message));
                }
                *can_publish = Some(false);
                break;
            }
        }
    }
    std::future::pending().await
}

/// Reads a message: `G`, token, fence and record name; `F`, token and loss; or `R` and token.
///
/// A program ignores the messages that it does not know, so a newer program may send a new one.
fn read(payload: &[u8], key_of: impl Fn(&str) -> Option<Key>) -> Option<Push> {
    // No key with its reason is longer.
    if payload.len() > MAX_MESSAGE_LENGTH {
        return None;
    }
    let text = std::str::from_utf8(payload).ok()?;
    let token = text.get(1..33).and_then(TokenId::from_hex)?;
    let rest = text.get(33..)?;
    match text.as_bytes().first()? {
        b'G' => {
            let (fence, name) = rest.split_at_checked(16)?;
            Some(Push::Granted { key: key_of(name)?, token, fence: Fence::new(fence.parse().ok()?) })
        }
        b'F' => read_lost(token, rest).map(Push::ForceReleased),
        b'R' if rest.is_empty() => Some(Push::Recall { token }),
        _ => None,
    }
}

/// Encodes a loss for the session's list and its channel.
pub(super) fn write_lost(key: &Key, reason: &str) -> String {
    let key = key.as_encoded();
    format!("{}:{key}{reason}", key.len())
}

pub(super) fn read_lost(token: TokenId, text: &str) -> Option<LostToken> {
    let (length, rest) = text.split_once(':')?;
    let (key, reason) = rest.split_at_checked(length.parse().ok()?)?;
    Some(LostToken { key: Key::from_encoded(key).ok()?, token, reason: reason.to_owned() })
}

/// Starts listening, and waits until the first attempt has succeeded or failed.
pub(super) async fn start(inner: &Arc<Inner>, session: SessionId, pushes: PushSender) {
    let (tried, first_attempt) = tokio::sync::oneshot::channel();
    let task = tokio::spawn(listen(Arc::downgrade(inner), session, pushes, tried));
    inner.sessions.set_listener(session, task.abort_handle());
    let _ = first_attempt.await; // The task drops the sender when the first attempt is over.
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_messages_are_ignored() {
        let key = Key::new("n", "k:1").unwrap();
        let token = TokenId::random().unwrap();
        let lost = LostToken { key: key.clone(), token, reason: "by: hand".into() };
        let no_key = |_: &str| None;
        let message = format!("F{}{}", token.to_hex(), write_lost(&key, &lost.reason));
        assert_eq!(read(message.as_bytes(), no_key).unwrap(), Push::ForceReleased(lost));
        let message = format!("G{}{:016}the record", token.to_hex(), 7);
        let push = read(message.as_bytes(), |name| {
            assert_eq!(name, "the record");
            Some(key.clone())
        });
        assert_eq!(push.unwrap(), Push::Granted { key: key.clone(), token, fence: Fence::new(7) });
        assert_eq!(read(format!("R{}", token.to_hex()).as_bytes(), no_key).unwrap(), Push::Recall { token });
        let with_token = ["F{}9:x", "G{}abc", "R{}x"].map(|message| message.replace("{}", &token.to_hex()));
        let too_short = ["", "G", "X123", "Gé", "R"].map(str::to_owned);
        for hostile in with_token.iter().chain(&too_short) {
            assert!(read(hostile.as_bytes(), no_key).is_none(), "{hostile}");
        }
        let long = format!("F{}1:k{}", token.to_hex(), "x".repeat(MAX_MESSAGE_LENGTH));
        assert!(read(long.as_bytes(), no_key).is_none());
    }
}
