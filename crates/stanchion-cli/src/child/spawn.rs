//! Starts the child and notices its end.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::Sender;

use rustix::io::FdFlags;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, getpid, getppid, waitid};

use super::terminal::put_in_foreground;
use super::{ChildPlan, Event, Exit, HeldKey, Obtained, guardian};
use crate::message::{Failure, quoted};
use crate::{environment, exit_code, sys};

/// The least number of the child's copy of the lock descriptor. Scripts use low numbers and round ones as they please (200
/// is the one of flock(1)'s man page), and would close it.
const LEAST_DESCRIPTOR: i32 = 873;

/// Settings that the child gets besides its command.
pub(crate) struct Surroundings<'a> {
    pub(crate) obtained: &'a Obtained,
    /// Where the child registers itself with the guardian.
    pub(crate) registration: BorrowedFd<'a>,
    /// The terminal whose foreground the child takes.
    pub(crate) terminal: Option<BorrowedFd<'a>>,
    /// Our parent ignored SIGCHLD, so the child ignores it too.
    pub(crate) ignores_chld: bool,
}

/// Starts the child. Call it on the main thread only: the kernel kills the child when the thread that started it ends.
pub(crate) fn spawn(plan: &ChildPlan, with: &Surroundings<'_>) -> Result<Pid, Failure> {
    let (program, arguments) = plan.command.split_first().unwrap_or_else(|| unreachable!("a plan has a command"));
    let mut command = Command::new(program);
    command.args(arguments).process_group(0);
    command.env(environment::KEY, lines(with.obtained, |held| held.key.name().to_owned()));
    command.env(environment::FENCE, lines(with.obtained, |held| held.fence.to_string()));
    for secret in environment::NOT_FOR_CHILDREN {
        command.env_remove(secret);
    }
    command.envs(plan.environment.iter().map(|(name, value)| (name, value)));

    let refused = |error: io::Error| {
        Failure::new(exit_code::INTERNAL, format!("cannot prepare to run `{}`: {error}", name_of(program)))
    };
    let registration = with.registration.try_clone_to_owned().map_err(refused)?;
    let terminal = with.terminal.map(|device| device.try_clone_to_owned()).transpose().map_err(refused)?;
    let descriptor = with.obtained.descriptor.as_ref().map(high_copy).transpose().map_err(refused)?;
    let wrapper = getpid();
    let ignores_chld = with.ignores_chld;
    sys::before_exec(&mut command, move || {
        #[cfg(target_os = "linux")]
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // It may have died before that call.
        if getppid() != Some(wrapper) {
            return Err(rustix::io::Errno::SRCH.into());
        }
        guardian::register(&registration, getpid())?;
        if let Some(device) = &terminal {
            // A terminal that was hung up meanwhile is no reason not to run.
            let _ = put_in_foreground(device.as_fd(), getpid()); // the terminal may have hung up
        }
        if let Some(descriptor) = &descriptor {
            rustix::io::fcntl_setfd(descriptor, FdFlags::empty())?;
        }
        if ignores_chld {
            sys::ignore(libc::SIGCHLD);
        }
        Ok(())
    });
    let child = command.spawn().map_err(|error| cannot_run(program, &error))?;
    // It is waited for by id: see `watch`.
    Ok(Pid::from_child(&child))
}

/// One line for each key, and so the text alone for one key.
pub(super) fn lines(obtained: &Obtained, text: impl Fn(&HeldKey) -> String) -> String {
    obtained.keys.iter().map(text).collect::<Vec<_>>().join("\n")
}

