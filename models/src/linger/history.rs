//! Records the past events that the properties of local grants need.

use crate::message::Token;

/// Past events that the properties of local grants need.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct LocalHistory {
    /// Fences of holds that ended without a release by their holder, with the fence of the first grant since.
    pub lost: Vec<(u16, Option<u16>)>,
    /// Fences of holds whose record the store has lost.
    pub forgotten: Vec<u16>,
    /// Requests in the queue, with the time at which they entered it.
    pub queued: Vec<(Token, u8)>,
    /// Bit set of the clients that were granted the key.
    pub holders: u8,
    /// Whether a local fence was granted before, or after a higher one.
    pub bad_fence: bool,
    /// Whether a client granted locally under a hold that it knew to be force-released.
    pub bad_local: bool,
    /// Whether a client granted locally under a hold although it had been granted the key under a higher fence.
    pub bad_age: bool,
    /// Whether a call that came after a recall was granted the key before a request in the store.
    pub bad_order: bool,
    /// Whether a local grant was made too late after a request had entered the queue.
    pub bad_delay: bool,
    /// Whether a client gave up a hold in use that the store had.
    pub bad_loss: bool,
    /// Whether a waiting call overtook another one in its process.
    pub bad_turn: bool,
}

impl LocalHistory {
    /// Records that a hold ended without a release by its holder.
    pub fn lost(&mut self, fence: u16) {
        if !self.lost.iter().any(|(lost, _)| *lost == fence) {
            self.lost.push((fence, None));
            self.lost.sort_unstable();
        }
    }

    /// Records a grant after the losses, by the store or under a live hold.
    pub fn granted(&mut self, hold: u16, fence: u16) {
        for (_, since) in self.lost.iter_mut().filter(|(lost, since)| *lost != hold && since.is_none()) {
            *since = Some(fence);
        }
    }
}
