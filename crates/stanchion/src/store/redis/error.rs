//! Converts faults of servers and of the client to stanchion's errors.

use redis::{RedisError, ServerErrorKind};

use super::config::Address;
use crate::error::{Error, ErrorKind};
use crate::store::tls;

/// Name of the store in errors and events.
pub(super) const NAME: &str = "redis";

/// Returns an error of this store.
pub(super) fn error(kind: ErrorKind, message: impl Into<String>) -> Error {
    Error::new(kind, message).with_store(NAME)
}

/// Consequence of a server's answer for the connection and the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The server rejected the request and did nothing. The connection is still good.
    Refused,
    /// The server rejected the request because it is not the primary, so another server gets the next one.
    NotPrimary,
    /// The connection is gone, and the outcome of the request is unknown.
    Broken,
}

/// Converts a fault of an attempt to connect, when no request was sent yet. `tls` says whether the client began with TLS.
pub(super) fn while_connecting(address: &Address, tls: bool, fault: &RedisError) -> Error {
    let failed = |kind, what: &str| error(kind, format!("cannot connect to {address}: {what}")).in_doubt(false);
    match kind_of(fault) {
        // Redis takes the first message of TLS for a command, and waits for the rest of it.
        (ErrorKind::NetworkTimeout, what) if tls => {
            let hint = "if the server does not speak TLS on this port, use `redis://`";
            failed(ErrorKind::Unavailable, &format!("{what}; {hint}"))
        }
        (ErrorKind::NetworkTimeout, what) => failed(ErrorKind::Unavailable, &what),
        _ if fault.kind() == redis::ErrorKind::Parse => failed(
            ErrorKind::Misconfigured,
            "the answer is not Redis's: another program listens there, or the server expects TLS (`rediss://`); check \
             the host, the port and the scheme",
        ),
        // The server sends its reason before the first request, and mostly nobody reads it.
        (kind, what) if fault.is_connection_dropped() && !fault.is_connection_refusal() => {
            let why =
                "it closes new connections: it may have too many clients (maxclients), or expect TLS (`rediss://`)";
            failed(kind, &format!("{what}; {why}")).with_source(fault.clone())
        }
        (kind, what) => failed(kind, &what).with_source(fault.clone()),
    }
}

/// Converts a fault of the client itself, which got an invalid argument.
pub(super) fn from_client(fault: &RedisError) -> Error {
    error(ErrorKind::InvalidArgument, fault.to_string())
}

/// Converts a fault of a request that was sent.
pub(super) fn from_answer(address: &Address, fault: &RedisError) -> (Error, Verdict) {
    let (kind, what) = kind_of(fault);
    let verdict = match fault.code() {
        None => Verdict::Broken,
        Some(_) if is_not_primary(fault) => Verdict::NotPrimary,
        Some(_) => Verdict::Refused,
    };
    let error = error(kind, format!("{address}: {what}")).in_doubt(verdict == Verdict::Broken);
    (error.with_source(fault.clone()), verdict)
}

/// Returns whether the server is not the primary, or not yet.
fn is_not_primary(fault: &RedisError) -> bool {
    text(fault).contains("READONLY") || matches!(fault.code(), Some("MASTERDOWN" | "UNBLOCKED"))
}

/// Returns whether the server works but rejects this command: it lacks the command, or the user lacks the right.
/// Proxies and managed services have texts of their own for that, mostly with the code `ERR`.
pub(super) fn is_refused(fault: &RedisError) -> bool {
    let kinds = [ErrorKind::Unauthorized, ErrorKind::Unsupported, ErrorKind::Internal];
    matches!(fault.code(), Some("NOPERM" | "ERR"))
        && kinds.contains(&kind_of(fault).0)
        && !text(fault).contains("Authentication required")
}

/// Returns the command that a rejection names: the first word in quotes.
fn named_command(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once(['\'', '`'])?;
    let (command, _) = rest.split_once(['\'', '`'])?;
    let is_command = |c: char| c.is_ascii_alphanumeric() || matches!(c, '|' | '_' | '-' | '.');
    (!command.is_empty() && command.chars().all(is_command)).then_some(command)
}

