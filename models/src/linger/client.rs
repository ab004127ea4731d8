//! Models a client that lets a key linger: its calls, the hold that it keeps, and its reaction to responses and pushes. One
//! client is one process with one session.

use crate::config::Lifetime;
use crate::linger::model::{Lingering, State};
use crate::message::{LingerOutcome, Msg, Outcome, TOKENS_PER_CLIENT, Token, client_of};
use crate::mutant::Mutation;
use crate::store::BLOCK;

/// A call that waits for its turn in its process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Waiting {
    /// Whether the call came after its process had received a recall of the hold.
    pub is_late: bool,
    /// Whether only a schedule of the liveness check has this call.
    pub is_extra: bool,
}

/// A turn on its way to a call.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Turn {
    /// The key was granted under the kept hold of this token.
    Granted { token: Token, is_extra: bool },
    /// The call asks the store for the key.
    Ask { is_extra: bool },
}

/// A request of a call in the store.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Request {
    /// Token of the request.
    pub token: Token,
    /// Whether the call asks for its whole process. Otherwise it is plain.
    pub is_asker: bool,
    /// Whether the store has answered that the request is in the queue. Otherwise the request is unanswered.
    pub is_queued: bool,
    /// Whether the call does not wait.
    pub is_attempt: bool,
    /// Whether an attempt has entered the queue to recall the hold.
    pub recalls: bool,
    /// Whether only a schedule of the liveness check has this call.
    pub is_extra: bool,
}

/// Use of the key under the kept hold. The runs must reach each local one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// The store granted the key.
    Store,
    /// The store granted the key to an attempt that had recalled a lingering hold.
    Attempt,
    /// The client granted the key locally.
    Local,
    /// The client granted the key locally, after a recall, to a call that had come before it.
    AfterRecall,
    /// The client granted the key locally although the store no longer had the hold.
    WithoutRecord,
    /// The same, after the store had granted the key to another request.
    AfterAnotherGrant,
}

/// A hold of the process that it may grant again.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LocalHold {
    /// Token of the hold.
    pub token: Token,
    /// Fence of the store's grant.
    pub granted: u16,
    /// Last fence that was used.
    pub used: u16,
    /// Highest fence that the client may use.
    pub up_to: u16,
    /// Time at which the store's grant arrived. Only a mutant uses it.
    pub granted_at: u8,
    /// Time from which the lease counts.
    pub leased_at: Option<u8>,
    /// Lineage of the store that gave the last answer to `linger`.
    pub lineage: Option<u8>,
    /// Time at which the client noted a recall.
    pub recalled_at: Option<u8>,
    /// Whether the client has received a recall. A property compares this with the client's rules.
    pub was_recalled: bool,
    /// Whether a request to linger is in flight.
    pub is_asking: bool,
    /// Whether a guard has the hold, or a turn with the hold is on its way.
    pub in_use: bool,
    /// Origin of the last use.
    pub origin: Origin,
    /// Latest time at which a copy of the acquire may arrive.
    pub late_until: Option<u8>,
}

/// A guard of a plain call.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Guard {
    /// Token of the hold.
    pub token: Token,
    /// Fence of the hold.
    pub fence: u16,
    /// Origin of the guard.
    pub origin: Origin,
    /// Whether only a schedule of the liveness check has this call.
    pub is_extra: bool,
}

/// A token that the client keeps releasing until the release is final.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cleanup {
    /// Token to release.
    pub token: Token,
    /// Latest time at which a copy of the acquire may arrive.
    pub late_until: Option<u8>,
}

/// Kind of a call that starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The call waits, and lets the key linger if its client does.
    Call,
    /// The call waits and never lets the key linger.
    Plain,
    /// The call does not wait.
    Attempt,
}

