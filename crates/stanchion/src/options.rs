//! Defines [`Options`]: what a request asks for, besides its key.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::error::{Error, ErrorKind, Result};
use crate::limits::{MAX_METADATA_BYTES, check_duration, check_wait};
use crate::linger::check_linger;
use crate::on_lost::OnLost;
use crate::store::{Demand, Lifetime};

/// The options of a request. The methods of [`LockRequest`](crate::LockRequest) describe them.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// `None`: without a limit. Zero: one attempt.
    pub(crate) wait: Option<Duration>,
    pub(crate) ttl: Option<Duration>,
    /// The `ttl` is the time after which the store expires the hold, not the time that the holder can use.
    pub(crate) is_exact: bool,
    pub(crate) max_hold: Option<Duration>,
    pub(crate) heartbeat_within: Option<Duration>,
    pub(crate) cooldown: Option<Duration>,
    /// `None`: as the handle says. Zero: never.
    pub(crate) linger: Option<Duration>,
    pub(crate) metadata: Option<String>,
    pub(crate) trace: Option<String>,
    pub(crate) cancel: Option<CancellationToken>,
    /// Units and capacity are checked only when the request is made, so they are no [`Demand`] yet.
    pub(crate) units: u32,
    pub(crate) capacity: u32,
    pub(crate) on_lost: Option<OnLost>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            wait: None,
            ttl: None,
            is_exact: false,
            max_hold: None,
            heartbeat_within: None,
            cooldown: None,
            linger: None,
            metadata: None,
            trace: None,
            cancel: None,
            units: Demand::MUTEX.units(),
            capacity: Demand::MUTEX.capacity(),
            on_lost: None,
        }
    }
}

impl Options {
    /// Returns for how long the hold may linger, if it may. `default` is the time of the handle.
    pub(crate) fn linger(&self, default: Option<Duration>) -> Option<Duration> {
        let may_linger = self.why_not_linger().is_none();
        self.linger.or(default.filter(|_| may_linger)).filter(|linger| !linger.is_zero())
    }

    /// Returns the option because of which the hold cannot linger.
    fn why_not_linger(&self) -> Option<&'static str> {
        let demand = Demand::new(self.units, self.capacity);
        match () {
            () if self.ttl.is_some() => Some("a ttl"),
            () if self.max_hold.is_some() => Some("a max_hold"),
            () if self.cooldown.is_some() => Some("a cooldown"),
            () if !demand.is_ok_and(Demand::is_exclusive) => Some("shared units"),
            () => None,
        }
    }

    /// Validates all options, and returns the lifetime and the demand that they ask for.
    pub(crate) fn check(&self) -> Result<(Lifetime, Demand)> {
        let demand = Demand::new(self.units, self.capacity)?;
        if let Some(wait) = self.wait.filter(|wait| !wait.is_zero()) {
            check_wait(wait)?;
        }
        let durations = [
            ("the ttl", self.ttl),
            ("max_hold", self.max_hold),
            ("heartbeat_within", self.heartbeat_within),
            ("the cooldown", self.cooldown),
        ];
        for (what, span) in durations {
            if let Some(span) = span {
                check_duration(what, span)?;
            }
        }
        if let Some(linger) = self.linger.filter(|linger| !linger.is_zero()) {
            check_linger(linger)?;
            if let Some(option) = self.why_not_linger() {
                let message = format!("a request with linger cannot have {option}: its hold would not be kept");
                return Err(Error::new(ErrorKind::InvalidArgument, message));
            }
        }
        for (what, text) in [("the metadata", &self.metadata), ("the trace", &self.trace)] {
            let length = text.as_ref().map_or(0, String::len);
            if length > MAX_METADATA_BYTES {
                let message = format!("{what} has {length} bytes, the longest allowed is {MAX_METADATA_BYTES}");
                return Err(Error::new(ErrorKind::InvalidArgument, message));
            }
        }
        match (self.ttl, self.max_hold) {
            (Some(_), Some(_)) => {
                let message = "a request has a ttl or a max_hold, not both: a fixed lifetime ends by itself";
                Err(Error::new(ErrorKind::InvalidArgument, message))
            }
            (Some(ttl), None) => Ok((Lifetime::Fixed(ttl), demand)),
            (None, max_hold) => Ok((Lifetime::Session { max_hold }, demand)),
        }
    }
}
