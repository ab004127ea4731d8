//! Stores locks in Redis, Valkey and compatible servers: one server, a primary with sentinels, or a cluster.
//!
//! # Layout
//! - The record of a key is one string. Its waiters are in two more Redis keys that exist only while there are some.
//!   All three share a slot, and each operation is one script on them.
//! - A session is a Redis key of its own, in another slot of a cluster, so no script can see whether a session is
//!   alive. A process may meet a hold or a waiter of a session that it does not know to be alive. It then queries the
//!   session, and reaps the leftovers of an expired one (`reaper.rs`). An expired session never becomes alive again, so
//!   reaping is correct however late it happens.
//! - A hand-off may therefore grant the key to an expired session, and the next request reaps that hold. This does no
//!   harm, because a guard is valid only while its own session is.
//!
//! # Invariants
//! 1. The cached `alive_until` of a session is never later than the server's own time limit, because it counts from
//!    before the request was sent.
//! 2. A request is sent once. It is sent again only after it was answered, and only if the answer changed nothing or
//!    the second request finds the effect of the first.

use std::sync::Arc;
use std::time::Duration;

use ::redis::{Cmd, Value};
use async_trait::async_trait;

use self::config::Config;
use self::connect::{ConnectionManager, Dispatch, Target};
use self::error::{NAME, error};
use self::reaper::for_each_concurrently;
use self::reply::{Answer, malformed, write_texts};
use self::scripts::{LockNames, Names, Script};
use self::sessions::{CachedLiveness, SessionCache};
use super::*;
use crate::clock::Clock;
use crate::error::{ErrorKind, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::token::{SessionId, TokenId};

mod batch;
mod check;
mod cluster;
mod codec;
mod config;
mod connect;
mod error;
mod inspect;
mod list;
mod node;
mod push;
mod reaper;
mod recovery;
mod reply;
mod scripts;
mod sentinel;
mod sessions;

/// Minimum time that an ended session is remembered; otherwise twice its ttl. Until then it cannot be opened again.
const MIN_SESSION_RETENTION: Duration = Duration::from_secs(60);

/// Minimum time that a record lives after a write.
const MIN_RECORD_LIFE: Duration = Duration::from_secs(24 * 60 * 60);

/// Maximum number of times that one operation reaps expired sessions and tries again.
const MAX_REAP_ROUNDS: u32 = 16;

/// Maximum number of concurrent requests of a task that sends many.
const MAX_CONCURRENT_REQUESTS: usize = 256;

/// Locks in Redis or Valkey.
///
/// | URL | |
/// |---|---|
/// | `redis://[user:password@]host[:port][/database]` | one server |
/// | `rediss://…` | the same over TLS; certificates are verified with the system's roots |
/// | `redis+unix:///path/to/redis.sock?db=0` | one server, by a Unix socket |
/// | `redis+sentinel://host1,host2,host3/service[/database]` | the primary that the sentinels name |
/// | `redis+cluster://host1,host2` | a cluster, by some of its nodes |
///
/// Options:
/// - `prefix`: the first part of the name of every Redis key; `stanchion` by default.
/// - `min_replicas`: the number of replicas that must have a grant before it counts; 0 by default.
/// - `ca_file` (with TLS): the roots to trust in place of the system's.
/// - `cert_file`, `key_file` (with TLS): the certificate of this client and its key.
/// - `sentinel_user`, `sentinel_password`: the credentials for the sentinels.
///
/// `rediss+sentinel` and `rediss+cluster` connect over TLS. Write special characters in a user or a password as `%XX`.
///
/// # Requirements
/// Redis 6.2 or later, or Valkey, with `maxmemory-policy noeviction`. If the store has a user of its own, this access
/// list is enough (Redis 7; `stanchion` is the prefix):
/// ```text
#[doc = include_str!("access_list.txt")]
/// ```
/// With `+config|get +info` the store also reports settings that lose locks. A user of the sentinels needs
/// `+sentinel|get-master-addr-by-name`. With `+sentinel|master +sentinel|replicas` as well, the newest report counts if
/// the sentinels name different servers, and service resumes soon after a failover.
///
/// Managed services and proxies reject some commands. The store needs the commands for scripts and keys, and its error
/// names a missing one. Without the following commands it works, and reports a warning
/// ([`Locks::warnings`](crate::Locks::warnings)):
///
/// | rejected | consequence |
/// |---|---|
/// | `ROLE` | a replica is noticed only when it rejects a write |
/// | `CONFIG`, `INFO` | settings that lose locks are not noticed |
/// | `SUBSCRIBE`, `PUBLISH` | waiting calls poll once per second, and no hold lingers |
/// | `SCAN` | keys cannot be listed |
///
/// `SELECT` is needed for a database other than 0, `WAIT` for `min_replicas`, `CLUSTER SLOTS` in a cluster.
///
/// # Trust
/// The store trusts the server. A hostile or broken server can answer with anything, and each answer is read whole: an
/// answer of some hundred megabytes needs that much memory while the attempt lasts. Use TLS (`rediss`), so that nobody
/// can impersonate the server. The store warns about a password that is sent unencrypted to another machine. Anyone who
/// may write keys with the prefix, or publish to channels with it, can take locks from holders and delay waiters: give
/// each application a user of its own.
///
/// # Effects on the process
/// The store connects once for each Tokio runtime that uses it, once for the keeper and once for pushes. With TLS it
/// installs `rustls`' `ring` provider for the process, unless a provider is installed. In a Tokio runtime that was
/// built without I/O, the first attempt to connect panics in a task, which the panic hook reports; the store then uses
/// the keeper's connection.
///
/// # Limits
/// A server that restarts without persistence, or a failover to a replica that lacks the last writes, forgets holds.
/// The keeper then checks every hold with the server and reports the lost ones. Fences do not repeat, because they
/// follow the server's clock. Until that check a holder may not know of its loss, so check fences.
///
/// `min_replicas` makes such losses rarer: a grant in answer to a request counts only when that many replicas have it.
/// It is not a quorum, and a grant by hand-off does not wait. If the connection breaks between the grant and the check
/// of the replicas, the outcome is unknown.
#[derive(Clone, Debug)]
pub struct Redis {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    manager: Arc<ConnectionManager>,
    names: Names,
    sessions: SessionCache,
    clock: Clock,
    min_replicas: u32,
    is_checked: tokio::sync::Mutex<bool>,
}

impl Redis {
    /// Returns a store at this URL. It sends nothing yet.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a malformed URL.
    pub fn from_url(url: &str) -> Result<Self> {
        let config = Config::from_url(url)?;
        let inner = Inner {
            names: Names::new(&config.prefix),
            sessions: SessionCache::default(),
            clock: Clock::system(),
            min_replicas: config.min_replicas,
            is_checked: tokio::sync::Mutex::new(false),
            manager: Arc::new(ConnectionManager::new(config)),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Returns the product and the version of the server, such as `Redis 7.2.4`, for people. In a cluster it is one of
    /// the servers.
    ///
    /// # Errors
    /// [`ErrorKind::Unauthorized`] if the server rejects `INFO`; the errors of a request.
    ///
    /// # Cancel safety
    /// Only reads.
    pub async fn server(&self) -> Result<String> {
        let mut command = ::redis::cmd("INFO");
        command.arg("server");
        let answer = self.inner.manager.query(Target::Slot(0), &command).await?;
        check::product(&::redis::from_redis_value::<String>(answer).map_err(|_| malformed())?).ok_or_else(malformed)
    }
}

fn micros(span: Duration) -> String {
    span.as_micros().to_string()
}

fn millis(span: Duration) -> String {
    span.as_millis().to_string()
}

impl Inner {
    async fn on_key(&self, names: &LockNames, script: &'static Script, arguments: &[&str]) -> Result<Answer> {
        let mut command = script.by_hash(3);
        command.arg(&names.all());
        for argument in arguments {
            command.arg(argument);
        }
        Answer::read(self.manager.run(self.manager.target(names.record()), script, command).await?)
    }

    async fn on_session(&self, session: SessionId, script: &'static Script, arguments: &[&str]) -> Result<Answer> {
        let name = self.names.session(session);
        let mut command = script.by_hash(1);
        command.arg(&name);
        for argument in arguments {
            command.arg(argument);
        }
        Answer::read(self.manager.run(self.manager.target(&name), script, command).await?)
    }

    /// Runs a script that may grant. If replicas must have the grant, the call is sent alone and the check of the
    /// replicas over the same connection: another connection may lead to a server that never had the grant, and would
    /// confirm it.
    async fn run_grant(&self, call: batch::ScriptCall) -> Result<Answer> {
        if self.min_replicas == 0 {
            return batch::run(&self.manager, call).await;
        }
        let (answer, dispatch) =
            Box::pin(call.single_with_dispatch(&self.manager, self.manager.local().as_deref())).await?;
        if matches!(answer.status(), "short" | "granted" | "adopted" | "lingers") {
            // The record is written even if the check fails.
            Box::pin(self.wait_for_replicas(dispatch)).await.map_err(|fault| fault.in_doubt(true))?;
        }
        Ok(answer)
    }

    /// Waits until enough replicas have the writes of this connection.
    async fn wait_for_replicas(&self, dispatch: Dispatch) -> Result<()> {
        let mut command = ::redis::cmd("WAIT");
        command.arg(self.min_replicas).arg(1_000);
        let have = match self.manager.query_over(dispatch, &command).await? {
            Value::Int(have) => have,
            _ => return Err(malformed()),
        };
        if have >= i64::from(self.min_replicas) {
            return Ok(());
        }
        let message = format!("{have} replicas have the grant, but min_replicas is {}", self.min_replicas);
        Err(error(ErrorKind::Unavailable, message))
    }

    /// Extends the lives of records, so that the server keeps them. Errors are ignored because the next sweep comes
    /// long before a record ends.
    async fn touch(self: Arc<Self>, due: Vec<(TokenId, Key)>) {
        let touched = for_each_concurrently(due, MAX_CONCURRENT_REQUESTS, |(token, key)| {
            let inner = self.clone();
            async move {
                let answer = inner.on_key(&inner.names.lock(&key), &scripts::TOUCH, &[&token.to_hex()]).await?;
                if answer.status() == "gone" {
                    // Another process has adopted the hold, or it is released.
                    inner.sessions.remove_token(token, inner.clock.now());
                }
                Ok(())
            }
        });
        let _ = touched.await; // The next sweep comes in time.
    }

    async fn end(&self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<Reply<EndOutcome>> {
        if let Some(session) = self.sessions.remove_token(token, self.clock.now()) {
            self.reap_expired(key, &[session]).await?;
        }
        let mut arguments = vec![token.to_hex()];
        arguments.extend(cooldown.map(micros));
        let call = batch::ScriptCall { script: &scripts::END, names: self.names.lock(key), arguments };
        let answer = batch::run(&self.manager, call).await?;
        let outcome = match answer.status() {
            "short" | "released" => EndOutcome::Released,
            "dequeued" => EndOutcome::Dequeued,
            "nothing" => EndOutcome::Nothing,
            _ => return Err(malformed()),
        };
        // The hold was force-released, and the session's renewals need not report that any longer. If the record has
        // lost that fact because an answer was lost, the last renewal still has it.
        let reported =
            || if outcome == EndOutcome::Nothing { self.sessions.session_that_reported(token) } else { None };
        if let Some(session) = answer.session(0)?.or_else(reported) {
            Box::pin(self.on_session(session, &scripts::SESSION_LOSSES, &[&token.to_hex()])).await?;
        }
        Ok(Reply { time: answer.time, outcome })
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Store for Redis {
    fn capabilities(&self) -> Capabilities {
        Capabilities::new(NAME)
    }

    async fn open_session(&self, request: OpenSession) -> Result<Reply<OpenOutcome>> {
        let inner = &self.inner;
        inner.manager.mark_keeper_runtime();
        let OpenSession { session, ttl, owner } = request;
        inner.check(session).await?;
        if let Some(pushes) = inner.sessions.pushes_without_listener(session) {
            push::start(inner, session, pushes).await;
        }
        let sent_at = inner.clock.now();
        let answer =
            inner.on_session(session, &scripts::SESSION_OPEN, &[&micros(ttl), &millis(session_retention(ttl))]).await?;
        let outcome = match answer.status() {
            "opened" => {
                inner.sessions.opened(session, sent_at, ttl, owner.into());
                OpenOutcome::Opened
            }
            "gone" => {
                inner.sessions.mark_expired(session);
                OpenOutcome::Gone
            }
            _ => return Err(malformed()),
        };
        Ok(Reply { time: answer.time, outcome })
    }

    async fn renew_session(&self, session: SessionId) -> Result<Reply<RenewOutcome>> {
        let inner = &self.inner;
        let sent_at = inner.clock.now();
        let retention = millis(session_retention(inner.sessions.ttl_and_owner(session).0));
        let answer = inner.on_session(session, &scripts::SESSION_RENEW, &[&retention]).await?;
        if answer.status() == "gone" {
            inner.sessions.mark_expired(session);
            return Ok(Reply { time: answer.time, outcome: RenewOutcome::Gone });
        }
        let mut lost = Vec::new();
        for pair in answer.pairs() {
            let (token, loss) = pair?;
            // An unreadable entry must not cost the session.
            lost.extend(TokenId::from_hex(token).and_then(|token| push::read_lost(token, loss)));
        }
        inner.sessions.renewed(session, sent_at, lost.iter().map(|lost| lost.token).collect());
        if inner.manager.is_cluster() {
            let manager = inner.manager.clone();
            tokio::spawn(async move { manager.probe_servers().await });
        }
        let due = inner.sessions.records_to_touch(session, sent_at);
        if !due.is_empty() {
            tokio::spawn(inner.clone().touch(due));
        }
        Ok(Reply { time: answer.time, outcome: RenewOutcome::Alive { lost } })
    }

    async fn close_session(&self, session: SessionId) -> Result<Reply<()>> {
        let inner = &self.inner;
        inner.sessions.mark_expired(session);
        let retention = millis(session_retention(inner.sessions.ttl_and_owner(session).0));
        let answer = inner.on_session(session, &scripts::SESSION_CLOSE, &[&retention]).await?;
        // Only the local tokens are reaped here. The next request on a key reaps holds that another process adopted
        // into this session, and requests that are still in flight.
        inner.reap_session(session).await?;
        inner.sessions.forget(session);
        Ok(Reply { time: answer.time, outcome: () })
    }

    async fn session_lives(&self, session: SessionId) -> Result<Reply<bool>> {
        self.inner.is_alive(session).await
    }

    async fn acquire(&self, request: AcquireRequest) -> Result<Reply<AcquireOutcome>> {
        let inner = &self.inner;
        let session = request.session;
        if !matches!(inner.sessions.liveness(session, inner.clock.now()), CachedLiveness::Alive(_))
            && let Some(time) = inner.time_if_expired(session).await?
        {
            return Ok(Reply { time, outcome: AcquireOutcome::SessionGone });
        }
        let is_bound = matches!(request.lifetime, Lifetime::Session { .. });
        let (ttl, owner) = inner.sessions.ttl_and_owner(session);
        for round in 0..MAX_REAP_ROUNDS {
            let sent_at = inner.clock.now();
            let arguments = acquire_arguments(&request, ttl, &owner);
            let call =
                batch::ScriptCall { script: &scripts::ACQUIRE, names: inner.names.lock(&request.key), arguments };
            let answer = inner.run_grant(call).await?;
            let (outcome, blocking) = match answer.status() {
                "short" | "granted" => {
                    if is_bound {
                        inner.sessions.add_token(session, request.token, &request.key, sent_at);
                    }
                    (AcquireOutcome::Granted(answer.granted()?), Vec::new())
                }
                "queued" => {
                    inner.sessions.add_token(session, request.token, &request.key, sent_at);
                    (AcquireOutcome::Queued(answer.queued()?), answer.sessions(3)?)
                }
                "busy" => {
                    let (check_in, in_use, lingers) = (answer.span(0)?, answer.option(1)?, !answer.text(2)?.is_empty());
                    (AcquireOutcome::Busy { check_in, in_use, lingers }, answer.sessions(3)?)
                }
                "full" => (AcquireOutcome::QueueFull { limit: answer.number(0)? }, answer.sessions(1)?),
                "stale" => (AcquireOutcome::Stale, Vec::new()),
                "forced" => (AcquireOutcome::ForceReleased, Vec::new()),
                _ => return Err(malformed()),
            };
            // A granted or queued request stays so, even if reaping fails.
            let is_entered = matches!(outcome, AcquireOutcome::Granted(_) | AcquireOutcome::Queued(_));
            let reaped = inner.reap_expired(&request.key, &blocking).await;
            if reaped.map_err(|fault| fault.in_doubt(is_entered))? {
                inner.reap_whole_queue(round, &request.key).await?;
                continue;
            }
            let outcome = match outcome {
                AcquireOutcome::Queued(queued) => {
                    AcquireOutcome::Queued(Queued { check_in: inner.check_in(queued.check_in, &blocking), ..queued })
                }
                AcquireOutcome::Busy { check_in, in_use, lingers } => {
                    AcquireOutcome::Busy { check_in: inner.check_in(check_in, &blocking), in_use, lingers }
                }
                other => other,
            };
            return Ok(Reply { time: answer.time, outcome });
        }
        Err(error(ErrorKind::Unavailable, "too many expired sessions on this key; try again").in_doubt(true))
    }

    async fn poll(&self, key: &Key, tokens: &[TokenId]) -> Result<Reply<Vec<PollOutcome>>> {
        let inner = &self.inner;
        let names = inner.names.lock(key);
        let arguments: Vec<_> = tokens.iter().map(|token| token.to_hex()).collect();
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        for round in 0..MAX_REAP_ROUNDS {
            let answer = inner.on_key(&names, &scripts::POLL, &arguments).await?;
            let (check_in, in_use) = (answer.span(1)?, answer.option(2)?);
            // The answer depends on these sessions: they decide whether the queue moves and whether the holds are
            // valid.
            let mut blocking = answer.sessions(3)?;
            let mut outcomes = Vec::with_capacity(tokens.len());
            let mut rows = answer.rows(0)?;
            for token in tokens {
                let row = rows.next().ok_or_else(malformed)?;
                let (outcome, session) = match row.len() {
                    3 => {
                        let session = SessionId::from_hex(row.text(2)?);
                        match session {
                            Some(session) => inner.sessions.add_token(session, *token, key, inner.clock.now()),
                            None => drop(inner.sessions.remove_token(*token, inner.clock.now())),
                        }
                        let granted = Granted { fence: Fence::new(row.number(0)?), remaining: row.span(1)? };
                        (PollOutcome::Granted(granted), session)
                    }
                    // If the waiter's own session has expired, the waiter is gone.
                    1 => {
                        let queued = Queued { ahead: row.number(0)?, check_in, in_use };
                        (PollOutcome::Queued(queued), inner.sessions.session_of(*token))
                    }
                    0 => (PollOutcome::Gone, None),
                    _ => return Err(malformed()),
                };
                outcomes.push(outcome);
                blocking.extend(session.filter(|session| !blocking.contains(session)));
            }
            if inner.reap_expired(key, &blocking).await? {
                inner.reap_whole_queue(round, key).await?;
                continue;
            }
            let check_in = inner.check_in(check_in, &blocking);
            for outcome in &mut outcomes {
                if let PollOutcome::Queued(queued) = outcome {
                    queued.check_in = check_in;
                }
            }
            return Ok(Reply { time: answer.time, outcome: outcomes });
        }
        Err(error(ErrorKind::Unavailable, "too many expired sessions on this key; try again"))
    }

    async fn abandon(&self, key: &Key, token: TokenId) -> Result<Reply<EndOutcome>> {
        self.inner.end(key, token, None).await
    }

    async fn release(&self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<Reply<EndOutcome>> {
        self.inner.end(key, token, cooldown).await
    }

    async fn extend(&self, key: &Key, token: TokenId, ttl: Duration) -> Result<Reply<ExtendOutcome>> {
        let inner = &self.inner;
        let names = inner.names.lock(key);
        inner.reap_own_session(key, token).await?;
        let answer = inner.on_key(&names, &scripts::EXTEND, &[&token.to_hex(), &micros(ttl)]).await?;
        let outcome = match answer.status() {
            "extended" => ExtendOutcome::Extended,
            "not held" => ExtendOutcome::NotHeld,
            _ => return Err(malformed()),
        };
        Ok(Reply { time: answer.time, outcome })
    }

    async fn linger(&self, key: &Key, token: TokenId) -> Result<Reply<LingerOutcome>> {
        let inner = &self.inner;
        inner.reap_own_session(key, token).await?;
        // A call with one argument could become a release in a batch, so the second argument is never left out.
        let hears = if inner.sessions.hears_pushes() { "1" } else { "0" };
        let arguments = vec![token.to_hex(), hears.to_owned()];
        // If replicas must have each grant, they must have the fences of the holder's own grants too.
        let call = batch::ScriptCall { script: &scripts::LINGER, names: inner.names.lock(key), arguments };
        let answer = inner.run_grant(call).await?;
        let outcome = match answer.status() {
            "lingers" => LingerOutcome::Lingers { fence: answer.fence(0)?, up_to: answer.fence(1)? },
            "wanted" => LingerOutcome::Wanted,
            "gone" => LingerOutcome::Gone,
            _ => return Err(malformed()),
        };
        Ok(Reply { time: answer.time, outcome })
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Reply<AdoptOutcome>> {
        let inner = &self.inner;
        let names = inner.names.lock(&request.key);
        if let Some(time) = inner.time_if_expired(request.session).await? {
            return Ok(Reply { time, outcome: AdoptOutcome::SessionGone });
        }
        inner.reconciled_state(&request.key, &names).await?;
        let (ttl, owner) = inner.sessions.ttl_and_owner(request.session);
        let owner = format!("{}:{owner}", owner.len());
        let until = sixteen_digits(request.not_after);
        let (from, to, session) = (request.from.to_hex(), request.to.to_hex(), request.session.to_hex());
        let sent_at = inner.clock.now();
        let arguments = vec![from, to, session, owner, until, millis(record_life(ttl))];
        let answer = inner.run_grant(batch::ScriptCall { script: &scripts::ADOPT, names, arguments }).await?;
        let outcome = match answer.status() {
            "adopted" => {
                let session_bound = answer.text(2)? == "S";
                inner.sessions.remove_token(request.from, sent_at);
                if session_bound {
                    inner.sessions.add_token(request.session, request.to, &request.key, sent_at);
                }
                AdoptOutcome::Adopted { granted: answer.granted()?, session_bound }
            }
            "gone" => AdoptOutcome::Gone,
            "stale" => AdoptOutcome::Stale,
            _ => return Err(malformed()),
        };
        Ok(Reply { time: answer.time, outcome })
    }

    async fn force_release(&self, request: ForceReleaseRequest) -> Result<Reply<ForceReleaseOutcome>> {
        let inner = &self.inner;
        let names = inner.names.lock(&request.key);
        inner.reconciled_state(&request.key, &names).await?;
        let fence = format!("{:016}", request.fence.get());
        let loss = push::write_lost(&request.key, &request.reason);
        let answer = inner.on_key(&names, &scripts::FORCE_RELEASE, &[&fence, &loss]).await?;
        // The renewals of the session that lost the hold report the loss too. A repeated request records it again,
        // because the first answer may have been lost.
        if let (Some(session), Some(token)) = (answer.session(0)?, answer.token(1)?) {
            let reported = inner.on_session(session, &scripts::SESSION_LOSSES, &[&token.to_hex(), &loss]).await;
            // The hold has ended, but its holder may not know. A repeated request notifies it.
            reported.map_err(|fault| fault.in_doubt(true))?;
        }
        let outcome = match answer.status() {
            "force released" => ForceReleaseOutcome::Released,
            "no such hold" => ForceReleaseOutcome::NoSuchHold { live: answer.fences(2)? },
            _ => return Err(malformed()),
        };
        Ok(Reply { time: answer.time, outcome })
    }

    async fn inspect(&self, key: &Key) -> Result<Reply<KeyState>> {
        let inner = &self.inner;
        let fault = match inner.reconciled_state(key, &inner.names.lock(key)).await {
            Err(fault) if list::is_damage(&fault) => fault,
            state => return state,
        };
        match inner.problem_of(key).await {
            Some(problem) => Err(fault.restate(ErrorKind::Misconfigured, problem)),
            None => Err(fault),
        }
    }

    async fn list(&self, prefix: &str, cursor: Option<&Cursor>, limit: usize) -> Result<Reply<Listing>> {
        self.inner.list(prefix, cursor, limit).await
    }

    fn grants(&self, session: SessionId) -> GrantStream {
        let (sender, stream) = push_channel();
        self.inner.sessions.register(session, sender);
        stream
    }
}

/// Builds the arguments of `acquire.lua`.
fn acquire_arguments(request: &AcquireRequest, ttl: Duration, owner: &str) -> Vec<String> {
    let mut sent_at = String::with_capacity(128 + owner.len());
    sent_at.push_str(&sixteen_digits(request.not_after));
    sent_at.push(if request.enqueue { '1' } else { '0' });
    request.token.write_hex(&mut sent_at);
    request.session.write_hex(&mut sent_at);
    sent_at.push(if matches!(request.lifetime, Lifetime::Session { .. }) { 'S' } else { 'F' });
    write_texts([Some(owner), request.metadata.as_deref(), request.trace.as_deref()], &mut sent_at);
    let record_life = record_life(ttl);
    if request.demand == Demand::MUTEX && request.lifetime.length().is_none() && record_life == MIN_RECORD_LIFE {
        return vec![sent_at];
    }
    let lifetime = request.lifetime.length().map_or_else(|| "0".to_owned(), micros);
    let (units, capacity) = (request.demand.units().to_string(), request.demand.capacity().to_string());
    vec![sent_at, lifetime, units, capacity, millis(record_life)]
}

/// Returns how long a record lives that depends on a session with this ttl.
fn record_life(ttl: Duration) -> Duration {
    MIN_RECORD_LIFE.max(ttl.saturating_mul(2))
}

/// Formats a time with 16 digits, so that scripts can compare it.
fn sixteen_digits(time: StoreTime) -> String {
    format!("{:016}", time.as_micros().min(9_999_999_999_999_999))
}

fn session_retention(ttl: Duration) -> Duration {
    ttl.saturating_mul(2).max(MIN_SESSION_RETENTION)
}

impl Inner {
    async fn time(&self) -> Result<StoreTime> {
        let command: Cmd = ::redis::cmd("TIME");
        let answer = self.manager.query(Target::Slot(0), &command).await?;
        let (seconds, micros): (u64, u64) = ::redis::from_redis_value(answer).map_err(|_| malformed())?;
        Ok(StoreTime::from_micros(seconds.saturating_mul(1_000_000).saturating_add(micros)))
    }
}
