//! The push streams of a store's sessions, each with the task that fills it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use tokio::task::AbortHandle;

use super::{GrantStream, Push, PushSender, push_channel};
use crate::error::Result;
use crate::sync::lock;
use crate::token::SessionId;

/// The push streams of the sessions that this handle opened.
#[derive(Debug, Default)]
pub(super) struct Streams(Mutex<HashMap<SessionId, Stream>>);

/// A stream, and the task that fills it. Dropping it aborts the task.
#[derive(Debug)]
struct Stream {
    pushes: PushSender,
    task: Option<AbortHandle>,
    /// Whether the task receives pushes.
    #[cfg(feature = "firestore")]
    is_heard: bool,
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Streams {
    /// Creates the stream of a session, without a task that fills it.
    pub(super) fn begin(&self, session: SessionId) -> GrantStream {
        let (pushes, grants) = push_channel();
        let stream = Stream {
            pushes,
            task: None,
            #[cfg(feature = "firestore")]
            is_heard: false,
        };
        self.all().insert(session, stream);
        grants
    }

    /// Starts the task that fills a session's stream, unless the stream has a task or the session has no stream. Returns what
    /// `start` returns beside the task.
    ///
    /// The stream owns the task before this call returns, so a caller that gives up leaves no task behind.
    pub(super) fn fill<T>(
        &self,
        session: SessionId,
        start: impl FnOnce(PushSender) -> Result<(AbortHandle, T)>,
    ) -> Result<Option<T>> {
        let mut streams = self.all();
        let Some(stream) = streams.get_mut(&session).filter(|stream| stream.task.is_none()) else { return Ok(None) };
        let (task, started) = start(stream.pushes.clone())?;
        stream.task = Some(task);
        Ok(Some(started))
    }

    /// Sends a push to a session, if the session has a stream.
    pub(super) fn tell(&self, session: SessionId, push: Push) {
        if let Some(stream) = self.all().get(&session) {
            stream.pushes.send(push);
        }
    }

    /// Records whether the task of a session's stream receives pushes.
    #[cfg(feature = "firestore")]
    pub(super) fn set_heard(&self, session: SessionId, is_heard: bool) {
        if let Some(stream) = self.all().get_mut(&session) {
            stream.is_heard = is_heard;
        }
    }

    /// Returns whether pushes reach this handle: its sessions have the same server and the same rights.
    #[cfg(feature = "firestore")]
    pub(super) fn is_heard(&self) -> bool {
        self.all().values().any(|stream| stream.is_heard)
    }

    /// Removes the stream of a session and aborts its task.
    pub(super) fn end(&self, session: SessionId) {
        self.all().remove(&session);
    }

    fn all(&self) -> MutexGuard<'_, HashMap<SessionId, Stream>> {
        lock(&self.0)
    }
}
