//! Turns errors of the server and of the client into errors of stanchion.

use tokio_postgres::config::Host;
use tokio_postgres::error::{DbError, Severity, SqlState};

use crate::error::{Error, ErrorKind, LossCause};
use crate::store::tls;

/// The store's name in errors and events.
pub(super) const NAME: &str = "postgres";

/// Error text for connections with another isolation level, whose transactions see one snapshot.
pub(super) const OTHER_ISOLATION: &str = "transactions are not `read committed` by default, so a live holder could count as expired: run \
     ALTER ROLE … SET default_transaction_isolation = 'read committed', and connect again";

/// Returns an error of this store.
pub(super) fn error(kind: ErrorKind, message: impl Into<String>) -> Error {
    Error::new(kind, message).with_store(NAME)
}

/// Returns the error for an unreadable answer. Its outcome is unknown, because the server ran the operation.
pub(super) fn malformed() -> Error {
    error(ErrorKind::Internal, "the answer of the database is malformed: has somebody changed the schema?")
        .in_doubt(true)
}

/// Converts an error that occurred while the client connected. No operation was sent yet.
pub(super) fn while_connecting(settings: &tokio_postgres::Config, fault: tokio_postgres::Error) -> Error {
    let (kind, message) = match fault.as_db_error() {
        Some(reported) => kind_of(reported),
        None => {
            let text = causes(&fault);
            (kind_of_client(&text), format!("{text}{}", advice(&text)))
        }
    };
    with_cause(cannot_connect(settings, kind, &message), fault)
}

/// Returns the error of a failed attempt to connect. It names the servers, because the message of the system does not.
pub(super) fn cannot_connect(settings: &tokio_postgres::Config, kind: ErrorKind, message: &str) -> Error {
    error(kind, format!("cannot connect to {}: {message}", servers(settings))).in_doubt(false)
}

/// Returns hosts and ports as a URL has them.
fn servers(settings: &tokio_postgres::Config) -> String {
    let ports = settings.get_ports();
    let port = |at: usize| ports.get(at).or(ports.first()).copied().unwrap_or(5432);
    let shown = settings.get_hosts().iter().enumerate().map(|(at, host)| match host {
        Host::Tcp(name) if name.contains(':') => format!("[{name}]:{}", port(at)),
        Host::Tcp(name) => format!("{name}:{}", port(at)),
        Host::Unix(folder) => format!("{}/.s.PGSQL.{}", folder.display(), port(at)),
    });
    shown.collect::<Vec<_>>().join(", ")
}

/// Returns what would be right after a fault of the client, or nothing.
fn advice(text: &str) -> String {
    if text.contains("does not support TLS") {
        "; it may not be PostgreSQL; a PostgreSQL without TLS needs `sslmode=disable`, which sends everything in clear"
            .to_owned()
    } else if is_other_protocol(text) {
        "; check the host, the port and the scheme: a program other than PostgreSQL may listen there".to_owned()
    } else if text.contains("connection closed") {
        "; it may not be PostgreSQL, or refuse connections without TLS (`sslmode=verify-full`)".to_owned()
    } else {
        tls::advice(text)
    }
}

/// Returns whether the server's first answer is not PostgreSQL's.
fn is_other_protocol(text: &str) -> bool {
    ["unexpected message", "parsing", "invalid message length", "bytes remaining on stream"]
        .iter()
        .any(|mark| text.contains(mark))
}

/// Converts an error of a request that was sent.
pub(super) fn from_answer(fault: tokio_postgres::Error) -> Error {
    let (kind, message, in_doubt) = match fault.as_db_error() {
        Some(reported) => {
            let (kind, message) = kind_of(reported);
            // An ordinary error rolls the operation back. An error that ends the connection may come after the commit.
            (kind, message, reported.parsed_severity().is_none_or(|severity| severity != Severity::Error))
        }
        None => (ErrorKind::Unavailable, causes(&fault), true),
    };
    with_cause(error(kind, message).in_doubt(in_doubt), fault)
}

fn with_cause(error: Error, fault: tokio_postgres::Error) -> Error {
    if fault.as_db_error().is_some_and(names_the_role) { error } else { error.with_source(fault) }
}

/// Returns the client's message with those of its causes, because the client's own message says little.
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

fn kind_of_client(text: &str) -> ErrorKind {
    let of_tls = ["certificate", "server does not support TLS", "InvalidContentType"];
    if of_tls.iter().any(|mark| text.contains(mark)) || is_other_protocol(text) {
        ErrorKind::Misconfigured
    } else if text.contains("password") || text.contains("authentication") {
        ErrorKind::Unauthorized
    } else {
        ErrorKind::Unavailable
    }
}

