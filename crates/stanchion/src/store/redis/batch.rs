//! Several steps in one request, where more are asked for than are worth a request each.
//!
//! A few steps may be on their way at any time, each in a request of its own. What comes while they are is collected, and
//! goes as one script when an answer comes, one such request at a time: so a few callers wait for nobody, and many callers
//! share what a request costs. The script knows only
//! the short ways, those of a mutex that nobody else wants. What is not so easy is left alone by it, and is done in a
//! request of its own. A request of several steps is still one request: all its steps are in doubt, or none.
//!
//! Not in a cluster, where a script has one slot.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redis::Value;
use tokio::sync::oneshot;

use super::connect::{Links, Local, Target, within};
use super::error::error;
use super::reply::{Answer, malformed};
use super::scripts::{ACQUIRE, BATCH, END, LockNames};
use crate::error::{ErrorKind, Result};
use crate::store::StoreTime;

/// So many steps are on their way alone before steps are collected.
const ALONE: usize = 8;

/// A request of several steps is given up after this time, and its connection with it: who waits in line must not wait
/// for a link that is dead.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(3);

/// The most steps of a request: a script keeps the server from everybody else, here for a fraction of a millisecond.
const MOST_STEPS: usize = 64;

/// A step on a key that can go together with others if it is short.
#[derive(Debug)]
pub(super) enum Step {
    Acquire { names: LockNames, arguments: Vec<String> },
    End { names: LockNames, arguments: Vec<String> },
}

/// A short step: the record and the argument of the script.
#[derive(Debug)]
struct Short {
    record: String,
    argument: String,
}

/// What waits to be sent from one runtime.
#[derive(Debug, Default)]
pub(super) struct Batch(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    alone: usize,
    /// A request of several steps is on its way.
    together: bool,
    waiting: Vec<(Short, oneshot::Sender<Result<Outcome>>)>,
}

/// What became of a step that was sent with others.
#[derive(Clone, Copy, Debug)]
enum Outcome {
    Done(StoreTime),
    /// Nothing: it is to be done alone.
    Left,
}

impl Step {
    fn parts(&self) -> (&LockNames, &[String]) {
        match self {
            Self::Acquire { names, arguments } | Self::End { names, arguments } => (names, arguments),
        }
    }

    fn short(&self) -> Option<Short> {
        let (names, arguments) = self.parts();
        let argument = match (self, arguments) {
            (Self::Acquire { .. }, [who, until]) => format!("A{until}{who}"),
            (Self::End { .. }, [token]) => token.clone(),
            _ => return None,
        };
        Some(Short { record: names.record().to_owned(), argument })
    }

    async fn alone(&self, links: &Arc<Links>) -> Result<Answer> {
        let script = match self {
            Self::Acquire { .. } => &ACQUIRE,
            Self::End { .. } => &END,
        };
        let (names, arguments) = self.parts();
        let mut command = script.by_hash(3);
        for part in names.all() {
            command.arg(part);
        }
        for argument in arguments {
            command.arg(argument);
        }
        Answer::read(links.run(Target::of(names.record()), script, command).await?)
    }
}

impl Batch {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits with others; nothing if the step is to go alone, and now.
    fn wait(&self, step: &Step) -> Option<oneshot::Receiver<Result<Outcome>>> {
        let mut state = self.lock();
        // Whoever waits has something on its way before it: its end is what sends it.
        let must_wait = state.together || state.alone >= ALONE || !state.waiting.is_empty();
        if let Some(short) = must_wait.then(|| step.short()).flatten() {
            let (sender, outcome) = oneshot::channel();
            state.waiting.push((short, sender));
            return Some(outcome);
        }
        state.alone += 1;
        None
    }
}

/// A request that is on its way; when it is over, what was collected goes.
struct OnItsWay {
    is_alone: bool,
    links: Arc<Links>,
    local: Arc<Local>,
}

impl Drop for OnItsWay {
    fn drop(&mut self) {
        let mut state = self.local.batch.lock();
        match self.is_alone {
            true => state.alone -= 1,
            false => state.together = false,
        }
        // Who has given up meanwhile needs nothing sent.
        state.waiting.retain(|(_, outcome)| !outcome.is_closed());
        if state.waiting.is_empty() || state.together {
            return;
        }
        state.together = true;
        let some = state.waiting.len().min(MOST_STEPS);
        let steps: Vec<_> = state.waiting.drain(..some).collect();
        drop(state);
        let (links, local) = (self.links.clone(), self.local.clone());
        // Where the runtime has ended, the steps are dropped with their senders, which tells who waits.
        let runtime = local.runtime.clone();
        runtime.spawn(send(OnItsWay { is_alone: false, links, local }, steps));
    }
}

/// Does a step, alone or with others.
pub(super) async fn step(links: &Arc<Links>, step: Step) -> Result<Answer> {
    let local = match links.local() {
        Some(local) if !links.is_cluster() => local,
        _ => return step.alone(links).await,
    };
    match local.batch.wait(&step) {
        None => {
            let _on_its_way = OnItsWay { is_alone: true, links: links.clone(), local };
            step.alone(links).await
        }
        Some(outcome) => match outcome.await {
            Ok(Ok(Outcome::Done(time))) => Ok(Answer::short(time)),
            Ok(Ok(Outcome::Left)) => step.alone(links).await,
            Ok(Err(fault)) => Err(fault),
            Err(_) => {
                let message = "the runtime that the request was sent from has ended";
                Err(error(ErrorKind::Unavailable, message).in_doubt(true))
            }
        },
    }
}

async fn send(on_its_way: OnItsWay, steps: Vec<(Short, oneshot::Sender<Result<Outcome>>)>) {
    let mut command = BATCH.by_hash(steps.len());
    for (short, _) in &steps {
        command.arg(&short.record);
    }
    for (short, _) in &steps {
        command.arg(&short.argument);
    }
    // Any slot: it is no cluster.
    let request = on_its_way.links.run(Target::Slot(0), &BATCH, command);
    let answer = within(GIVEN_UP_AFTER, request)
        .await
        .unwrap_or_else(|| Err(error(ErrorKind::NetworkTimeout, format!("no answer within {GIVEN_UP_AFTER:?}"))));
    let outcomes = answer.and_then(|answer| read(&answer, steps.len()).ok_or_else(|| malformed().in_doubt(true)));
    for (at, (_, sender)) in steps.into_iter().enumerate() {
        let outcome = match &outcomes {
            Ok((time, done)) if done[at] == b'+' => Ok(Outcome::Done(*time)),
            Ok(_) => Ok(Outcome::Left),
            Err(fault) => Err(error(fault.kind(), fault.message()).in_doubt(fault.is_in_doubt())),
        };
        let _gave_up = sender.send(outcome);
    }
    // Those who were answered come first: what they ask for next goes together, instead of the first of them alone.
    tokio::task::yield_now().await;
    drop(on_its_way);
}

/// The time, and a sign for each step.
fn read(answer: &Value, steps: usize) -> Option<(StoreTime, Vec<u8>)> {
    let Value::BulkString(answer) = answer else { return None };
    let (time, done) = answer.split_at_checked(16)?;
    let time = std::str::from_utf8(time).ok()?.parse().ok()?;
    (done.len() == steps).then(|| (StoreTime::from_micros(time), done.to_vec()))
}
