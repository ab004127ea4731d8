//! Prints messages: one line each on stderr, with the tool's name before it. stdout is for data.

use std::error::Error as _;
use std::fmt;
use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use crate::exit_code;
use crate::report::Report;

/// Amount of messages that the tool prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verbosity {
    /// No messages: the exit code tells the result.
    Quiet,
    /// Problems.
    Normal,
    /// Problems and progress.
    Verbose,
}

impl Verbosity {
    /// Prints a problem, unless `--quiet` is given.
    pub(crate) fn problem(self, text: impl fmt::Display) {
        if self >= Self::Normal {
            say(text);
        }
    }

    /// Prints a detail, if `--verbose` is given.
    pub(crate) fn note(self, text: impl fmt::Display) {
        if self >= Self::Verbose {
            say(text);
        }
    }
}

impl Verbosity {
    /// Prints progress, if somebody is likely to read it now.
    pub(crate) fn progress(self, text: impl fmt::Display) {
        if self.describe_wait_after().is_some() {
            say(text);
        }
    }

    pub(crate) fn report(self, report: Report) {
        match report {
            Report::Progress(line) => self.progress(line),
            Report::Problem(line) => self.problem(line),
        }
    }

    /// Returns the time after which a wait is described: at once with `--verbose`, later on a terminal, where a short wait
    /// is no news, and otherwise never.
    pub(crate) fn describe_wait_after(self) -> Option<Duration> {
        match self {
            Self::Verbose => Some(Duration::ZERO),
            Self::Normal if std::io::stderr().is_terminal() => Some(Duration::from_secs(2)),
            Self::Normal | Self::Quiet => None,
        }
    }
}

fn say(text: impl fmt::Display) {
    let line = format!("stanchion: {}\n", one_line(&text.to_string()));
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
}

/// An unsuccessful end of the tool: a message and an exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: u8,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl From<stanchion::Error> for Failure {
    fn from(error: stanchion::Error) -> Self {
        let mut message = error.to_string();
        // One level: below that, libraries repeat themselves. A client may put the kind of the fault before its text.
        let says_nothing = |cause: &String| {
            cause == "db error" || message.contains(cause.split_once(": ").map_or(cause.as_str(), |(_, text)| text))
        };
        if let Some(cause) = error.source().map(ToString::to_string).filter(|cause| !says_nothing(cause)) {
            message = format!("{message}: {cause}");
        }
        Self::new(exit_code::of_error(&error), message)
    }
}

/// Returns the text in one line, without control characters and passwords.
pub(crate) fn one_line(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    crate::output::visible(&without_passwords(&lines.join(" ")))
}

/// Returns a path or a program's name as messages quote it. It may be a URL in the wrong place, so passwords are removed.
pub(crate) fn quoted(text: &str) -> String {
    crate::output::escape(&stanchion::store::redacted(text))
}

/// Returns a key as messages quote it. A key such as `user:ann@example.com` is shown, one with `://` is taken for a URL.
pub(crate) fn quoted_key(key: &str) -> String {
    if key.contains("://") { quoted(key) } else { crate::output::escape(key) }
}

/// Redacts each URL in a message of a library. Our own messages use [`quoted`], because only there the end of a URL with
/// blanks is known.
fn without_passwords(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let is_delimiter = |c: char| c.is_whitespace() || "'\"`()".contains(c);
        let start = rest[..at].rfind(is_delimiter).map_or(0, |before| before + 1);
        let end = rest[at..].find(is_delimiter).map_or(rest.len(), |length| at + length);
        out.push_str(&rest[..start]);
        out.push_str(&stanchion::store::redacted(&rest[start..end]));
        rest = &rest[end..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use stanchion::{Error, ErrorKind};

    #[test]
    fn messages_are_one_harmless_line() {
        assert_eq!(one_line("a\n  b\n\nc\u{1b}[2J"), "a b c\\u{1b}[2J");
        assert_eq!(one_line("no 'redis://u:se@cret@h:1/0' here"), "no 'redis://***@h:1/0' here");
        assert_eq!(one_line("redis://h and pg://:x@y"), "redis://h and pg://***@y");
        assert_eq!(quoted("redis://u:s e'c\"ret@h"), "redis://***@h");
    }

    #[test]
    fn failure_names_its_cause_once() {
        let error =
            Error::new(ErrorKind::Unavailable, "no answer").with_source(Error::new(ErrorKind::Internal, "refused"));
        let failure = Failure::from(error);
        assert_eq!((failure.code, failure.message.as_str()), (69, "no answer: refused"));
    }
}
