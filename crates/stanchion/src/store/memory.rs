//! The memory store: a store for tests, and the reference for the behaviour of every store.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;

use self::state::{Session, State, Transaction};
use super::*;
use crate::clock::Clock;
use crate::fence::Fence;
use crate::sync::lock;

mod state;

/// Keeps locks in the memory of this process.
///
/// Clones share their data, so two handles opened on clones behave like two processes. Sessions must be renewed on the
/// store's clock, so a test with a [`VirtualClock`](crate::VirtualClock) decides when a session expires.
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
    /// Creates an empty store on the system clock.
    pub fn new() -> Self {
        Self::with_clock(Clock::system())
    }

    /// Creates an empty store on this clock.
    pub fn with_clock(clock: Clock) -> Self {
        Self { clock, state: Arc::default() }
    }

    /// Locks the state, and then reads the clock, so that time does not run backwards between two transactions.
    fn begin(&self) -> Transaction<'_> {
        let state = lock(&self.state);
        let now = StoreTime::from_micros(self.clock.now().as_nanos() / 1_000);
        Transaction { state, now, wall: self.clock.wall(), wall_micros: self.clock.wall_micros() }
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
        let mut tx = self.begin();
        let id = request.session;
        if tx.state.sessions.contains_key(&id) && !tx.is_open(id) {
            tx.end_session(id);
        }
        if tx.state.ended.contains_key(&id) {
            return tx.reply(OpenOutcome::Gone);
        }
        let expires = tx.now.after(request.ttl);
        let session = Session { owner: request.owner.into(), ttl: request.ttl, expires };
        tx.state.sessions.entry(id).or_insert(session);
        tx.reply(OpenOutcome::Opened)
    }

    async fn renew_session(&self, id: SessionId) -> Result<Reply<RenewOutcome>> {
        let mut tx = self.begin();
        if !tx.is_open(id) {
            tx.end_session(id);
            return tx.reply(RenewOutcome::Gone);
        }
        let now = tx.now;
        if let Some(session) = tx.state.sessions.get_mut(&id) {
            session.expires = now.after(session.ttl);
        }
        let lost = tx.state.forced.values().filter(|(of, _)| *of == id).map(|(_, lost)| lost.clone()).collect();
        tx.reply(RenewOutcome::Alive { lost })
    }

    async fn close_session(&self, id: SessionId) -> Result<Reply<()>> {
        let mut tx = self.begin();
        tx.end_session(id);
        let touched: Vec<Key> = tx
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
            let mut record = tx.take(&key);
            record.queue.retain(|waiter| waiter.session != id);
            tx.put(record);
        }
        tx.reply(())
    }

    async fn session_lives(&self, id: SessionId) -> Result<Reply<bool>> {
        let tx = self.begin();
        tx.reply(tx.is_open(id))
    }

    async fn acquire(&self, request: AcquireRequest) -> Result<Reply<AcquireOutcome>> {
        let mut tx = self.begin();
        let mut record = tx.take(&request.key);
        let outcome = tx.acquire(&mut record, request);
        tx.put(record);
        tx.reply(outcome?)
    }

    async fn poll(&self, key: &Key, tokens: &[TokenId]) -> Result<Reply<Vec<PollOutcome>>> {
        let mut tx = self.begin();
        let record = tx.take(key);
        let outcomes = tx.poll(&record, tokens);
        if outcomes.iter().any(|outcome| matches!(outcome, PollOutcome::Queued(Queued { ahead: 0, .. }))) {
            tx.recall(&record);
        }
        let waits = outcomes.iter().any(|outcome| matches!(outcome, PollOutcome::Queued(_)));
        let is_used_up = waits && tx.next_fence(&record).is_none();
        tx.put(record);
        if is_used_up { Err(Fence::used_up()) } else { tx.reply(outcomes) }
    }

    async fn abandon(&self, key: &Key, token: TokenId) -> Result<Reply<EndOutcome>> {
        let mut tx = self.begin();
        let outcome = tx.remove(key, token, None);
        tx.reply(outcome)
    }

    async fn release(&self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<Reply<EndOutcome>> {
        let mut tx = self.begin();
        let outcome = tx.remove(key, token, cooldown);
        tx.reply(outcome)
    }

    async fn extend(&self, key: &Key, token: TokenId, ttl: Duration) -> Result<Reply<ExtendOutcome>> {
        let mut tx = self.begin();
        let mut record = tx.take(key);
        let deadline = tx.now.after(ttl);
        let hold = record.holds.iter_mut().find(|hold| hold.token == token && hold.deadline.is_some());
        let outcome = match hold {
            Some(hold) => {
                hold.deadline = Some(deadline);
                ExtendOutcome::Extended
            }
            None => ExtendOutcome::NotHeld,
        };
        tx.put(record);
        tx.reply(outcome)
    }

    async fn linger(&self, key: &Key, token: TokenId) -> Result<Reply<LingerOutcome>> {
        let mut tx = self.begin();
        let mut record = tx.take(key);
        let outcome = tx.linger(&mut record, token);
        tx.put(record);
        tx.reply(outcome)
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Reply<AdoptOutcome>> {
        let mut tx = self.begin();
        if !tx.is_open(request.session) {
            return tx.reply(AdoptOutcome::SessionGone);
        }
        let owner = tx.state.sessions.get(&request.session).map(|session| session.owner.clone()).unwrap_or_default();
        let mut record = tx.take(&request.key);
        let (now, late) = (tx.now, tx.now > request.not_after);
        let next = tx.next_fence(&record);
        let outcome = if let Some(hold) = record.hold(request.to) {
            AdoptOutcome::Adopted { granted: hold.granted(now), session_bound: hold.session_bound }
        } else if late {
            AdoptOutcome::Stale
        } else if let Some(hold) = record.holds.iter_mut().find(|hold| hold.token == request.from) {
            hold.token = request.to;
            hold.session = request.session;
            hold.owner = owner;
            if std::mem::take(&mut hold.lingers) {
                // After the highest fence the store grants nothing more, so the adopter's fence need not be higher.
                hold.fence = next.or(record.last).unwrap_or(hold.fence);
                record.last = Some(hold.fence);
            }
            AdoptOutcome::Adopted { granted: hold.granted(now), session_bound: hold.session_bound }
        } else {
            AdoptOutcome::Gone
        };
        tx.put(record);
        tx.reply(outcome)
    }

    async fn force_release(&self, request: ForceReleaseRequest) -> Result<Reply<ForceReleaseOutcome>> {
        let mut tx = self.begin();
        let mut record = tx.take(&request.key);
        let outcome = match record.holds.iter().position(|hold| hold.fence == request.fence) {
            Some(at) => {
                let hold = record.holds.remove(at);
                // The highest fence cannot be raised, and need not be: the store grants nothing after it.
                record.last = Fence::next(record.last, tx.wall_micros).or(record.last);
                let lost = LostToken { key: request.key.clone(), token: hold.token, reason: request.reason };
                if let Some(push) = tx.state.pushes.get(&hold.session) {
                    push.send(Push::ForceReleased(lost.clone()));
                }
                if tx.is_open(hold.session) {
                    tx.state.forced.insert(hold.token, (hold.session, lost));
                }
                ForceReleaseOutcome::Released
            }
            None => ForceReleaseOutcome::NoSuchHold { live: record.holds.iter().map(|hold| hold.fence).collect() },
        };
        tx.put(record);
        tx.reply(outcome)
    }

    async fn inspect(&self, key: &Key) -> Result<Reply<KeyState>> {
        let mut tx = self.begin();
        let record = tx.take(key);
        let state = tx.state_of(&record);
        tx.put(record);
        tx.reply(state)
    }

    async fn list(&self, prefix: &str, cursor: Option<&Cursor>, limit: usize) -> Result<Reply<Listing>> {
        let mut tx = self.begin();
        let mut listing = Listing::default();
        let after = cursor.map_or("", Cursor::as_str);
        // To reconcile a key may remove its record, so this collects the keys first.
        let within = tx.state.keys.range(after.max(prefix).to_owned()..).map(|(_, record)| record.key.clone());
        let within = within.take_while(|key| key.as_encoded().starts_with(prefix));
        let keys: Vec<Key> = within.filter(|key| key.as_encoded() != after).take(limit.max(1)).collect();
        if keys.len() == limit.max(1) {
            listing.next = keys.last().map(|key| Cursor::new(key.as_encoded()));
        }
        for key in keys {
            let record = tx.take(&key);
            let idle = record.holds.is_empty() && record.queue.is_empty() && record.closed_until.is_none();
            if !idle {
                listing.keys.push(tx.state_of(&record));
            }
            tx.put(record);
        }
        tx.reply(listing)
    }

    fn grants(&self, session: SessionId) -> GrantStream {
        let (sender, stream) = push_channel();
        self.begin().state.pushes.insert(session, sender);
        stream
    }
}
