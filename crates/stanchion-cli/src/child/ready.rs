//! The readiness file: it exists while the command runs and its key is held.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use crate::exit_code;
use crate::message::{Failure, quoted};

/// A readiness file that exists. Dropping it removes it.
#[derive(Debug)]
pub(super) struct ReadyFile {
    path: PathBuf,
}

impl ReadyFile {
    /// Creates the file with its text. It appears whole.
    pub(super) fn create(path: &Path, text: &str) -> io::Result<Self> {
        let draft = draft_of(path);
        let written = write_new(&draft, text).and_then(|()| fs::rename(&draft, path));
        if written.is_err() {
            let _ = fs::remove_file(&draft); // it may not exist
        }
        written.map(|()| Self { path: path.to_owned() })
    }
}

impl Drop for ReadyFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path); // somebody may have removed it
    }
}

/// Removes a file that an earlier process left behind, and checks that a file can be made there.
pub(crate) fn prepare_ready_file(path: &Path) -> Result<(), Failure> {
    let draft = draft_of(path);
    let prepared = remove_stale(path).and_then(|()| write_new(&draft, "")).and_then(|()| remove(&draft));
    prepared.map_err(|error| {
        let code = match error.kind() {
            io::ErrorKind::PermissionDenied => exit_code::NOT_PERMITTED,
            _ => exit_code::USAGE,
        };
        let path = quoted(&path.to_string_lossy());
        Failure::new(
            code,
            format!("`{path}` cannot be the readiness file: {error}; name a file in a folder of your own"),
        )
    })
}

/// Removes a readiness file of an earlier process. Anything else stays, and is an error: PATH may be a typing error.
fn remove_stale(path: &Path) -> io::Result<()> {
    let found = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    // It holds the number of a term.
    if found.is_file() && (1..=32).contains(&found.len()) {
        let text = fs::read_to_string(path)?;
        if text.strip_suffix('\n').is_some_and(|line| line.parse::<u64>().is_ok()) {
            return remove(path);
        }
    }
    Err(io::Error::other("there is something that stanchion did not write"))
}

fn draft_of(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(format!(".stanchion-{}", std::process::id()));
    name.into()
}

/// Writes a new file: it follows no link that somebody else has put there.
fn write_new(path: &Path, text: &str) -> io::Result<()> {
    // A process with the same id, as in a container, may have been killed here.
    remove(path)?;
    File::create_new(path)?.write_all(text.as_bytes())
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}
