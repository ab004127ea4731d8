//! Redis and what speaks as it does: one server, a primary with sentinels, a cluster.
//!
//! # How it is kept
//! - A key is one string, its record; those who wait for it are in two more keys that exist only then. All three share a
//!   slot. One step is one script on them.
//! - A session is a key of its own, in another slot of a cluster: no script sees whether a session lives. Who meets a hold
//!   or a waiter whose session it does not know to live asks, and has what belongs to a dead session ended
//!   (`dead.rs`). A dead session never lives again, so that is right however late it happens.
//! - A grant by hand-off may thus go to a session that is dead; the next who asks takes the key from it. It does no harm:
//!   nobody believes a grant whose session they do not believe.
//!
//! # Invariants
//! 1. `alive_until` of a session is never later than the server's time for it: it counts from before the question.
//! 2. A request is sent once. A second one is sent only after the first was answered, and where that answer changed nothing
//!    or the second one finds what the first one did.

use std::sync::Arc;
use std::time::Duration;

use ::redis::{Cmd, Value};
use async_trait::async_trait;

use self::config::Config;
use self::connect::{Links, Target, Way};
use self::dead::all_at_once;
use self::error::{NAME, error};
use self::reply::{Answer, malformed, write_texts};
use self::scripts::{LockNames, Names, Script};
use self::sessions::{Known, Sessions};
use super::*;
use crate::clock::Clock;
use crate::error::{ErrorKind, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::token::{SessionId, TokenId};

mod audit;
mod batch;
mod cluster;
mod config;
mod connect;
mod dead;
mod error;
mod list;
mod look;
mod node;
mod push;
mod record;
mod recovery;
mod reply;
mod scripts;
mod sentinel;
mod sessions;

/// A session's key stays for so long after it is over, or for twice its ttl: so long it is refused to open it again.
const LEAST_MEMORY: Duration = Duration::from_secs(60);

/// A record lives at least so long after it was written.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// So often a step goes on after dead sessions were in its way.
const MOST_BURIALS: u32 = 16;

/// So many requests are on their way at once where there are many to send.
const AT_ONCE: usize = 256;

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
/// Options: `prefix` (the first part of every key, `stanchion`), `min_replicas` (so many replicas must have a grant before
/// it is believed, 0); with TLS `ca_file` (roots to trust in place of the system's), `cert_file` and `key_file` (of this
/// client); `sentinel_user`, `sentinel_password`. `redis+sentinel` and `redis+cluster` have a `rediss+…` too.
/// Special characters in a user or a password are written as `%XX`.
///
/// # What it needs
/// Redis 6.2 or later, or Valkey. `maxmemory-policy noeviction`. For a user of its own, this access list is enough
/// (Redis 7; `stanchion` is the prefix):
/// ```text
#[doc = include_str!("access_list.txt")]
/// ```
/// With `+config|get +info` it also reports settings that lose locks. A user of the sentinels needs
/// `+sentinel|get-master-addr-by-name`; with `+sentinel|master +sentinel|replicas` too, the newest word counts where sentinels
/// name different servers, and service goes on soon after a failover.
///
/// Managed services and proxies refuse some commands. The commands of scripts and keys are indispensable: an error names the one
/// that is missing. Without the following ones the store works, and warns ([`Locks::warnings`](crate::Locks::warnings)):
///
/// | refused | consequence |
/// |---|---|
/// | `ROLE` | a replica is noticed only when it refuses a write |
/// | `CONFIG`, `INFO` | settings that lose locks are not noticed |
/// | `SUBSCRIBE`, `PUBLISH` | waiting calls ask once a second |
/// | `SCAN` | keys cannot be listed |
///
/// `SELECT` is needed for a database other than 0, `WAIT` for `min_replicas`, `CLUSTER SLOTS` in a cluster.
///
/// # What it trusts
/// The server. One that is hostile or broken can answer with anything, and its answers are read whole: an answer of some
/// hundred megabytes needs that much memory for as long as the attempt lasts. Use TLS (`rediss`), so that nobody else can answer in its
/// place. A password that goes unencrypted to another machine is warned of. Whoever may write keys with the prefix, or
/// publish to channels with it, can take locks from others and delay them: give a user of its own to each application.
///
/// # What it does to a process
/// It connects once for each Tokio runtime that it is used in, once for the keeper and once for pushes. With TLS it
/// installs `rustls`' `ring` provider for the process, unless one is installed. In a Tokio runtime that was built without
/// I/O the first attempt to connect panics in a task, of which the panic hook tells; the keeper's connection is used then.
///
/// # What it cannot promise
/// A server that restarts without persistence, or a failover to a replica that lacks the last writes, forgets holds. The
/// library then asks for every hold anew and tells those that are gone; fences do not repeat, because they follow the
/// server's clock. Between the two a holder may not know: check fences. `min_replicas` makes it rarer: a grant to a caller
/// who asks is believed only when so many replicas have it. It is not a quorum, and a grant by hand-off does not wait.
/// Where the connection breaks between the grant and the question for the replicas, the outcome is in doubt.
#[derive(Clone, Debug)]
pub struct Redis {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    links: Arc<Links>,
    names: Names,
    sessions: Sessions,
    clock: Clock,
    min_replicas: u32,
    audited: tokio::sync::Mutex<bool>,
}

impl Redis {
    /// A store at this URL. Nothing is sent yet.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a URL that cannot be read.
    pub fn from_url(url: &str) -> Result<Self> {
        let config = Config::from_url(url)?;
        let inner = Inner {
            names: Names::new(&config.prefix),
            sessions: Sessions::default(),
            clock: Clock::system(),
            min_replicas: config.min_replicas,
            audited: tokio::sync::Mutex::new(false),
            links: Arc::new(Links::new(config)),
        };
        Ok(Self { inner: Arc::new(inner) })
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
        Answer::read(self.links.run(self.links.target(names.record()), script, command).await?)
    }

    async fn on_session(&self, session: SessionId, script: &'static Script, arguments: &[&str]) -> Result<Answer> {
        let name = self.names.session(session);
        let mut command = script.by_hash(1);
        command.arg(&name);
        for argument in arguments {
            command.arg(argument);
        }
        Answer::read(self.links.run(self.links.target(&name), script, command).await?)
    }

    /// Does a step that may grant. Where replicas must have the grant, the step goes alone and the question for them goes
    /// over the same connection: any other may lead to a server that never had the grant, and says yes.
    async fn granting(&self, step: batch::Operation) -> Result<Answer> {
        if self.min_replicas == 0 {
            return batch::step(&self.links, step).await;
        }
        let (answer, way) = Box::pin(step.there(&self.links, self.links.local().as_deref())).await?;
        if matches!(answer.word(), "short" | "granted" | "adopted") {
            // It has granted, whatever becomes of the question.
            Box::pin(self.replicated(way)).await.map_err(|fault| fault.in_doubt(true))?;
        }
        Ok(answer)
    }

    /// Waits until so many replicas have what was written this way.
    async fn replicated(&self, way: Way) -> Result<()> {
        let mut command = ::redis::cmd("WAIT");
        command.arg(self.min_replicas).arg(1_000);
        let have = match self.links.ask_there(way, &command).await? {
            Value::Int(have) => have,
            _ => return Err(malformed()),
        };
        if have >= i64::from(self.min_replicas) {
            return Ok(());
        }
        let message = format!("{have} replicas have the grant, {} are wanted (min_replicas)", self.min_replicas);
        Err(error(ErrorKind::Unavailable, message))
    }

    /// Keeps records from being forgotten. Best effort: the next sweep comes long before that.
    async fn touch(self: Arc<Self>, due: Vec<(TokenId, Key)>) {
        let touched = all_at_once(due, AT_ONCE, |(token, key)| {
            let inner = self.clone();
            async move {
                let answer = inner.on_key(&inner.names.lock(&key), &scripts::TOUCH, &[&token.to_hex()]).await?;
                if answer.word() == "gone" {
                    // Somebody else has taken it up, or ended it.
                    inner.sessions.lets_go(token, inner.clock.now());
                }
                Ok(())
            }
        });
        let _in_six_hours = touched.await;
    }

    async fn end(&self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<Reply<EndOutcome>> {
        if let Some(session) = self.sessions.lets_go(token, self.clock.now()) {
            self.bury_the_dead(key, &[session]).await?;
        }
        let mut arguments = vec![token.to_hex()];
        arguments.extend(cooldown.map(micros));
        let step = batch::Operation { script: &scripts::END, names: self.names.lock(key), arguments };
        let answer = batch::step(&self.links, step).await?;
        let outcome = match answer.word() {
            "short" | "released" => EndOutcome::Released,
            "dequeued" => EndOutcome::Dequeued,
            "nothing" => EndOutcome::Nothing,
            _ => return Err(malformed()),
        };
        // It was forced out: its session's beats need not say so any longer. Where the store has forgotten that, because an
        // answer was lost, what the last beat told still says it.
        let told = || if outcome == EndOutcome::Nothing { self.sessions.told(token) } else { None };
        if let Some(session) = answer.session(0)?.or_else(told) {
            Box::pin(self.on_session(session, &scripts::SESSION_LOST, &[&token.to_hex()])).await?;
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
        inner.links.settle_here();
        let OpenSession { session, ttl, owner } = request;
        inner.audit(session).await?;
        if let Some(pushes) = inner.sessions.wants_listener(session) {
            push::start(inner, session, pushes).await;
        }
        let asked = inner.clock.now();
        let answer = inner.on_session(session, &scripts::SESSION_OPEN, &[&micros(ttl), &millis(memory(ttl))]).await?;
        let outcome = match answer.word() {
            "opened" => {
                inner.sessions.opened(session, asked, ttl, owner.into());
                OpenOutcome::Opened
            }
            "gone" => {
                inner.sessions.died(session);
                OpenOutcome::Gone
            }
            _ => return Err(malformed()),
        };
        Ok(Reply { time: answer.time, outcome })
    }

    async fn renew_session(&self, session: SessionId) -> Result<Reply<RenewOutcome>> {
        let inner = &self.inner;
        let asked = inner.clock.now();
        let memory = millis(memory(inner.sessions.introduced(session).0));
        let answer = inner.on_session(session, &scripts::SESSION_BEAT, &[&memory]).await?;
        if answer.word() == "gone" {
            inner.sessions.died(session);
            return Ok(Reply { time: answer.time, outcome: RenewOutcome::Gone });
        }
        let mut lost = Vec::new();
        for pair in answer.pairs() {
            let (token, what) = pair?;
            // What cannot be read is no reason to lose the session.
            lost.extend(TokenId::from_hex(token).and_then(|token| push::read_lost(token, what)));
        }
        inner.sessions.beaten(session, asked, lost.iter().map(|lost| lost.token).collect());
        if inner.links.is_cluster() {
            let links = inner.links.clone();
            tokio::spawn(async move { links.look_at_servers().await });
        }
        let due = inner.sessions.due(session, asked);
        if !due.is_empty() {
            tokio::spawn(inner.clone().touch(due));
        }
        Ok(Reply { time: answer.time, outcome: RenewOutcome::Alive { lost } })
    }

    async fn close_session(&self, session: SessionId) -> Result<Reply<()>> {
        let inner = &self.inner;
        inner.sessions.died(session);
        let memory = millis(memory(inner.sessions.introduced(session).0));
        let answer = inner.on_session(session, &scripts::SESSION_CLOSE, &[&memory]).await?;
        // What another process took up of it, and what is on its way, goes by the word of whoever comes next.
        inner.bury_all(session).await?;
        inner.sessions.ended(session);
        Ok(Reply { time: answer.time, outcome: () })
    }

    async fn session_lives(&self, session: SessionId) -> Result<Reply<bool>> {
        self.inner.lives(session).await
    }

    async fn acquire(&self, request: AcquireRequest) -> Result<Reply<AcquireOutcome>> {
        let inner = &self.inner;
        let session = request.session;
        if !matches!(inner.sessions.known(session, inner.clock.now()), Known::Alive(_))
            && let Some(time) = inner.dead_since(session).await?
        {
            return Ok(Reply { time, outcome: AcquireOutcome::SessionGone });
        }
        let is_bound = matches!(request.lifetime, Lifetime::Session { .. });
        let (ttl, owner) = inner.sessions.introduced(session);
        for round in 0..MOST_BURIALS {
            let asked = inner.clock.now();
            let arguments = acquire_arguments(&request, ttl, &owner);
            let step = batch::Operation { script: &scripts::ACQUIRE, names: inner.names.lock(&request.key), arguments };
            let answer = inner.granting(step).await?;
            let (outcome, in_the_way) = match answer.word() {
                "short" | "granted" => {
                    if is_bound {
                        inner.sessions.holds(session, request.token, &request.key, asked);
                    }
                    (AcquireOutcome::Granted(answer.granted()?), Vec::new())
                }
                "queued" => {
                    inner.sessions.holds(session, request.token, &request.key, asked);
                    (AcquireOutcome::Queued(answer.queued()?), answer.sessions(3)?)
                }
                "busy" => {
                    let busy = AcquireOutcome::Busy { check_in: answer.span(0)?, in_use: answer.option(1)? };
                    (busy, answer.sessions(2)?)
                }
                "full" => (AcquireOutcome::QueueFull { limit: answer.number(0)? }, answer.sessions(1)?),
                "stale" => (AcquireOutcome::Stale, Vec::new()),
                "forced" => (AcquireOutcome::ForceReleased, Vec::new()),
                _ => return Err(malformed()),
            };
            // What was entered stays entered, whatever becomes of the dead.
            let is_entered = matches!(outcome, AcquireOutcome::Granted(_) | AcquireOutcome::Queued(_));
            let buried = inner.bury_the_dead(&request.key, &in_the_way).await;
            if buried.map_err(|fault| fault.in_doubt(is_entered))? {
                inner.bury_the_others(round, &request.key).await?;
                continue;
            }
            let outcome = match outcome {
                AcquireOutcome::Queued(queued) => {
                    AcquireOutcome::Queued(Queued { check_in: inner.check_in(queued.check_in, &in_the_way), ..queued })
                }
                AcquireOutcome::Busy { check_in, in_use } => {
                    AcquireOutcome::Busy { check_in: inner.check_in(check_in, &in_the_way), in_use }
                }
                other => other,
            };
            return Ok(Reply { time: answer.time, outcome });
        }
        Err(error(ErrorKind::Unavailable, "sessions die faster than they can be buried").in_doubt(true))
    }

    async fn poll(&self, key: &Key, tokens: &[TokenId]) -> Result<Reply<Vec<PollOutcome>>> {
        let inner = &self.inner;
        let names = inner.names.lock(key);
        let arguments: Vec<_> = tokens.iter().map(|token| token.to_hex()).collect();
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        for round in 0..MOST_BURIALS {
            let answer = inner.on_key(&names, &scripts::POLL, &arguments).await?;
            let (check_in, in_use) = (answer.span(1)?, answer.option(2)?);
            // Those that the answer depends on: whether those who wait go on, and whether what is held is held.
            let mut in_the_way = answer.sessions(3)?;
            let mut outcomes = Vec::with_capacity(tokens.len());
            let mut rows = answer.rows(0)?;
            for token in tokens {
                let row = rows.next().ok_or_else(malformed)?;
                let (outcome, session) = match row.len() {
                    3 => {
                        let session = SessionId::from_hex(row.text(2)?);
                        match session {
                            Some(session) => inner.sessions.holds(session, *token, key, inner.clock.now()),
                            None => drop(inner.sessions.lets_go(*token, inner.clock.now())),
                        }
                        let granted = Granted { fence: Fence::new(row.number(0)?), remaining: row.span(1)? };
                        (PollOutcome::Granted(granted), session)
                    }
                    // A waiter whose own session is dead is gone.
                    1 => {
                        let queued = Queued { ahead: row.number(0)?, check_in, in_use };
                        (PollOutcome::Queued(queued), inner.sessions.holder(*token))
                    }
                    0 => (PollOutcome::Gone, None),
                    _ => return Err(malformed()),
                };
                outcomes.push(outcome);
                in_the_way.extend(session.filter(|session| !in_the_way.contains(session)));
            }
            if inner.bury_the_dead(key, &in_the_way).await? {
                inner.bury_the_others(round, key).await?;
                continue;
            }
            let check_in = inner.check_in(check_in, &in_the_way);
            for outcome in &mut outcomes {
                if let PollOutcome::Queued(queued) = outcome {
                    queued.check_in = check_in;
                }
            }
            return Ok(Reply { time: answer.time, outcome: outcomes });
        }
        Err(error(ErrorKind::Unavailable, "sessions die faster than they can be buried"))
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
        inner.settle_own(key, token).await?;
        let answer = inner.on_key(&names, &scripts::EXTEND, &[&token.to_hex(), &micros(ttl)]).await?;
        let outcome = match answer.word() {
            "extended" => ExtendOutcome::Extended,
            "not held" => ExtendOutcome::NotHeld,
            _ => return Err(malformed()),
        };
        Ok(Reply { time: answer.time, outcome })
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Reply<AdoptOutcome>> {
        let inner = &self.inner;
        let names = inner.names.lock(&request.key);
        if let Some(time) = inner.dead_since(request.session).await? {
            return Ok(Reply { time, outcome: AdoptOutcome::SessionGone });
        }
        inner.settled(&request.key, &names).await?;
        let (ttl, owner) = inner.sessions.introduced(request.session);
        let owner = format!("{}:{owner}", owner.len());
        let until = sixteen(request.not_after);
        let (from, to, session) = (request.from.to_hex(), request.to.to_hex(), request.session.to_hex());
        let asked = inner.clock.now();
        let arguments = vec![from, to, session, owner, until, millis(life(ttl))];
        let answer = inner.granting(batch::Operation { script: &scripts::ADOPT, names, arguments }).await?;
        let outcome = match answer.word() {
            "adopted" => {
                let session_bound = answer.text(2)? == "S";
                inner.sessions.lets_go(request.from, asked);
                if session_bound {
                    inner.sessions.holds(request.session, request.to, &request.key, asked);
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
        inner.settled(&request.key, &names).await?;
        let fence = format!("{:016}", request.fence.get());
        let what = push::write_lost(&request.key, &request.reason);
        let answer = inner.on_key(&names, &scripts::EVICT, &[&fence, &what]).await?;
        // The session that lost it is told by its beats too. Asked again, because an answer was lost, that is done again.
        if let (Some(session), Some(token)) = (answer.session(0)?, answer.token(1)?) {
            let told = inner.on_session(session, &scripts::SESSION_LOST, &[&token.to_hex(), &what]).await;
            // The hold has ended, only its holder may not know: asking again tells it.
            told.map_err(|fault| fault.in_doubt(true))?;
        }
        let outcome = match answer.word() {
            "evicted" => ForceReleaseOutcome::Released,
            "no such hold" => ForceReleaseOutcome::NoSuchHold { live: answer.fences(2)? },
            _ => return Err(malformed()),
        };
        Ok(Reply { time: answer.time, outcome })
    }

    async fn inspect(&self, key: &Key) -> Result<Reply<KeyState>> {
        let inner = &self.inner;
        let fault = match inner.settled(key, &inner.names.lock(key)).await {
            Err(fault) if list::is_damage(&fault) => fault,
            seen => return seen,
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
        self.inner.sessions.announce(session, sender);
        stream
    }
}

/// What `acquire.lua` takes.
fn acquire_arguments(request: &AcquireRequest, ttl: Duration, owner: &str) -> Vec<String> {
    let mut asked = String::with_capacity(128 + owner.len());
    asked.push_str(&sixteen(request.not_after));
    asked.push(if request.enqueue { '1' } else { '0' });
    request.token.write_hex(&mut asked);
    request.session.write_hex(&mut asked);
    asked.push(if matches!(request.lifetime, Lifetime::Session { .. }) { 'S' } else { 'F' });
    write_texts([Some(owner), request.metadata.as_deref(), request.trace.as_deref()], &mut asked);
    let life = life(ttl);
    if request.demand == Demand::MUTEX && request.lifetime.length().is_none() && life == DAY {
        return vec![asked];
    }
    let lifetime = request.lifetime.length().map_or_else(|| "0".to_owned(), micros);
    let (units, capacity) = (request.demand.units().to_string(), request.demand.capacity().to_string());
    vec![asked, lifetime, units, capacity, millis(life)]
}

/// How long a record lives that depends on a session of this ttl.
fn life(ttl: Duration) -> Duration {
    DAY.max(ttl.saturating_mul(2))
}

/// A time in 16 digits, as scripts compare them.
fn sixteen(time: StoreTime) -> String {
    format!("{:016}", time.as_micros().min(9_999_999_999_999_999))
}

fn memory(ttl: Duration) -> Duration {
    ttl.saturating_mul(2).max(LEAST_MEMORY)
}

impl Inner {
    async fn time(&self) -> Result<StoreTime> {
        let command: Cmd = ::redis::cmd("TIME");
        let answer = self.links.ask(Target::Slot(0), &command).await?;
        let (seconds, micros): (u64, u64) = ::redis::from_redis_value(answer).map_err(|_| malformed())?;
        Ok(StoreTime::from_micros(seconds.saturating_mul(1_000_000).saturating_add(micros)))
    }
}
