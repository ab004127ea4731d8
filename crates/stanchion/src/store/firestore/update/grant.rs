//! Reconciles a key: expires holds, grants to the head of the queue, and writes notifications.

use std::collections::{BTreeMap, BTreeSet};

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use prost::Message as _;

use super::super::document::{Fields, RECALLED_AT, WriteIf, bytes, delete, fields, merge, put, text, timestamp};
use super::super::record::{StoredEntry, StoredHold, session_of, token_of};
use super::{DELETION_DELAY, KeyUpdate};
use crate::fence::Fence;
use crate::store::Demand;

/// Size of the holds in bytes above which a key accepts no more holds. A document can have 1 MiB.
pub(super) const MAX_HOLDS_BYTES: usize = 600_000;

/// Maximum number of notifications per commit, because a commit has a size limit. A waiter without a notification finds
/// its grant when it polls.
const MAX_NOTIFICATIONS: usize = 300;

/// Maximum size in bytes of a key's record that a notification carries.
const MAX_CARRIED_RECORD_BYTES: usize = 50_000;

/// A notification document that this operation will write.
pub(super) struct PendingNotification {
    name: String,
    contents: Fields,
    /// Whether the notification may carry the key's record, which is useless after a force-release.
    may_carry_record: bool,
}

impl KeyUpdate<'_> {
    pub(super) fn fits(&self, demand: Demand) -> bool {
        let held = self.record.holds.iter().map(|hold| hold.entry.demand());
        let has_room = || self.record.holds.iter().map(prost::Message::encoded_len).sum::<usize>() <= MAX_HOLDS_BYTES;
        self.record.closed_until <= self.now && demand.fits(held) && has_room()
    }

    /// Reconciles the key: removes expired holds and waiters, and then grants to the head of the queue while it fits.
    pub(crate) fn reconcile(&mut self) {
        self.expire_holds();
        while let Some(head) = self.record.front.first() {
            if !self.is_alive_hinted(&head.session, head.session_alive_until) {
                // Check all waiters at once, so that a queue of expired ones takes two reads and not one read per
                // waiter.
                self.drop_expired_waiters();
            } else if self.unread.borrow().is_empty()
                && self.fits(head.demand())
                && let Some(fence) = self.next_fence()
            {
                let waiter = self.record.front.remove(0);
                self.refill_front();
                self.grant(waiter, fence, true);
            } else {
                break;
            }
        }
    }

    /// Removes holds and cooldowns that are over, because of their time or because their session expired. Grants
    /// nothing.
    pub(crate) fn expire_holds(&mut self) {
        for hold in std::mem::take(&mut self.record.holds) {
            if hold.deadline.is_some_and(|deadline| deadline <= self.now) {
                // Delete the notification, because this session may live on for weeks. The reaper deletes the
                // notifications of expired sessions.
                if hold.has_notification && self.other_writes.len() < MAX_NOTIFICATIONS {
                    self.delete_notification(&hold.entry.session, &hold.entry.token);
                }
            } else if !hold.entry.session_bound
                || self.is_alive_hinted(&hold.entry.session, hold.entry.session_alive_until)
            {
                self.record.holds.push(hold);
            }
        }
        let mut released = std::mem::take(&mut self.record.force_released);
        released.retain(|released| self.is_alive_hinted(&released.session, 0));
        self.record.force_released = released;
        if self.record.closed_until <= self.now {
            self.record.closed_until = 0;
        }
        self.refill_front();
    }

    /// Removes all waiters of expired sessions, not only the ones at the head of the queue.
    pub(crate) fn drop_expired_waiters(&mut self) {
        let mut sessions = BTreeMap::new();
        for waiter in self.waiters() {
            let alive_until = sessions.entry(&waiter.session).or_insert(waiter.session_alive_until);
            *alive_until = waiter.session_alive_until.max(*alive_until);
        }
        let is_expired = |(session, alive_until): &(&Vec<u8>, u64)| !self.is_alive_hinted(session, *alive_until);
        let expired: BTreeSet<_> =
            sessions.into_iter().filter(is_expired).map(|(session, _)| session.clone()).collect();
        if !expired.is_empty() {
            self.remove_waiters(|waiter| expired.contains(&waiter.session));
        }
    }

    /// Returns the fence of the next grant, or `None` if the fences are used up.
    pub(super) fn next_fence(&self) -> Option<u64> {
        let last = (self.record.last_fence != 0).then(|| Fence::new(self.record.last_fence));
        Fence::next(last, self.now).map(Fence::get)
    }

    pub(super) fn grant(&mut self, mut entry: StoredEntry, fence: u64, is_notified: bool) {
        self.record.last_fence = fence;
        let has_notification = is_notified && self.notify(&entry.session, &entry.token, Some(fence), None);
        let mut deadline = None;
        entry.since = if self.is_granted_at_commit { 0 } else { self.now };
        if !self.is_granted_at_commit {
            deadline = entry.length.map(|length| self.now.saturating_add(length));
        }
        self.record.holds.push(StoredHold {
            entry,
            fence,
            deadline,
            has_notification,
            granted_from_queue: has_notification,
            previous: None,
            lingers: None,
        });
    }

    /// Adds a notification for a session's listener. Returns whether there was room for it.
    pub(super) fn notify(&mut self, session: &[u8], token: &[u8], fence: Option<u64>, reason: Option<&str>) -> bool {
        let (Ok(session), Ok(token)) = (session_of(session), token_of(token)) else { return false };
        if self.notifications.len() >= MAX_NOTIFICATIONS {
            return false;
        }
        let mut contents = fields([
            ("key", text(self.key.as_encoded())),
            ("expire_at", timestamp(self.now.saturating_add(DELETION_DELAY))),
        ]);
        if let Some(fence) = fence {
            contents.insert("fence".to_owned(), text(fence.to_string()));
        }
        if let Some(reason) = reason {
            contents.insert("forced".to_owned(), text(reason));
        }
        let name = self.names.notification(session, token);
        self.notifications.retain(|notification| notification.name != name);
        self.notifications.push(PendingNotification { name, contents, may_carry_record: reason.is_none() });
        true
    }

    /// Notifies the holder when the first waiter joins, because the holder's cached document is now outdated. If the
    /// hold lingers, the notification recalls it.
    pub(super) fn notify_holder(&mut self) {
        let [hold] = &mut self.record.holds[..] else { return };
        if hold.entry.session_bound {
            hold.has_notification = true;
            let (session, token, lingers) =
                (hold.entry.session.clone(), hold.entry.token.clone(), hold.lingers.is_some());
            // Repeat the grant: the holder may not have received the notification that this one replaces. A holder whose
            // hold lingers has received it.
            let fence = (hold.granted_from_queue && !lingers).then_some(hold.fence);
            if self.notify(&session, &token, fence, None)
                && lingers
                && let Some(notification) = self.notifications.last_mut()
            {
                notification.contents.insert(RECALLED_AT.to_owned(), timestamp(self.now));
            }
        }
    }

    /// Returns the write that recalls a lingering hold again, or `None` if the hold does not linger.
    ///
    /// It leaves the key's document alone, so that a head that polls disturbs no other operation. It changes the
    /// notification only if that still exists, and keeps a force-release in it. The key's record goes, because it is
    /// valid only in the notification that was written in the same commit.
    pub(crate) fn repeated_recall(&self) -> Option<api::Write> {
        let hold = self.record.holds.iter().find(|hold| hold.lingers.is_some())?;
        let name = self.names.notification(session_of(&hold.entry.session).ok()?, token_of(&hold.entry.token).ok()?);
        let contents = fields([
            (RECALLED_AT, timestamp(self.now)),
            ("expire_at", timestamp(self.now.saturating_add(DELETION_DELAY))),
        ]);
        Some(merge(name, contents, &["record"], WriteIf::Present))
    }

    /// Returns the notification documents. A holder's notification carries the key's record, so that its release needs
    /// no read.
    pub(super) fn notifications(&mut self) -> impl Iterator<Item = api::Write> + use<> {
        let notifications = std::mem::take(&mut self.notifications);
        let is_small = self.record.encoded_len() <= MAX_CARRIED_RECORD_BYTES && self.record.pages.is_empty();
        let record = (is_small && self.record.holds.len() == 1).then(|| bytes(self.record.to_bytes()));
        notifications.into_iter().map(move |PendingNotification { name, mut contents, may_carry_record }| {
            if let Some(record) = record.clone().filter(|_| may_carry_record) {
                contents.insert("record".to_owned(), record);
            }
            put(name, contents, WriteIf::Always)
        })
    }

    pub(super) fn delete_notification(&mut self, session: &[u8], token: &[u8]) {
        if let (Ok(session), Ok(token)) = (session_of(session), token_of(token)) {
            let name = self.names.notification(session, token);
            self.notifications.retain(|notification| notification.name != name);
            self.other_writes.push(delete(name, WriteIf::Always));
        }
    }
}
