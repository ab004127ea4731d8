//! Defines the state of the model and the actions that change it.

use stateright::{Model, Property};

use crate::config::Config as StoreConfig;
use crate::history::History;
use crate::linger::client::{ASKS, Client, Kind, POLLS, RELEASES, RENEWALS};
use crate::linger::config::Config;
use crate::linger::history::LocalHistory;
use crate::linger::properties;
use crate::message::{Msg, Token};
use crate::mutant::Mutation;
use crate::store::{HoldRecord, SessionRecord, Store, StoreOperation, WaiterRecord};

/// State of the whole model.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// Time of the common clock.
    pub now: u8,
    /// Number of ticks by which the clock of the fences was set back.
    pub set_back: u8,
    /// State of the store.
    pub store: Store,
    /// States of the clients.
    pub clients: Vec<Client>,
    /// Messages in flight, sorted.
    pub net: Vec<Msg>,
    /// Past events that the properties need.
    pub history: History,
    /// Past events that the properties of local grants need.
    pub local: LocalHistory,
    /// Token of the detached hold.
    pub detached: Option<Token>,
    /// The key's records in another store that may take over.
    pub copy: Option<(Vec<HoldRecord>, Vec<WaiterRecord>, u16)>,
}

/// An action that may happen next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Action {
    Tick,
    Deliver(Msg),
    Start(usize, Kind),
    DropGuard(usize),
    DropPlain(usize, usize),
    LoseGuard(usize),
    Ask(usize),
    StopAsking(usize),
    Release(usize),
    Poll(usize, usize),
    GiveUpRequest(usize, usize),
    GiveUpWaiting(usize, usize),
    TakeTurn(usize, usize),
    GiveUpTurn(usize, usize),
    ReleaseAgain(usize, usize),
    Renew(usize),
    ForceRelease(u16),
    Forget,
    Copy,
    Failover,
    SetBack,
    Detach(usize),
    Inspect,
}

/// The rules of holds that linger, with bounds and at most one broken rule.
#[derive(Clone, Debug)]
pub struct Lingering {
    /// Bounds of the run.
    pub config: Config,
    /// Bounds of the store.
    pub store: StoreConfig,
    /// Rule that is broken.
    pub broken: Option<Mutation>,
}

impl Lingering {
    /// Returns the model within these bounds.
    pub fn new(config: Config, broken: Option<Mutation>) -> Self {
        Self { config, store: config.store(), broken }
    }

    /// Returns whether this rule is broken.
    pub fn broken(&self, rule: Mutation) -> bool {
        self.broken == Some(rule)
    }

    /// Returns the initial state.
    pub fn first(&self) -> State {
        let config = &self.config;
        let now = 1;
        let until = now + config.session_ttl;
        let client = |c: usize| Client {
            valid_until: until,
            idle: [config.calls[c], config.plain[c], config.attempts[c]],
            ..Client::default()
        };
        State {
            now,
            set_back: 0,
            store: Store {
                sessions: vec![SessionRecord { expires_at: until, force_released: Vec::new() }; config.clients],
                holds: Vec::new(),
                queue: Vec::new(),
                last: 0,
            },
            clients: (0..config.clients).map(client).collect(),
            net: Vec::new(),
            history: History::default(),
            local: LocalHistory::default(),
            detached: None,
            copy: None,
        }
    }

    /// Runs a request in the store and returns the responses and pushes.
    pub fn serve(&self, state: &mut State, msg: &Msg) -> Vec<Msg> {
        let before = state.store.holds.first().map(|hold| (hold.token, hold.fence));
        let State { now, set_back, store, history, local, .. } = state;
        let mut operation = StoreOperation {
            config: &self.store,
            broken: self.broken,
            set_back: *set_back,
            lineage: u8::from(history.failed_over || history.lost_records),
            now: *now,
            out: Vec::new(),
            live: Vec::new(),
            grants: Vec::new(),
            store,
            history,
        };
        operation.run(msg);
        let StoreOperation { mut out, grants, .. } = operation;
        history.granted.clear();
        let is_released =
            |token| matches!(msg, Msg::Release { token: of, .. } | Msg::Adopt { from: of, .. } if *of == token);
        if let Some((token, fence)) = before
            && !store.holds.iter().any(|hold| hold.fence == fence)
            && !is_released(token)
        {
            local.lost(fence);
        }
        for (token, fence) in grants {
            local.holders |= 1 << crate::message::client_of(token);
            local.granted(fence, fence);
        }
        self.note_queue(state);
        if !self.config.pushes_force_releases {
            out.retain(|msg| !matches!(msg, Msg::PushForceReleased { .. }));
        }
        out
    }

