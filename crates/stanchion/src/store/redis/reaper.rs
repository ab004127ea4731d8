//! Reaps the leftovers of expired sessions: a request that meets a foreign hold or waiter queries its session, and ends
//! the holds and waiters of expired ones.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::task::JoinSet;

use super::batch::{MAX_BATCH_SIZE, ScriptCall, run_batch};
use super::reply::Answer;
use super::scripts::{self, LockNames};
use super::sessions::CachedLiveness;
use super::{Inner, MAX_CONCURRENT_REQUESTS};
use crate::error::Result;
use crate::key::Key;
use crate::store::{Reply, StoreTime};
use crate::token::{SessionId, TokenId};

/// Maximum number of concurrent batches that reap one session. The server needs about three milliseconds for them.
const MAX_CONCURRENT_BATCHES: usize = 16;

impl Inner {
    /// Returns the expired sessions, and queries the server if the cache does not have an answer.
    async fn expired_among(&self, sessions: &[SessionId]) -> Result<Vec<SessionId>> {
        let now = self.clock.now();
        let (mut expired, mut unknown) = (Vec::new(), Vec::new());
        for session in sessions {
            match self.sessions.liveness(*session, now) {
                CachedLiveness::Alive(_) => {}
                CachedLiveness::Expired => expired.push(*session),
                CachedLiveness::Unknown => unknown.push(*session),
            }
        }
        // In a cluster each session is in another slot.
        let max_concurrent = if self.manager.is_cluster() { 1 } else { 100 };
        for some in unknown.chunks(max_concurrent) {
            expired.extend(self.query_sessions(some).await?.0);
        }
        Ok(expired)
    }

    /// Queries sessions in one slot. Returns the expired ones, and the server's time.
    pub(super) async fn query_sessions(&self, sessions: &[SessionId]) -> Result<(Vec<SessionId>, StoreTime)> {
        let names: Vec<_> = sessions.iter().map(|session| self.names.session(*session)).collect();
        let mut command = scripts::SESSION_REMAINING.by_hash(names.len());
        command.arg(&names);
        let sent_at = self.clock.now();
        let answer = self.manager.run(self.manager.target(&names[0]), &scripts::SESSION_REMAINING, command).await?;
        let answer = Answer::read(answer)?;
        let mut expired = Vec::new();
        for (session, left) in sessions.iter().zip(answer.spans()?) {
            if left.is_zero() {
                self.sessions.mark_expired(*session);
                expired.push(*session);
            } else {
                self.sessions.observed(*session, sent_at, left);
            }
        }
        Ok((expired, answer.time))
    }

    /// Queries whether a session is alive.
    pub(super) async fn is_alive(&self, session: SessionId) -> Result<Reply<bool>> {
        let (expired, time) = self.query_sessions(&[session]).await?;
        Ok(Reply { time, outcome: expired.is_empty() })
    }

    /// Ends the holds and waiters of expired sessions on a key, and hands the key on.
    async fn reap(&self, names: &LockNames, expired: &[SessionId]) -> Result<()> {
        let expired: Vec<_> = expired.iter().map(|session| session.to_hex()).collect();
        let expired: Vec<_> = expired.iter().map(String::as_str).collect();
        self.on_key(names, &scripts::REAP, &expired).await.map(drop)
    }

    /// Reaps the leftovers of the expired ones among these sessions on a key. Returns whether any had expired.
    pub(super) async fn reap_expired(&self, key: &Key, sessions: &[SessionId]) -> Result<bool> {
        if sessions.is_empty() {
            return Ok(false);
        }
        let expired = Box::pin(self.expired_among(sessions)).await?;
        if expired.is_empty() {
            return Ok(false);
        }
        Box::pin(self.reap(&self.names.lock(key), &expired)).await?;
        Ok(true)
    }

