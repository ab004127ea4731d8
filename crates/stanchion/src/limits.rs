//! The limits of what a call accepts.

use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

/// Shortest and longest duration that a call accepts: 10 ms and 30 days.
pub const DURATION_RANGE: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(10)..=Duration::from_secs(30 * 24 * 60 * 60);

/// Maximum length of an owner label, in bytes.
pub const MAX_OWNER_BYTES: usize = 128;

/// Maximum length of a request's metadata, and of its trace, in bytes each.
pub const MAX_METADATA_BYTES: usize = 4_096;

/// Rejects a duration outside of [`DURATION_RANGE`].
pub(crate) fn check_duration(what: &str, span: Duration) -> Result<()> {
    if DURATION_RANGE.contains(&span) {
        return Ok(());
    }
    let message = format!("{what} is {span:?}: it must be between 10 ms and 30 days");
    Err(Error::new(ErrorKind::InvalidArgument, message))
}

/// Rejects a wait limit of more than 30 days. A limit may be shorter than other durations.
pub(crate) fn check_wait(wait: Duration) -> Result<()> {
    if wait <= *DURATION_RANGE.end() {
        return Ok(());
    }
    let message =
        format!("the wait limit is {wait:?}, but at most 30 days are allowed; leave it out to wait without a limit");
    Err(Error::new(ErrorKind::InvalidArgument, message))
}
