//! Several steps in one request, where more are asked for than are worth a request each.
//!
//! A few steps may be on their way at any time, each in a request of its own. What comes while they are is collected, and
//! goes as one script when an answer comes: so a few callers wait for nobody, and many callers share what a request costs.
//! The script knows only the short ways, those of a mutex that nobody else wants. What is not so easy is left alone by it,
//! and is done in a request of its own. A request of several steps is still one request: all its steps are in doubt, or
//! none.
//!
//! # Order
//! Calls for one key are served in the order in which this runtime made them. An `acquire` that is collected may be left alone by
//! the script, and is then sent for the second time. Until that is written, every later `acquire` of the same key stays behind
//! it, and follows in a request of its own. All that is written goes over one connection, in that order.
//!
//! Not in a cluster, where a script has one slot. There it is what can be done while a slot is being moved.

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

use super::connect::{Links, Local, Target, Way};
use super::error::error;
use super::node::within;
use super::reply::{Answer, malformed};
use super::scripts::{ACQUIRE, BATCH, LockNames, Script};
use crate::error::{Error, ErrorKind, Result};
use crate::store::StoreTime;

/// So many steps are on their way alone before steps are collected.
const ALONE: usize = 8;

/// So many requests of several steps are on their way at a time: one at the server, one before it, one that is dealt with
/// here, so that nobody has to wait for the other to have something to do.
const TOGETHER: usize = 3;

/// A request of several steps is given up after this time, and its connection with it: who waits in line must not wait
/// for a link that is dead.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(3);

/// The most steps of a request: a script keeps the server from everybody else, here for a fraction of a millisecond.
pub(super) const MOST_STEPS: usize = 64;

/// A step on a key that can go together with others if it is short.
#[derive(Debug)]
pub(super) struct Operation {
    pub(super) script: &'static Script,
    pub(super) names: LockNames,
    pub(super) arguments: Vec<String>,
}

/// What waits to be sent from one runtime.
#[derive(Debug, Default)]
pub(super) struct Batch {
    state: Mutex<State>,
    /// Held while the answers of one request are dealt with and the next one is written. Else two requests whose answers
    /// came together would go together for ever, with the server and us waiting for each other by turns.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    alone: usize,
    /// Requests of several steps that are on their way, and the steps in them.
    together: usize,
    steps_together: usize,
    waiting: VecDeque<Waiting>,
    /// For each place that has an `acquire` among those that wait, or in a request of several steps: the later ones.
    behind: HashMap<Place, Vec<Waiting>>,
}

type Waiting = (Operation, oneshot::Sender<Result<Answer>>);

/// A key, as far as order is concerned. Two keys of one hash wait for each other, which does no harm.
type Place = u64;

impl Operation {
    /// The place in which the order counts: an `acquire` has one. Giving back needs none.
    fn place(&self) -> Option<Place> {
        if !std::ptr::eq(self.script, &ACQUIRE) {
            return None;
        }
        let mut hasher = DefaultHasher::new();
        self.names.record().hash(&mut hasher);
        Some(hasher.finish())
    }

    /// The short way takes one argument, which tells by itself what is to be done.
    fn is_short(&self) -> bool {
        self.arguments.len() == 1
    }

    async fn alone(&self, links: &Arc<Links>, local: Option<&Local>) -> Result<Answer> {
        self.there(links, local).await.map(|(answer, _)| answer)
    }

    /// Does it alone, and tells by which way.
    pub(super) async fn there(&self, links: &Arc<Links>, local: Option<&Local>) -> Result<(Answer, Way)> {
        let mut command = self.script.by_hash(3);
        command.arg(&self.names.all()).arg(&self.arguments);
        let target = links.target(self.names.record());
        match links.run_from(local, &target, self.script, &command).await {
            Ok((answer, way)) => Ok((Answer::read(answer)?, way)),
            Err(fault) if self.is_short() && is_being_moved(&fault) => {
                Box::pin(self.on_its_record(links, local, &target, fault)).await
            }
            Err(fault) => Err(fault),
        }
    }

