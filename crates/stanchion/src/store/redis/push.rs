//! Pushes: one subscription for each session, on a connection of its own.

use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::StreamExt;

use super::Inner;
use super::reply::malformed;
use crate::clock::jitter;
use crate::error::{ErrorKind, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::store::{LostToken, Push, PushSender};
use crate::token::{SessionId, TokenId};

pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// Short: it is one attempt for a whole process, and its success ends the pauses of all who wait for the server.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// What was refused is allowed when somebody changes the server's settings.
const REFUSED_PAUSE: Duration = Duration::from_secs(3);

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
                let key_of = |name: &str| names.key_of(name).unwrap_or_else(|| Err(malformed()));
                let messages = pubsub.on_message().for_each(async |message| {
                    // What cannot be read is somebody else's.
                    if let Ok(push) = read(message.get_payload_bytes(), key_of) {
                        pushes.send(push);
                    }
                });
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

/// Messages to itself are sent by other processes' users too, most likely with the same rights.
async fn tell_unless_publishing_works(inner: &Inner, session: SessionId, pushes: &PushSender) {
    let channel = inner.names.session(session);
    let answer = inner.links.ask(inner.links.target(&channel), redis::cmd("PUBLISH").arg(&channel).arg("")).await;
    if let Err(error) = answer
        && error.kind() == ErrorKind::Unauthorized
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
fn read(payload: &[u8], key_of: impl Fn(&str) -> Result<Key>) -> Result<Push> {
    let text = std::str::from_utf8(payload).map_err(|_| malformed())?;
    let token = text.get(1..33).and_then(TokenId::from_hex).ok_or_else(malformed)?;
    let rest = &text[33..];
    match text.as_bytes().first() {
        Some(b'G') => {
            let fence = rest.get(..16).and_then(|fence| fence.parse().ok()).ok_or_else(malformed)?;
            Ok(Push::Granted { key: key_of(&rest[16..])?, token, fence: Fence::new(fence) })
        }
        Some(b'F') => Ok(Push::Forced(read_lost(token, rest)?)),
        _ => Err(malformed()),
    }
}

/// What was lost, as the session's list and its channel tell it.
pub(super) fn write_lost(key: &Key, reason: &str) -> String {
    let key = key.as_encoded();
    format!("{}:{key}{reason}", key.len())
}

pub(super) fn read_lost(token: TokenId, text: &str) -> Result<LostToken> {
    let (length, rest) = text.split_once(':').ok_or_else(malformed)?;
    let length: usize = length.parse().map_err(|_| malformed())?;
    let key = Key::from_encoded(rest.get(..length).ok_or_else(malformed)?)?;
    Ok(LostToken { key, token, reason: rest.get(length..).unwrap_or_default().to_owned() })
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
        let no_key = |_: &str| Err(malformed());
        let message = format!("F{}{}", token.to_hex(), write_lost(&key, &lost.reason));
        assert_eq!(read(message.as_bytes(), no_key).unwrap(), Push::Forced(lost));
        let message = format!("G{}{:016}the record", token.to_hex(), 7);
        let push = read(message.as_bytes(), |name| {
            assert_eq!(name, "the record");
            Ok(key.clone())
        });
        assert_eq!(push.unwrap(), Push::Granted { key: key.clone(), token, fence: Fence::new(7) });
        for hostile in ["", "G", "X123", "Gé", &format!("F{}9:x", token.to_hex()), &format!("G{}abc", token.to_hex())]
        {
            assert!(read(hostile.as_bytes(), no_key).is_err(), "{hostile}");
        }
    }
}
