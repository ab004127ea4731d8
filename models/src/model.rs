//! Defines the state of the protocol and the actions that change it.

use stateright::{Model, Property};

use crate::client::{Call, Client, Phase, Rules};
use crate::config::{Config, Lifetime};
use crate::history::History;
use crate::message::{Msg, TOKENS_PER_CLIENT, Token};
use crate::mutant::Mutation;
use crate::properties;
use crate::store::{DETACHED, HoldRecord, SessionRecord, Store, StoreOperation, WaiterRecord};

/// State of the whole model.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// Time of the common clock.
    pub now: u8,
    /// State of the store.
    pub store: Store,
    /// States of the clients.
    pub clients: Vec<Client>,
    /// Messages in flight, sorted.
    pub net: Vec<Msg>,
    /// Past events that the properties need.
    pub history: History,
    /// The key's records in another store that may take over.
    pub copy: Option<(Vec<HoldRecord>, Vec<WaiterRecord>, u16)>,
}

/// An action that may happen next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Action {
    Tick,
    Deliver(Msg),
    Start(usize, usize),
    AcquireAgain(usize, usize),
    Poll(usize, usize),
    GiveUp(usize, usize),
    Release(usize, usize),
    ReleaseAgain(usize, usize),
    Extend(usize, usize),
    Write(usize, usize),
    Renew(usize),
    Close(usize),
    ForceRelease(u16),
    Expire(u16),
    Forget,
    Inspect,
    Detach(usize, usize),
    OpenAgain(usize),
    Copy,
    Failover,
}

/// Index of the sent acquires in [`Call::sent`].
pub const ACQUIRES: usize = 0;
/// Index of the sent polls.
pub const POLLS: usize = 1;
/// Index of the sent releases.
pub const RELEASES: usize = 2;
/// Index of the sent extensions.
pub const EXTENDS: usize = 3;
/// Index of the sent writes.
pub const WRITES: usize = 4;

/// A protocol with its bounds and at most one broken rule.
#[derive(Clone, Debug)]
pub struct Protocol {
    /// Bounds of the run.
    pub config: Config,
    /// Rule that is broken.
    pub broken: Option<Mutation>,
}

