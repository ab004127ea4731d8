//! The store's folder: made, checked, and refused where locks would not be safe in it.
//!
//! A user who can write in the folder can take any lock. For that reason it belongs to one user alone, on a file system
//! whose locks the kernel keeps, below folders that nobody else can exchange ([`parents`]).

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

/// SQLite's own limit of 512 bytes, less the longest ending it adds to the name.
const LONGEST_PATH: usize = 512 - 8;

/// The checked folder and its parts.
#[derive(Debug)]
pub(super) struct Folder {
    /// The database file, by its absolute path without links.
    pub(super) database: PathBuf,
    /// The file whose lock queues the writers.
    pub(super) gate: PathBuf,
    /// The folder of the session locks and sockets.
    pub(super) sessions: PathBuf,
    /// The same, open.
    pub(super) sessions_dir: OwnedFd,
    /// The folder itself, open.
    dir: OwnedFd,
}

impl Folder {
    /// Makes the folder if there is none, and checks it.
    pub(super) fn prepare(path: &Path) -> Result<Self> {
        if path.as_os_str().is_empty() || path.as_os_str().as_bytes().contains(&0) {
            return Err(misconfigured("the path of the folder is empty or holds a NUL character; name a folder"));
        }
        // Without a slash at its end, behind which a link would be followed.
        let path: PathBuf = path.components().collect();
        make(&path)?;
        let state = fs::symlink_metadata(&path).map_err(|cause| from_system("looking at the folder", &path, cause))?;
        check_folder(&path, &state)?;
        let path = parents::resolve(&path)?;
        let database = path.join("locks.db");
        if database.as_os_str().len() > LONGEST_PATH {
            let length = database.as_os_str().len();
            return Err(misconfigured(format!(
                "the path {} has {length} bytes, SQLite allows {LONGEST_PATH}; choose a shorter one",
                database.display()
            )));
        }
        let dir = open_dir(&path)?;
        check_file_system(&path, &dir)?;
        let sessions = path.join("sessions");
        make(&sessions)?;
        let sessions_dir = open_dir(&sessions)?;
        let folder = Self { database, gate: path.join("gate"), sessions, sessions_dir, dir };
        folder.keep_cleaners_away();
        Ok(folder)
    }

    /// Has programs that delete old files pass over this folder. systemd-tmpfiles leaves a folder alone that somebody has
    /// locked.
    pub(super) fn keep_cleaners_away(&self) {
        for dir in [&self.dir, &self.sessions_dir] {
            // A cleaner that is at work here right now has it. The next call tries again.
            let _ = flock(dir, FlockOperation::NonBlockingLockShared);
        }
    }

    /// Whether the system may delete old files in the folder.
    pub(super) fn is_cleaned(&self) -> bool {
        ["/tmp", "/var/tmp", "/private/tmp", "/private/var/tmp"]
            .iter()
            .any(|cleaned| self.database.starts_with(cleaned))
    }
}

/// The files that all users of the folder must have in common, and what was there when they were opened.
#[derive(Debug)]
pub(super) struct SharedFiles(Vec<(PathBuf, (u64, u64))>);

impl SharedFiles {
    /// The files as they are now.
    pub(super) fn of(folder: &Folder) -> Result<Self> {
        let with_identity = |path: PathBuf| match fs::symlink_metadata(&path) {
            Ok(state) => Ok((path, (state.dev(), state.ino()))),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                Err(error(ErrorKind::Unavailable, was_deleted(&path)))
            }
            Err(cause) => Err(from_system("looking at a file of the store", &path, cause)),
        };
        let mut paths = vec![folder.gate.clone(), folder.database.clone()];
        paths.extend(["-wal", "-shm"].map(|ending| with_ending(&folder.database, ending)));
        paths.into_iter().map(with_identity).collect::<Result<_>>().map(Self)
    }

    /// A file that was deleted or replaced since. Others do not see what is done with the one that this process has open.
    pub(super) fn missing(&self) -> Option<&Path> {
        let is_there = |path: &Path, identity| {
            fs::symlink_metadata(path).is_ok_and(|state| (state.dev(), state.ino()) == identity)
        };
        self.0.iter().find(|(path, identity)| !is_there(path, *identity)).map(|(path, _)| path.as_path())
    }

    /// Makes the files look used, for programs that delete old ones.
    pub(super) fn touch(&self) {
        self.0.iter().for_each(|(path, _)| touch(path));
    }
}

