//! Creates and checks the store's folder, and rejects a folder in which locks would not be safe.
//!
//! A user who can write in the folder can take any lock. For this reason the folder must belong to one user, be on a
//! file system with reliable file locks, and be below folders that no other user can exchange ([`parents`]).

use std::fs::{self, DirBuilder, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FlockOperation, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, flock, fstat, openat, utimensat,
};
use rustix::io::Errno;
use rustix::process::geteuid;

use super::error::{error, from_system, misconfigured};
use super::parents;
use crate::error::{ErrorKind, Result};

/// Maximum length of the database path in bytes: SQLite's limit of 512, minus the longest suffix that SQLite adds.
const MAX_PATH_BYTES: usize = 512 - 8;

/// The checked folder and its parts.
#[derive(Debug)]
pub(super) struct Folder {
    /// The absolute path of the database file, without symbolic links.
    pub(super) database: PathBuf,
    /// The path of the file whose lock queues the writers.
    pub(super) gate: PathBuf,
    /// The path of the folder with the lock files and sockets of the sessions.
    pub(super) sessions: PathBuf,
    /// A descriptor of the `sessions` folder.
    pub(super) sessions_dir: OwnedFd,
    /// A descriptor of the store's folder.
    dir: OwnedFd,
}

impl Folder {
    /// Creates the folder if it does not exist, and checks it.
    pub(super) fn prepare(path: &Path) -> Result<Self> {
        if path.as_os_str().is_empty() || path.as_os_str().as_bytes().contains(&0) {
            return Err(misconfigured("the path of the folder is empty or contains a NUL character; name a folder"));
        }
        // This removes a slash at the end, which would make the system follow a symbolic link.
        let path: PathBuf = path.components().collect();
        create(&path)?;
        let state = fs::symlink_metadata(&path).map_err(|cause| from_system("checking the folder", &path, cause))?;
        check_folder(&path, &state)?;
        let path = parents::resolve(&path)?;
        let database = path.join("locks.db");
        if database.as_os_str().len() > MAX_PATH_BYTES {
            let length = database.as_os_str().len();
            return Err(misconfigured(format!(
                "the path {} has {length} bytes, but SQLite allows {MAX_PATH_BYTES}; choose a shorter path",
                database.display()
            )));
        }
        let dir = open_dir(&path)?;
        check_file_system(&path, &dir)?;
        let sessions = path.join("sessions");
        create(&sessions)?;
        let sessions_dir = open_dir(&sessions)?;
        let folder = Self { database, gate: path.join("gate"), sessions, sessions_dir, dir };
        folder.lock_folders();
        Ok(folder)
    }

    /// Locks the folders, because systemd-tmpfiles does not delete old files in a locked folder.
    pub(super) fn lock_folders(&self) {
        for dir in [&self.dir, &self.sessions_dir] {
            // This fails while systemd-tmpfiles is cleaning the folder. The next call tries again.
            let _ = flock(dir, FlockOperation::NonBlockingLockShared);
        }
    }

    /// Returns whether the folder is below a folder in which the system may delete old files.
    pub(super) fn is_cleaned(&self) -> bool {
        ["/tmp", "/var/tmp", "/private/tmp", "/private/var/tmp"]
            .iter()
            .any(|cleaned| self.database.starts_with(cleaned))
    }
}

/// The files that all processes must share, with the identity (device and inode) that each had when this process opened
/// it.
#[derive(Debug)]
pub(super) struct SharedFiles(Vec<(PathBuf, (u64, u64))>);

