//! Releases and extends a hold by its token, without adopting it.

use std::time::Duration;

use crate::error::{Error, ErrorKind, LossCause, Result};
use crate::guard::Released;
use crate::limits::check_duration;
use crate::linger;
use crate::shared::Shared;
use crate::store::{EndOutcome, ExtendOutcome, PollOutcome};
use crate::token::Token;
use crate::tokens::TokenState;

/// Releases the hold of a token.
pub(crate) async fn release(shared: &Shared, token: &Token, cooldown: Option<Duration>) -> Result<Released> {
    let (key, id) = (token.key(), token.id());
    let name = |error: Error| error.with_key(key).with_store(shared.capabilities.name);
    if let Some(closed) = cooldown {
        check_duration("the cooldown", closed).map_err(name)?;
    }
    shared.check_process().map_err(name)?;
    let step = shared.step(|| shared.store.release(key, id, cooldown)).await;
    let outcome = step.result.map_err(name)?.outcome;
    shared.tokens.forget_detached(id);
    match shared.tokens.get(id) {
        // A guard of this handle has the hold. Guards of other handles find out when their keeper verifies the hold.
        Some(TokenState::Held(hold)) => shared.lose(&hold, LossCause::Missing, None),
        Some(TokenState::Lingering(hold)) => linger::forget(shared, &hold),
        _ => {}
    }
    Ok(match outcome {
        EndOutcome::Released => Released::Now,
        // The answer to an earlier attempt was lost, and that attempt released the hold.
        EndOutcome::Nothing if step.unanswered => Released::Now,
        EndOutcome::Nothing | EndOutcome::Dequeued => Released::AlreadyLost,
    })
}

/// Sets the remaining time of a token's hold.
pub(crate) async fn extend(shared: &Shared, token: &Token, ttl: Duration) -> Result<()> {
    let (key, id) = (token.key(), token.id());
    let name = |error: Error| error.with_key(key).with_store(shared.capabilities.name);
    check_duration("the new ttl", ttl).map_err(name)?;
    shared.check_process().map_err(name)?;
    if shared.tokens.hold(id).is_some() {
        let message = "a guard of this handle has the hold: extend it with Guard::extend";
        return Err(name(Error::new(ErrorKind::InvalidArgument, message)));
    }
    let in_store = shared.config.drift.lengthen(ttl);
    let step = shared.step(|| {
        // A token that is forgotten too early would be taken for one that must be cleaned up.
        shared.tokens.detached_may_last_until(id, shared.clock.now().after(in_store));
        shared.store.extend(key, id, in_store)
    });
    match step.await.result.map_err(name)?.outcome {
        ExtendOutcome::Extended => Ok(()),
        ExtendOutcome::NotHeld => {
            let polled = shared.step(|| shared.poll(key, id)).await.result.map_err(name)?.outcome;
            Err(name(match polled {
                PollOutcome::Granted(_) => Error::new(
                    ErrorKind::InvalidArgument,
                    "this hold lasts as long as its session and has no deadline to extend; request it with a ttl",
                ),
                PollOutcome::Queued(_) | PollOutcome::Gone => Error::lost(LossCause::Missing),
            }))
        }
    }
}
