//! Hands the foreground of the terminal to the child and takes it back.
//!
//! The child has a process group of its own, and a terminal reads and sends Ctrl-C for one group only. An interactive
//! command must work as if the shell had started it, so its group is put into the foreground.
//!
//! It is put there at once if we are in the foreground with both stdin and stdout. In a pipeline (`stanchion … | less`)
//! another program may need the terminal, so there it is done only when the child asks for it, that is, when the kernel
//! stops it because it reads.

use std::io::{self, IsTerminal as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, getpid, getppid};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr, tcsetpgrp};

use crate::sys;

/// The controlling terminal of this process.
#[derive(Debug)]
pub(crate) struct Terminal {
    device: OwnedFd,
    /// Our group handed the foreground to the child's.
    given: bool,
    modes: Option<Termios>,
}

impl Terminal {
    /// The controlling terminal, if there is one.
    pub(crate) fn open() -> Option<Self> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let device = rustix::fs::open("/dev/tty", flags, Mode::empty()).ok()?;
        let modes = tcgetattr(&device).ok();
        Some(Self { device, given: false, modes })
    }

    /// Its descriptor.
    pub(crate) fn device(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// Whether our group is in the foreground.
    pub(crate) fn is_ours(&self) -> bool {
        tcgetpgrp(&self.device).is_ok_and(|group| Some(group) == own_group())
    }

    /// Whether the child is to be in the foreground from its start.
    pub(crate) fn is_to_be_given_at_start(&self) -> bool {
        self.is_ours() && io::stdin().is_terminal() && io::stdout().is_terminal()
    }

    /// Whether the child's group has it from us.
    pub(crate) fn is_given(&self) -> bool {
        self.given
    }

    /// The child has taken it, between fork and exec.
    pub(crate) fn was_given(&mut self) {
        self.given = true;
    }

    /// Puts the group into the foreground, if that is ours to do.
    pub(crate) fn give(&mut self, group: Pid) -> bool {
        if !self.given && self.is_ours() {
            self.given = put_in_foreground(self.device.as_fd(), group).is_ok();
        }
        self.given
    }

    /// Takes the foreground back, if it was given.
    pub(crate) fn take_back(&mut self) {
        if self.given {
            self.given = false;
            // Fails when the terminal was hung up; then nobody has it.
            let _ = own_group().map(|group| put_in_foreground(self.device.as_fd(), group)); // the terminal may have hung up
        }
    }

    /// Sets the modes as they were at the start: after a program that died before it could do so itself.
    pub(crate) fn restore_modes(&self) {
        if let (Some(modes), true) = (&self.modes, self.is_ours()) {
            let _ = tcsetattr(&self.device, OptionalActions::Drain, modes); // the terminal may have hung up
        }
    }
}

/// Puts the group into the foreground. System calls only: it also runs in the child between fork and exec.
pub(crate) fn put_in_foreground(device: BorrowedFd<'_>, group: Pid) -> rustix::io::Result<()> {
    // SIGTTOU would stop a process that does this from the background.
    sys::while_ignoring(libc::SIGTTOU, || tcsetpgrp(device, group))
}

/// Our process group, unless its leader is outside of the process ids that we can see.
fn own_group() -> Option<Pid> {
    Pid::from_raw(sys::group_of(getpid().as_raw_pid())?)
}

/// Whether somebody would continue us if we stopped: a shell, the parent of our job, in the same session.
pub(crate) fn has_a_job_shell() -> bool {
    let own = getpid().as_raw_pid();
    let (group, session) = (sys::group_of(own), sys::session_of(own));
    // A parent that we cannot see, outside of a container, is none.
    let mut ancestor = getppid();
    while let Some(pid) = ancestor {
        if sys::group_of(pid.as_raw_pid()) != group {
            return sys::session_of(pid.as_raw_pid()) == session;
        }
        ancestor = parent_of(pid);
    }
    false
}

fn parent_of(pid: Pid) -> Option<Pid> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).ok()?;
    // The name of the program, in brackets, may hold anything.
    let number = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?;
    Pid::from_raw(number.parse().ok()?)
}