/// A client.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Client {
    /// Time until which the client regards its session as valid.
    pub valid_until: u8,
    /// Whether the client regards its session as expired.
    pub is_expired: bool,
    /// Number of calls of each [`Kind`] that have not started.
    pub idle: [u8; 3],
    /// Calls that wait in the process, in the order of their arrival.
    pub waiting: Vec<Waiting>,
    /// Turns on their way to calls.
    pub turns: Vec<Turn>,
    /// Requests in the store.
    pub requests: Vec<Request>,
    /// The hold that the process may grant again.
    pub hold: Option<LocalHold>,
    /// Guards of plain calls.
    pub guards: Vec<Guard>,
    /// Tokens that are being released.
    pub cleanups: Vec<Cleanup>,
    /// Tokens that the client knows to be force-released.
    pub force_released: Vec<Token>,
    /// Highest fence of a grant of the store that has arrived. A property compares this with the client's rules.
    pub newest: u16,
    /// Whether all calls are plain after a recall of an unused hold.
    pub is_off: bool,
    /// Whether a lost guard has left its entry behind, in a mutant.
    pub is_stuck: bool,
    /// Number of tokens that the client has made.
    pub tokens: Token,
    /// Numbers of renewals, requests to linger, polls and repeated releases that were sent.
    pub sent: [u8; 4],
}

/// Index of the sent renewals in [`Client::sent`].
pub const RENEWALS: usize = 0;
/// Index of the sent requests to linger.
pub const ASKS: usize = 1;
/// Index of the sent polls.
pub const POLLS: usize = 2;
/// Index of the repeated releases.
pub const RELEASES: usize = 3;

impl Client {
    /// Returns the kept hold of this token.
    fn hold_of(&self, token: Token) -> Option<&LocalHold> {
        self.hold.as_ref().filter(|hold| hold.token == token)
    }

    /// Returns the position of the request with this token.
    pub fn request_of(&self, token: Token) -> Option<usize> {
        self.requests.iter().position(|request| request.token == token)
    }

    /// Returns whether the client is releasing this token.
    pub fn is_releasing(&self, token: Token) -> bool {
        self.cleanups.iter().any(|cleanup| cleanup.token == token)
    }

    /// Returns whether a call asks for the key for the whole process, or is about to.
    pub fn has_asker(&self) -> bool {
        let has_turn = self.turns.iter().any(|turn| matches!(turn, Turn::Ask { .. }));
        self.requests.iter().any(|request| request.is_asker) || has_turn || self.is_stuck
    }
}

impl Lingering {
    /// Returns whether the client regards its session as valid.
    pub fn is_session_valid(&self, state: &State, c: usize) -> bool {
        let client = &state.clients[c];
        !client.is_expired && state.now < client.valid_until
    }

    /// Returns whether the mutant reserves fences with the grant.
    fn reserves_with_grant(&self) -> bool {
        use Mutation::{ElapsedBlock, PastBlock, WholeBlock};
        self.broken(ElapsedBlock) || self.broken(WholeBlock) || self.broken(PastBlock)
    }

    fn has_lease(&self, state: &State, hold: &LocalHold) -> bool {
        self.broken(Mutation::NoLease) || hold.leased_at.is_some_and(|at| state.now < at + self.config.linger)
    }

    /// Returns the fence of the next local grant, if the client may make one.
    fn next_local_fence(&self, state: &State, c: usize) -> Option<u16> {
        let hold = state.clients[c].hold.as_ref()?;
        if !self.is_session_valid(state, c) && !self.broken(Mutation::LocalWithoutSession) {
            return None;
        }
        if self.reserves_with_grant() {
            let mut most = hold.granted + BLOCK - 1;
            if self.broken(Mutation::ElapsedBlock) {
                let elapsed = u16::from(state.now - hold.granted_at) * self.config.fences_per_tick;
                most = most.min((hold.granted + elapsed).saturating_sub(1));
            }
            // One grant stands for as many as there may have been.
            return (most > hold.used).then_some(most);
        }
        let is_in_time = self.broken(Mutation::PromiseWithoutLimit)
            || hold.recalled_at.is_none_or(|at| state.now < at + self.config.linger);
        let without_lease = self.broken(Mutation::PromiseWithoutLease) && hold.recalled_at.is_some();
        if !is_in_time || !(self.has_lease(state, hold) || without_lease) {
            return None;
        }
        if self.broken(Mutation::SameFence) {
            return (hold.up_to > hold.granted).then_some(hold.used);
        }
        (hold.used < hold.up_to).then_some(hold.used + 1)
    }

