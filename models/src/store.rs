//! Models the store, which runs one atomic operation per request.

use crate::config::{Config, Demand, Lifetime};
use crate::history::History;
use crate::message::{LingerOutcome, Msg, Outcome, TOKENS_PER_CLIENT, Token};
use crate::mutant::Mutation;

/// Token of the detached hold at the start of an `adopt` run.
pub const DETACHED: Token = 255 * TOKENS_PER_CLIENT;

/// Number of fences that a grant reserves, in the mutants that reserve fences with a grant.
pub const BLOCK: u16 = 8;

/// Record of a session.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SessionRecord {
    /// Time at which the session expires.
    pub expires_at: u8,
    /// Force-released tokens that their holders have not released yet.
    pub force_released: Vec<Token>,
}

/// Record of a hold.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HoldRecord {
    /// Token of the hold.
    pub token: Token,
    /// Fence of the hold.
    pub fence: u16,
    /// Session of the hold.
    pub session: u8,
    /// Deadline of a fixed lifetime.
    pub expires_at: Option<u8>,
    /// Whether the hold ends with its session.
    pub is_bound: bool,
    /// Units and capacity.
    pub demand: Demand,
    /// Whether the hold lingers: its holder may keep it without using it, until it is recalled.
    pub lingers: bool,
}

/// Record of a waiter in the queue.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct WaiterRecord {
    /// Token of the waiter.
    pub token: Token,
    /// Session of the waiter.
    pub session: u8,
    /// Requested lifetime.
    pub lifetime: Lifetime,
    /// Units and capacity.
    pub demand: Demand,
}

/// Records of the store.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Store {
    /// Sessions, by client.
    pub sessions: Vec<SessionRecord>,
    /// Holds of the key.
    pub holds: Vec<HoldRecord>,
    /// Queue of the key in order of arrival.
    pub queue: Vec<WaiterRecord>,
    /// Newest fence in the key's record.
    pub last: u16,
}

/// One operation on the store, with its context.
#[derive(Debug)]
pub struct StoreOperation<'a> {
    /// Bounds of the run.
    pub config: &'a Config,
    /// Rule that is broken.
    pub broken: Option<Mutation>,
    /// Records of the store.
    pub store: &'a mut Store,
    /// Past events that the properties need.
    pub history: &'a mut History,
    /// Time of the store's clock.
    pub now: u8,
    /// Number of ticks by which the clock of the fences was set back.
    pub set_back: u8,
    /// Number of times that the store has lost records or another store has taken over.
    pub lineage: u8,
    /// Grants of this operation.
    pub grants: Vec<(Token, u16)>,
    /// Responses and pushes of this operation.
    pub out: Vec<Msg>,
    /// Tokens of live calls, for `I8`.
    pub live: Vec<Token>,
}

