//! Connections for steps: a few, made when needed, given back after each step.
//!
//! Connections are driven by a thread of the store's own. So a step can be asked for from any runtime, or from none; what
//! the user's runtime does delays no answer, and its end ends no connection. One step at a time uses a connection, because
//! the server does one after the other, each with its own write to the disk; several connections share that write.
//!
//! Steps on keys may use the connections of a pool of the user's instead. What keeps the session never does: work of the
//! user's that has all of them would end it.
//!
//! The client never repeats a request (rule 7 of the store trait).

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Connection, NoTls, Row, Socket};

use super::borrowed::{Borrowed, UsersPool};
use super::config::{CONNECT_WITHIN, Config, Place, Tls};
use super::error::{OTHER_ISOLATION, Verdict, error, from_answer, malformed, verdict, while_connecting};
use super::server::{Server, Watch, takes_writes};
use super::together;
use crate::clock::{BootTime, Clock, jitter};
use crate::error::{Error, ErrorKind, Result};

/// After a fault nobody connects for so long, doubled with each further one: a thousand tasks are no storm.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The most connections for those that look.
const LOOKS: usize = 4;

/// The answer of a step that was given up is waited for, so long: a little longer than the longest step. Its connection is
/// used by nobody else meanwhile, and never again without that answer.
const SETTLED_WITHIN: Duration = Duration::from_secs(6);

/// Time for which the connections of a user's pool are asked whether their server takes writes, after one did not. The pool
/// may have others from before a failover.
const ASKED_FOR: Duration = Duration::from_secs(60);

/// Maximum number of connections of a user's pool that one step asks.
const MOST_ASKED: usize = 64;

/// Whether a server takes no writes, and when it was started: another one was started at another time.
pub(super) const SERVER: &str = "pg_catalog.pg_is_in_recovery() OR pg_catalog.current_setting('transaction_read_only') = 'on', \
     extract(epoch FROM pg_catalog.pg_postmaster_start_time())::text";

/// Whether the isolation of transactions is one in which a step sees what was committed while it waited.
pub(super) const SEES_WHAT_IS_NEW: &str =
    "pg_catalog.current_setting('transaction_isolation') NOT IN ('repeatable read', 'serializable')";

/// Makes it so, as an option of a connection.
const READ_COMMITTED: &str = r"-c default_transaction_isolation=read\ committed";

/// A value and its type: a statement whose types are told needs no name and one round trip, so that it can go through a
/// pooler.
pub(super) type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

#[derive(Debug)]
pub(super) struct Pool {
    pub(super) config: Config,
    /// Started with the first connection.
    driver: Mutex<Option<Driver>>,
    idle: Mutex<Vec<Own>>,
    server: Server,
    /// Until then the connections of a user's pool are asked before they are used.
    asks_until: Mutex<BootTime>,
    /// Where connections for steps on keys come from, if they are not our own.
    users: Option<UsersPool>,
    permits: Arc<Semaphore>,
    /// Calls of many steps have a few of the connections: they wait for nobody's turn, and never for those that do.
    together_permits: Arc<Semaphore>,
    /// Looks have a few too: a thousand that wait look once in a second, and no step stands in line behind that.
    look_permits: Arc<Semaphore>,
    /// One connection more, for what keeps the session: no crowd of steps may delay a beat.
    session_permit: Semaphore,
    pause: Mutex<Pause>,
    saw_primary: AtomicBool,
    /// The default isolation was seen to be another one: connections are made with an option against it.
    sets_isolation: AtomicBool,
    clock: Clock,
}

/// The thread that drives connections. It ends when this is dropped, and its connections with it.
#[derive(Debug)]
struct Driver {
    runtime: Handle,
    _lives: oneshot::Sender<()>,
}

impl Driver {
    fn start() -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (lives, ends) = oneshot::channel::<()>();
        let drive = move || drop(runtime.block_on(ends));
        std::thread::Builder::new().name("stanchion-postgres".into()).spawn(drive)?;
        Ok(Self { runtime: handle, _lives: lives })
    }
}