    /// Grants the key to a call under the kept hold.
    fn grant_locally(&self, state: &mut State, c: usize, fence: u16, call: &Waiting) {
        let State { now, store, clients, history, local, .. } = state;
        let client = &mut clients[c];
        let Some(hold) = &mut client.hold else { return };
        let record = store.holds.first().filter(|record| {
            // For this mutant a hold under another fence is the same hold.
            let is_same = record.fence == hold.granted || self.broken(Mutation::FenceNotCompared);
            record.token == hold.token && is_same
        });
        hold.used = fence;
        hold.in_use = true;
        hold.origin = Origin::Local;
        if hold.recalled_at.is_some() {
            hold.origin = Origin::AfterRecall;
        }
        let loss = local.lost.iter().find(|(lost, _)| *lost == hold.granted).copied();
        let since = loss.and_then(|(_, since)| since);
        // A failover may have restored a hold that was lost.
        let is_below_later = loss.is_some() && since.is_none_or(|since| fence < since);
        // A fence under a hold that is gone must not pass a resource that has seen a later grant.
        let is_above_later = record.is_none() && since.is_some_and(|since| fence >= since);
        local.bad_fence |= fence <= history.issued && !is_below_later || is_above_later;
        if record.is_some() {
            local.granted(hold.granted, fence);
        } else {
            hold.origin = if since.is_some() { Origin::AfterAnotherGrant } else { Origin::WithoutRecord };
        }
        history.issued = history.issued.max(fence);
        local.bad_order |= call.is_late && !store.queue.is_empty();
        local.bad_local |= client.force_released.contains(&hold.token);
        local.bad_age |= hold.granted < client.newest;
        local.bad_delay |= local.queued.iter().any(|(_, since)| *now >= since + self.config.linger);
        if self.config.slow_turns {
            client.turns.push(Turn::Granted { token: hold.token, is_extra: call.is_extra });
        }
    }

    /// Sends the request of a call to the store.
    fn request(&self, state: &mut State, c: usize, request: Request) {
        let client = &mut state.clients[c];
        client.tokens += 1;
        let token = c as Token * TOKENS_PER_CLIENT + client.tokens;
        client.requests.push(Request { token, ..request });
        let (by, not_after) = (c as u8, state.now + 1);
        if self.config.adopt && c != 0 {
            let Some(from) = state.detached else { return };
            state.net.push(Msg::Adopt { from, to: token, by, not_after, sent_at: 0 });
            return;
        }
        let enqueue = !request.is_attempt || request.recalls;
        let copies = if self.config.repeats { 2 } else { 1 };
        for _ in 0..copies {
            let lifetime = Lifetime::Session;
            state.net.push(Msg::Acquire { token, by, lifetime, not_after, sent_at: 0, enqueue });
        }
    }

    fn new_request(is_asker: bool, is_extra: bool) -> Request {
        Request { token: 0, is_asker, is_queued: false, is_attempt: false, recalls: false, is_extra }
    }

    /// Starts a call.
    pub fn start(&self, state: &mut State, c: usize, kind: Kind, is_extra: bool) {
        let fence = self.next_local_fence(state, c);
        let client = &mut state.clients[c];
        let is_attempt = kind == Kind::Attempt;
        let request = |is_asker| Request { is_attempt, ..Self::new_request(is_asker, is_extra) };
        if kind == Kind::Plain || !self.config.lingers[c] {
            return self.request(state, c, request(false));
        }
        let has_asker = client.has_asker();
        let Some(hold) = &client.hold else {
            if has_asker && !is_attempt {
                client.waiting.push(Waiting { is_late: false, is_extra });
            } else {
                let is_asker = !has_asker && !client.is_off;
                self.request(state, c, request(is_asker));
            }
            return;
        };
        if hold.in_use && is_attempt {
            return;
        }
        if hold.recalled_at.is_some() && !self.broken(Mutation::LateComersWait) {
            return self.request(state, c, request(false));
        }
        let call = Waiting { is_late: hold.was_recalled, is_extra };
        if !hold.in_use
            && let Some(fence) = fence
        {
            return self.grant_locally(state, c, fence, &call);
        }
        client.waiting.push(call);
        self.decide(state, c);
    }

