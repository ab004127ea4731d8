//! The exit codes: part of the tool's contract, like its options.
//!
//! `run` and `once` end with the code of their command where it ran to its end. The codes below are for all other cases;
//! they are those of `sysexits.h` and of shells, so that a command's own codes rarely meet them.

use stanchion::{Error, ErrorKind};

/// It went well. Also a skipped `once`, and output into a pipe that nobody reads any more.
pub(crate) const OK: u8 = 0;
/// `force-release`: no hold has this fence; nothing was changed.
pub(crate) const NO_SUCH_HOLD: u8 = 1;
/// The arguments are wrong: an unknown option, an invalid key, a duration out of range.
pub(crate) const USAGE: u8 = 64;
/// `ls`: the store holds entries that cannot be read. They were named and skipped.
pub(crate) const DAMAGED: u8 = 65;
/// The store cannot be reached, or cannot serve now.
pub(crate) const UNAVAILABLE: u8 = 69;
/// A defect of stanchion, damaged data in the store, or the system refused something that stanchion needs.
pub(crate) const INTERNAL: u8 = 70;
/// The key was not obtained: held by another with `--no-wait`, or not free within `--wait`. `-E` changes it.
pub(crate) const NOT_OBTAINED: u8 = 75;
/// The key was lost while the command ran; all of the command has ended. `extend`: the hold has ended.
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

/// The table for `--help` and the man pages.
pub(crate) const HELP: &str = "\
Exit codes:
  CODE   the command's own code, when it ran to its end
  128+N  the command died of signal N; or signal N ended the wait for the key
  0      it went well; a skipped `once`
  1      force-release: no hold has this fence
  64     wrong usage: an unknown option, an invalid key or duration
  65     ls: entries of the store are damaged; they were named and skipped
  69     the store cannot be reached or cannot serve now
  70     an internal error, or the system refused something stanchion needs
  75     the key was not obtained within the limit (-E changes it)
  76     the key was lost while the command ran, and the command was ended; extend: the hold has
         ended before
  77     not permitted by the store or the file system; or the key was lost, and the command
         runs on as another user and could not be ended
  78     the store is misconfigured; the message says what to change
  126    the command could not be executed
  127    the command was not found";

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
    fn errors_have_documented_exit_codes() {
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
            NO_SUCH_HOLD,
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
            assert!(HELP.lines().any(|line| line.trim_start().starts_with(&format!("{code} "))), "{code}");
        }
    }
}
