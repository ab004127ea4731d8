//! The guardian: a process that outlives this one just long enough to kill the processes that this one left behind.
//!
//! The kernel kills the child when this process dies, but not the child's own children. The guardian holds the read end of
//! a pipe whose only write end is here. The child writes its process group into it before it becomes the command, so there
//! is no moment at which it runs unknown to the guardian. An end of the pipe without the word that all is well means that
//! this process has died: then the guardian kills the group. It ends in both cases.
//!
//! It is this same program, started with an argument that is in no help text. It gets no lock descriptor, no store, no
//! environment, and no standard streams but the pipe. It closes every other descriptor, because those of the caller may be
//! locks or pipes whose end somebody waits for.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::message::Failure;
use crate::{background, exit_code};

/// The argument that makes this program a guardian.
pub(crate) const ARGUMENT: &str = "__guardian";

/// All is well: the child has ended, its group is no concern any more.
const DONE: u8 = b'd';

/// A running guardian.
#[derive(Debug)]
pub(crate) struct Guardian {
    pipe: OwnedFd,
    process: Child,
}

impl Guardian {
    /// Starts it.
    pub(crate) fn start() -> Result<Self, Failure> {
        let refused = |error| {
            Failure::new(exit_code::INTERNAL, format!("cannot start the process that guards the command: {error}"))
        };
        let (read, write) = std::io::pipe().map_err(refused)?;
        let process = Command::new(own_binary().map_err(refused)?)
            .arg0("stanchion")
            .arg(ARGUMENT)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(read))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(refused)?;
        Ok(Self { pipe: write.into(), process })
    }

    /// Where the child writes its process group, by [`register`].
    pub(crate) fn registration(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// The child has ended. Called before it is reaped: until then its id is not another's.
    pub(crate) fn all_is_well(&self) {
        // It can only fail when the guardian is dead, and then there is nobody to tell.
        let _ = rustix::io::write(&self.pipe, &[DONE]); // the guardian may be dead
    }

    /// Ends it, and waits for its end. After [`all_is_well`](Self::all_is_well), or where no child was started.
    pub(crate) fn dismiss(mut self) {
        let _ = self.process.kill(); // it may have ended already
        let _ = self.process.wait(); // it may have ended already
    }
}

/// Tells the guardian which group to kill. Runs in the child between fork and exec: system calls only.
pub(crate) fn register(pipe: &OwnedFd, group: Pid) -> std::io::Result<()> {
    let number = group.as_raw_nonzero().get().to_ne_bytes();
    match rustix::io::write(pipe, &number)? {
        4 => Ok(()),
        _ => Err(std::io::ErrorKind::WriteZero.into()),
    }
}

/// The guardian's life.
pub(crate) fn guard() {
    background::leave_caller(&[]);
    let Ok(pipe) = std::io::stdin().as_fd().try_clone_to_owned() else { return };
    let mut pipe = File::from(pipe);
    let mut number = [0; 4];
    if pipe.read_exact(&mut number).is_err() {
        return;
    }
    let mut word = [0];
    let all_is_well = matches!(pipe.read(&mut word), Ok(1)) && word[0] == DONE;
    let group = i32::from_ne_bytes(number);
    // To the system, group 1 is every process there is, and a number below 0 is one process.
    if !all_is_well
        && group > 1
        && let Some(group) = Pid::from_raw(group)
    {
        // Nobody is left to be told of a group that is gone or that may not be killed.
        let _ = kill_process_group(group, Signal::KILL);
    }
}

/// This program, also after its file was replaced by a newer one.
fn own_binary() -> std::io::Result<PathBuf> {
    if cfg!(target_os = "linux") { Ok("/proc/self/exe".into()) } else { std::env::current_exe() }
}
