//! Sends several script calls in one request when more are made than are worth a request each.
//!
//! A few calls may be in flight at any time, each in a request of its own. While they are, further calls are queued,
//! and the queued calls leave as one script as soon as an answer arrives. A few callers thus wait for nobody, and many
//! callers share the cost of a request. The batch script does only the fast path: a mutex that nobody else wants. It
//! skips every other call, which is then sent in a request of its own. A batch is still one request: the outcome of all
//! its calls is unknown, or of none.
//!
//! # Order
//! Calls for one key are served in the order in which this runtime made them. The batch script may skip an `acquire`,
//! which is then sent a second time. Until it is written, every later `acquire` of the same key is blocked behind it,
//! and follows in a request of its own. All these requests are written to one connection, in that order.
//!
//! In a cluster there are no batches, because a script is limited to one slot. There the batch script serves only a
//! call whose slot is being moved.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use redis::{RedisError, Value};
use tokio::sync::oneshot;

use super::connect::{ConnectionManager, Dispatch, RuntimeConnections, Target};
use super::error::error;
use super::reply::{Answer, malformed};
use super::scripts::{ACQUIRE, BATCH, LockNames, Script};
use crate::error::{Error, ErrorKind, Result};
use crate::store::StoreTime;
use crate::store::backoff::within;

/// Maximum number of single calls in flight before further calls are queued.
const MAX_SINGLES_IN_FLIGHT: usize = 8;

/// Maximum number of batches in flight: one at the server, one on its way to the server, and one whose answers are
/// handled here. Neither side then waits for the other.
const MAX_BATCHES_IN_FLIGHT: usize = 3;

/// Time after which a batch and its connection are given up, so that queued callers do not wait for a dead link.
const BATCH_TIMEOUT: Duration = Duration::from_secs(3);

/// Maximum number of calls in a batch. A script blocks the server for all other clients, at this size for a fraction of
/// a millisecond.
pub(super) const MAX_BATCH_SIZE: usize = 64;

/// One call of a script on a key. It can be part of a batch if it is short.
#[derive(Debug)]
pub(super) struct ScriptCall {
    pub(super) script: &'static Script,
    pub(super) names: LockNames,
    pub(super) arguments: Vec<String>,
}

/// The calls of one runtime that wait to be sent.
#[derive(Debug, Default)]
pub(super) struct Batch {
    state: Mutex<State>,
    /// Held while the answers of one batch are handled and the next batch is written. Without it, two batches whose
    /// answers arrived together would stay in step forever, and the server and this process would wait for each other
    /// by turns.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    singles: usize,
    /// Number of batches in flight, and of the calls in them.
    batches: usize,
    batched_calls: usize,
    queued: VecDeque<QueuedCall>,
    /// For each key with a queued or batched `acquire`: the later `acquire` calls of that key.
    blocked: HashMap<OrderKey, Vec<QueuedCall>>,
}

type QueuedCall = (ScriptCall, oneshot::Sender<Result<Answer>>);

/// A hash of the key whose calls have to stay in order. Two keys with the same hash wait for each other, which is
/// harmless.
type OrderKey = u64;

impl ScriptCall {
    /// Returns the key whose order this call has to keep. Only an `acquire` has one: a release may overtake.
    fn order_key(&self) -> Option<OrderKey> {
        if !std::ptr::eq(self.script, &ACQUIRE) {
            return None;
        }
        let mut hasher = DefaultHasher::new();
        self.names.record().hash(&mut hasher);
        Some(hasher.finish())
    }

    /// Returns whether the fast path can serve this call. Such a call has one argument, whose length also names the
    /// operation.
    fn is_short(&self) -> bool {
        self.arguments.len() == 1
    }

    async fn single(&self, manager: &Arc<ConnectionManager>, local: Option<&RuntimeConnections>) -> Result<Answer> {
        self.single_with_dispatch(manager, local).await.map(|(answer, _)| answer)
    }

    /// Sends the call in a request of its own, and also returns the connection that the request used.
    pub(super) async fn single_with_dispatch(
        &self,
        manager: &Arc<ConnectionManager>,
        local: Option<&RuntimeConnections>,
    ) -> Result<(Answer, Dispatch)> {
        let mut command = self.script.by_hash(3);
        command.arg(&self.names.all()).arg(&self.arguments);
        let target = manager.target(self.names.record());
        match manager.run_from(local, &target, self.script, &command).await {
            Ok((answer, dispatch)) => Ok((Answer::read(answer)?, dispatch)),
            Err(fault) if self.is_short() && is_being_moved(&fault) => {
                Box::pin(self.single_on_record(manager, local, &target, fault)).await
            }
            Err(fault) => Err(fault),
        }
    }

