//! Opens connections, lends one to each operation, and replaces the connections of a server that accepts no writes.
//!
//! A thread of the store drives the connections. Operations can therefore run in any runtime, or in none; a busy
//! runtime of the user delays no answer, and its end closes no connection. Each operation has its connection to itself,
//! because the server runs the statements of one connection one after the other, each with its own write to the disk.
//! Several connections share such a write.
//!
//! Operations on keys may use the connections of a user's pool instead. The renewal of the session never does, because
//! the session would end while the user's work uses all of them.
//!
//! The client never repeats a request (rule 7 of the store trait).

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Connection, NoTls, Row, Socket};

use super::batch::MAX_BATCHES_IN_FLIGHT;
use super::borrowed::{Borrowed, UsersPool};
use super::config::{CONNECT_TIMEOUT, Config, Endpoint, Tls};
use super::error::{
    OTHER_ISOLATION, Verdict, cannot_connect, error, from_answer, malformed, verdict, while_connecting,
};
use super::server::{Server, Watch, accepts_writes};
use crate::clock::{BootTime, Clock};
use crate::error::{Error, ErrorKind, Result};
use crate::store::backoff::within;
use crate::store::connection_thread::ConnectionThread;
use crate::store::outage::Outage;
use crate::sync::lock;

/// Time for which a caller waits for a new connection. It is a little less than the usual limit of an attempt
/// ([`RetryPolicy::attempt`](crate::RetryPolicy::attempt)), so that the error names the server.
const CONNECTION_WAIT: Duration = Duration::from_millis(1_800);

/// Maximum number of connections for operations that only read.
const MAX_READS_IN_FLIGHT: usize = 4;

/// Time after which the answer to an operation whose caller gave up counts as lost: a little longer than the longest
/// operation. Until the answer arrives, no other operation uses the connection, and without the answer none ever does.
const ABANDONED_ANSWER_TIMEOUT: Duration = Duration::from_secs(6);

/// Time for which the connections of a user's pool are checked before use, after one of them led to a server that
/// accepts no writes. The pool may have more connections from before a failover.
const POOL_CHECK_PERIOD: Duration = Duration::from_secs(60);

/// Maximum number of connections of a user's pool that one operation checks.
const MAX_CONNECTIONS_CHECKED: usize = 64;

/// SQL for whether a server accepts no writes, and for its start time. The start time identifies the server.
pub(super) const SERVER: &str = "pg_catalog.pg_is_in_recovery() OR pg_catalog.current_setting('transaction_read_only') = 'on', \
     extract(epoch FROM pg_catalog.pg_postmaster_start_time())::text";

/// SQL for whether the isolation level lets an operation see the commits that happened while it waited.
pub(super) const SEES_COMMITS: &str =
    "pg_catalog.current_setting('transaction_isolation') NOT IN ('repeatable read', 'serializable')";

/// The option of a connection that sets the isolation level.
const READ_COMMITTED: &str = r"-c default_transaction_isolation=read\ committed";

/// A value and its type. A statement with the types of its parameters needs no name and only one round trip, so that it
/// works through a pooler.
pub(super) type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

#[derive(Debug)]
pub(super) struct Pool {
    pub(super) config: Config,
    /// Drives the connections. The first connection starts it.
    thread: ConnectionThread,
    idle: Mutex<Vec<Own>>,
    server: Server,
    /// Until this time the connections of a user's pool are checked before use.
    checks_until: Mutex<BootTime>,
    /// The user's pool, if operations on keys use one.
    users: Option<UsersPool>,
    permits: Arc<Semaphore>,
    /// Batches have separate connections. They wait for no key's turn, and must not wait for requests that do.
    batch_permits: Arc<Semaphore>,
    /// Reads have separate connections: a thousand waiters may poll at once, and no other operation must queue behind
    /// them.
    read_permits: Arc<Semaphore>,
    /// The session has one connection more, so that no crowd of operations delays a renewal.
    session_permit: Semaphore,
    outage: Mutex<Outage>,
    saw_primary: AtomicBool,
    /// Whether new connections set the isolation level, because the default was found to be another one.
    sets_isolation: AtomicBool,
    clock: Clock,
}

