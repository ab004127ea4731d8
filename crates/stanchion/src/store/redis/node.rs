//! One server, as one runtime sees it: connected to when needed, and after a fault not too often.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::io::tcp::{TcpSettings, socket2};
use redis::{AsyncConnectionConfig, Client, RedisError, Value};

use super::config::Address;
use super::connect::{Links, Local, lock};
use super::error::{error, is_refused, while_connecting};
use crate::clock::{BootTime, Clock, jitter};
use crate::error::{Error, ErrorKind, Result};

/// How long making a connection may take.
pub(super) const CONNECT_WITHIN: Duration = Duration::from_secs(2);

/// After a fault nobody connects for so long, doubled with each further one: a thousand tasks are no storm.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A connection without an answer for so long is suspect, if somebody gave up waiting for one: the next request uses
/// another. It counts over all requests, for each may have less time than that.
pub(super) const SUSPECT_AFTER: Duration = Duration::from_secs(1);

/// So many requests may wait to be written.
const BUFFER: usize = 1_024;

/// What every connection is told about TCP: no delay, and a link that is dead is noticed within seconds.
pub(super) fn tcp_settings() -> TcpSettings {
    let probes = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(3))
        .with_interval(Duration::from_secs(1))
        .with_retries(3);
    let settings = TcpSettings::default().set_nodelay(true).set_keepalive(probes);
    #[cfg(target_os = "linux")]
    let settings = settings.set_user_timeout(Duration::from_secs(6));
    settings
}

/// TLS needs a provider of cryptography; the process may have chosen one already.
pub(super) fn install_crypto() {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        let _another_was_faster = rustls::crypto::ring::default_provider().install_default();
    }
}

/// One server, as one runtime sees it.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) address: Address,
    state: Mutex<State>,
    /// One at a time connects; the others wait for the outcome.
    connecting: Arc<tokio::sync::Mutex<()>>,
    generations: AtomicU64,
    /// When the oldest request was sent that somebody gave up waiting for since the last answer, in ns; 0 if there is none.
    /// Beside the state, for it is looked at with every answer.
    given_up: AtomicU64,
}

#[derive(Debug)]
enum State {
    Up(Link),
    Down { failures: u32, next: BootTime, why: Option<Arc<Fault>> },
}

#[derive(Debug)]
struct Fault {
    kind: ErrorKind,
    message: String,
}

/// A connection.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) connection: MultiplexedConnection,
    pub(super) generation: u64,
}

/// The outcome, if it comes in time. A runtime that a connection was made in has timers.
#[allow(clippy::disallowed_methods, reason = "a limit on a connection, not a deadline of the protocol")]
pub(super) async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(limit, work).await.ok()
}

pub(super) fn too_slow(limit: Duration) -> RedisError {
    std::io::Error::new(std::io::ErrorKind::TimedOut, format!("no answer within {limit:?}")).into()
}

/// Runs in a task of its own: that the runtime cannot do I/O is a panic there.
pub(super) async fn in_task<T: Send + 'static>(
    local: &Local,
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T> {
    tokio::spawn(work).await.map_err(|ended| {
        if ended.is_panic() {
            local.is_unusable.store(true, Ordering::Relaxed);
        }
        error(ErrorKind::Unavailable, "this runtime cannot do I/O").in_doubt(false)
    })
}

impl Node {
    pub(super) fn new(address: &Address) -> Self {
        Self {
            address: address.clone(),
            state: Mutex::new(State::Down { failures: 0, next: BootTime::from_nanos(0), why: None }),
            connecting: Arc::default(),
            generations: AtomicU64::new(0),
            given_up: AtomicU64::new(0),
        }
    }

    /// A connection: the one there is, or a new one.
    pub(super) async fn link(self: &Arc<Self>, links: &Arc<Links>, local: &Local) -> Result<Link> {
        match self.current(&links.clock)? {
            Some(link) => Ok(link),
            None => Box::pin(self.new_link(links, local)).await,
        }
    }

