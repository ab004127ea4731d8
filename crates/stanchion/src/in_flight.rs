//! Stands for a token between its first request and its guard.
//!
//! # Invariants
//! 1. From before the first request until the caller has the grant, an [`InFlightToken`] stands for the token. If it is dropped at
//!    any point, the keeper releases everything that the token got.
//! 2. A grant is valid only while the session of the request is valid, and a deadline counts from before the request whose answer
//!    stated the remaining time.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::BootTime;
use crate::command::{Cleanup, Command};
use crate::error::{Error, ErrorKind, Result};
use crate::guard::{AtRelease, Guard};
use crate::handle::Handle;
use crate::key::Key;
use crate::lease::{Hold, NewHold, SessionLease};
use crate::limits::DURATION_RANGE;
use crate::linger;
use crate::on_lost::OnLost;
use crate::shared::Shared;
use crate::store::{Granted, Lifetime, StoreTime};
use crate::token::{Token, TokenId};
use crate::waiter::Waiter;

/// Maximum time for which a request may be on its way. The time is shorter if the session or the lifetime is short.
const MAX_WINDOW: Duration = Duration::from_secs(5);

/// Returns how long a request may be on its way: less than the shortest lifetime that depends on it.
fn window(shared: &Shared, lifetime: Option<Lifetime>) -> Duration {
    let shortest = lifetime
        .and_then(Lifetime::length)
        .map_or(shared.config.session_ttl, |length| length.min(shared.config.session_ttl));
    MAX_WINDOW.min(shortest / 2)
}

/// A token between its first request and its grant (invariant 1).
pub(crate) struct InFlightToken {
    shared: Arc<Shared>,
    pub(crate) key: Key,
    pub(crate) token: TokenId,
    pub(crate) session: Arc<SessionLease>,
    pub(crate) not_after: StoreTime,
    pub(crate) waiter: Arc<Waiter>,
    /// Length of the lifetime, if the hold does not end with the session.
    fixed: Option<Duration>,
    /// Whether a request of this token that may create state has not been answered.
    pub(crate) unanswered: bool,
    /// Whether nothing is left to release, because a guard has the token or the token got nothing.
    spent: bool,
}

/// A grant, with the values that its hold is made of.
pub(crate) struct Grant {
    pub(crate) granted: Granted,
    /// Time before the request was sent whose answer stated the grant.
    pub(crate) sent_at: BootTime,
    pub(crate) session_bound: bool,
    pub(crate) heartbeat_within: Option<Duration>,
    /// Length of the part of the lifetime that the holder can use, if there is a deadline.
    pub(crate) length: Option<Duration>,
    pub(crate) on_lost: Option<OnLost>,
}

impl InFlightToken {
    pub(crate) fn new(
        shared: &Arc<Shared>,
        key: &Key,
        session: Arc<SessionLease>,
        lifetime: Option<Lifetime>,
    ) -> Result<Self> {
        let token = shared.new_token(session.id)?;
        let not_after = shared.store_time().after(window(shared, lifetime));
        let waiter = Arc::new(Waiter::new(key.clone(), matches!(lifetime, Some(Lifetime::Session { .. }))));
        shared.tokens.enter_waiting(token, waiter.clone());
        // Until the first answer has come, the request counts as unanswered.
        let unanswered = true;
        let fixed = match lifetime {
            Some(Lifetime::Fixed(ttl)) => Some(ttl),
            // An adopted hold may have any lifetime.
            None => Some(*DURATION_RANGE.end()),
            Some(Lifetime::Session { .. }) => None,
        };
        let (shared, key) = (shared.clone(), key.clone());
        Ok(Self { shared, key, token, session, not_after, waiter, fixed, unanswered, spent: false })
    }

    /// Returns the error with which the call fails. The drop of `self` schedules the cleanup of everything that the token got.
    pub(crate) fn in_doubt(&mut self, error: Error) -> Error {
        if !self.unanswered || !error.is_transient() {
            return error;
        }
        let message = format!("the outcome is not known, the library cleans up behind it: {}", error.message());
        let token = Token::new(self.key.clone(), self.token, self.session.id);
        error.restate(ErrorKind::Indeterminate, message).with_token(token)
    }

    /// Forgets the token, if no other request is on its way: the store answered that it entered nothing.
    pub(crate) fn nothing_was_created(&mut self) {
        if !self.unanswered {
            self.shared.tokens.forget(self.token);
            self.spent = true;
        }
    }

    /// Turns the grant into a guard, if the hold is still valid.
    pub(crate) fn hold(mut self, handle: &Arc<Handle>, grant: Grant, at_release: AtRelease) -> Option<Guard> {
        let now = self.shared.clock.now();
        let drift = self.shared.config.drift;
        let deadline = grant
            .granted
            .remaining
            .map(|remaining| (grant.sent_at.after(drift.shorten(remaining)), grant.length.unwrap_or(remaining)));
        let hold = Arc::new(Hold::new(NewHold {
            key: self.key.clone(),
            token: self.token,
            fence: grant.granted.fence,
            session: self.session.clone(),
            session_bound: grant.session_bound,
            since: now,
            deadline,
            heartbeat_within: grant.heartbeat_within,
            unanswered_until: self.unanswered.then_some(self.not_after),
            on_lost: grant.on_lost,
        }));
        let is_valid = || hold.ended(now).is_none() && !self.shared.is_closing();
        self.shared.tokens.grant(&hold, is_valid).then(|| {
            self.spent = true;
            if hold.look_at() != BootTime::NEVER {
                self.shared.command(Command::Watch(hold.clone()));
            }
            if self.shared.lingering.is_used() {
                linger::superseded(&self.shared, &hold);
            }
            Guard::new(handle.clone(), hold, at_release)
        })
    }
}

impl Drop for InFlightToken {
    fn drop(&mut self) {
        if self.spent || !self.shared.is_own_process() {
            return;
        }
        self.shared.clean_up(Cleanup {
            key: self.key.clone(),
            token: self.token,
            cooldown: None,
            unanswered_until: self.unanswered.then_some(self.not_after),
            session: self.fixed.is_none().then(|| self.session.clone()),
            not_before: BootTime::from_nanos(0),
            over_at: self.fixed.map_or(BootTime::NEVER, |ttl| self.shared.clock.now().after(ttl + MAX_WINDOW * 2)),
            released: None,
            spared: None,
        });
    }
}
