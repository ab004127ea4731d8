//! Starts threads without a panic, and waits for their end without blocking an executor.

use std::io;
use std::sync::mpsc;
use std::thread::{Builder, ThreadId};
use std::time::Duration;

use tokio::runtime::{Handle, Runtime};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// Starts a thread.
///
/// # Errors
/// Fails if the system has no thread left. Then `run` is dropped on the calling thread.
pub(crate) fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<Ending> {
    let (sender, joined) = mpsc::channel();
    let ended = CancellationToken::new();
    let ends = EndsWhenDropped { ended: ended.clone(), _sender: sender };
    let thread = Builder::new().name(name.to_owned()).spawn(move || {
        let _ends = ends;
        run();
    })?;
    Ok(Ending { thread: thread.thread().id(), ended, joined, limit: Duration::ZERO })
}

struct EndsWhenDropped {
    ended: CancellationToken,
    _sender: mpsc::Sender<()>,
}

impl Drop for EndsWhenDropped {
    fn drop(&mut self) {
        self.ended.cancel();
    }
}

/// Waits for the end of a thread.
#[derive(Debug)]
pub(crate) struct Ending {
    thread: ThreadId,
    ended: CancellationToken,
    /// Disconnected when the thread has ended.
    joined: mpsc::Receiver<()>,
    /// Maximum time for which a drop waits.
    limit: Duration,
}

impl Ending {
    /// Waits for the end of the thread, for at most `limit`.
    ///
    /// Inside a tokio runtime a task waits, and nothing is blocked. If the runtime ends before the thread does, the end of the
    /// runtime waits, so that the process does not exit too early.
    pub(crate) fn wait(mut self, limit: Duration) {
        self.limit = limit;
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move {
                let ending = self;
                ending.ended.cancelled().await;
            });
        }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        // The thread itself may drop the last handle.
        if !self.limit.is_zero() && std::thread::current().id() != self.thread {
            let _ = self.joined.recv_timeout(self.limit); // an error says that the thread has ended, or is late
        }
    }
}

/// A thread that drives a runtime. Dropping this value ends the thread and all tasks of the runtime.
#[derive(Debug)]
pub(crate) struct RuntimeThread {
    pub(crate) runtime: Handle,
    _lives: oneshot::Sender<()>,
}

impl RuntimeThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// Fails if the system has no thread or no descriptor left.
    pub(crate) fn start(name: &str) -> io::Result<Self> {
        let (give, take) = mpsc::channel::<Runtime>();
        let (lives, ends) = oneshot::channel::<()>();
        // The thread comes first: if no thread can be started, no runtime must be dropped here, because that panics in async code.
        spawn(name, move || {
            if let Ok(runtime) = take.recv() {
                drop(runtime.block_on(ends));
                runtime.shutdown_background();
            }
        })?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        give.send(runtime).map_err(|unsent| {
            unsent.0.shutdown_background();
            io::Error::other("the thread has ended")
        })?;
        Ok(Self { runtime: handle, _lives: lives })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Clock;

    const SECOND: Duration = Duration::from_secs(1);

    /// Starts a thread that ends after `span`.
    fn busy(span: Duration) -> Ending {
        spawn("busy", move || std::thread::sleep(span)).unwrap()
    }

    #[test]
    fn wait_blocks_outside_a_runtime() {
        let (clock, ending) = (Clock::system(), busy(SECOND / 5));
        let (start, ended) = (clock.now(), ending.ended.clone());
        ending.wait(30 * SECOND);
        assert!(ended.is_cancelled() && clock.now().since(start) < 20 * SECOND);
    }

    #[test]
    fn wait_blocks_the_end_of_a_runtime_only() {
        for flavour in [tokio::runtime::Builder::new_current_thread, || {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            builder.worker_threads(1);
            builder
        }] {
            let runtime = flavour().build().unwrap();
            let ending = busy(SECOND);
            let ended = ending.ended.clone();
            runtime.block_on(async { ending.wait(30 * SECOND) });
            assert!(!ended.is_cancelled(), "the executor was blocked");
            drop(runtime);
            assert!(ended.is_cancelled(), "nobody waited");
        }
    }

    #[test]
    fn thread_does_not_wait_for_itself() {
        let clock = Clock::system();
        let start = clock.now();
        let (give, take) = mpsc::channel::<Ending>();
        let ending = spawn("self", move || take.recv().unwrap().wait(30 * SECOND)).unwrap();
        let ended = ending.ended.clone();
        give.send(ending).unwrap();
        while !ended.is_cancelled() {
            assert!(clock.now().since(start) < 20 * SECOND);
            std::thread::yield_now();
        }
    }
}