    async fn new_link(self: &Arc<Self>, links: &Arc<Links>, local: &Local) -> Result<Link> {
        let one_at_a_time = self.connecting.clone().lock_owned().await;
        if let Some(link) = self.current(&links.clock)? {
            return Ok(link);
        }
        let client = links.config.server(&self.address)?;
        let (node, links) = (self.clone(), links.clone());
        // Who asks may give up before that is over. The outcome counts all the same.
        in_task(local, async move {
            let _one_at_a_time = one_at_a_time;
            let connected = connect(&client).await.map_err(|fault| while_connecting(&node.address, &fault));
            let connected = connected.and_then(|(connection, role)| {
                links.accepts(&node.address, role.as_deref())?;
                Ok(connection)
            });
            match connected {
                Ok(connection) => Ok(node.is_up(connection)),
                Err(error) => {
                    node.is_down(&error, &links.clock);
                    // Perhaps another server has taken its place.
                    links.forget(&node.address);
                    Err(error)
                }
            }
        })
        .await?
    }

    fn is_up(&self, connection: MultiplexedConnection) -> Link {
        let generation = self.generations.fetch_add(1, Ordering::Relaxed);
        let link = Link { connection, generation };
        let mut state = lock(&self.state);
        self.given_up.store(0, Ordering::Relaxed);
        *state = State::Up(link.clone());
        drop(state);
        link
    }

    fn is_down(&self, error: &Error, clock: &Clock) {
        let mut state = lock(&self.state);
        let failures = match &*state {
            State::Up(_) => 0,
            State::Down { failures, .. } => *failures,
        };
        let pause = jitter((FIRST_PAUSE * 2u32.saturating_pow(failures.min(10))).min(LONGEST_PAUSE));
        let why = Fault { kind: error.kind(), message: error.message().to_owned() };
        *state = State::Down { failures: failures + 1, next: clock.now().after(pause), why: Some(Arc::new(why)) };
    }

    /// The connection there is.
    pub(super) fn up(&self) -> Option<Link> {
        match &*lock(&self.state) {
            State::Up(link) => Some(link.clone()),
            State::Down { .. } => None,
        }
    }

    /// The connection there is; none if one may be made now; the last fault if not.
    fn current(&self, clock: &Clock) -> Result<Option<Link>> {
        match &*lock(&self.state) {
            State::Up(link) => Ok(Some(link.clone())),
            State::Down { next, why: Some(why), .. } if clock.now() < *next => {
                Err(error(why.kind, why.message.clone()).in_doubt(false))
            }
            State::Down { .. } => Ok(None),
        }
    }

    /// After a fault, the next one who wants to connect need not wait.
    pub(super) fn hurry(&self) {
        if let State::Down { next, .. } = &mut *lock(&self.state) {
            *next = BootTime::from_nanos(0);
        }
    }

    /// This connection is not to be used again.
    pub(super) fn lost(&self, generation: u64) {
        lock(&self.state).lost(generation);
    }

    /// Somebody waited for an answer until now, in vain.
    fn gave_up(&self, generation: u64, since: BootTime, now: BootTime) {
        let mut state = lock(&self.state);
        if !state.is_up(generation) {
            return;
        }
        let oldest = match self.given_up.load(Ordering::Relaxed) {
            0 => since,
            other => since.min(BootTime::from_nanos(other)),
        };
        self.given_up.store(oldest.as_nanos(), Ordering::Relaxed);
        if now.since(oldest) >= SUSPECT_AFTER {
            state.lost(generation);
        }
    }
}

impl State {
    fn is_up(&self, generation: u64) -> bool {
        matches!(self, Self::Up(link) if link.generation == generation)
    }

    fn lost(&mut self, generation: u64) {
        if self.is_up(generation) {
            *self = Self::Down { failures: 0, next: BootTime::from_nanos(0), why: None };
        }
    }
}

/// A connection, whatever the server is.
pub(super) async fn connect_to_any(client: &Client) -> Result<MultiplexedConnection, RedisError> {
    let options = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(CONNECT_WITHIN))
        // How long an answer may take is said by who asks.
        .set_response_timeout(None)
        .set_pipeline_buffer_size(BUFFER);
    client.get_multiplexed_async_connection_with_config(&options).await
}

