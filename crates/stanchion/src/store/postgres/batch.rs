//! Sends several calls on keys in one request when more are made than are worth a request each.
//!
//! This process has at most one request in flight for each key. Later calls on the key are queued here, and leave as
//! one request when the answer has arrived. Two requests of a process therefore never wait for each other's turn, and a
//! key whose turn another transaction has occupies one connection, however many callers want the key.
//!
//! A few keys may be in flight at any time in requests of their own, which wait for the turn of their key. While they
//! are, calls on other keys are queued, and leave as one batch for many keys when an answer arrives. A few callers thus
//! wait for nobody, and many callers share a round trip and a write to the disk. A batch never waits for a turn: it
//! skips the calls that would have to, and a skipped call is sent again in a request for its key. A request is one
//! transaction: the outcome of all its calls is unknown, or of none.
//!
//! The thread of the store drives the requests. A caller may wait for its answer, give up, or never poll again: the
//! calls that are queued behind it leave in any case.

use std::collections::{HashMap, VecDeque};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio_postgres::Row;

use super::Inner;
use super::error::{error, malformed};
use super::rows::{column, micros, not_after, parameters};
use crate::error::{ErrorKind, Result};
use crate::key::Key;
use crate::store::backoff::within;
use crate::store::{AcquireRequest, Lifetime};
use crate::sync::lock;
use crate::token::TokenId;

/// Maximum number of single requests in flight before further calls are queued.
const MAX_SINGLES_IN_FLIGHT: usize = 4;

/// Maximum number of batches in flight: the server runs one while this process handles the answers of another.
pub(super) const MAX_BATCHES_IN_FLIGHT: usize = 3;

/// Maximum number of calls in a request. Other callers that want one of its keys wait until the request is answered.
const MAX_BATCH_SIZE: usize = 64;

/// Time after which a batch is given up, so that queued callers do not wait for a dead link.
const BATCH_TIMEOUT: Duration = Duration::from_secs(3);

/// Time after which a request that waits for the turn of its key is given up. It is longer than the server's own limit,
/// so that the server gives up first and reports why.
const SINGLE_TIMEOUT: Duration = Duration::from_secs(6);

/// Time after which a request is given up if all its callers have given up. Until then the queued calls wait, because
/// an abandon of one of its tokens could overtake the request on another connection and would have to be repeated.
const ABANDONED_TIMEOUT: Duration = Duration::from_secs(1);

/// A call on a key that can be part of a batch.
#[derive(Debug)]
pub(super) enum KeyCall {
    Acquire(AcquireRequest),
    Finish { key: Key, token: TokenId, cooldown: Option<Duration> },
}

impl KeyCall {
    fn key(&self) -> &Key {
        match self {
            Self::Acquire(request) => &request.key,
            Self::Finish { key, .. } => key,
        }
    }

    fn token(&self) -> &[u8] {
        match self {
            Self::Acquire(request) => request.token.as_bytes(),
            Self::Finish { token, .. } => token.as_bytes(),
        }
    }

    fn cooldown(&self) -> Option<i64> {
        match self {
            Self::Acquire(_) => None,
            Self::Finish { cooldown, .. } => cooldown.map(micros),
        }
    }

    fn acquire(&self) -> Option<&AcquireRequest> {
        match self {
            Self::Acquire(request) => Some(request),
            Self::Finish { .. } => None,
        }
    }

    async fn single(&self, inner: &Inner) -> Result<Row> {
        let (key, token) = (self.key().as_encoded(), self.token());
        let Some(request) = self.acquire() else {
            return inner.row("finish", parameters![key => TEXT, token => BYTEA, self.cooldown() => INT8]).await;
        };
        let parameters = parameters![
            key => TEXT,
            token => BYTEA,
            request.session.as_bytes().as_slice() => BYTEA,
            whole(request.demand.units()) => INT4,
            whole(request.demand.capacity()) => INT4,
            is_bound(request) => BOOL,
            request.lifetime.length().map(micros) => INT8,
            request.enqueue => BOOL,
            not_after(request.not_after) => INT8,
            request.metadata => TEXT,
            request.trace => TEXT,
        ];
        inner.row("acquire", parameters).await
    }
}

