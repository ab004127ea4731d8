//! Connects one runtime to one server, when a connection is needed and after a fault not too often.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::io::tcp::{TcpSettings, socket2};
use redis::{AsyncConnectionConfig, Client, RedisError, Value};

use super::config::Address;
use super::connect::{ConnectionManager, RuntimeConnections};
use super::error::{error, is_refused, while_connecting};
use crate::clock::{BootTime, Clock};
use crate::error::{Error, ErrorKind, Result};
use crate::store::backoff::within;
use crate::store::outage::Outage;
use crate::sync::lock;

/// Time after which an attempt to connect fails.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Time after which a connection without any answer is replaced, if a caller gave up waiting for one. It counts over
/// all requests, because each of them may have a shorter deadline.
pub(super) const SUSPECT_AFTER: Duration = Duration::from_secs(1);

/// Maximum number of requests that wait to be written to a connection.
const MAX_UNWRITTEN_REQUESTS: usize = 1_024;

/// Returns the TCP settings of every connection: no delay, and a dead link is noticed within seconds.
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

/// Installs a provider of cryptography for TLS, unless the process has chosen one.
pub(super) fn install_tls_provider() {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        let _ = rustls::crypto::ring::default_provider().install_default(); // Another thread may have been faster.
    }
}

/// One server, as one runtime uses it.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) address: Address,
    state: Mutex<State>,
    /// Held by the one task that connects; the others wait for its outcome.
    connecting: Arc<tokio::sync::Mutex<()>>,
    generations: AtomicU64,
    /// When the oldest request was sent that a caller gave up on since the last answer, in nanoseconds; 0 if there is
    /// none. It is outside of the state because every answer reads it.
    oldest_abandoned: AtomicU64,
}

#[derive(Debug)]
enum State {
    Up(Link),
    Down(Outage),
}

/// An open connection, and its number.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) connection: MultiplexedConnection,
    pub(super) generation: u64,
}

pub(super) fn timeout_error(limit: Duration) -> RedisError {
    std::io::Error::new(std::io::ErrorKind::TimedOut, format!("no answer within {limit:?}")).into()
}

/// Runs the work in a task of its own, because the client panics in a runtime that cannot do I/O.
pub(super) async fn in_task<T: Send + 'static>(
    local: &RuntimeConnections,
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T> {
    tokio::spawn(work).await.map_err(|ended| {
        if ended.is_panic() {
            local.lacks_io.store(true, Ordering::Relaxed);
        }
        error(ErrorKind::Unavailable, "the runtime cannot do I/O").in_doubt(false)
    })
}

impl Node {
    pub(super) fn new(address: &Address) -> Self {
        Self {
            address: address.clone(),
            state: Mutex::new(State::Down(Outage::NONE)),
            connecting: Arc::default(),
            generations: AtomicU64::new(0),
            oldest_abandoned: AtomicU64::new(0),
        }
    }

    /// Returns the open connection, or makes a new one.
    pub(super) async fn link(
        self: &Arc<Self>,
        manager: &Arc<ConnectionManager>,
        local: &RuntimeConnections,
    ) -> Result<Link> {
        match self.current(&manager.clock)? {
            Some(link) => Ok(link),
            None => Box::pin(self.new_link(manager, local)).await,
        }
    }