    /// The short way alone, with nothing but the record. While a cluster moves a slot it refuses requests with several keys
    /// of which one is not there, and those who wait have no keys where nobody does.
    async fn on_its_record(
        &self,
        links: &Arc<Links>,
        local: Option<&Local>,
        target: &Target,
        refusal: Error,
    ) -> Result<(Answer, Way)> {
        let mut command = BATCH.by_hash(1);
        command.arg(self.names.record()).arg(&self.arguments);
        let (answer, way) = links.run_from(local, target, &BATCH, &command).await?;
        match read(&answer, 1) {
            Some((time, done)) if done == b"+" => Ok((Answer::short(time), way)),
            Some(_) => Err(refusal),
            None => Err(malformed().in_doubt(true)),
        }
    }
}

impl Batch {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the step wait with others, or gives it back if it is to go alone, and now.
    fn enter(&self, step: Operation) -> Result<oneshot::Receiver<Result<Answer>>, Operation> {
        let mut state = self.lock();
        // Whoever waits has something on its way before it: its end is what sends it.
        let must_wait = state.together > 0 || state.alone >= ALONE || !state.waiting.is_empty();
        if !must_wait && state.behind.is_empty() {
            state.alone += 1;
            return Err(step);
        }
        let place = step.place();
        let behind = place.and_then(|place| state.behind.get_mut(&place));
        if behind.is_none() && !(must_wait && step.is_short()) {
            state.alone += 1;
            return Err(step);
        }
        let (sender, outcome) = oneshot::channel();
        match behind {
            Some(behind) => behind.push((step, sender)),
            None => {
                state.behind.extend(place.map(|place| (place, Vec::new())));
                state.waiting.push_back((step, sender));
            }
        }
        Ok(outcome)
    }
}

/// A request that is on its way; when it is over, what was collected goes.
struct OnItsWay {
    /// How many steps are in it, or nothing for a step alone.
    together: Option<usize>,
    /// Where the order is kept until it is over.
    places: Vec<Place>,
    links: Arc<Links>,
    local: Arc<Local>,
}

impl Drop for OnItsWay {
    fn drop(&mut self) {
        // Those are there only if the runtime has ended. They are told by their senders, without the lock.
        let mut behind = Vec::new();
        let mut state = self.local.batch.lock();
        for place in &self.places {
            behind.extend(state.behind.remove(place));
        }
        match self.together {
            None => state.alone -= 1,
            Some(steps) => {
                state.together -= 1;
                state.steps_together -= steps;
            }
        }
        if state.waiting.is_empty() || state.together >= TOGETHER {
            return;
        }
        // An equal part for each request: while the server does one, the answers of the other are dealt with here.
        let equal = (state.waiting.len() + state.steps_together).div_ceil(TOGETHER);
        let some = state.waiting.len().min(equal).min(MOST_STEPS);
        state.together += 1;
        state.steps_together += some;
        let steps: Vec<_> = state.waiting.drain(..some).collect();
        drop(state);
        let (links, local) = (self.links.clone(), self.local.clone());
        let places = steps.iter().filter_map(|(step, _)| step.place()).collect();
        // Where the runtime has ended, the steps are dropped with their senders, which tells who waits.
        let runtime = local.runtime.clone();
        runtime.spawn(send(OnItsWay { together: Some(some), places, links, local }, steps));
    }
}

impl OnItsWay {
    /// Writes what was left alone, and then what stayed behind it. Places are given up only when nothing has stayed behind.
    async fn follow<F: Future<Output = ()>>(&mut self, left: &mut FuturesUnordered<F>, follows: impl Fn(Waiting) -> F) {
        loop {
            // Each is written when it is looked at for the first time, and that is in the order in which they were added.
            // Unconstrained, because a task that has used up its share would write the rest later, and in another order.
            let written = poll_fn(|context| {
                while let Poll::Ready(Some(())) = left.poll_next_unpin(context) {}
                Poll::Ready(())
            });
            tokio::task::unconstrained(written).await;
            let mut later = Vec::new();
            let mut state = self.local.batch.lock();
            self.places.retain(|place| match state.behind.get_mut(place) {
                Some(behind) if !behind.is_empty() => {
                    later.append(behind);
                    true
                }
                _ => {
                    state.behind.remove(place);
                    false
                }
            });
            drop(state);
            if later.is_empty() {
                return;
            }
            left.extend(later.into_iter().filter(|(_, caller)| !caller.is_closed()).map(&follows));
        }
    }
}