/// Returns advice for the case that the server rejects a command that the store needs.
fn advice(kind: ErrorKind, text: &str) -> String {
    match (kind, named_command(text)) {
        (ErrorKind::Unauthorized, Some(command)) if text.contains("permissions to run") => {
            format!("; grant it: `ACL SETUSER <user> +{}`", command.to_lowercase())
        }
        // Redis 7.0 does not name the command.
        (ErrorKind::Unauthorized, _) if text.contains("can't run this command") => {
            let list: Vec<_> = include_str!("access_list.txt").lines().skip(1).collect();
            format!("; grant it what its scripts use: `ACL SETUSER <user> {}`", list.join(" "))
        }
        (ErrorKind::Unsupported, Some(command)) => format!("; this library needs {}", command.to_uppercase()),
        _ => String::new(),
    }
}

/// Returns code and detail. Before Redis 7 a fault in a script has the code `ERR`, with the real code in the text.
fn text(fault: &RedisError) -> String {
    format!("{} {}", fault.code().unwrap_or_default(), fault.detail().unwrap_or_default())
}

/// Messages with which a script fails on a record of an unexpected form.
const DAMAGED: &[&str] = &[
    "Bad data format",
    "Missing bytes in input",
    "attempt to index",
    "attempt to compare",
    "attempt to perform arithmetic",
    "attempt to concatenate",
    "attempt to get length",
    "bad argument #",
    "must be strings or integers",
    "invalid value (",
];

fn kind_of(fault: &RedisError) -> (ErrorKind, String) {
    if fault.code().is_none() {
        return match fault.kind() {
            redis::ErrorKind::AuthenticationFailed => {
                (ErrorKind::Unauthorized, "the server refused the user or the password".to_owned())
            }
            redis::ErrorKind::Io if fault.is_timeout() => (ErrorKind::NetworkTimeout, "no answer in time".to_owned()),
            redis::ErrorKind::Io if is_untrusted(fault) => {
                let text = fault.to_string();
                (ErrorKind::Misconfigured, format!("TLS: {text}{}", tls::advice(&text)))
            }
            redis::ErrorKind::Io => (ErrorKind::Unavailable, fault.to_string()),
            redis::ErrorKind::InvalidClientConfig => (ErrorKind::Unavailable, fault.to_string()),
            _ => (ErrorKind::Internal, fault.to_string()),
        };
    }
    let text = text(fault);
    // The first match wins if the text names several codes. For a rejected database the client keeps no code but only
    // the text.
    let table: &[(&[&str], ErrorKind, &str)] = &[
        (
            &["NOPERM", "can't run this command", "has no permissions"],
            ErrorKind::Unauthorized,
            "the user lacks a right; see the access list in the documentation of the store",
        ),
        (&["NOAUTH", "Authentication required"], ErrorKind::Unauthorized, "the server requires a user or a password"),
        (&["WRONGPASS", "invalid password"], ErrorKind::Unauthorized, "the server refused the user or the password"),
        (&["OOM "], ErrorKind::Unavailable, "the server is out of memory (maxmemory) and accepts no new holds"),
        (&["READONLY"], ErrorKind::Unavailable, "the server is a replica now"),
        (&["LOADING"], ErrorKind::Unavailable, "the server is loading its data"),
        (&["MASTERDOWN"], ErrorKind::Unavailable, "the server has lost its primary"),
        (&["CLUSTERDOWN"], ErrorKind::Unavailable, "the cluster is down"),
        (&["TRYAGAIN"], ErrorKind::Unavailable, "the key is being moved to another node"),
        (&["BUSY "], ErrorKind::Unavailable, "the server is busy with a script"),
        (&["NOREPLICAS"], ErrorKind::Unavailable, "the server has too few replicas (min-replicas-to-write)"),
        (&["max number of clients"], ErrorKind::RateLimited, "the server has too many clients (maxclients)"),
        (&["MISCONF"], ErrorKind::Misconfigured, "the server cannot save its data and accepts no writes; see its log"),
        (
            &["MOVED", "ASK ", "not allowed in cluster mode"],
            ErrorKind::Misconfigured,
            "the server is part of a cluster: use `redis+cluster://`",
        ),
        (
            &["cluster support disabled"],
            ErrorKind::Misconfigured,
            "the server is not part of a cluster: use `redis://`",
        ),
        (
            &["unknown command 'SENTINEL'", "unknown command `SENTINEL`"],
            ErrorKind::Misconfigured,
            "the server is not a sentinel: name the sentinels, or use `redis://` for one server",
        ),
        (
            &["DB index is out of range"],
            ErrorKind::InvalidArgument,
            "the server has no such database; the setting `databases` limits the number",
        ),
        (&["CROSSSLOT"], ErrorKind::Internal, "keys of one lock are in several slots"),
        (
            &["WRONGTYPE", "RECORD "],
            ErrorKind::Misconfigured,
            "a Redis key with our prefix was written by something else; use another `prefix`",
        ),
        (DAMAGED, ErrorKind::Misconfigured, "a Redis key with our prefix is damaged or was written by something else"),
        (
            &["FENCE "],
            ErrorKind::Misconfigured,
            "the key has reached the highest fence: the server's clock was once far ahead",
        ),
        (
            &["unknown command", "Unknown Redis command", "NOPROTO"],
            ErrorKind::Unsupported,
            "the server, or a proxy in front of it, lacks a command; Redis 6.2 or later is needed",
        ),
    ];
    for (marks, kind, what) in table {
        if marks.iter().any(|mark| text.contains(mark)) {
            return (*kind, format!("{what} ({}){}", text.trim(), advice(*kind, &text)));
        }
    }
    let kind = match fault.kind() {
        redis::ErrorKind::Server(ServerErrorKind::BusyLoading | ServerErrorKind::ClusterDown) => ErrorKind::Unavailable,
        _ => ErrorKind::Internal,
    };
    (kind, text.trim().to_owned())
}

