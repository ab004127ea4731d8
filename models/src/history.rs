//! What the properties remember of the past.

use crate::message::Token;

/// What the properties remember of the past.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct History {
    /// The highest fence granted.
    pub issued: u16,
    /// The highest fence that the resource accepted.
    pub accepted: u16,
    /// Fences up to this one were forgotten with their records.
    pub forgotten: u16,
    /// Whether the records were lost.
    pub lost_records: bool,
    /// Whether another store took over.
    pub failed_over: bool,
    /// Fences that were forced out.
    pub forced: Vec<u16>,
    /// Tokens that were granted.
    pub granted: Vec<Token>,
    /// Sessions that were dead once, a bit each.
    pub dead: u8,
    /// Forced releases sent.
    pub forces: u8,
    /// A fence was granted that is not above all before it.
    pub bad_fence: bool,
    /// A token was granted twice while its call lived.
    pub bad_token: bool,
    /// The resource accepted a write below one before it.
    pub bad_write: bool,
    /// A call was granted before another that had asked earlier.
    pub bad_order: bool,
}

impl History {
    /// A grant was made.
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

    /// The resource accepted a write.
    pub fn write(&mut self, fence: u16) {
        self.bad_write |= fence < self.accepted;
        self.accepted = self.accepted.max(fence);
    }

    /// A hold was forced out by this fence.
    pub fn forced(&mut self, fence: u16) {
        self.forced.push(fence);
    }

    /// A session died.
    pub fn died(&mut self, session: u8) {
        self.dead |= 1 << session;
    }
}
