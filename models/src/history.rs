//! Records the past events that the properties need.

use crate::message::Token;

/// Past events that the properties need.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct History {
    /// Highest fence that was granted.
    pub issued: u16,
    /// Highest fence that the resource has accepted.
    pub accepted: u16,
    /// Highest fence that the store has forgotten with its records.
    pub forgotten: u16,
    /// Whether the store has lost its records.
    pub lost_records: bool,
    /// Whether another store has taken over.
    pub failed_over: bool,
    /// Fences of force-released holds.
    pub force_released: Vec<u16>,
    /// Tokens that were granted.
    pub granted: Vec<Token>,
    /// Bit set of the sessions that have expired.
    pub expired: u8,
    /// Number of force-releases that were sent.
    pub force_releases: u8,
    /// Whether a granted fence was not higher than all earlier ones.
    pub bad_fence: bool,
    /// Whether a token was granted twice while its call was alive.
    pub bad_token: bool,
    /// Whether the resource accepted a write with a lower fence than an earlier write.
    pub bad_write: bool,
    /// Whether a call was granted before another one that had queued earlier.
    pub bad_order: bool,
}

impl History {
    /// Records a grant.
    pub fn granted(&mut self, token: Token, fence: u16, live: bool) {
        self.bad_fence |= fence <= self.issued;
        self.issued = self.issued.max(fence);
        if self.granted.contains(&token) {
            self.bad_token |= live;
        } else {
            self.granted.push(token);
            self.granted.sort_unstable();
        }
    }

    /// Records the fence of an adopted hold, which is the fence of the hold before or a new one.
    pub fn adopted(&mut self, fence: u16) {
        self.bad_fence |= fence < self.issued;
        self.issued = self.issued.max(fence);
    }

    /// Records a write that the resource accepted.
    pub fn write(&mut self, fence: u16) {
        self.bad_write |= fence < self.accepted;
        self.accepted = self.accepted.max(fence);
    }

    /// Records that the hold with this fence was force-released.
    pub fn record_force_release(&mut self, fence: u16) {
        self.force_released.push(fence);
    }

    /// Records that a session has expired.
    pub fn expire_session(&mut self, session: u8) {
        self.expired |= 1 << session;
    }
}
