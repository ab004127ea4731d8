//! What the tool says: one line on stderr, with the tool's name before it. stdout is for data.

use std::error::Error as _;
use std::fmt;
use std::io::Write as _;

use crate::exit_code;

/// How much to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verbosity {
    /// Nothing: the exit code tells.
    Quiet,
    /// What went wrong.
    Normal,
    /// What happens, too.
    Verbose,
}

impl Verbosity {
    /// Says what went wrong.
    pub(crate) fn problem(self, text: impl fmt::Display) {
        if self >= Self::Normal {
            say(text);
        }
    }

    /// Says what happens.
    pub(crate) fn note(self, text: impl fmt::Display) {
        if self >= Self::Verbose {
            say(text);
        }
    }
}

fn say(text: impl fmt::Display) {
    let line = format!("stanchion: {}\n", one_line(&text.to_string()));
    // Nobody reads stderr: then there is nobody to tell.
    let _unread = std::io::stderr().lock().write_all(line.as_bytes());
}

/// The end of the tool without success: a message and an exit code.
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
        // One level: below that, libraries repeat themselves.
        if let Some(cause) = error.source().map(ToString::to_string).filter(|cause| !message.contains(cause)) {
            message = format!("{message}: {cause}");
        }
        Self::new(exit_code::of_error(&error), message)
    }
}

/// The text in one line, with no control characters and no password in it.
pub(crate) fn one_line(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    crate::output::visible(&without_passwords(&lines.join(" ")))
}

/// Replaces the user and password of every URL in the text.
fn without_passwords(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, after) = rest.split_at(at + 3);
        out.push_str(before);
        let url = &after[..after.find([' ', '\'', '"', '`']).unwrap_or(after.len())];
        rest = match url.rfind('@') {
            Some(end) => {
                out.push_str("***");
                &after[end..]
            }
            None => after,
        };
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use stanchion::{Error, ErrorKind};

    #[test]
    fn a_message_is_one_line_without_control_characters_and_passwords() {
        assert_eq!(one_line("a\n  b\n\nc\u{1b}[2J"), "a b c\\u{1b}[2J");
        assert_eq!(one_line("no 'redis://u:se@cret@h:1/0' here"), "no 'redis://***@h:1/0' here");
        assert_eq!(one_line("redis://h and pg://:x@y"), "redis://h and pg://***@y");
    }

    #[test]
    fn a_failure_tells_the_cause_once() {
        let error =
            Error::new(ErrorKind::Unavailable, "no answer").with_source(Error::new(ErrorKind::Internal, "refused"));
        let failure = Failure::from(error);
        assert_eq!((failure.code, failure.message.as_str()), (69, "no answer: refused"));
    }
}
