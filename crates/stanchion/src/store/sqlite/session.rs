//! The proof of life of a session: a file whose lock the kernel holds for its process, and a socket for its pushes.
//!
//! # Invariants
//! 1. A session is alive exactly as long as `<id>.lock` is in its place and somebody holds its exclusive lock. The
//!    kernel drops the lock with the last copy of the descriptor, however the process ends; a stopped process keeps it.
//! 2. Session files are made under the gate, locked before the gate is left. So nobody meets a living session's file
//!    unlocked, and a file that is not locked belongs to the dead.
//! 3. A probe asks for a shared lock and drops it at once: probes do not exclude each other.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, flock, fstat, openat, statat, unlinkat};
use rustix::io::Errno;

use super::error::{from_system, misconfigured};
use super::folder::{self, Folder};
use super::message;
use crate::error::Result;
use crate::store::Push;
use crate::token::SessionId;

/// A session that this handle opened.
#[derive(Debug)]
pub(super) struct OwnSession {
    /// The locked file.
    pub(super) lock: Arc<OwnedFd>,
    /// Where its pushes arrive, if the system can have such a socket.
    pub(super) socket: Option<Arc<UnixDatagram>>,
    identity: (u64, u64),
}

/// Makes and locks the files of a session. `None` if there are files of this id already.
pub(super) fn create(folder: &Folder, session: SessionId) -> Result<Option<OwnSession>> {
    let name = lock_name(session);
    let failed = |cause: Errno| from_system("opening a session", &folder.sessions.join(&name), cause);
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let lock = match openat(&folder.sessions_dir, &name, flags, Mode::RUSR | Mode::WUSR) {
        Ok(lock) => lock,
        Err(Errno::EXIST) => return Ok(None),
        Err(cause) => return Err(failed(cause)),
    };
    let locked = loop {
        match flock(&lock, FlockOperation::LockExclusive) {
            Err(Errno::INTR) => {}
            result => break result.and_then(|()| fstat(&lock)),
        }
    };
    let state = locked.map_err(|cause| {
        remove_files(folder, session);
        failed(cause)
    })?;
    let socket = bind(folder, session).map(Arc::new);
    Ok(Some(OwnSession { lock: Arc::new(lock), socket, identity: (state.st_dev as u64, state.st_ino as u64) }))
}

/// Whether somebody holds the lock of a session.
pub(super) fn is_alive(folder: &Folder, session: SessionId) -> Result<bool> {
    let name = lock_name(session);
    let failed = |cause: Errno| from_system("probing a session", &folder.sessions.join(&name), cause);
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = match openat(&folder.sessions_dir, &name, flags, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(false),
        Err(Errno::LOOP) => {
            let shown = folder.sessions.join(&name);
            return Err(misconfigured(format!("{} is a symbolic link; remove it", shown.display())));
        }
        Err(cause) => return Err(failed(cause)),
    };
    loop {
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => return Ok(false),
            Err(Errno::WOULDBLOCK) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(cause) => return Err(failed(cause)),
        }
    }
}