fn whole(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

fn is_bound(request: &AcquireRequest) -> bool {
    matches!(request.lifetime, Lifetime::Session { .. })
}

/// A call, and the sender of its row to the caller.
type QueuedCall = (KeyCall, oneshot::Sender<Result<Row>>);

/// The calls that wait to be sent, and the number of requests in flight.
#[derive(Debug, Default)]
pub(super) struct CallQueues {
    /// Number of single requests in flight. Requests with skipped calls do not count.
    singles: usize,
    /// Number of batches in flight, and of the calls in them.
    batches: usize,
    batched_calls: usize,
    /// A queue for each key that has a request in flight or a queued call.
    queues: HashMap<Key, KeyQueue>,
    /// The keys with queued calls and without a request in flight, in order of arrival. `skipped` has the keys whose
    /// calls a batch has skipped, and `ready` the others.
    ready: VecDeque<Key>,
    skipped: VecDeque<Key>,
}

#[derive(Debug, Default)]
struct KeyQueue {
    is_in_flight: bool,
    is_skipped: bool,
    /// Releases go before acquires, because acquires wait for them.
    finishes: VecDeque<QueuedCall>,
    acquires: VecDeque<QueuedCall>,
}

impl KeyQueue {
    fn part(&mut self, call: &KeyCall) -> &mut VecDeque<QueuedCall> {
        match call {
            KeyCall::Acquire(_) => &mut self.acquires,
            KeyCall::Finish { .. } => &mut self.finishes,
        }
    }

    fn len(&self) -> usize {
        self.finishes.len() + self.acquires.len()
    }

    /// Removes and returns the first calls. Drops calls whose callers have given up.
    fn take(&mut self, limit: usize) -> Vec<QueuedCall> {
        let mut taken = Vec::new();
        for part in [&mut self.finishes, &mut self.acquires] {
            part.retain(|(_, outcome)| !outcome.is_closed());
            taken.extend(part.drain(..part.len().min(limit - taken.len())));
        }
        taken
    }
}

/// How a request is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dispatch {
    /// For one key, whose turn the request waits for.
    Single,
    /// For one key whose turn the request waits for, with calls that a batch has skipped.
    Skipped,
    /// For many keys, whose turns the request does not wait for.
    Batch,
}

impl CallQueues {
    fn enqueue(&mut self, call: KeyCall, outcome: oneshot::Sender<Result<Row>>) {
        let queue = self.queues.entry(call.key().clone()).or_default();
        if queue.len() == 0 && !queue.is_in_flight {
            self.ready.push_back(call.key().clone());
        }
        queue.part(&call).push_back((call, outcome));
    }

    /// Removes and returns the calls of the next request that can be sent now.
    fn next(&mut self) -> Option<(Dispatch, Vec<QueuedCall>)> {
        loop {
            let mut calls = Vec::new();
            let dispatch = if let Some(key) = self.skipped.pop_front() {
                self.take(&key, &mut calls, MAX_BATCH_SIZE);
                Dispatch::Skipped
            } else if self.batches == 0 && self.singles < MAX_SINGLES_IN_FLIGHT && self.ready.len() == 1 {
                let key = self.ready.pop_front()?;
                self.take(&key, &mut calls, MAX_BATCH_SIZE);
                Dispatch::Single
            } else {
                let share = self.equal_share()?;
                while calls.len() < share
                    && let Some(key) = self.ready.pop_front()
                {
                    self.take(&key, &mut calls, share);
                }
                Dispatch::Batch
            };
            if calls.is_empty() {
                // All callers have given up.
                continue;
            }
            match dispatch {
                Dispatch::Single => self.singles += 1,
                Dispatch::Skipped => {}
                Dispatch::Batch => {
                    self.batches += 1;
                    self.batched_calls += calls.len();
                }
            }
            return Some((dispatch, calls));
        }
    }

