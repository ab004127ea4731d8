//! What must always be so, and what must happen in some run, or the runs prove little.

use std::cell::RefCell;
use std::collections::BTreeSet;

use stateright::Property;

use crate::client::{Call, Phase};
use crate::config::Demand;
use crate::message::Msg;
use crate::model::{Protocol, State};
use crate::settle::{L1, L2, L3, L4};

/// All properties.
pub fn all() -> Vec<Property<Protocol>> {
    vec![
        Property::always("I1", believers_fit),
        Property::always("I2", belief_has_record),
        Property::always("I3", |_, state: &State| {
            fit_together(&state.store.holds.iter().map(|hold| hold.demand).collect::<Vec<_>>())
        }),
        Property::always("I4", |_, state: &State| !state.history.bad_fence),
        Property::always("I5", |_, state: &State| !state.history.bad_write),
        Property::always("I7", lost_is_final),
        Property::always("I8", |_, state: &State| !state.history.bad_token),
        Property::always("I9", dead_stays_dead),
        Property::always("I10", kept_stays),
        Property::always("I11", |_, state: &State| !state.history.bad_order),
        Property::always("L1", |model: &Protocol, state: &State| continued(model, state) & L1 == 0),
        Property::always("L2", |model: &Protocol, state: &State| continued(model, state) & L2 == 0),
        Property::always("L3", |model: &Protocol, state: &State| continued(model, state) & L3 == 0),
        Property::always("L4", |model: &Protocol, state: &State| continued(model, state) & L4 == 0),
        Property::sometimes("two calls held", |_, state: &State| calls(state).filter(|call| call.held).count() > 1),
        Property::sometimes("two believe", |model: &Protocol, state: &State| believed(model, state).len() > 1),
        Property::sometimes("one believes with another limit than another", |model: &Protocol, state: &State| {
            let limits = believed(model, state).into_iter().map(|(token, _)| model.config.demand(token / 16).capacity);
            limits.collect::<BTreeSet<_>>().len() > 1
        }),
        Property::sometimes("a hold was lost", |_, state: &State| calls(state).any(|call| call.lost)),
        Property::sometimes("a hold was forced out", |_, state: &State| !state.history.forced.is_empty()),
        Property::sometimes("a grant after the loss of records", |_, state: &State| {
            state.history.forgotten > 0 && state.history.issued > state.history.forgotten
        }),
        Property::sometimes("a detached hold was taken up", |model: &Protocol, state: &State| {
            model.config.adopt && calls(state).any(|call| call.held)
        }),
        Property::sometimes("a believer after a session died", |model: &Protocol, state: &State| {
            state.history.dead != 0 && state.history.granted.len() > 1 && !believed(model, state).is_empty()
        }),
        Property::sometimes("a push for a waiter", |_, state: &State| {
            let waits = |token: u8| calls(state).any(|call| call.token == token && call.phase == Phase::Waiting);
            state.net.iter().any(|msg| matches!(msg, Msg::PushGranted { token, .. } if waits(*token)))
        }),
        Property::sometimes("a late question", |_, state: &State| {
            let late = |msg: &Msg| matches!(msg, Msg::Acquire { not_after, .. } if *not_after < state.now);
            state.net.iter().any(late)
        }),
        Property::sometimes("a release was forgotten", |model: &Protocol, state: &State| {
            let held = |call: &Call| state.store.holds.iter().any(|hold| hold.token == call.token);
            model.config.failover && calls(state).any(|call| call.held && call.phase == Phase::Done && held(call))
        }),
        Property::sometimes("a hold was kept while another waited", |_, state: &State| {
            calls(state).any(|call| call.phase == Phase::Kept) && calls(state).any(|call| call.phase == Phase::Waiting)
        }),
        Property::sometimes("a late question for a session that has ended", |_, state: &State| {
            let late = |msg: &Msg| matches!(msg, Msg::Open { by, .. } if state.history.dead & (1 << by) != 0);
            state.net.iter().any(late)
        }),
        Property::sometimes("a stale write on its way", |_, state: &State| {
            state.history.accepted > 0
                && state.net.iter().any(|msg| matches!(msg, Msg::Write { fence } if *fence < state.history.accepted))
        }),
    ]
}

fn calls(state: &State) -> impl Iterator<Item = &Call> {
    state.clients.iter().flat_map(|client| &client.calls)
}

/// Fences of believers, without those that were forced out or forgotten by the store.
fn believed(model: &Protocol, state: &State) -> Vec<(u8, u16)> {
    let rules = model.rules(state.now);
    let mut found = Vec::new();
    for client in &state.clients {
        for call in client.calls.iter().filter(|call| rules.believes(client, call)) {
            let excused = state.history.forced.contains(&call.fence) || call.fence <= state.history.forgotten;
            if !excused {
                found.push((call.token, call.fence));
            }
        }
    }
    found
}

fn believers_fit(model: &Protocol, state: &State) -> bool {
    let demand = |(token, _): (u8, u16)| model.config.demand(token / 16);
    fit_together(&believed(model, state).into_iter().map(demand).collect::<Vec<_>>())
}

/// Who takes all is alone, and nobody's limit is exceeded.
fn fit_together(all: &[Demand]) -> bool {
    let units: u8 = all.iter().map(|one| one.units).sum();
    let is_exclusive = |one: &Demand| one.units == one.capacity;
    (all.len() <= 1 || !all.iter().any(is_exclusive)) && all.iter().all(|one| units <= one.capacity)
}

fn belief_has_record(model: &Protocol, state: &State) -> bool {
    let now = state.now;
    believed(model, state).into_iter().all(|(token, fence)| {
        state.store.holds.iter().any(|hold| {
            let session = state.store.sessions.get(usize::from(hold.session));
            let alive = hold.expires.is_none_or(|expires| now < expires)
                && (!hold.is_bound || session.is_some_and(|found| now < found.expires));
            hold.token == token && hold.fence == fence && alive
        })
    })
}

fn lost_is_final(model: &Protocol, state: &State) -> bool {
    let rules = model.rules(state.now);
    state.clients.iter().all(|client| client.calls.iter().all(|call| !(call.lost && rules.believes(client, call))))
}

fn dead_stays_dead(_: &Protocol, state: &State) -> bool {
    let dead = |at: usize| state.history.dead & (1 << at) != 0;
    state.store.sessions.iter().enumerate().all(|(at, session)| !dead(at) || state.now >= session.expires)
}

fn kept_stays(model: &Protocol, state: &State) -> bool {
    state.clients.iter().filter(|client| model.rules(state.now).session(client)).all(|client| {
        let kept = client.calls.iter().filter(|call| call.phase == Phase::Kept && call.fence > state.history.forgotten);
        kept.into_iter().all(|call| state.store.holds.iter().any(|hold| hold.token == call.token))
    })
}

thread_local! {
    static LAST: RefCell<Option<(State, u8)>> = const { RefCell::new(None) };
}

/// The continuation's result, kept for the properties that ask for the same state.
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
