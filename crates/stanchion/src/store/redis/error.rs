//! What servers and the client report, as errors of stanchion.

use redis::{RedisError, ServerErrorKind};

use super::config::Address;
use crate::error::{Error, ErrorKind};

/// The store's name in errors and events.
pub(super) const NAME: &str = "redis";

/// A message and its kind.
pub(super) fn error(kind: ErrorKind, message: impl Into<String>) -> Error {
    Error::new(kind, message).with_store(NAME)
}

/// What a server's answer says about the connection and the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The server refused, and did nothing. The connection is good.
    Refused,
    /// The server refused, and another one is to be asked from now on.
    NotHere,
    /// The connection is gone, and nobody knows what became of the request.
    Broken,
}

/// A fault while a connection was being made: nothing was sent yet.
pub(super) fn while_connecting(address: &Address, fault: &RedisError) -> Error {
    let (kind, what) = match kind_of(fault) {
        (ErrorKind::NetworkTimeout, what) => (ErrorKind::Unavailable, what),
        // Why a server closes what was just opened, it says before we ask: mostly nobody reads that.
        (kind, what) if fault.is_connection_dropped() && !fault.is_connection_refusal() => {
            (kind, format!("{what}; it closes new connections, perhaps it has too many clients (maxclients)"))
        }
        other => other,
    };
    error(kind, format!("cannot connect to {address}: {what}")).in_doubt(false).with_source(fault.clone())
}

/// A fault of the client itself: what it was told cannot be.
pub(super) fn from_client(fault: &RedisError) -> Error {
    error(ErrorKind::InvalidArgument, fault.to_string())
}

/// A fault of a request that was sent.
pub(super) fn from_answer(address: &Address, fault: &RedisError) -> (Error, Verdict) {
    let (kind, what) = kind_of(fault);
    let verdict = match fault.code() {
        None => Verdict::Broken,
        Some(_) if is_elsewhere(fault) => Verdict::NotHere,
        Some(_) => Verdict::Refused,
    };
    let error = error(kind, format!("{address}: {what}")).in_doubt(verdict == Verdict::Broken);
    (error.with_source(fault.clone()), verdict)
}

/// The server is no primary any more, or not yet.
fn is_elsewhere(fault: &RedisError) -> bool {
    text(fault).contains("READONLY") || matches!(fault.code(), Some("MASTERDOWN" | "UNBLOCKED"))
}

/// Whether the server answers, and does not do this command for us: it lacks the command, or the user lacks the right. A proxy
/// and a managed service have words of their own for that, mostly behind `ERR`.
pub(super) fn is_refused(fault: &RedisError) -> bool {
    let kinds = [ErrorKind::Unauthorized, ErrorKind::Unsupported, ErrorKind::Internal];
    matches!(fault.code(), Some("NOPERM" | "ERR"))
        && kinds.contains(&kind_of(fault).0)
        && !text(fault).contains("Authentication required")
}

/// The command that a refusal names: the first word in quotes.
fn named_command(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once(['\'', '`'])?;
    let (command, _) = rest.split_once(['\'', '`'])?;
    let is_command = |c: char| c.is_ascii_alphanumeric() || matches!(c, '|' | '_' | '-' | '.');
    (!command.is_empty() && command.chars().all(is_command)).then_some(command)
}

/// What to do where a command that this library cannot do without is refused.
fn advice(kind: ErrorKind, text: &str) -> String {
    match (kind, named_command(text)) {
        (ErrorKind::Unauthorized, Some(command)) if text.contains("permissions to run") => {
            format!("; grant it: `ACL SETUSER <user> +{}`", command.to_lowercase())
        }
        // Redis 7.0 does not say which one it was.
        (ErrorKind::Unauthorized, _) if text.contains("can't run this command") => {
            let list: Vec<_> = include_str!("access_list.txt").lines().skip(1).collect();
            format!("; grant it what its scripts use: `ACL SETUSER <user> {}`", list.join(" "))
        }
        (ErrorKind::Unsupported, Some(command)) => format!("; this library needs {}", command.to_uppercase()),
        _ => String::new(),
    }
}

/// Code and detail: before Redis 7 what fails in a script comes as `ERR`, with the real code inside.
fn text(fault: &RedisError) -> String {
    format!("{} {}", fault.code().unwrap_or_default(), fault.detail().unwrap_or_default())
}

