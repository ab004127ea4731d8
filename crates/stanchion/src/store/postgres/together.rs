//! Many steps in one request, where more are asked for than are worth a request each.
//!
//! Of the steps on a key one request of ours is on its way at a time: what is asked for meanwhile stands in line here, and
//! goes as one call when the answer has come. So no two requests of a process wait for each other's turn, and a key whose
//! turn another transaction has takes one connection, however many want it.
//!
//! A few keys may be asked for in requests of their own at any time, which wait for the turn of their key. What comes while
//! they are on their way is collected, and goes as one call for many keys when an answer comes: so a few callers wait for
//! nobody, and many callers share a round trip and a write to the disk. That call waits for nobody's turn. What would have
//! to is left alone by it, and goes in a request of its key alone. A request is one transaction: all its steps are in doubt,
//! or none.
//!
//! Requests are driven where connections live. Whoever asked may wait for the answer, or stop waiting, or never look again:
//! those behind go on.

use std::collections::{HashMap, VecDeque};
use std::pin::pin;
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
use crate::store::{AcquireRequest, Lifetime};
use crate::token::TokenId;

/// So many keys are asked for alone before steps are collected.
const ALONE: usize = 4;

/// So many requests for many keys are on their way at a time: the server does one while the answers of another are dealt
/// with here.
pub(super) const REQUESTS: usize = 3;

/// The most steps of a request: those who want one of its keys wait until it is done.
const MOST_STEPS: usize = 64;

/// A request that waits for nobody is given up after this time: who stands in line must not wait for a link that is dead.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(3);

/// The same for one that waits for the turn of its key: the server gives up first, and says so.
const TURN_WITHIN: Duration = Duration::from_secs(6);

/// Time after which a request is given up that nobody waits for any more. Until then those behind it wait: what ends one of its
/// tokens would overtake it on another connection, and would have to be repeated.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(1);

/// A step that can go with others.
#[derive(Debug)]
pub(super) enum Operation {
    Acquire(AcquireRequest),
    Finish { key: Key, token: TokenId, cooldown: Option<Duration> },
}

impl Operation {
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

    fn asked(&self) -> Option<&AcquireRequest> {
        match self {
            Self::Acquire(request) => Some(request),
            Self::Finish { .. } => None,
        }
    }

    async fn alone(&self, inner: &Inner) -> Result<Row> {
        let (key, token) = (self.key().as_encoded(), self.token());
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
            asked.lifetime.length().map(micros) => INT8,
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
    matches!(request.lifetime, Lifetime::Session { .. })
}

/// A step, and who waits for its row.
type Waiting = (Operation, oneshot::Sender<Result<Row>>);

/// What is on its way, and what stands in line.
#[derive(Debug, Default)]
pub(super) struct Together {
    /// Requests for one key that are on their way, without those that one for many left.
    alone: usize,
    /// Requests for many keys that are on their way, and the steps in them.
    requests: usize,
    steps: usize,
    /// The line of each key that a request is on its way for, or that somebody stands in.
    lines: HashMap<Key, Line>,
    /// The keys that nothing is on its way for, as they came; apart from the others those that a request for many left.
    ready: VecDeque<Key>,
    left: VecDeque<Key>,
}

#[derive(Debug, Default)]
struct Line {
    is_asked_for: bool,
    is_left: bool,
    /// Who gives back goes first: that is what the others wait for.
    finishes: VecDeque<Waiting>,
    acquires: VecDeque<Waiting>,
}

impl Line {
    fn part(&mut self, step: &Operation) -> &mut VecDeque<Waiting> {
        match step {
            Operation::Acquire(_) => &mut self.acquires,
            Operation::Finish { .. } => &mut self.finishes,
        }
    }

    fn len(&self) -> usize {
        self.finishes.len() + self.acquires.len()
    }

    /// The first who still wait for an answer. Who has given up needs nothing sent.
    fn take(&mut self, most: usize) -> Vec<Waiting> {
        let mut some = Vec::new();
        for part in [&mut self.finishes, &mut self.acquires] {
            part.retain(|(_, outcome)| !outcome.is_closed());
            some.extend(part.drain(..part.len().min(most - some.len())));
        }
        some
    }
}

/// How a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// For one key, whose turn it waits for.
    Alone,
    /// The same, for a key that a request for many left.
    Left,
    /// For many keys, whose turns it does not wait for.
    Many,
}