impl SharedFiles {
    /// Reads the current identity of each file.
    pub(super) fn of(folder: &Folder) -> Result<Self> {
        let with_identity = |path: PathBuf| match fs::symlink_metadata(&path) {
            Ok(state) => Ok((path, (state.dev(), state.ino()))),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                Err(error(ErrorKind::Unavailable, was_deleted(&path)))
            }
            Err(cause) => Err(from_system("checking a file of the store", &path, cause)),
        };
        let mut paths = vec![folder.gate.clone(), folder.database.clone()];
        paths.extend(["-wal", "-shm"].map(|ending| with_ending(&folder.database, ending)));
        paths.into_iter().map(with_identity).collect::<Result<_>>().map(Self)
    }

    /// Returns a file that was deleted or replaced since. Other processes do not see changes to the file that this
    /// process still has open.
    pub(super) fn missing(&self) -> Option<&Path> {
        let is_there = |path: &Path, identity| {
            fs::symlink_metadata(path).is_ok_and(|state| (state.dev(), state.ino()) == identity)
        };
        self.0.iter().find(|(path, identity)| !is_there(path, *identity)).map(|(path, _)| path.as_path())
    }

    /// Updates the times of the files, so that the system does not delete them as old.
    pub(super) fn touch(&self) {
        self.0.iter().for_each(|(path, _)| touch(path));
    }
}

/// Updates the times of a file, so that the system does not delete it as old. Ignores errors.
pub(super) fn touch(path: &Path) {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let times = Timestamps { last_access: now, last_modification: now };
    let _ = utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW);
}

/// Returns the error message for a file of the store that was deleted or replaced.
pub(super) fn was_deleted(path: &Path) -> String {
    format!("{} was deleted or replaced while it was in use", path.display())
}

/// Appends an ending to the path of the database, for example `-wal`.
pub(super) fn with_ending(database: &Path, ending: &str) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// Opens a plain file, with access for its owner only. Creates it if it does not exist.
pub(super) fn open_plain_file(path: &Path) -> Result<OwnedFd> {
    let failed = |cause: Errno| from_system("opening a file of the store", path, cause);
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(CWD, path, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
    let state = fs::symlink_metadata(path).map_err(|cause| from_system("opening a file of the store", path, cause))?;
    check_file(path, &state)?;
    Ok(file)
}

/// Rejects a file that is not a plain file of this user with access for its owner only.
pub(super) fn check_file(path: &Path, state: &Metadata) -> Result<()> {
    let shown = path.display();
    if !state.is_file() {
        return Err(misconfigured(format!("{shown} is not a plain file; move it away, or choose another folder")));
    }
    check_owner(path, state.uid())?;
    if state.mode() & 0o077 != 0 {
        return Err(misconfigured(format!("other users may use {shown}; run `chmod 600 {shown}`")));
    }
    Ok(())
}

fn create(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(_) => return Ok(()),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {}
        Err(cause) => return Err(from_system("checking the folder", path, cause)),
    }
    // Check the parents first, so that nothing is created below a folder that another user could exchange.
    parents::resolve(path)?;
    match DirBuilder::new().recursive(true).mode(0o700).create(path) {
        Err(cause) if cause.kind() != io::ErrorKind::AlreadyExists => {
            Err(from_system("creating the folder", path, cause))
        }
        _ => Ok(()),
    }
}

fn check_folder(path: &Path, state: &Metadata) -> Result<()> {
    let shown = path.display();
    if state.is_symlink() {
        return Err(misconfigured(format!("{shown} is a symbolic link; name its target folder")));
    }
    if !state.is_dir() {
        return Err(misconfigured(format!("{shown} is not a folder; the embedded store needs its own folder")));
    }
    check_owner(path, state.uid())?;
    check_mode(path, state.mode())
}

/// Rejects a folder that other users may enter, and suggests a remedy.
///
/// The remedy is `chmod` only for a folder of the store that has nothing else in it. Another folder may be the system's
/// `/tmp` or `/srv`, which other users need.
fn check_mode(path: &Path, mode: u32) -> Result<()> {
    if mode & 0o077 == 0 {
        return Ok(());
    }
    let shown = path.display();
    let remedy = if mode & 0o1000 == 0 && is_of_the_store(path) {
        format!("run `chmod 700 {shown}`")
    } else {
        let inside = path.join("stanchion");
        format!("name a new folder inside it, for example {}, in every program that shares the locks", inside.display())
    };
    Err(misconfigured(format!("other users may enter {shown}; {remedy}")))
}