    /// Tries the fast path with the record as the only key. While a cluster moves a slot it rejects every request with
    /// several keys of which one does not exist, and without waiters the queue's keys do not exist.
    async fn single_on_record(
        &self,
        manager: &Arc<ConnectionManager>,
        local: Option<&RuntimeConnections>,
        target: &Target,
        refusal: Error,
    ) -> Result<(Answer, Dispatch)> {
        let mut command = BATCH.by_hash(1);
        command.arg(self.names.record()).arg(&self.arguments);
        let (answer, dispatch) = manager.run_from(local, target, &BATCH, &command).await?;
        match read(&answer, 1) {
            Some((time, done)) if done == b"+" => Ok((Answer::short(time), dispatch)),
            Some(_) => Err(refusal),
            None => Err(malformed().in_doubt(true)),
        }
    }
}

impl Batch {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues the call, or returns it if the caller is to send it now in a request of its own.
    fn enqueue(&self, call: ScriptCall) -> Result<oneshot::Receiver<Result<Answer>>, ScriptCall> {
        let mut state = self.lock();
        // A call is queued only behind requests in flight: the end of such a request sends the queued calls.
        let must_wait = state.batches > 0 || state.singles >= MAX_SINGLES_IN_FLIGHT || !state.queued.is_empty();
        if !must_wait && state.blocked.is_empty() {
            state.singles += 1;
            return Err(call);
        }
        let order_key = call.order_key();
        let blocked = order_key.and_then(|order_key| state.blocked.get_mut(&order_key));
        if blocked.is_none() && !(must_wait && call.is_short()) {
            state.singles += 1;
            return Err(call);
        }
        let (sender, outcome) = oneshot::channel();
        match blocked {
            Some(blocked) => blocked.push((call, sender)),
            None => {
                state.blocked.extend(order_key.map(|order_key| (order_key, Vec::new())));
                state.queued.push_back((call, sender));
            }
        }
        Ok(outcome)
    }
}

/// A request in flight. Dropping it sends the calls that were queued behind it.
struct InFlight {
    /// Number of calls in the batch; `None` for a single call.
    batch_size: Option<usize>,
    /// Keys whose order this request keeps until it is over.
    order_keys: Vec<OrderKey>,
    manager: Arc<ConnectionManager>,
    local: Arc<RuntimeConnections>,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        // Blocked calls are left only if the runtime has ended. Dropping their senders notifies the callers, which must
        // not happen under the lock.
        let mut blocked = Vec::new();
        let mut state = self.local.batch.lock();
        for order_key in &self.order_keys {
            blocked.extend(state.blocked.remove(order_key));
        }
        match self.batch_size {
            None => state.singles -= 1,
            Some(calls) => {
                state.batches -= 1;
                state.batched_calls -= calls;
            }
        }
        if state.queued.is_empty() || state.batches >= MAX_BATCHES_IN_FLIGHT {
            return;
        }
        // Each batch gets an equal share: while the server runs one, this process handles the answers of another.
        let equal = (state.queued.len() + state.batched_calls).div_ceil(MAX_BATCHES_IN_FLIGHT);
        let count = state.queued.len().min(equal).min(MAX_BATCH_SIZE);
        state.batches += 1;
        state.batched_calls += count;
        let calls: Vec<_> = state.queued.drain(..count).collect();
        drop(state);
        let (manager, local) = (self.manager.clone(), self.local.clone());
        let order_keys = calls.iter().filter_map(|(call, _)| call.order_key()).collect();
        // If the runtime has ended, the calls are dropped with their senders, which notifies the callers.
        let runtime = local.runtime.clone();
        runtime.spawn(send(InFlight { batch_size: Some(count), order_keys, manager, local }, calls));
    }
}

impl InFlight {
    /// Sends the skipped calls, and then the calls that were blocked behind them. A key is unblocked only when no call
    /// is left behind it.
    async fn send_skipped<F: Future<Output = ()>>(
        &mut self,
        skipped: &mut FuturesUnordered<F>,
        send: impl Fn(QueuedCall) -> F,
    ) {
        loop {
            // A call is written when its future is first polled, and futures are polled in the order in which they were
            // added. A task with an exhausted budget would write the rest later and in another order, so this one is
            // unconstrained.
            let written = poll_fn(|context| {
                while let Poll::Ready(Some(())) = skipped.poll_next_unpin(context) {}
                Poll::Ready(())
            });
            tokio::task::unconstrained(written).await;
            let mut later = Vec::new();
            let mut state = self.local.batch.lock();
            self.order_keys.retain(|order_key| match state.blocked.get_mut(order_key) {
                Some(blocked) if !blocked.is_empty() => {
                    later.append(blocked);
                    true
                }
                _ => {
                    state.blocked.remove(order_key);
                    false
                }
            });
            drop(state);
            if later.is_empty() {
                return;
            }
            skipped.extend(later.into_iter().filter(|(_, caller)| !caller.is_closed()).map(&send));
        }
    }
}

