//! Waiting for a future on the calling thread.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Wake};
use std::thread::Thread;

use tokio::runtime::Handle;

use crate::error::{Error, ErrorKind, Result};
use crate::thread::RuntimeThread;

/// Where the connections of blocking calls live: a thread with a runtime, started by the first call. Clones share it; it
/// ends with the last of them.
///
/// A store that does I/O on its caller's side finds this runtime, and not the user's, which the call itself may keep from
/// running (ADR 16). It is not the keeper's either: that one ends when the handle is closed, and then whatever waits for a
/// timer of it panics.
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
                    let message = "the thread of the blocking calls cannot start";
                    Error::new(ErrorKind::Internal, message).with_source(fault)
                })?;
                // If two threads start one at once, one of the two ends again.
                self.0.get_or_init(|| started)
            }
        };
        Ok(&running.runtime)
    }
}

/// Waits for a future that other threads drive.
pub(super) fn park<T>(future: impl Future<Output = T>) -> T {
    // Tokio lets a task have only so much in one go, and inside one that is blocked nobody would give it more.
    let mut future = pin!(tokio::task::unconstrained(future));
    let unpark = Arc::new(Unpark { thread: std::thread::current(), is_woken: AtomicBool::new(false) });
    let waker = unpark.clone().into();
    let mut context = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
        // Others may unpark the thread too.
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