/// Returns whether a store made this folder, or its folder of sessions, and nothing else is in it.
fn is_of_the_store(path: &Path) -> bool {
    if path.ends_with("sessions") && path.with_file_name("gate").exists() {
        return true;
    }
    let is_part = |name: &std::ffi::OsStr| {
        name.to_str().is_some_and(|name| name == "gate" || name == "sessions" || name.starts_with("locks.db"))
    };
    let has_others = || fs::read_dir(path).map_or(true, |all| all.flatten().any(|entry| !is_part(&entry.file_name())));
    path.join("gate").exists() && !has_others()
}

fn check_owner(path: &Path, owner: u32) -> Result<()> {
    let own = geteuid().as_raw();
    if owner == own {
        return Ok(());
    }
    let shown = path.display();
    Err(misconfigured(format!(
        "{shown} belongs to user {owner}, but this process runs as user {own}: run it as that user, or use a store with a \
         server; a second folder would not exclude the programs of the first one"
    )))
}

fn open_dir(path: &Path) -> Result<OwnedFd> {
    let failed = |cause: Errno| from_system("opening the folder", path, cause);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = match openat(CWD, path, flags, Mode::empty()) {
        // The kernel reports one of these if the path is a symbolic link.
        Err(Errno::NOTDIR | Errno::LOOP) => {
            let state = fs::symlink_metadata(path).map_err(|cause| from_system("opening the folder", path, cause))?;
            check_folder(path, &state)?;
            return Err(failed(Errno::NOTDIR));
        }
        result => result.map_err(failed)?,
    };
    let state = fstat(&dir).map_err(failed)?;
    check_owner(path, state.st_uid)?;
    check_mode(path, state.st_mode)?;
    Ok(dir)
}

#[cfg(target_os = "linux")]
fn check_file_system(path: &Path, dir: &OwnedFd) -> Result<()> {
    let state = rustix::fs::fstatfs(dir).map_err(|cause| from_system("checking the file system", path, cause))?;
    // The magic numbers have 32 bits, but the type and the sign of the field differ between platforms.
    match network_file_system(state.f_type as u32) {
        None => Ok(()),
        Some(name) => Err(misconfigured(format!(
            "{} is on {name}, where file locks may fail silently; choose a folder on a local disk, or use a store \
             with a server to share locks between machines",
            path.display()
        ))),
    }
}

#[cfg(not(target_os = "linux"))]
fn check_file_system(_path: &Path, _dir: &OwnedFd) -> Result<()> {
    Ok(())
}

