//! What the service and the client report, as errors of stanchion.

use tonic::{Code, Status};

use crate::error::{Error, ErrorKind};

/// The store's name in errors and events.
pub(super) const NAME: &str = "firestore";

/// A message and its kind.
pub(super) fn error(kind: ErrorKind, message: impl Into<String>) -> Error {
    Error::new(kind, message).with_store(NAME)
}

pub(super) fn malformed() -> Error {
    error(ErrorKind::Internal, "the service gave a document or an answer that is not one of ours")
}

/// Whether a request changes something if it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Does {
    Read,
    Write,
}

/// What a status means. A read that failed did nothing; a write that failed is in doubt, unless the service says that it
/// refused it.
pub(super) fn from_status(status: Status, does: Does) -> Error {
    let (kind, what, may_be_done) = match status.code() {
        Code::PermissionDenied => {
            (ErrorKind::Unauthorized, "the account lacks a right: it needs the role `roles/datastore.user`", false)
        }
        Code::Unauthenticated => (ErrorKind::Unauthorized, "the service refused the credentials", false),
        Code::ResourceExhausted => (ErrorKind::RateLimited, "a quota is used up", false),
        Code::Aborted => (ErrorKind::Unavailable, "too many write this document at once", false),
        Code::NotFound => (ErrorKind::Misconfigured, "there is no such database", false),
        Code::FailedPrecondition => (ErrorKind::Misconfigured, "the database cannot be used like this", false),
        Code::Unimplemented => (ErrorKind::Misconfigured, "this is no Firestore in native mode", false),
        Code::InvalidArgument | Code::OutOfRange => {
            (ErrorKind::Internal, "the service does not take this request", false)
        }
        Code::AlreadyExists => (ErrorKind::Internal, "the document is there already", false),
        Code::DeadlineExceeded => (ErrorKind::NetworkTimeout, "no answer in time", true),
        Code::Unavailable if never_left(&status) => (ErrorKind::Unavailable, "cannot connect", false),
        Code::Unavailable => (ErrorKind::Unavailable, "the service is away", true),
        Code::Cancelled => (ErrorKind::Unavailable, "the request was cancelled", true),
        Code::Unknown | Code::Internal => (ErrorKind::Unavailable, "the service failed", true),
        Code::DataLoss => (ErrorKind::Internal, "the service lost data", true),
        Code::Ok => (ErrorKind::Internal, "an error without a fault", true),
    };
    let message = format!("{what} ({:?}: {})", status.code(), one_line(status.message()));
    error(kind, message).in_doubt(may_be_done && does == Does::Write).with_source(status)
}

/// No connection was made, so nothing was sent.
fn never_left(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(inner) = cause {
        if inner.is::<tonic::ConnectError>() {
            return true;
        }
        cause = inner.source();
    }
    false
}

/// What the service says may be long, and of several lines.
fn one_line(text: &str) -> String {
    let mut line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect();
    line.truncate(line.trim_end_matches([' ', '.']).len());
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every code, its kind, and whether a write is in doubt.
    #[test]
    fn every_status_has_its_kind() {
        use ErrorKind::*;
        let table = [
            (Code::Ok, Internal, true),
            (Code::Cancelled, Unavailable, true),
            (Code::Unknown, Unavailable, true),
            (Code::InvalidArgument, Internal, false),
            (Code::DeadlineExceeded, NetworkTimeout, true),
            (Code::NotFound, Misconfigured, false),
            (Code::AlreadyExists, Internal, false),
            (Code::PermissionDenied, Unauthorized, false),
            (Code::ResourceExhausted, RateLimited, false),
            (Code::FailedPrecondition, Misconfigured, false),
            (Code::Aborted, Unavailable, false),
            (Code::OutOfRange, Internal, false),
            (Code::Unimplemented, Misconfigured, false),
            (Code::Internal, Unavailable, true),
            (Code::Unavailable, Unavailable, true),
            (Code::DataLoss, Internal, true),
            (Code::Unauthenticated, Unauthorized, false),
        ];
        assert_eq!(table.len(), 17, "gRPC has 17 codes");
        for (code, kind, in_doubt) in table {
            let write = from_status(Status::new(code, "what\nit says."), Does::Write);
            assert_eq!((write.kind(), write.is_in_doubt()), (kind, in_doubt), "{code:?}");
            assert!(!from_status(Status::new(code, ""), Does::Read).is_in_doubt(), "{code:?}: a read changes nothing");
            let text = write.to_string();
            assert!(!text.contains('\n') && !text.ends_with('.') && text.starts_with("firestore: "), "{text}");
        }
    }
}