    /// Decides what happens to a hold that nobody uses: the next waiting call gets it, the client keeps it, or it is
    /// released.
    pub fn decide(&self, state: &mut State, c: usize) {
        let fence = self.next_local_fence(state, c);
        let Some(hold) = state.clients[c].hold.as_ref().filter(|hold| !hold.in_use) else { return };
        let is_recalled = hold.recalled_at.is_some();
        let is_promised = hold.recalled_at.is_some_and(|at| state.now < at + self.config.linger);
        let is_wanted = !state.clients[c].waiting.is_empty();
        let keeps = if is_wanted {
            hold.is_asking && !is_recalled || is_promised && self.broken(Mutation::PromiseKeepsHold)
        } else {
            !is_recalled && (self.has_lease(state, hold) || hold.is_asking || self.reserves_with_grant())
        };
        match fence {
            Some(fence) if is_wanted => {
                let next = if self.broken(Mutation::NewestFirst) { state.clients[c].waiting.len() - 1 } else { 0 };
                let call = state.clients[c].waiting.remove(next);
                state.local.bad_turn |= next != 0;
                self.grant_locally(state, c, fence, &call);
            }
            _ if keeps => {}
            _ => self.release(state, c),
        }
    }

    /// Releases the kept hold in the store. It is not granted here again.
    pub fn release(&self, state: &mut State, c: usize) {
        let Some(hold) = state.clients[c].hold.clone() else { return };
        self.clean_up(state, c, hold.token, hold.late_until);
        if self.broken(Mutation::ReleaseStays) {
            return;
        }
        state.clients[c].hold = None;
        if !self.broken(Mutation::ReleasePassesNothingOn) {
            self.pass_on(state, c);
        }
    }

    /// Lets the next waiting call ask the store for the key.
    fn pass_on(&self, state: &mut State, c: usize) {
        let client = &mut state.clients[c];
        for call in &mut client.waiting {
            call.is_late = false;
        }
        if client.is_off {
            for call in std::mem::take(&mut client.waiting) {
                self.request(state, c, Self::new_request(false, call.is_extra));
            }
        } else if !client.waiting.is_empty() {
            let call = client.waiting.remove(0);
            if self.config.slow_turns {
                client.turns.push(Turn::Ask { is_extra: call.is_extra });
            } else {
                self.request(state, c, Self::new_request(true, call.is_extra));
            }
        }
    }

    /// Begins to release a token.
    fn clean_up(&self, state: &mut State, c: usize, token: Token, late_until: Option<u8>) {
        let cleanup = Cleanup { token, late_until };
        let client = &mut state.clients[c];
        if !client.is_releasing(token) {
            client.cleanups.push(cleanup.clone());
        }
        self.send_release(state, &cleanup);
    }

    /// Sends the release of a token.
    pub fn send_release(&self, state: &mut State, cleanup: &Cleanup) {
        let is_final = cleanup.late_until.is_none();
        state.net.push(Msg::Release { token: cleanup.token, held: true, is_final });
    }

    /// Returns until when a copy of a request that was just sent or answered may arrive.
    fn late_until(&self, state: &State) -> Option<u8> {
        self.config.repeats.then_some(state.now + 1)
    }

    /// Ends a request without a guard.
    pub fn end_request(&self, state: &mut State, c: usize, at: usize) {
        let request = state.clients[c].requests.remove(at);
        // The release may overtake an acquire that has no response yet.
        let late_until = if request.is_queued { self.late_until(state) } else { Some(state.now + 1) };
        if !(request.recalls && self.broken(Mutation::AttemptNotAbandoned)) {
            self.clean_up(state, c, request.token, late_until);
        }
        if request.is_asker && !self.broken(Mutation::AskerLeavesNobody) {
            self.pass_on(state, c);
        }
    }

    /// Lets a call take its turn.
    pub fn take_turn(&self, state: &mut State, c: usize, at: usize) {
        match state.clients[c].turns.remove(at) {
            Turn::Granted { token, is_extra } => {
                // If the hold was lost on the way, the call asks the store for itself.
                if state.clients[c].hold_of(token).is_none() {
                    self.request(state, c, Self::new_request(false, is_extra));
                }
            }
            Turn::Ask { is_extra } => self.request(state, c, Self::new_request(true, is_extra)),
        }
    }