impl Pool {
    pub(super) fn new(config: Config, users: Option<UsersPool>) -> Self {
        let for_batches = MAX_BATCHES_IN_FLIGHT.min(config.pool / 2);
        let for_reads = MAX_READS_IN_FLIGHT.min(config.pool / 4);
        let permits = Arc::new(Semaphore::new(config.pool - for_batches - for_reads));
        let separate = |count| match count {
            0 => permits.clone(),
            _ => Arc::new(Semaphore::new(count)),
        };
        Self {
            batch_permits: separate(for_batches),
            read_permits: separate(for_reads),
            permits,
            thread: ConnectionThread::new("stanchion-postgres"),
            idle: Mutex::default(),
            server: Server::new(),
            checks_until: Mutex::new(BootTime::from_nanos(0)),
            users,
            session_permit: Semaphore::new(1),
            outage: Mutex::new(Outage::NONE),
            saw_primary: AtomicBool::new(false),
            sets_isolation: AtomicBool::new(false),
            clock: Clock::system(),
            config,
        }
    }

    /// Returns whether operations on keys use a pool of the user.
    pub(super) fn uses_users_pool(&self) -> bool {
        self.users.is_some()
    }

    /// Returns the runtime of the connections, and starts its thread if necessary.
    pub(super) fn runtime(&self) -> Result<Handle> {
        self.thread.runtime()
    }