/// Not before `next` is another connection made.
#[derive(Debug)]
struct Pause {
    next: BootTime,
    length: Duration,
    why: Option<(ErrorKind, String)>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    pub(super) fn new(config: Config, users: Option<UsersPool>) -> Self {
        let pause = Pause { next: BootTime::from_nanos(0), length: FIRST_PAUSE, why: None };
        let (for_together, for_looks) = (together::REQUESTS.min(config.pool / 2), LOOKS.min(config.pool / 4));
        let permits = Arc::new(Semaphore::new(config.pool - for_together - for_looks));
        let of_their_own = |count| match count {
            0 => permits.clone(),
            some => Arc::new(Semaphore::new(some)),
        };
        Self {
            together_permits: of_their_own(for_together),
            look_permits: of_their_own(for_looks),
            permits,
            driver: Mutex::default(),
            idle: Mutex::default(),
            server: Server::new(),
            asks_until: Mutex::new(BootTime::from_nanos(0)),
            users,
            session_permit: Semaphore::new(1),
            pause: Mutex::new(pause),
            saw_primary: AtomicBool::new(false),
            sets_isolation: AtomicBool::new(false),
            clock: Clock::system(),
            config,
        }
    }

    /// Whether steps on keys use a pool of the user's.
    pub(super) fn is_of_user(&self) -> bool {
        self.users.is_some()
    }

    /// The runtime that connections live in.
    pub(super) fn runtime(&self) -> Result<Handle> {
        let mut driver = lock(&self.driver);
        match &*driver {
            Some(driver) => Ok(driver.runtime.clone()),
            None => {
                let started = Driver::start().map_err(|fault| {
                    error(ErrorKind::Unavailable, format!("no thread for the connections: {fault}"))
                })?;
                let runtime = started.runtime.clone();
                *driver = Some(started);
                Ok(runtime)
            }
        }
    }

