//! The exit codes: part of the tool's contract, like its options.
//!
//! `run`, `once` and `elect` end with the code of their command where it ran to its end. The codes below are for all other cases;
//! they are those of `sysexits.h` and of shells, so that a command's own codes rarely meet them.

use stanchion::{Error, ErrorKind};

/// It went well. Also a skipped `once`, and output into a pipe that nobody reads any more.
pub(crate) const OK: u8 = 0;
/// `force-release`: nothing was changed, because no hold has this fence, or because the user did not confirm.
pub(crate) const NOTHING_CHANGED: u8 = 1;
/// The arguments are wrong: an unknown option, an invalid key, a duration out of range.
pub(crate) const USAGE: u8 = 64;
/// `ls`: the store holds entries that cannot be read. They were named and skipped.
pub(crate) const DAMAGED: u8 = 65;
/// The store cannot be reached, or cannot serve now.
pub(crate) const UNAVAILABLE: u8 = 69;
/// A defect of stanchion, damaged data in the store, or the system refused something that stanchion needs.
pub(crate) const INTERNAL: u8 = 70;
/// The key was not obtained, or `wait` did not find it free: held by another with `--no-wait`, or within `--wait`. `-E`
/// changes it. Also `inspect --check` of a key that is not free.
pub(crate) const NOT_OBTAINED: u8 = 75;
/// The key was lost while the command ran; all of the command has ended, by itself with `--on-lost ignore`. `extend`: the
/// hold has ended.
pub(crate) const LOST: u8 = 76;
/// The store or the file system refused the rights. Or the key was lost, and the system did not let the command be ended:
/// it runs on as another user.
pub(crate) const NOT_PERMITTED: u8 = 77;
/// The store cannot be used as it is: the message says what to change.
pub(crate) const MISCONFIGURED: u8 = 78;
/// The command was found and could not be executed.
pub(crate) const NOT_EXECUTABLE: u8 = 126;
/// The command was not found.
pub(crate) const NOT_FOUND: u8 = 127;

/// A code, the commands that end with it (all, if none is named), and its meaning.
type Row = (&'static str, &'static [&'static str], &'static str);

const RUNNING: &[&str] = &["run", "once", "elect"];

/// The codes as `--help` and the man pages show them.
const TABLE: [Row; 23] = [
    ("CODE", RUNNING, "the command's own code, when it ran to its end"),
    ("128+N", RUNNING, "the command died of signal N; or signal N ended the wait for the key"),
    ("0", &[], "it went well"),
    ("0", &["once"], "`once` did not run its command: not due, or another process runs it (-E changes it)"),
    ("0", &["inspect"], "`inspect --check`: a request for the key would be granted now"),
    ("1", &["force-release"], "`force-release` changed nothing: no hold has this fence, or you did not confirm"),
    ("64", &[], "wrong usage: an unknown option, an invalid key or duration"),
    ("65", &["ls"], "`ls` named and skipped entries of the store that are damaged"),
    ("69", &[], "the store cannot be reached or cannot serve now"),
    ("70", &[], "an internal error, or the system refused something stanchion needs"),
    ("75", &["run"], "the key was not obtained within the limit (-E changes it)"),
    ("75", &["acquire"], "the key was not obtained, or the process that it was for ended during the wait"),
    ("75", &["wait"], "the key was not free within the limit (-E changes it)"),
    ("75", &["inspect"], "`inspect --check`: the key is held, waited for or closed"),
    (
        "76",
        RUNNING,
        "the key was lost while the command ran, and the command was ended (with --on-lost ignore it ran on)",
    ),
    ("76", &["elect"], "only if it was also asked to end: otherwise it runs the command again"),
    ("76", &["extend"], "the hold has ended before"),
    ("77", &[], "not permitted by the store or the file system"),
    ("77", RUNNING, "the key was lost, and the command runs on as another user and could not be ended"),
    ("78", &[], "the store is misconfigured; the message says what to change"),
    ("78", &["doctor"], "`doctor --strict`: also if there is a warning"),
    ("126", RUNNING, "the command could not be executed"),
    ("127", RUNNING, "the command was not found"),
];

/// Commands that use no store, and the codes that only a store causes.
const WITHOUT_STORE: [&str; 2] = ["completions", "man"];
const OF_STORES: [&str; 2] = ["69", "78"];

/// Returns the codes of a command, or all codes for the tool's own page.
pub(crate) fn table(command: &str) -> Vec<(&'static str, &'static str)> {
    let applies = |(code, commands, _): &&Row| {
        let is_possible = !(WITHOUT_STORE.contains(&command) && OF_STORES.contains(code));
        command == "stanchion" || commands.contains(&command) || (commands.is_empty() && is_possible)
    };
    TABLE.iter().filter(applies).map(|(code, _, meaning)| (*code, *meaning)).collect()
}

/// Returns the codes of one command that others do not have, and where the others are.
pub(crate) fn of_command(command: &str) -> Vec<(&'static str, &'static str)> {
    let own = TABLE.iter().filter(|(_, commands, _)| commands.contains(&command));
    let own = own.map(|(code, _, meaning)| (*code, *meaning));
    own.chain([("others", "as for every command: see `stanchion --help`")]).collect()
}

/// The code of a command that died of a signal, as shells count.
pub(crate) fn of_signal(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}

/// The code for an error of the library.
pub(crate) fn of_error(error: &Error) -> u8 {
    match error.kind() {
        ErrorKind::Timeout | ErrorKind::Busy | ErrorKind::Cancelled => NOT_OBTAINED,
        ErrorKind::Lost(_) => LOST,
        ErrorKind::InvalidArgument => USAGE,
        ErrorKind::Unauthorized => NOT_PERMITTED,
        ErrorKind::Unavailable
        | ErrorKind::RateLimited
        | ErrorKind::NetworkTimeout
        | ErrorKind::Indeterminate
        | ErrorKind::Draining => UNAVAILABLE,
        ErrorKind::Misconfigured | ErrorKind::Unsupported => MISCONFIGURED,
        _ => INTERNAL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stanchion::LossCause;

    #[test]
    fn exit_codes_are_documented() {
        use ErrorKind::*;
        let table = [
            (Timeout, 75),
            (Busy, 75),
            (Cancelled, 75),
            (Lost(LossCause::ForceReleased), 76),
            (InvalidArgument, 64),
            (Unauthorized, 77),
            (Unavailable, 69),
            (RateLimited, 69),
            (NetworkTimeout, 69),
            (Indeterminate, 69),
            (Draining, 69),
            (Misconfigured, 78),
            (Unsupported, 78),
            (Internal, 70),
        ];
        for (kind, code) in table {
            assert_eq!(of_error(&Error::new(kind, "x")), code, "{kind:?}");
        }
    }

    #[test]
    fn help_names_every_exit_code() {
        let codes = [
            OK,
            NOTHING_CHANGED,
            USAGE,
            DAMAGED,
            UNAVAILABLE,
            INTERNAL,
            NOT_OBTAINED,
            LOST,
            NOT_PERMITTED,
            MISCONFIGURED,
            NOT_EXECUTABLE,
            NOT_FOUND,
        ];
        for code in codes {
            assert!(table("stanchion").iter().any(|(shown, _)| *shown == code.to_string()), "{code}");
        }
    }
}
