//! Runs a store's connections on a thread of their own.

use std::sync::Mutex;

use tokio::runtime::Handle;

use crate::error::{Error, ErrorKind, Result};
use crate::sync::lock;
use crate::thread::RuntimeThread;

/// The runtime of a store's connections, on a thread that starts with the first connection.
#[derive(Debug)]
pub(super) struct ConnectionThread {
    name: &'static str,
    thread: Mutex<Option<RuntimeThread>>,
}

impl ConnectionThread {
    pub(super) const fn new(name: &'static str) -> Self {
        Self { name, thread: Mutex::new(None) }
    }

    /// Returns the runtime, and starts its thread if necessary.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] if the system has no thread left.
    pub(super) fn runtime(&self) -> Result<Handle> {
        let mut thread = lock(&self.thread);
        if let Some(thread) = &*thread {
            return Ok(thread.runtime.clone());
        }
        let started = RuntimeThread::start(self.name).map_err(|fault| {
            let message = format!("cannot start the thread for the connections: {fault}");
            Error::new(ErrorKind::Unavailable, message)
        })?;
        Ok(thread.insert(started).runtime.clone())
    }
}