    /// Takes back the turn of a call that has given up.
    pub fn take_turn_back(&self, state: &mut State, c: usize, at: usize) {
        let turn = state.clients[c].turns.remove(at);
        if self.broken(Mutation::TurnLost) {
            return;
        }
        match turn {
            Turn::Granted { token, .. } if state.clients[c].hold_of(token).is_some() => self.drop_guard(state, c),
            Turn::Granted { .. } => {}
            Turn::Ask { .. } => self.pass_on(state, c),
        }
    }

    /// Ends the use of the kept hold.
    pub fn drop_guard(&self, state: &mut State, c: usize) {
        if let Some(hold) = &mut state.clients[c].hold {
            hold.in_use = false;
        }
        self.decide(state, c);
    }

    /// Ends the guard of a plain call.
    pub fn drop_plain(&self, state: &mut State, c: usize, at: usize) {
        let guard = state.clients[c].guards.remove(at);
        let late_until = self.late_until(state);
        self.clean_up(state, c, guard.token, late_until);
    }

    /// Asks the store to let the kept hold linger.
    pub fn ask(&self, state: &mut State, c: usize) {
        let sent_at = state.now;
        if let Some(hold) = &mut state.clients[c].hold {
            hold.is_asking = true;
            let token = hold.token;
            state.net.push(Msg::Linger { token, sent_at });
        }
    }

    /// Stops waiting for the answer to `linger`.
    pub fn stop_asking(&self, state: &mut State, c: usize) {
        if let Some(hold) = &mut state.clients[c].hold {
            hold.is_asking = false;
        }
        self.decide(state, c);
    }

    /// Gives up the guard without releasing the hold.
    pub fn detach(&self, state: &mut State, c: usize) {
        let Some(hold) = state.clients[c].hold.take() else { return };
        state.detached = Some(hold.token);
        self.pass_on(state, c);
    }

    /// Loses the kept hold and its guard.
    pub fn lose(&self, state: &mut State, c: usize) {
        let Some(hold) = state.clients[c].hold.take() else { return };
        self.clean_up(state, c, hold.token, hold.late_until);
        self.pass_on(state, c);
    }

    /// Loses the kept hold because the client has concluded that the store no longer has it.
    fn lose_missing(&self, state: &mut State, c: usize) {
        if let Some(LocalHold { token, granted, in_use: true, .. }) = state.clients[c].hold {
            let is_excused = state.history.force_released.contains(&granted);
            state.local.bad_loss |= !is_excused && self.has_record(state, token, granted);
        }
        self.lose(state, c);
    }

    /// Loses the guard of the kept hold because it missed its heartbeat.
    pub fn lose_guard(&self, state: &mut State, c: usize) {
        if !self.broken(Mutation::LossPassesNothingOn) {
            return self.lose(state, c);
        }
        let Some(hold) = state.clients[c].hold.take() else { return };
        self.clean_up(state, c, hold.token, hold.late_until);
        state.clients[c].is_stuck = true;
    }

    /// Ends everything of a session that is over.
    pub fn expire(&self, state: &mut State, c: usize) {
        let client = &mut state.clients[c];
        if state.now < client.valid_until || client.is_expired {
            return;
        }
        client.is_expired = true;
        if self.broken(Mutation::LocalWithoutSession) {
            return;
        }
        client.idle = [0; 3];
        client.hold = None;
        client.waiting.clear();
        client.turns.clear();
        client.requests.clear();
        client.guards.clear();
        client.cleanups.clear();
        client.force_released.clear();
    }

    fn has_record(&self, state: &State, token: Token, fence: u16) -> bool {
        state.store.holds.first().is_some_and(|record| record.token == token && record.fence == fence)
            && state.store.sessions[usize::from(client_of(token))].expires_at > state.now
    }

