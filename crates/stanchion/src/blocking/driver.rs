//! Blocks the calling thread until a future completes.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Wake};
use std::thread::Thread;

use tokio::runtime::Handle;

use crate::error::{Error, ErrorKind, Result};
use crate::thread::RuntimeThread;

/// The thread and runtime that drive the connections of blocking calls. The first call starts it.
///
/// Clones share it, and it ends with the last of them.
///
/// A store that does I/O on its caller's side uses this runtime. It does not use the user's, because the blocking call
/// itself may keep that one from running (ADR 16), nor the keeper's, because that one ends when the handle is closed,
/// and a future that still waits for one of its timers would panic.
#[derive(Clone, Debug, Default)]
pub(super) struct Driver(Arc<OnceLock<RuntimeThread>>);

impl Driver {
    /// Runs a call of the library to its end.
    pub(super) fn call<T, E: From<Error>>(&self, call: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let runtime = self.runtime()?;
        let _entered = runtime.enter();
        park(call)
    }

    fn runtime(&self) -> Result<&Handle> {
        let running = match self.0.get() {
            Some(running) => running,
            None => {
                let started = RuntimeThread::start("stanchion-blocking").map_err(|fault| {
                    let message = "cannot start the thread for blocking calls";
                    Error::new(ErrorKind::Internal, message).with_source(fault)
                })?;
                // If two threads start a runtime at the same time, one of the two runtimes ends again.
                self.0.get_or_init(|| started)
            }
        };
        Ok(&running.runtime)
    }
}

/// Blocks the calling thread until a future that other threads drive completes.
pub(super) fn park<T>(future: impl Future<Output = T>) -> T {
    // Tokio gives a task a budget for each poll. Inside a task that this call blocks, nobody would renew the budget.
    let mut future = pin!(tokio::task::unconstrained(future));
    let unpark = Arc::new(Unpark { thread: std::thread::current(), is_woken: AtomicBool::new(false) });
    let waker = unpark.clone().into();
    let mut context = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
        // Other code may unpark this thread as well.
        while !unpark.is_woken.swap(false, Ordering::Acquire) {
            std::thread::park();
        }
    }
}

struct Unpark {
    thread: Thread,
    is_woken: AtomicBool,
}

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.is_woken.store(true, Ordering::Release);
        self.thread.unpark();
    }
}