/// Makes a file look used. One that cannot be touched is only more likely to be deleted.
pub(super) fn touch(path: &Path) {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let times = Timestamps { last_access: now, last_modification: now };
    let _ = utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW);
}

/// What an operation fails with after a file of the store has disappeared.
pub(super) fn was_deleted(path: &Path) -> String {
    format!("{} was deleted or replaced while it was in use", path.display())
}

/// The path of a file beside the database.
pub(super) fn with_ending(database: &Path, ending: &str) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// Opens or makes a plain file that only its owner may use.
pub(super) fn open_plain_file(path: &Path) -> Result<OwnedFd> {
    let failed = |cause: Errno| from_system("opening a file of the store", path, cause);
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(CWD, path, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
    let state = fs::symlink_metadata(path).map_err(|cause| from_system("opening a file of the store", path, cause))?;
    check_file(path, &state)?;
    Ok(file)
}

/// Refuses what is not a plain file of our own.
pub(super) fn check_file(path: &Path, state: &Metadata) -> Result<()> {
    let shown = path.display();
    if !state.is_file() {
        return Err(misconfigured(format!("{shown} is not a plain file; move it away, or choose another folder")));
    }
    check_owner(path, state.uid())?;
    if state.mode() & 0o077 != 0 {
        return Err(misconfigured(format!("others may use {shown}; run `chmod 600 {shown}`")));
    }
    Ok(())
}

fn make(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(_) => return Ok(()),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {}
        Err(cause) => return Err(from_system("looking at the folder", path, cause)),
    }
    // Before anything is made below a parent that another user could exchange.
    parents::resolve(path)?;
    match DirBuilder::new().recursive(true).mode(0o700).create(path) {
        Err(cause) if cause.kind() != io::ErrorKind::AlreadyExists => {
            Err(from_system("making the folder", path, cause))
        }
        _ => Ok(()),
    }
}

fn check_folder(path: &Path, state: &Metadata) -> Result<()> {
    let shown = path.display();
    if state.is_symlink() {
        return Err(misconfigured(format!("{shown} is a symbolic link; name the folder that it leads to")));
    }
    if !state.is_dir() {
        return Err(misconfigured(format!("{shown} is not a folder; the embedded store needs a folder of its own")));
    }
    check_owner(path, state.uid())?;
    check_mode(path, state.mode())
}

/// A folder of ours that others may enter. The cure is not told of one that has something else in it: to close that may
/// close a system's `/tmp` or `/etc`.
fn check_mode(path: &Path, mode: u32) -> Result<()> {
    if mode & 0o077 == 0 {
        return Ok(());
    }
    let is_of_the_store = |name: &std::ffi::OsStr| {
        name.to_str().is_some_and(|name| name == "gate" || name == "sessions" || name.starts_with("locks.db"))
    };
    let has_others =
        fs::read_dir(path).map_or(true, |entries| entries.flatten().any(|entry| !is_of_the_store(&entry.file_name())));
    let shown = path.display();
    let cure = if has_others && !path.ends_with("sessions") || mode & 0o1000 != 0 {
        format!("name a folder of its own inside it, such as {}", path.join("stanchion").display())
    } else {
        format!("run `chmod 700 {shown}`")
    };
    Err(misconfigured(format!("others may enter {shown}; {cure}")))
}

fn check_owner(path: &Path, owner: u32) -> Result<()> {
    let own = geteuid().as_raw();
    if owner == own {
        return Ok(());
    }
    let shown = path.display();
    Err(misconfigured(format!("{shown} belongs to user {owner}, this process is user {own}; use a folder of your own")))
}

