//! The fault-free continuation of a state, for liveness.
//!
//! From every visited state one schedule is played: everything on its way is lost or delivered, then nothing is lost any
//! more. That is one schedule for each state, not a proof in temporal logic.

use crate::client::Phase;
use crate::message::Msg;
use crate::model::{Protocol, State};
use crate::mutant::Break;
use crate::store::DETACHED;

/// The key does not become free.
pub const L1: u8 = 1;
/// A live waiter is not served.
pub const L2: u8 = 2;
/// Something abandoned stays.
pub const L3: u8 = 4;
/// A holder that was forced out does not learn it.
pub const L4: u8 = 8;

/// More rounds than anything takes.
const ROUNDS: u8 = 10;

impl Protocol {
    /// A request, and at once its answer.
    fn exchange(&self, state: &mut State, msg: &Msg) {
        for answer in self.serve(state, msg) {
            if !answer.is_push() {
                self.deliver(state, &answer);
            }
        }
    }

    fn beats(&self, state: &mut State) {
        for at in 0..state.clients.len() {
            if self.rules(state.now).session(&state.clients[at]) {
                self.exchange(state, &Msg::Beat { by: at as u8, asked: state.now });
            }
        }
    }

    fn act(&self, state: &mut State, c: usize, k: usize) {
        let now = state.now;
        let rules = self.rules(now);
        let call = &mut state.clients[c].calls[k];
        match call.phase {
            Phase::Asking if now > call.not_after => call.phase = Phase::Ending,
            Phase::Asking => {
                if self.broken == Some(Break::FreshToken) {
                    call.token = (call.token & 0xf0) | ((call.token + 2) & 0xf);
                }
                let msg = self.question(call, c, now);
                self.exchange(state, &msg);
            }
            Phase::Waiting if self.broken != Some(Break::NeverAsksAgain) => {
                let msg = self.poll(state, c, k);
                self.exchange(state, &msg);
            }
            _ => {}
        }
        let client = &state.clients[c];
        let held = client.calls[k].phase == Phase::Held && rules.believes(client, &client.calls[k]);
        // A grace is over at some time, and who took up what was detached releases it.
        if held || matches!(client.calls[k].phase, Phase::Ending | Phase::Kept) {
            let msg = self.end(state, c, k);
            self.exchange(state, &msg);
        }
    }

    /// Somebody waits at the head of the queue, and asks. Nothing of what follows is lost.
    fn stranger(&self, state: &mut State) {
        for push in self.serve(state, &Msg::Ask) {
            self.deliver(state, &push);
        }
        for end in std::mem::take(&mut state.net) {
            self.exchange(state, &end);
        }
    }

    /// What is broken in the continuation of `state`.
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
        // The second step of a forced release is repeated by the one who forces.
        for msg in std::mem::take(&mut state.net) {
            if matches!(msg, Msg::Record { .. }) {
                self.exchange(&mut state, &msg);
            }
        }
        self.beats(&mut state);
        for client in &state.clients {
            let told = self.rules(state.now).session(client) || self.broken == Some(Break::TellTheDead);
            let forced = |fence: u16| state.history.forced.contains(&fence);
            let believes =
                client.calls.iter().any(|call| self.rules(state.now).believes(client, call) && forced(call.fence));
            if told && believes {
                bad |= L4;
            }
        }
        for _ in 0..ROUNDS {
            self.beats(&mut state);
            for fence in self.takeovers(&state) {
                self.serve(&mut state, &Msg::Evict { fence });
            }
            for c in 0..state.clients.len() {
                for k in 0..state.clients[c].calls.len() {
                    self.act(&mut state, c, k);
                }
            }
            if self.config.failover {
                self.stranger(&mut state);
            }
            self.tick(&mut state);
        }
        self.after(&mut state) | bad
    }

    fn after(&self, state: &mut State) -> u8 {
        let mut bad = 0;
        for client in &state.clients {
            if client.calls.iter().any(|call| matches!(call.phase, Phase::Asking | Phase::Waiting)) {
                bad |= L2;
            }
        }
        // What nobody took up is ended by the one who detached it.
        state.store.holds.retain(|hold| hold.token != DETACHED);
        self.look(state);
        if !state.store.holds.is_empty() || !state.store.queue.is_empty() {
            bad |= L3;
        }
        // Whoever comes takes the whole key.
        if !state.store.holds.is_empty() || !state.store.queue.is_empty() {
            bad |= L1;
        }
        bad
    }
}
