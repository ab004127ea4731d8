//! Applies release, extend, linger and force-release to a key.

use std::time::Duration;

use prost_types::Timestamp;

use super::super::document::{WriteIf, micros};
use super::super::record::{SessionRecord, StoredForceRelease, StoredLoss, session_of};
use super::super::session;
use super::{KeyUpdate, in_micros};
use crate::fence::Fence;
use crate::store::{EndOutcome, ExtendOutcome, ForceReleaseOutcome, ForceReleaseRequest, LingerOutcome};
use crate::token::{SessionId, TokenId};

impl KeyUpdate<'_> {
    pub(crate) fn release(&mut self, token: TokenId, cooldown: Option<Duration>) -> EndOutcome {
        self.clear_force_release(token);
        if let Some(at) = self.record.holds.iter().position(|hold| hold.entry.token == token.as_bytes()) {
            let hold = self.record.holds.remove(at);
            if hold.has_notification {
                self.delete_notification(&hold.entry.session, &hold.entry.token);
            }
            if let Some(cooldown) = cooldown {
                let until = self.now.saturating_add(in_micros(cooldown));
                self.record.closed_until = self.record.closed_until.max(until);
            }
            EndOutcome::Released
        } else if self.queue_position(token).is_some() {
            self.remove_waiters(|waiter| waiter.token == token.as_bytes());
            EndOutcome::Dequeued
        } else {
            EndOutcome::Nothing
        }
    }

    /// Removes the traces of a force-released token from the key, the session and the notifications.
    fn clear_force_release(&mut self, token: TokenId) {
        let Some(at) = self.record.force_released.iter().position(|released| released.token == token.as_bytes()) else {
            return;
        };
        let released = self.record.force_released.remove(at);
        self.delete_notification(&released.session, &released.token);
        let Ok(session) = session_of(&released.session) else { return };
        if let Some((record, written)) = self.document_of(session) {
            let mut record = record.clone();
            record.lost.retain(|lost| lost.token != released.token);
            self.rewrite_session(session, record, *written);
        }
    }

    /// Writes a session's document without changing its expiry.
    pub(super) fn rewrite_session(&mut self, session: SessionId, mut record: SessionRecord, written: Timestamp) {
        let Ok(at) = micros(written) else { return };
        record.fixed_expiry = record.expires_at(at);
        record.renewed_before = 0;
        if record.fixed_expiry != 0 {
            let document =
                session::document(self.names, session, &record, record.fixed_expiry, WriteIf::Unchanged(written));
            self.other_writes.push(document);
        }
    }

    pub(crate) fn extend(&mut self, token: TokenId, ttl: Duration) -> ExtendOutcome {
        let deadline = self.now.saturating_add(in_micros(ttl));
        let hold =
            self.record.holds.iter_mut().find(|hold| hold.entry.token == token.as_bytes() && hold.deadline.is_some());
        match hold {
            Some(hold) => {
                hold.deadline = Some(deadline);
                ExtendOutcome::Extended
            }
            None => ExtendOutcome::NotHeld,
        }
    }

    /// Marks a hold as lingering. The commit time becomes the last fence, unless that is higher already: the answer
    /// names the last fence before the commit.
    pub(crate) fn linger(&mut self, token: TokenId, hears_recalls: bool) -> LingerOutcome {
        let is_wanted = !self.record.front.is_empty();
        let Some(hold) = self.record.holds.iter_mut().find(|hold| hold.entry.token == token.as_bytes()) else {
            return LingerOutcome::Gone;
        };
        let can_linger =
            hold.entry.demand().is_exclusive() && hold.entry.session_bound && hold.deadline.is_none() && hears_recalls;
        if is_wanted || !can_linger {
            return LingerOutcome::Wanted;
        }
        hold.lingers = Some(0);
        let fence = Fence::new(hold.fence);
        // The holder knows its grant, and a waiter that it was notified of is gone. The next waiter notifies it again.
        if std::mem::take(&mut hold.has_notification) {
            hold.granted_from_queue = false;
            let (session, token) = (hold.entry.session.clone(), hold.entry.token.clone());
            self.delete_notification(&session, &token);
        }
        LingerOutcome::Lingers { fence, up_to: Fence::new(self.record.last_fence) }
    }

    pub(crate) fn force_release(&mut self, request: &ForceReleaseRequest) -> ForceReleaseOutcome {
        let Some(at) = self.record.holds.iter().position(|hold| hold.fence == request.fence.get()) else {
            return ForceReleaseOutcome::NoSuchHold {
                live: self.record.holds.iter().map(|hold| Fence::new(hold.fence)).collect(),
            };
        };
        let hold = self.record.holds.remove(at);
        // No grant can follow the highest fence, so it need not be raised.
        self.record.last_fence = self.next_fence().unwrap_or(self.record.last_fence);
        let Ok(session) = session_of(&hold.entry.session) else { return ForceReleaseOutcome::Released };
        if self.is_alive(session)
            && let Some((record, written)) = self.document_of(session)
        {
            let mut record = record.clone();
            let lost = StoredLoss {
                key: self.key.as_encoded().to_owned(),
                token: hold.entry.token.clone(),
                reason: request.reason.clone(),
            };
            record.lost.push(lost);
            self.rewrite_session(session, record, *written);
            self.record
                .force_released
                .push(StoredForceRelease { token: hold.entry.token.clone(), session: hold.entry.session.clone() });
            self.notify(&hold.entry.session, &hold.entry.token, Some(hold.fence), Some(&request.reason));
        } else if hold.has_notification {
            self.delete_notification(&hold.entry.session, &hold.entry.token);
        }
        ForceReleaseOutcome::Released
    }
}
