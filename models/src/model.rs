//! The state, and what may happen in it.

use stateright::{Model, Property};

use crate::client::{Call, Client, Phase, Rules};
use crate::config::{Config, Term};
use crate::history::History;
use crate::message::Msg;
use crate::mutant::Break;
use crate::properties;
use crate::store::{DETACHED, Hold, Place, Session, Step, Store};

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// The clock of everybody.
    pub now: u8,
    /// The store.
    pub store: Store,
    /// The clients.
    pub clients: Vec<Client>,
    /// What is on its way, sorted.
    pub net: Vec<Msg>,
    /// What the properties remember.
    pub history: History,
    /// The key's records as another store has them that may take over.
    pub copy: Option<(Vec<Hold>, Vec<Place>, u16)>,
}

/// What may happen.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Action {
    Tick,
    Deliver(Msg),
    Start(usize, usize),
    AskAgain(usize, usize),
    Poll(usize, usize),
    GiveUp(usize, usize),
    Release(usize, usize),
    EndAgain(usize, usize),
    Extend(usize, usize),
    Write(usize, usize),
    Beat(usize),
    Close(usize),
    Force(u16),
    Evict(u16),
    Forget,
    Look,
    Keep(usize, usize),
    OpenAgain(usize),
    Copy,
    Failover,
}

/// Counters of [`Call::sent`].
pub const ASKED: usize = 0;
/// Polls sent.
pub const POLLED: usize = 1;
/// Ends sent.
pub const ENDED: usize = 2;
/// Extensions sent.
pub const EXTENDED: usize = 3;
/// Writes sent.
pub const WRITTEN: usize = 4;

/// A protocol with its bounds, and at most one rule broken.
#[derive(Clone, Debug)]
pub struct Protocol {
    /// The bounds.
    pub config: Config,
    /// The rule that is broken.
    pub broken: Option<Break>,
}

