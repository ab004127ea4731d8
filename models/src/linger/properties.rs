//! Defines the properties that must always hold, and the events that at least one run must reach. Without these events
//! the runs would prove little.

use std::cell::RefCell;

use stateright::Property;

use crate::linger::client::{LocalHold, Origin};
use crate::linger::liveness::{L1, L2};
use crate::linger::model::{Lingering, State};
use crate::message::{Msg, Token, client_of};
use crate::mutant::Mutation;

/// Returns all properties.
pub fn all() -> Vec<Property<Lingering>> {
    vec![
        Property::always("K1", |model: &Lingering, state: &State| valid_guards(model, state).len() <= 1),
        Property::always("K2", guards_have_records),
        Property::always("K3", |_, state: &State| !state.history.bad_fence && !state.local.bad_fence),
        Property::always("K4", |_, state: &State| holds(state).all(|hold| hold.in_use || !hold.was_recalled)),
        Property::always("K5", |_, state: &State| !state.local.bad_local),
        Property::always("K6", |_, state: &State| !state.local.bad_order),
        Property::always("K7", |_, state: &State| {
            state.clients.iter().all(|client| {
                let in_use = client.hold.as_ref().is_some_and(|hold| hold.in_use);
                !client.is_expired || !in_use && client.guards.is_empty()
            })
        }),
        Property::always("K8", |_, state: &State| !state.local.bad_delay),
        Property::always("K9", |_, state: &State| !state.local.bad_loss),
        Property::always("K10", |_, state: &State| !state.local.bad_age),
        Property::always("K11", |_, state: &State| !state.local.bad_turn),
        Property::always("L1", |model: &Lingering, state: &State| continued(model, state) & L1 == 0),
        Property::always("L2", |model: &Lingering, state: &State| continued(model, state) & L2 == 0),
        Property::sometimes("a recall of an idle hold", |_, state: &State| {
            let is_idle = |token| holds(state).any(|hold| hold.token == token && !hold.in_use);
            state.net.iter().any(|msg| matches!(msg, Msg::PushRecall { token } if is_idle(*token)))
        }),
        Property::sometimes("a recall of a hold in use", |_, state: &State| {
            holds(state).any(|hold| hold.in_use && hold.was_recalled)
        }),
        Property::sometimes("a local grant", |_, state: &State| has_origin(state, Origin::Local)),
        Property::sometimes("a local grant after a recall", |_, state: &State| has_origin(state, Origin::AfterRecall)),
        Property::sometimes("a local grant under a hold that is gone", |_, state: &State| {
            has_origin(state, Origin::WithoutRecord)
        }),
        Property::sometimes("a local grant after another grant", |_, state: &State| {
            has_origin(state, Origin::AfterAnotherGrant)
        }),
        Property::sometimes("grants of two clients", |_, state: &State| state.local.holders.count_ones() > 1),
        Property::sometimes("an asker with a waiting call", |_, state: &State| {
            let has_asker = |client: &crate::linger::client::Client| client.has_asker() && !client.waiting.is_empty();
            state.clients.iter().any(has_asker)
        }),
        Property::sometimes("a plain guard while a hold is kept", |_, state: &State| {
            state.clients.iter().any(|client| client.hold.is_some() && !client.guards.is_empty())
        }),
        Property::sometimes("a guard of an attempt that recalled", |_, state: &State| {
            let has_guard = state.clients.iter().flat_map(|client| &client.guards);
            has_origin(state, Origin::Attempt) || has_guard.into_iter().any(|guard| guard.origin == Origin::Attempt)
        }),
        Property::sometimes("a lease that ends before the promise", |model: &Lingering, state: &State| {
            let linger = model.config.linger;
            holds(state).any(|hold| {
                let is_promised = hold.recalled_at.is_some_and(|at| state.now < at + linger);
                is_promised && hold.leased_at.is_some_and(|at| state.now >= at + linger)
            })
        }),
        Property::sometimes("a failover that undid a force-release", |_, state: &State| {
            let force_released = |fence: u16| state.history.force_released.contains(&fence);
            state.store.holds.iter().any(|hold| force_released(hold.fence))
        }),
    ]
}

fn holds(state: &State) -> impl Iterator<Item = &LocalHold> {
    state.clients.iter().filter_map(|client| client.hold.as_ref())
}

fn has_origin(state: &State, origin: Origin) -> bool {
    holds(state).any(|hold| hold.in_use && hold.origin == origin)
}

/// Returns the tokens and fences of valid guards, without guards whose hold was force-released or forgotten by the store.
/// The fence is that of the store's grant.
fn valid_guards(model: &Lingering, state: &State) -> Vec<(Token, u16)> {
    let mut found = Vec::new();
    for (c, client) in state.clients.iter().enumerate() {
        if !model.is_session_valid(state, c) && !model.broken(Mutation::LocalWithoutSession) {
            continue;
        }
        found.extend(client.hold.iter().filter(|hold| hold.in_use).map(|hold| (hold.token, hold.granted)));
        found.extend(client.guards.iter().map(|guard| (guard.token, guard.fence)));
    }
    let is_excused = |fence: u16| {
        // The client of this mutant knows that its hold is gone.
        let is_ignored = model.broken(Mutation::GoneIgnored) && knows_gone(state, fence);
        let was_lost = state.history.force_released.contains(&fence) || state.local.forgotten.contains(&fence);
        was_lost && !is_ignored
    };
    found.retain(|(_, fence)| !is_excused(*fence));
    found
}

/// Returns whether the store has answered that the hold with this fence is gone.
fn knows_gone(state: &State, fence: u16) -> bool {
    let in_flight = |msg: &Msg| matches!(msg, Msg::Linger { .. } | Msg::Lingered { .. });
    let has_answer = |client: &crate::linger::client::Client| {
        let is_answered = |hold: &LocalHold| hold.granted == fence && !hold.is_asking && hold.leased_at.is_none();
        client.sent[crate::linger::client::ASKS] > 0 && client.hold.as_ref().is_some_and(is_answered)
    };
    state.clients.iter().any(has_answer) && !state.net.iter().any(in_flight)
}

fn guards_have_records(model: &Lingering, state: &State) -> bool {
    valid_guards(model, state).into_iter().all(|(token, fence)| {
        let session = &state.store.sessions[usize::from(client_of(token))];
        let is_alive = state.now < session.expires_at;
        is_alive && state.store.holds.iter().any(|hold| hold.token == token && hold.fence == fence)
    })
}

thread_local! {
    static LAST: RefCell<Option<(State, u8)>> = const { RefCell::new(None) };
}

/// Returns the failed liveness properties of a state, cached for the other property of the same state.
fn continued(model: &Lingering, state: &State) -> u8 {
    LAST.with_borrow_mut(|last| {
        if let Some((seen, bad)) = last
            && seen == state
        {
            return *bad;
        }
        let bad = model.continuation(state);
        *last = Some((state.clone(), bad));
        bad
    })
}
