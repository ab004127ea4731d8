//! Owns what a handle and everything that came from it share, and closes it when the last of them is gone.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::command::Command;
use crate::error::Result;
use crate::key::Key;
use crate::shared::Shared;
use crate::thread::Ending;

/// Maximum time that dropping the last handle waits for its session to end.
const DROP_WITHIN: Duration = Duration::from_secs(1);

/// Closes the keeper when the last handle and the last guard are gone.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) shared: Arc<Shared>,
    thread: Mutex<Option<Ending>>,
}

impl Handle {
    pub(crate) fn new(shared: Arc<Shared>, thread: Ending) -> Self {
        let mut handles = handles();
        handles.retain(|handle| handle.strong_count() > 0);
        handles.push(Arc::downgrade(&shared));
        Self { shared, thread: Mutex::new(Some(thread)) }
    }

    pub(crate) fn key(&self, name: &str) -> Result<Key> {
        self.shared.check_process()?;
        Key::new(&self.shared.config.namespace, name)
    }
}

/// Returns all handles of this process, some of which may be gone.
fn handles() -> MutexGuard<'static, Vec<Weak<Shared>>> {
    static HANDLES: Mutex<Vec<Weak<Shared>>> = Mutex::new(Vec::new());
    HANDLES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Drains every handle that is open in this process. Call it when a signal tells the process to end.
///
/// See [`Locks::drain`](crate::Locks::drain) for the effects.
///
/// ```standalone_crate
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let locks = stanchion::Locks::open("memory:").await?;
/// let guard = locks.lock("job").await?;
/// stanchion::drain("SIGTERM");
/// assert_eq!(guard.draining(), Some("SIGTERM"));
/// assert!(locks.lock("another").await.is_err());
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
pub fn drain(reason: &str) {
    // Draining wakes waiting tasks, and such a task may open a handle: so the list is not locked here.
    let handles = handles().clone();
    for handle in handles.iter().filter_map(Weak::upgrade).filter(|handle| handle.is_own_process()) {
        handle.drain(reason);
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !self.shared.is_own_process() {
            return;
        }
        self.shared.drain("the handle was dropped");
        self.shared.command(Command::Close);
        // Without this wait, a process that exits right after the drop would leave its session to expire.
        if let Some(thread) = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            thread.wait(DROP_WITHIN);
        }
    }
}