    /// Returns the size of the next batch: an equal share of the queued and the batched calls. Returns nothing until
    /// that many calls are queued: callers that were answered by one batch make their next calls at about the same
    /// time, and sending the first of these calls at once would delay the others.
    fn equal_share(&self) -> Option<usize> {
        let queued: usize = self.ready.iter().filter_map(|key| self.queues.get(key)).map(KeyQueue::len).sum();
        let equal = (queued + self.batched_calls).div_ceil(MAX_BATCHES_IN_FLIGHT);
        let is_due = queued > 0 && self.batches < MAX_BATCHES_IN_FLIGHT && (self.batches == 0 || queued >= equal);
        is_due.then(|| equal.min(MAX_BATCH_SIZE))
    }

    /// Moves calls on a key to `calls`, until `calls` has `limit` entries.
    fn take(&mut self, key: &Key, calls: &mut Vec<QueuedCall>, limit: usize) {
        let Some(queue) = self.queues.get_mut(key) else { return };
        let before = calls.len();
        calls.append(&mut queue.take(limit - before));
        if calls.len() == before {
            self.queues.remove(key);
        } else {
            queue.is_in_flight = true;
            queue.is_skipped = false;
        }
    }

    /// Unblocks the keys of a request that has ended, and puts its skipped calls at the front of their queues. `keys`
    /// may have a key several times.
    fn complete(&mut self, keys: &[Key], skipped: Vec<QueuedCall>) {
        for (call, outcome) in skipped.into_iter().rev() {
            if let Some(queue) = self.queues.get_mut(call.key()) {
                queue.is_skipped = true;
                queue.part(&call).push_front((call, outcome));
            }
        }
        for key in keys {
            let Some(queue) = self.queues.get_mut(key) else { continue };
            if !std::mem::take(&mut queue.is_in_flight) {
                continue;
            }
            if queue.len() == 0 {
                self.queues.remove(key);
            } else if queue.is_skipped {
                self.skipped.push_back(key.clone());
            } else {
                self.ready.push_back(key.clone());
            }
        }
    }
}

/// A request in flight. Dropping it unblocks its keys and sends the requests that can leave then.
struct InFlight {
    dispatch: Dispatch,
    /// The key of each call.
    keys: Vec<Key>,
    skipped: Vec<QueuedCall>,
    inner: Arc<Inner>,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        {
            let mut state = lock(&self.inner.calls);
            match self.dispatch {
                Dispatch::Single => state.singles -= 1,
                Dispatch::Skipped => {}
                Dispatch::Batch => {
                    state.batches -= 1;
                    state.batched_calls -= self.keys.len();
                }
            }
            state.complete(&self.keys, std::mem::take(&mut self.skipped));
        }
        send_ready(&self.inner);
    }
}

/// Runs a call, single or as part of a batch.
pub(super) async fn run(inner: &Arc<Inner>, call: KeyCall) -> Result<Row> {
    // Without a thread for the connections a queued call would never leave.
    inner.pool.runtime()?;
    let (sender, outcome) = oneshot::channel();
    lock(&inner.calls).enqueue(call, sender);
    send_ready(inner);
    let dropped =
        |_| Err(error(ErrorKind::Unavailable, "the store was dropped while the request was in flight").in_doubt(true));
    outcome.await.unwrap_or_else(dropped)
}

/// Sends all requests that can be sent now.
fn send_ready(inner: &Arc<Inner>) {
    loop {
        let Some((dispatch, calls)) = lock(&inner.calls).next() else { return };
        let keys = calls.iter().map(|(call, _)| call.key().clone()).collect();
        let request = InFlight { dispatch, keys, skipped: Vec::new(), inner: inner.clone() };
        if let Ok(runtime) = inner.pool.runtime() {
            runtime.spawn(request.run(calls));
        }
    }
}