    async fn new_link(self: &Arc<Self>, manager: &Arc<ConnectionManager>, local: &RuntimeConnections) -> Result<Link> {
        let one_at_a_time = self.connecting.clone().lock_owned().await;
        if let Some(link) = self.current(&manager.clock)? {
            return Ok(link);
        }
        let client = manager.config.server(&self.address)?;
        let (node, manager) = (self.clone(), manager.clone());
        // The caller may give up before the attempt is over. Its outcome is recorded all the same.
        in_task(local, async move {
            let _one_at_a_time = one_at_a_time;
            let tls = manager.config.uses_tls();
            let connected = connect(&client).await.map_err(|fault| while_connecting(&node.address, tls, &fault));
            let connected = connected.and_then(|(connection, role)| {
                manager.check_role(&node.address, role.as_deref())?;
                Ok(connection)
            });
            match connected {
                Ok(connection) => Ok(node.is_up(connection)),
                Err(error) => {
                    node.is_down(&error, &manager.clock);
                    // Another server may have taken its place.
                    manager.report_unavailable(&node.address);
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
        self.oldest_abandoned.store(0, Ordering::Relaxed);
        *state = State::Up(link.clone());
        drop(state);
        link
    }

    fn is_down(&self, error: &Error, clock: &Clock) {
        let mut state = lock(&self.state);
        if let State::Up(_) = &*state {
            *state = State::Down(Outage::NONE);
        }
        if let State::Down(outage) = &mut *state {
            outage.failed(error, clock.now());
        }
    }

    /// Returns the open connection.
    pub(super) fn up(&self) -> Option<Link> {
        match &*lock(&self.state) {
            State::Up(link) => Some(link.clone()),
            State::Down(_) => None,
        }
    }

    /// Returns the open connection, or `None` if one may be made now.
    ///
    /// # Errors
    /// The last fault, until the pause after it is over.
    fn current(&self, clock: &Clock) -> Result<Option<Link>> {
        match &*lock(&self.state) {
            State::Up(link) => Ok(Some(link.clone())),
            State::Down(outage) => outage.check(clock.now()).map(|()| None),
        }
    }

    /// Ends the pause after a fault, so that the next caller may connect.
    pub(super) fn allow_connect_now(&self) {
        if let State::Down(outage) = &mut *lock(&self.state) {
            outage.end_pause();
        }
    }

    /// Discards this connection, so that no request uses it again.
    pub(super) fn discard(&self, generation: u64) {
        lock(&self.state).discard(generation);
    }

    /// Records that a caller gave up waiting for an answer, and discards a connection that was silent for too long.
    fn abandoned(&self, generation: u64, since: BootTime, now: BootTime) {
        let mut state = lock(&self.state);
        if !state.is_up(generation) {
            return;
        }
        let oldest = match self.oldest_abandoned.load(Ordering::Relaxed) {
            0 => since,
            other => since.min(BootTime::from_nanos(other)),
        };
        self.oldest_abandoned.store(oldest.as_nanos(), Ordering::Relaxed);
        if now.since(oldest) >= SUSPECT_AFTER {
            state.discard(generation);
        }
    }
}

impl State {
    fn is_up(&self, generation: u64) -> bool {
        matches!(self, Self::Up(link) if link.generation == generation)
    }

    fn discard(&mut self, generation: u64) {
        if self.is_up(generation) {
            *self = Self::Down(Outage::NONE);
        }
    }
}

/// Connects to a server of any kind.
pub(super) async fn connect_to_any(client: &Client) -> Result<MultiplexedConnection, RedisError> {
    let options = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(CONNECT_TIMEOUT))
        // Each caller has a deadline of its own.
        .set_response_timeout(None)
        .set_pipeline_buffer_size(MAX_UNWRITTEN_REQUESTS);
    client.get_multiplexed_async_connection_with_config(&options).await
}

/// Connects, and returns the server's role. The role is `None` if the server does not report one: a managed service, a
/// proxy, or a user without that right. A replica is then noticed when it rejects the first write.
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
    within(CONNECT_TIMEOUT, connected).await.unwrap_or_else(|| Err(timeout_error(CONNECT_TIMEOUT)))
}

/// Returns the role in the answer to `ROLE`: its first element. KeyDB with several primaries returns a row for each of
/// them.
fn role_in(answer: Value) -> Value {
    match answer {
        Value::Array(parts) => parts.into_iter().next().map_or(Value::Nil, role_in),
        role => role,
    }
}

/// Watches one request. If it is dropped before the answer, it may discard a connection that has been silent for too
/// long.
pub(super) struct AnswerGuard<'a> {
    node: &'a Node,
    generation: u64,
    since: BootTime,
    clock: &'a Clock,
}

impl<'a> AnswerGuard<'a> {
    pub(super) fn new(node: &'a Node, link: &Link, clock: &'a Clock) -> Self {
        Self { node, generation: link.generation, since: clock.now(), clock }
    }

    /// Records the answer. Every request calls this, and nearly always it is a single load.
    pub(super) fn answered(self) {
        if self.node.oldest_abandoned.load(Ordering::Relaxed) != 0 {
            self.node.oldest_abandoned.store(0, Ordering::Relaxed);
        }
        std::mem::forget(self);
    }
}

impl Drop for AnswerGuard<'_> {
    fn drop(&mut self) {
        self.node.abandoned(self.generation, self.since, self.clock.now());
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::Config;
    use super::*;
    use crate::store::backoff::sleep;

    /// Contains real answers to `ROLE`: of Redis 7.0.15, and of KeyDB 6.3.4 as one of two and of three active replicas.
    #[test]
    fn every_form_of_a_replicas_role_is_rejected() {
        let bulk = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let row = |role: &str| {
            let parts = [bulk(role), bulk("127.0.0.1"), Value::Int(7802), bulk("connected"), Value::Int(0)];
            Value::Array(parts.into())
        };
        let check_role = |answer: Value| {
            let config = Config::from_url("redis://127.0.0.1").unwrap();
            let role = redis::from_redis_value::<String>(role_in(answer)).unwrap();
            let manager = ConnectionManager::new(config);
            let address = manager.cached_route(0).unwrap();
            manager.check_role(&address, Some(&role))
        };
        check_role(Value::Array(vec![bulk("master"), Value::Int(0), Value::Array(Vec::new())])).unwrap();
        for (answer, says) in [
            (row("slave"), "is a replica; name its primary"),
            (row("active-replica"), "is an active replica"),
            (Value::Array(vec![row("active-replica"), row("active-replica")]), "is an active replica"),
        ] {
            let error = check_role(answer).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Misconfigured);
            assert!(error.to_string().contains(says), "{error}");
        }
    }

    /// A caller may wait for less time than connecting takes.
    #[test]
    fn abandoned_connection_attempt_is_recorded() {
        // The kernel accepts connections, but no process answers.
        let unresponsive = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::Tcp { host: "127.0.0.1".into(), port: unresponsive.local_addr().unwrap().port() };
        let manager =
            Arc::new(ConnectionManager::new(Config::from_url(&format!("redis+cluster://{address}")).unwrap()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let local = manager.local().unwrap();
            let node = local.node(&address);
            assert!(within(Duration::from_millis(50), node.link(&manager, &local)).await.is_none());
            let recorded = async {
                while !manager.slots().unwrap().unavailable_servers().contains(&address) {
                    sleep(Duration::from_millis(5)).await;
                }
            };
            within(Duration::from_secs(30), recorded).await.unwrap();
            let State::Down(outage) = &*lock(&node.state) else { panic!("the server is silent") };
            assert!(outage.check(BootTime::from_nanos(0)).is_err());
        });
    }
}
