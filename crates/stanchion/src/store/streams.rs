//! The push streams of a store's sessions, and the tasks that fill them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::task::AbortHandle;

use super::{GrantStream, Push, PushSender, push_channel};
use crate::token::SessionId;

#[derive(Debug, Default)]
pub(super) struct Streams(Mutex<HashMap<SessionId, Stream>>);

/// A stream, and what fills it.
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
    /// A stream that nothing fills yet.
    pub(super) fn begin(&self, session: SessionId) -> GrantStream {
        let (pushes, stream) = push_channel();
        self.all().insert(session, Stream { pushes, task: None });
        stream
    }

    /// Where to send what a task hears, if a session's stream has no task.
    pub(super) fn unfilled(&self, session: SessionId) -> Option<PushSender> {
        self.all().get(&session).filter(|stream| stream.task.is_none()).map(|stream| stream.pushes.clone())
    }

    /// The task lives as long as the stream does.
    pub(super) fn fill(&self, session: SessionId, task: AbortHandle) {
        match self.all().get_mut(&session) {
            Some(stream) => stream.task = Some(task),
            None => task.abort(),
        }
    }

    pub(super) fn tell(&self, session: SessionId, push: Push) {
        if let Some(stream) = self.all().get(&session) {
            stream.pushes.send(push);
        }
    }

    pub(super) fn end(&self, session: SessionId) {
        self.all().remove(&session);
    }

    fn all(&self) -> MutexGuard<'_, HashMap<SessionId, Stream>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
