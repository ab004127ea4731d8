//! Checks liveness by continuing a state without further faults.
//!
//! Two schedules are played from each visited state. In the first one all messages in flight are lost, no push ever
//! arrives, and every client has a new call as soon as an earlier one is served. In the second one everything arrives. This
//! is a check of two schedules per state and not a proof in temporal logic.

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use crate::config::Lifetime;
use crate::history::History;
use crate::linger::client::{Client, Kind};
use crate::linger::history::LocalHistory;
use crate::linger::model::{Lingering, State};
use crate::message::{Msg, Token};

/// A call that has asked is not served.
pub const L1: u8 = 1;
/// A hold or a queue entry stays in the store.
pub const L2: u8 = 2;

/// Number of messages after which a schedule stops delivering.
const MAX_MESSAGES: usize = 200;

/// Number of times in a round that a client uses the key and lets the next call use it.
const USES: usize = 3;

/// Number of continuations that a thread remembers.
const MAX_KNOWN: usize = 4_000_000;

/// A way to continue a state.
#[derive(Clone, Copy, Debug, Hash)]
struct Schedule {
    /// Whether the messages in flight arrive.
    delivers: bool,
    /// Whether pushes arrive.
    pushes: bool,
    /// Whether the clients have new calls all the time.
    is_greedy: bool,
}

impl Lingering {
    /// Delivers all messages in flight.
    fn flush(&self, state: &mut State, schedule: Schedule) {
        for _ in 0..MAX_MESSAGES {
            if state.net.is_empty() {
                return;
            }
            let msg = state.net.remove(0);
            if !msg.is_push() || schedule.pushes {
                self.deliver(state, &msg);
            }
        }
    }

    fn take_turns(&self, state: &mut State, c: usize) {
        while !state.clients[c].turns.is_empty() {
            self.take_turn(state, c, 0);
        }
    }

    /// Repeats the request of a call.
    fn request_again(&self, state: &mut State, c: usize, token: Token) {
        let Some(at) = state.clients[c].request_of(token) else { return };
        let request = &state.clients[c].requests[at];
        let (by, not_after, lifetime) = (c as u8, state.now, Lifetime::Session);
        if request.is_attempt {
            return self.end_request(state, c, at);
        }
        let msg = if request.is_queued {
            self.poll(token, c)
        } else if let (true, Some(from)) = (self.config.adopt && c != 0, state.detached) {
            Msg::Adopt { from, to: token, by, not_after, sent_at: 0 }
        } else {
            Msg::Acquire { token, by, lifetime, not_after, sent_at: 0, enqueue: true }
        };
        state.net.push(msg);
    }

    /// Uses the key, and starts new calls in a greedy schedule.
    fn use_key(&self, state: &mut State, c: usize, schedule: Schedule) {
        let lingers = self.config.lingers[c];
        let most = match () {
            () if !schedule.is_greedy || self.config.adopt && c != 0 => 0,
            () if lingers => 2,
            () => 1,
        };
        if schedule.is_greedy && lingers && state.clients[c].hold.is_some() {
            // The client would keep the hold forever.
            self.ask(state, c);
            self.flush(state, schedule);
        }
        if state.clients[c].hold.as_ref().is_some_and(|hold| hold.in_use) {
            self.drop_guard(state, c);
            self.flush(state, schedule);
        }
        while !state.clients[c].guards.is_empty() {
            self.drop_plain(state, c, 0);
            self.flush(state, schedule);
        }
        let client = &state.clients[c];
        let in_use = client.hold.as_ref().is_some_and(|hold| hold.in_use);
        let busy = client.waiting.len() + client.requests.len() + usize::from(in_use);
        if busy < most && self.is_session_valid(state, c) {
            self.start(state, c, Kind::Call, true);
            self.flush(state, schedule);
        }
        self.take_turns(state, c);
    }

