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
use super::error::{OTHER_ISOLATION, error, from_answer, while_connecting};
use super::together;
use crate::clock::{BootTime, Clock, jitter};
use crate::error::{Error, ErrorKind, Result};
use crate::thread::RuntimeThread;

/// After a fault nobody connects for so long, doubled with each further one: a thousand tasks are no storm.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The most connections for those that look.
const LOOKS: usize = 4;

/// The answer of a step that was given up is waited for, so long: a little longer than the longest step. Its connection is
/// used by nobody else meanwhile, and never again without that answer.
const SETTLED_WITHIN: Duration = Duration::from_secs(6);

/// Whether the isolation of transactions is one in which a step sees what was committed while it waited.
pub(super) const SEES_WHAT_IS_NEW: &str =
    "current_setting('transaction_isolation') NOT IN ('repeatable read', 'serializable')";

/// Makes it so, as an option of a connection.
const READ_COMMITTED: &str = r"-c default_transaction_isolation=read\ committed";

/// A value and its type: a statement whose types are told needs no name and one round trip, so that it can go through a
/// pooler.
pub(super) type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

#[derive(Debug)]
pub(super) struct Pool {
    pub(super) config: Config,
    /// Drives the connections. Started with the first connection.
    driver: Mutex<Option<RuntimeThread>>,
    idle: Mutex<Vec<Client>>,
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
                let started = RuntimeThread::start("stanchion-postgres").map_err(|fault| {
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
            Some(users) => Connected::Users(users.connection().await?),
            None => Connected::Own(self.connection().await?),
        };
        self.ask_by(connection, permit, statement, parameters).await
    }

    async fn ask_by(
        self: &Arc<Self>,
        connection: Connected,
        permit: Option<OwnedSemaphorePermit>,
        statement: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<Vec<Row>> {
        let mut lease = Lease { pool: self, connection: Some(connection), permit, is_answered: false };
        let Some(connection) = &lease.connection else {
            return Err(error(ErrorKind::Internal, "a lease without a connection"));
        };
        let answer = connection.client().query_typed(statement, parameters).await;
        lease.is_answered = true;
        answer.map_err(from_answer)
    }

    /// Several statements without parameters, for the schema.
    pub(super) async fn run_script(self: &Arc<Self>, script: &str) -> Result<()> {
        let _permit = self.permits.acquire().await;
        let client = self.connection().await?;
        let done = client.batch_execute(script).await.map_err(from_answer);
        if done.is_ok() {
            // After a failure it may be in the midst of a transaction.
            lock(&self.idle).push(client);
        }
        done
    }

    async fn connection(self: &Arc<Self>) -> Result<Client> {
        loop {
            let Some(client) = lock(&self.idle).pop() else { break };
            if !client.is_closed() {
                return Ok(client);
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
            if let Err(Ok(client)) = sender.send(made) {
                let mut idle = lock(&pool.idle);
                if idle.is_empty() {
                    idle.push(client);
                }
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

    async fn connect(&self) -> Result<Client> {
        let mut opened = None;
        if !self.sets_isolation.load(Ordering::Relaxed) {
            let (client, is_standby, sees) = self.open(self.config.steps.clone()).await?;
            opened = sees.then_some((client, is_standby));
        }
        let (client, is_standby) = match opened {
            Some(opened) => opened,
            None => self.open_with_isolation().await?,
        };
        match (is_standby, self.saw_primary.load(Ordering::Relaxed)) {
            (false, _) => {
                self.saw_primary.store(true, Ordering::Relaxed);
                Ok(client)
            }
            // At first that is a mistake; later it is a failover that has not reached the name yet.
            (true, false) => {
                Err(error(ErrorKind::Misconfigured, "this server is a standby, which takes no locks: name the primary"))
            }
            (true, true) => Err(error(ErrorKind::Unavailable, "the server is a standby now")),
        }
    }

    /// A connection with the isolation that steps need, where another one is the default. It is asked for as the connection
    /// begins: set later, behind a pooler, it would be set for whoever has that connection next.
    async fn open_with_isolation(&self) -> Result<(Client, bool)> {
        let mut place = self.config.steps.clone();
        let options = format!("{} {READ_COMMITTED}", place.settings.get_options().unwrap_or_default());
        place.settings.options(options.as_str());
        let other = || error(ErrorKind::Misconfigured, OTHER_ISOLATION).in_doubt(false);
        match self.open(place).await {
            Ok((client, is_standby, true)) => {
                self.sets_isolation.store(true, Ordering::Relaxed);
                Ok((client, is_standby))
            }
            // Poolers refuse options, each in its words, or drop them.
            Ok((_, _, false)) => Err(other()),
            Err(fault) if ["startup parameter", "(0A000"].iter().any(|told| fault.message().contains(told)) => {
                Err(other().with_source(fault))
            }
            Err(fault) => Err(fault),
        }
    }

    /// A connection, whether its server is a standby, and whether a step sees what was committed while it waited.
    async fn open(&self, Place { settings, tls }: Place) -> Result<(Client, bool, bool)> {
        let opened = within(CONNECT_WITHIN, async move {
            let client = match tls {
                Tls::None => drive(settings.connect(NoTls).await.map_err(while_connecting)?),
                Tls::Verified(tls) => drive(settings.connect(tls).await.map_err(while_connecting)?),
            };
            let look = format!("SELECT pg_is_in_recovery(), {SEES_WHAT_IS_NEW}");
            let told = client.query_typed(&look, &[]).await.map_err(while_connecting)?;
            let is = |at| told.first().is_some_and(|row| row.try_get(at).unwrap_or(false));
            let (is_standby, sees) = (is(0), is(1));
            Ok((client, is_standby, sees))
        });
        let late =
            || Err(error(ErrorKind::Unavailable, format!("cannot connect: no answer within {CONNECT_WITHIN:?}")));
        opened.await.unwrap_or_else(late)
    }
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

enum Connected {
    Own(Client),
    Users(Box<dyn Borrowed>),
}

impl Connected {
    fn client(&self) -> &Client {
        match self {
            Self::Own(client) => client,
            Self::Users(connection) => connection.client(),
        }
    }

    /// Once all that was asked on it is answered. The user's pool looks after its own.
    fn give_back(self, pool: &Pool) {
        if let Self::Own(client) = self
            && !client.is_closed()
        {
            lock(&pool.idle).push(client);
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
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let Some(connection) = self.connection.take() else { return };
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
