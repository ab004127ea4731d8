//! Listens to a session's notifications and turns them into pushes.
//!
//! A client that grants a key to a waiter, or force-releases a hold, writes a notification document in the same commit.
//! Each session has one stream that receives all of its notifications. The release of a token deletes its notification.

use std::sync::{Arc, Weak};
use std::time::Duration;

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use prost_types::Timestamp;
use tokio::sync::oneshot;

use super::Inner;
use super::connect::ListenStream;
use super::document::{RECALLED_AT, micros, query, text_of};
use super::error::malformed;
use super::record::KeyRecord;
use crate::error::Result;
use crate::fence::Fence;
use crate::key::Key;
use crate::store::backoff::{Backoff, within};
use crate::store::{LostToken, Push, PushSender};
use crate::token::{SessionId, TokenId};

/// Delay before the first repeated attempt to listen. It doubles with each failure.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(20);

/// Maximum delay between attempts to listen.
const MAX_RETRY_DELAY: Duration = Duration::from_secs(2);

/// Time limit for `open_session` to wait for its listener.
const LISTENER_TIMEOUT: Duration = Duration::from_secs(1);

impl Inner {
    /// Starts the session's listener unless it runs already, and waits for its first success or failure.
    pub(super) async fn listen(self: &Arc<Self>, session: SessionId) -> Result<()> {
        let runtime = self.service.runtime()?;
        let start = |pushes| {
            let (tried, first_attempt) = oneshot::channel();
            let task = runtime.spawn(listen(Arc::downgrade(self), session, pushes, tried));
            Ok((task.abort_handle(), first_attempt))
        };
        if let Some(first_attempt) = self.streams.fill(session, start)? {
            let _ = within(LISTENER_TIMEOUT, first_attempt).await; // the listener keeps trying
        }
        Ok(())
    }
}

async fn listen(inner: Weak<Inner>, session: SessionId, pushes: PushSender, tried: oneshot::Sender<()>) {
    let mut tried = Some(tried);
    let mut pauses = Backoff::new(MIN_RETRY_DELAY, MAX_RETRY_DELAY);
    let (mut is_first, mut failures) = (true, 0);
    loop {
        let Some(strong) = inner.upgrade() else { return };
        let notifications = query(strong.names.notifications(), "key", Vec::new(), false, i32::MAX as usize);
        // Without a limit: a notification that was written before the stream started must be received too.
        let notifications = api::StructuredQuery { limit: None, ..notifications };
        let stream = strong.service.listen(&strong.names.session(session), notifications).await;
        drop(strong);
        let outcome = match stream {
            Ok(stream) => forward(stream, &inner, session, &pushes, &mut tried, is_first).await,
            Err(fault) => Err(fault),
        };
        drop(tried.take());
        is_first = false;
        match outcome {
            // The service ends each stream after some time.
            Ok(()) => {
                pauses.reset();
                failures = 0;
            }
            Err(fault) => {
                set_heard(&inner, session, false);
                failures += 1;
                if failures == 3 {
                    let why = fault.message();
                    pushes.send(Push::Warning(format!(
                        "notifications unavailable, falling back to polling once per second: {why}"
                    )));
                }
            }
        }
        pauses.pause().await;
    }
}

/// Records whether a session hears pushes. Between two streams it does: the next stream repeats all notifications.
fn set_heard(inner: &Weak<Inner>, session: SessionId, is_heard: bool) {
    if let Some(inner) = inner.upgrade() {
        inner.streams.set_heard(session, is_heard);
    }
}

/// Forwards the notifications of a stream as pushes. Returns an error if the stream ended before its first snapshot was
/// complete.
async fn forward(
    mut listened: ListenStream,
    inner: &Weak<Inner>,
    session: SessionId,
    pushes: &PushSender,
    tried: &mut Option<oneshot::Sender<()>>,
    is_first: bool,
) -> Result<()> {
    use api::listen_response::ResponseType;
    use api::target_change::TargetChangeType;

    let mut is_current = false;
    loop {
        let answer = match listened.stream.message().await {
            Ok(Some(answer)) => answer,
            Ok(None) | Err(_) if is_current => return Ok(()),
            Ok(None) => return Err(malformed()),
            Err(status) => return Err(super::error::from_status(status, super::error::RequestKind::Read)),
        };
        match answer.response_type {
            Some(ResponseType::DocumentChange(change)) => {
                // Skip a document that cannot be read: this store did not write it.
                if let Some(Ok(notification)) = change.document.as_ref().map(read) {
                    let Notification { key, token, push, pushed, is_repeated } = notification;
                    if let Some(inner) = inner.upgrade().filter(|_| !is_repeated) {
                        inner.cache_pushed_record(&key, token, pushed);
                    }
                    if let Some(push) = push {
                        pushes.send(push);
                    }
                }
            }
            Some(ResponseType::TargetChange(change)) => match change.target_change_type() {
                TargetChangeType::Current if !is_current => {
                    is_current = true;
                    set_heard(inner, session, true);
                    drop(tried.take());
                    if !is_first {
                        pushes.send(Push::RecheckAll);
                    }
                }
                TargetChangeType::Remove => {
                    let status = change.cause.unwrap_or_default();
                    let status = tonic::Status::new(tonic::Code::from(status.code), status.message);
                    return Err(super::error::from_status(status, super::error::RequestKind::Read));
                }
                _ => {}
            },
            _ => {}
        }
    }
}

/// A notification document.
struct Notification {
    key: Key,
    token: TokenId,
    /// Push to forward. `None` means only that a waiter has joined the queue of this hold.
    push: Option<Push>,
    /// The key's record from the same commit, with its `update_time` and that time in µs.
    pushed: Option<(KeyRecord, Timestamp, u64)>,
    /// Whether a poll recalled the hold again, which says nothing about the key's document.
    is_repeated: bool,
}

fn read(document: &api::Document) -> Result<Notification> {
    let id = document.name.rsplit('/').next().unwrap_or_default();
    let token = TokenId::from_hex(id).ok_or_else(malformed)?;
    let key = Key::from_encoded(text_of(document, "key")?)?;
    let is_recall = document.fields.contains_key(RECALLED_AT);
    let push = if let Ok(reason) = text_of(document, "forced") {
        Some(Push::ForceReleased(LostToken { key: key.clone(), token, reason: reason.to_owned() }))
    } else if is_recall {
        Some(Push::Recall { token })
    } else if let Ok(fence) = text_of(document, "fence") {
        let fence = Fence::new(fence.parse().map_err(|_| malformed())?);
        Some(Push::Granted { key: key.clone(), token, fence })
    } else {
        None
    };
    let pushed = match document.fields.contains_key("record") {
        true => {
            let (record, written) = KeyRecord::read(document)?;
            Some((record, written, micros(written)?))
        }
        false => None,
    };
    // A first recall carries the record: the holder is alone and has one waiter, so the record is small.
    let is_repeated = is_recall && pushed.is_none();
    Ok(Notification { key, token, push, pushed, is_repeated })
}
