//! Maps gRPC statuses to errors of stanchion.

use tonic::{Code, Status};

use crate::error::{Error, ErrorKind};

/// Name of the store in errors and events.
pub(super) const NAME: &str = "firestore";

/// Creates an error of this store.
pub(super) fn error(kind: ErrorKind, message: impl Into<String>) -> Error {
    Error::new(kind, message).with_store(NAME)
}

pub(super) fn malformed() -> Error {
    error(ErrorKind::Internal, "the service returned a document or a response that this store cannot read")
}

/// Says whether a request can change documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestKind {
    Read,
    Write,
}

/// Converts a gRPC status. A failed read changed nothing. A failed write has an unknown outcome, unless the service
/// says that it rejected the request.
pub(super) fn from_status(status: Status, request: RequestKind) -> Error {
    let (kind, summary, may_be_done) = match status.code() {
        Code::PermissionDenied => {
            (ErrorKind::Unauthorized, "the account lacks a permission: it needs the role `roles/datastore.user`", false)
        }
        Code::Unauthenticated => (ErrorKind::Unauthorized, "the service rejected the credentials", false),
        Code::ResourceExhausted => (ErrorKind::RateLimited, "a quota is exhausted", false),
        Code::Aborted => (ErrorKind::Unavailable, "too many clients write this document at once", false),
        Code::NotFound => (ErrorKind::Misconfigured, "the database does not exist", false),
        Code::FailedPrecondition => (ErrorKind::Misconfigured, "the database does not support this request", false),
        Code::Unimplemented => {
            (ErrorKind::Misconfigured, "the database is not a Firestore database in native mode", false)
        }
        Code::InvalidArgument | Code::OutOfRange => {
            (ErrorKind::Internal, "the service rejected the request as invalid", false)
        }
        Code::AlreadyExists => (ErrorKind::Internal, "the document exists already", false),
        Code::DeadlineExceeded => (ErrorKind::NetworkTimeout, "the service did not answer in time", true),
        Code::Unavailable if is_connect_failure(&status) => (ErrorKind::Unavailable, "cannot connect", false),
        Code::Unavailable => (ErrorKind::Unavailable, "the service is unavailable", true),
        Code::Cancelled => (ErrorKind::Unavailable, "the request was cancelled", true),
        Code::Unknown | Code::Internal => (ErrorKind::Unavailable, "the service failed", true),
        Code::DataLoss => (ErrorKind::Internal, "the service lost data", true),
        Code::Ok => (ErrorKind::Internal, "the service reported an error without a cause", true),
    };
    let message = format!("{summary} ({:?}: {})", status.code(), one_line(status.message()));
    error(kind, message).in_doubt(may_be_done && request == RequestKind::Write).with_source(status)
}

/// Returns whether the connection failed before anything was sent.
fn is_connect_failure(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(inner) = cause {
        if inner.is::<tonic::ConnectError>() {
            return true;
        }
        cause = inner.source();
    }
    false
}

/// Returns a short message without line breaks, because the service's messages can be long and have several lines.
fn one_line(text: &str) -> String {
    let mut line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect();
    line.truncate(line.trim_end_matches([' ', '.']).len());
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lists every code, its kind, and whether it leaves the outcome of a write unknown.
    #[test]
    fn each_status_maps_to_one_kind() {
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
            let write = from_status(Status::new(code, "what\nit says."), RequestKind::Write);
            assert_eq!((write.kind(), write.is_in_doubt()), (kind, in_doubt), "{code:?}");
            assert!(
                !from_status(Status::new(code, ""), RequestKind::Read).is_in_doubt(),
                "{code:?}: a read changes nothing"
            );
            let text = write.to_string();
            assert!(!text.contains('\n') && !text.ends_with('.') && text.starts_with("firestore: "), "{text}");
        }
    }
}
