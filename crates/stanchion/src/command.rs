//! The commands that a handle sends to its keeper.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::BootTime;
use crate::error::LossCause;
use crate::fence::Fence;
use crate::key::Key;
use crate::lease::{Hold, SessionLease};
use crate::store::{GrantStream, StoreTime};
use crate::token::TokenId;

/// A request of a handle to its keeper.
#[derive(Debug)]
pub(crate) enum Command {
    /// Release a token until it is certain that the token can no longer hold anything.
    Cleanup(Cleanup),
    /// Watch the deadlines of a hold.
    Watch(Arc<Hold>),
    /// Check that the store still has a hold.
    Verify(HoldCheck),
    /// Check every hold, because the store may have forgotten grants.
    VerifyAll,
    /// Check the next few holds, because the session was renewed.
    VerifyNext,
    /// Send a request to linger for a hold.
    Linger(Arc<Hold>),
    /// Query the store for the detached tokens, and forget those it does not have any more.
    QueryDetached,
    /// Listen to the pushes of a session.
    Listen(GrantStream),
    /// Release everything, close the session and stop.
    Close,
}

/// A hold that the keeper checks in the store.
#[derive(Debug)]
pub(crate) struct HoldCheck {
    pub(crate) hold: Arc<Hold>,
    /// The cause of the loss, if the store does not have the hold.
    pub(crate) cause: LossCause,
    pub(crate) reason: Option<String>,
}

impl HoldCheck {
    pub(crate) fn new(hold: Arc<Hold>) -> Self {
        Self { hold, cause: LossCause::Missing, reason: None }
    }
}

/// A token that the keeper releases until it is certain that the token can no longer hold anything.
#[derive(Debug)]
pub(crate) struct Cleanup {
    pub(crate) key: Key,
    pub(crate) token: TokenId,
    pub(crate) cooldown: Option<Duration>,
    /// Store time until which a request of the token may still arrive: only an answer after this time is definite.
    pub(crate) unanswered_until: Option<StoreTime>,
    /// The session that the token depends on: once the session is over, nothing is left to release.
    pub(crate) session: Option<Arc<SessionLease>>,
    /// Time until which the key stays held, so that its holder can stop.
    pub(crate) not_before: BootTime,
    /// Time after which nothing of the token can be left, because its lifetime is over.
    pub(crate) over_at: BootTime,
    /// Fence and start of the hold, if the release of a hold is to be reported.
    pub(crate) released: Option<(Fence, BootTime)>,
    /// The fence of a hold of the token that must stay.
    pub(crate) spared: Option<Fence>,
}

impl Cleanup {
    /// Returns whether nothing of the token can be left.
    pub(crate) fn is_over(&self, now: BootTime) -> bool {
        now >= self.over_at || self.session.as_ref().is_some_and(|session| session.over().is_cancelled())
    }

    /// Returns whether something of the token outlives its session.
    pub(crate) fn stays(&self) -> bool {
        self.session.is_none() || self.cooldown.is_some()
    }

    /// Returns the cleanup of a token of which this process knows only the name.
    pub(crate) fn of_token(key: Key, token: TokenId) -> Self {
        Self {
            key,
            token,
            cooldown: None,
            unanswered_until: None,
            session: None,
            not_before: BootTime::from_nanos(0),
            over_at: BootTime::NEVER,
            released: None,
            spared: None,
        }
    }

    pub(crate) fn of_hold(hold: &Hold, cooldown: Option<Duration>) -> Self {
        Self {
            key: hold.key.clone(),
            token: hold.token,
            cooldown,
            unanswered_until: hold.unanswered_until,
            session: hold.session_bound.then(|| hold.session.clone()),
            not_before: BootTime::from_nanos(0),
            over_at: hold.over_at(),
            released: None,
            spared: None,
        }
    }
}
