//! Creates, probes and removes the files of a session: a locked file that shows that the session is open, and a socket
//! that receives its pushes.
//!
//! # Invariants
//! 1. A session is open as long as `<id>.lock` is in its place and a process holds the file's exclusive lock. Otherwise
//!    the session has *expired*. The kernel releases the lock with the last copy of the descriptor, even if the process
//!    is killed. A stopped process keeps the lock.
//! 2. A process creates and locks the file of its session before it leaves the gate. For this reason no other process
//!    sees the file of an open session unlocked, and an unlocked file belongs to an expired session.
//! 3. A probe requests a shared lock and releases it at once, so that probes do not exclude each other.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, flock, fstat, openat, statat, unlinkat};
use rustix::io::Errno;

use super::codec;
use super::error::{from_system, misconfigured};
use super::folder::{self, Folder};
use crate::error::Result;
use crate::store::Push;
use crate::token::SessionId;

/// A session that this handle opened.
#[derive(Debug)]
pub(super) struct OwnSession {
    /// The locked file.
    pub(super) lock: Arc<OwnedFd>,
    /// The socket that receives the session's pushes, if the system could create it.
    pub(super) socket: Option<Arc<UnixDatagram>>,
    /// Device and inode of the locked file.
    identity: (u64, u64),
}

/// Creates and locks the files of a session. Returns `None` if files with this id exist already.
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

/// Returns whether a process holds the lock of a session.
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

/// Returns whether any session of any process is open.
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
        .map_err(|cause| from_system("listing the session files", &folder.sessions, cause))?;
    Ok(entries.flatten().filter_map(|entry| SessionId::from_hex(entry.file_name().to_str()?.split_once('.')?.0)))
}

/// Updates the times of a session's files, so that the system does not delete them as old.
pub(super) fn touch_files(folder: &Folder, session: SessionId) {
    for name in [lock_name(session), socket_name(session)] {
        folder::touch(&folder.sessions.join(name));
    }
}

/// Returns the path of a session's lock file.
pub(super) fn lock_path(folder: &Folder, session: SessionId) -> PathBuf {
    folder.sessions.join(lock_name(session))
}

/// Returns whether the file that this handle locked is still the file that other processes probe.
pub(super) fn is_in_place(folder: &Folder, session: SessionId, own: &OwnSession) -> bool {
    // Use the path, because other processes use it. The open folder may have been renamed.
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
        let _ = unlinkat(&folder.sessions_dir, &name, AtFlags::empty()); // the file may not exist
    }
}

/// Removes the files of expired sessions for which `is_known` returns `false`. The caller must hold the gate.
pub(super) fn remove_orphans(folder: &Folder, is_known: impl Fn(SessionId) -> Result<bool>) -> Result<()> {
    for session in sessions_with_files(folder)? {
        if !is_known(session)? && !is_alive(folder, session)? {
            remove_files(folder, session);
        }
    }
    Ok(())
}

/// Returns the number of session files.
pub(super) fn count_files(folder: &Folder) -> usize {
    fs::read_dir(&folder.sessions).map_or(0, Iterator::count)
}

/// Sends a push to a session of another handle. Drops a push that cannot be sent at once, because it is only a hint.
pub(super) fn send(folder: &Folder, from: &UnixDatagram, session: SessionId, push: &Push) {
    if let Some(path) = socket_path(folder, session) {
        let _ = from.send_to(&codec::encode(push), path);
    }
}

/// Creates the socket from which this handle sends pushes.
pub(super) fn sending_socket() -> Option<UnixDatagram> {
    let socket = UnixDatagram::unbound().ok()?;
    socket.set_nonblocking(true).ok()?;
    Some(socket)
}

/// Returns whether other handles can send pushes to a session.
pub(super) fn has_socket(folder: &Folder, session: SessionId) -> bool {
    statat(&folder.sessions_dir, socket_name(session), AtFlags::SYMLINK_NOFOLLOW).is_ok()
}

fn bind(folder: &Folder, session: SessionId) -> Option<UnixDatagram> {
    let socket = UnixDatagram::bind(socket_path(folder, session)?).ok()?;
    socket.set_nonblocking(true).ok()?;
    Some(socket)
}

/// Returns a path of a session's socket that fits into the 108 bytes of a socket address.
///
/// On Linux with `/proc` the path goes through the descriptor of the folder, so that a deep folder works too.
fn socket_path(folder: &Folder, session: SessionId) -> Option<PathBuf> {
    const MAX_PATH_BYTES: usize = 100;
    let name = socket_name(session);
    let through = PathBuf::from(format!("/proc/self/fd/{}/{name}", folder.sessions_dir.as_raw_fd()));
    if cfg!(target_os = "linux") && statat(&folder.sessions_dir, "/proc/self/fd", AtFlags::empty()).is_ok() {
        return Some(through);
    }
    let direct = folder.sessions.join(name);
    (direct.as_os_str().len() <= MAX_PATH_BYTES).then_some(direct)
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
    fn session_is_open_while_its_lock_is_held() {
        let temp = tempfile::tempdir().unwrap();
        let folder = Folder::prepare(&temp.path().join("locks")).unwrap();
        let id = SessionId::random().unwrap();
        assert!(!is_alive(&folder, id).unwrap());
        let own = create(&folder, id).unwrap().unwrap();
        assert!(is_alive(&folder, id).unwrap() && is_in_place(&folder, id, &own));
        assert!(create(&folder, id).unwrap().is_none(), "an id can be used once");
        // A copy of the descriptor, such as a child's, keeps the session open.
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
    fn replaced_lock_file_is_not_in_place() {
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
    fn pushes_arrive_in_a_deep_folder() {
        let temp = tempfile::tempdir().unwrap();
        let folder = Folder::prepare(&temp.path().join("d".repeat(200)).join("locks")).unwrap();
        let id = SessionId::random().unwrap();
        let own = create(&folder, id).unwrap().unwrap();
        send(&folder, &sending_socket().unwrap(), id, &Push::RecheckAll);
        let mut buffer = [0; 64];
        let length = own.socket.unwrap().recv(&mut buffer).unwrap();
        assert_eq!(codec::decode(&buffer[..length]), Some(Push::RecheckAll));
    }
}
