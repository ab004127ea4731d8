//! Finds out whether a hold and the process that made it still exist.

use crate::error::Result;
use crate::shared::Shared;
use crate::store::{HolderState, PollOutcome};
use crate::token::Token;

/// The status of a hold and of the process that made it, as [`Locks::status`](crate::Locks::status) returns it.
///
/// It describes the moment of the query. A hold that ended stays ended, so only `Running` and `Waiting` can change
/// afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OwnerStatus {
    /// The hold is held, and the session that made it lives.
    Running,
    /// The request waits for the key.
    Waiting,
    /// The hold is over, and others hold the key.
    #[non_exhaustive]
    SomeoneElse {
        /// The current holders.
        holders: Vec<HolderState>,
    },
    /// The hold is over, and nobody holds the key.
    Nobody,
    /// The session that made the hold has ended, and nobody else holds the key. A fixed lifetime may still be running,
    /// without a process behind it.
    Dead,
}

pub(crate) async fn status(shared: &Shared, token: &Token) -> Result<OwnerStatus> {
    shared.check_process()?;
    let key = token.key();
    // The queries are not one snapshot. This is safe because each later query is about something that cannot come back:
    // a token that is over, a session that ended.
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
