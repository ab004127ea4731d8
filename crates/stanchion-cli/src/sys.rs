//! The only file with unsafe code: signal dispositions, process groups, descriptors, fork, and the step between fork and exec.
#![allow(unsafe_code, reason = "the standard library and rustix have no safe form of these calls")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

/// Returns whether this process ignores the signal, because its parent wanted that, as `nohup` does.
pub(crate) fn is_ignored(signal: i32) -> bool {
    let mut current = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: only reads the disposition, into a struct of the right type that is valid when zeroed.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), current.as_mut_ptr()) == 0
            && current.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// Ignores the signal from now on.
pub(crate) fn ignore(signal: i32) {
    // SAFETY: SIG_IGN runs no code of ours.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// Closes every descriptor above the standard streams, except `kept`: descriptors that the caller of this program left open
/// are not for a helper.
pub(crate) fn close_inherited_descriptors(kept: &[BorrowedFd<'_>]) {
    let mut kept: Vec<_> = kept.iter().map(|descriptor| descriptor.as_raw_fd().unsigned_abs()).collect();
    kept.sort_unstable();
    let mut first = 3;
    for descriptor in kept.into_iter().filter(|descriptor| *descriptor >= 3) {
        close_from(first, descriptor - 1);
        first = descriptor + 1;
    }
    close_from(first, u32::MAX);
}

fn close_from(first: u32, last: u32) {
    if first > last {
        return;
    }
    // SAFETY: no object of this program owns a descriptor in the range: the caller does this first.
    #[cfg(target_os = "linux")]
    let closed = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0_u32) } == 0;
    #[cfg(not(target_os = "linux"))]
    let closed = false;
    if !closed {
        // An older kernel, or another system.
        for descriptor in first..=last.min(1023) {
            // SAFETY: as above; a number that is not open is an error without effect.
            unsafe { libc::close(descriptor as i32) };
        }
    }
}

/// Splits this process in two. Returns the process id of the child, or `None` in the child.
///
/// The process must have one thread: the child gets no other, and what another thread had locked would stay locked in it.
pub(crate) fn fork() -> io::Result<Option<i32>> {
    // SAFETY: the one caller, `background::start`, keeps the rule above.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(None),
        child => Ok(Some(child)),
    }
}

/// Makes a standard stream a copy of another descriptor.
pub(crate) fn replace_stream(stream: i32, with: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the number of a standard stream is owned by no object that closes it.
    match unsafe { libc::dup2(with.as_raw_fd(), stream) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// The process id of a child that has ended and that nobody has reaped, if there is one. Reaps nothing.
pub(crate) fn ended_child() -> Option<i32> {
    let mut found = MaybeUninit::<libc::siginfo_t>::zeroed();
    let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: the kernel fills a struct of the right type that is valid when zeroed, as it stays if no child has ended.
    let pid = unsafe {
        if libc::waitid(libc::P_ALL, 0, found.as_mut_ptr(), options) != 0 {
            return None;
        }
        found.assume_init().si_pid()
    };
    (pid > 0).then_some(pid)
}

/// Does something while the signal is ignored. Safe between fork and exec if `step` is.
pub(crate) fn while_ignoring<T>(signal: i32, step: impl FnOnce() -> T) -> T {
    // SAFETY: SIG_IGN runs no code of ours, and what was there before is put back.
    let before = unsafe { libc::signal(signal, libc::SIG_IGN) };
    let result = step();
    if before != libc::SIG_ERR {
        // SAFETY: as above.
        unsafe { libc::signal(signal, before) };
    }
    result
}

/// The process group of a process. In a container it is 0 when its leader is outside of the container's process ids, which
/// is why this is not asked through rustix: its `getpgid` and `getpgrp` panic then.
pub(crate) fn group_of(pid: i32) -> Option<i32> {
    // SAFETY: takes and returns a number.
    let group = unsafe { libc::getpgid(pid) };
    (group >= 0).then_some(group)
}

/// The session of a process. As above: 0 when its leader is outside.
pub(crate) fn session_of(pid: i32) -> Option<i32> {
    // SAFETY: takes and returns a number.
    let session = unsafe { libc::getsid(pid) };
    (session >= 0).then_some(session)
}

/// Has the child run `step` between fork and exec. An error of it is the error of `spawn`.
///
/// `step` may make system calls and nothing else: no memory is taken, no lock, no output.
pub(crate) fn before_exec(command: &mut Command, step: impl FnMut() -> io::Result<()> + Send + Sync + 'static) {
    // SAFETY: the one caller, `child::spawn`, keeps the rule above.
    unsafe { command.pre_exec(step) };
}
