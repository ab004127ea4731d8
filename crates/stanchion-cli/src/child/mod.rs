//! The child: the command that runs while the key is held.
//!
//! # Invariants
//! 1. A command is started only after the key was obtained, and never once a signal has asked to stop.
//! 2. While the key is held for it, the command is alive or being waited for; the key is released after its end.
//! 3. When the key is lost, the whole process group is dead before another may have the key.
//! 4. When this process dies, whatever the way, the whole process group dies: the kernel kills the child, the guardian
//!    the rest.
//!
//! Everything that happens arrives on one channel as an [`Event`], so that there is one order of things. The main thread
//! reads it, and it is the one that starts the child: the kernel kills a child when the *thread* that started it ends.

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

pub(crate) use signals::{ends_the_wait, listen};
pub(crate) use supervise::{NotStarted, Ran, Supervisor};
pub(crate) use terminal::has_a_job_shell;

/// What can happen.
#[derive(Debug)]
pub(crate) enum Event {
    /// This process got a signal.
    Signal(i32),
    /// Others are before us.
    Waiting {
        /// How many.
        ahead: u32,
    },
    /// The holders share the key with another limit than ours.
    LimitsDiffer {
        /// Theirs, the smallest.
        in_use: u32,
        /// Ours.
        asked: u32,
    },
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

/// Why the key is not held.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// Others have it, or it is closed.
    Busy(String),
    /// The wait was cancelled.
    Cancelled,
    /// Something is wrong.
    Failed(Failure),
}

/// The key was lost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Loss {
    /// Why.
    pub(crate) cause: LossCause,
    /// How long nobody else can have it, if that has an end. Zero: another may have it now.
    pub(crate) left: Option<Duration>,
}

/// What the release found.
#[derive(Debug)]
pub(crate) struct Released {
    /// The hold had been lost before.
    pub(crate) was_lost: bool,
    /// What the one who released it by force said.
    pub(crate) said: Option<String>,
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// By itself, with this code.
    Code(u8),
    /// By this signal.
    Signal(i32),
}

/// What to run, and how to end it.
#[derive(Debug)]
pub(crate) struct ChildPlan {
    /// The program and its arguments; never empty.
    pub(crate) command: Vec<OsString>,
    /// The time between TERM and KILL.
    pub(crate) kill_after: Duration,
}
