//! What the server and the client report, as errors of stanchion.

use tokio_postgres::error::{DbError, Severity, SqlState};

use crate::error::{Error, ErrorKind, LossCause};

/// The store's name in errors and events.
pub(super) const NAME: &str = "postgres";

/// What is wrong with connections whose transactions have one snapshot, and what mends it.
pub(super) const OTHER_ISOLATION: &str = "transactions are not `read committed` by default, without which a living holder would count as dead: \
     ALTER ROLE … SET default_transaction_isolation = 'read committed', and connect anew";

/// A message and its kind.
pub(super) fn error(kind: ErrorKind, message: impl Into<String>) -> Error {
    Error::new(kind, message).with_store(NAME)
}

/// An answer to a step came: it was done, whatever it was.
pub(super) fn malformed() -> Error {
    error(ErrorKind::Internal, "the database gave an answer that is not one of ours: is the schema changed?")
        .in_doubt(true)
}

/// A fault while a connection was being made: nothing was sent yet.
pub(super) fn while_connecting(fault: tokio_postgres::Error) -> Error {
    let (kind, what) = match fault.as_db_error() {
        Some(told) => kind_of(told),
        None => (from_client(&fault), causes(&fault)),
    };
    with_cause(error(kind, format!("cannot connect: {what}")).in_doubt(false), fault)
}

/// A fault of a request that was sent.
pub(super) fn from_answer(fault: tokio_postgres::Error) -> Error {
    let (kind, what, in_doubt) = match fault.as_db_error() {
        Some(told) => {
            let (kind, what) = kind_of(told);
            // An error rolls the step back. What ends the connection may come after the step was done.
            (kind, what, told.parsed_severity().is_none_or(|severity| severity != Severity::Error))
        }
        None => (ErrorKind::Unavailable, causes(&fault), true),
    };
    with_cause(error(kind, what).in_doubt(in_doubt), fault)
}

fn with_cause(error: Error, fault: tokio_postgres::Error) -> Error {
    if fault.as_db_error().is_some_and(names_the_role) { error } else { error.with_source(fault) }
}

/// The client says little itself; what is behind it does.
fn causes(fault: &tokio_postgres::Error) -> String {
    let mut text = fault.to_string();
    let mut cause = std::error::Error::source(fault);
    while let Some(inner) = cause {
        let more = inner.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = inner.source();
    }
    text
}

fn from_client(fault: &tokio_postgres::Error) -> ErrorKind {
    let text = causes(fault);
    if text.contains("certificate") || text.contains("server does not support TLS") {
        ErrorKind::Misconfigured
    } else if text.contains("password") || text.contains("authentication") {
        ErrorKind::Unauthorized
    } else {
        ErrorKind::Unavailable
    }
}

/// The kind of an error that the server told, and what to do about it.
fn kind_of(told: &DbError) -> (ErrorKind, String) {
    let code = told.code();
    let (kind, what) = match code {
        _ if code.code() == "SF001" => {
            (ErrorKind::Lost(LossCause::Missing), "the hold with this fence is over: do not write")
        }
        _ if code.code() == "SF002" => {
            (ErrorKind::Misconfigured, "the key has the highest fence there is: the server's clock was far ahead once")
        }
        _ if code.code() == "SF005" => (ErrorKind::Misconfigured, "another role could run code in the schema"),
        _ if code.code() == "SF006" => (ErrorKind::InvalidArgument, "the database refused the request"),
        _ if code.code() == "SF003" => (ErrorKind::Misconfigured, "the schema is newer than this program"),
        _ if code.code() == "SF004" => (ErrorKind::Misconfigured, OTHER_ISOLATION),
        _ if code.code() == "28000" && told.routine() == Some("ClientAuthentication") => {
            (ErrorKind::Unauthorized, "no entry of the server's pg_hba.conf admits this connection")
        }
        _ if code.code().starts_with("28") => {
            (ErrorKind::Unauthorized, "the server refused the user, the password or the address")
        }
        &SqlState::INSUFFICIENT_PRIVILEGE => {
            (ErrorKind::Unauthorized, "the user lacks a right; see the rights in the documentation of the store")
        }
        &SqlState::INVALID_CATALOG_NAME => (ErrorKind::Misconfigured, "there is no such database"),
        &SqlState::UNDEFINED_TABLE
        | &SqlState::UNDEFINED_FUNCTION
        | &SqlState::UNDEFINED_COLUMN
        | &SqlState::INVALID_SCHEMA_NAME => (
            ErrorKind::Misconfigured,
            "the schema is not there, or another version of it: `stanchion schema --store URL --apply` creates it",
        ),
        &SqlState::TOO_MANY_CONNECTIONS => (ErrorKind::RateLimited, "the server has too many connections"),
        &SqlState::DISK_FULL => (ErrorKind::Unavailable, "the server's disk is full"),
        &SqlState::OUT_OF_MEMORY => (ErrorKind::Unavailable, "the server is out of memory"),
        &SqlState::READ_ONLY_SQL_TRANSACTION => {
            (ErrorKind::Unavailable, "the server takes no writes: it is a standby now, perhaps")
        }
        &SqlState::LOCK_NOT_AVAILABLE => {
            (ErrorKind::Unavailable, "a transaction keeps the row of the key locked (`check_fence`?)")
        }
        &SqlState::QUERY_CANCELED => (ErrorKind::Unavailable, "the server cancelled the step (`statement_timeout`?)"),
        &SqlState::T_R_SERIALIZATION_FAILURE | &SqlState::T_R_DEADLOCK_DETECTED => {
            (ErrorKind::Unavailable, "the step met another transaction")
        }
        &SqlState::ADMIN_SHUTDOWN | &SqlState::CRASH_SHUTDOWN => (ErrorKind::Unavailable, "the connection was ended"),
        &SqlState::CANNOT_CONNECT_NOW => (ErrorKind::Unavailable, "the server is starting or stopping"),
        // Connections, resources, limits (a full queue of notifications), what the operator did, the system: they pass.
        _ if code.code().get(..2).is_some_and(|class| ["08", "53", "54", "57", "58", "40", "55"].contains(&class)) => {
            (ErrorKind::Unavailable, "it failed")
        }
        _ => (ErrorKind::Internal, "it failed"),
    };
    match names_the_role(told) {
        true => (kind, format!("{what} ({})", code.code())),
        false => (kind, format!("{what} ({}: {})", code.code(), told.message())),
    }
}

/// Whether the server's text names the role: the user part of the URL, where a secret can be by mistake.
fn names_the_role(told: &DbError) -> bool {
    told.code().code().starts_with("28") || *told.code() == SqlState::TOO_MANY_CONNECTIONS
}

/// What an answer tells of the connection that it came on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is not to be used again.
    Connection,
    /// Its server takes no writes: no connection that was made before is to be used again. A server that goes down closes them.
    Server,
}

/// Judges a fault of a request.
pub(super) fn verdict(fault: &tokio_postgres::Error) -> Option<Verdict> {
    let told = fault.as_db_error()?;
    let code = told.code().code();
    let is_in_recovery = code == "55000" && told.message().contains("recovery");
    match code {
        _ if code == "25006" || is_in_recovery => Some(Verdict::Server),
        _ if code.starts_with("08") || code.starts_with("57P") => Some(Verdict::Connection),
        _ => told.parsed_severity().filter(|severity| *severity != Severity::Error).map(|_| Verdict::Connection),
    }
}
