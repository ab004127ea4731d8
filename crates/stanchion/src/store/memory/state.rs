//! The data of the memory store, and a transaction that changes them.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, SystemTime};

use crate::error::Result;
use crate::fence::Fence;
use crate::key::Key;
use crate::store::*;
use crate::token::{SessionId, TokenId};

/// All data of the store.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) sessions: HashMap<SessionId, Session>,
    /// Ended sessions, with the time after which no client sends a request for them, so that they can be removed.
    pub(super) ended: HashMap<SessionId, StoreTime>,
    pub(super) pushes: HashMap<SessionId, PushSender>,
    pub(super) keys: BTreeMap<String, Record>,
    /// Force-released tokens that their caller has not released or abandoned yet.
    pub(super) forced: HashMap<TokenId, (SessionId, LostToken)>,
    /// At least as high as every fence of a key whose record was removed.
    pub(super) fence_floor: Option<Fence>,
}

#[derive(Debug)]
pub(super) struct Session {
    pub(super) owner: Arc<str>,
    pub(super) ttl: Duration,
    pub(super) expires: StoreTime,
}

/// The record of a key that has a hold, a waiter or a running cooldown.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) key: Key,
    pub(super) last: Option<Fence>,
    pub(super) closed_until: Option<StoreTime>,
    pub(super) holds: Vec<Hold>,
    pub(super) queue: VecDeque<Waiter>,
}

#[derive(Debug)]
pub(super) struct Hold {
    pub(super) token: TokenId,
    pub(super) session: SessionId,
    pub(super) session_bound: bool,
    pub(super) deadline: Option<StoreTime>,
    pub(super) fence: Fence,
    pub(super) demand: Demand,
    pub(super) owner: Arc<str>,
    pub(super) at: StoreTime,
    pub(super) since: SystemTime,
    pub(super) metadata: Option<String>,
    pub(super) trace: Option<String>,
    pub(super) lingers: bool,
}

#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) token: TokenId,
    pub(super) session: SessionId,
    pub(super) demand: Demand,
    pub(super) lifetime: Lifetime,
    pub(super) owner: Arc<str>,
    pub(super) at: StoreTime,
    pub(super) metadata: Option<String>,
    pub(super) trace: Option<String>,
}

impl Record {
    /// Returns the smallest capacity of the holds, if they share the key.
    fn in_use(&self) -> Option<u32> {
        let shared = self.holds.iter().map(|hold| hold.demand).filter(|demand| !demand.is_exclusive());
        shared.map(Demand::capacity).min()
    }

    /// Returns whether the key is open and has room for a demand.
    pub(super) fn fits(&self, demand: Demand, now: StoreTime) -> bool {
        let open = self.closed_until.is_none_or(|until| until <= now);
        open && demand.fits(self.holds.iter().map(|hold| hold.demand))
    }

    pub(super) fn hold(&self, token: TokenId) -> Option<&Hold> {
        self.holds.iter().find(|hold| hold.token == token)
    }
}

impl Hold {
    pub(super) fn granted(&self, now: StoreTime) -> Granted {
        Granted { fence: self.fence, remaining: self.deadline.map(|deadline| deadline.since(now)) }
    }
}

/// The locked state, with the time of one operation.
pub(super) struct Transaction<'a> {
    pub(super) state: MutexGuard<'a, State>,
    pub(super) now: StoreTime,
    pub(super) wall: SystemTime,
    pub(super) wall_micros: u64,
}

