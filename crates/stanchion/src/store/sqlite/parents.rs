//! Checks that no other user can exchange a folder above the store's folder.
//!
//! A user who can rename one of these folders can split the processes into two groups that do not see each other's
//! locks.
//!
//! The rule is the same as for sshd's `StrictModes`:
//! - Every folder and every symbolic link on the path belongs to this user or to root.
//! - No other user may write in such a folder, unless the folder is sticky.
//!
//! The owner of `/` counts as root, because that user can exchange any folder. In a container or a user namespace, `/`
//! may belong to another user than root.

use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use rustix::io::Errno;
use rustix::process::geteuid;

use super::error::{from_system, misconfigured};
use crate::error::Result;

/// Maximum number of symbolic links in a path, the same as in the kernel.
const MAX_LINKS: usize = 40;

/// Checks every folder and every symbolic link on a path, and returns the path without links. The end of the path need
/// not exist; it is returned unchanged.
pub(super) fn resolve(path: &Path) -> Result<PathBuf> {
    let failed = |path: &Path, cause: io::Error| from_system("checking a parent folder", path, cause);
    let absolute = std::path::absolute(path).map_err(|cause| failed(path, cause))?;
    let root = Path::new("/");
    let state = fs::symlink_metadata(root).map_err(|cause| failed(root, cause))?;
    let trusted = Trusted { user: geteuid().as_raw(), root: state.uid() };
    trusted.check_folder(root, &state)?;
    let (mut at, mut rest, mut links) = (root.to_owned(), names(&absolute), 0);
    while let Some(name) = rest.pop() {
        if name == ".." {
            at.pop();
            continue;
        }
        at.push(&name);
        let state = match fs::symlink_metadata(&at) {
            Ok(state) => state,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                at.extend(rest.into_iter().rev());
                return Ok(at);
            }
            Err(cause) => return Err(failed(&at, cause)),
        };
        if state.is_symlink() {
            trusted.check_owner(&at, &state)?;
            links += 1;
            if links > MAX_LINKS {
                return Err(failed(&at, Errno::LOOP.into()));
            }
            let target = fs::read_link(&at).map_err(|cause| failed(&at, cause))?;
            at.pop();
            if target.is_absolute() {
                at = root.to_owned();
            }
            rest.extend(names(&target));
        } else if state.is_dir() {
            trusted.check_folder(&at, &state)?;
        } else {
            return Err(failed(&at, Errno::NOTDIR.into()));
        }
    }
    Ok(at)
}

/// Returns the names in a path, in reverse order.
fn names(path: &Path) -> Vec<OsString> {
    let name = |part: Component<'_>| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsStr::new("..").to_owned()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().rev().filter_map(name).collect()
}

/// The users whose folders are trusted.
struct Trusted {
    user: u32,
    /// The owner of `/`.
    root: u32,
}

impl Trusted {
    fn has(&self, owner: u32) -> bool {
        owner == 0 || owner == self.user || owner == self.root
    }

    fn check_owner(&self, path: &Path, state: &Metadata) -> Result<()> {
        if self.has(state.uid()) {
            return Ok(());
        }
        let (shown, owner) = (path.display(), state.uid());
        Err(misconfigured(format!(
            "{shown} belongs to user {owner}, and that user can exchange the store; in every program that shares the \
             locks, use a folder whose parents and links all belong to you (user {}) or to root",
            self.user
        )))
    }

    fn check_folder(&self, path: &Path, state: &Metadata) -> Result<()> {
        self.check_owner(path, state)?;
        let is_sticky = state.mode() & 0o1000 != 0;
        let is_open = state.mode() & 0o002 != 0 || (state.mode() & 0o020 != 0 && !self.has_group(state.gid()));
        if !is_open || is_sticky {
            return Ok(());
        }
        let shown = path.display();
        let remedy = self.remedy(&shown, state.uid());
        Err(misconfigured(format!("other users may write in {shown} and can exchange the store; {remedy}")))
    }

    /// Returns the remedy for a folder in which others may write. For root it is never `chmod`, because root's folders
    /// are the system's.
    fn remedy(&self, shown: &dyn std::fmt::Display, owner: u32) -> String {
        let other = "use another folder in every program that shares the locks";
        if owner == self.user && owner != 0 {
            format!("run `chmod go-w {shown}`, or {other}")
        } else {
            other.to_owned()
        }
    }

    /// Returns whether a group has only trusted members. Many systems give each user a private group, and let the group
    /// write in the user's folders.
    fn has_group(&self, group: u32) -> bool {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        self.has_group_in(group, &read("/etc/group"), &read("/etc/passwd"))
    }