    /// One statement, on a connection that nobody else uses meanwhile.
    pub(super) async fn ask(self: &Arc<Self>, statement: &str, parameters: &[Parameter<'_>]) -> Result<Vec<Row>> {
        self.ask_with(&self.permits, statement, parameters).await
    }

    /// The same for a call of many steps.
    pub(super) async fn ask_together(
        self: &Arc<Self>,
        statement: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<Vec<Row>> {
        self.ask_with(&self.together_permits, statement, parameters).await
    }

    /// The same for one that looks. It is driven where connections live: who asked may be slow to look at the answer, and
    /// keeps no connection from the others meanwhile.
    pub(super) async fn look(
        self: &Arc<Self>,
        statement: String,
        parameters: Vec<(Box<dyn ToSql + Sync + Send>, Type)>,
    ) -> Result<Vec<Row>> {
        let (mut sender, looked) = oneshot::channel();
        let pool = self.clone();
        self.runtime()?.spawn(async move {
            let parameters: Vec<Parameter<'_>> =
                parameters.iter().map(|(value, kind)| (&**value as &(dyn ToSql + Sync), kind.clone())).collect();
            let rows = tokio::select! {
                biased;
                rows = pool.ask_with(&pool.look_permits, &statement, &parameters) => rows,
                () = sender.closed() => return,
            };
            let _gave_up = sender.send(rows);
        });
        looked.await.unwrap_or_else(|_| Err(error(ErrorKind::Unavailable, "the store was dropped while it was used")))
    }

    /// The same for a step of a session, which waits for no step on a key.
    pub(super) async fn ask_for_session(
        self: &Arc<Self>,
        statement: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<Vec<Row>> {
        let _permit = self.session_permit.acquire().await;
        let connection = Connected::Own(self.connection().await?);
        self.ask_by(connection, None, statement, parameters).await
    }

    async fn ask_with(
        self: &Arc<Self>,
        permits: &Arc<Semaphore>,
        statement: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<Vec<Row>> {
        let permit = permits.clone().acquire_owned().await.ok();
        let connection = match &self.users {
            Some(users) => Connected::Users(self.connection_of(users).await?),
            None => Connected::Own(self.connection().await?),
        };
        self.ask_by(connection, permit, statement, parameters).await
    }

    /// A connection of the user's pool. After a failover it may have some from before.
    async fn connection_of(&self, users: &UsersPool) -> Result<Box<dyn Borrowed>> {
        for _ in 0..MOST_ASKED {
            let connection = users.connection().await?;
            if self.clock.now() >= *lock(&self.asks_until) || takes_writes(connection.client()).await {
                return Ok(connection);
            }
        }
        let message = "the connections of the pool lead to a server that takes no writes";
        Err(error(ErrorKind::Unavailable, message).in_doubt(false))
    }

    async fn ask_by(
        self: &Arc<Self>,
        connection: Connected,
        permit: Option<OwnedSemaphorePermit>,
        statement: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<Vec<Row>> {
        let mut lease = Lease { pool: self, connection: Some(connection), permit, is_answered: false, verdict: None };
        let Some(connection) = &lease.connection else {
            return Err(error(ErrorKind::Internal, "a lease without a connection"));
        };
        let answer = connection.client().query_typed(statement, parameters).await;
        lease.is_answered = true;
        lease.verdict = answer.as_ref().err().and_then(verdict);
        answer.map_err(from_answer)
    }

    /// Several statements without parameters, for the schema.
    pub(super) async fn run_script(self: &Arc<Self>, script: &str) -> Result<()> {
        let _permit = self.permits.acquire().await;
        let client = self.connection().await?;
        let done = client.client.batch_execute(script).await.map_err(from_answer);
        if done.is_ok() {
            // After a failure it may be in the midst of a transaction.
            self.keep(client);
        }
        done
    }

    /// Keeps a connection for the next step, if it is of use.
    fn keep(&self, own: Own) {
        if own.generation == self.server.generation() && !own.client.is_closed() {
            lock(&self.idle).push(own);
        }
    }

    /// The server of a connection takes no writes any more: the next step connects again.
    fn leave(&self, generation: u64) {
        if self.server.left(generation) {
            lock(&self.idle).clear();
            self.ask_users_pool();
        }
    }

    /// From now on the connections of the user's pool are asked before they are used.
    fn ask_users_pool(&self) {
        *lock(&self.asks_until) = self.clock.now().after(ASKED_FOR);
    }

    /// Tells when the server is another one.
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
        {
            let pause = lock(&self.pause);
            if let (true, Some((kind, message))) = (self.clock.now() < pause.next, &pause.why) {
                return Err(error(*kind, message.clone()).in_doubt(false));
            }
        }
        let (sender, made) = oneshot::channel();
        let pool = self.clone();
        self.runtime()?.spawn(async move {
            let made = pool.connect().await;
            pool.remember(made.as_ref().err());
            // A far server may need more time than whoever wanted it had: the next attempt has it.
            if let Err(Ok(own)) = sender.send(made)
                && lock(&pool.idle).is_empty()
            {
                pool.keep(own);
            }
        });
        made.await.unwrap_or_else(|_| Err(error(ErrorKind::Unavailable, "the store was dropped while it was used")))
    }

    /// How the last attempt to connect went.
    fn remember(&self, fault: Option<&Error>) {
        let mut pause = lock(&self.pause);
        match fault {
            None => *pause = Pause { next: BootTime::from_nanos(0), length: FIRST_PAUSE, why: None },
            Some(fault) => {
                pause.next = self.clock.now().after(jitter(pause.length));
                pause.length = (pause.length * 2).min(LONGEST_PAUSE);
                pause.why = Some((fault.kind(), fault.message().to_owned()));
            }
        }
    }

    async fn connect(&self) -> Result<Own> {
        let begun_in = self.server.generation();
        let mut opened = None;
        if !self.sets_isolation.load(Ordering::Relaxed) {
            opened = Some(self.open(self.config.steps.clone()).await?).filter(|opened| opened.sees_what_is_new);
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
                    self.ask_users_pool();
                }
                Ok(Own { client: opened.client, generation })
            }
            // At first that is a mistake; later it is a failover that has not reached the name yet.
            (true, false) => Err(error(
                ErrorKind::Misconfigured,
                "this server takes no writes: name the primary if it is a standby, and look for `default_transaction_read_only`",
            )),
            (true, true) => {
                takes_writes(&opened.client).await;
                Err(error(ErrorKind::Unavailable, "the server takes no writes: it is a standby now, perhaps"))
            }
        }
    }

    /// A connection with the isolation that steps need, where another one is the default. It is asked for as the connection
    /// begins: set later, behind a pooler, it would be set for whoever has that connection next.
    async fn open_with_isolation(&self) -> Result<Opened> {
        let mut place = self.config.steps.clone();
        let options = format!("{} {READ_COMMITTED}", place.settings.get_options().unwrap_or_default());
        place.settings.options(options.as_str());
        let other = || error(ErrorKind::Misconfigured, OTHER_ISOLATION).in_doubt(false);
        match self.open(place).await {
            Ok(opened) if opened.sees_what_is_new => {
                self.sets_isolation.store(true, Ordering::Relaxed);
                Ok(opened)
            }
            // Poolers refuse options, each in its words, or drop them.
            Ok(_) => Err(other()),
            Err(fault) if ["startup parameter", "(0A000"].iter().any(|told| fault.message().contains(told)) => {
                Err(other().with_source(fault))
            }
            Err(fault) => Err(fault),
        }
    }

    async fn open(&self, Place { settings, tls }: Place) -> Result<Opened> {
        let opened = within(CONNECT_WITHIN, async move {
            let client = match tls {
                Tls::None => drive(settings.connect(NoTls).await.map_err(while_connecting)?),
                Tls::Verified(tls) => drive(settings.connect(tls).await.map_err(while_connecting)?),
            };
            let look = format!("SELECT {SERVER}, {SEES_WHAT_IS_NEW}");
            let told = client.query_typed(&look, &[]).await.map_err(while_connecting)?;
            let told = told.first().ok_or_else(malformed)?;
            let read = |fault| malformed().in_doubt(false).with_source(fault);
            Ok(Opened {
                is_read_only: told.try_get(0).map_err(read)?,
                server: told.try_get(1).map_err(read)?,
                sees_what_is_new: told.try_get(2).map_err(read)?,
                client,
            })
        });
        let late =
            || Err(error(ErrorKind::Unavailable, format!("cannot connect: no answer within {CONNECT_WITHIN:?}")));
        opened.await.unwrap_or_else(late)
    }
}

/// A connection that was just made.
struct Opened {
    client: Client,
    is_read_only: bool,
    server: String,
    /// Whether a step sees what was committed while it waited.
    sees_what_is_new: bool,
}

/// A connection of the store's own.
#[derive(Debug)]
struct Own {
    client: Client,
    generation: u64,
}

/// Runs the connection, as long as there is a client.
fn drive<T>((client, connection): (Client, Connection<Socket, T>)) -> Client
where
    Connection<Socket, T>: Future<Output = Result<(), tokio_postgres::Error>> + Send + 'static,
{
    // What breaks it is told to who waits for an answer.
    tokio::spawn(async move { drop(connection.await) });
    client
}

/// The outcome, if it comes in time.
#[allow(clippy::disallowed_methods, reason = "a limit on a connection, not a deadline of the protocol")]
pub(super) async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(limit, work).await.ok()
}

#[allow(clippy::disallowed_methods, reason = "a pause between attempts to connect, not a deadline of the protocol")]
pub(super) async fn sleep(pause: Duration) {
    tokio::time::sleep(pause).await;
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

    /// Once all that was asked on it is answered. The user's pool looks after its own.
    fn give_back(self, pool: &Pool) {
        if let Self::Own(own) = self {
            pool.keep(own);
        }
    }

    /// After an answer that tells that it is of no use.
    fn end(self, verdict: Verdict, pool: &Arc<Pool>) {
        if verdict == Verdict::Connection {
            return;
        }
        match &self {
            Self::Own(own) => pool.leave(own.generation),
            Self::Users(_) => pool.ask_users_pool(),
        }
        if let Ok(runtime) = pool.runtime() {
            runtime.spawn(async move { takes_writes(self.client()).await });
        }
    }
}

/// A connection that a step uses.
struct Lease<'a> {
    pool: &'a Arc<Pool>,
    connection: Option<Connected>,
    /// Kept until the answer came, also where nobody waits for that any more. A step of a session has none.
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
        // A session's: the next beat waits for no answer to this one, and the connection is closed.
        let Some(permit) = self.permit.take() else { return };
        // Given up early its step goes on, and may wait for a row: whoever had the connection next would wait with it.
        let pool = Arc::downgrade(self.pool);
        if let Ok(runtime) = self.pool.runtime() {
            runtime.spawn(async move {
                let settled = within(SETTLED_WITHIN, connection.client().batch_execute("")).await;
                if let (Some(Ok(())), Some(pool)) = (settled, pool.upgrade()) {
                    connection.give_back(&pool);
                }
                drop(permit);
            });
        }
    }
}
