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
mod signals;
mod spawn;
mod supervise;
mod terminal;

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::time::Duration;

use stanchion::LossCause;

use crate::message::Failure;
use crate::report::Report;

pub(crate) use signals::{ends_the_wait, listen};
pub(crate) use spawn::{check_program, reap_orphans};
pub(crate) use supervise::{Left, NotStarted, Ran, Supervisor};
pub(crate) use terminal::has_a_job_shell;

/// An event of the main loop.
#[derive(Debug)]
pub(crate) enum Event {
    /// This process got a signal. SIGCHLD: a process has ended that is perhaps nobody else's to reap.
    Signal(i32),
    /// The key is in use, and this process is in its queue.
    Waiting,
    /// There is something to report about the key.
    Report(Report),
    /// The key is held.
    Obtained(Obtained),
    /// The key is not held and will not be.
    NotObtained(Refusal),
    /// The key is not held any more, or will not be for long.
    Lost(Loss),
    /// The release is done.
    Released(Result<Released, Failure>),
    /// The child has ended; it is not reaped yet, so its id is not another's.
    Exited(Exit),
    /// The child was stopped by this signal.
    Stopped(i32),
}

/// The key is held.
#[derive(Debug)]
pub(crate) struct Obtained {
    /// The key as the library spells it.
    pub(crate) key: String,
    /// The fence of the hold.
    pub(crate) fence: u64,
    /// The descriptor that keeps the key for as long as anyone has a copy, in stores that work that way.
    pub(crate) descriptor: Option<OwnedFd>,
}

/// The reason why the key is not held.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// The key is in use or closed.
    Busy(String),
    /// The wait was cancelled.
    Cancelled,
    /// The store or this tool failed.
    Failed(Failure),
}

/// The key was lost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Loss {
    /// Why.
    pub(crate) cause: LossCause,
    /// Time for which no other process can have the key, if that has an end. Zero: another process may have it now.
    pub(crate) left: Option<Duration>,
}

/// The result of a release.
#[derive(Debug)]
pub(crate) struct Released {
    /// The hold had been lost before.
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

/// A command to run, and the way to end it.
#[derive(Debug)]
pub(crate) struct ChildPlan {
    /// The program and its arguments; never empty.
    pub(crate) command: Vec<OsString>,
    /// Time between SIGTERM and SIGKILL after a loss.
    pub(crate) kill_after: Duration,
    /// Environment variable that makes an inner `stanchion` choose the same store.
    pub(crate) store: Option<(&'static str, OsString)>,
}
