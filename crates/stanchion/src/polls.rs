//! Schedules the polls of the keys that calls of a handle wait for.
//!
//! All calls that wait for one key share its polls, so they cost one request a second however many calls there are. A waiting
//! call is woken only if it has something to do.
//!
//! # Invariants
//! 1. A key is scheduled exactly as long as a call waits for it. Then the key has a time for its next poll, or a poll is on its
//!    way.
//! 2. A call that left is not notified. If its token was granted since, the drop of its `InFlightToken` schedules the cleanup.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use crate::clock::{BootTime, jitter};
use crate::error::Error;
use crate::key::Key;
use crate::retry::silence;
use crate::store::{PollOutcome, Queued};
use crate::token::{IdMap, TokenId};
use crate::waiter::{Waiter, Wakeup};

/// Interval between two polls of a key without pushes: a lost push costs up to this time.
const INTERVAL: Duration = Duration::from_secs(1);

/// Interval between two polls of a key in a store that does not push.
const INTERVAL_WITHOUT_PUSH: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub(crate) struct Polls {
    keys: Mutex<Keys>,
    /// Notified when a key is due before the keeper would look.
    earlier: Notify,
    interval: Duration,
}

#[derive(Debug)]
struct Keys {
    waited_for: HashMap<Key, WaitedFor>,
    /// Time at which the keeper looks again.
    next_look: BootTime,
}

/// A key that at least one call waits for.
#[derive(Debug, Default)]
struct WaitedFor {
    waiters: IdMap<TokenId, Arc<Waiter>>,
    due: Due,
    is_taken: bool,
    /// Time at which the request was sent that has no answer yet.
    sent_at: Option<BootTime>,
    /// The last fault of a poll, until a poll is answered.
    fault: Option<Error>,
}

impl WaitedFor {
    /// Notes a request without an answer as a fault, if it has taken long. The fault of an earlier request may say more, and stays.
    fn note_silence(&mut self, now: BootTime) {
        if let (Some(sent_at), None) = (self.sent_at, &self.fault) {
            self.fault = silence(now.since(sent_at));
        }
    }
}

/// The time of a key's next poll.
#[derive(Clone, Copy, Debug)]
struct Due {
    /// Latest time of the poll.
    by: BootTime,
    /// Earliest time of a poll together with other keys, so that over time all keys of a handle are polled at the same time.
    from: BootTime,
}

impl Default for Due {
    fn default() -> Self {
        Self { by: BootTime::NEVER, from: BootTime::NEVER }
    }
}

impl Due {
    fn or(self, other: Self) -> Self {
        Self { by: self.by.min(other.by), from: self.from.min(other.from) }
    }
}

impl Polls {
    pub(crate) fn new(has_push: bool) -> Self {
        Self {
            keys: Mutex::new(Keys { waited_for: HashMap::new(), next_look: BootTime::NEVER }),
            earlier: Notify::new(),
            interval: if has_push { INTERVAL } else { INTERVAL_WITHOUT_PUSH },
        }
    }

    fn lock(&self) -> MutexGuard<'_, Keys> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a call that waits for a key.
    pub(crate) fn enter(&self, token: TokenId, waiter: &Arc<Waiter>, queued: Queued, now: BootTime) {
        let mut keys = self.lock();
        keys.waited_for.entry(waiter.key.clone()).or_default().waiters.insert(token, waiter.clone());
        self.plan(keys, &waiter.key, self.due(now, queued));
    }

    /// Removes a call that does not wait any more.
    pub(crate) fn leave(&self, key: &Key, token: TokenId) {
        let mut keys = self.lock();
        let Some(waited_for) = keys.waited_for.get_mut(key) else { return };
        waited_for.waiters.remove(&token);
        if waited_for.waiters.is_empty() {
            keys.waited_for.remove(key);
        }
    }

    /// Returns the fault because of which polls of a key bring no answer, if there is one.
    pub(crate) fn fault(&self, key: &Key, now: BootTime) -> Option<Error> {
        let mut keys = self.lock();
        let waited_for = keys.waited_for.get_mut(key)?;
        waited_for.note_silence(now);
        waited_for.fault.clone()
    }

    /// Takes the answer of a poll that a waiter sent itself.
    pub(crate) fn learned(&self, key: &Key, queued: Queued, now: BootTime) {
        self.plan(self.lock(), key, self.due(now, queued));
    }

    /// Makes every key due, because something may have changed for all of them.
    pub(crate) fn poll_all(&self, now: BootTime) {
        let mut keys = self.lock();
        for waited_for in keys.waited_for.values_mut() {
            waited_for.due = Due { by: now, from: now };
        }
        keys.next_look = BootTime::NEVER;
        drop(keys);
        self.earlier.notify_one();
    }

