//! Pushes: the documents that call a session's tokens, listened to for as long as the session lives.
//!
//! Who grants a key to one who waits, or takes it by force, writes such a document in the same commit. One stream for each
//! session hears of all of them; who ends the token deletes it.

use std::sync::{Arc, Weak};
use std::time::Duration;

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use prost_types::Timestamp;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use super::Inner;
use super::connect::{Heard, lock, pause, within};
use super::document::{micros, query, text_of};
use super::error::malformed;
use super::record::KeyRecord;
use crate::clock::jitter;
use crate::error::Result;
use crate::fence::Fence;
use crate::key::Key;
use crate::store::{LostToken, Push, PushSender};
use crate::token::{SessionId, TokenId};

const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Opening a session waits so long for its listener.
const READY_WITHIN: Duration = Duration::from_secs(1);

/// A session's stream, and what fills it.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) pushes: PushSender,
    pub(super) task: Option<AbortHandle>,
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Inner {
    /// Starts listening, if nobody does yet, and waits until that has succeeded or failed once.
    pub(super) async fn listen(self: &Arc<Self>, session: SessionId) -> Result<()> {
        let runtime = self.service.runtime()?;
        let (tried, first_attempt) = oneshot::channel();
        // The task is known before it is waited for: who asks again meanwhile, or ends the session, finds it.
        if let Some(listener) = lock(&self.listeners).get_mut(&session).filter(|listener| listener.task.is_none()) {
            let task = runtime.spawn(listen(Arc::downgrade(self), session, listener.pushes.clone(), tried));
            listener.task = Some(task.abort_handle());
        } else {
            return Ok(());
        }
        let _late = within(READY_WITHIN, first_attempt).await;
        Ok(())
    }

    pub(super) fn warn(&self, session: SessionId, warning: String) {
        if let Some(listener) = lock(&self.listeners).get(&session) {
            listener.pushes.send(Push::Warning(warning));
        }
    }
}

async fn listen(inner: Weak<Inner>, session: SessionId, pushes: PushSender, tried: oneshot::Sender<()>) {
    let mut tried = Some(tried);
    let mut wait = FIRST_PAUSE;
    let (mut is_first, mut failures) = (true, 0);
    loop {
        let Some(strong) = inner.upgrade() else { return };
        let calls = query(strong.names.calls(), "key", Vec::new(), false, i32::MAX as usize);
        // Of all there is: what was called while nobody listened is there too.
        let calls = api::StructuredQuery { limit: None, ..calls };
        let stream = strong.service.listen(&strong.names.session(session), calls).await;
        drop(strong);
        let heard = match stream {
            Ok(stream) => hear(stream, &inner, &pushes, &mut tried, is_first).await,
            Err(fault) => Err(fault),
        };
        drop(tried.take());
        is_first = false;
        match heard {
            // The service ends every stream after a while.
            Ok(()) => (wait, failures) = (FIRST_PAUSE, 0),
            Err(fault) => {
                failures += 1;
                if failures == 3 {
                    let why = fault.message();
                    pushes.send(Push::Warning(format!("no pushes, waiting calls ask once a second: {why}")));
                }
            }
        }
        pause(jitter(wait)).await;
        wait = (wait * 2).min(LONGEST_PAUSE);
    }
}

/// Passes on what a stream says. It is an error if it said nothing.
async fn hear(
    mut heard: Heard,
    inner: &Weak<Inner>,
    pushes: &PushSender,
    tried: &mut Option<oneshot::Sender<()>>,
    is_first: bool,
) -> Result<()> {
    use api::listen_response::ResponseType;
    use api::target_change::TargetChangeType;

    let mut is_current = false;
    loop {
        let answer = match heard.stream.message().await {
            Ok(Some(answer)) => answer,
            Ok(None) | Err(_) if is_current => return Ok(()),
            Ok(None) => return Err(malformed()),
            Err(status) => return Err(super::error::from_status(status, super::error::Does::Read)),
        };
        match answer.response_type {
            Some(ResponseType::DocumentChange(change)) => {
                // What cannot be read is not ours.
                if let Some(Ok(Call { key, token, push, told })) = change.document.as_ref().map(read) {
                    if let Some(inner) = inner.upgrade() {
                        inner.remember_told(&key, token, told);
                    }
                    if let Some(push) = push {
                        pushes.send(push);
                    }
                }
            }
            Some(ResponseType::TargetChange(change)) => match change.target_change_type() {
                TargetChangeType::Current if !is_current => {
                    is_current = true;
                    drop(tried.take());
                    if !is_first {
                        pushes.send(Push::RecheckAll);
                    }
                }
                TargetChangeType::Remove => {
                    let status = change.cause.unwrap_or_default();
                    let status = tonic::Status::new(tonic::Code::from(status.code), status.message);
                    return Err(super::error::from_status(status, super::error::Does::Read));
                }
                _ => {}
            },
            _ => {}
        }
    }
}

/// What a document says.
struct Call {
    key: Key,
    token: TokenId,
    /// None: nothing but that somebody waits for this hold.
    push: Option<Push>,
    /// The record of the key, written by the same commit, and when that was.
    told: Option<(KeyRecord, Timestamp, u64)>,
}

fn read(document: &api::Document) -> Result<Call> {
    let id = document.name.rsplit('/').next().unwrap_or_default();
    let token = TokenId::from_hex(id).ok_or_else(malformed)?;
    let key = Key::from_encoded(text_of(document, "key")?)?;
    let push = if let Ok(reason) = text_of(document, "forced") {
        Some(Push::ForceReleased(LostToken { key: key.clone(), token, reason: reason.to_owned() }))
    } else if let Ok(fence) = text_of(document, "fence") {
        let fence = Fence::new(fence.parse().map_err(|_| malformed())?);
        Some(Push::Granted { key: key.clone(), token, fence })
    } else {
        None
    };
    let told = match document.fields.contains_key("record") {
        true => {
            let (record, written) = KeyRecord::read(document)?;
            Some((record, written, micros(written)?))
        }
        false => None,
    };
    Ok(Call { key, token, push, told })
}
