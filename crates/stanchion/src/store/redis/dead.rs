//! What dead sessions leave: found by whoever it is in the way of, and ended.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::task::JoinSet;

use super::batch::{MOST_STEPS, Operation, together};
use super::reply::Answer;
use super::scripts::{self, LockNames};
use super::sessions::Known;
use super::{AT_ONCE, Inner};
use crate::error::Result;
use crate::key::Key;
use crate::store::{Reply, StoreTime};
use crate::token::{SessionId, TokenId};

/// Maximum number of requests of several steps on their way while a session is ended: at the server that is three milliseconds.
const SHARED_AT_ONCE: usize = 16;

impl Inner {
    /// Those of the sessions that are dead. Asks for those that are not known to live.
    async fn dead_of(&self, sessions: &[SessionId]) -> Result<Vec<SessionId>> {
        let now = self.clock.now();
        let (mut dead, mut unknown) = (Vec::new(), Vec::new());
        for session in sessions {
            match self.sessions.known(*session, now) {
                Known::Alive(_) => {}
                Known::Dead => dead.push(*session),
                Known::Unknown => unknown.push(*session),
            }
        }
        // In a cluster each is elsewhere.
        let at_once = if self.links.is_cluster() { 1 } else { 100 };
        for some in unknown.chunks(at_once) {
            dead.extend(self.look_at(some).await?.0);
        }
        Ok(dead)
    }

    /// Asks for sessions that are in one slot. Those that are dead, and the time at which they are.
    pub(super) async fn look_at(&self, sessions: &[SessionId]) -> Result<(Vec<SessionId>, StoreTime)> {
        let names: Vec<_> = sessions.iter().map(|session| self.names.session(*session)).collect();
        let mut command = scripts::SESSION_LOOK.by_hash(names.len());
        command.arg(&names);
        let asked = self.clock.now();
        let answer = self.links.run(self.links.target(&names[0]), &scripts::SESSION_LOOK, command).await?;
        let answer = Answer::read(answer)?;
        let mut dead = Vec::new();
        for (session, left) in sessions.iter().zip(answer.spans()?) {
            if left.is_zero() {
                self.sessions.died(*session);
                dead.push(*session);
            } else {
                self.sessions.seen(*session, asked, left);
            }
        }
        Ok((dead, answer.time))
    }

    /// Whether a session lives, by the server's word of now.
    pub(super) async fn lives(&self, session: SessionId) -> Result<Reply<bool>> {
        let (dead, time) = self.look_at(&[session]).await?;
        Ok(Reply { time, outcome: dead.is_empty() })
    }

    /// Ends what these dead sessions have of a key, and hands it on.
    async fn bury(&self, names: &LockNames, dead: &[SessionId]) -> Result<()> {
        let dead: Vec<_> = dead.iter().map(|session| session.to_hex()).collect();
        let dead: Vec<_> = dead.iter().map(String::as_str).collect();
        self.on_key(names, &scripts::BURY, &dead).await.map(drop)
    }

    /// Ends what dead sessions have of a key. Tells whether there was something.
    pub(super) async fn bury_the_dead(&self, key: &Key, sessions: &[SessionId]) -> Result<bool> {
        if sessions.is_empty() {
            return Ok(false);
        }
        let dead = Box::pin(self.dead_of(sessions)).await?;
        if dead.is_empty() {
            return Ok(false);
        }
        Box::pin(self.bury(&self.names.lock(key), &dead)).await?;
        Ok(true)
    }

    /// One round ends what the holders and the head of the queue had. Where another one was needed, all who wait are looked
    /// at: each round costs a look at the queue, and hundreds may have died together.
    pub(super) async fn bury_the_others(&self, round: u32, key: &Key) -> Result<()> {
        if round > 0 {
            Box::pin(self.settled(key, &self.names.lock(key))).await?;
        }
        Ok(())
    }

    /// The session that a token is held by, if that is one of this process, is asked for where it may be dead.
    pub(super) async fn settle_own(&self, key: &Key, token: TokenId) -> Result<()> {
        if let Some(session) = self.sessions.holder(token) {
            self.bury_the_dead(key, &[session]).await?;
        }
        Ok(())
    }

    /// How long until something may change that nobody would push.
    pub(super) fn check_in(&self, by_time: Option<Duration>, sessions: &[SessionId]) -> Option<Duration> {
        let now = self.clock.now();
        let ends = sessions.iter().filter_map(|session| match self.sessions.known(*session, now) {
            Known::Alive(until) => Some(until.since(now)),
            Known::Dead | Known::Unknown => None,
        });
        ends.chain(by_time).min()
    }

    /// Ends what a dead session has that is known here: its waiters and the holds that depend on it. Repeated after a fault
    /// it goes on where it was.
    pub(super) async fn bury_all(self: &Arc<Self>, session: SessionId) -> Result<()> {
        let held = self.sessions.held(session);
        // In a cluster a request has one slot.
        let (at_once, some) = if self.links.is_cluster() { (AT_ONCE, 1) } else { (SHARED_AT_ONCE, MOST_STEPS) };
        let chunks: Vec<_> = held.chunks(some).map(<[_]>::to_vec).collect();
        all_at_once(chunks, at_once, |some| {
            let inner = self.clone();
            async move { inner.bury_some(session, &some).await }
        })
        .await
    }

    /// Gives back the mutexes that nobody waits for in one request, and ends the rest key by key, which hands them on.
    async fn bury_some(&self, session: SessionId, held: &[(TokenId, Key)]) -> Result<()> {
        let step = |(token, key): &(TokenId, Key)| Operation {
            script: &scripts::END,
            names: self.names.lock(key),
            arguments: vec![token.to_hex()],
        };
        let mut rest: Vec<_> = held.iter().collect();
        if !self.links.is_cluster() {
            let steps: Vec<_> = held.iter().map(step).collect();
            let (_, done) = together(&self.links, steps.iter()).await?;
            let mut done = done.into_iter();
            rest.retain(|_| done.next() != Some(b'+'));
        }
        let buried = join_all(rest.iter().map(|(_, key)| async { self.bury(&self.names.lock(key), &[session]).await }));
        buried.await.into_iter().collect::<Result<()>>()?;
        self.sessions.ended_of(session, held.iter().map(|(token, _)| *token));
        Ok(())
    }

    /// The store's time if the session is dead.
    pub(super) async fn dead_since(&self, session: SessionId) -> Result<Option<StoreTime>> {
        if Box::pin(self.dead_of(&[session])).await?.is_empty() {
            return Ok(None);
        }
        Box::pin(self.time()).await.map(Some)
    }
}

/// Does this for each, so many at a time, in tasks of this runtime. The first fault, if there was one.
pub(super) async fn all_at_once<T, F>(each: Vec<T>, at_once: usize, work: impl Fn(T) -> F) -> Result<()>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let mut tasks = JoinSet::new();
    let mut outcome = Ok(());
    for one in each {
        if tasks.len() >= at_once
            && let Some(done) = tasks.join_next().await
        {
            outcome = outcome.and(done.unwrap_or(Ok(())));
        }
        tasks.spawn(work(one));
    }
    while let Some(done) = tasks.join_next().await {
        outcome = outcome.and(done.unwrap_or(Ok(())));
    }
    outcome
}