/// A connection and what the server is: primary or replica. `None` if the server does not say: a managed service, a proxy, or
/// a user without that right. A replica is then told by the first write, which it refuses.
pub(super) async fn connect(client: &Client) -> Result<(MultiplexedConnection, Option<String>), RedisError> {
    let connected = async {
        let mut connection = connect_to_any(client).await?;
        let role = match redis::cmd("ROLE").query_async::<Value>(&mut connection).await {
            Ok(answer) => Some(redis::from_redis_value::<String>(role_in(answer)).map_err(RedisError::from)?),
            Err(fault) if is_refused(&fault) => None,
            Err(fault) => return Err(fault),
        };
        Ok((connection, role))
    };
    within(CONNECT_WITHIN, connected).await.unwrap_or_else(|| Err(too_slow(CONNECT_WITHIN)))
}

/// The role in the answer to `ROLE`: its first word. KeyDB with several primaries tells a row for each of them.
fn role_in(answer: Value) -> Value {
    match answer {
        Value::Array(parts) => parts.into_iter().next().map_or(Value::Nil, role_in),
        word => word,
    }
}

/// Dropped with its request unanswered, it gives up a connection that has been silent for long.
pub(super) struct Suspicion<'a> {
    node: &'a Node,
    generation: u64,
    since: BootTime,
    clock: &'a Clock,
}

impl<'a> Suspicion<'a> {
    pub(super) fn new(node: &'a Node, link: &Link, clock: &'a Clock) -> Self {
        Self { node, generation: link.generation, since: clock.now(), clock }
    }

    /// Done with each request: nearly always it is one look.
    pub(super) fn answered(self) {
        if self.node.given_up.load(Ordering::Relaxed) != 0 {
            self.node.given_up.store(0, Ordering::Relaxed);
        }
        std::mem::forget(self);
    }
}

impl Drop for Suspicion<'_> {
    fn drop(&mut self) {
        self.node.gave_up(self.generation, self.since, self.clock.now());
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::Config;
    use super::*;

    /// What servers answered to `ROLE`: Redis 7.0.15, and KeyDB 6.3.4 as one of two and of three active replicas.
    #[test]
    fn a_server_that_another_one_writes_to_is_refused_whatever_it_answers() {
        let bulk = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let row = |role: &str| {
            let parts = [bulk(role), bulk("127.0.0.1"), Value::Int(7802), bulk("connected"), Value::Int(0)];
            Value::Array(parts.into())
        };
        let accepts = |answer: Value| {
            let config = Config::from_url("redis://127.0.0.1").unwrap();
            let role = redis::from_redis_value::<String>(role_in(answer)).unwrap();
            let links = Links::new(config);
            let address = links.known_route(0).unwrap();
            links.accepts(&address, Some(&role))
        };
        accepts(Value::Array(vec![bulk("master"), Value::Int(0), Value::Array(Vec::new())])).unwrap();
        for (answer, says) in [
            (row("slave"), "is a replica; name its primary"),
            (row("active-replica"), "is an active replica"),
            (Value::Array(vec![row("active-replica"), row("active-replica")]), "is an active replica"),
        ] {
            let error = accepts(answer).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Misconfigured);
            assert!(error.to_string().contains(says), "{error}");
        }
    }

    /// Who asks may wait for less than a connection may take.
    #[test]
    fn a_connection_that_nobody_waits_for_any_more_counts_when_it_fails() {
        // The kernel takes connections, and nobody answers.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Tcp { host: "127.0.0.1".into(), port: silent.local_addr().unwrap().port() };
        let links = Arc::new(Links::new(Config::from_url(&format!("redis+cluster://{address}")).unwrap()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let local = links.local().unwrap();
            let node = local.node(&address);
            assert!(within(Duration::from_millis(50), node.link(&links, &local)).await.is_none());
            let recorded = async {
                while !links.slots().unwrap().lost_servers().contains(&address) {
                    super::super::push::sleep(Duration::from_millis(5)).await;
                }
            };
            within(Duration::from_secs(30), recorded).await.unwrap();
            assert!(matches!(&*lock(&node.state), State::Down { failures: 1, why: Some(_), .. }));
        });
    }
}