/// Returns whether a certificate is not trusted, which no retry changes.
fn is_untrusted(fault: &RedisError) -> bool {
    let text = fault.to_string().to_lowercase();
    text.contains("certificate") || text.contains("corrupt message") || text.contains("invalidcontenttype")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(line: &str) -> (ErrorKind, bool, Verdict) {
        let (code, detail) = line.split_once(' ').unwrap_or((line, ""));
        let fault = redis::make_extension_error(code.to_owned(), Some(detail.to_owned()));
        let address = Address::Tcp { host: "h".into(), port: 1 };
        let (error, verdict) = from_answer(&address, &fault);
        (error.kind(), error.is_in_doubt(), verdict)
    }

    /// The test kit also provokes these faults on a real server, as far as a server can be made to report them.
    #[test]
    fn server_faults_have_their_kinds() {
        use ErrorKind::*;
        for (line, kind) in [
            ("READONLY You can't write against a read only replica.", Unavailable),
            (
                "ERR Error running script: @user_script:7: -READONLY You can't write against a read only replica.",
                Unavailable,
            ),
            ("LOADING Redis is loading the dataset in memory", Unavailable),
            ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", Unavailable),
            ("CLUSTERDOWN Hash slot not served", Unavailable),
            ("TRYAGAIN Multiple keys request during rehashing of slot", Unavailable),
            ("BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.", Unavailable),
            ("NOREPLICAS Not enough good replicas to write.", Unavailable),
            ("OOM command not allowed when used memory > 'maxmemory'.", Unavailable),
            ("ERR Error running script: -OOM command not allowed when used memory > 'maxmemory'.", Unavailable),
            ("ERR max number of clients reached", RateLimited),
            ("NOPERM this user has no permissions to run the 'evalsha' command", Unauthorized),
            ("NOAUTH Authentication required.", Unauthorized),
            ("WRONGPASS invalid username-password pair or user is disabled.", Unauthorized),
            (
                "MISCONF Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
                Misconfigured,
            ),
            ("MOVED 3999 127.0.0.1:6381", Misconfigured),
            ("WRONGTYPE Operation against a key holding the wrong kind of value", Misconfigured),
            ("ERR unknown command 'EVALSHA'", Unsupported),
            ("ERR Unknown Redis command called from script script: 1, on @user_script:1.", Unsupported),
            ("ERR user_script:9: Bad data format in input. script: 1, on @user_script:9.", Misconfigured),
            ("ERR user_script:9: attempt to index field 'holds' (a nil value) script: 1", Misconfigured),
            ("CROSSSLOT Keys in request don't hash to the same slot", Internal),
            ("ERR something new", Internal),
        ] {
            let verdict = match line {
                line if line.contains("READONLY") || line.starts_with("MASTERDOWN") => Verdict::NotPrimary,
                _ => Verdict::Refused,
            };
            assert_eq!(refused(line), (kind, false, verdict), "{line}");
        }
    }

    #[test]
    fn rejections_differ_from_faults() {
        let fault = |line: &str| {
            let (code, detail) = line.split_once(' ').unwrap_or((line, ""));
            redis::make_extension_error(code.to_owned(), Some(detail.to_owned()))
        };
        for line in [
            "ERR unknown command 'ROLE', with args beginning with: ",
            "ERR unknown command `ROLE`, with args beginning with: ",
            "ERR Command is not available: 'ROLE'. See the documentation",
            "NOPERM this user has no permissions to run the 'role' command",
            "NOPERM User bob has no permissions to run the 'role' command",
        ] {
            assert!(is_refused(&fault(line)), "{line}");
        }
        for line in [
            "NOAUTH Authentication required.",
            "WRONGPASS invalid username-password pair or user is disabled.",
            "ERR max number of clients reached",
            "LOADING Redis is loading the dataset in memory",
            "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
            "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
        ] {
            assert!(!is_refused(&fault(line)), "{line}");
        }
        let broken = RedisError::from(std::io::Error::from(std::io::ErrorKind::ConnectionReset));
        assert!(!is_refused(&broken));
    }

    #[test]
    fn rejection_names_command_and_grant() {
        let message = |line: &str| {
            let (code, detail) = line.split_once(' ').unwrap_or((line, ""));
            kind_of(&redis::make_extension_error(code.to_owned(), Some(detail.to_owned()))).1
        };
        let text = message("NOPERM this user has no permissions to run the 'evalsha' command");
        assert!(text.ends_with("grant it: `ACL SETUSER <user> +evalsha`"), "{text}");
        let text = message("NOPERM User bob has no permissions to run the 'set' command script: 1, on @user_script:8.");
        assert!(text.ends_with("grant it: `ACL SETUSER <user> +set`"), "{text}");
        let text = message("ERR unknown command 'EVALSHA', with args beginning with: '1' '3' ");
        assert!(text.ends_with("this library needs EVALSHA"), "{text}");
        let text = message("NOPERM this user has no permissions to access one of the keys used as arguments");
        assert!(text.ends_with(')'), "{text}");
    }

    #[test]
    fn broken_connection_makes_outcome_unknown() {
        let address = Address::Unix("/run/redis.sock".into());
        for (fault, kind) in [
            (std::io::ErrorKind::ConnectionReset, ErrorKind::Unavailable),
            (std::io::ErrorKind::BrokenPipe, ErrorKind::Unavailable),
            (std::io::ErrorKind::TimedOut, ErrorKind::NetworkTimeout),
        ] {
            let fault = RedisError::from(std::io::Error::from(fault));
            let (error, verdict) = from_answer(&address, &fault);
            assert_eq!((error.kind(), error.is_in_doubt(), verdict), (kind, true, Verdict::Broken));
            assert!(!while_connecting(&address, false, &fault).is_in_doubt());
        }
    }
}
