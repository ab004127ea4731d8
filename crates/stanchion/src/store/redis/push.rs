//! Pushes: one subscription for each session, on a connection of its own.

use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::StreamExt;

use super::Inner;
use super::scripts::PUBLISH;
use crate::clock::jitter;
use crate::fence::Fence;
use crate::key::Key;
use crate::store::{LostToken, Push, PushSender};
use crate::token::{SessionId, TokenId};

pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// Short: it is one attempt for a whole process, and its success ends the pauses of all who wait for the server.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// What was refused is allowed when somebody changes the server's settings.
const REFUSED_PAUSE: Duration = Duration::from_secs(3);

/// Maximum length of a message, in bytes: a key of 512 bytes, of which each may be escaped as three, and a reason.
const LONGEST_MESSAGE: usize = 64 * 1024;

/// After a recovery what is waited for is asked for again, after these pauses: whoever has to answer to a waiter's question
/// may hear again a little later.
const ASKED_AGAIN_AFTER: [Duration; 3] =
    [Duration::from_millis(50), Duration::from_millis(150), Duration::from_millis(300)];

/// Listens for a session until it is aborted. `tried` fires when the first attempt is over.
pub(super) async fn listen(
    inner: Weak<Inner>,
    session: SessionId,
    pushes: PushSender,
    tried: tokio::sync::oneshot::Sender<()>,
) {
    let mut tried = Some(tried);
    let mut pause = FIRST_PAUSE;
    let mut is_first = true;
    let mut was_told = false;
    loop {
        let Some(strong) = inner.upgrade() else { return };
        let subscribed = strong.links.listen(&strong.names.session(session)).await;
        let (names, links) = (strong.names.clone(), strong.links.clone());
        drop(strong);
        let mut is_refused = false;
        match subscribed {
            Ok(mut pubsub) => {
                drop(tried.take());
                if let (true, Some(inner)) = (is_first, inner.upgrade()) {
                    tell_unless_publishing_works(&inner, session, &pushes).await;
                }
                if !is_first {
                    tell_recovery(&pushes);
                }
                is_first = false;
                pause = FIRST_PAUSE;
                let channel = names.session(session);
                let key_of = |name: &str| names.key_of(name)?.ok();
                let messages = pubsub.on_message().for_each(async |message| {
                    // What cannot be read is somebody else's.
                    if let Some(push) = read(message.get_payload_bytes(), key_of) {
                        pushes.send(push);
                    }
                });
                // The client's queue has no bound: whatever it has read is taken at once, so that a flood waits at the server.
                let messages = tokio::task::unconstrained(messages);
                tokio::select! {
                    () = messages => {}
                    () = links.tell_recoveries(&channel, || tell_recovery(&pushes)) => {}
                }
            }
            Err(error) => {
                drop(tried.take());
                if !was_told {
                    pushes.send(Push::Warning(format!(
                        "no pushes, waiting calls ask once a second: {}",
                        error.message()
                    )));
                    was_told = true;
                }
                is_first = false;
                is_refused = !error.is_transient();
            }
        }
        sleep(jitter(if is_refused { REFUSED_PAUSE } else { pause })).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Messages were missed, and what the server knows now may be less than what it knew.
fn tell_recovery(pushes: &PushSender) {
    pushes.send(Push::VerifyAll);
    let pushes = pushes.clone();
    tokio::spawn(async move {
        for pause in ASKED_AGAIN_AFTER {
            sleep(pause).await;
            pushes.send(Push::RecheckAll);
        }
    });
}

/// Sends a message to itself, from a script as all messages are. Other processes' users have most likely the same rights.
async fn tell_unless_publishing_works(inner: &Inner, session: SessionId, pushes: &PushSender) {
    let channel = inner.names.session(session);
    let mut command = PUBLISH.by_hash(1);
    command.arg(&channel);
    let answer = inner.links.run(inner.links.target(&channel), &PUBLISH, command).await;
    if let Err(error) = answer
        && !error.is_transient()
    {
        let message = format!("no pushes can be sent, waiting calls ask once a second: {}", error.message());
        pushes.send(Push::Warning(message));
    }
}

#[allow(clippy::disallowed_methods, reason = "a pause between attempts to connect, not a deadline of the protocol")]
pub(super) async fn sleep(pause: Duration) {
    tokio::time::sleep(pause).await;
}

/// `G` token fence record, or `F` token and what was lost.
fn read(payload: &[u8], key_of: impl Fn(&str) -> Option<Key>) -> Option<Push> {
    // No key and no reason is longer.
    if payload.len() > LONGEST_MESSAGE {
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
        _ => None,
    }
}

/// What was lost, as the session's list and its channel tell it.
pub(super) fn write_lost(key: &Key, reason: &str) -> String {
    let key = key.as_encoded();
    format!("{}:{key}{reason}", key.len())
}

pub(super) fn read_lost(token: TokenId, text: &str) -> Option<LostToken> {
    let (length, rest) = text.split_once(':')?;
    let (key, reason) = rest.split_at_checked(length.parse().ok()?)?;
    Some(LostToken { key: Key::from_encoded(key).ok()?, token, reason: reason.to_owned() })
}

/// Starts listening, and waits until that has succeeded or failed once.
pub(super) async fn start(inner: &Arc<Inner>, session: SessionId, pushes: PushSender) {
    let (tried, first_attempt) = tokio::sync::oneshot::channel();
    let task = tokio::spawn(listen(Arc::downgrade(inner), session, pushes, tried));
    inner.sessions.listens(session, task.abort_handle());
    let _over = first_attempt.await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_and_foreign_ones_are_not() {
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
        for hostile in ["", "G", "X123", "Gé", &format!("F{}9:x", token.to_hex()), &format!("G{}abc", token.to_hex())]
        {
            assert!(read(hostile.as_bytes(), no_key).is_none(), "{hostile}");
        }
        let long = format!("F{}1:k{}", token.to_hex(), "x".repeat(LONGEST_MESSAGE));
        assert!(read(long.as_bytes(), no_key).is_none());
    }
}
