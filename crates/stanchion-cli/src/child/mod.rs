//! The child: the command that runs while the key is held.
//!
//! # Invariants
//! 1. A command is started only after the key was obtained, and never once a signal has asked to stop.
//! 2. While the key is held for it, the command is alive or being waited for; the key is released after its end.
//! 3. When the key is lost, the whole process group is dead before another may have the key. If the system does not allow
//!    that (the command has become another user), the user is told at once.
//! 4. However this process dies, the whole process group dies: the kernel kills the child, and the guardian the rest.
//!
//! Everything that happens arrives on one channel as an [`Event`], so that there is one order of events. The main thread
//! reads the channel and starts the child: the kernel kills a child when the *thread* that started it ends.

pub(crate) mod guardian;
mod ready;
mod signals;
mod spawn;
mod supervise;
mod terminal;

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use stanchion::{Key, LossCause};

use crate::message::{Failure, quoted_key};
use crate::report::Report;

pub(crate) use ready::prepare_ready_file;
pub(crate) use signals::{Inherited, ends_the_wait, listen};
pub(crate) use spawn::{check_program, reap_orphans};
pub(crate) use supervise::{Left, NotStarted, Ran, Supervisor};
pub(crate) use terminal::has_a_job_shell;

/// An event of the main loop.
#[derive(Debug)]
pub(crate) enum Event {
    /// This process got a signal. SIGCHLD: a process has ended that is perhaps nobody else's to reap.
    Signal(i32),
    /// This key is in use, and this process is in its queue.
    Waiting(Key),
    /// There is something to report about a key.
    Report(Report),
    /// All keys are held.
    Obtained(Obtained),
    /// The keys are not held and will not be.
    NotObtained(Refusal),
    /// One of the keys is not held any more, or will not be for long. Each key is lost once at most.
    Lost(Loss),
    /// The release is done.
    Released(Result<Released, Failure>),
    /// The child has ended; it is not reaped yet, so its id is not another's.
    Exited(Exit),
    /// The child was stopped by this signal.
    Stopped(i32),
}

/// The keys are held.
#[derive(Debug)]
pub(crate) struct Obtained {
    /// In the order in which the user named them.
    pub(crate) keys: Vec<HeldKey>,
    /// The descriptor that keeps the key for as long as anyone has a copy, in stores that work that way.
    pub(crate) descriptor: Option<OwnedFd>,
}

impl Obtained {
    /// Returns the lost key as messages quote it.
    pub(crate) fn shown(&self, loss: &Loss) -> String {
        self.keys.get(loss.key).map(|held| quoted_key(held.key.name())).unwrap_or_default()
    }
}

/// A key that is held.
#[derive(Debug)]
pub(crate) struct HeldKey {
    pub(crate) key: Key,
    /// The fence of the hold.
    pub(crate) fence: u64,
}

/// The reason why the keys are not held.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// A key is in use or closed.
    Busy(String),
    /// The wait was cancelled.
    Cancelled,
    /// The store or this tool failed.
    Failed(Failure),
}

/// A key was lost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Loss {
    /// Its place in [`Obtained::keys`].
    pub(crate) key: usize,
    /// Why.
    pub(crate) cause: LossCause,
    /// Time for which no other process can have the key, if that has an end. Zero: another process may have it now.
    pub(crate) left: Option<Duration>,
}

/// The result of a release.
#[derive(Debug)]
pub(crate) struct Released {
    /// One of the holds had been lost before.
    pub(crate) was_lost: bool,
    /// The explanation of a loss: the reason of a forced release, or the store's last warning or fault.
    pub(crate) explanation: Option<String>,
}

/// The end of a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// The child exited with this code.
    Code(u8),
    /// This signal killed the child.
    Signal(i32),
}

/// The fate of the command when the key is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnLost {
    /// End it: SIGTERM, then SIGKILL before another can have the key
    Term,
    /// End it at once: SIGKILL
    Kill,
    /// Let it run on without the key, beside the next holder; exit 76 all the same
    Ignore,
}

/// A command to run, and the way to end it.
#[derive(Debug)]
pub(crate) struct ChildPlan {
    /// The program and its arguments; never empty.
    pub(crate) command: Vec<OsString>,
    /// Time between SIGTERM and SIGKILL after a loss.
    pub(crate) kill_after: Duration,
    pub(crate) on_lost: OnLost,
    /// Exists while the command runs and its keys are held.
    pub(crate) ready_file: Option<PathBuf>,
    /// Environment that makes an inner `stanchion` choose the same store and namespace.
    pub(crate) environment: Vec<(&'static str, OsString)>,
}