/// Returns the name of a file system that is shared over a network or served by another process, or `None` for a local
/// one.
#[cfg(any(target_os = "linux", test))]
fn network_file_system(magic: u32) -> Option<&'static str> {
    Some(match magic {
        0x6969 => "NFS",
        0x517b | 0xff53_4d42 | 0xfe53_4d42 => "SMB",
        0x0102_1997 => "9P",
        0x6573_5546 => "FUSE",
        0x00c3_6400 => "Ceph",
        0x5346_414f | 0x6b41_4653 => "AFS",
        0x7375_7245 => "Coda",
        0x7461_636f => "OCFS2",
        0x0116_1970 => "GFS2",
        0x0bd0_0bd0 => "Lustre",
        0x564c => "NCP",
        0x786f_4256 => "a VirtualBox share",
        0xbacb_acbc => "a VMware share",
        0x4750_4653 => "GPFS",
        0x1983_0326 => "BeeGFS",
        0xaad7_aaea => "PanFS",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn rejected(path: &Path) -> Error {
        let error = Folder::prepare(path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Misconfigured, "{error}");
        error
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn only_network_file_systems_are_rejected() {
        for magic in [0x6969, 0x517b, 0xff53_4d42, 0xfe53_4d42, 0x0102_1997, 0x6573_5546, 0x00c3_6400, 0x0bd0_0bd0] {
            assert!(network_file_system(magic).is_some(), "{magic:x}");
        }
        // ext4, XFS, Btrfs, tmpfs, overlayfs, ZFS.
        for magic in [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994, 0x794c_7630, 0x2fc1_2fc1] {
            assert_eq!(network_file_system(magic), None, "{magic:x}");
        }
    }

    #[test]
    fn new_folders_are_private_to_their_owner() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("a").join("b");
        Folder::prepare(&path).unwrap();
        for made in [temp.path().join("a"), path.clone(), path.join("sessions")] {
            assert_eq!(fs::metadata(&made).unwrap().mode() & 0o7777, 0o700, "{made:?}");
        }
        Folder::prepare(&path).unwrap();
    }

    #[test]
    fn open_folder_is_rejected_with_a_remedy() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("open");
        fs::create_dir(&path).unwrap();
        set_mode(&path, 0o755);
        // A folder that no store made may have to be open to other users.
        let is_for_a_new_folder = || {
            let error = rejected(&path).to_string();
            assert!(!error.contains("chmod") && error.contains("name a new folder inside it"), "{error}");
        };
        is_for_a_new_folder();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o755, "a rejected folder is not changed");
        set_mode(&path, 0o700);
        Folder::prepare(&path).unwrap();
        fs::write(path.join("gate"), "").unwrap();
        set_mode(&path, 0o755);
        let error = rejected(&path).to_string();
        assert!(error.contains(&format!("chmod 700 {}", path.display())), "{error}");
        set_mode(&path, 0o1777);
        is_for_a_new_folder();
        set_mode(&path, 0o755);
        fs::write(path.join("motd"), "").unwrap();
        is_for_a_new_folder();
    }

    #[test]
    fn links_files_and_foreign_folders_are_rejected() {
        let temp = tempfile::tempdir().unwrap();
        let real = temp.path().join("real");
        fs::create_dir(&real).unwrap();
        set_mode(&real, 0o700);
        let link = temp.path().join("link");
        symlink(&real, &link).unwrap();
        assert!(rejected(&link).to_string().contains("symbolic link"));
        assert!(rejected(&link.join("")).to_string().contains("symbolic link"), "the store ignores a slash at the end");
        let file = temp.path().join("file");
        fs::write(&file, "x").unwrap();
        assert!(rejected(&file).to_string().contains("not a folder"));
        rejected(&file.join("below"));
        symlink(&real, real.join("sessions")).unwrap();
        assert!(rejected(&real).to_string().contains("symbolic link"));
        assert!(check_owner(&real, geteuid().as_raw() + 1).unwrap_err().to_string().contains("belongs to user"));
    }

    #[test]
    fn world_writable_parent_is_rejected() {
        let temp = tempfile::tempdir().unwrap();
        let parent = temp.path().join("public");
        fs::create_dir(&parent).unwrap();
        set_mode(&parent, 0o777);
        let error = rejected(&parent.join("locks")).to_string();
        assert!(error.contains("other users may write in"), "{error}");
        assert!(!parent.join("locks").exists(), "the store creates nothing in it");
        set_mode(&parent, 0o1777);
        Folder::prepare(&parent.join("locks")).unwrap();
        set_mode(&parent, 0o777);
        rejected(&parent.join("locks"));
    }

    #[test]
    fn invalid_paths_are_rejected() {
        let temp = tempfile::tempdir().unwrap();
        rejected(Path::new(""));
        rejected(Path::new("a\0b"));
        rejected(&temp.path().join("x".repeat(300)));
        let long: PathBuf =
            std::iter::once(temp.path().to_path_buf()).chain((0..5).map(|_| "y".repeat(120).into())).collect();
        assert!(rejected(&long).to_string().contains("SQLite allows"));
    }
}
