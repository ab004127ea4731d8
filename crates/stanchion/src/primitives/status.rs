//! What has become of a hold and of its process.

use crate::error::Result;
use crate::locks::Locks;
use crate::store::{HolderState, PollOutcome};
use crate::token::Token;

/// What has become of a hold: the answer to [`Locks::status`].
///
/// About the past, like all that is read; but what has ended stays ended, so nothing else than `Running` and `Waiting` can
/// turn into less than it says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OwnerStatus {
    /// It is held, and the session that it was made in lives.
    Running,
    /// It waits for the key.
    Waiting,
    /// It is over, and these hold the key.
    SomeoneElse {
        /// Who.
        holders: Vec<HolderState>,
    },
    /// It is over, and nobody holds the key.
    Nobody,
    /// The session that it was made in is dead, and nobody else holds the key. A fixed lifetime may still run, with nobody behind
    /// it.
    Dead,
}

pub(crate) async fn status(locks: &Locks, token: &Token) -> Result<OwnerStatus> {
    let shared = &locks.handle.shared;
    shared.check_process()?;
    let key = token.key();
    // Each question after the first is about what cannot come back: a token that is over, a session that is dead.
    let polled = shared.step(|| shared.poll(key, token.id())).await.result;
    let polled = polled.map_err(|error| error.with_key(key))?.outcome;
    if matches!(polled, PollOutcome::Queued(_)) {
        return Ok(OwnerStatus::Waiting);
    }
    let lives = shared.step(|| shared.store.session_lives(token.session())).await.result;
    let lives = lives.map_err(|error| error.with_key(key))?.outcome;
    if matches!(polled, PollOutcome::Granted(_)) {
        return Ok(if lives { OwnerStatus::Running } else { OwnerStatus::Dead });
    }
    let state = shared.step(|| shared.store.inspect(key)).await.result;
    let holders = state.map_err(|error| error.with_key(key))?.outcome.holders;
    Ok(match (holders.is_empty(), lives) {
        (false, _) => OwnerStatus::SomeoneElse { holders },
        (true, true) => OwnerStatus::Nobody,
        (true, false) => OwnerStatus::Dead,
    })
}