/// Runs a call, single or as part of a batch.
pub(super) async fn run(manager: &Arc<ConnectionManager>, call: ScriptCall) -> Result<Answer> {
    let local = match manager.local() {
        Some(local) if !manager.is_cluster() => local,
        local => return Box::pin(call.single(manager, local.as_deref())).await,
    };
    match local.batch.enqueue(call) {
        Err(call) => {
            let in_flight = InFlight { batch_size: None, order_keys: Vec::new(), manager: manager.clone(), local };
            Box::pin(call.single(manager, Some(&in_flight.local))).await
        }
        Ok(outcome) => outcome.await.unwrap_or_else(|_| {
            let message = "the runtime that the request was sent from has ended";
            Err(error(ErrorKind::Unavailable, message).in_doubt(true))
        }),
    }
}

async fn send(mut in_flight: InFlight, calls: Vec<QueuedCall>) {
    let (manager, local) = (in_flight.manager.clone(), in_flight.local.clone());
    // Callers that have given up need no request.
    let calls: Vec<_> = calls.into_iter().filter(|(_, outcome)| !outcome.is_closed()).collect();
    let answer =
        within(BATCH_TIMEOUT, run_batch(&manager, calls.iter().map(|(call, _)| call))).await.unwrap_or_else(|| {
            let message = format!("no answer within {BATCH_TIMEOUT:?}");
            Err(error(ErrorKind::NetworkTimeout, message).in_doubt(true))
        });
    let turn = local.batch.turn.lock().await;
    let mut skipped = FuturesUnordered::new();
    for (at, (call, sender)) in calls.into_iter().enumerate() {
        let outcome = match &answer {
            Ok((time, done)) if done[at] == b'+' => Ok(Answer::short(*time)),
            Ok(_) => {
                skipped.push(run_single((call, sender), &manager, &local));
                continue;
            }
            Err(fault) => Err(error(fault.kind(), fault.message()).in_doubt(fault.is_in_doubt())),
        };
        let _ = sender.send(outcome); // The caller may have given up.
    }
    in_flight.send_skipped(&mut skipped, |call| run_single(call, &manager, &local)).await;
    // Callers that got an answer run first, so that their next calls form a batch instead of the first one leaving
    // alone.
    tokio::task::yield_now().await;
    drop(in_flight);
    // These yields let the next batch be built and written.
    tokio::task::yield_now().await;
    tokio::task::yield_now().await;
    drop(turn);
    while skipped.next().await.is_some() {}
}

/// Sends short calls in one request. Returns the time, and for each call whether it was done (`+`) or skipped.
pub(super) async fn run_batch(
    manager: &Arc<ConnectionManager>,
    calls: impl ExactSizeIterator<Item = &ScriptCall> + Clone,
) -> Result<(StoreTime, Vec<u8>)> {
    let count = calls.len();
    if count == 0 {
        return Ok((StoreTime::from_micros(0), Vec::new()));
    }
    let mut command = BATCH.by_hash(count);
    for call in calls.clone() {
        command.arg(call.names.record());
    }
    for call in calls {
        command.arg(&call.arguments);
    }
    // Any slot will do, because this is no cluster.
    let answer = manager.run(Target::Slot(0), &BATCH, command).await?;
    read(&answer, count).ok_or_else(|| malformed().in_doubt(true))
}

/// Sends a call in a request of its own, unless its caller gives up.
async fn run_single((call, mut caller): QueuedCall, manager: &Arc<ConnectionManager>, local: &RuntimeConnections) {
    let answer = tokio::select! {
        biased;
        answer = call.single(manager, Some(local)) => answer,
        () = caller.closed() => return,
    };
    let _ = caller.send(answer); // The caller may have given up.
}

/// Returns whether a request was rejected because its slot is being moved between nodes of a cluster.
fn is_being_moved(fault: &Error) -> bool {
    let source = std::error::Error::source(fault).and_then(|source| source.downcast_ref::<RedisError>());
    source.and_then(RedisError::code) == Some("TRYAGAIN")
}

/// Reads the time and the sign of each call.
fn read(answer: &Value, calls: usize) -> Option<(StoreTime, Vec<u8>)> {
    let Value::BulkString(answer) = answer else { return None };
    let (time, done) = answer.split_at_checked(16)?;
    let time = std::str::from_utf8(time).ok()?.parse().ok()?;
    (done.len() == calls).then(|| (StoreTime::from_micros(time), done.to_vec()))
}