fn open_dir(path: &Path) -> Result<OwnedFd> {
    let failed = |cause: Errno| from_system("opening the folder", path, cause);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = match openat(CWD, path, flags, Mode::empty()) {
        // What the kernel says of a link where a folder is asked for.
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
    let state = rustix::fs::fstatfs(dir).map_err(|cause| from_system("looking at the file system", path, cause))?;
    // The numbers have 32 bits; the field's type and sign differ between machines.
    match network_file_system(state.f_type as u32) {
        None => Ok(()),
        Some(name) => Err(misconfigured(format!(
            "{} is on {name}, where file locks may fail without a sign; choose a folder on a local disk, \
             or a store with a server to share locks between machines",
            path.display()
        ))),
    }
}

#[cfg(not(target_os = "linux"))]
fn check_file_system(_path: &Path, _dir: &OwnedFd) -> Result<()> {
    Ok(())
}

/// The name of a file system that is shared over a network or served by another process.
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

    fn refused(path: &Path) -> Error {
        let error = Folder::prepare(path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Misconfigured, "{error}");
        error
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn network_file_systems_are_known_and_local_ones_are_not_refused() {
        for magic in [0x6969, 0x517b, 0xff53_4d42, 0xfe53_4d42, 0x0102_1997, 0x6573_5546, 0x00c3_6400, 0x0bd0_0bd0] {
            assert!(network_file_system(magic).is_some(), "{magic:x}");
        }
        // ext4, XFS, Btrfs, tmpfs, overlayfs, ZFS.
        for magic in [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994, 0x794c_7630, 0x2fc1_2fc1] {
            assert_eq!(network_file_system(magic), None, "{magic:x}");
        }
    }

    #[test]
    fn the_folder_and_its_parents_are_made_for_their_owner_alone() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("a").join("b");
        Folder::prepare(&path).unwrap();
        for made in [temp.path().join("a"), path.clone(), path.join("sessions")] {
            assert_eq!(fs::metadata(&made).unwrap().mode() & 0o7777, 0o700, "{made:?}");
        }
        Folder::prepare(&path).unwrap();
    }

    #[test]
    fn a_folder_that_others_may_enter_is_refused_with_the_cure() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("open");
        fs::create_dir(&path).unwrap();
        set_mode(&path, 0o755);
        let error = refused(&path).to_string();
        assert!(error.contains(&format!("chmod 700 {}", path.display())), "{error}");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o755, "it is refused, not changed");
        // What else is in it may have to be open.
        fs::write(path.join("motd"), "").unwrap();
        let error = refused(&path).to_string();
        assert!(!error.contains("chmod") && error.contains("name a folder of its own inside it"), "{error}");
    }

    #[test]
    fn links_files_and_the_folders_of_others_are_refused() {
        let temp = tempfile::tempdir().unwrap();
        let real = temp.path().join("real");
        fs::create_dir(&real).unwrap();
        set_mode(&real, 0o700);
        let link = temp.path().join("link");
        symlink(&real, &link).unwrap();
        assert!(refused(&link).to_string().contains("symbolic link"));
        assert!(refused(&link.join("")).to_string().contains("symbolic link"), "a slash at the end changes nothing");
        let file = temp.path().join("file");
        fs::write(&file, "x").unwrap();
        assert!(refused(&file).to_string().contains("not a folder"));
        refused(&file.join("below"));
        symlink(&real, real.join("sessions")).unwrap();
        assert!(refused(&real).to_string().contains("symbolic link"));
        assert!(check_owner(&real, geteuid().as_raw() + 1).unwrap_err().to_string().contains("belongs to user"));
    }

    #[test]
    fn a_parent_in_which_everybody_may_exchange_folders_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let parent = temp.path().join("public");
        fs::create_dir(&parent).unwrap();
        set_mode(&parent, 0o777);
        let error = refused(&parent.join("locks")).to_string();
        assert!(error.contains("chmod go-w"), "{error}");
        assert!(!parent.join("locks").exists(), "nothing is made there");
        set_mode(&parent, 0o1777);
        Folder::prepare(&parent.join("locks")).unwrap();
        set_mode(&parent, 0o777);
        refused(&parent.join("locks"));
    }

    #[test]
    fn paths_that_cannot_be_are_refused() {
        let temp = tempfile::tempdir().unwrap();
        refused(Path::new(""));
        refused(Path::new("a\0b"));
        refused(&temp.path().join("x".repeat(300)));
        let long: PathBuf =
            std::iter::once(temp.path().to_path_buf()).chain((0..5).map(|_| "y".repeat(120).into())).collect();
        assert!(refused(&long).to_string().contains("SQLite allows"));
    }
}
