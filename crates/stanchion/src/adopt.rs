//! Takes over a detached hold.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, LossCause, Result};
use crate::guard::{AtRelease, Guard};
use crate::handle::Handle;
use crate::in_flight::{Grant, InFlightToken};
use crate::store::{AdoptOutcome, AdoptRequest};
use crate::token::Token;

/// Adopts a detached hold.
pub(crate) async fn adopt(handle: &Arc<Handle>, token: Token) -> Result<Guard> {
    let shared = &handle.shared;
    let key = token.key();
    let name = |error: Error| error.with_key(key).with_store(shared.capabilities.name);
    shared.check_process().map_err(name)?;
    let session = tokio::select! {
        biased;
        () = shared.draining() => Err(shared.draining_error()),
        session = shared.valid_session() => session,
    };
    let session = session.map_err(name)?;
    let mut in_flight = InFlightToken::new(shared, key, session, None)?;
    let request = AdoptRequest {
        key: key.clone(),
        from: token.id(),
        to: in_flight.token,
        session: in_flight.session.id,
        not_after: in_flight.not_after,
    };
    let mut sent_at = shared.clock.now();
    let step = shared.step(|| {
        sent_at = shared.clock.now();
        shared.store.adopt(request.clone())
    });
    let step = step.await;
    in_flight.unanswered = step.unanswered;
    match step.result.map_err(|error| name(in_flight.in_doubt(error)))?.outcome {
        AdoptOutcome::Adopted { granted, session_bound } => {
            shared.tokens.forget_detached(token.id());
            let grant = Grant {
                granted,
                sent_at,
                session_bound,
                heartbeat_within: None,
                length: granted.remaining.map(|remaining| shared.config.drift.usable(remaining)),
                on_lost: None,
            };
            in_flight.hold(handle, grant, AtRelease::default()).ok_or_else(|| {
                let too_late =
                    || Error::new(ErrorKind::Lost(LossCause::TtlExpired), "taken up with too little time left");
                name(if shared.is_closing() { shared.draining_error() } else { too_late() })
            })
        }
        AdoptOutcome::Gone => {
            in_flight.nothing_was_created();
            Err(name(Error::new(ErrorKind::Lost(LossCause::Missing), "there is no such hold any more")))
        }
        AdoptOutcome::Stale | AdoptOutcome::SessionGone => {
            Err(name(Error::new(ErrorKind::Unavailable, "the hold could not be taken up in time; try again")))
        }
    }
}