    /// Handles a grant of the store.
    fn granted(&self, state: &mut State, c: usize, at: usize, fence: u16) {
        if !self.is_session_valid(state, c) {
            return;
        }
        // The key has room for one: of two holds of a process, the older one is gone.
        if let Some(older) = state.clients[c].hold.clone()
            && !self.broken(Mutation::SupersededGoesOn)
        {
            if older.granted > fence && !self.broken(Mutation::NewerSuperseded) {
                return self.end_request(state, c, at);
            }
            let request = state.clients[c].requests.remove(at);
            self.lose_missing(state, c);
            let requests = &mut state.clients[c].requests;
            requests.insert(at.min(requests.len()), request);
        }
        let late_until = self.late_until(state);
        let granted_at = if self.broken(Mutation::ElapsedBlock) { state.now } else { 0 };
        let client = &mut state.clients[c];
        client.newest = client.newest.max(fence);
        let Request { token, is_asker, recalls, is_extra, .. } = client.requests.remove(at);
        let origin = if recalls { Origin::Attempt } else { Origin::Store };
        if !is_asker {
            client.guards.push(Guard { token, fence, origin, is_extra });
            return;
        }
        client.hold = Some(LocalHold {
            token,
            granted: fence,
            used: fence,
            up_to: fence,
            granted_at,
            leased_at: None,
            lineage: None,
            recalled_at: None,
            was_recalled: false,
            is_asking: false,
            in_use: true,
            origin,
            late_until,
        });
    }

    /// Handles a response to `acquire`, `adopt` or `poll`.
    fn outcome(&self, state: &mut State, c: usize, at: usize, outcome: Outcome) {
        match outcome {
            Outcome::Granted { fence, .. } => self.granted(state, c, at, fence),
            Outcome::Queued => state.clients[c].requests[at].is_queued = true,
            Outcome::Busy { lingers } => {
                let request = state.clients[c].requests[at].clone();
                if lingers && !request.recalls {
                    // The call goes on with another token, in the queue.
                    state.clients[c].requests.remove(at);
                    self.forget_attempt(state, c, request.token);
                    self.request(state, c, Request { recalls: true, ..request });
                } else {
                    state.clients[c].requests.remove(at);
                    self.forget_attempt(state, c, request.token);
                    if request.is_asker {
                        self.pass_on(state, c);
                    }
                }
            }
            Outcome::Gone | Outcome::Stale | Outcome::ForceReleased | Outcome::SessionGone => {
                state.clients[c].requests[at].is_queued = true;
                self.end_request(state, c, at);
            }
        }
    }

    /// Ends the token of an attempt that entered nothing in the store. A copy of the request may still arrive.
    fn forget_attempt(&self, state: &mut State, c: usize, token: Token) {
        if self.config.repeats && !self.broken(Mutation::BusyIsFinal) {
            let late_until = self.late_until(state);
            self.clean_up(state, c, token, late_until);
        }
    }

    /// Handles a response or a push.
    pub fn receive(&self, state: &mut State, c: usize, msg: &Msg) {
        if state.clients[c].is_expired && !self.broken(Mutation::LocalWithoutSession) {
            return;
        }
        match *msg {
            Msg::Acquired { token, outcome, .. } | Msg::Polled { token, outcome, .. } => {
                if let Some(at) = state.clients[c].request_of(token) {
                    self.outcome(state, c, at, outcome);
                }
            }
            Msg::Released { token, time, is_final } => {
                let is_definite = |cleanup: &Cleanup| {
                    cleanup.token == token && (is_final || cleanup.late_until.is_none_or(|until| time > until))
                };
                state.clients[c].cleanups.retain(|cleanup| !is_definite(cleanup));
                let is_idle = state.clients[c].hold_of(token).is_some_and(|hold| !hold.in_use);
                if self.broken(Mutation::ReleaseStays) && is_idle {
                    state.clients[c].hold = None;
                    self.pass_on(state, c);
                }
            }
            Msg::Lingered { token, sent_at, outcome } => self.lingered(state, c, token, sent_at, outcome),
            Msg::Renewed { sent_at, is_alive, ref force_released, .. } => {
                let client = &mut state.clients[c];
                if !is_alive {
                    client.valid_until = client.valid_until.min(state.now);
                    return self.expire(state, c);
                }
                client.valid_until = client.valid_until.max(sent_at + self.config.session_ttl);
                for token in force_released.clone() {
                    self.force_released(state, c, token);
                }
            }
            Msg::PushGranted { token, fence } => {
                if let Some(at) = state.clients[c].request_of(token) {
                    return self.granted(state, c, at, fence);
                }
                let client = &state.clients[c];
                let is_known = client.hold_of(token).is_some()
                    || client.guards.iter().any(|guard| guard.token == token)
                    || client.is_releasing(token)
                    || state.detached == Some(token);
                if !is_known && self.config.failover {
                    let late_until = self.late_until(state);
                    self.clean_up(state, c, token, late_until);
                }
            }
            Msg::PushForceReleased { token } => self.force_released(state, c, token),
            Msg::PushRecall { token } => self.recalled(state, c, token),
            _ => {}
        }
    }