impl Together {
    fn enter(&mut self, step: Operation, outcome: oneshot::Sender<Result<Row>>) {
        let line = self.lines.entry(step.key().clone()).or_default();
        if line.len() == 0 && !line.is_asked_for {
            self.ready.push_back(step.key().clone());
        }
        line.part(&step).push_back((step, outcome));
    }

    /// What is to be sent now.
    fn next(&mut self) -> Option<(Way, Vec<Waiting>)> {
        loop {
            let mut steps = Vec::new();
            let way = if let Some(key) = self.left.pop_front() {
                self.take(&key, &mut steps, MOST_STEPS);
                Way::Left
            } else if self.requests == 0 && self.alone < ALONE && self.ready.len() == 1 {
                let key = self.ready.pop_front()?;
                self.take(&key, &mut steps, MOST_STEPS);
                Way::Alone
            } else {
                let some = self.equal_part()?;
                while steps.len() < some
                    && let Some(key) = self.ready.pop_front()
                {
                    self.take(&key, &mut steps, some);
                }
                Way::Many
            };
            if steps.is_empty() {
                // All of them have given up.
                continue;
            }
            match way {
                Way::Alone => self.alone += 1,
                Way::Left => {}
                Way::Many => {
                    self.requests += 1;
                    self.steps += steps.len();
                }
            }
            return Some((way, steps));
        }
    }

    /// An equal part of what waits and what is on its way, once as much waits. Those who were answered together ask
    /// together for what they want next: to send the first of them at once would leave the others for later.
    fn equal_part(&self) -> Option<usize> {
        let waiting: usize = self.ready.iter().filter_map(|key| self.lines.get(key)).map(Line::len).sum();
        let equal = (waiting + self.steps).div_ceil(REQUESTS);
        let goes = waiting > 0 && self.requests < REQUESTS && (self.requests == 0 || waiting >= equal);
        goes.then(|| equal.min(MOST_STEPS))
    }

    /// Takes steps on a key, until there are so many.
    fn take(&mut self, key: &Key, steps: &mut Vec<Waiting>, until: usize) {
        let Some(line) = self.lines.get_mut(key) else { return };
        let before = steps.len();
        steps.append(&mut line.take(until - before));
        if steps.len() == before {
            self.lines.remove(key);
        } else {
            line.is_asked_for = true;
            line.is_left = false;
        }
    }

    /// A request for these keys is over, perhaps for one of them several times. What it left is the first in line.
    fn over(&mut self, keys: &[Key], left: Vec<Waiting>) {
        for (step, outcome) in left.into_iter().rev() {
            if let Some(line) = self.lines.get_mut(step.key()) {
                line.is_left = true;
                line.part(&step).push_front((step, outcome));
            }
        }
        for key in keys {
            let Some(line) = self.lines.get_mut(key) else { continue };
            if !std::mem::take(&mut line.is_asked_for) {
                continue;
            }
            if line.len() == 0 {
                self.lines.remove(key);
            } else if line.is_left {
                self.left.push_back(key.clone());
            } else {
                self.ready.push_back(key.clone());
            }
        }
    }
}

/// A request that is on its way. When it is over, what stands in line for its keys can go.
struct Request {
    way: Way,
    /// The key of each step.
    keys: Vec<Key>,
    /// What it did not do.
    left: Vec<Waiting>,
    inner: Arc<Inner>,
}

impl Drop for Request {
    fn drop(&mut self) {
        {
            let mut state = lock(&self.inner.together);
            match self.way {
                Way::Alone => state.alone -= 1,
                Way::Left => {}
                Way::Many => {
                    state.requests -= 1;
                    state.steps -= self.keys.len();
                }
            }
            state.over(&self.keys, std::mem::take(&mut self.left));
        }
        send(&self.inner);
    }
}