/// Does a step, alone or with others.
pub(super) async fn step(links: &Arc<Links>, step: Operation) -> Result<Answer> {
    let local = match links.local() {
        Some(local) if !links.is_cluster() => local,
        local => return Box::pin(step.alone(links, local.as_deref())).await,
    };
    match local.batch.enter(step) {
        Err(step) => {
            let on_its_way = OnItsWay { together: None, places: Vec::new(), links: links.clone(), local };
            Box::pin(step.alone(links, Some(&on_its_way.local))).await
        }
        Ok(outcome) => outcome.await.unwrap_or_else(|_| {
            let message = "the runtime that the request was sent from has ended";
            Err(error(ErrorKind::Unavailable, message).in_doubt(true))
        }),
    }
}

async fn send(mut on_its_way: OnItsWay, steps: Vec<Waiting>) {
    let (links, local) = (on_its_way.links.clone(), on_its_way.local.clone());
    // Who has given up meanwhile needs nothing sent.
    let steps: Vec<_> = steps.into_iter().filter(|(_, outcome)| !outcome.is_closed()).collect();
    let answer =
        within(GIVEN_UP_AFTER, together(&links, steps.iter().map(|(step, _)| step))).await.unwrap_or_else(|| {
            let message = format!("no answer within {GIVEN_UP_AFTER:?}");
            Err(error(ErrorKind::NetworkTimeout, message).in_doubt(true))
        });
    let turn = local.batch.turn.lock().await;
    let mut left = FuturesUnordered::new();
    for (at, (step, sender)) in steps.into_iter().enumerate() {
        let outcome = match &answer {
            Ok((time, done)) if done[at] == b'+' => Ok(Answer::short(*time)),
            Ok(_) => {
                left.push(alone((step, sender), &links, &local));
                continue;
            }
            Err(fault) => Err(error(fault.kind(), fault.message()).in_doubt(fault.is_in_doubt())),
        };
        let _gave_up = sender.send(outcome);
    }
    on_its_way.follow(&mut left, |step| alone(step, &links, &local)).await;
    // Those who were answered come first: what they ask for next goes together, instead of the first of them alone.
    tokio::task::yield_now().await;
    drop(on_its_way);
    // The next request is made, and written.
    tokio::task::yield_now().await;
    tokio::task::yield_now().await;
    drop(turn);
    while left.next().await.is_some() {}
}

/// Sends short steps in one request. Tells the time, and for each step whether it was done (`+`) or left alone.
pub(super) async fn together(
    links: &Arc<Links>,
    steps: impl ExactSizeIterator<Item = &Operation> + Clone,
) -> Result<(StoreTime, Vec<u8>)> {
    let count = steps.len();
    if count == 0 {
        return Ok((StoreTime::from_micros(0), Vec::new()));
    }
    let mut command = BATCH.by_hash(count);
    for step in steps.clone() {
        command.arg(step.names.record());
    }
    for step in steps {
        command.arg(&step.arguments);
    }
    // Any slot: it is no cluster.
    let answer = links.run(Target::Slot(0), &BATCH, command).await?;
    read(&answer, count).ok_or_else(|| malformed().in_doubt(true))
}

/// Does a step in a request of its own, unless its caller gives up.
async fn alone((step, mut caller): Waiting, links: &Arc<Links>, local: &Local) {
    let answer = tokio::select! {
        biased;
        answer = step.alone(links, Some(local)) => answer,
        () = caller.closed() => return,
    };
    let _gave_up = caller.send(answer);
}

/// Whether a request was refused because its slot is on its way from one node of a cluster to another.
fn is_being_moved(fault: &Error) -> bool {
    let source = std::error::Error::source(fault).and_then(|source| source.downcast_ref::<RedisError>());
    source.and_then(RedisError::code) == Some("TRYAGAIN")
}

/// The time, and a sign for each step.
fn read(answer: &Value, steps: usize) -> Option<(StoreTime, Vec<u8>)> {
    let Value::BulkString(answer) = answer else { return None };
    let (time, done) = answer.split_at_checked(16)?;
    let time = std::str::from_utf8(time).ok()?.parse().ok()?;
    (done.len() == steps).then(|| (StoreTime::from_micros(time), done.to_vec()))
}
