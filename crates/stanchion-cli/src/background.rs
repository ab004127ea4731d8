//! Holds a key in a process of its own, which stays in the background when the command in the foreground has ended.
//!
//! The command forks the holder before it opens the store. The holder waits for the key and sends a [`Reply`] through a socket.
//! The command then gives the token to its caller, and confirms that with one byte.
//!
//! # Invariants
//! 1. Only the holder ever has the key. If the holder is killed, its session ends and with it the hold, unless the hold has a
//!    lifetime of its own.
//! 2. Before the confirmation, the holder gives the key up as soon as the command or the watched process ends. Whenever the
//!    command is killed, nothing stays held of which the caller does not have the token.
//! 3. After the confirmation, the holder holds the key until the watched process ends or the hold is lost; a hold with a
//!    lifetime it leaves to the store.
//! 4. When the command returns, the holder has no stream, terminal or folder of its caller.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::child::{Event, Refusal};
use crate::execution::warn_of_own_key;
use crate::exit_code;
use crate::hold::{self, HoldPlan};
use crate::message::{Failure, Verbosity};
use crate::process::Process;
use crate::{store, sys};

/// The confirmation of the command.
const DELIVERED: u8 = b'd';

/// The answer of the holder to the command.
#[derive(Deserialize, Serialize)]
enum Reply {
    Obtained(Obtained),
    Refused { code: u8, message: String },
}

/// A key that the holder has.
#[derive(Deserialize, Serialize)]
pub(crate) struct Obtained {
    pub(crate) key: String,
    /// The library's text of the token.
    pub(crate) token: String,
    pub(crate) fence: u64,
}

/// A holder that has the key and waits for the confirmation. Dropping this value has it release the key.
#[derive(Debug)]
pub(crate) struct Holder(UnixStream);

impl Holder {
    /// Confirms that the caller has the token: from now on the key stays held without this process.
    pub(crate) fn confirm(mut self) -> Result<(), Failure> {
        self.0.write_all(&[DELIVERED]).map_err(|_| ended())
    }
}

fn ended() -> Failure {
    Failure::new(exit_code::INTERNAL, "the process that holds the key was killed")
}

/// Starts a holder, and waits until it has the key. The holder gives up when `watched` ends.
///
/// Must be called while this process has one thread.
pub(crate) fn start(
    plan: &HoldPlan,
    watched: Option<Process>,
    verbosity: Verbosity,
) -> Result<(Obtained, Holder), Failure> {
    debug_assert!(std::fs::read_dir("/proc/self/task").map_or(true, |threads| threads.count() == 1), "one thread");
    let (mut ours, theirs) = UnixStream::pair().map_err(|error| refused(&error))?;
    if sys::fork().map_err(|error| refused(&error))?.is_none() {
        drop(ours);
        // Values on the stacks of the callers belong to the command, so they must not be dropped here.
        let served = catch_unwind(AssertUnwindSafe(|| serve(&theirs, plan, watched, verbosity)));
        std::process::exit(if served.is_ok() { exit_code::OK } else { exit_code::INTERNAL }.into());
    }
    drop((theirs, watched));
    let mut reply = Vec::new();
    let received = ours.read_to_end(&mut reply);
    match received.ok().and_then(|_| serde_json::from_slice(&reply).ok()) {
        Some(Reply::Obtained(obtained)) => Ok((obtained, Holder(ours))),
        Some(Reply::Refused { code, message }) => Err(Failure { code, message }),
        None => Err(ended()),
    }
}

fn refused(error: &io::Error) -> Failure {
    Failure::new(exit_code::INTERNAL, format!("cannot start the process that holds the key: {error}"))
}

/// Makes this process independent of its caller: a session of its own, without a terminal; no signal but KILL ends it; and no
/// descriptors above the standard streams but the `kept` ones, because those of the caller may be locks, or pipes whose end
/// somebody waits for.
pub(crate) fn leave_caller(kept: &[BorrowedFd<'_>]) {
    sys::close_inherited_descriptors(kept);
    let _ = rustix::process::setsid(); // fails in a process that leads its group already
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2] {
        sys::ignore(signal);
    }
}

