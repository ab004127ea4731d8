//! The push streams of a store's sessions, each with the task that fills it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use tokio::task::AbortHandle;

use super::{GrantStream, Push, PushSender, push_channel};
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
        let (pushes, stream) = push_channel();
        self.all().insert(session, Stream { pushes, task: None });
        stream
    }

    /// Returns the sender of a session's stream if no task fills the stream yet.
    pub(super) fn unfilled(&self, session: SessionId) -> Option<PushSender> {
        self.all().get(&session).filter(|stream| stream.task.is_none()).map(|stream| stream.pushes.clone())
    }

    /// Ties the task that fills a stream to the stream. Aborts the task at once if the session has no stream.
    pub(super) fn fill(&self, session: SessionId, task: AbortHandle) {
        match self.all().get_mut(&session) {
            Some(stream) => stream.task = Some(task),
            None => task.abort(),
        }
    }

    /// Sends a push to a session, if the session has a stream.
    pub(super) fn tell(&self, session: SessionId, push: Push) {
        if let Some(stream) = self.all().get(&session) {
            stream.pushes.send(push);
        }
    }

    /// Removes the stream of a session and aborts its task.
    pub(super) fn end(&self, session: SessionId) {
        self.all().remove(&session);
    }

    fn all(&self) -> MutexGuard<'_, HashMap<SessionId, Stream>> {
        lock(&self.0)
    }
}