impl Protocol {
    /// The client's rules at a time.
    pub fn rules(&self, now: u8) -> Rules<'_> {
        Rules { config: &self.config, broken: self.broken, now }
    }

    fn broken(&self, rule: Break) -> bool {
        self.broken == Some(rule)
    }

    /// The first state.
    pub fn first(&self) -> State {
        let config = &self.config;
        let now = 1;
        let until = now + config.session_ttl;
        let call = |client: usize, call: usize| Call {
            phase: Phase::Idle,
            token: (client * 16 + call) as u8,
            term: config.terms[client],
            not_after: 0,
            unanswered: 0,
            last_asked: 0,
            fence: 0,
            until: 0,
            shortest: [u8::MAX; 2],
            held: false,
            lost: false,
            sent: [0; 5],
        };
        let client = |client: usize| Client {
            until,
            over: false,
            beats: 0,
            opens: 0,
            calls: (0..config.calls[client]).map(|at| call(client, at)).collect(),
        };
        let mut history = History::default();
        let mut store = Store {
            sessions: vec![Session { expires: until, forced: Vec::new() }; config.clients],
            holds: Vec::new(),
            queue: Vec::new(),
            last: 0,
        };
        if config.adopt {
            let expires = config.terms[0].has_deadline().then_some(now + config.fixed_ttl);
            let is_bound = config.terms[0].is_bound();
            let session = config.clients as u8;
            store.sessions.push(Session { expires: u8::MAX, forced: Vec::new() });
            history.issued = 1;
            store.last = 1;
            let demand = config.demand(session);
            store.holds.push(Hold { token: DETACHED, fence: 1, session, expires, is_bound, demand });
        }
        State { now, store, clients: (0..config.clients).map(client).collect(), net: Vec::new(), history, copy: None }
    }

    /// The store does one request; its answers are returned.
    pub fn serve(&self, state: &mut State, msg: &Msg) -> Vec<Msg> {
        let mut live = Vec::new();
        for client in &state.clients {
            if self.rules(state.now).session(client) {
                live.extend(client.calls.iter().filter(|call| call.lives()).map(|call| call.token));
            }
        }
        let State { now, store, history, .. } = state;
        let mut step =
            Step { config: &self.config, broken: self.broken, store, history, now: *now, out: Vec::new(), live };
        step.take(msg);
        step.out
    }

    /// A message arrives. What it causes is sent.
    pub fn deliver(&self, state: &mut State, msg: &Msg) {
        match msg.for_client() {
            Some(client) => {
                self.rules(state.now).hear(&mut state.clients[client], msg);
                let end = Msg::End { token: msg.token(), release: false, sure: true };
                let is_grant = matches!(msg, Msg::PushGranted { .. });
                if is_grant
                    && self.rules(state.now).is_nobodys(&state.clients[client], msg.token())
                    && !state.net.contains(&end)
                {
                    state.net.push(end);
                }
            }
            None => {
                let out = self.serve(state, msg);
                state.net.extend(out);
            }
        }
    }

    /// Somebody looks at the key: it is settled.
    pub fn look(&self, state: &mut State) {
        let out = self.serve(state, &Msg::Look);
        state.net.extend(out);
    }

    /// Drops what can have no effect any more.
    fn prune(&self, state: &mut State) {
        let State { net, clients, now, .. } = state;
        net.retain(|msg| {
            let Some(at) = msg.for_client() else { return true };
            let client = &clients[at];
            if matches!(msg, Msg::Opened { .. }) {
                return self.rules(*now).session(client);
            }
            if matches!(msg, Msg::Beaten { .. }) {
                let late = self.broken(Break::LateBeat) || self.broken(Break::ReviveAndBelieve);
                return late || self.rules(*now).session(client);
            }
            let Some(call) = client.calls.iter().find(|call| call.token == msg.token()) else { return false };
            match msg {
                Msg::Ended { .. } => call.phase == Phase::Ending,
                Msg::Acquired { .. } if self.broken(Break::AnswersAfterEnd) => call.phase != Phase::Done,
                Msg::PushGranted { .. } if self.broken(Break::PushAfterEnd) => true,
                Msg::PushGranted { .. } if self.config.failover => call.phase != Phase::Ending,
                _ => call.lives(),
            }
        });
    }

    /// A tick.
    pub fn tick(&self, state: &mut State) {
        state.now += 1;
        for (at, session) in state.store.sessions.iter().enumerate() {
            if state.now >= session.expires {
                state.history.died(at as u8);
            }
        }
        for client in &mut state.clients {
            self.rules(state.now).ticked(client);
        }
    }

    /// The time of a question, where anything depends on it.
    fn asked(&self, term: Term, now: u8) -> u8 {
        if term.has_deadline() { now } else { 0 }
    }

    /// The question of a call. Counts it.
    pub fn question(&self, call: &mut Call, client: usize, now: u8) -> Msg {
        let asked = self.asked(call.term, now);
        call.unanswered += 1;
        call.last_asked = asked;
        call.sent[ASKED] = call.sent[ASKED].saturating_add(1);
        let (token, by, not_after) = (call.token, client as u8, call.not_after);
        if self.config.adopt {
            Msg::Adopt { from: DETACHED, to: token, by, not_after, asked }
        } else {
            Msg::Acquire { token, by, term: call.term, not_after, asked }
        }
    }

    /// A call begins.
    pub fn start(&self, state: &mut State, client: usize, call: usize) -> Msg {
        let now = state.now;
        let call = &mut state.clients[client].calls[call];
        call.phase = Phase::Asking;
        call.not_after = now + self.config.window;
        self.question(call, client, now)
    }

    /// A waiting call asks what became of it.
    pub fn poll(&self, state: &mut State, client: usize, call: usize) -> Msg {
        let now = state.now;
        let call = &mut state.clients[client].calls[call];
        let asked = self.asked(call.term, now);
        call.last_asked = asked;
        call.sent[POLLED] = call.sent[POLLED].saturating_add(1);
        Msg::Poll { token: call.token, by: client as u8, term: call.term, asked }
    }

    /// A token is ended, or ended again.
    pub fn end(&self, state: &mut State, client: usize, call: usize) -> Msg {
        let call = &mut state.clients[client].calls[call];
        call.phase = Phase::Ending;
        call.sent[ENDED] = call.sent[ENDED].saturating_add(1);
        Msg::End { token: call.token, release: call.held, sure: call.unanswered == 0 }
    }

    fn call_actions(&self, state: &State, at: (usize, usize), actions: &mut Vec<Action>) {
        let config = &self.config;
        let rules = self.rules(state.now);
        let client = &state.clients[at.0];
        let call = &client.calls[at.1];
        let (c, k) = at;
        let session = rules.session(client);
        match call.phase {
            Phase::Idle if session => actions.push(Action::Start(c, k)),
            Phase::Asking | Phase::Waiting => {
                if config.give_up {
                    actions.push(Action::GiveUp(c, k));
                }
                let asking = call.phase == Phase::Asking && state.now <= call.not_after;
                if asking && call.sent[ASKED] < config.asks {
                    actions.push(Action::AskAgain(c, k));
                }
                let waits = call.phase == Phase::Waiting && !self.broken(Break::NeverAsksAgain);
                if waits && call.sent[POLLED] < config.polls {
                    actions.push(Action::Poll(c, k));
                }
            }
            Phase::Held if rules.believes(client, call) => {
                if config.ends > 0 {
                    actions.push(Action::Release(c, k));
                }
                if call.term.has_deadline() && call.sent[EXTENDED] < config.extends {
                    actions.push(Action::Extend(c, k));
                }
                if call.sent[WRITTEN] < config.writes {
                    actions.push(Action::Write(c, k));
                }
                if config.keeps {
                    actions.push(Action::Keep(c, k));
                }
            }
            Phase::Kept => actions.push(Action::Release(c, k)),
            Phase::Ending if call.sent[ENDED] < config.ends => actions.push(Action::EndAgain(c, k)),
            _ => {}
        }
    }

    /// Fences of holds whose session is dead, for those who look.
    pub fn takeovers(&self, state: &State) -> Vec<u16> {
        if !self.config.blind || self.broken(Break::NoTakeover) {
            return Vec::new();
        }
        let dead = |hold: &&Hold| {
            hold.is_bound
                && state
                    .store
                    .sessions
                    .get(usize::from(hold.session))
                    .is_none_or(|session| state.now >= session.expires)
        };
        state.store.holds.iter().filter(dead).map(|hold| hold.fence).collect()
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.first()]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        let config = &self.config;
        if state.now < config.last_tick {
            actions.push(Action::Tick);
        }
        for at in 0..state.net.len() {
            if at == 0 || state.net[at] != state.net[at - 1] {
                actions.push(Action::Deliver(state.net[at].clone()));
            }
        }
        let rules = self.rules(state.now);
        let mut contends = false;
        for (c, client) in state.clients.iter().enumerate() {
            for k in 0..client.calls.len() {
                self.call_actions(state, (c, k), actions);
            }
            contends |= rules.session(client) && client.calls.iter().any(|call| call.phase == Phase::Waiting);
            if rules.session(client) && client.beats < config.beats && c >= config.quiet {
                actions.push(Action::Beat(c));
            }
            if rules.session(client) && client.opens < config.opens {
                actions.push(Action::OpenAgain(c));
            }
            if rules.session(client) && config.close {
                actions.push(Action::Close(c));
            }
        }
        if contends {
            for fence in self.takeovers(state) {
                if !state.net.contains(&Msg::Evict { fence }) {
                    actions.push(Action::Evict(fence));
                }
            }
        }
        if state.history.forces < config.forces {
            actions.extend(state.store.holds.iter().map(|hold| Action::Force(hold.fence)));
        }
        let mut looked = state.clone();
        self.look(&mut looked);
        if looked != *state {
            actions.push(Action::Look);
        }
        if config.failover && state.copy.is_none() && !state.history.failed_over {
            actions.push(Action::Copy);
        }
        if state.copy.is_some() && state.now < config.last_tick {
            actions.push(Action::Failover);
        }
        if config.forget && !state.history.lost_records && state.now < config.last_tick {
            actions.push(Action::Forget);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        let now = state.now;
        match action {
            Action::Tick => self.tick(&mut state),
            Action::Deliver(msg) => {
                if !msg.is_push() {
                    let at = state.net.iter().position(|other| *other == msg)?;
                    state.net.remove(at);
                }
                self.deliver(&mut state, &msg);
            }
            Action::Start(c, k) => {
                let msg = self.start(&mut state, c, k);
                state.net.push(msg);
            }
            Action::AskAgain(c, k) => {
                let call = &mut state.clients[c].calls[k];
                if self.broken(Break::FreshToken) {
                    call.token += 8;
                }
                let msg = self.question(call, c, now);
                state.net.push(msg);
            }
            Action::Poll(c, k) => {
                let msg = self.poll(&mut state, c, k);
                state.net.push(msg);
            }
            Action::GiveUp(c, k) | Action::Release(c, k) | Action::EndAgain(c, k) => {
                let msg = self.end(&mut state, c, k);
                state.net.push(msg);
            }
            Action::Extend(c, k) => {
                let call = &mut state.clients[c].calls[k];
                call.sent[EXTENDED] += 1;
                let nth = call.sent[EXTENDED];
                let length = self.config.extension(nth);
                call.shortest = [call.shortest[0].min(length), call.shortest[0]];
                // A shorter term may count before its answer comes.
                if !self.broken(Break::ShorterFromReply) {
                    call.until = call.until.min(now + length);
                }
                state.net.push(Msg::Extend { token: call.token, by: c as u8, fence: call.fence, nth, asked: now });
            }
            Action::Write(c, k) => {
                let call = &mut state.clients[c].calls[k];
                call.sent[WRITTEN] += 1;
                state.net.push(Msg::Write { fence: call.fence });
            }
            Action::Beat(c) => {
                state.clients[c].beats += 1;
                state.net.push(Msg::Beat { by: c as u8, asked: now });
            }
            Action::Close(c) => {
                state.clients[c].until = now;
                self.rules(now).ticked(&mut state.clients[c]);
                state.net.push(Msg::Close { by: c as u8 });
            }
            Action::Force(fence) => {
                state.history.forces += 1;
                state.net.push(Msg::Force { fence });
            }
            Action::Evict(fence) => state.net.push(Msg::Evict { fence }),
            Action::Look => self.look(&mut state),
            Action::Keep(c, k) => {
                let call = &mut state.clients[c].calls[k];
                call.phase = Phase::Kept;
                call.lost = true;
            }
            Action::OpenAgain(c) => {
                state.clients[c].opens += 1;
                state.net.push(Msg::Open { by: c as u8, asked: now });
            }
            Action::Copy => {
                let Store { holds, queue, last, .. } = &state.store;
                state.copy = Some((holds.clone(), queue.clone(), *last));
            }
            Action::Failover => {
                let Store { holds, queue, last, .. } = &mut state.store;
                (*holds, *queue, *last) = state.copy.take()?;
                let history = &mut state.history;
                history.failed_over = true;
                history.forgotten = history.issued;
                // What was granted and is forgotten may be granted again to the same call.
                history.granted.retain(|token| holds.iter().any(|hold| hold.token == *token));
                // As with a loss of all records.
                self.tick(&mut state);
            }
            Action::Forget => {
                state.store.holds.clear();
                state.store.queue.clear();
                state.store.last = 0;
                state.history.lost_records = true;
                state.history.forgotten = state.history.issued;
                // A store that comes back without its records takes more than one unit of its clock for that.
                if !self.broken(Break::LossInNoTime) {
                    self.tick(&mut state);
                }
            }
        }
        self.prune(&mut state);
        state.net.sort_unstable();
        state.net.dedup_by(|a, b| a == b && a.is_push());
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }

    fn format_action(&self, action: &Action) -> String {
        format!("{action:?}")
    }

    fn format_step(&self, last: &State, action: Action) -> Option<String> {
        self.next_state(last, action).map(|state| format!("{state:#?}"))
    }
}