impl Protocol {
    /// Returns the client's rules at this time.
    pub fn rules(&self, now: u8) -> Rules<'_> {
        Rules { config: &self.config, broken: self.broken, now }
    }

    fn broken(&self, rule: Mutation) -> bool {
        self.broken == Some(rule)
    }

    /// Returns the initial state.
    pub fn first(&self) -> State {
        let config = &self.config;
        let now = 1;
        let until = now + config.session_ttl;
        let call = |client: usize, call: usize| Call {
            phase: Phase::Idle,
            token: client as Token * TOKENS_PER_CLIENT + call as Token,
            lifetime: config.lifetimes[client],
            not_after: 0,
            unanswered: 0,
            last_sent_at: 0,
            fence: 0,
            valid_until: 0,
            shortest: [u8::MAX; 2],
            held: false,
            lost: false,
            sent: [0; 5],
        };
        let client = |client: usize| Client {
            valid_until: until,
            is_expired: false,
            renewals: 0,
            opens: 0,
            calls: (0..config.calls[client]).map(|at| call(client, at)).collect(),
        };
        let mut history = History::default();
        let mut store = Store {
            sessions: vec![SessionRecord { expires_at: until, force_released: Vec::new() }; config.clients],
            holds: Vec::new(),
            queue: Vec::new(),
            last: 0,
        };
        if config.adopt {
            let expires_at = config.lifetimes[0].has_deadline().then_some(now + config.fixed_ttl);
            let is_bound = config.lifetimes[0].is_bound();
            let session = config.clients as u8;
            store.sessions.push(SessionRecord { expires_at: u8::MAX, force_released: Vec::new() });
            history.issued = 1;
            store.last = 1;
            let demand = config.demand(session);
            store.holds.push(HoldRecord {
                token: DETACHED,
                fence: 1,
                session,
                expires_at,
                is_bound,
                demand,
                lingers: false,
            });
        }
        State { now, store, clients: (0..config.clients).map(client).collect(), net: Vec::new(), history, copy: None }
    }

    /// Runs a request in the store and returns the responses and pushes.
    pub fn serve(&self, state: &mut State, msg: &Msg) -> Vec<Msg> {
        let mut live = Vec::new();
        for client in &state.clients {
            if self.rules(state.now).is_session_valid(client) {
                live.extend(client.calls.iter().filter(|call| call.is_alive()).map(|call| call.token));
            }
        }
        let State { now, store, history, .. } = state;
        let mut operation = StoreOperation {
            config: &self.config,
            broken: self.broken,
            store,
            history,
            now: *now,
            set_back: 0,
            lineage: 0,
            grants: Vec::new(),
            out: Vec::new(),
            live,
        };
        operation.run(msg);
        operation.out
    }

    /// Delivers a message and sends the messages that result from it.
    pub fn deliver(&self, state: &mut State, msg: &Msg) {
        match msg.for_client() {
            Some(client) => {
                self.rules(state.now).receive(&mut state.clients[client], msg);
                let release = Msg::Release { token: msg.token(), held: false, is_final: true };
                let is_grant = matches!(msg, Msg::PushGranted { .. });
                if is_grant
                    && self.rules(state.now).is_orphaned(&state.clients[client], msg.token())
                    && !state.net.contains(&release)
                {
                    state.net.push(release);
                }
            }
            None => {
                let out = self.serve(state, msg);
                state.net.extend(out);
            }
        }
    }

    /// Inspects the key, which makes the store reconcile it.
    pub fn inspect(&self, state: &mut State) {
        let out = self.serve(state, &Msg::Inspect);
        state.net.extend(out);
    }

    /// Drops messages that can no longer have an effect.
    fn prune(&self, state: &mut State) {
        let State { net, clients, now, .. } = state;
        net.retain(|msg| {
            let Some(at) = msg.for_client() else { return true };
            let client = &clients[at];
            if matches!(msg, Msg::Opened { .. }) {
                return self.rules(*now).is_session_valid(client);
            }
            if matches!(msg, Msg::Renewed { .. }) {
                let late = self.broken(Mutation::LateRenewal) || self.broken(Mutation::ReviveAndTrust);
                return late || self.rules(*now).is_session_valid(client);
            }
            let Some(call) = client.calls.iter().find(|call| call.token == msg.token()) else { return false };
            match msg {
                Msg::Released { .. } => call.phase == Phase::Releasing,
                Msg::Acquired { .. } if self.broken(Mutation::AnswersAfterRelease) => call.phase != Phase::Done,
                Msg::PushGranted { .. } if self.broken(Mutation::PushAfterRelease) => true,
                Msg::PushGranted { .. } if self.config.failover => call.phase != Phase::Releasing,
                _ => call.is_alive(),
            }
        });
    }

    /// Lets one tick pass.
    pub fn tick(&self, state: &mut State) {
        state.now += 1;
        for (at, session) in state.store.sessions.iter().enumerate() {
            if state.now >= session.expires_at {
                state.history.expire_session(at as u8);
            }
        }
        for client in &mut state.clients {
            self.rules(state.now).expire(client);
        }
    }

    /// Returns the time of a request, or 0 if nothing depends on that time. This keeps the number of states small.
    fn sent_at(&self, lifetime: Lifetime, now: u8) -> u8 {
        if lifetime.has_deadline() { now } else { 0 }
    }

    /// Counts and returns an `acquire` or `adopt` of a call.
    pub fn acquire(&self, call: &mut Call, client: usize, now: u8) -> Msg {
        let sent_at = self.sent_at(call.lifetime, now);
        call.unanswered += 1;
        call.last_sent_at = sent_at;
        call.sent[ACQUIRES] = call.sent[ACQUIRES].saturating_add(1);
        let (token, by, not_after) = (call.token, client as u8, call.not_after);
        if self.config.adopt {
            Msg::Adopt { from: DETACHED, to: token, by, not_after, sent_at }
        } else {
            Msg::Acquire { token, by, lifetime: call.lifetime, not_after, sent_at, enqueue: true }
        }
    }

    /// Starts a call.
    pub fn start(&self, state: &mut State, client: usize, call: usize) -> Msg {
        let now = state.now;
        let call = &mut state.clients[client].calls[call];
        call.phase = Phase::Acquiring;
        call.not_after = now + self.config.window;
        self.acquire(call, client, now)
    }

    /// Counts and returns a `poll` of a waiting call.
    pub fn poll(&self, state: &mut State, client: usize, call: usize) -> Msg {
        let now = state.now;
        let call = &mut state.clients[client].calls[call];
        let sent_at = self.sent_at(call.lifetime, now);
        call.last_sent_at = sent_at;
        call.sent[POLLS] = call.sent[POLLS].saturating_add(1);
        Msg::Poll { token: call.token, by: client as u8, lifetime: call.lifetime, sent_at }
    }

    /// Counts and returns a `release` or `abandon` of a call.
    pub fn release(&self, state: &mut State, client: usize, call: usize) -> Msg {
        let call = &mut state.clients[client].calls[call];
        call.phase = Phase::Releasing;
        call.sent[RELEASES] = call.sent[RELEASES].saturating_add(1);
        Msg::Release { token: call.token, held: call.held, is_final: call.unanswered == 0 }
    }

    fn call_actions(&self, state: &State, at: (usize, usize), actions: &mut Vec<Action>) {
        let config = &self.config;
        let rules = self.rules(state.now);
        let client = &state.clients[at.0];
        let call = &client.calls[at.1];
        let (c, k) = at;
        let session = rules.is_session_valid(client);
        match call.phase {
            Phase::Idle if session => actions.push(Action::Start(c, k)),
            Phase::Acquiring | Phase::Waiting => {
                if config.give_up {
                    actions.push(Action::GiveUp(c, k));
                }
                let acquiring = call.phase == Phase::Acquiring && state.now <= call.not_after;
                if acquiring && call.sent[ACQUIRES] < config.acquires {
                    actions.push(Action::AcquireAgain(c, k));
                }
                let waits = call.phase == Phase::Waiting && !self.broken(Mutation::NeverPolls);
                if waits && call.sent[POLLS] < config.polls {
                    actions.push(Action::Poll(c, k));
                }
            }
            Phase::Held if rules.is_hold_valid(client, call) => {
                if config.releases > 0 {
                    actions.push(Action::Release(c, k));
                }
                if call.lifetime.has_deadline() && call.sent[EXTENDS] < config.extends {
                    actions.push(Action::Extend(c, k));
                }
                if call.sent[WRITES] < config.writes {
                    actions.push(Action::Write(c, k));
                }
                if config.detaches {
                    actions.push(Action::Detach(c, k));
                }
            }
            Phase::Detached => actions.push(Action::Release(c, k)),
            Phase::Releasing if call.sent[RELEASES] < config.releases => actions.push(Action::ReleaseAgain(c, k)),
            _ => {}
        }
    }

    /// Returns the fences of holds that a contender may expire because their session has expired.
    pub fn expired_holds(&self, state: &State) -> Vec<u16> {
        if !self.config.blind || self.broken(Mutation::NoExpiry) {
            return Vec::new();
        }
        let is_expired = |hold: &&HoldRecord| {
            hold.is_bound
                && state
                    .store
                    .sessions
                    .get(usize::from(hold.session))
                    .is_none_or(|session| state.now >= session.expires_at)
        };
        state.store.holds.iter().filter(is_expired).map(|hold| hold.fence).collect()
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
            contends |= rules.is_session_valid(client) && client.calls.iter().any(|call| call.phase == Phase::Waiting);
            if rules.is_session_valid(client) && client.renewals < config.renewals && c >= config.never_renewing {
                actions.push(Action::Renew(c));
            }
            if rules.is_session_valid(client) && client.opens < config.opens {
                actions.push(Action::OpenAgain(c));
            }
            if rules.is_session_valid(client) && config.close {
                actions.push(Action::Close(c));
            }
        }
        if contends {
            for fence in self.expired_holds(state) {
                if !state.net.contains(&Msg::Expire { fence }) {
                    actions.push(Action::Expire(fence));
                }
            }
        }
        if state.history.force_releases < config.force_releases {
            actions.extend(state.store.holds.iter().map(|hold| Action::ForceRelease(hold.fence)));
        }
        let mut looked = state.clone();
        self.inspect(&mut looked);
        if looked != *state {
            actions.push(Action::Inspect);
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
            Action::AcquireAgain(c, k) => {
                let call = &mut state.clients[c].calls[k];
                if self.broken(Mutation::FreshToken) {
                    call.token += 8;
                }
                let msg = self.acquire(call, c, now);
                state.net.push(msg);
            }
            Action::Poll(c, k) => {
                let msg = self.poll(&mut state, c, k);
                state.net.push(msg);
            }
            Action::GiveUp(c, k) | Action::Release(c, k) | Action::ReleaseAgain(c, k) => {
                let msg = self.release(&mut state, c, k);
                state.net.push(msg);
            }
            Action::Extend(c, k) => {
                let call = &mut state.clients[c].calls[k];
                call.sent[EXTENDS] += 1;
                let nth = call.sent[EXTENDS];
                let length = self.config.extension(nth);
                call.shortest = [call.shortest[0].min(length), call.shortest[0]];
                // A shorter lifetime may take effect before the response arrives.
                if !self.broken(Mutation::ShorterFromReply) {
                    call.valid_until = call.valid_until.min(now + length);
                }
                state.net.push(Msg::Extend { token: call.token, by: c as u8, fence: call.fence, nth, sent_at: now });
            }
            Action::Write(c, k) => {
                let call = &mut state.clients[c].calls[k];
                call.sent[WRITES] += 1;
                state.net.push(Msg::Write { fence: call.fence });
            }
            Action::Renew(c) => {
                state.clients[c].renewals += 1;
                state.net.push(Msg::Renew { by: c as u8, sent_at: now });
            }
            Action::Close(c) => {
                state.clients[c].valid_until = now;
                self.rules(now).expire(&mut state.clients[c]);
                state.net.push(Msg::Close { by: c as u8 });
            }
            Action::ForceRelease(fence) => {
                state.history.force_releases += 1;
                state.net.push(Msg::ForceRelease { fence });
            }
            Action::Expire(fence) => state.net.push(Msg::Expire { fence }),
            Action::Inspect => self.inspect(&mut state),
            Action::Detach(c, k) => {
                let call = &mut state.clients[c].calls[k];
                call.phase = Phase::Detached;
                call.lost = true;
            }
            Action::OpenAgain(c) => {
                state.clients[c].opens += 1;
                state.net.push(Msg::Open { by: c as u8, sent_at: now });
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
                // The store may grant the same call again after it has forgotten the first grant.
                history.granted.retain(|token| holds.iter().any(|hold| hold.token == *token));
                // A failover takes at least one tick, like a loss of all records.
                self.tick(&mut state);
            }
            Action::Forget => {
                state.store.holds.clear();
                state.store.queue.clear();
                state.store.last = 0;
                state.history.lost_records = true;
                state.history.forgotten = state.history.issued;
                // A store that returns without its records takes longer than one unit of its clock.
                if !self.broken(Mutation::LossInNoTime) {
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