    /// Waits until a key is due before the time that [`take_due`](Self::take_due) returned.
    pub(crate) async fn earlier(&self) {
        self.earlier.notified().await;
    }

    /// Takes the keys that are due. Returns them with the time at which to look again. [`answered`](Self::answered) or
    /// [`failed`](Self::failed) puts each key back.
    pub(crate) fn take_due(&self, now: BootTime) -> (Vec<Key>, BootTime) {
        let mut keys = self.lock();
        let mut taken = Vec::new();
        let waiting = |keys: &Keys| keys.waited_for.values().filter(|key| !key.is_taken).map(|key| key.due.by).min();
        // A key that may only join other keys wakes nobody.
        if waiting(&keys).is_some_and(|by| by <= now) {
            for (key, waited_for) in &mut keys.waited_for {
                if !waited_for.is_taken && waited_for.due.from <= now {
                    (waited_for.is_taken, waited_for.due) = (true, Due::default());
                    taken.push(key.clone());
                }
            }
        }
        keys.next_look = waiting(&keys).unwrap_or(BootTime::NEVER);
        (taken, keys.next_look)
    }

    /// Returns the tokens to poll in a request that is sent now. The list is empty if no call waits any more.
    pub(crate) fn begin(&self, key: &Key, now: BootTime) -> Vec<TokenId> {
        let mut keys = self.lock();
        let Some(waited_for) = keys.waited_for.get_mut(key) else { return Vec::new() };
        waited_for.note_silence(now);
        waited_for.sent_at = Some(now);
        waited_for.waiters.keys().copied().collect()
    }

    /// Notes a request that failed; a retry may follow.
    pub(crate) fn attempt_failed(&self, key: &Key, error: &Error) {
        if let Some(waited_for) = self.lock().waited_for.get_mut(key) {
            waited_for.sent_at = None;
            waited_for.fault = Some(error.clone());
        }
    }

    /// Notifies the waiters of the outcomes of a poll.
    pub(crate) fn answered(
        &self,
        key: &Key,
        sent_at: BootTime,
        outcomes: impl IntoIterator<Item = (TokenId, PollOutcome)>,
        now: BootTime,
    ) {
        let mut keys = self.lock();
        let Some(waited_for) = keys.waited_for.get_mut(key) else { return };
        (waited_for.sent_at, waited_for.fault) = (None, None);
        // The first waiter decides when the key is polled again: its poll reconciles the key for all.
        let mut front = Queued { ahead: u32::MAX, check_in: None, in_use: None };
        let mut told = Vec::new();
        for (token, outcome) in outcomes {
            let Some(waiter) = waited_for.waiters.get(&token) else { continue };
            match outcome {
                PollOutcome::Queued(queued) => {
                    front.ahead = front.ahead.min(queued.ahead);
                    front.check_in = [front.check_in, queued.check_in].into_iter().flatten().min();
                }
                PollOutcome::Granted(granted) => told.push((waiter.clone(), Wakeup::Polled(granted, sent_at))),
                PollOutcome::Gone => told.push((waiter.clone(), Wakeup::Gone)),
            }
        }
        waited_for.is_taken = false;
        self.plan(keys, key, self.due(now, front));
        // Wake tasks without a lock.
        for (waiter, wakeup) in told {
            waiter.notify(wakeup);
        }
    }

    /// Notes a poll that failed with all its attempts. Waiting calls live through an outage, so only a permanent fault fails them.
    pub(crate) fn failed(&self, key: &Key, error: &Error, now: BootTime) {
        let mut keys = self.lock();
        let Some(waited_for) = keys.waited_for.get_mut(key) else { return };
        waited_for.sent_at = None;
        waited_for.fault = Some(error.clone());
        let mut told = Vec::new();
        if !error.is_transient() {
            told.extend(waited_for.waiters.values().cloned());
        }
        waited_for.is_taken = false;
        self.plan(keys, key, self.due(now, Queued { ahead: u32::MAX, check_in: None, in_use: None }));
        for waiter in told {
            waiter.notify(Wakeup::Failed(error.clone()));
        }
    }

    /// Returns when to poll a key next, by the last answer for its first waiter.
    fn due(&self, now: BootTime, front: Queued) -> Due {
        let interval = jitter(self.interval);
        let by = now.after(interval);
        // Waiters further back poll a little later: the poll of the first waiter reconciles the key for all.
        let later = Duration::from_millis(1 + u64::from(front.ahead.min(100)));
        match front.check_in.map(|check_in| now.after(check_in + later)) {
            Some(at) if at < by => Due { by: at, from: at },
            _ => Due { by, from: now.after(interval / 2) },
        }
    }

