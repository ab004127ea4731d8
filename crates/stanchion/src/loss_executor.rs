//! Carries out the policies of lost holds: calls hooks, and aborts the process.

use std::collections::BTreeMap;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::clock::{BootTime, Clock};
use crate::error::LossCause;
use crate::lease::Hold;
use crate::on_lost::{Hook, Loss, OnLost};

/// Maximum time for which the thread sleeps when no abort is due.
const MAX_SLEEP: Duration = Duration::from_secs(3_600);

/// Carries out the policies of one handle, on threads of its own.
///
/// The keeper's thread has sessions to renew, and a caller's thread only looked at its guard. Hooks and aborts have one thread
/// each, because a hook that blocks must not delay an abort, and because a process may lose all its holds at once. Each thread
/// starts with the first loss.
#[derive(Debug, Default)]
pub(crate) struct LossExecutor {
    hooks: Worker<(Hook, Loss)>,
    aborts: Worker<Abort>,
}

impl LossExecutor {
    pub(crate) fn carry_out(&self, policy: &OnLost, hold: &Arc<Hold>, cause: LossCause) {
        match policy {
            OnLost::Signal => {}
            OnLost::Hook(hook) => {
                let loss = Loss { key: hold.key.clone(), fence: hold.fence, cause };
                self.hooks.give((hook.clone(), loss), "stanchion-on-lost", call_hooks);
            }
            OnLost::AbortAfter(grace) => {
                let at = Clock::system().now().after(*grace);
                let abort = Abort { at, grace: *grace, hold: hold.clone(), cause };
                self.aborts.give(abort, "stanchion-abort", await_aborts);
            }
        }
    }
}

/// A thread that starts with its first task.
struct Worker<T>(Mutex<Option<Sender<T>>>);

impl<T> fmt::Debug for Worker<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Worker")
    }
}

impl<T> Default for Worker<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T: Send + 'static> Worker<T> {
    fn give(&self, task: T, name: &str, live: fn(Receiver<T>)) {
        let mut tasks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if tasks.is_none() {
            let (sender, receiver) = mpsc::channel();
            let started = std::thread::Builder::new().name(name.into()).spawn(move || live(receiver));
            *tasks = started.is_ok().then_some(sender);
        }
        let refused = match &*tasks {
            Some(tasks) => tasks.send(task).err().map(|refused| refused.0),
            None => Some(task),
        };
        drop(tasks);
        if let Some(task) = refused {
            // The system has no thread left. Running the task here delays this thread, which is better than not running the task.
            let (sender, receiver) = mpsc::channel();
            let _received_below = sender.send(task);
            drop(sender);
            live(receiver);
        }
    }
}

fn call_hooks(losses: Receiver<(Hook, Loss)>) {
    for (hook, loss) in losses {
        // A hook that panics does not keep the next hook from being called.
        let _panicked = std::panic::catch_unwind(AssertUnwindSafe(|| hook(&loss)));
    }
}

struct Abort {
    at: BootTime,
    grace: Duration,
    hold: Arc<Hold>,
    cause: LossCause,
}

/// Aborts the process when an abort is due. Runs until no abort is left, also after the handle is gone.
fn await_aborts(tasks: Receiver<Abort>) {
    let clock = Clock::system();
    let mut waiting = BTreeMap::new();
    let mut more = true;
    for number in 0_u64.. {
        let next =
            waiting.first_key_value().map_or(MAX_SLEEP, |((at, _), _): (&(BootTime, u64), _)| at.since(clock.now()));
        let task = match more {
            true => tasks.recv_timeout(next),
            false if waiting.is_empty() => return,
            false => {
                std::thread::sleep(next);
                Err(RecvTimeoutError::Timeout)
            }
        };
        match task {
            Ok(abort) => drop(waiting.insert((abort.at, number), abort)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => more = false,
        }
        while let Some(first) = waiting.first_entry()
            && first.key().0 <= clock.now()
        {
            first.remove().carry_out();
        }
    }
}

impl Abort {
    fn carry_out(self) {
        if self.hold.is_releasing() {
            return;
        }
        let (key, cause, grace) = (&self.hold.key, self.cause, self.grace);
        eprintln!("stanchion: key `{key}` was lost ({cause}) and its guard is still there after {grace:?}: aborting");
        std::process::abort();
    }
}