/// Whether a session of anybody lives.
pub(super) fn any_is_alive(folder: &Folder) -> Result<bool> {
    for session in sessions_with_files(folder)? {
        if is_alive(folder, session)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn sessions_with_files(folder: &Folder) -> Result<impl Iterator<Item = SessionId>> {
    let entries = fs::read_dir(&folder.sessions)
        .map_err(|cause| from_system("looking for left sessions", &folder.sessions, cause))?;
    Ok(entries.flatten().filter_map(|entry| SessionId::from_hex(entry.file_name().to_str()?.split_once('.')?.0)))
}

/// Makes the files of a session look used, for programs that delete old ones.
pub(super) fn touch_files(folder: &Folder, session: SessionId) {
    for name in [lock_name(session), socket_name(session)] {
        folder::touch(&folder.sessions.join(name));
    }
}

/// Returns the path of a session's lock file.
pub(super) fn lock_path(folder: &Folder, session: SessionId) -> PathBuf {
    folder.sessions.join(lock_name(session))
}

/// Whether the file that this handle has locked is still the one that others probe.
pub(super) fn is_in_place(folder: &Folder, session: SessionId, own: &OwnSession) -> bool {
    // By its path, not by the open folder: that may have been renamed, and others meet at the path.
    match fs::symlink_metadata(lock_path(folder, session)) {
        Ok(state) => {
            use std::os::unix::fs::MetadataExt;
            (state.dev(), state.ino()) == own.identity
        }
        Err(_) => false,
    }
}

/// Removes the files of a session that has ended.
pub(super) fn remove_files(folder: &Folder, session: SessionId) {
    for name in [lock_name(session), socket_name(session)] {
        let _may_be_gone = unlinkat(&folder.sessions_dir, &name, AtFlags::empty());
    }
}

/// Removes files that no living process has, and for which `is_known` knows no session. Only under the gate.
pub(super) fn remove_orphans(folder: &Folder, is_known: impl Fn(SessionId) -> Result<bool>) -> Result<()> {
    for session in sessions_with_files(folder)? {
        if !is_known(session)? && !is_alive(folder, session)? {
            remove_files(folder, session);
        }
    }
    Ok(())
}

/// How many files the sessions have.
pub(super) fn count_files(folder: &Folder) -> usize {
    fs::read_dir(&folder.sessions).map_or(0, Iterator::count)
}

/// Sends a push to a session of another handle. A hint: what cannot be sent now is not sent.
pub(super) fn send(folder: &Folder, from: &UnixDatagram, session: SessionId, push: &Push) {
    if let Some(path) = socket_path(folder, session) {
        let _a_hint = from.send_to(&message::encode(push), path);
    }
}

/// A socket to send from.
pub(super) fn sending_socket() -> Option<UnixDatagram> {
    let socket = UnixDatagram::unbound().ok()?;
    socket.set_nonblocking(true).ok()?;
    Some(socket)
}

fn bind(folder: &Folder, session: SessionId) -> Option<UnixDatagram> {
    let socket = UnixDatagram::bind(socket_path(folder, session)?).ok()?;
    socket.set_nonblocking(true).ok()?;
    Some(socket)
}

/// A path of the socket that fits into the 108 bytes that a socket's address has: where the system has `/proc`, through
/// the open folder, however deep that is.
fn socket_path(folder: &Folder, session: SessionId) -> Option<PathBuf> {
    const LONGEST: usize = 100;
    let name = socket_name(session);
    let through = PathBuf::from(format!("/proc/self/fd/{}/{name}", folder.sessions_dir.as_raw_fd()));
    if cfg!(target_os = "linux") && statat(&folder.sessions_dir, "/proc/self/fd", AtFlags::empty()).is_ok() {
        return Some(through);
    }
    let direct = folder.sessions.join(name);
    (direct.as_os_str().len() <= LONGEST).then_some(direct)
}

fn lock_name(session: SessionId) -> String {
    format!("{}.lock", session.to_hex())
}

fn socket_name(session: SessionId) -> String {
    format!("{}.sock", session.to_hex())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_alive_while_its_lock_is_held_and_in_place() {
        let temp = tempfile::tempdir().unwrap();
        let folder = Folder::prepare(&temp.path().join("locks")).unwrap();
        let id = SessionId::random().unwrap();
        assert!(!is_alive(&folder, id).unwrap());
        let own = create(&folder, id).unwrap().unwrap();
        assert!(is_alive(&folder, id).unwrap() && is_in_place(&folder, id, &own));
        assert!(create(&folder, id).unwrap().is_none(), "an id is used once");
        // A copy of the descriptor, as a child has it, keeps it alive.
        let copy = own.lock.try_clone().unwrap();
        drop(own);
        assert!(is_alive(&folder, id).unwrap());
        drop(copy);
        assert!(!is_alive(&folder, id).unwrap());
        remove_orphans(&folder, |_| Ok(true)).unwrap();
        assert!(count_files(&folder) > 0, "files of a known session stay");
        remove_orphans(&folder, |_| Ok(false)).unwrap();
        assert_eq!(count_files(&folder), 0);
    }

    #[test]
    fn a_file_that_was_exchanged_is_not_in_place() {
        let temp = tempfile::tempdir().unwrap();
        let folder = Folder::prepare(&temp.path().join("locks")).unwrap();
        let id = SessionId::random().unwrap();
        let own = create(&folder, id).unwrap().unwrap();
        remove_files(&folder, id);
        assert!(!is_in_place(&folder, id, &own));
        let other = create(&folder, id).unwrap().unwrap();
        assert!(is_in_place(&folder, id, &other) && !is_in_place(&folder, id, &own));
    }

    #[test]
    fn pushes_arrive_however_long_the_path_is() {
        let temp = tempfile::tempdir().unwrap();
        let folder = Folder::prepare(&temp.path().join("d".repeat(200)).join("locks")).unwrap();
        let id = SessionId::random().unwrap();
        let own = create(&folder, id).unwrap().unwrap();
        send(&folder, &sending_socket().unwrap(), id, &Push::RecheckAll);
        let mut buffer = [0; 64];
        let length = own.socket.unwrap().recv(&mut buffer).unwrap();
        assert_eq!(message::decode(&buffer[..length]), Some(Push::RecheckAll));
    }
}