    /// Notes when requests entered the queue.
    fn note_queue(&self, state: &mut State) {
        let State { now, store, local, .. } = state;
        local.queued.retain(|(token, _)| store.queue.iter().any(|waiter| waiter.token == *token));
        for waiter in &store.queue {
            if !local.queued.iter().any(|(token, _)| *token == waiter.token) {
                local.queued.push((waiter.token, *now));
            }
        }
    }

    /// Delivers a message and sends the messages that result from it.
    pub fn deliver(&self, state: &mut State, msg: &Msg) {
        match msg.for_client() {
            Some(client) => self.receive(state, client, msg),
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

    /// Lets one tick pass.
    pub fn tick(&self, state: &mut State) {
        state.now += 1;
        for c in 0..state.clients.len() {
            self.expire(state, c);
            // A lease may be over.
            self.decide(state, c);
        }
    }

    /// Drops messages that can no longer have an effect.
    fn prune(&self, state: &mut State) {
        let State { net, clients, detached, .. } = state;
        net.retain(|msg| {
            let Some(c) = msg.for_client() else { return true };
            let client = &clients[c];
            if client.is_expired && !self.broken(Mutation::LocalWithoutSession) {
                return false;
            }
            let hold = |token: Token| client.hold.as_ref().filter(|hold| hold.token == token);
            match *msg {
                Msg::Acquired { token, .. } | Msg::Polled { token, .. } => client.request_of(token).is_some(),
                Msg::PushGranted { token, .. } => {
                    let is_unknown = hold(token).is_none() && *detached != Some(token);
                    client.request_of(token).is_some() || self.config.failover && is_unknown
                }
                Msg::Released { token, .. } => client.is_releasing(token),
                Msg::Lingered { token, .. } => hold(token).is_some() || self.broken(Mutation::LateAnswerRevives),
                Msg::PushRecall { token } => hold(token).is_some_and(|hold| hold.recalled_at.is_none()),
                Msg::PushForceReleased { token } => !client.force_released.contains(&token),
                _ => true,
            }
        });
        net.sort_unstable();
        net.dedup_by(|a, b| a == b && a.is_push());
    }

    fn client_actions(&self, state: &State, c: usize, actions: &mut Vec<Action>) {
        let config = &self.config;
        let client = &state.clients[c];
        let is_valid = self.is_session_valid(state, c);
        let may_adopt = !config.adopt || c == 0 || state.detached.is_some();
        for (at, kind) in [Kind::Call, Kind::Plain, Kind::Attempt].into_iter().enumerate() {
            let is_kept = client.hold.as_ref().is_some_and(|hold| !hold.in_use);
            let without_session = self.broken(Mutation::LocalWithoutSession) && is_kept;
            if client.idle[at] > 0 && (is_valid && may_adopt || without_session) {
                actions.push(Action::Start(c, kind));
            }
        }
        for at in 0..client.turns.len() {
            actions.extend([Action::TakeTurn(c, at), Action::GiveUpTurn(c, at)]);
        }
        if let Some(hold) = &client.hold {
            if hold.in_use && client.turns.is_empty() {
                actions.push(Action::DropGuard(c));
                if config.losses {
                    actions.push(Action::LoseGuard(c));
                }
                if config.adopt && c == 0 {
                    actions.push(Action::Detach(c));
                }
            } else if !hold.in_use && client.waiting.is_empty() {
                actions.push(Action::Release(c));
            }
            if hold.is_asking {
                actions.push(Action::StopAsking(c));
            } else if client.sent[ASKS] < config.asks {
                actions.push(Action::Ask(c));
            }
        }
        actions.extend((0..client.guards.len()).map(|at| Action::DropPlain(c, at)));
        for (at, request) in client.requests.iter().enumerate() {
            if request.is_queued && client.sent[POLLS] < config.polls {
                actions.push(Action::Poll(c, at));
            }
            if config.give_up || request.recalls {
                actions.push(Action::GiveUpRequest(c, at));
            }
        }
        if config.give_up {
            actions.extend((0..client.waiting.len()).map(|at| Action::GiveUpWaiting(c, at)));
        }
        if client.sent[RELEASES] < config.releases {
            actions.extend((0..client.cleanups.len()).map(|at| Action::ReleaseAgain(c, at)));
        }
        if is_valid && client.sent[RENEWALS] < config.renewals[c] {
            actions.push(Action::Renew(c));
        }
    }
}

impl Model for Lingering {
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
        for c in 0..state.clients.len() {
            self.client_actions(state, c, actions);
        }
        if state.history.force_releases < config.force_releases {
            actions.extend(state.store.holds.iter().map(|hold| Action::ForceRelease(hold.fence)));
        }
        let has_failed = state.history.failed_over || state.history.lost_records;
        // A tick follows the loss, and the grants of a key do not outrun the clock of its fences.
        let next_clock = u16::from(state.now + 1 - state.set_back) * config.fences_per_tick;
        let may_fail = state.now < config.last_tick && !has_failed && state.history.issued < next_clock;
        if config.forget && may_fail {
            actions.push(Action::Forget);
        }
        if config.failover && state.copy.is_none() && !has_failed {
            actions.push(Action::Copy);
        }
        if state.copy.is_some() && may_fail {
            actions.push(Action::Failover);
        }
        if config.set_back && state.set_back == 0 {
            actions.push(Action::SetBack);
        }
        let mut looked = state.clone();
        self.inspect(&mut looked);
        if looked != *state {
            actions.push(Action::Inspect);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Tick => self.tick(&mut state),
            Action::Deliver(msg) => {
                if !msg.is_push() {
                    let at = state.net.iter().position(|other| *other == msg)?;
                    state.net.remove(at);
                }
                self.deliver(&mut state, &msg);
            }
            Action::Start(c, kind) => {
                state.clients[c].idle[kind as usize] -= 1;
                self.start(&mut state, c, kind, false);
            }
            Action::DropGuard(c) => self.drop_guard(&mut state, c),
            Action::DropPlain(c, at) => self.drop_plain(&mut state, c, at),
            Action::LoseGuard(c) => self.lose_guard(&mut state, c),
            Action::Ask(c) => {
                state.clients[c].sent[ASKS] += 1;
                self.ask(&mut state, c);
            }
            Action::StopAsking(c) => self.stop_asking(&mut state, c),
            Action::Release(c) => self.release(&mut state, c),
            Action::Poll(c, at) => {
                let client = &mut state.clients[c];
                client.sent[POLLS] += 1;
                state.net.push(self.poll(client.requests[at].token, c));
            }
            Action::GiveUpRequest(c, at) => self.end_request(&mut state, c, at),
            Action::GiveUpWaiting(c, at) => {
                state.clients[c].waiting.remove(at);
                self.decide(&mut state, c);
            }
            Action::TakeTurn(c, at) => self.take_turn(&mut state, c, at),
            Action::GiveUpTurn(c, at) => self.take_turn_back(&mut state, c, at),
            Action::ReleaseAgain(c, at) => {
                let client = &mut state.clients[c];
                client.sent[RELEASES] += 1;
                let cleanup = client.cleanups[at].clone();
                self.send_release(&mut state, &cleanup);
            }
            Action::Renew(c) => {
                state.clients[c].sent[RENEWALS] += 1;
                state.net.push(Msg::Renew { by: c as u8, sent_at: state.now });
            }
            Action::ForceRelease(fence) => {
                state.history.force_releases += 1;
                let out = self.serve(&mut state, &Msg::ForceRelease { fence });
                state.net.extend(out);
            }
            Action::Forget => self.forget(&mut state),
            Action::Copy => {
                let Store { holds, queue, last, .. } = &state.store;
                state.copy = Some((holds.clone(), queue.clone(), *last));
            }
            Action::Failover => self.fail_over(&mut state)?,
            Action::SetBack => state.set_back = 1,
            Action::Detach(c) => self.detach(&mut state, c),
            Action::Inspect => self.inspect(&mut state),
        }
        self.prune(&mut state);
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }
}

impl Lingering {
    /// Returns a poll of a token.
    pub fn poll(&self, token: Token, c: usize) -> Msg {
        Msg::Poll { token, by: c as u8, lifetime: crate::config::Lifetime::Session, sent_at: 0 }
    }

    /// Loses all records of the key. A store that returns without its records takes longer than one unit of its clock.
    fn forget(&self, state: &mut State) {
        self.forget_hold(state);
        state.store.holds.clear();
        state.store.queue.clear();
        state.store.last = 0;
        state.history.lost_records = true;
        self.note_queue(state);
        self.tick(state);
    }

    fn forget_hold(&self, state: &mut State) {
        for hold in &state.store.holds {
            state.local.lost(hold.fence);
            state.local.forgotten.push(hold.fence);
        }
    }

    /// Lets another store take over, which takes at least one tick.
    fn fail_over(&self, state: &mut State) -> Option<()> {
        let (holds, queue, last) = state.copy.take()?;
        if state.store.holds.first().map(|hold| (hold.token, hold.fence))
            != holds.first().map(|hold| (hold.token, hold.fence))
        {
            self.forget_hold(state);
        }
        (state.store.holds, state.store.queue, state.store.last) = (holds, queue, last);
        state.history.failed_over = true;
        self.note_queue(state);
        self.tick(state);
        Some(())
    }
}