impl StoreOperation<'_> {
    fn broken(&self, rule: Mutation) -> bool {
        self.broken == Some(rule)
    }

    /// Returns whether a session is alive.
    pub fn is_alive(&self, session: u8) -> bool {
        self.store.sessions.get(usize::from(session)).is_some_and(|session| self.now < session.expires_at)
    }

    /// Pushes all session-bound grants to their sessions again.
    fn repeat_grants(&mut self) {
        if !self.broken(Mutation::GrantNotRepeated) {
            let held = self.store.holds.iter().filter(|hold| hold.is_bound);
            self.out.extend(held.map(|hold| Msg::PushGranted { token: hold.token, fence: hold.fence }));
        }
    }

    /// Returns whether a request fits: all units together must not exceed the smallest capacity.
    pub fn fits(&self, demand: Demand) -> bool {
        let used: u8 = self.store.holds.iter().map(|hold| hold.demand.units).sum();
        let mut held = self.store.holds.iter().map(|hold| hold.demand.capacity);
        let capacity = if self.broken(Mutation::OwnLimitCounts) {
            demand.capacity
        } else if self.broken(Mutation::OldestLimitCounts) {
            held.next().unwrap_or(demand.capacity)
        } else {
            let own = if self.broken(Mutation::HeldLimitCounts) { u8::MAX } else { demand.capacity };
            held.min().unwrap_or(demand.capacity).min(own)
        };
        used + demand.units <= capacity
    }

    /// Returns the position in the queue of the next waiter to grant.
    fn next(&self) -> Option<usize> {
        let candidates = if self.broken(Mutation::QueueSearched) { self.store.queue.len() } else { 1 };
        self.store.queue.iter().take(candidates).position(|waiter| self.fits(waiter.demand))
    }

    fn fence_clock(&self) -> u16 {
        let clock = u16::from(self.now.saturating_sub(self.set_back)) * self.config.fences_per_tick;
        if self.broken(Mutation::PlainCounter) { 0 } else { clock }
    }

    /// Returns the fence of the next grant.
    fn next_fence(&self) -> u16 {
        (self.store.last + 1).max(self.fence_clock())
    }

    fn grant(&mut self, waiter: &WaiterRecord, ahead: usize) -> (u16, Option<u8>) {
        self.history.bad_order |= ahead > 0;
        let mut fence = self.next_fence();
        let mut newest = fence;
        if self.broken(Mutation::ElapsedBlock) || self.broken(Mutation::WholeBlock) {
            newest = fence + BLOCK - 1;
        } else if self.broken(Mutation::PastBlock) {
            fence = (self.store.last + 1).max(self.fence_clock().saturating_sub(BLOCK - 1));
            newest = (fence + BLOCK - 1).max(self.fence_clock());
        }
        self.store.last = newest;
        let lingers = newest != fence;
        let expires_at = waiter.lifetime.has_deadline().then(|| self.now + self.config.fixed_ttl);
        let is_bound = waiter.lifetime.is_bound();
        let (token, session, demand) = (waiter.token, waiter.session, waiter.demand);
        self.store.holds.push(HoldRecord { token, fence, session, expires_at, is_bound, demand, lingers });
        self.grants.push((token, fence));
        self.history.granted(waiter.token, fence, self.live.contains(&waiter.token));
        (fence, expires_at)
    }

    /// Reconciles the key: removes expired holds and waiters, and then grants to the head of the queue while it fits.
    pub fn reconcile(&mut self) {
        let (now, blind) = (self.now, self.config.blind);
        let live: Vec<bool> = self.store.sessions.iter().map(|session| now < session.expires_at).collect();
        let is_alive = |session: u8| blind || live.get(usize::from(session)).copied().unwrap_or(false);
        let keep = self.broken(Mutation::NoExpiry);
        self.store.holds.retain(|hold| {
            hold.expires_at.is_none_or(|expires_at| now < expires_at)
                && (!hold.is_bound || keep || is_alive(hold.session))
        });
        self.store.queue.retain(|waiter| is_alive(waiter.session));
        while let Some(at) = self.next() {
            let head = self.store.queue[at].clone();
            if self.broken(Mutation::HeadNotPopped) {
                if self.store.holds.iter().any(|hold| hold.token == head.token) {
                    break;
                }
            } else {
                self.store.queue.remove(at);
            }
            let (fence, _) = self.grant(&head, at);
            self.out.push(Msg::PushGranted { token: head.token, fence });
        }
    }

    /// Runs one request.
    pub fn run(&mut self, msg: &Msg) {
        match *msg {
            Msg::Renew { by, sent_at } => return self.renew(by, sent_at),
            Msg::Write { fence } => return self.write(fence),
            Msg::Open { by, sent_at } => return self.open(by, sent_at),
            _ => self.reconcile(),
        }
        match *msg {
            Msg::Acquire { token, by, lifetime, not_after, sent_at, enqueue } => {
                let outcome = self.acquire(token, by, lifetime, Some(not_after), enqueue);
                self.out.push(Msg::Acquired { token, outcome, sent_at });
                if outcome == Outcome::Queued {
                    self.recall(token);
                }
            }
            Msg::Poll { token, by, lifetime, sent_at } => {
                let outcome = if self.broken(Mutation::PollCreates) {
                    self.acquire(token, by, lifetime, None, true)
                } else {
                    self.find(token).unwrap_or(Outcome::Gone)
                };
                self.out.push(Msg::Polled { token, outcome, sent_at });
                if outcome == Outcome::Queued {
                    self.recall(token);
                }
                // A failover may have undone a release, so repeat the grants.
                if self.config.failover && self.store.queue.first().is_some_and(|head| head.token == token) {
                    self.repeat_grants();
                }
            }
            Msg::Release { token, held, is_final } => {
                self.release(token, held);
                self.out.push(Msg::Released { token, time: self.now, is_final });
            }
            Msg::Extend { token, by, fence, nth, sent_at } => {
                let done = self.extend(token, by, fence, nth);
                self.out.push(Msg::Extended { token, done, nth, sent_at });
            }
            Msg::Linger { token, sent_at } => {
                let outcome = self.linger(token);
                self.out.push(Msg::Lingered { token, sent_at, outcome });
            }
            Msg::PollFromOutside => self.repeat_grants(),
            Msg::ForceRelease { fence } => self.force_release(fence),
            Msg::Expire { fence } => self.expire(fence),
            Msg::Adopt { from, to, by, not_after, sent_at } => {
                let outcome = self.adopt(from, to, by, not_after);
                self.out.push(Msg::Acquired { token: to, outcome, sent_at });
            }
            Msg::RecordForceRelease { session, token } if self.is_alive(session) => {
                self.store.sessions[usize::from(session)].force_released.push(token);
            }
            Msg::Close { by } => {
                self.store.sessions[usize::from(by)].expires_at = 0;
                self.history.expire_session(by);
            }
            _ => {}
        }
        self.reconcile();
    }

    fn renew(&mut self, by: u8, sent_at: u8) {
        let revive = self.broken(Mutation::Revive) || self.broken(Mutation::ReviveAndTrust);
        let is_alive = self.is_alive(by) || revive;
        let session = &mut self.store.sessions[usize::from(by)];
        if is_alive {
            session.expires_at = self.now + self.config.session_ttl;
        }
        let force_released = if self.broken == Some(Mutation::ForceReleaseNotReported) {
            Vec::new()
        } else {
            session.force_released.clone()
        };
        self.out.push(Msg::Renewed { by, sent_at, is_alive, force_released });
    }

    /// Handles a request to open a session. A repeated request does not renew the session.
    fn open(&mut self, by: u8, sent_at: u8) {
        let is_alive = self.is_alive(by) || self.broken(Mutation::OpenRevives);
        if !self.is_alive(by) && is_alive {
            self.store.sessions[usize::from(by)].expires_at = self.now + self.config.session_ttl;
        }
        self.out.push(Msg::Opened { by, sent_at, is_alive });
    }

    fn write(&mut self, fence: u16) {
        if fence >= self.history.accepted || self.broken(Mutation::ResourceUnfenced) {
            self.history.write(fence);
        }
    }

    /// Returns the token's hold or place in the queue.
    fn find(&self, token: Token) -> Option<Outcome> {
        if let Some(hold) = self.store.holds.iter().find(|hold| hold.token == token) {
            let remaining = hold.expires_at.map(|expires_at| expires_at - self.now);
            return Some(Outcome::Granted { fence: hold.fence, remaining });
        }
        self.store.queue.iter().any(|waiter| waiter.token == token).then_some(Outcome::Queued)
    }

    fn acquire(&mut self, token: Token, by: u8, lifetime: Lifetime, not_after: Option<u8>, enqueue: bool) -> Outcome {
        if !self.config.blind && !self.is_alive(by) {
            return Outcome::SessionGone;
        }
        if !self.broken(Mutation::ForceReleasedReenters)
            && self.store.sessions[usize::from(by)].force_released.contains(&token)
        {
            return Outcome::ForceReleased;
        }
        if let (Some(found), false) = (self.find(token), self.broken(Mutation::NotIdempotent)) {
            return found;
        }
        if not_after.is_some_and(|until| self.now > until) && !self.broken(Mutation::NoNotAfter) {
            return Outcome::Stale;
        }
        let waiter = WaiterRecord { token, session: by, lifetime, demand: self.config.demand(by) };
        let ahead = self.store.queue.len();
        if (ahead == 0 || self.broken(Mutation::QueuePassed)) && self.fits(waiter.demand) {
            let (fence, expires_at) = self.grant(&waiter, ahead);
            return Outcome::Granted { fence, remaining: expires_at.map(|expires_at| expires_at - self.now) };
        }
        if !enqueue {
            return Outcome::Busy { lingers: self.store.holds.iter().any(|hold| hold.lingers) };
        }
        self.store.queue.push(waiter);
        Outcome::Queued
    }

    /// Recalls a hold that lingers, if the head of the queue waits for it.
    fn recall(&mut self, token: Token) {
        if self.store.queue.first().is_some_and(|head| head.token == token) {
            let lingering = self.store.holds.iter().filter(|hold| hold.lingers);
            self.out.extend(lingering.map(|hold| Msg::PushRecall { token: hold.token }));
        }
    }

    /// Marks a hold as lingering and reserves fences for local grants, unless a request waits for the key.
    fn linger(&mut self, token: Token) -> LingerOutcome {
        let is_wanted = !self.store.queue.is_empty() && !self.broken(Mutation::WantedNotReported);
        let up_to = self.store.last.max(self.fence_clock());
        let lineage = self.lineage;
        let Some(at) = self.store.holds.iter().position(|hold| hold.token == token) else { return LingerOutcome::Gone };
        if is_wanted && self.broken(Mutation::LingerReleases) {
            self.store.holds.remove(at);
            return LingerOutcome::Gone;
        }
        if is_wanted {
            return LingerOutcome::Wanted;
        }
        let hold = &mut self.store.holds[at];
        hold.lingers = true;
        if self.broken != Some(Mutation::CounterNotRaised) {
            self.store.last = up_to;
        }
        LingerOutcome::Lingers { fence: hold.fence, up_to, lineage }
    }

    fn release(&mut self, token: Token, held: bool) {
        if held && self.broken(Mutation::ReleaseWithoutToken) {
            self.store.holds.clear();
        } else if held || !self.broken(Mutation::AbandonDequeuesOnly) {
            self.store.holds.retain(|hold| hold.token != token);
        }
        self.store.queue.retain(|waiter| waiter.token != token);
        for session in &mut self.store.sessions {
            session.force_released.retain(|force_released| *force_released != token);
        }
    }

    fn extend(&mut self, token: Token, by: u8, fence: u16, nth: u8) -> bool {
        let expires_at = self.now + self.config.extension(nth);
        if let Some(hold) = self.store.holds.iter_mut().find(|hold| hold.token == token) {
            hold.expires_at = Some(expires_at);
            return true;
        }
        if self.broken(Mutation::ExtendCreates) {
            let demand = self.config.demand(by);
            self.store.holds.push(HoldRecord {
                token,
                fence,
                session: by,
                expires_at: Some(expires_at),
                is_bound: false,
                demand,
                lingers: false,
            });
            return true;
        }
        false
    }

    fn force_release(&mut self, fence: u16) {
        let any = self.broken(Mutation::ForceReleaseWithoutCompare);
        let Some(at) = self.store.holds.iter().position(|hold| any || hold.fence == fence) else { return };
        let hold = self.store.holds.remove(at);
        self.store.last = if self.broken(Mutation::ForceForgetsCounter) { hold.fence } else { self.store.last + 1 };
        self.history.record_force_release(fence);
        if self.broken(Mutation::ForceReleaseInTwoOperations) {
            self.out.push(Msg::RecordForceRelease { session: hold.session, token: hold.token });
        } else if self.is_alive(hold.session) {
            let force_released = &mut self.store.sessions[usize::from(hold.session)].force_released;
            force_released.push(hold.token);
            force_released.sort_unstable();
        }
        self.out.push(Msg::PushForceReleased { token: hold.token });
    }

    fn expire(&mut self, fence: u16) {
        let any = self.broken(Mutation::ExpiryWithoutCompare);
        if let Some(at) = self.store.holds.iter().position(|hold| any || hold.fence == fence) {
            self.store.holds.remove(at);
        }
    }

    fn adopt(&mut self, from: Token, to: Token, by: u8, not_after: u8) -> Outcome {
        if !self.is_alive(by) {
            return Outcome::SessionGone;
        }
        if let Some(found) = self.find(to) {
            return found;
        }
        if self.now > not_after && !self.broken(Mutation::AdoptNoNotAfter) {
            return Outcome::Stale;
        }
        let any = self.broken(Mutation::AdoptWithoutCompare);
        let next_fence = self.next_fence();
        let Some(hold) = self.store.holds.iter_mut().find(|hold| any || hold.token == from) else {
            return Outcome::Gone;
        };
        hold.token = to;
        hold.session = by;
        if hold.lingers {
            hold.lingers = false;
            if self.broken != Some(Mutation::AdoptKeepsFence) {
                hold.fence = next_fence;
                self.store.last = next_fence;
            }
        }
        self.history.adopted(hold.fence);
        self.find(to).unwrap_or(Outcome::Gone)
    }
}