    /// Handles the answer to `linger`.
    fn lingered(&self, state: &mut State, c: usize, token: Token, sent_at: u8, outcome: LingerOutcome) {
        let now = state.now;
        if self.broken(Mutation::LateAnswerRevives)
            && state.clients[c].hold.is_none()
            && let LingerOutcome::Lingers { fence, up_to, .. } = outcome
        {
            state.clients[c].hold = Some(LocalHold {
                token,
                granted: fence,
                used: up_to.saturating_sub(1),
                up_to,
                granted_at: 0,
                leased_at: Some(sent_at),
                lineage: None,
                recalled_at: None,
                was_recalled: false,
                is_asking: false,
                in_use: false,
                origin: Origin::Store,
                late_until: None,
            });
            return;
        }
        let Some(hold) = state.clients[c].hold.as_mut().filter(|hold| hold.token == token) else { return };
        hold.is_asking = false;
        match outcome {
            LingerOutcome::Lingers { fence, .. }
                if fence != hold.granted && !self.broken(Mutation::FenceNotCompared) =>
            {
                return self.lose_missing(state, c);
            }
            LingerOutcome::Lingers { up_to, lineage, .. } => {
                hold.up_to = hold.up_to.max(up_to);
                let leased_at = if self.broken(Mutation::LeaseFromReply) { now } else { sent_at };
                hold.leased_at = hold.leased_at.max(Some(leased_at));
                // The fences before the newest one may have been granted by a store that is gone.
                if self.config.compares_lineage
                    && hold.lineage.replace(lineage) != Some(lineage)
                    && !self.broken(Mutation::LineageNotCompared)
                {
                    hold.used = hold.used.max(up_to.saturating_sub(1));
                }
            }
            LingerOutcome::Wanted => return self.recalled(state, c, token),
            LingerOutcome::Gone if self.broken(Mutation::GoneIgnored) => {}
            LingerOutcome::Gone => return self.lose_missing(state, c),
        }
        self.decide(state, c);
    }

    /// Handles a recall.
    fn recalled(&self, state: &mut State, c: usize, token: Token) {
        let now = state.now;
        let client = &mut state.clients[c];
        let Some(hold) = client.hold.as_mut().filter(|hold| hold.token == token) else { return };
        hold.was_recalled = true;
        if hold.in_use && self.broken(Mutation::RecallEndsUse) {
            let late_until = hold.late_until;
            return self.clean_up(state, c, token, late_until);
        }
        if hold.in_use && self.broken(Mutation::RecallForgotten) {
            return;
        }
        if hold.recalled_at.is_none() {
            hold.recalled_at = Some(now);
            client.is_off |= self.config.backs_off && hold.used == hold.granted;
        }
        self.decide(state, c);
    }

    /// Handles the report of a force-release.
    fn force_released(&self, state: &mut State, c: usize, token: Token) {
        let client = &mut state.clients[c];
        if !client.force_released.contains(&token) {
            client.force_released.push(token);
        }
        if let Some(hold) = client.hold.as_mut().filter(|hold| hold.token == token) {
            if self.broken(Mutation::ForceReleasedGoesOn) {
                hold.in_use = false;
                return;
            }
            return self.lose(state, c);
        }
        if let Some(at) = client.request_of(token) {
            return self.end_request(state, c, at);
        }
        client.guards.retain(|guard| guard.token != token);
        let late_until = self.late_until(state);
        self.clean_up(state, c, token, late_until);
    }
}
