//! Many steps in one request, where more are asked for than are worth a request each.
//!
//! A few steps may be on their way at any time, each in a request and a transaction of its own. What comes while they are
//! is collected, and goes as one call when an answer comes: so a few callers wait for nobody, and many callers share a
//! round trip and a write to the disk. That call waits for nobody's turn. What would have to is left alone by it, and is done
//! in a request of its own. It is one transaction: all its steps are in doubt, or none.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio_postgres::Row;

use super::Inner;
use super::connect::{lock, within};
use super::error::{error, malformed};
use super::rows::{column, micros, not_after, parameters};
use crate::error::{ErrorKind, Result};
use crate::key::Key;
use crate::store::{AcquireRequest, Term};
use crate::token::TokenId;

/// So many steps are on their way alone before steps are collected.
const ALONE: usize = 4;

/// So many requests of several steps are on their way at a time: the server does one while the answers of another are
/// dealt with here.
pub(super) const REQUESTS: usize = 3;

/// The most steps of a request: those who want one of its keys wait until it is done.
const MOST_STEPS: usize = 64;

/// A request of several steps is given up after this time: who waits in line must not wait for a link that is dead.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(3);

/// A step that can go with others.
#[derive(Debug)]
pub(super) enum Step {
    Acquire(AcquireRequest),
    Finish { key: Key, token: TokenId, cooldown: Option<Duration> },
}

impl Step {
    fn key(&self) -> &str {
        match self {
            Self::Acquire(request) => request.key.as_encoded(),
            Self::Finish { key, .. } => key.as_encoded(),
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

    fn asked(&self) -> Option<&AcquireRequest> {
        match self {
            Self::Acquire(request) => Some(request),
            Self::Finish { .. } => None,
        }
    }

    async fn alone(&self, inner: &Inner) -> Result<Row> {
        let (key, token) = (self.key(), self.token());
        let Some(asked) = self.asked() else {
            return inner.step("finish", parameters![key => TEXT, token => BYTEA, self.cooldown() => INT8]).await;
        };
        let parameters = parameters![
            key => TEXT,
            token => BYTEA,
            asked.session.as_bytes().as_slice() => BYTEA,
            whole(asked.demand.units()) => INT4,
            whole(asked.demand.capacity()) => INT4,
            is_bound(asked) => BOOL,
            asked.term.length().map(micros) => INT8,
            asked.enqueue => BOOL,
            not_after(asked.not_after) => INT8,
            asked.metadata => TEXT,
            asked.trace => TEXT,
        ];
        inner.step("acquire", parameters).await
    }
}

fn whole(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

fn is_bound(request: &AcquireRequest) -> bool {
    matches!(request.term, Term::Session { .. })
}

/// What became of a step: its row, or nothing, and it is to be done alone.
type Outcome = Result<Option<Row>>;

type Waiting = (Arc<Step>, oneshot::Sender<Outcome>);

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
        send_some(&self.inner);
    }
}

/// Does a step, with others or alone.
pub(super) async fn step(inner: &Arc<Inner>, step: Step) -> Result<Row> {
    let is_alone = {
        let mut state = lock(&inner.together);
        let is_alone = state.requests == 0 && state.alone < ALONE && state.waiting.is_empty();
        state.alone += usize::from(is_alone);
        is_alone
    };
    if is_alone {
        let _on_its_way = OnItsWay { together: None, inner: inner.clone() };
        return step.alone(inner).await;
    }
    let step = Arc::new(step);
    let (sender, outcome) = oneshot::channel();
    lock(&inner.together).waiting.push((step.clone(), sender));
    // Those alone may have to wait for a turn, so that they are not what the others wait for.
    send_some(inner);
    match outcome.await {
        Ok(Ok(Some(row))) => Ok(row),
        Ok(Ok(None)) => step.alone(inner).await,
        Ok(Err(fault)) => Err(fault),
        Err(_) => Err(error(ErrorKind::Unavailable, "the store was dropped while it was used").in_doubt(true)),
    }
}

/// Sends an equal part of what waits and what is on its way, once as much waits. Those who were answered together ask
/// together for what they want next: to send the first of them at once would leave the others for later.
fn send_some(inner: &Arc<Inner>) {
    let mut state = lock(&inner.together);
    if state.requests >= REQUESTS {
        return;
    }
    // Who has given up meanwhile needs nothing sent.
    state.waiting.retain(|(_, outcome)| !outcome.is_closed());
    let equal = (state.waiting.len() + state.steps).div_ceil(REQUESTS);
    let some = match state.requests {
        0 => state.waiting.len().min(equal.max(1)),
        _ if state.waiting.len() < equal => 0,
        _ => equal,
    };
    let some = some.min(MOST_STEPS);
    if some == 0 {
        return;
    }
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
    let mut outcomes = outcomes.map(Vec::into_iter);
    for (_, sender) in steps {
        let outcome = match &mut outcomes {
            Ok(rows) => Ok(rows.next().flatten()),
            Err(fault) => Err(error(fault.kind(), fault.message()).in_doubt(fault.is_in_doubt())),
        };
        let _gave_up = sender.send(outcome);
    }
    drop(on_its_way);
}

/// The row of each step; nothing where it was left alone.
async fn ask(inner: &Inner, steps: &[Waiting]) -> Result<Vec<Option<Row>>> {
    /// One value of each step, as an array.
    fn each<'a, T>(steps: &'a [Waiting], value: impl Fn(&'a Step) -> T) -> Vec<T> {
        steps.iter().map(|(step, _)| value(step)).collect()
    }
    /// The same of what only an acquire has.
    fn asked<'a, T>(steps: &'a [Waiting], value: impl Fn(&'a AcquireRequest) -> T) -> Vec<Option<T>> {
        each(steps, |step| step.asked().map(&value))
    }
    let parameters = parameters![
        each(steps, Step::key) => TEXT_ARRAY,
        each(steps, Step::token) => BYTEA_ARRAY,
        asked(steps, |asked| asked.session.as_bytes().as_slice()) => BYTEA_ARRAY,
        asked(steps, |asked| whole(asked.demand.units())) => INT4_ARRAY,
        asked(steps, |asked| whole(asked.demand.capacity())) => INT4_ARRAY,
        asked(steps, is_bound) => BOOL_ARRAY,
        each(steps, |step| step.asked().and_then(|asked| asked.term.length()).map(micros)) => INT8_ARRAY,
        asked(steps, |asked| asked.enqueue) => BOOL_ARRAY,
        asked(steps, |asked| not_after(asked.not_after)) => INT8_ARRAY,
        each(steps, |step| step.asked()?.metadata.as_deref()) => TEXT_ARRAY,
        each(steps, |step| step.asked()?.trace.as_deref()) => TEXT_ARRAY,
        each(steps, Step::cooldown) => INT8_ARRAY,
    ];
    let mut outcomes: Vec<_> = steps.iter().map(|_| None).collect();
    for row in inner.pool.ask_together(&inner.call("together", parameters.len()), parameters).await? {
        let place: i64 = column(&row, "place")?;
        let at = usize::try_from(place - 1).ok().and_then(|at| outcomes.get_mut(at)).ok_or_else(malformed)?;
        *at = Some(row);
    }
    Ok(outcomes)
}
