//! Many steps in one request, where more are asked for than are worth a request each.
//!
//! A few steps may be on their way at any time, each in a request and a transaction of its own. What comes while they are
//! is collected, and goes as one call when an answer comes: so a few callers wait for nobody, and many callers share a
//! round trip and a write to the disk. The call knows only the short ways, those of a mutex that nobody else wants. What is
//! not so easy is left alone by it, and is done in a request of its own. It is one transaction: all its steps are in doubt,
//! or none.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::Inner;
use super::connect::{lock, within};
use super::error::{error, malformed};
use super::rows::{column, fence, not_after, parameters, time};
use crate::error::{ErrorKind, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::store::{AcquireRequest, StoreTime};
use crate::token::TokenId;

/// So many steps are on their way alone before steps are collected.
const ALONE: usize = 4;

/// So many requests of several steps are on their way at a time: the server does one while the answers of another are
/// dealt with here.
const TOGETHER: usize = 3;

/// The most steps of a request: those who want one of its keys wait until it is done.
const MOST_STEPS: usize = 64;

/// A request of several steps is given up after this time: who waits in line must not wait for a link that is dead.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(3);

/// A step in its short way.
#[derive(Debug)]
pub(super) struct Step {
    key: String,
    token: TokenId,
    /// Of an acquire.
    asked: Option<Asked>,
}

#[derive(Debug)]
struct Asked {
    session: Vec<u8>,
    not_after: i64,
    metadata: Option<String>,
    trace: Option<String>,
}

impl Step {
    /// Of a mutex without a term.
    pub(super) fn acquire(request: &AcquireRequest) -> Self {
        let asked = Asked {
            session: request.session.as_bytes().to_vec(),
            not_after: not_after(request.not_after),
            metadata: request.metadata.clone(),
            trace: request.trace.clone(),
        };
        Self { key: request.key.as_encoded().to_owned(), token: request.token, asked: Some(asked) }
    }

    /// Without a cooldown.
    pub(super) fn end(key: &Key, token: TokenId) -> Self {
        Self { key: key.as_encoded().to_owned(), token, asked: None }
    }
}

/// What became of a step.
pub(super) enum Outcome {
    Done(StoreTime, Fence),
    /// Nothing: it is to be done alone, while this is kept.
    Left(Option<OnItsWay>),
}

type Waiting = (Step, oneshot::Sender<Result<Option<(StoreTime, Fence)>>>);

/// What is on its way, and what waits to be sent.
#[derive(Debug, Default)]
pub(super) struct Together {
    alone: usize,
    /// Requests of several steps that are on their way, and the steps in them.
    requests: usize,
    steps: usize,
    waiting: Vec<Waiting>,
}

/// A request that is on its way; when it is over, what was collected goes.
pub(super) struct OnItsWay {
    /// How many steps are in it, or nothing for a step alone.
    together: Option<usize>,
    inner: Arc<Inner>,
}

impl Drop for OnItsWay {
    fn drop(&mut self) {
        {
            let mut state = lock(&self.inner.together);
            match self.together {
                None => state.alone -= 1,
                Some(steps) => {
                    state.requests -= 1;
                    state.steps -= steps;
                }
            }
        }
        send_some(&self.inner, TOGETHER);
    }
}

/// Does a step with others, or says that it is to be done alone.
pub(super) async fn attempt(inner: &Arc<Inner>, step: Step) -> Result<Outcome> {
    let outcome = {
        let mut state = lock(&inner.together);
        if state.requests == 0 && state.alone < ALONE && state.waiting.is_empty() {
            state.alone += 1;
            return Ok(Outcome::Left(Some(OnItsWay { together: None, inner: inner.clone() })));
        }
        let (sender, outcome) = oneshot::channel();
        state.waiting.push((step, sender));
        outcome
    };
    // Those alone may have to wait for a row, so that they are not what the others wait for.
    send_some(inner, 1);
    match outcome.await {
        Ok(Ok(Some((time, fence)))) => Ok(Outcome::Done(time, fence)),
        Ok(Ok(None)) => Ok(Outcome::Left(None)),
        Ok(Err(fault)) => Err(fault),
        Err(_) => Err(error(ErrorKind::Unavailable, "the store was dropped while it was used").in_doubt(true)),
    }
}

/// Sends what waits, or an equal part of it, if fewer requests than `most` are on their way.
fn send_some(inner: &Arc<Inner>, most: usize) {
    let mut state = lock(&inner.together);
    if state.requests >= most {
        return;
    }
    // Who has given up meanwhile needs nothing sent.
    state.waiting.retain(|(_, outcome)| !outcome.is_closed());
    if state.waiting.is_empty() {
        return;
    }
    let equal = (state.waiting.len() + state.steps).div_ceil(TOGETHER);
    let some = state.waiting.len().min(equal).min(MOST_STEPS);
    state.requests += 1;
    state.steps += some;
    let steps: Vec<_> = state.waiting.drain(..some).collect();
    drop(state);
    let on_its_way = OnItsWay { together: Some(some), inner: inner.clone() };
    // Without a thread for connections the steps are dropped with their senders, which tells who waits.
    if let Ok(runtime) = inner.pool.runtime() {
        runtime.spawn(send(on_its_way, steps));
    }
}

async fn send(on_its_way: OnItsWay, steps: Vec<Waiting>) {
    let late = || Err(error(ErrorKind::NetworkTimeout, format!("no answer within {GIVEN_UP_AFTER:?}")).in_doubt(true));
    let outcomes = within(GIVEN_UP_AFTER, ask(&on_its_way.inner, &steps)).await.unwrap_or_else(late);
    for (at, (_, sender)) in steps.into_iter().enumerate() {
        let outcome = match &outcomes {
            Ok(done) => Ok(done[at]),
            Err(fault) => Err(error(fault.kind(), fault.message()).in_doubt(fault.is_in_doubt())),
        };
        let _gave_up = sender.send(outcome);
    }
    drop(on_its_way);
}

/// When each step was done, and its fence; nothing where it was left alone.
async fn ask(inner: &Inner, steps: &[Waiting]) -> Result<Vec<Option<(StoreTime, Fence)>>> {
    let steps = || steps.iter().map(|(step, _)| step);
    let asked = || steps().map(|step| step.asked.as_ref());
    let keys: Vec<_> = steps().map(|step| step.key.as_str()).collect();
    let tokens: Vec<_> = steps().map(|step| step.token.as_bytes().as_slice()).collect();
    let sessions: Vec<_> = asked().map(|asked| asked.map(|asked| asked.session.as_slice())).collect();
    let latest: Vec<_> = asked().map(|asked| asked.map(|asked| asked.not_after)).collect();
    let metadata: Vec<_> = asked().map(|asked| asked.and_then(|asked| asked.metadata.as_deref())).collect();
    let traces: Vec<_> = asked().map(|asked| asked.and_then(|asked| asked.trace.as_deref())).collect();
    let parameters = parameters![
        keys => TEXT_ARRAY,
        tokens => BYTEA_ARRAY,
        sessions => BYTEA_ARRAY,
        latest => INT8_ARRAY,
        metadata => TEXT_ARRAY,
        traces => TEXT_ARRAY,
    ];
    let mut outcomes = vec![None; keys.len()];
    for row in inner.rows("together", parameters).await? {
        let place: i64 = column(&row, "place")?;
        let at = usize::try_from(place - 1).ok().and_then(|at| outcomes.get_mut(at)).ok_or_else(malformed)?;
        *at = Some((time(&row)?, fence(&row)?));
    }
    Ok(outcomes)
}