    fn act(&self, state: &mut State, c: usize, schedule: Schedule) {
        if self.is_session_valid(state, c) {
            state.net.push(Msg::Renew { by: c as u8, sent_at: state.now });
        }
        for cleanup in state.clients[c].cleanups.clone() {
            self.send_release(state, &cleanup);
        }
        self.flush(state, schedule);
        if state.clients[c].hold.as_ref().is_some_and(|hold| hold.is_asking) {
            self.stop_asking(state, c);
            self.flush(state, schedule);
        }
        self.take_turns(state, c);
        let tokens: Vec<Token> = state.clients[c].requests.iter().map(|request| request.token).collect();
        for token in tokens {
            self.request_again(state, c, token);
            self.flush(state, schedule);
        }
        for _ in 0..USES {
            self.use_key(state, c, schedule);
        }
        self.decide(state, c);
        self.flush(state, schedule);
    }

    fn round(&self, state: &mut State, schedule: Schedule) {
        if self.config.failover {
            // A waiter outside the model polls, so the store repeats its grants.
            for push in self.serve(state, &Msg::PollFromOutside) {
                self.deliver(state, &push);
            }
            self.flush(state, schedule);
        }
        // If nobody adopts the detached hold, the client that detached it releases it.
        let adopts = state.clients.iter().skip(1).any(|client| !client.requests.is_empty());
        if !adopts {
            let detached = state.detached;
            state.store.holds.retain(|hold| Some(hold.token) != detached);
        }
        for c in 0..state.clients.len() {
            self.act(state, c, schedule);
        }
        self.tick(state);
        self.flush(state, schedule);
    }

    fn play(&self, mut state: State, schedule: Schedule) -> u8 {
        let mut bad = 0;
        for _ in 0..self.config.session_ttl + 2 * self.config.linger + 2 {
            self.round(&mut state, schedule);
        }
        if state.clients.iter().any(|client| waits(client, false)) {
            bad |= L1;
        }
        let last = Schedule { is_greedy: false, ..schedule };
        for _ in 0..self.config.linger + 4 {
            self.round(&mut state, last);
        }
        if state.clients.iter().any(|client| waits(client, true)) {
            bad |= L1;
        }
        self.inspect(&mut state);
        if !state.store.holds.is_empty() || !state.store.queue.is_empty() {
            bad |= L2;
        }
        bad
    }

    fn play_schedule(&self, state: &State, schedule: Schedule) -> u8 {
        thread_local! {
            static KNOWN: RefCell<HashMap<u64, u8>> = RefCell::default();
        }
        let mut state = state.clone();
        if schedule.delivers {
            self.flush(&mut state, schedule);
        } else {
            state.net.clear();
        }
        // The past makes no difference to the continuation.
        state.history = History::default();
        state.local = LocalHistory::default();
        state.copy = None;
        for client in &mut state.clients {
            client.sent = [0; 4];
            client.idle = [0; 3];
        }
        let mut hasher = DefaultHasher::new();
        (&state, schedule).hash(&mut hasher);
        let known = hasher.finish();
        if let Some(bad) = KNOWN.with_borrow(|all| all.get(&known).copied()) {
            return bad;
        }
        let bad = self.play(state, schedule);
        KNOWN.with_borrow_mut(|all| {
            if all.len() >= MAX_KNOWN {
                all.clear();
            }
            all.insert(known, bad);
        });
        bad
    }

    /// Returns the liveness properties that fail in a continuation of `state`.
    pub fn continuation(&self, state: &State) -> u8 {
        // Pushes report what a failover has undone.
        let pushes = self.config.failover;
        let worst = Schedule { delivers: false, pushes, is_greedy: true };
        let best = Schedule { delivers: true, pushes: true, is_greedy: false };
        self.play_schedule(state, worst) | self.play_schedule(state, best)
    }
}

/// Returns whether a call of the client waits. Calls that only a schedule has count with `extra`.
fn waits(client: &Client, extra: bool) -> bool {
    !client.turns.is_empty()
        || client.waiting.iter().any(|call| extra || !call.is_extra)
        || client.requests.iter().any(|request| extra || !request.is_extra)
}
