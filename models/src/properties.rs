//! Defines the properties that must always hold, and the events that at least one run must reach. Without these events
//! the runs would prove little.

use std::cell::RefCell;
use std::collections::BTreeSet;

use stateright::Property;

use crate::client::{Call, Phase};
use crate::config::Demand;
use crate::liveness::{L1, L2, L3, L4};
use crate::message::{Msg, Token, client_of};
use crate::model::{Protocol, State};

/// Returns all properties.
pub fn all() -> Vec<Property<Protocol>> {
    vec![
        Property::always("I1", valid_holds_fit),
        Property::always("I2", valid_hold_has_record),
        Property::always("I3", |_, state: &State| {
            fit_together(&state.store.holds.iter().map(|hold| hold.demand).collect::<Vec<_>>())
        }),
        Property::always("I4", |_, state: &State| !state.history.bad_fence),
        Property::always("I5", |_, state: &State| !state.history.bad_write),
        Property::always("I7", lost_is_final),
        Property::always("I8", |_, state: &State| !state.history.bad_token),
        Property::always("I9", expired_stays_expired),
        Property::always("I10", detached_stays),
        Property::always("I11", |_, state: &State| !state.history.bad_order),
        Property::always("L1", |model: &Protocol, state: &State| continued(model, state) & L1 == 0),
        Property::always("L2", |model: &Protocol, state: &State| continued(model, state) & L2 == 0),
        Property::always("L3", |model: &Protocol, state: &State| continued(model, state) & L3 == 0),
        Property::always("L4", |model: &Protocol, state: &State| continued(model, state) & L4 == 0),
        Property::sometimes("two calls held", |_, state: &State| calls(state).filter(|call| call.held).count() > 1),
        Property::sometimes("two valid holds", |model: &Protocol, state: &State| valid_holds(model, state).len() > 1),
        Property::sometimes("two valid holds with different capacities", |model: &Protocol, state: &State| {
            let limits =
                valid_holds(model, state).into_iter().map(|(token, _)| model.config.demand(client_of(token)).capacity);
            limits.collect::<BTreeSet<_>>().len() > 1
        }),
        Property::sometimes("a hold was lost", |_, state: &State| calls(state).any(|call| call.lost)),
        Property::sometimes("a hold was force-released", |_, state: &State| !state.history.force_released.is_empty()),
        Property::sometimes("a grant after the records were lost", |_, state: &State| {
            state.history.forgotten > 0 && state.history.issued > state.history.forgotten
        }),
        Property::sometimes("a detached hold was adopted", |model: &Protocol, state: &State| {
            model.config.adopt && calls(state).any(|call| call.held)
        }),
        Property::sometimes("a valid hold after a session expired", |model: &Protocol, state: &State| {
            state.history.expired != 0 && state.history.granted.len() > 1 && !valid_holds(model, state).is_empty()
        }),
        Property::sometimes("a push for a waiter", |_, state: &State| {
            let waits = |token: Token| calls(state).any(|call| call.token == token && call.phase == Phase::Waiting);
            state.net.iter().any(|msg| matches!(msg, Msg::PushGranted { token, .. } if waits(*token)))
        }),
        Property::sometimes("a late acquire", |_, state: &State| {
            let late = |msg: &Msg| matches!(msg, Msg::Acquire { not_after, .. } if *not_after < state.now);
            state.net.iter().any(late)
        }),
        Property::sometimes("a failover undid a release", |model: &Protocol, state: &State| {
            let held = |call: &Call| state.store.holds.iter().any(|hold| hold.token == call.token);
            model.config.failover && calls(state).any(|call| call.held && call.phase == Phase::Done && held(call))
        }),
        Property::sometimes("a detached hold while a call waited", |_, state: &State| {
            calls(state).any(|call| call.phase == Phase::Detached)
                && calls(state).any(|call| call.phase == Phase::Waiting)
        }),
        Property::sometimes("a late request to open an expired session", |_, state: &State| {
            let late = |msg: &Msg| matches!(msg, Msg::Open { by, .. } if state.history.expired & (1 << by) != 0);
            state.net.iter().any(late)
        }),
        Property::sometimes("a stale write in flight", |_, state: &State| {
            state.history.accepted > 0
                && state.net.iter().any(|msg| matches!(msg, Msg::Write { fence } if *fence < state.history.accepted))
        }),
    ]
}

fn calls(state: &State) -> impl Iterator<Item = &Call> {
    state.clients.iter().flat_map(|client| &client.calls)
}

/// Returns the tokens and fences of valid holds, without holds that were force-released or whose record the store has
/// lost.
fn valid_holds(model: &Protocol, state: &State) -> Vec<(Token, u16)> {
    let rules = model.rules(state.now);
    let mut found = Vec::new();
    for client in &state.clients {
        for call in client.calls.iter().filter(|call| rules.is_hold_valid(client, call)) {
            let excused = state.history.force_released.contains(&call.fence) || call.fence <= state.history.forgotten;
            if !excused {
                found.push((call.token, call.fence));
            }
        }
    }
    found
}

fn valid_holds_fit(model: &Protocol, state: &State) -> bool {
    let demand = |(token, _): (Token, u16)| model.config.demand(client_of(token));
    fit_together(&valid_holds(model, state).into_iter().map(demand).collect::<Vec<_>>())
}

/// Returns whether an exclusive demand is alone and no capacity is exceeded.
fn fit_together(all: &[Demand]) -> bool {
    let units: u8 = all.iter().map(|demand| demand.units).sum();
    let is_exclusive = |demand: &Demand| demand.units == demand.capacity;
    (all.len() <= 1 || !all.iter().any(is_exclusive)) && all.iter().all(|demand| units <= demand.capacity)
}

fn valid_hold_has_record(model: &Protocol, state: &State) -> bool {
    let now = state.now;
    valid_holds(model, state).into_iter().all(|(token, fence)| {
        state.store.holds.iter().any(|hold| {
            let session = state.store.sessions.get(usize::from(hold.session));
            let alive = hold.expires_at.is_none_or(|expires_at| now < expires_at)
                && (!hold.is_bound || session.is_some_and(|found| now < found.expires_at));
            hold.token == token && hold.fence == fence && alive
        })
    })
}

fn lost_is_final(model: &Protocol, state: &State) -> bool {
    let rules = model.rules(state.now);
    state.clients.iter().all(|client| client.calls.iter().all(|call| !(call.lost && rules.is_hold_valid(client, call))))
}

fn expired_stays_expired(_: &Protocol, state: &State) -> bool {
    let is_expired = |at: usize| state.history.expired & (1 << at) != 0;
    state.store.sessions.iter().enumerate().all(|(at, session)| !is_expired(at) || state.now >= session.expires_at)
}

fn detached_stays(model: &Protocol, state: &State) -> bool {
    state.clients.iter().filter(|client| model.rules(state.now).is_session_valid(client)).all(|client| {
        let mut detached =
            client.calls.iter().filter(|call| call.phase == Phase::Detached && call.fence > state.history.forgotten);
        detached.all(|call| state.store.holds.iter().any(|hold| hold.token == call.token))
    })
}

thread_local! {
    static LAST: RefCell<Option<(State, u8)>> = const { RefCell::new(None) };
}

/// Returns the failed liveness properties of a state, cached for the other properties of the same state.
fn continued(model: &Protocol, state: &State) -> u8 {
    LAST.with_borrow_mut(|last| {
        if let Some((seen, bad)) = last
            && seen == state
        {
            return *bad;
        }
        let bad = model.continuation(state, false) | model.continuation(state, true);
        *last = Some((state.clone(), bad));
        bad
    })
}