/// The holder's life.
fn serve(command: &UnixStream, plan: &HoldPlan, watched: Option<Process>, verbosity: Verbosity) {
    let kept: Vec<_> = std::iter::once(command.as_fd()).chain(watched.as_ref().and_then(Process::descriptor)).collect();
    leave_caller(&kept);
    let held = (|| {
        let nothing = File::options().read(true).write(true).open("/dev/null").map_err(|error| refused(&error))?;
        // It keeps stderr for now: it reports the wait there.
        for stream in [libc::STDIN_FILENO, libc::STDOUT_FILENO] {
            sys::replace_stream(stream, nothing.as_fd()).map_err(|error| refused(&error))?;
        }
        let ends = CancellationToken::new();
        let delivered = listen(command, ends.clone()).map_err(|error| refused(&error))?;
        if let Some(process) = watched {
            let ends = ends.clone();
            let wait = move || {
                process.wait();
                ends.cancel();
            };
            std::thread::Builder::new().name("process".into()).spawn(wait).map_err(|error| refused(&error))?;
        }
        let runtime = store::runtime()?;
        let held = runtime.block_on(hold(command, &nothing, plan, &ends, delivered, verbosity));
        runtime.shutdown_background();
        held
    })();
    if let Err(Failure { code, message }) = held {
        answer(command, &Reply::Refused { code, message });
    }
}

fn answer(mut command: &UnixStream, reply: &Reply) {
    if let Ok(text) = serde_json::to_vec(reply) {
        let _ = command.write_all(&text); // the command may have ended
    }
    let _ = command.shutdown(Shutdown::Write); // the command may have ended
}

/// Notices the confirmation of the command, or cancels `ends` if the command ends without one.
fn listen(command: &UnixStream, ends: CancellationToken) -> io::Result<oneshot::Receiver<()>> {
    let (delivered, receiver) = oneshot::channel();
    let mut command = command.try_clone()?;
    let read = move || {
        let mut byte = [0];
        match command.read_exact(&mut byte) {
            Ok(()) if byte == [DELIVERED] => {
                let _ = delivered.send(()); // the holder has given up
            }
            _ => ends.cancel(),
        }
    };
    std::thread::Builder::new().name("command".into()).spawn(read)?;
    Ok(receiver)
}

async fn hold(
    command: &UnixStream,
    nothing: &File,
    plan: &HoldPlan,
    ends: &CancellationToken,
    delivered: oneshot::Receiver<()>,
    verbosity: Verbosity,
) -> Result<(), Failure> {
    let tell = |event| match event {
        Event::Waiting(key) => warn_of_own_key(&key, verbosity),
        Event::Report(report) => verbosity.report(report),
        _ => {}
    };
    let (opened, guard) = hold::obtain_one(plan, ends, &tell).await.map_err(|refusal| match refusal {
        Refusal::Failed(failure) => failure,
        Refusal::Busy(message) => Failure::new(exit_code::NOT_OBTAINED, message),
        Refusal::Cancelled => {
            Failure::new(exit_code::NOT_OBTAINED, "the process that the key was for ended during the wait")
        }
    })?;
    sys::replace_stream(libc::STDERR_FILENO, nothing.as_fd()).map_err(|error| refused(&error))?;
    let _ = std::env::set_current_dir("/"); // if it cannot be entered, the caller's folder stays in use
    let (key, token, fence) = (guard.key().name().to_owned(), guard.token().to_string(), guard.fence().get());
    answer(command, &Reply::Obtained(Obtained { key, token, fence }));
    let is_delivered = tokio::select! {
        biased;
        () = ends.cancelled() => false,
        delivered = delivered => delivered.is_ok(),
    };
    if is_delivered && plan.lifetime.is_some() {
        guard.detach();
    } else {
        if is_delivered {
            tokio::select! {
                () = ends.cancelled() => {}
                _ = guard.lost() => {}
            }
        }
        let _ = guard.release().await; // the store frees the key when the session ends
    }
    let _ = opened.locks.close().await; // the session then expires by itself
    Ok(())
}