/// Returns the kind of an error that the server reported, and a message that says what to do.
fn kind_of(reported: &DbError) -> (ErrorKind, String) {
    let code = reported.code();
    let (kind, message) = match code {
        _ if code.code() == "SF001" => {
            (ErrorKind::Lost(LossCause::Missing), "the hold with this fence is over: do not write")
        }
        _ if code.code() == "SF002" => {
            (ErrorKind::Misconfigured, "the key has reached the highest fence: the server's clock was once far ahead")
        }
        _ if code.code() == "SF005" => (ErrorKind::Misconfigured, "another role could run code in the schema"),
        _ if code.code() == "SF006" => (ErrorKind::InvalidArgument, "the database rejected the request"),
        _ if code.code() == "SF003" => (ErrorKind::Misconfigured, "the schema is newer than this program"),
        _ if code.code() == "SF004" => (ErrorKind::Misconfigured, OTHER_ISOLATION),
        _ if code.code() == "28000" && reported.routine() == Some("ClientAuthentication") => {
            (ErrorKind::Unauthorized, "no entry of the server's pg_hba.conf admits this connection")
        }
        _ if code.code().starts_with("28") => {
            (ErrorKind::Unauthorized, "the server rejected the user, the password or the address")
        }
        &SqlState::INSUFFICIENT_PRIVILEGE => {
            (ErrorKind::Unauthorized, "the user lacks a right; the documentation of the store lists the rights")
        }
        &SqlState::INVALID_CATALOG_NAME => (ErrorKind::Misconfigured, "there is no such database"),
        &SqlState::UNDEFINED_TABLE
        | &SqlState::UNDEFINED_FUNCTION
        | &SqlState::UNDEFINED_COLUMN
        | &SqlState::INVALID_SCHEMA_NAME => (
            ErrorKind::Misconfigured,
            "the schema is missing or has another version: `STANCHION_STORE=URL stanchion schema --apply`, as its owner, creates it",
        ),
        &SqlState::TOO_MANY_CONNECTIONS => (ErrorKind::RateLimited, "the server has too many connections"),
        &SqlState::DISK_FULL => (ErrorKind::Unavailable, "the server's disk is full"),
        &SqlState::OUT_OF_MEMORY => (ErrorKind::Unavailable, "the server is out of memory"),
        &SqlState::READ_ONLY_SQL_TRANSACTION => {
            (ErrorKind::Unavailable, "the server accepts no writes: it may be a standby now")
        }
        &SqlState::LOCK_NOT_AVAILABLE => {
            (ErrorKind::Unavailable, "another transaction keeps the key locked (does it call `check_fence`?)")
        }
        &SqlState::QUERY_CANCELED => {
            (ErrorKind::Unavailable, "the server cancelled the operation (is there a `statement_timeout`?)")
        }
        &SqlState::T_R_SERIALIZATION_FAILURE | &SqlState::T_R_DEADLOCK_DETECTED => {
            (ErrorKind::Unavailable, "the operation conflicted with another transaction")
        }
        &SqlState::ADMIN_SHUTDOWN | &SqlState::CRASH_SHUTDOWN => {
            (ErrorKind::Unavailable, "the server ended the connection")
        }
        &SqlState::CANNOT_CONNECT_NOW => (ErrorKind::Unavailable, "the server is starting or stopping"),
        // Errors of connections, resources, limits (a full queue of notifications), operators and the system pass.
        _ if code.code().get(..2).is_some_and(|class| ["08", "53", "54", "57", "58", "40", "55"].contains(&class)) => {
            (ErrorKind::Unavailable, "the server reported an error")
        }
        _ => (ErrorKind::Internal, "the server reported an error"),
    };
    match names_the_role(reported) {
        true => (kind, format!("{message} ({})", code.code())),
        false => (kind, format!("{message} ({}: {})", code.code(), reported.message())),
    }
}

/// Returns whether the server's text names the role. The role is the user part of the URL, where somebody may have put
/// a secret by mistake.
fn names_the_role(reported: &DbError) -> bool {
    reported.code().code().starts_with("28") || *reported.code() == SqlState::TOO_MANY_CONNECTIONS
}

/// The consequence of an error for the connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// This connection must not be used again.
    Connection,
    /// The server accepts no writes, so no connection that was opened before must be used again.
    Server,
}

/// Returns the consequence of a request's error for the connections.
pub(super) fn verdict(fault: &tokio_postgres::Error) -> Option<Verdict> {
    let reported = fault.as_db_error()?;
    let code = reported.code().code();
    let is_in_recovery = code == "55000" && reported.message().contains("recovery");
    match code {
        _ if code == "25006" || is_in_recovery => Some(Verdict::Server),
        _ if code.starts_with("08") || code.starts_with("57P") => Some(Verdict::Connection),
        _ => reported.parsed_severity().filter(|severity| *severity != Severity::Error).map(|_| Verdict::Connection),
    }
}
