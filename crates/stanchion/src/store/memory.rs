//! The memory store: the reference for what every store does, and a store for tests.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;

use super::*;
use crate::clock::Clock;

/// Locks in the memory of this process.
///
/// Clones share their data, so that two handles opened on clones behave like two processes. Sessions live by beats on
/// the store's clock: with a [`VirtualClock`](crate::VirtualClock) a test decides when one dies.
///
/// ```
/// use std::time::Duration;
/// use stanchion::{Locks, VirtualClock, store::Memory};
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let time = VirtualClock::new();
/// let locks = Locks::builder_with_store(Memory::with_clock(time.clock())).clock(time.clock()).open().await?;
/// let guard = locks.lock("job").ttl(Duration::from_secs(60)).await?;
/// time.advance(Duration::from_secs(61));
/// assert!(!guard.is_held());
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct Memory {
    clock: Clock,
    state: Arc<Mutex<State>>,
}

impl Memory {
    /// An empty store on the machine's clock.
    pub fn new() -> Self {
        Self::with_clock(Clock::system())
    }

    /// An empty store on this clock.
    pub fn with_clock(clock: Clock) -> Self {
        Self { clock, state: Arc::default() }
    }

    /// Takes the state and the time of the step together, so that time does not run backwards between steps.
    fn step(&self) -> Step<'_> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = StoreTime::from_micros(self.clock.now().as_nanos() / 1_000);
        Step { state, now, wall: self.clock.wall(), wall_micros: self.clock.wall_micros() }
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

#[derive(Debug, Default)]
struct State {
    sessions: HashMap<SessionId, Session>,
    /// Sessions that have ended and when they may be forgotten: nobody sends for them any more.
    ended: HashMap<SessionId, StoreTime>,
    pushes: HashMap<SessionId, PushSender>,
    keys: BTreeMap<String, Record>,
    forced: HashMap<TokenId, (SessionId, LostToken)>,
    /// At least as high as every fence of a key whose record was dropped.
    fence_floor: Option<Fence>,
}

#[derive(Debug)]
struct Session {
    owner: Arc<str>,
    ttl: Duration,
    expires: StoreTime,
}

#[derive(Debug)]
struct Record {
    key: Key,
    last: Option<Fence>,
    closed_until: Option<StoreTime>,
    holds: Vec<Hold>,
    queue: VecDeque<Waiter>,
}

#[derive(Debug)]
struct Hold {
    token: TokenId,
    session: SessionId,
    session_bound: bool,
    deadline: Option<StoreTime>,
    fence: Fence,
    demand: Demand,
    owner: Arc<str>,
    at: StoreTime,
    since: SystemTime,
    metadata: Option<String>,
    trace: Option<String>,
}

#[derive(Debug)]
struct Waiter {
    token: TokenId,
    session: SessionId,
    demand: Demand,
    term: Term,
    owner: Arc<str>,
    at: StoreTime,
    metadata: Option<String>,
    trace: Option<String>,
}

impl Record {
    fn capacity(&self) -> Option<u32> {
        self.holds
            .first()
            .map(|hold| hold.demand)
            .or(self.queue.front().map(|waiter| waiter.demand))
            .map(Demand::capacity)
    }

    fn fits(&self, demand: Demand, now: StoreTime) -> bool {
        let used: u64 = self.holds.iter().map(|hold| u64::from(hold.demand.units())).sum();
        let open = self.closed_until.is_none_or(|until| until <= now);
        open && used + u64::from(demand.units()) <= u64::from(demand.capacity())
    }

    fn hold(&self, token: TokenId) -> Option<&Hold> {
        self.holds.iter().find(|hold| hold.token == token)
    }
}

impl Hold {
    fn granted(&self, now: StoreTime) -> Granted {
        Granted { fence: self.fence, remaining: self.deadline.map(|deadline| deadline.since(now)) }
    }
}

/// One atomic step: the state, locked, and the time at which it is done.
struct Step<'a> {
    state: MutexGuard<'a, State>,
    now: StoreTime,
    wall: SystemTime,
    wall_micros: u64,
}