    /// From the second round on, reaps the whole queue. The first round covers only the holders and the head of the
    /// queue. Each round has to inspect the queue, and hundreds of sessions may have expired together.
    pub(super) async fn reap_whole_queue(&self, round: u32, key: &Key) -> Result<()> {
        if round > 0 {
            Box::pin(self.reconciled_state(key, &self.names.lock(key))).await?;
        }
        Ok(())
    }

    /// Reaps the session of a token of this process if it has expired.
    pub(super) async fn reap_own_session(&self, key: &Key, token: TokenId) -> Result<()> {
        if let Some(session) = self.sessions.session_of(token) {
            self.reap_expired(key, &[session]).await?;
        }
        Ok(())
    }

    /// Returns the time until the next change that nobody would push.
    pub(super) fn check_in(&self, by_time: Option<Duration>, sessions: &[SessionId]) -> Option<Duration> {
        let now = self.clock.now();
        let ends = sessions.iter().filter_map(|session| match self.sessions.liveness(*session, now) {
            CachedLiveness::Alive(until) => Some(until.since(now)),
            CachedLiveness::Expired | CachedLiveness::Unknown => None,
        });
        ends.chain(by_time).min()
    }

    /// Ends the waiters and the session-bound holds of an expired session, as far as they are cached here. If it is
    /// repeated after a fault, it continues with the rest.
    pub(super) async fn reap_session(self: &Arc<Self>, session: SessionId) -> Result<()> {
        let held = self.sessions.tokens(session);
        // In a cluster a request has one slot.
        let (max_concurrent, some) = if self.manager.is_cluster() {
            (MAX_CONCURRENT_REQUESTS, 1)
        } else {
            (MAX_CONCURRENT_BATCHES, MAX_BATCH_SIZE)
        };
        let chunks: Vec<_> = held.chunks(some).map(<[_]>::to_vec).collect();
        for_each_concurrently(chunks, max_concurrent, |some| {
            let inner = self.clone();
            async move { inner.reap_tokens(session, &some).await }
        })
        .await
    }

    /// Releases the mutexes without waiters in one request, and reaps the other keys one by one, which hands them on.
    async fn reap_tokens(&self, session: SessionId, held: &[(TokenId, Key)]) -> Result<()> {
        let call = |(token, key): &(TokenId, Key)| ScriptCall {
            script: &scripts::END,
            names: self.names.lock(key),
            arguments: vec![token.to_hex()],
        };
        let mut rest: Vec<_> = held.iter().collect();
        if !self.manager.is_cluster() {
            let calls: Vec<_> = held.iter().map(call).collect();
            let (_, done) = run_batch(&self.manager, calls.iter()).await?;
            let mut done = done.into_iter();
            rest.retain(|_| done.next() != Some(b'+'));
        }
        let reaped = join_all(rest.iter().map(|(_, key)| async { self.reap(&self.names.lock(key), &[session]).await }));
        reaped.await.into_iter().collect::<Result<()>>()?;
        self.sessions.forget_tokens(session, held.iter().map(|(token, _)| *token));
        Ok(())
    }

    /// Returns the server's time if the session has expired.
    pub(super) async fn time_if_expired(&self, session: SessionId) -> Result<Option<StoreTime>> {
        if Box::pin(self.expired_among(&[session])).await?.is_empty() {
            return Ok(None);
        }
        Box::pin(self.time()).await.map(Some)
    }
}

/// Does work for each item, with a limit on concurrent tasks. Returns the first fault.
pub(super) async fn for_each_concurrently<T, F>(
    items: Vec<T>,
    max_concurrent: usize,
    work: impl Fn(T) -> F,
) -> Result<()>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let mut tasks = JoinSet::new();
    let mut outcome = Ok(());
    for item in items {
        if tasks.len() >= max_concurrent
            && let Some(done) = tasks.join_next().await
        {
            outcome = outcome.and(done.unwrap_or(Ok(())));
        }
        tasks.spawn(work(item));
    }
    while let Some(done) = tasks.join_next().await {
        outcome = outcome.and(done.unwrap_or(Ok(())));
    }
    outcome
}
