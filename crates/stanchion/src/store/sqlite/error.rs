//! Converts the errors of SQLite and of the system to errors of stanchion.

use std::io;
use std::path::Path;

use rusqlite::ErrorCode;
use rustix::io::Errno;

use crate::error::{Error, ErrorKind};

/// The store's name in errors and events.
pub(super) const NAME: &str = "sqlite";

/// Returns an error with this kind and this message, without a cause.
pub(super) fn error(kind: ErrorKind, message: impl Into<String>) -> Error {
    Error::new(kind, message).with_store(NAME)
}

/// Returns an error for a folder or a file that would lose locks. The message describes the problem and the remedy.
pub(super) fn misconfigured(message: impl Into<String>) -> Error {
    error(ErrorKind::Misconfigured, message)
}

/// Converts an error of SQLite. `what` names the task that failed, for example "opening the store".
pub(super) fn from_sqlite(what: &str, file: &Path, cause: rusqlite::Error) -> Error {
    let code = cause.sqlite_error().map(|failure| (failure.code, failure.extended_code));
    let file = file.display();
    let (kind, message) = match code {
        Some((ErrorCode::NotADatabase, _)) => (
            ErrorKind::Misconfigured,
            format!(
                "{file} is not a database of stanchion; choose another folder, or move the file away if no program \
                 needs it"
            ),
        ),
        Some((ErrorCode::DatabaseCorrupt, _)) => (
            ErrorKind::Misconfigured,
            format!(
                "{file} is damaged; stop every process that uses it, then move its folder away: the store creates a \
                 new one"
            ),
        ),
        Some((_, rusqlite::ffi::SQLITE_CANTOPEN_SYMLINK)) => {
            (ErrorKind::Misconfigured, format!("{file} is a symbolic link; the store's files must be plain files"))
        }
        Some((ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked, _)) => (
            ErrorKind::Unavailable,
            format!("{what}: another program keeps {file} locked; close that program, for example an SQLite shell"),
        ),
        Some((ErrorCode::DiskFull, _)) => (ErrorKind::Unavailable, format!("{what}: the disk of {file} is full")),
        Some((ErrorCode::SystemIoFailure | ErrorCode::CannotOpen | ErrorCode::OutOfMemory, _)) => {
            (ErrorKind::Unavailable, format!("{what}: the system cannot serve {file} now"))
        }
        Some((ErrorCode::PermissionDenied | ErrorCode::ReadOnly | ErrorCode::AuthorizationForStatementDenied, _)) => {
            (ErrorKind::Unauthorized, format!("{what}: no permission to write {file}"))
        }
        None if is_row_error(&cause) => (ErrorKind::Internal, format!("{what}: a row of {file} cannot be read")),
        _ => (ErrorKind::Internal, format!("{what}: unexpected SQLite error on {file}")),
    };
    error(kind, message).with_source(cause)
}

/// Returns whether the content of a row caused the error, and not the database.
pub(super) fn is_row_error(cause: &rusqlite::Error) -> bool {
    use rusqlite::Error::{FromSqlConversionFailure, IntegralValueOutOfRange, InvalidColumnType, Utf8Error};
    matches!(cause, FromSqlConversionFailure(..) | IntegralValueOutOfRange(..) | InvalidColumnType(..) | Utf8Error(..))
}

/// Converts the error of a system call on `path`. `what` names the task that failed, for example "opening the folder".
pub(super) fn from_system(what: &str, path: &Path, cause: impl Into<io::Error>) -> Error {
    let cause = cause.into();
    let shown = path.display();
    let (kind, message) = match cause.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::ACCESS | Errno::PERM | Errno::ROFS) => {
            (ErrorKind::Unauthorized, format!("{what}: no permission to use {shown}"))
        }
        Some(Errno::LOOP) => (
            ErrorKind::Misconfigured,
            format!("{what}: {shown} is a symbolic link; the store's files must be plain files"),
        ),
        Some(Errno::NAMETOOLONG) => (ErrorKind::Misconfigured, format!("{what}: the path {shown} is too long")),
        Some(Errno::NOTDIR | Errno::ISDIR) => (
            ErrorKind::Misconfigured,
            format!("{what}: {shown} has the wrong type (a folder where a file must be, or the reverse)"),
        ),
        _ => (ErrorKind::Unavailable, format!("{what}: the system cannot serve {shown} now")),
    };
    error(kind, message).with_source(cause)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::ffi;

    #[test]
    fn sqlite_errors_have_their_kind() {
        let table = [
            (ffi::SQLITE_BUSY, ErrorKind::Unavailable),
            (ffi::SQLITE_BUSY_SNAPSHOT, ErrorKind::Unavailable),
            (ffi::SQLITE_LOCKED, ErrorKind::Unavailable),
            (ffi::SQLITE_FULL, ErrorKind::Unavailable),
            (ffi::SQLITE_IOERR, ErrorKind::Unavailable),
            (ffi::SQLITE_IOERR_FSYNC, ErrorKind::Unavailable),
            (ffi::SQLITE_NOMEM, ErrorKind::Unavailable),
            (ffi::SQLITE_CANTOPEN, ErrorKind::Unavailable),
            (ffi::SQLITE_CANTOPEN_SYMLINK, ErrorKind::Misconfigured),
            (ffi::SQLITE_PERM, ErrorKind::Unauthorized),
            (ffi::SQLITE_READONLY, ErrorKind::Unauthorized),
            (ffi::SQLITE_AUTH, ErrorKind::Unauthorized),
            (ffi::SQLITE_NOTADB, ErrorKind::Misconfigured),
            (ffi::SQLITE_CORRUPT, ErrorKind::Misconfigured),
            (ffi::SQLITE_CONSTRAINT, ErrorKind::Internal),
            (ffi::SQLITE_MISUSE, ErrorKind::Internal),
        ];
        for (code, kind) in table {
            let cause = rusqlite::Error::SqliteFailure(ffi::Error::new(code), None);
            let error = from_sqlite("reading", Path::new("/x/locks.db"), cause);
            assert_eq!(error.kind(), kind, "code {code}");
            assert!(error.to_string().contains("/x/locks.db"), "{error}");
            assert_eq!(error.store(), Some("sqlite"));
        }
        let other = from_sqlite("reading", Path::new("/x"), rusqlite::Error::QueryReturnedNoRows);
        assert_eq!(other.kind(), ErrorKind::Internal);
    }

    #[test]
    fn system_errors_have_their_kind() {
        let table = [
            (Errno::ACCESS, ErrorKind::Unauthorized),
            (Errno::PERM, ErrorKind::Unauthorized),
            (Errno::ROFS, ErrorKind::Unauthorized),
            (Errno::NOSPC, ErrorKind::Unavailable),
            (Errno::DQUOT, ErrorKind::Unavailable),
            (Errno::IO, ErrorKind::Unavailable),
            (Errno::MFILE, ErrorKind::Unavailable),
            (Errno::NOENT, ErrorKind::Unavailable),
            (Errno::LOOP, ErrorKind::Misconfigured),
            (Errno::NOTDIR, ErrorKind::Misconfigured),
            (Errno::NAMETOOLONG, ErrorKind::Misconfigured),
        ];
        for (errno, kind) in table {
            let error = from_system("opening", Path::new("/x"), errno);
            assert_eq!(error.kind(), kind, "{errno:?}");
            assert!(error.to_string().contains("/x"), "{error}");
        }
    }
}
