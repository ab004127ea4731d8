//! The memory store: the reference for what every store does, and a store for tests.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;

use self::step::{Operation, Session, State};
use super::*;
use crate::clock::Clock;
use crate::fence::Fence;

mod step;

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
    fn step(&self) -> Operation<'_> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = StoreTime::from_micros(self.clock.now().as_nanos() / 1_000);
        Operation { state, now, wall: self.clock.wall(), wall_micros: self.clock.wall_micros() }
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Store for Memory {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new("memory").with_authentic_push()
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

    async fn renew_session(&self, id: SessionId) -> Result<Reply<RenewOutcome>> {
        let mut step = self.step();
        if !step.lives(id) {
            step.end_session(id);
            return step.reply(RenewOutcome::Gone);
        }
        let now = step.now;
        if let Some(session) = step.state.sessions.get_mut(&id) {
            session.expires = now.after(session.ttl);
        }
        let lost = step.state.forced.values().filter(|(of, _)| *of == id).map(|(_, lost)| lost.clone()).collect();
        step.reply(RenewOutcome::Alive { lost })
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

    async fn session_lives(&self, id: SessionId) -> Result<Reply<bool>> {
        let step = self.step();
        step.reply(step.lives(id))
    }

    async fn acquire(&self, request: AcquireRequest) -> Result<Reply<AcquireOutcome>> {
        let mut step = self.step();
        let mut record = step.take(&request.key);
        let outcome = step.acquire(&mut record, request);
        step.put(record);
        step.reply(outcome?)
    }

    async fn poll(&self, key: &Key, tokens: &[TokenId]) -> Result<Reply<Vec<PollOutcome>>> {
        let mut step = self.step();
        let record = step.take(key);
        let outcomes = step.poll(&record, tokens);
        let waits = outcomes.iter().any(|outcome| matches!(outcome, PollOutcome::Queued(_)));
        let is_used_up = waits && step.next_fence(&record).is_none();
        step.put(record);
        if is_used_up { Err(Fence::used_up()) } else { step.reply(outcomes) }
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

    async fn force_release(&self, request: ForceReleaseRequest) -> Result<Reply<ForceReleaseOutcome>> {
        let mut step = self.step();
        let mut record = step.take(&request.key);
        let outcome = match record.holds.iter().position(|hold| hold.fence == request.fence) {
            Some(at) => {
                let hold = record.holds.remove(at);
                // Nothing is granted after the highest fence, so it need not be raised.
                record.last = Fence::next(record.last, step.wall_micros).or(record.last);
                let lost = LostToken { key: request.key.clone(), token: hold.token, reason: request.reason };
                if let Some(push) = step.state.pushes.get(&hold.session) {
                    push.send(Push::ForceReleased(lost.clone()));
                }
                if step.lives(hold.session) {
                    step.state.forced.insert(hold.token, (hold.session, lost));
                }
                ForceReleaseOutcome::Released
            }
            None => ForceReleaseOutcome::NoSuchHold { live: record.holds.iter().map(|hold| hold.fence).collect() },
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

    async fn list(&self, prefix: &str, cursor: Option<&Cursor>, limit: usize) -> Result<Reply<Listing>> {
        let mut step = self.step();
        let mut listing = Listing::default();
        let after = cursor.map_or("", Cursor::as_str);
        // Settling may drop a record, so keys are taken one by one.
        let within = step.state.keys.range(after.max(prefix).to_owned()..).map(|(_, record)| record.key.clone());
        let within = within.take_while(|key| key.as_encoded().starts_with(prefix));
        let keys: Vec<Key> = within.filter(|key| key.as_encoded() != after).take(limit.max(1)).collect();
        if keys.len() == limit.max(1) {
            listing.next = keys.last().map(|key| Cursor::new(key.as_encoded()));
        }
        for key in keys {
            let record = step.take(&key);
            let idle = record.holds.is_empty() && record.queue.is_empty() && record.closed_until.is_none();
            if !idle {
                listing.keys.push(step.state_of(&record));
            }
            step.put(record);
        }
        step.reply(listing)
    }

    fn grants(&self, session: SessionId) -> GrantStream {
        let (sender, stream) = push_channel();
        self.step().state.pushes.insert(session, sender);
        stream
    }
}
