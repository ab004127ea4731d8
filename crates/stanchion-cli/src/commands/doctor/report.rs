//! Prints one line per check, and derives the exit code.

use std::time::Duration;

use serde::Serialize;

use crate::exit_code;
use crate::message::{Failure, one_line};
use crate::output::{json_line, print};

/// The results of the checks so far.
#[derive(Debug)]
pub(super) struct Report {
    json: bool,
    is_strict: bool,
    is_silent: bool,
    /// Exit code of the first check that failed.
    code: u8,
}

/// A check, as `--json` shows it.
#[derive(Debug, Serialize)]
struct Line<'a> {
    check: &'a str,
    outcome: Outcome,
    message: &'a str,
    #[serde(flatten)]
    measured: Measured,
}

#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    Ok,
    Warning,
    Failed,
    Skipped,
}

impl Outcome {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

/// A number that belongs to a check.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Measured {
    #[serde(skip_serializing_if = "Option::is_none")]
    took_us: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset_us: Option<i64>,
}

impl Measured {
    pub(super) fn took(span: Duration) -> Self {
        Self { took_us: u64::try_from(span.as_micros()).ok(), offset_us: None }
    }

    pub(super) fn offset(micros: i64) -> Self {
        Self { took_us: None, offset_us: Some(micros) }
    }
}

impl Report {
    pub(super) fn new(json: bool, is_strict: bool, is_silent: bool) -> Self {
        Self { json, is_strict, is_silent, code: exit_code::OK }
    }

    pub(super) fn exit_code(&self) -> u8 {
        self.code
    }

    pub(super) fn ok(&mut self, check: &str, message: &str) -> Result<(), Failure> {
        self.ok_with(check, message, Measured::default())
    }

    pub(super) fn ok_with(&mut self, check: &str, message: &str, measured: Measured) -> Result<(), Failure> {
        self.line(check, Outcome::Ok, message, measured)
    }

    pub(super) fn warning(&mut self, check: &str, message: &str, measured: Measured) -> Result<(), Failure> {
        if self.is_strict && self.code == exit_code::OK {
            self.code = exit_code::MISCONFIGURED;
        }
        self.line(check, Outcome::Warning, message, measured)
    }

    pub(super) fn failed(&mut self, check: &str, failure: &Failure) -> Result<(), Failure> {
        if self.code == exit_code::OK {
            self.code = failure.code;
        }
        self.line(check, Outcome::Failed, &failure.message, Measured::default())
    }

    pub(super) fn skipped(&mut self, checks: &[&str], message: &str) -> Result<(), Failure> {
        checks.iter().try_for_each(|check| self.line(check, Outcome::Skipped, message, Measured::default()))
    }

    fn line(&self, check: &str, outcome: Outcome, message: &str, measured: Measured) -> Result<(), Failure> {
        if self.is_silent {
            return Ok(());
        }
        // A message may quote the server.
        let message = &one_line(message);
        let line = match self.json {
            true => json_line(&Line { check, outcome, message, measured })?,
            false => format!("{:7}  {check:8}  {message}\n", outcome.word()),
        };
        // The exit code tells the result also to a caller that reads no further.
        print(&line).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_failure_gives_the_exit_code() {
        let mut report = Report::new(false, false, true);
        report.warning("settings", "x", Measured::default()).unwrap();
        assert_eq!(report.exit_code(), 0, "a warning is allowed");
        report.failed("rights", &Failure::new(77, "x")).unwrap();
        report.failed("clock", &Failure::new(69, "x")).unwrap();
        assert_eq!(report.exit_code(), 77);
        let mut strict = Report::new(false, true, true);
        strict.warning("settings", "x", Measured::default()).unwrap();
        assert_eq!(strict.exit_code(), 78);
    }
}