    fn has_group_in(&self, group: u32, groups: &str, users: &str) -> bool {
        let fields = |line: &str| line.split(':').map(str::to_owned).collect::<Vec<_>>();
        let number = |text: Option<&String>| text.and_then(|text| text.parse::<u32>().ok());
        let users: Vec<_> = users.lines().map(fields).collect();
        let is_trusted = |user: &Vec<String>| number(user.get(2)).is_some_and(|id| self.has(id));
        let mut found = groups.lines().map(fields).filter(|entry| number(entry.get(2)) == Some(group)).peekable();
        // A group that is not in the file comes from a directory server, and may have any members.
        if found.peek().is_none() {
            return false;
        }
        let is_member =
            |name: &str| users.iter().any(|user| user.first().is_some_and(|n| n == name) && is_trusted(user));
        found.all(|entry| {
            entry.get(3).is_none_or(|names| names.trim().split(',').filter(|n| !n.is_empty()).all(is_member))
        }) && users.iter().filter(|user| number(user.get(3)) == Some(group)).all(is_trusted)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;
    use crate::error::ErrorKind;

    /// Creates the folders `a/b`, and two links to `a/b`.
    fn tree() -> (tempfile::TempDir, PathBuf) {
        let temp = tempfile::tempdir().unwrap();
        let top = fs::canonicalize(temp.path()).unwrap();
        fs::create_dir_all(top.join("a/b")).unwrap();
        set_mode(&top.join("a"), 0o755);
        set_mode(&top.join("a/b"), 0o755);
        symlink("a/b", top.join("link")).unwrap();
        symlink(top.join("link"), top.join("far")).unwrap();
        (temp, top)
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[track_caller]
    fn rejected(path: &Path) -> String {
        let error = resolve(path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Misconfigured, "{error}");
        error.to_string()
    }

    #[test]
    fn paths_resolve_as_in_the_kernel() {
        let (_temp, top) = tree();
        for path in ["a/b", "link", "far", "a/../a/./b", "link/../b", "far/"] {
            assert_eq!(resolve(&top.join(path)).unwrap(), top.join("a/b"), "{path}");
        }
        assert_eq!(resolve(&top.join("link/x/y")).unwrap(), top.join("a/b/x/y"));
        symlink("loop", top.join("loop")).unwrap();
        rejected(&top.join("loop/x"));
        fs::write(top.join("file"), "").unwrap();
        rejected(&top.join("file/x"));
        assert_eq!(resolve(Path::new("/")).unwrap(), Path::new("/"));
    }

    #[test]
    fn open_parents_are_rejected_by_name() {
        let (_temp, top) = tree();
        for mode in [0o777, 0o757] {
            set_mode(&top.join("a"), mode);
            let text = rejected(&top.join("far/locks"));
            let said = format!("other users may write in {}", top.join("a").display());
            assert!(text.contains(&said), "{mode:o}: {text}");
        }
        for mode in [0o1777, 0o1775, 0o755, 0o700] {
            set_mode(&top.join("a"), mode);
            resolve(&top.join("far/locks")).unwrap();
        }
    }

    #[test]
    fn chmod_is_for_own_folders_only() {
        let remedy = |user, owner| Trusted { user, root: 0 }.remedy(&"/srv", owner);
        assert!(remedy(1000, 1000).contains("chmod go-w /srv"));
        for (user, owner) in [(1000, 0), (0, 0)] {
            assert!(!remedy(user, owner).contains("chmod"), "{user} {owner}");
        }
    }

    /// This test needs root, which the release tests have.
    #[test]
    fn foreign_parents_are_rejected() {
        if !geteuid().is_root() {
            return eprintln!("NOT TESTED: only root can give a folder to another user");
        }
        let (_temp, top) = tree();
        for (given, path) in [("a", "a/b/locks"), ("a/b", "a/b/locks"), ("a", "far/locks"), ("", "a/b/locks")] {
            let given = top.join(given);
            for mode in [0o700, 0o755, 0o775, 0o1777] {
                set_mode(&given, mode);
                chown(&given, Some(64_000), Some(64_000)).unwrap();
                let text = rejected(&top.join(path));
                assert!(
                    text.contains(&format!(
                        "{} belongs to user 64000",
                        given.display().to_string().trim_end_matches('/')
                    )),
                    "{text}"
                );
                assert!(!text.contains("chmod"), "{text}");
            }
            chown(&given, Some(0), Some(0)).unwrap();
            set_mode(&given, 0o755);
            resolve(&top.join(path)).unwrap();
        }
        // The folder belongs to root, but a group with other members may write in it.
        chown(top.join("a"), None, Some(64_000)).unwrap();
        set_mode(&top.join("a"), 0o775);
        assert!(rejected(&top.join("a/b/locks")).contains("other users may write"));
        set_mode(&top.join("a"), 0o755);
        for link in ["link", "far"] {
            std::os::unix::fs::lchown(top.join(link), Some(64_000), Some(64_000)).unwrap();
            let text = rejected(&top.join("far/locks"));
            assert!(text.contains(&format!("{} belongs to user 64000", top.join(link).display())), "{text}");
            std::os::unix::fs::lchown(top.join(link), Some(0), Some(0)).unwrap();
        }
        resolve(&top.join("far/locks")).unwrap();
    }

    #[test]
    fn groups_of_one_user_are_trusted() {
        let trusted = Trusted { user: 1000, root: 0 };
        let users =
            "root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/:/bin/sh\nbob:x:1001:1001::/:/bin/sh\nc:x:1002:50::/:/\n";
        let groups =
            "root:x:0:\nann:x:1000:\nbob:x:1001:\nstaff:x:50:\nteam:x:60:ann,bob\nmine:x:61:ann,root\nodd:x:62:ghost\n";
        for group in [0, 1000, 61] {
            assert!(trusted.has_group_in(group, groups, users), "{group}");
        }
        for group in [1001, 50, 60, 62, 99] {
            assert!(!trusted.has_group_in(group, groups, users), "{group}");
        }
        assert!(!trusted.has_group_in(1000, "", ""), "the files have no such group");
    }

    #[test]
    fn owner_of_the_root_folder_is_trusted() {
        let trusted = Trusted { user: 1000, root: 65_534 };
        assert!(trusted.has(65_534) && trusted.has(0) && trusted.has(1000) && !trusted.has(1001));
    }
}
