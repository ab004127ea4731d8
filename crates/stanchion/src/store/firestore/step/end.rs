//! What ends a hold or a place in the queue, and what moves the end.

use std::time::Duration;

use prost_types::Timestamp;

use super::super::document::{Only, micros};
use super::super::record::{Forced, Lost, SessionRecord, session_of};
use super::super::session;
use super::{Operation, in_micros};
use crate::fence::Fence;
use crate::store::{EndOutcome, ExtendOutcome, ForceReleaseOutcome, ForceReleaseRequest};
use crate::token::{SessionId, TokenId};

impl Operation<'_> {
    pub(crate) fn end(&mut self, token: TokenId, cooldown: Option<Duration>) -> EndOutcome {
        self.end_forced(token);
        if let Some(at) = self.record.holds.iter().position(|hold| hold.entry.token == token.as_bytes()) {
            let hold = self.record.holds.remove(at);
            if hold.called {
                self.end_call(&hold.entry.session, &hold.entry.token);
            }
            if let Some(cooldown) = cooldown {
                let until = self.now.saturating_add(in_micros(cooldown));
                self.record.closed_until = self.record.closed_until.max(until);
            }
            EndOutcome::Released
        } else if self.place(token).is_some() {
            self.remove_waiters(|waiter| waiter.token == token.as_bytes());
            EndOutcome::Dequeued
        } else {
            EndOutcome::Nothing
        }
    }

    /// What was forced out is told no more.
    fn end_forced(&mut self, token: TokenId) {
        let Some(at) = self.record.forced.iter().position(|forced| forced.token == token.as_bytes()) else { return };
        let forced = self.record.forced.remove(at);
        self.end_call(&forced.session, &forced.token);
        let Ok(session) = session_of(&forced.session) else { return };
        if let Some((record, written)) = self.document_of(session) {
            let mut record = record.clone();
            record.lost.retain(|lost| lost.token != forced.token);
            self.rewrite_session(session, record, *written);
        }
    }

    /// Writes a session's document without moving its end.
    pub(super) fn rewrite_session(&mut self, session: SessionId, mut record: SessionRecord, written: Timestamp) {
        let Ok(at) = micros(written) else { return };
        record.expires = record.ends(at);
        record.beaten_before = 0;
        if record.expires != 0 {
            let document = session::document(self.names, session, &record, record.expires, Only::IfStill(written));
            self.others.push(document);
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

    pub(crate) fn force_release(&mut self, request: &ForceReleaseRequest) -> ForceReleaseOutcome {
        let Some(at) = self.record.holds.iter().position(|hold| hold.fence == request.fence.get()) else {
            return ForceReleaseOutcome::NoSuchHold {
                live: self.record.holds.iter().map(|hold| Fence::new(hold.fence)).collect(),
            };
        };
        let hold = self.record.holds.remove(at);
        // Nothing is granted after the highest fence, so it need not be raised.
        self.record.last_fence = self.next_fence().unwrap_or(self.record.last_fence);
        let Ok(session) = session_of(&hold.entry.session) else { return ForceReleaseOutcome::Released };
        if self.lives(session)
            && let Some((record, written)) = self.document_of(session)
        {
            let mut record = record.clone();
            let lost = Lost {
                key: self.key.as_encoded().to_owned(),
                token: hold.entry.token.clone(),
                reason: request.reason.clone(),
            };
            record.lost.push(lost);
            self.rewrite_session(session, record, *written);
            self.record.forced.push(Forced { token: hold.entry.token.clone(), session: hold.entry.session.clone() });
            self.call(&hold.entry.session, &hold.entry.token, Some(hold.fence), Some(&request.reason));
        } else if hold.called {
            self.end_call(&hold.entry.session, &hold.entry.token);
        }
        ForceReleaseOutcome::Released
    }
}
