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
    /// End a token.
    Cleanup(Cleanup),
    /// Look at a hold's own deadlines.
    Watch(Arc<Hold>),
    /// Ask the store whether a hold is still there.
    Verify(HoldCheck),
    /// The store may have forgotten something: ask it for every hold.
    VerifyAll,
    /// The session was renewed: ask the store for the next few holds.
    VerifyNext,
    /// Ask the store which of the tokens that must stay it still has.
    QueryDetached,
    /// Listen to the pushes of a session.
    Listen(GrantStream),
    /// Release everything, end the session and stop.
    Close,
}

/// A hold that the store is asked for.
#[derive(Debug)]
pub(crate) struct HoldCheck {
    pub(crate) hold: Arc<Hold>,
    /// Why it is lost, if it is.
    pub(crate) cause: LossCause,
    pub(crate) reason: Option<String>,
}

impl HoldCheck {
    pub(crate) fn new(hold: Arc<Hold>) -> Self {
        Self { hold, cause: LossCause::Missing, reason: None }
    }
}

/// A token to be ended in the store, until that is definite.
#[derive(Debug)]
pub(crate) struct Cleanup {
    pub(crate) key: Key,
    pub(crate) token: TokenId,
    pub(crate) cooldown: Option<Duration>,
    /// A request of the token may still be on its way: an answer counts only after this time of the store.
    pub(crate) unanswered_until: Option<StoreTime>,
    /// The session that the token depends on: once that is over, nothing is left to end.
    pub(crate) session: Option<Arc<SessionLease>>,
    /// The key stays taken until then, for its holder to stop.
    pub(crate) not_before: BootTime,
    /// When nothing of the token can be left, because its lifetime has run out.
    pub(crate) over_at: BootTime,
    /// The hold, if it was one: told as released when done.
    pub(crate) released: Option<(Fence, BootTime)>,
    /// The hold of the token that has this fence stays.
    pub(crate) spared: Option<Fence>,
}

impl Cleanup {
    /// Whether nothing of the token can be left.
    pub(crate) fn is_over(&self, now: BootTime) -> bool {
        now >= self.over_at || self.session.as_ref().is_some_and(|session| session.over().is_cancelled())
    }

    /// Whether something of it outlives its session.
    pub(crate) fn stays(&self) -> bool {
        self.session.is_none() || self.cooldown.is_some()
    }

    /// Of a token of which this process knows nothing but its name.
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