/// Sends events when the child ends or is stopped. Waits for the process and not for its streams: a child that leaves a
/// daemon behind with stdout open has ended all the same.
pub(crate) fn watch(child: Pid, events: Sender<Event>) -> Result<(), Failure> {
    let look = move || {
        loop {
            let seen = rustix::io::retry_on_intr(|| {
                waitid(WaitId::Pid(child), WaitIdOptions::EXITED | WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT)
            });
            // It is our child, and nobody else reaps it.
            let Ok(Some(status)) = seen else { break };
            let event = if let Some(code) = status.exit_status() {
                Event::Exited(Exit::Code(u8::try_from(code & 0xff).unwrap_or(u8::MAX)))
            } else if let Some(signal) = status.terminating_signal() {
                Event::Exited(Exit::Signal(signal))
            } else {
                let _ = waitid(WaitId::Pid(child), WaitIdOptions::STOPPED | WaitIdOptions::NOHANG); // only clears the state
                Event::Stopped(status.stopping_signal().unwrap_or(libc::SIGSTOP))
            };
            let ended = matches!(event, Event::Exited(_));
            if events.send(event).is_err() || ended {
                break;
            }
        }
    };
    std::thread::Builder::new().name("child".into()).spawn(look).map(|_| ()).map_err(|error| {
        Failure::new(exit_code::INTERNAL, format!("cannot start the thread that watches the command: {error}"))
    })
}

/// Reaps the processes of others that were left to this one, as they are to the first process of a container.
pub(crate) fn reap_orphans(own: &[Pid]) {
    while let Some(orphan) = sys::ended_child().and_then(Pid::from_raw).filter(|ended| !own.contains(ended)) {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        if rustix::io::retry_on_intr(|| waitid(WaitId::Pid(orphan), options)).is_err() {
            break;
        }
    }
}

/// Takes the ended child's exit code from the kernel: from now on its id may become another's.
pub(crate) fn reap(child: Pid) {
    let _ = rustix::io::retry_on_intr(|| waitid(WaitId::Pid(child), WaitIdOptions::EXITED)); // only clears the state
}

fn high_copy(descriptor: &OwnedFd) -> io::Result<OwnedFd> {
    match rustix::io::fcntl_dupfd_cloexec(descriptor, LEAST_DESCRIPTOR) {
        Ok(copy) => Ok(copy),
        // Fewer descriptors are allowed.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::MFILE) => descriptor.try_clone(),
        Err(error) => Err(error.into()),
    }
}

/// Refuses a command that cannot be found or executed, before the wait for the key rather than after it.
pub(crate) fn check_program(program: &OsStr) -> Result<(), Failure> {
    let is_path = program.as_bytes().contains(&b'/');
    let Some(folders) = std::env::var_os("PATH").filter(|_| !is_path) else {
        return if is_path {
            can_execute(Path::new(program)).map_err(|cause| cannot_run(program, &cause))
        } else {
            Ok(())
        };
    };
    let mut cause = io::Error::from(io::ErrorKind::NotFound);
    for folder in std::env::split_paths(&folders) {
        match can_execute(&folder.join(program)) {
            Ok(()) => return Ok(()),
            Err(denied) if denied.kind() == io::ErrorKind::PermissionDenied => cause = denied,
            Err(_) => {}
        }
    }
    Err(cannot_run(program, &cause))
}

fn can_execute(path: &Path) -> io::Result<()> {
    if std::fs::metadata(path)?.is_dir() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok(rustix::fs::access(path, rustix::fs::Access::EXEC_OK)?)
}

fn cannot_run(program: &OsStr, error: &io::Error) -> Failure {
    let name = name_of(program);
    match error.kind() {
        io::ErrorKind::NotFound => {
            Failure::new(exit_code::NOT_FOUND, format!("`{name}`: command not found: give its path, or a name in PATH"))
        }
        io::ErrorKind::PermissionDenied => Failure::new(
            exit_code::NOT_EXECUTABLE,
            format!("`{name}` may not be executed: it must be a program file with the right to execute (chmod +x)"),
        ),
        _ => Failure::new(exit_code::NOT_EXECUTABLE, format!("`{name}` could not be executed: {error}")),
    }
}

fn name_of(program: &OsStr) -> String {
    quoted(&program.to_string_lossy())
}