impl Transaction<'_> {
    pub(super) fn reply<T>(&self, outcome: T) -> Result<Reply<T>> {
        Ok(Reply { time: self.now, outcome })
    }

    pub(super) fn is_open(&self, session: SessionId) -> bool {
        self.state.sessions.get(&session).is_some_and(|session| session.expires > self.now)
    }

    /// Ends a session. Its holds and waiters go when their keys are reconciled.
    pub(super) fn end_session(&mut self, session: SessionId) {
        self.state.pushes.remove(&session);
        if let Some(ended) = self.state.sessions.remove(&session) {
            let forget_at = self.now.after(ended.ttl.saturating_mul(2).max(Duration::from_secs(60)));
            self.state.ended.insert(session, forget_at);
        }
        self.state.forced.retain(|_, (of, _)| *of != session);
        let now = self.now;
        self.state.ended.retain(|_, forget_at| *forget_at > now);
    }

    /// Takes the record of a key out of the state, and reconciles it. [`Transaction::put`] puts it back.
    pub(super) fn take(&mut self, key: &Key) -> Record {
        let mut record = self.state.keys.remove(key.as_encoded()).unwrap_or_else(|| Record {
            key: key.clone(),
            last: self.state.fence_floor,
            closed_until: None,
            holds: Vec::new(),
            queue: VecDeque::new(),
        });
        self.reconcile(&mut record);
        record
    }

    /// Reconciles a record, and puts it back unless the key is idle.
    pub(super) fn put(&mut self, mut record: Record) {
        self.reconcile(&mut record);
        if record.holds.is_empty() && record.queue.is_empty() && record.closed_until.is_none() {
            // An idle key has nothing but its fence. One floor for all idle keys is enough, so that idle keys use no
            // memory.
            self.state.fence_floor = self.state.fence_floor.max(record.last);
        } else {
            self.state.keys.insert(record.key.as_encoded().to_owned(), record);
        }
    }

    /// Removes holds and waiters that have ended, then grants the head of the queue as long as it fits.
    pub(super) fn reconcile(&mut self, record: &mut Record) {
        let now = self.now;
        record.holds.retain(|hold| {
            hold.deadline.is_none_or(|deadline| deadline > now) && (!hold.session_bound || self.is_open(hold.session))
        });
        record.closed_until = record.closed_until.filter(|until| *until > now);
        while let Some(head) = record.queue.front() {
            if !self.is_open(head.session) {
                record.queue.pop_front();
            } else if record.fits(head.demand, now)
                && let Some(fence) = self.next_fence(record)
            {
                let Some(waiter) = record.queue.pop_front() else { break };
                let (session, token) = (waiter.session, waiter.token);
                let granted = self.grant(record, waiter, fence);
                if let Some(push) = self.state.pushes.get(&session) {
                    push.send(Push::Granted { key: record.key.clone(), token, fence: granted.fence });
                }
            } else {
                break;
            }
        }
    }

    /// Returns the fence of the next grant, or `None` after the highest fence.
    pub(super) fn next_fence(&self, record: &Record) -> Option<Fence> {
        Fence::next(record.last, self.wall_micros)
    }

    /// Turns a waiter into a hold.
    fn grant(&self, record: &mut Record, waiter: Waiter, fence: Fence) -> Granted {
        record.last = Some(fence);
        let hold = Hold {
            token: waiter.token,
            session: waiter.session,
            session_bound: matches!(waiter.lifetime, Lifetime::Session { .. }),
            deadline: waiter.lifetime.length().map(|length| self.now.after(length)),
            fence,
            demand: waiter.demand,
            owner: waiter.owner,
            at: self.now,
            since: self.wall,
            metadata: waiter.metadata,
            trace: waiter.trace,
            lingers: false,
        };
        let granted = hold.granted(self.now);
        record.holds.push(hold);
        granted
    }

    /// Returns the time until a deadline, the end of a cooldown or the expiry of a session may change something for a
    /// waiter.
    pub(super) fn check_in(&self, record: &Record) -> Option<Duration> {
        let deadlines = record.holds.iter().filter_map(|hold| hold.deadline);
        let sessions = record
            .holds
            .iter()
            .filter(|hold| hold.session_bound)
            .filter_map(|hold| self.state.sessions.get(&hold.session).map(|session| session.expires));
        deadlines.chain(sessions).chain(record.closed_until).min().map(|at| at.since(self.now))
    }

    /// Returns the place of a token in the queue.
    pub(super) fn queued(&self, record: &Record, token: TokenId) -> Option<Queued> {
        let ahead = record.queue.iter().position(|waiter| waiter.token == token)?;
        let ahead = u32::try_from(ahead).unwrap_or(u32::MAX);
        Some(Queued { ahead, check_in: self.check_in(record), in_use: record.in_use() })
    }

    pub(super) fn poll(&self, record: &Record, tokens: &[TokenId]) -> Vec<PollOutcome> {
        let mut outcomes: HashMap<TokenId, PollOutcome> =
            tokens.iter().map(|token| (*token, PollOutcome::Gone)).collect();
        for hold in &record.holds {
            if let Some(outcome) = outcomes.get_mut(&hold.token) {
                *outcome = PollOutcome::Granted(hold.granted(self.now));
            }
        }
        let (check_in, in_use) = (self.check_in(record), record.in_use());
        for (ahead, waiter) in (0..).zip(&record.queue) {
            if let Some(outcome) = outcomes.get_mut(&waiter.token) {
                *outcome = PollOutcome::Queued(Queued { ahead, check_in, in_use });
            }
        }
        tokens.iter().map(|token| outcomes.get(token).copied().unwrap_or(PollOutcome::Gone)).collect()
    }

    pub(super) fn acquire(&mut self, record: &mut Record, request: AcquireRequest) -> Result<AcquireOutcome> {
        if !self.is_open(request.session) {
            return Ok(AcquireOutcome::SessionGone);
        }
        if self.state.forced.contains_key(&request.token) {
            return Ok(AcquireOutcome::ForceReleased);
        }
        if let Some(hold) = record.hold(request.token) {
            return Ok(AcquireOutcome::Granted(hold.granted(self.now)));
        }
        if let Some(queued) = self.queued(record, request.token) {
            return Ok(AcquireOutcome::Queued(queued));
        }
        if self.now > request.not_after {
            return Ok(AcquireOutcome::Stale);
        }
        let fence = self.next_fence(record).ok_or_else(Fence::used_up)?;
        let fits_now = record.queue.is_empty() && record.fits(request.demand, self.now);
        if !fits_now && !request.enqueue {
            let lingers = record.holds.iter().any(|hold| hold.lingers);
            return Ok(AcquireOutcome::Busy { check_in: self.check_in(record), in_use: record.in_use(), lingers });
        }
        let owner = self.state.sessions.get(&request.session).map(|session| session.owner.clone()).unwrap_or_default();
        let waiter = Waiter {
            token: request.token,
            session: request.session,
            demand: request.demand,
            lifetime: request.lifetime,
            owner,
            at: self.now,
            metadata: request.metadata,
            trace: request.trace,
        };
        if fits_now {
            return Ok(AcquireOutcome::Granted(self.grant(record, waiter, fence)));
        }
        if record.queue.len() >= MAX_WAITERS as usize {
            record.queue.retain(|waiter| self.is_open(waiter.session));
        }
        if record.queue.len() >= MAX_WAITERS as usize {
            return Ok(AcquireOutcome::QueueFull { limit: MAX_WAITERS });
        }
        record.queue.push_back(waiter);
        Ok(match self.queued(record, request.token) {
            Some(queued) => {
                if queued.ahead == 0 {
                    self.recall(record);
                }
                AcquireOutcome::Queued(queued)
            }
            None => AcquireOutcome::Busy { check_in: None, in_use: None, lingers: false },
        })
    }

    /// Marks the hold of a token as lingering, if nobody waits and the hold may linger.
    pub(super) fn linger(&self, record: &mut Record, token: TokenId) -> LingerOutcome {
        let is_wanted = !record.queue.is_empty();
        let Some(hold) = record.holds.iter_mut().find(|hold| hold.token == token) else { return LingerOutcome::Gone };
        if is_wanted || !hold.demand.is_exclusive() || !hold.session_bound || hold.deadline.is_some() {
            return LingerOutcome::Wanted;
        }
        hold.lingers = true;
        let up_to = record.last.max(Some(Fence::new(self.wall_micros))).unwrap_or(hold.fence);
        record.last = Some(up_to);
        LingerOutcome::Lingers { fence: hold.fence, up_to }
    }

    /// Tells the holder that lingers that another request waits for the key.
    pub(super) fn recall(&self, record: &Record) {
        for hold in record.holds.iter().filter(|hold| hold.lingers) {
            if let Some(push) = self.state.pushes.get(&hold.session) {
                push.send(Push::Recall { token: hold.token });
            }
        }
    }

    /// Removes the hold or the queue entry of a token.
    pub(super) fn remove(&mut self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> EndOutcome {
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

    /// Returns the state of a key, as callers see it.
    pub(super) fn state_of(&self, record: &Record) -> KeyState {
        KeyState {
            key: record.key.clone(),
            holders: record
                .holds
                .iter()
                .map(|hold| HolderState {
                    fence: hold.fence,
                    owner: hold.owner.to_string(),
                    units: hold.demand.units(),
                    capacity: hold.demand.capacity(),
                    session_bound: hold.session_bound,
                    age: self.now.since(hold.at),
                    since: hold.since,
                    remaining: hold.deadline.map(|deadline| deadline.since(self.now)),
                    metadata: hold.metadata.clone(),
                    trace: hold.trace.clone(),
                    lingers: hold.lingers,
                })
                .collect(),
            waiters: record
                .queue
                .iter()
                .filter(|waiter| self.is_open(waiter.session))
                .map(|waiter| WaiterState {
                    owner: waiter.owner.to_string(),
                    units: waiter.demand.units(),
                    capacity: waiter.demand.capacity(),
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

#[cfg(test)]
mod tests {
    use super::super::Memory;
    use super::*;
    use crate::error::ErrorKind;

    #[tokio::test]
    async fn highest_fence_is_granted_once() {
        let store = Memory::new();
        let session = SessionId::random().unwrap();
        let open = OpenSession { session, ttl: Duration::from_secs(10), owner: "test".into() };
        store.open_session(open).await.unwrap();
        let key = Key::new("", "job").unwrap();
        let request = || AcquireRequest {
            key: key.clone(),
            token: TokenId::random().unwrap(),
            session,
            demand: Demand::MUTEX,
            lifetime: Lifetime::Session { max_hold: None },
            enqueue: true,
            not_after: StoreTime::from_micros(u64::MAX),
            metadata: None,
            trace: None,
        };
        store.begin().state.fence_floor = Some(Fence::new(u64::MAX - 1));
        let (first, second) = (request(), request());
        let (held, waiting) = (first.token, second.token);
        let outcome = store.acquire(first).await.unwrap().outcome;
        assert!(matches!(outcome, AcquireOutcome::Granted(granted) if granted.fence.get() == u64::MAX), "{outcome:?}");
        assert_eq!(store.acquire(second).await.unwrap_err().kind(), ErrorKind::Internal);
        let force = ForceReleaseRequest { key: key.clone(), fence: Fence::new(u64::MAX), reason: "test".into() };
        assert_eq!(store.force_release(force).await.unwrap().outcome, ForceReleaseOutcome::Released);
        assert_eq!(store.poll(&key, &[held]).await.unwrap().outcome, [PollOutcome::Gone]);
        assert_eq!(store.poll(&key, &[waiting]).await.unwrap().outcome, [PollOutcome::Gone]);
        let error = store.acquire(request()).await.unwrap_err();
        assert!(error.to_string().contains("the highest number there is"), "{error}");
    }
}