/// How a script fails on a record that has not the form it expects.
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
            redis::ErrorKind::Io if is_untrusted(fault) => (ErrorKind::Misconfigured, format!("TLS: {fault}")),
            redis::ErrorKind::Io => (ErrorKind::Unavailable, fault.to_string()),
            redis::ErrorKind::InvalidClientConfig => (ErrorKind::Unavailable, fault.to_string()),
            _ => (ErrorKind::Internal, fault.to_string()),
        };
    }
    let text = text(fault);
    // In the order in which they count where several are named. The client keeps no code of what refuses a database, only the
    // words after it.
    let table: &[(&[&str], ErrorKind, &str)] = &[
        (
            &["NOPERM", "can't run this command", "has no permissions"],
            ErrorKind::Unauthorized,
            "the user lacks a right; see the access list in the documentation of the store",
        ),
        (&["NOAUTH", "Authentication required"], ErrorKind::Unauthorized, "the server wants a user or a password"),
        (&["WRONGPASS", "invalid password"], ErrorKind::Unauthorized, "the server refused the user or the password"),
        (&["OOM "], ErrorKind::Unavailable, "the server is out of memory (maxmemory) and takes no new holds"),
        (&["READONLY"], ErrorKind::Unavailable, "the server is a replica now"),
        (&["LOADING"], ErrorKind::Unavailable, "the server is loading its data"),
        (&["MASTERDOWN"], ErrorKind::Unavailable, "the server has lost its primary"),
        (&["CLUSTERDOWN"], ErrorKind::Unavailable, "the cluster is down"),
        (&["TRYAGAIN"], ErrorKind::Unavailable, "the key is being moved to another node"),
        (&["BUSY "], ErrorKind::Unavailable, "the server is busy with a script"),
        (&["NOREPLICAS"], ErrorKind::Unavailable, "the server has too few replicas (min-replicas-to-write)"),
        (&["max number of clients"], ErrorKind::RateLimited, "the server has too many clients (maxclients)"),
        (&["MISCONF"], ErrorKind::Misconfigured, "the server cannot save its data and takes no writes; see its log"),
        (
            &["MOVED", "ASK ", "not allowed in cluster mode"],
            ErrorKind::Misconfigured,
            "the server is part of a cluster: use `redis+cluster://`",
        ),
        (
            &["DB index is out of range"],
            ErrorKind::InvalidArgument,
            "the server has no such database; it has those from 0 to one less than its setting `databases`",
        ),
        (&["CROSSSLOT"], ErrorKind::Internal, "keys of one lock are in several slots"),
        (
            &["WRONGTYPE", "RECORD "],
            ErrorKind::Misconfigured,
            "a key of ours was written by something else; use another `prefix`",
        ),
        (DAMAGED, ErrorKind::Misconfigured, "a key of ours is damaged or was written by something else"),
        (
            &["FENCE "],
            ErrorKind::Misconfigured,
            "the key has the highest fence there is: the server's clock was far ahead once",
        ),
        (
            &["unknown command", "Unknown Redis command", "NOPROTO"],
            ErrorKind::Unsupported,
            "the server or a proxy before it lacks a command; Redis 6.2 or later is needed",
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

/// A certificate that is not trusted does not become so by trying again.
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

    /// Those that a server can be made to say are also provoked on a real one, in the test kit.
    #[test]
    fn what_a_server_says_has_its_kind() {
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
                line if line.contains("READONLY") || line.starts_with("MASTERDOWN") => Verdict::NotHere,
                _ => Verdict::Refused,
            };
            assert_eq!(refused(line), (kind, false, verdict), "{line}");
        }
    }

    #[test]
    fn refusals_are_told_from_faults() {
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
    fn a_refusal_names_the_command_and_the_grant() {
        let told = |line: &str| {
            let (code, detail) = line.split_once(' ').unwrap_or((line, ""));
            kind_of(&redis::make_extension_error(code.to_owned(), Some(detail.to_owned()))).1
        };
        let text = told("NOPERM this user has no permissions to run the 'evalsha' command");
        assert!(text.ends_with("grant it: `ACL SETUSER <user> +evalsha`"), "{text}");
        let text = told("NOPERM User bob has no permissions to run the 'set' command script: 1, on @user_script:8.");
        assert!(text.ends_with("grant it: `ACL SETUSER <user> +set`"), "{text}");
        let text = told("ERR unknown command 'EVALSHA', with args beginning with: '1' '3' ");
        assert!(text.ends_with("this library needs EVALSHA"), "{text}");
        let text = told("NOPERM this user has no permissions to access one of the keys used as arguments");
        assert!(text.ends_with(')'), "{text}");
    }

    #[test]
    fn a_connection_that_breaks_leaves_the_request_in_doubt() {
        let address = Address::Unix("/run/redis.sock".into());
        for (fault, kind) in [
            (std::io::ErrorKind::ConnectionReset, ErrorKind::Unavailable),
            (std::io::ErrorKind::BrokenPipe, ErrorKind::Unavailable),
            (std::io::ErrorKind::TimedOut, ErrorKind::NetworkTimeout),
        ] {
            let fault = RedisError::from(std::io::Error::from(fault));
            let (error, verdict) = from_answer(&address, &fault);
            assert_eq!((error.kind(), error.is_in_doubt(), verdict), (kind, true, Verdict::Broken));
            assert!(!while_connecting(&address, &fault).is_in_doubt());
        }
    }
}