    fn plan(&self, mut keys: MutexGuard<'_, Keys>, key: &Key, due: Due) {
        let Some(waited_for) = keys.waited_for.get_mut(key) else { return };
        waited_for.due = waited_for.due.or(due);
        let (by, is_taken) = (waited_for.due.by, waited_for.is_taken);
        if by < keys.next_look && !is_taken {
            // Notify the keeper once, until it has looked.
            keys.next_look = by;
            drop(keys);
            self.earlier.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    const QUEUED: Queued = Queued { ahead: 0, check_in: None, in_use: None };

    struct Bench {
        polls: Polls,
        now: BootTime,
    }

    impl Bench {
        fn new() -> Self {
            Self { polls: Polls::new(true), now: BootTime::from_nanos(0) }
        }

        fn enter(&self, key: &Key) -> (TokenId, Arc<Waiter>) {
            let (token, waiter) = (TokenId::random().unwrap(), Arc::new(Waiter::new(key.clone(), true)));
            self.polls.enter(token, &waiter, QUEUED, self.now);
            (token, waiter)
        }

        fn pass(&mut self, span: Duration) {
            self.now = self.now.after(span);
        }

        /// Polls the keys that are due, and answers that all calls still wait.
        fn poll(&self, queued: Queued) -> usize {
            let (taken, _) = self.polls.take_due(self.now);
            for key in &taken {
                let tokens = self.polls.begin(key, self.now);
                let outcomes = tokens.into_iter().map(|token| (token, PollOutcome::Queued(queued)));
                self.polls.answered(key, self.now, outcomes, self.now);
            }
            taken.len()
        }
    }

    fn key(name: &str) -> Key {
        Key::new("", name).unwrap()
    }

    #[test]
    fn polls_of_keys_come_together() {
        let mut bench = Bench::new();
        let mut cells = Vec::new();
        for number in 0..100 {
            cells.push(bench.enter(&key(&number.to_string())));
            bench.pass(Duration::from_millis(7));
            bench.poll(QUEUED);
        }
        // The keys meet by chance, so this takes a few rounds; from then on they stay together.
        for _ in 0..10_000 {
            bench.pass(Duration::from_millis(10));
            bench.poll(QUEUED);
        }
        let mut times = 0;
        for _ in 0..1_000 {
            bench.pass(Duration::from_millis(10));
            let polled = bench.poll(QUEUED);
            assert!(polled == 0 || polled == 100, "{polled}");
            times += usize::from(polled > 0);
        }
        assert!((8..=16).contains(&times), "{times} in ten seconds");
    }

    #[test]
    fn deadline_of_a_key_is_polled_when_it_comes() {
        let mut bench = Bench::new();
        let (_token, _cell) = bench.enter(&key("k"));
        bench.pass(Duration::from_secs(2));
        assert_eq!(bench.poll(Queued { ahead: 0, check_in: Some(Duration::from_millis(300)), in_use: None }), 1);
        bench.pass(Duration::from_millis(300));
        assert_eq!(bench.poll(QUEUED), 0);
        bench.pass(Duration::from_millis(1));
        assert_eq!(bench.poll(QUEUED), 1);
    }

    #[test]
    fn new_call_during_a_poll_is_polled_next() {
        let mut bench = Bench::new();
        let (first, _cell) = bench.enter(&key("k"));
        bench.pass(Duration::from_secs(2));
        let (taken, _) = bench.polls.take_due(bench.now);
        assert_eq!(bench.polls.begin(&taken[0], bench.now), [first]);
        let (second, cell) = bench.enter(&key("k"));
        bench.pass(Duration::from_secs(2));
        assert!(bench.polls.take_due(bench.now).0.is_empty(), "one poll of a key at a time");
        bench.polls.leave(&key("k"), first);
        // The answer is for a call that has left.
        bench.polls.answered(&taken[0], bench.now, [(first, PollOutcome::Gone)], bench.now);
        let (taken, _) = bench.polls.take_due(bench.now);
        assert_eq!(bench.polls.begin(&taken[0], bench.now), [second]);
        assert!(cell.take().is_none());
        bench.polls.leave(&key("k"), second);
        assert!(bench.polls.lock().waited_for.is_empty());
    }

    #[test]
    fn only_a_lasting_failure_ends_a_wait() {
        let mut bench = Bench::new();
        let (token, cell) = bench.enter(&key("k"));
        let told = |cell: &Waiter| matches!(cell.take(), Some(Wakeup::Failed(_)));
        for kind in [ErrorKind::Unavailable, ErrorKind::NetworkTimeout, ErrorKind::Unavailable, ErrorKind::Unauthorized]
        {
            assert!(!told(&cell));
            bench.pass(Duration::from_secs(2));
            assert_eq!(bench.polls.take_due(bench.now).0.len(), 1);
            bench.polls.failed(&key("k"), &Error::new(kind, "away"), bench.now);
        }
        assert!(told(&cell));
        bench.polls.leave(&key("k"), token);
    }
}