impl Step<'_> {
    fn reply<T>(&self, outcome: T) -> Result<Reply<T>> {
        Ok(Reply { time: self.now, outcome })
    }

    fn lives(&self, session: SessionId) -> bool {
        self.state.sessions.get(&session).is_some_and(|session| session.expires > self.now)
    }

    fn end_session(&mut self, session: SessionId) {
        self.state.pushes.remove(&session);
        if let Some(ended) = self.state.sessions.remove(&session) {
            let forget_at = self.now.after(ended.ttl.saturating_mul(2).max(Duration::from_secs(60)));
            self.state.ended.insert(session, forget_at);
        }
        self.state.forced.retain(|_, (of, _)| *of != session);
        let now = self.now;
        self.state.ended.retain(|_, forget_at| *forget_at > now);
    }

    /// Takes the record of a key out, settled. [`Step::put`] puts it back.
    fn take(&mut self, key: &Key) -> Record {
        let mut record = self.state.keys.remove(key.as_encoded()).unwrap_or_else(|| Record {
            key: key.clone(),
            last: self.state.fence_floor,
            closed_until: None,
            holds: Vec::new(),
            queue: VecDeque::new(),
        });
        self.settle(&mut record);
        record
    }

    fn put(&mut self, mut record: Record) {
        self.settle(&mut record);
        if record.holds.is_empty() && record.queue.is_empty() && record.closed_until.is_none() {
            // Nothing but a fence: one floor for all idle keys remembers enough, and no key leaks.
            self.state.fence_floor = self.state.fence_floor.max(record.last);
        } else {
            self.state.keys.insert(record.key.as_encoded().to_owned(), record);
        }
    }

    fn settle(&mut self, record: &mut Record) {
        let now = self.now;
        record.holds.retain(|hold| {
            hold.deadline.is_none_or(|deadline| deadline > now) && (!hold.session_bound || self.lives(hold.session))
        });
        record.closed_until = record.closed_until.filter(|until| *until > now);
        while let Some(head) = record.queue.front() {
            if !self.lives(head.session) {
                record.queue.pop_front();
            } else if record.fits(head.demand, now) {
                let Some(waiter) = record.queue.pop_front() else { break };
                let (session, token) = (waiter.session, waiter.token);
                let granted = self.grant(record, waiter);
                if let Some(push) = self.state.pushes.get(&session) {
                    push.send(Push::Granted { key: record.key.clone(), token, fence: granted.fence });
                }
            } else {
                break;
            }
        }
    }

    fn grant(&self, record: &mut Record, waiter: Waiter) -> Granted {
        let fence = Fence::next(record.last, self.wall_micros);
        record.last = Some(fence);
        let hold = Hold {
            token: waiter.token,
            session: waiter.session,
            session_bound: matches!(waiter.term, Term::Session { .. }),
            deadline: waiter.term.length().map(|length| self.now.after(length)),
            fence,
            demand: waiter.demand,
            owner: waiter.owner,
            at: self.now,
            since: self.wall,
            metadata: waiter.metadata,
            trace: waiter.trace,
        };
        let granted = hold.granted(self.now);
        record.holds.push(hold);
        granted
    }

    /// When time alone may change something for a waiter: a deadline, the end of a cooldown, the end of a session.
    fn check_in(&self, record: &Record) -> Option<Duration> {
        let deadlines = record.holds.iter().filter_map(|hold| hold.deadline);
        let sessions = record
            .holds
            .iter()
            .filter(|hold| hold.session_bound)
            .filter_map(|hold| self.state.sessions.get(&hold.session).map(|session| session.expires));
        deadlines.chain(sessions).chain(record.closed_until).min().map(|at| at.since(self.now))
    }

    fn queued(&self, record: &Record, token: TokenId) -> Option<Queued> {
        let ahead = record.queue.iter().position(|waiter| waiter.token == token)?;
        Some(Queued { ahead: u32::try_from(ahead).unwrap_or(u32::MAX), check_in: self.check_in(record) })
    }

    fn acquire(&mut self, record: &mut Record, request: AcquireRequest) -> AcquireOutcome {
        if !self.lives(request.session) {
            return AcquireOutcome::SessionGone;
        }
        if self.state.forced.contains_key(&request.token) {
            return AcquireOutcome::Forced;
        }
        if let Some(hold) = record.hold(request.token) {
            return AcquireOutcome::Granted(hold.granted(self.now));
        }
        if let Some(queued) = self.queued(record, request.token) {
            return AcquireOutcome::Queued(queued);
        }
        if self.now > request.not_after {
            return AcquireOutcome::Stale;
        }
        if let Some(in_use) = record.capacity().filter(|in_use| *in_use != request.demand.capacity()) {
            return AcquireOutcome::CapacityMismatch { in_use };
        }
        let goes_now = record.queue.is_empty() && record.fits(request.demand, self.now);
        if !goes_now && !request.enqueue {
            return AcquireOutcome::Busy { check_in: self.check_in(record) };
        }
        let owner = self.state.sessions.get(&request.session).map(|session| session.owner.clone()).unwrap_or_default();
        let waiter = Waiter {
            token: request.token,
            session: request.session,
            demand: request.demand,
            term: request.term,
            owner,
            at: self.now,
            metadata: request.metadata,
            trace: request.trace,
        };
        if goes_now {
            return AcquireOutcome::Granted(self.grant(record, waiter));
        }
        if record.queue.len() >= MAX_WAITERS as usize {
            record.queue.retain(|waiter| self.lives(waiter.session));
        }
        if record.queue.len() >= MAX_WAITERS as usize {
            return AcquireOutcome::QueueFull { limit: MAX_WAITERS };
        }
        record.queue.push_back(waiter);
        match self.queued(record, request.token) {
            Some(queued) => AcquireOutcome::Queued(queued),
            None => AcquireOutcome::Busy { check_in: None },
        }
    }

    fn end(&mut self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> EndOutcome {
        self.state.forced.remove(&token);
        let mut record = self.take(key);
        let outcome = if let Some(at) = record.holds.iter().position(|hold| hold.token == token) {
            record.holds.remove(at);
            if let Some(cooldown) = cooldown {
                record.closed_until = record.closed_until.max(Some(self.now.after(cooldown)));
            }
            EndOutcome::Released
        } else if let Some(at) = record.queue.iter().position(|waiter| waiter.token == token) {
            record.queue.remove(at);
            EndOutcome::Dequeued
        } else {
            EndOutcome::Nothing
        };
        self.put(record);
        outcome
    }

    fn state_of(&self, record: &Record) -> KeyState {
        KeyState {
            key: record.key.clone(),
            capacity: record.capacity(),
            holders: record
                .holds
                .iter()
                .map(|hold| HolderState {
                    fence: hold.fence,
                    owner: hold.owner.to_string(),
                    units: hold.demand.units(),
                    session_bound: hold.session_bound,
                    age: self.now.since(hold.at),
                    since: hold.since,
                    remaining: hold.deadline.map(|deadline| deadline.since(self.now)),
                    metadata: hold.metadata.clone(),
                    trace: hold.trace.clone(),
                })
                .collect(),
            waiters: record
                .queue
                .iter()
                .filter(|waiter| self.lives(waiter.session))
                .map(|waiter| WaiterState {
                    owner: waiter.owner.to_string(),
                    units: waiter.demand.units(),
                    age: self.now.since(waiter.at),
                    metadata: waiter.metadata.clone(),
                    trace: waiter.trace.clone(),
                })
                .collect(),
            last_fence: record.last,
            closed_for: record.closed_until.map(|until| until.since(self.now)),
        }
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Store for Memory {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new("memory")
    }

    async fn open_session(&self, request: OpenSession) -> Result<Reply<OpenOutcome>> {
        let mut step = self.step();
        let id = request.session;
        if step.state.sessions.contains_key(&id) && !step.lives(id) {
            step.end_session(id);
        }
        if step.state.ended.contains_key(&id) {
            return step.reply(OpenOutcome::Gone);
        }
        let expires = step.now.after(request.ttl);
        let session = Session { owner: request.owner.into(), ttl: request.ttl, expires };
        step.state.sessions.entry(id).or_insert(session);
        step.reply(OpenOutcome::Opened)
    }

    async fn beat(&self, id: SessionId) -> Result<Reply<BeatOutcome>> {
        let mut step = self.step();
        if !step.lives(id) {
            step.end_session(id);
            return step.reply(BeatOutcome::Gone);
        }
        let now = step.now;
        if let Some(session) = step.state.sessions.get_mut(&id) {
            session.expires = now.after(session.ttl);
        }
        let lost = step.state.forced.values().filter(|(of, _)| *of == id).map(|(_, lost)| lost.clone()).collect();
        step.reply(BeatOutcome::Alive { lost })
    }

    async fn close_session(&self, id: SessionId) -> Result<Reply<()>> {
        let mut step = self.step();
        step.end_session(id);
        let touched: Vec<Key> = step
            .state
            .keys
            .values()
            .filter(|record| {
                record.holds.iter().any(|hold| hold.session == id)
                    || record.queue.iter().any(|waiter| waiter.session == id)
            })
            .map(|record| record.key.clone())
            .collect();
        for key in touched {
            let mut record = step.take(&key);
            record.queue.retain(|waiter| waiter.session != id);
            step.put(record);
        }
        step.reply(())
    }

    async fn acquire(&self, request: AcquireRequest) -> Result<Reply<AcquireOutcome>> {
        let mut step = self.step();
        let mut record = step.take(&request.key);
        let outcome = step.acquire(&mut record, request);
        step.put(record);
        step.reply(outcome)
    }

    async fn poll(&self, key: &Key, token: TokenId) -> Result<Reply<PollOutcome>> {
        let mut step = self.step();
        let record = step.take(key);
        let outcome = if let Some(hold) = record.hold(token) {
            PollOutcome::Granted(hold.granted(step.now))
        } else if let Some(queued) = step.queued(&record, token) {
            PollOutcome::Queued(queued)
        } else {
            PollOutcome::Gone
        };
        step.put(record);
        step.reply(outcome)
    }

    async fn abandon(&self, key: &Key, token: TokenId) -> Result<Reply<EndOutcome>> {
        let mut step = self.step();
        let outcome = step.end(key, token, None);
        step.reply(outcome)
    }

    async fn release(&self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<Reply<EndOutcome>> {
        let mut step = self.step();
        let outcome = step.end(key, token, cooldown);
        step.reply(outcome)
    }

    async fn extend(&self, key: &Key, token: TokenId, ttl: Duration) -> Result<Reply<ExtendOutcome>> {
        let mut step = self.step();
        let mut record = step.take(key);
        let deadline = step.now.after(ttl);
        let hold = record.holds.iter_mut().find(|hold| hold.token == token && hold.deadline.is_some());
        let outcome = match hold {
            Some(hold) => {
                hold.deadline = Some(deadline);
                ExtendOutcome::Extended
            }
            None => ExtendOutcome::NotHeld,
        };
        step.put(record);
        step.reply(outcome)
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Reply<AdoptOutcome>> {
        let mut step = self.step();
        if !step.lives(request.session) {
            return step.reply(AdoptOutcome::SessionGone);
        }
        let owner = step.state.sessions.get(&request.session).map(|session| session.owner.clone()).unwrap_or_default();
        let mut record = step.take(&request.key);
        let (now, late) = (step.now, step.now > request.not_after);
        let outcome = if let Some(hold) = record.hold(request.to) {
            AdoptOutcome::Adopted { granted: hold.granted(now), session_bound: hold.session_bound }
        } else if late {
            AdoptOutcome::Stale
        } else if let Some(hold) = record.holds.iter_mut().find(|hold| hold.token == request.from) {
            hold.token = request.to;
            hold.session = request.session;
            hold.owner = owner;
            AdoptOutcome::Adopted { granted: hold.granted(now), session_bound: hold.session_bound }
        } else {
            AdoptOutcome::Gone
        };
        step.put(record);
        step.reply(outcome)
    }

    async fn evict(&self, request: EvictRequest) -> Result<Reply<EvictOutcome>> {
        let mut step = self.step();
        let mut record = step.take(&request.key);
        let outcome = match record.holds.iter().position(|hold| hold.fence == request.fence) {
            Some(at) => {
                let hold = record.holds.remove(at);
                record.last = Some(Fence::next(record.last, step.wall_micros));
                let lost = LostToken { key: request.key.clone(), token: hold.token, reason: request.reason };
                if let Some(push) = step.state.pushes.get(&hold.session) {
                    push.send(Push::Forced(lost.clone()));
                }
                if step.lives(hold.session) {
                    step.state.forced.insert(hold.token, (hold.session, lost));
                }
                EvictOutcome::Evicted
            }
            None => EvictOutcome::NoSuchHold { live: record.holds.iter().map(|hold| hold.fence).collect() },
        };
        step.put(record);
        step.reply(outcome)
    }

    async fn inspect(&self, key: &Key) -> Result<Reply<KeyState>> {
        let mut step = self.step();
        let record = step.take(key);
        let state = step.state_of(&record);
        step.put(record);
        step.reply(state)
    }

    async fn list(&self, prefix: &str, after: Option<&Key>, limit: usize) -> Result<Reply<Vec<KeyState>>> {
        let mut step = self.step();
        let from = after.map_or(prefix, |after| after.as_encoded().max(prefix)).to_owned();
        let mut listed = Vec::new();
        // Settling may drop a record, so keys are taken one by one.
        let mut keys: Vec<Key> = step.state.keys.range(from..).map(|(_, record)| record.key.clone()).collect();
        keys.retain(|key| Some(key) != after);
        for key in keys {
            if listed.len() >= limit || !key.as_encoded().starts_with(prefix) {
                break;
            }
            let record = step.take(&key);
            let idle = record.holds.is_empty() && record.queue.is_empty() && record.closed_until.is_none();
            if !idle {
                listed.push(step.state_of(&record));
            }
            step.put(record);
        }
        step.reply(listed)
    }

    fn grants(&self, session: SessionId) -> GrantStream {
        let (sender, stream) = push_channel();
        self.step().state.pushes.insert(session, sender);
        stream
    }
}