impl InFlight {
    async fn run(mut self, calls: Vec<QueuedCall>) {
        let (calls, mut outcomes): (Vec<_>, Vec<_>) = calls.into_iter().unzip();
        let limit = if self.dispatch == Dispatch::Batch { BATCH_TIMEOUT } else { SINGLE_TIMEOUT };
        let late = || Err(error(ErrorKind::NetworkTimeout, format!("no answer within {limit:?}")).in_doubt(true));
        let rows = {
            let mut query = pin!(within(limit, self.query(&calls)));
            tokio::select! {
                biased;
                rows = &mut query => rows.unwrap_or_else(late),
                () = all_gave_up(&mut outcomes) => {
                    let _ = within(ABANDONED_TIMEOUT, query).await; // No caller wants the answer.
                    return;
                }
            }
        };
        match rows {
            Ok(rows) => {
                for ((call, outcome), row) in calls.into_iter().zip(outcomes).zip(rows) {
                    match row {
                        Some(row) => drop(outcome.send(Ok(row))),
                        None => self.skipped.push((call, outcome)),
                    }
                }
            }
            Err(fault) => {
                let last = outcomes.pop();
                for outcome in outcomes {
                    drop(outcome.send(Err(error(fault.kind(), fault.message()).in_doubt(fault.is_in_doubt()))));
                }
                drop(last.map(|outcome| outcome.send(Err(fault))));
            }
        }
    }

    /// Sends the calls. Returns the row of each call, or nothing for a skipped call.
    async fn query(&self, calls: &[KeyCall]) -> Result<Vec<Option<Row>>> {
        let (inner, pool) = (&self.inner, &self.inner.pool);
        if let (Dispatch::Single | Dispatch::Skipped, [call]) = (self.dispatch, calls) {
            return Ok(vec![Some(call.single(inner).await?)]);
        }
        /// Returns one value of each call, as an array.
        fn each<'a, T>(calls: &'a [KeyCall], value: impl Fn(&'a KeyCall) -> T) -> Vec<T> {
            calls.iter().map(value).collect()
        }
        /// Returns one value of each acquire, and nothing in the places of other calls.
        fn acquires<'a, T>(calls: &'a [KeyCall], value: impl Fn(&'a AcquireRequest) -> T) -> Vec<Option<T>> {
            each(calls, |call| call.acquire().map(&value))
        }
        let parameters = parameters![
            each(calls, |call| call.key().as_encoded()) => TEXT_ARRAY,
            each(calls, KeyCall::token) => BYTEA_ARRAY,
            acquires(calls, |request| request.session.as_bytes().as_slice()) => BYTEA_ARRAY,
            acquires(calls, |request| whole(request.demand.units())) => INT4_ARRAY,
            acquires(calls, |request| whole(request.demand.capacity())) => INT4_ARRAY,
            acquires(calls, is_bound) => BOOL_ARRAY,
            each(calls, |call| call.acquire().and_then(|request| request.lifetime.length()).map(micros)) => INT8_ARRAY,
            acquires(calls, |request| request.enqueue) => BOOL_ARRAY,
            acquires(calls, |request| not_after(request.not_after)) => INT8_ARRAY,
            each(calls, |call| call.acquire()?.metadata.as_deref()) => TEXT_ARRAY,
            each(calls, |call| call.acquire()?.trace.as_deref()) => TEXT_ARRAY,
            each(calls, KeyCall::cooldown) => INT8_ARRAY,
            (self.dispatch != Dispatch::Batch) => BOOL,
        ];
        let statement = inner.statement("together", parameters.len());
        let rows = match self.dispatch {
            Dispatch::Single | Dispatch::Skipped => pool.query(&statement, parameters).await?,
            Dispatch::Batch => pool.query_batch(&statement, parameters).await?,
        };
        let mut outcomes: Vec<_> = calls.iter().map(|_| None).collect();
        for row in rows {
            let place: i64 = column(&row, "place")?;
            let at = usize::try_from(place - 1).ok().and_then(|at| outcomes.get_mut(at)).ok_or_else(malformed)?;
            *at = Some(row);
        }
        Ok(outcomes)
    }
}

async fn all_gave_up(outcomes: &mut [oneshot::Sender<Result<Row>>]) {
    for outcome in outcomes {
        outcome.closed().await;
    }
}