    /// Runs a statement for an operation on a key, over a connection that no other operation uses at the same time.
    pub(super) async fn query(self: &Arc<Self>, statement: &str, parameters: &[Parameter<'_>]) -> Result<Vec<Row>> {
        self.query_with(&self.permits, statement, parameters).await
    }

    /// Runs a statement for a batch.
    pub(super) async fn query_batch(
        self: &Arc<Self>,
        statement: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<Vec<Row>> {
        self.query_with(&self.batch_permits, statement, parameters).await
    }

    /// Runs a statement that only reads. It runs in a task of the connections' runtime, so that a caller that polls its
    /// future late occupies no connection.
    pub(super) async fn read(
        self: &Arc<Self>,
        statement: String,
        parameters: Vec<(Box<dyn ToSql + Sync + Send>, Type)>,
    ) -> Result<Vec<Row>> {
        let (mut sender, outcome) = oneshot::channel();
        let pool = self.clone();
        self.runtime()?.spawn(async move {
            let parameters: Vec<Parameter<'_>> =
                parameters.iter().map(|(value, kind)| (&**value as &(dyn ToSql + Sync), kind.clone())).collect();
            let rows = tokio::select! {
                biased;
                rows = pool.query_with(&pool.read_permits, &statement, &parameters) => rows,
                () = sender.closed() => return,
            };
            let _ = sender.send(rows); // The caller may have given up.
        });
        outcome.await.unwrap_or_else(|_| Err(dropped()))
    }

    /// Runs a statement for the session. It never waits for an operation on a key.
    pub(super) async fn query_session(
        self: &Arc<Self>,
        statement: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<Vec<Row>> {
        let _permit = self.session_permit.acquire().await;
        let connection = Connected::Own(self.connection().await?);
        self.query_over(connection, None, statement, parameters).await
    }

    async fn query_with(
        self: &Arc<Self>,
        permits: &Arc<Semaphore>,
        statement: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<Vec<Row>> {
        let permit = permits.clone().acquire_owned().await.ok();
        let connection = match &self.users {
            Some(users) => Connected::Users(self.borrow_from(users).await?),
            None => Connected::Own(self.connection().await?),
        };
        self.query_over(connection, permit, statement, parameters).await
    }

    /// Borrows a connection from the user's pool. After a failover the pool may have useless connections from before.
    async fn borrow_from(&self, users: &UsersPool) -> Result<Box<dyn Borrowed>> {
        for _ in 0..MAX_CONNECTIONS_CHECKED {
            let connection = users.connection().await?;
            if self.clock.now() >= *lock(&self.checks_until) || accepts_writes(connection.client()).await {
                return Ok(connection);
            }
        }
        let message = "the connections of the pool lead to a server that accepts no writes";
        Err(error(ErrorKind::Unavailable, message).in_doubt(false))
    }

    async fn query_over(
        self: &Arc<Self>,
        connection: Connected,
        permit: Option<OwnedSemaphorePermit>,
        statement: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<Vec<Row>> {
        let mut lease = Lease { pool: self, connection: Some(connection), permit, is_answered: false, verdict: None };
        let Some(connection) = &lease.connection else {
            return Err(error(ErrorKind::Internal, "the lease has no connection"));
        };
        let answer = connection.client().query_typed(statement, parameters).await;
        lease.is_answered = true;
        lease.verdict = answer.as_ref().err().and_then(verdict);
        answer.map_err(from_answer)
    }

    /// Runs several statements without parameters, for the schema.
    pub(super) async fn run_script(self: &Arc<Self>, script: &str) -> Result<()> {
        let _permit = self.permits.acquire().await;
        let client = self.connection().await?;
        let done = client.client.batch_execute(script).await.map_err(from_answer);
        if done.is_ok() {
            // After an error the connection may be inside a transaction.
            self.keep(client);
        }
        done
    }

    /// Keeps a connection for the next operation, unless it has become useless.
    fn keep(&self, own: Own) {
        if own.generation == self.server.generation() && !own.client.is_closed() {
            lock(&self.idle).push(own);
        }
    }

    /// Drops the idle connections to a server that no longer accepts writes, so that the next operation connects again.
    fn retire(&self, generation: u64) {
        if self.server.retire(generation) {
            lock(&self.idle).clear();
            self.check_users_pool();
        }
    }

    /// Has the connections of the user's pool checked before use, for a while.
    fn check_users_pool(&self) {
        *lock(&self.checks_until) = self.clock.now().after(POOL_CHECK_PERIOD);
    }

    /// Returns a watch that reports when the server was replaced.
    pub(super) fn watch(&self) -> Watch {
        self.server.watch()
    }

    async fn connection(self: &Arc<Self>) -> Result<Own> {
        loop {
            let Some(own) = lock(&self.idle).pop() else { break };
            if own.generation == self.server.generation() && !own.client.is_closed() {
                return Ok(own);
            }
        }
        lock(&self.outage).check(self.clock.now())?;
        let (sender, made) = oneshot::channel();
        let pool = self.clone();
        self.runtime()?.spawn(async move {
            let made = pool.connect().await;
            pool.record_attempt(made.as_ref().err());
            // Connecting to a distant server may take longer than the caller waits. The next attempt then finds the
            // connection here.
            if let Err(Ok(own)) = sender.send(made)
                && lock(&pool.idle).is_empty()
            {
                pool.keep(own);
            }
        });
        let late = || {
            let message = format!("no answer within {CONNECTION_WAIT:?}");
            Ok(Err(cannot_connect(&self.config.operations.settings, ErrorKind::Unavailable, &message)))
        };
        within(CONNECTION_WAIT, made).await.unwrap_or_else(late).unwrap_or_else(|_| Err(dropped()))
    }

    /// Records how an attempt to connect ended.
    fn record_attempt(&self, fault: Option<&Error>) {
        let mut outage = lock(&self.outage);
        match fault {
            None => *outage = Outage::NONE,
            Some(fault) => outage.failed(fault, self.clock.now()),
        }
    }

    async fn connect(&self) -> Result<Own> {
        let begun_in = self.server.generation();
        let mut opened = None;
        if !self.sets_isolation.load(Ordering::Relaxed) {
            opened = Some(self.open(self.config.operations.clone()).await?).filter(|opened| opened.sees_commits);
        }
        let opened = match opened {
            Some(opened) => opened,
            None => self.open_with_isolation().await?,
        };
        match (opened.is_read_only, self.saw_primary.load(Ordering::Relaxed)) {
            (false, _) => {
                self.saw_primary.store(true, Ordering::Relaxed);
                let generation = self.server.reached(&opened.server, begun_in);
                if generation != begun_in {
                    self.check_users_pool();
                }
                Ok(Own { client: opened.client, generation })
            }
            // Before this process has seen a primary, the URL is wrong. Later, the address still leads to the old
            // server of a failover.
            (true, false) => Err(error(
                ErrorKind::Misconfigured,
                "the server accepts no writes: if it is a standby, name the primary; otherwise check `default_transaction_read_only`",
            )),
            (true, true) => {
                accepts_writes(&opened.client).await;
                Err(error(ErrorKind::Unavailable, "the server accepts no writes: it may be a standby now"))
            }
        }
    }

    /// Opens a connection with the isolation level that operations need, if the default is another one. The level is an
    /// option of the connection: a later `SET` would, behind a pooler, also apply to the next client of the connection.
    async fn open_with_isolation(&self) -> Result<Opened> {
        let mut endpoint = self.config.operations.clone();
        let options = format!("{} {READ_COMMITTED}", endpoint.settings.get_options().unwrap_or_default());
        endpoint.settings.options(options.as_str());
        let other = || error(ErrorKind::Misconfigured, OTHER_ISOLATION).in_doubt(false);
        match self.open(endpoint).await {
            Ok(opened) if opened.sees_commits => {
                self.sets_isolation.store(true, Ordering::Relaxed);
                Ok(opened)
            }
            // A pooler rejects options, with a text of its own, or ignores them.
            Ok(_) => Err(other()),
            Err(fault) if ["startup parameter", "(0A000"].iter().any(|text| fault.message().contains(text)) => {
                Err(other().with_source(fault))
            }
            Err(fault) => Err(fault),
        }
    }

    async fn open(&self, Endpoint { settings, tls }: Endpoint) -> Result<Opened> {
        let opened = within(CONNECT_TIMEOUT, async {
            let failed = |fault| while_connecting(&settings, fault);
            let client = match tls {
                Tls::None => drive(settings.connect(NoTls).await.map_err(failed)?),
                Tls::Verified(tls) => drive(settings.connect(tls).await.map_err(failed)?),
            };
            let statement = format!("SELECT {SERVER}, {SEES_COMMITS}");
            let rows = client.query_typed(&statement, &[]).await.map_err(failed)?;
            let row = rows.first().ok_or_else(malformed)?;
            let unreadable = |fault| malformed().in_doubt(false).with_source(fault);
            Ok(Opened {
                is_read_only: row.try_get(0).map_err(unreadable)?,
                server: row.try_get(1).map_err(unreadable)?,
                sees_commits: row.try_get(2).map_err(unreadable)?,
                client,
            })
        });
        let late =
            || Err(cannot_connect(&settings, ErrorKind::Unavailable, &format!("no answer within {CONNECT_TIMEOUT:?}")));
        opened.await.unwrap_or_else(late)
    }
}

/// Returns the error of a request whose store was dropped.
fn dropped() -> Error {
    error(ErrorKind::Unavailable, "the store was dropped while the request was in flight")
}

/// A connection that was just opened.
struct Opened {
    client: Client,
    is_read_only: bool,
    server: String,
    /// Whether an operation sees the commits that happened while it waited.
    sees_commits: bool,
}

/// A connection that the store has opened itself.
#[derive(Debug)]
struct Own {
    client: Client,
    generation: u64,
}

/// Drives a connection in a task, as long as its client exists.
fn drive<T>((client, connection): (Client, Connection<Socket, T>)) -> Client
where
    Connection<Socket, T>: Future<Output = Result<(), tokio_postgres::Error>> + Send + 'static,
{
    // The error is ignored here, because it also reaches the callers that wait for an answer.
    tokio::spawn(async move { drop(connection.await) });
    client
}

enum Connected {
    Own(Own),
    Users(Box<dyn Borrowed>),
}

impl Connected {
    fn client(&self) -> &Client {
        match self {
            Self::Own(own) => &own.client,
            Self::Users(connection) => connection.client(),
        }
    }

    /// Returns the connection to its pool. Every request over the connection must be answered. The user's pool manages
    /// its own connections.
    fn give_back(self, pool: &Pool) {
        if let Self::Own(own) = self {
            pool.keep(own);
        }
    }

    /// Drops the connection after an error that makes it useless, and with it others that the error makes useless.
    fn end(self, verdict: Verdict, pool: &Arc<Pool>) {
        if verdict == Verdict::Connection {
            return;
        }
        match &self {
            Self::Own(own) => pool.retire(own.generation),
            Self::Users(_) => pool.check_users_pool(),
        }
        if let Ok(runtime) = pool.runtime() {
            runtime.spawn(async move { accepts_writes(self.client()).await });
        }
    }
}

/// A connection that an operation uses.
struct Lease<'a> {
    pool: &'a Arc<Pool>,
    connection: Option<Connected>,
    /// Held until the answer arrives, even if the caller has given up. Statements for the session have no permit.
    permit: Option<OwnedSemaphorePermit>,
    is_answered: bool,
    verdict: Option<Verdict>,
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let Some(connection) = self.connection.take() else { return };
        if let Some(verdict) = self.verdict {
            return connection.end(verdict, self.pool);
        }
        if self.is_answered {
            return connection.give_back(self.pool);
        }
        // Without a permit this is the session's connection. It is closed, because the next renewal must not wait for
        // this answer.
        let Some(permit) = self.permit.take() else { return };
        // The caller gave up, but the server still runs the operation, which may wait for a row. The next operation
        // over this connection would have to wait too.
        let pool = Arc::downgrade(self.pool);
        if let Ok(runtime) = self.pool.runtime() {
            runtime.spawn(async move {
                let answered = within(ABANDONED_ANSWER_TIMEOUT, connection.client().batch_execute("")).await;
                if let (Some(Ok(())), Some(pool)) = (answered, pool.upgrade()) {
                    connection.give_back(&pool);
                }
                drop(permit);
            });
        }
    }
}