/// Does a step, with others or alone.
pub(super) async fn step(inner: &Arc<Inner>, step: Operation) -> Result<Row> {
    // Without a thread for connections nothing is entered.
    inner.pool.runtime()?;
    let (sender, outcome) = oneshot::channel();
    lock(&inner.together).enter(step, sender);
    send(inner);
    let dropped = |_| Err(error(ErrorKind::Unavailable, "the store was dropped while it was used").in_doubt(true));
    outcome.await.unwrap_or_else(dropped)
}

/// Sends what can go.
fn send(inner: &Arc<Inner>) {
    loop {
        let Some((way, steps)) = lock(&inner.together).next() else { return };
        let keys = steps.iter().map(|(step, _)| step.key().clone()).collect();
        let request = Request { way, keys, left: Vec::new(), inner: inner.clone() };
        if let Ok(runtime) = inner.pool.runtime() {
            runtime.spawn(request.go(steps));
        }
    }
}

impl Request {
    async fn go(mut self, steps: Vec<Waiting>) {
        let (steps, mut outcomes): (Vec<_>, Vec<_>) = steps.into_iter().unzip();
        let limit = if self.way == Way::Many { GIVEN_UP_AFTER } else { TURN_WITHIN };
        let late = || Err(error(ErrorKind::NetworkTimeout, format!("no answer within {limit:?}")).in_doubt(true));
        let rows = {
            let mut asking = pin!(within(limit, self.ask(&steps)));
            tokio::select! {
                biased;
                rows = &mut asking => rows.unwrap_or_else(late),
                () = all_gave_up(&mut outcomes) => {
                    let _forgotten = within(FORGOTTEN_AFTER, asking).await;
                    return;
                }
            }
        };
        match rows {
            Ok(rows) => {
                for ((step, outcome), row) in steps.into_iter().zip(outcomes).zip(rows) {
                    match row {
                        Some(row) => drop(outcome.send(Ok(row))),
                        None => self.left.push((step, outcome)),
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

    /// The row of each step; nothing where it was left.
    async fn ask(&self, steps: &[Operation]) -> Result<Vec<Option<Row>>> {
        let (inner, pool) = (&self.inner, &self.inner.pool);
        if let (Way::Alone | Way::Left, [step]) = (self.way, steps) {
            return Ok(vec![Some(step.alone(inner).await?)]);
        }
        /// One value of each step, as an array.
        fn each<'a, T>(steps: &'a [Operation], value: impl Fn(&'a Operation) -> T) -> Vec<T> {
            steps.iter().map(value).collect()
        }
        /// The same of what only an acquire has.
        fn asked<'a, T>(steps: &'a [Operation], value: impl Fn(&'a AcquireRequest) -> T) -> Vec<Option<T>> {
            each(steps, |step| step.asked().map(&value))
        }
        let parameters = parameters![
            each(steps, |step| step.key().as_encoded()) => TEXT_ARRAY,
            each(steps, Operation::token) => BYTEA_ARRAY,
            asked(steps, |asked| asked.session.as_bytes().as_slice()) => BYTEA_ARRAY,
            asked(steps, |asked| whole(asked.demand.units())) => INT4_ARRAY,
            asked(steps, |asked| whole(asked.demand.capacity())) => INT4_ARRAY,
            asked(steps, is_bound) => BOOL_ARRAY,
            each(steps, |step| step.asked().and_then(|asked| asked.lifetime.length()).map(micros)) => INT8_ARRAY,
            asked(steps, |asked| asked.enqueue) => BOOL_ARRAY,
            asked(steps, |asked| not_after(asked.not_after)) => INT8_ARRAY,
            each(steps, |step| step.asked()?.metadata.as_deref()) => TEXT_ARRAY,
            each(steps, |step| step.asked()?.trace.as_deref()) => TEXT_ARRAY,
            each(steps, Operation::cooldown) => INT8_ARRAY,
            (self.way != Way::Many) => BOOL,
        ];
        let statement = inner.call("together", parameters.len());
        let rows = match self.way {
            Way::Alone | Way::Left => pool.ask(&statement, parameters).await?,
            Way::Many => pool.ask_together(&statement, parameters).await?,
        };
        let mut outcomes: Vec<_> = steps.iter().map(|_| None).collect();
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
