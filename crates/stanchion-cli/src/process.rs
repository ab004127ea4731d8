//! Names the process for which a key is held, and notices its end.

use std::os::fd::BorrowedFd;
#[cfg(target_os = "linux")]
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, getpid, getppid};

use crate::exit_code;
use crate::message::Failure;
use crate::sys;

/// Interval between two looks at a process for which the system has no descriptor.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The limit of a look that does not wait.
const NOW: Option<Duration> = Some(Duration::ZERO);

/// A process that lived when this value was made.
#[derive(Debug)]
pub(crate) struct Process {
    id: Pid,
    watched: Watched,
}

#[derive(Debug)]
enum Watched {
    /// A descriptor of the process. It never stands for another process that gets the same id later.
    #[cfg(target_os = "linux")]
    Descriptor(OwnedFd),
    /// Start time of the process, which tells it from a later one of the same id.
    Started(Option<String>),
}

impl Process {
    /// Finds a process by its id.
    pub(crate) fn open(id: i32) -> Result<Self, Failure> {
        let missing = || {
            Failure::new(
                exit_code::USAGE,
                format!("there is no process {id}: --pid takes the id of a process that lives"),
            )
        };
        let found = Pid::from_raw(id).ok_or_else(missing)?;
        let process = Self { id: found, watched: watch(found).map_err(|_| missing())? };
        if process.has_ended(NOW) { Err(missing()) } else { Ok(process) }
    }

    /// Finds the process that called this one: its parent, or the shell of which the parent is a subshell.
    ///
    /// Returns `None` if a service manager or a container runtime started this process, because then no caller can be told.
    pub(crate) fn caller() -> Result<Option<Self>, Failure> {
        loop {
            let Some(id) = find_caller()? else { return Ok(None) };
            let process = Self::open(id.as_raw_nonzero().get());
            // If it is still the caller, it has lived all the time, and its id was not another's.
            if find_caller()? == Some(id) {
                return process.map(Some);
            }
        }
    }

    /// Returns the process id.
    pub(crate) fn id(&self) -> u32 {
        self.id.as_raw_nonzero().get().unsigned_abs()
    }

    /// Returns the name of the program that it runs.
    pub(crate) fn name(&self) -> String {
        let name = std::fs::read_to_string(format!("/proc/{}/comm", self.id())).unwrap_or_default();
        if name.trim().is_empty() { "process".to_owned() } else { name.trim().to_owned() }
    }

    /// Returns the descriptor that must stay open.
    pub(crate) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match &self.watched {
            #[cfg(target_os = "linux")]
            Watched::Descriptor(descriptor) => Some(descriptor.as_fd()),
            Watched::Started(_) => None,
        }
    }

    /// Blocks until the process has ended.
    pub(crate) fn wait(&self) {
        // A descriptor is waited for without a limit, so this is the interval without one, and after an error.
        while !self.has_ended(None) {
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Returns whether the process has ended. May wait for that until `limit`.
    fn has_ended(&self, limit: Option<Duration>) -> bool {
        match &self.watched {
            #[cfg(target_os = "linux")]
            Watched::Descriptor(descriptor) => becomes_readable(descriptor, limit),
            Watched::Started(started) => is_gone(self.id) || start_time(self.id) != *started,
        }
    }
}

fn watch(id: Pid) -> Result<Watched, Errno> {
    #[cfg(target_os = "linux")]
    match rustix::process::pidfd_open(id, rustix::process::PidfdFlags::empty()) {
        Ok(descriptor) => return Ok(Watched::Descriptor(descriptor)),
        // An old kernel, or a filter of system calls.
        Err(Errno::NOSYS | Errno::PERM) => {}
        Err(error) => return Err(error),
    }
    Ok(Watched::Started(start_time(id)))
}

#[cfg(target_os = "linux")]
fn becomes_readable(descriptor: &OwnedFd, limit: Option<Duration>) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let limit = limit.map(|limit| Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() });
    let mut waited = [PollFd::new(descriptor, PollFlags::IN)];
    matches!(poll(&mut waited, limit.as_ref()), Ok(1))
}

fn is_gone(id: Pid) -> bool {
    rustix::process::test_kill_process(id) == Err(Errno::SRCH)
}

/// Returns a field of `/proc/ID/stat` by its number in proc(5), which begins with 1. Works from the third field on.
fn stat_field(id: Pid, number: usize) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{}/stat", id.as_raw_nonzero())).ok()?;
    // The second field is the name in parentheses, and may contain anything.
    let (_, fields) = text.rsplit_once(')')?;
    fields.split_whitespace().nth(number.checked_sub(3)?).map(str::to_owned)
}

fn start_time(id: Pid) -> Option<String> {
    // A process that has ended and was not reaped yet counts as gone.
    stat_field(id, 3).filter(|state| state != "Z" && state != "X")?;
    stat_field(id, 22)
}

fn find_caller() -> Result<Option<Pid>, Failure> {
    let session = sys::session_of(0);
    let parent = getppid().filter(|parent| sys::session_of(parent.as_raw_nonzero().get()) == session);
    match parent {
        Some(parent) => Ok(Some(shell_of(parent))),
        // A service manager makes its services leaders of a session.
        None if session == Some(getpid().as_raw_nonzero().get()) => Ok(None),
        // An orphan has a parent in another session.
        None => Err(Failure::new(exit_code::NOT_OBTAINED, "the process that called stanchion has ended")),
    }
}

/// Returns the shell whose `$$` a subshell has: `$(…)`, a pipeline and `(…)` run in copies of the shell's process, and such a
/// copy may end together with the command that it calls.
fn shell_of(mut id: Pid) -> Pid {
    const SHELLS: [&str; 9] = ["ash", "bash", "busybox", "dash", "ksh", "ksh93", "mksh", "sh", "zsh"];
    let is_shell = |id: Pid| {
        let program = std::fs::read_link(format!("/proc/{}/exe", id.as_raw_nonzero())).ok();
        program.as_deref().and_then(|path| path.file_name()?.to_str()).is_some_and(|name| SHELLS.contains(&name))
    };
    // The system places the code (field 26) and the stack (field 28) of each program at random, and copies have the same.
    let places = |id: Pid| Some((stat_field(id, 26)?, stat_field(id, 28).filter(|place| place != "0")?));
    while let Some(parent) = stat_field(id, 4).and_then(|parent| Pid::from_raw(parent.parse().ok()?))
        && is_shell(id)
        && places(id).is_some_and(|copied| places(parent) == Some(copied))
    {
        id = parent;
    }
    id
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    fn start() -> (Child, Process) {
        let child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let process = Process::open(child.id() as i32).unwrap();
        (child, process)
    }

    #[test]
    fn end_of_a_process_is_noticed() {
        let (mut child, process) = start();
        let polled = Process { id: process.id, watched: Watched::Started(start_time(process.id)) };
        assert!(!process.has_ended(NOW) && !polled.has_ended(NOW));
        assert_eq!((process.id(), process.name().as_str()), (child.id(), "cat"));
        child.kill().unwrap();
        // Nobody has reaped it yet.
        process.wait();
        polled.wait();
        child.wait().unwrap();
        assert!(process.has_ended(NOW) && polled.has_ended(NOW));
        assert_eq!(Process::open(child.id() as i32).unwrap_err().code, exit_code::USAGE);
    }

    #[test]
    fn other_process_with_same_id_is_recognised() {
        let (mut child, process) = start();
        let earlier = Process { id: process.id, watched: Watched::Started(Some("1".to_owned())) };
        assert!(earlier.has_ended(NOW));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
