//! Checks liveness by continuing a state without further faults.
//!
//! Two schedules are played from each visited state: in one all messages in flight are lost, in the other they are
//! delivered. Afterwards no message is lost. This is a check of two schedules per state and not a proof in temporal
//! logic.

use crate::client::Phase;
use crate::message::Msg;
use crate::model::{Protocol, State};
use crate::mutant::Mutation;
use crate::store::DETACHED;

/// The key does not become free.
pub const L1: u8 = 1;
/// A waiter with a live session is not served.
pub const L2: u8 = 2;
/// A hold or queue entry of an abandoned call stays.
pub const L3: u8 = 4;
/// The holder of a force-released hold is not notified.
pub const L4: u8 = 8;

/// Number of rounds to play, which is more than any schedule needs.
const MAX_ROUNDS: u8 = 10;

impl Protocol {
    /// Delivers a request and its response at once.
    fn exchange(&self, state: &mut State, msg: &Msg) {
        for answer in self.serve(state, msg) {
            if !answer.is_push() {
                self.deliver(state, &answer);
            }
        }
    }

    fn renew_sessions(&self, state: &mut State) {
        for at in 0..state.clients.len() {
            if self.rules(state.now).is_session_valid(&state.clients[at]) {
                self.exchange(state, &Msg::Renew { by: at as u8, sent_at: state.now });
            }
        }
    }

    fn act(&self, state: &mut State, c: usize, k: usize) {
        let now = state.now;
        let rules = self.rules(now);
        let call = &mut state.clients[c].calls[k];
        match call.phase {
            Phase::Acquiring if now > call.not_after => call.phase = Phase::Releasing,
            Phase::Acquiring => {
                if self.broken == Some(Mutation::FreshToken) {
                    call.token = call.token - call.token % 16 + (call.token + 2) % 16;
                }
                let msg = self.acquire(call, c, now);
                self.exchange(state, &msg);
            }
            Phase::Waiting if self.broken != Some(Mutation::NeverPolls) => {
                let msg = self.poll(state, c, k);
                self.exchange(state, &msg);
            }
            _ => {}
        }
        let client = &state.clients[c];
        let held = client.calls[k].phase == Phase::Held && rules.is_hold_valid(client, &client.calls[k]);
        // A grace ends at some time, and the client that adopted a detached hold releases it.
        if held || matches!(client.calls[k].phase, Phase::Releasing | Phase::Detached) {
            let msg = self.release(state, c, k);
            self.exchange(state, &msg);
        }
    }

    /// Lets a waiter outside the model poll at the head of the queue. None of the resulting messages is lost.
    fn poll_from_outside(&self, state: &mut State) {
        for push in self.serve(state, &Msg::PollFromOutside) {
            self.deliver(state, &push);
        }
        for release in std::mem::take(&mut state.net) {
            self.exchange(state, &release);
        }
    }

    /// Returns the liveness properties that fail in the continuation of `state`.
    pub fn continuation(&self, state: &State, delivered: bool) -> u8 {
        let mut state = state.clone();
        let mut bad = 0;
        if delivered {
            for _ in 0..40 {
                let Some(at) = state.net.iter().position(|msg| !msg.is_push()) else { break };
                let msg = state.net.remove(at);
                self.deliver(&mut state, &msg);
            }
        }
        // The operator repeats the second operation of a force-release.
        for msg in std::mem::take(&mut state.net) {
            if matches!(msg, Msg::RecordForceRelease { .. }) {
                self.exchange(&mut state, &msg);
            }
        }
        self.renew_sessions(&mut state);
        for client in &state.clients {
            let is_reportable =
                self.rules(state.now).is_session_valid(client) || self.broken == Some(Mutation::ReportAfterExpiry);
            let force_released = |fence: u16| state.history.force_released.contains(&fence);
            let is_valid = client
                .calls
                .iter()
                .any(|call| self.rules(state.now).is_hold_valid(client, call) && force_released(call.fence));
            if is_reportable && is_valid {
                bad |= L4;
            }
        }
        for _ in 0..MAX_ROUNDS {
            self.renew_sessions(&mut state);
            for fence in self.expired_holds(&state) {
                self.serve(&mut state, &Msg::Expire { fence });
            }
            for c in 0..state.clients.len() {
                for k in 0..state.clients[c].calls.len() {
                    self.act(&mut state, c, k);
                }
            }
            if self.config.failover {
                self.poll_from_outside(&mut state);
            }
            self.tick(&mut state);
        }
        self.after(&mut state) | bad
    }

    fn after(&self, state: &mut State) -> u8 {
        let mut bad = 0;
        for client in &state.clients {
            if client.calls.iter().any(|call| matches!(call.phase, Phase::Acquiring | Phase::Waiting)) {
                bad |= L2;
            }
        }
        // If nobody adopts the detached hold, the client that detached it releases it.
        state.store.holds.retain(|hold| hold.token != DETACHED);
        self.inspect(state);
        if !state.store.holds.is_empty() || !state.store.queue.is_empty() {
            bad |= L3;
        }
        // The next client may request the whole key.
        if !state.store.holds.is_empty() || !state.store.queue.is_empty() {
            bad |= L1;
        }
        bad
    }
}
