//! Stores locks in a PostgreSQL database, next to the data of the application.
//!
//! Each operation is a function in the database (`schema.sql`), and costs one round trip. This module turns requests
//! into calls of these functions, and their answers into outcomes.

mod batch;
mod borrowed;
mod check;
mod config;
mod connect;
mod error;
mod push;
mod rows;
mod server;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Row, Transaction};

use self::batch::{CallQueues, KeyCall};
use self::borrowed::UsersPool;
use self::config::Config;
use self::connect::{Parameter, Pool};
use self::error::{NAME, error, from_answer, malformed};
use self::rows::{
    column, fence, granted, in_use, listing, micros, not_after, number, parameters, span, time, whole_fence,
};
use crate::clock::{BootTime, Clock, jitter};
use crate::error::{ErrorKind, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::store::backoff::within;
use crate::store::streams::Streams;
use crate::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, Capabilities, Cursor, EndOutcome, ExtendOutcome,
    ForceReleaseOutcome, ForceReleaseRequest, GrantStream, KeyState, LingerOutcome, Listing, LostToken, OpenOutcome,
    OpenSession, PollOutcome, Queued, RenewOutcome, Reply, Store,
};
use crate::sync::lock;
use crate::token::{SessionId, TokenId};

/// The script that creates the schema, with placeholders: `@schema@` for the name, and `@foreign@` for [`FOREIGN`].
const SCHEMA: &str = include_str!("schema.sql");

/// A query that lists the parts that make a schema unsafe to use.
const FOREIGN: &str = include_str!("foreign.sql");

/// Minimum interval between two rounds of housekeeping. A renewal of the session starts a round.
const TIDY_INTERVAL: Duration = Duration::from_secs(10);

/// Maximum time that the opening of a session waits for the first attempt to listen.
const MAX_LISTEN_WAIT: Duration = Duration::from_millis(500);

/// Maximum number of keys on one page of a listing.
const MAX_KEYS_PER_PAGE: usize = 10_000;

/// Interval between two polls of a waiter while no pushes arrive.
const POLL_INTERVAL_WITHOUT_PUSH: Duration = Duration::from_millis(50);

/// Locks in a PostgreSQL database, version 15 or later.
///
/// The tables and functions are in a schema of their own. Create the schema first, with
/// `STANCHION_STORE=URL stanchion schema --apply`, or let the store create it: [`create_schema`](Self::create_schema).
///
/// # URL
/// `postgres://user:password@host:5432/database`, with these options and those of the client (`host`, `port`, `user`,
/// `password`, `dbname`, …). Several hosts, `one:5432,two:5432`, are a primary and its standbys. The store tries them
/// in order until one is the primary, and gives each an equal part of three seconds.
///
/// | option | |
/// |---|---|
/// | `schema` | the name of the schema; `stanchion` by default |
/// | `pool` | the maximum number of connections for operations on keys; 16 by default |
/// | `listen` | the URL of the server itself (percent-encoded), if `host` is a transaction pooler; `none` for no pushes |
/// | `sslmode` | `disable` or `verify-full`; by default `verify-full`, except to localhost and Unix sockets |
/// | `ca_file`, `cert_file`, `key_file` | PEM files: the authorities, the certificate of this client and its key |
/// | `create_schema` | `true` to create a missing schema; `false` by default |
///
/// Beyond `pool`, one connection renews the session and one receives pushes.
///
/// # Behind a pooler
/// Every operation works through a transaction pooler, but pushes do not arrive. The store notices that and reports a
/// warning, and waiting calls poll every 50 ms. With the option `listen` pushes arrive as without a pooler.
///
/// # Isolation
/// Operations need the isolation level `read committed`. The store sets it on its own connections. Behind a pooler, and
/// in a pool of yours, it must be the default of the role, which it is unless you changed it:
/// ```sql
/// ALTER ROLE app SET default_transaction_isolation = 'read committed';
/// ```
/// Your own transactions may call `check_fence` at any level.
///
/// # Rights
/// Create a separate role, not a superuser, to own the schema, because the functions run with the owner's rights. To
/// apply the schema the role needs `CREATE` on the database, and later nothing more.
/// ```sql
/// CREATE ROLE stanchion_owner LOGIN;
/// GRANT CREATE ON DATABASE app TO stanchion_owner;
/// ```
/// A service needs no right to a table. After the owner has applied the schema, it grants the role of the service these
/// rights:
/// ```sql
#[doc = include_str!("rights.sql")]
/// ```
/// With these rights a service can use every key of the schema and force-release any hold. The functions check the
/// limits too, so a service cannot write values that others could not read. Services that do not trust each other need
/// separate schemas.
///
/// The store rejects a schema as misconfigured in these cases, because foreign code could run within the operations:
/// - A part of the schema does not belong to the owner of the schema.
/// - Another role may create in the schema, or add triggers to its tables.
/// - A table of the schema has a trigger, a rule or a policy.
///
/// A role that may create in the database can create a schema of this name first. The owner notices that when it
/// applies the schema, but a service cannot notice it: apply the schema before you give its name to the services.
///
/// Any role that may connect can take any advisory lock. The store computes the numbers of its locks with a secret of
/// the schema, so nobody can block a key by its name. One risk remains: `pg_locks` shows the numbers in use, and a role
/// that takes the number of a key blocks the key until its transaction or session ends. Each call for the key then
/// fails with `Unavailable` after 5 s. Grant `CONNECT` only to roles that you trust this far. The owner can change all
/// numbers:
/// ```sql
/// UPDATE stanchion.meta SET secret = uuid_send(gen_random_uuid());
/// ```
///
/// # In your own transactions
/// `stanchion.check_fence(key, fence)` succeeds only while the hold with this fence is live, and nobody else gets the
/// key until your transaction has ended. A write that follows in the transaction is therefore a write of the holder. If
/// the hold is over, the function raises SQLSTATE `SF001`, and the transaction fails. The namespace is the third
/// argument.
/// ```sql
/// BEGIN;
/// SELECT stanchion.check_fence('report', 1764000000000000);
/// UPDATE reports SET status = 'sent' WHERE day = current_date;
/// COMMIT;
/// ```
/// During the transaction, a call of another client for the key fails with `Unavailable` after at most 5 s, and the
/// client tries again.
///
/// A process whose hold lingers hands the key from task to task without the server, each time with a higher fence. Check
/// the fence first in every transaction then. The check of a task waits until the transactions of earlier tasks have
/// ended, and from then on their checks fail.
///
/// # Limits
/// A server that confirms a commit and then loses it, loses a grant: after a crash with `synchronous_commit=off`, or
/// after a failover to an asynchronous standby. The next fence is higher all the same, if the clocks of the two servers
/// differ by less than the time between the two grants.
#[derive(Clone, Debug)]
pub struct Postgres {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    pool: Arc<Pool>,
    calls: Mutex<CallQueues>,
    creates_schema: AtomicBool,
    is_checked: tokio::sync::Mutex<bool>,
    streams: Streams,
    /// Whether notifications do not arrive, so that waiters have to poll often.
    notifications_down: Arc<AtomicBool>,
    tidied_at: Mutex<BootTime>,
    clock: Clock,
}

impl Postgres {
    /// Returns a store at this URL. It does not connect yet.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) if the URL is malformed.
    pub fn from_url(url: &str) -> Result<Self> {
        Ok(Self::new(Config::from_url(url)?, None))
    }

    /// Returns a store whose operations on keys use connections of your pool, at most `pool` of them (an option of the
    /// URL; 16 by default).
    ///
    /// The session and the pushes use separate connections to the URL. A waiting call therefore occupies none of your
    /// connections, and no session ends because your work uses all of them. An operation is one statement, and returns
    /// its connection when the server has answered.
    ///
    /// `get` takes a connection from the pool, and `client` returns the client in the connection (`tokio-postgres`
    /// 0.7). This suits `deadpool-postgres`, `bb8-postgres` and similar pools:
    /// ```
    /// # struct Object(tokio_postgres::Client);
    /// # impl std::ops::Deref for Object { type Target = tokio_postgres::Client; fn deref(&self) -> &Self::Target { &self.0 } }
    /// # #[derive(Clone)] struct Pool;
    /// # impl Pool { async fn get(&self) -> Result<Object, std::io::Error> { Err(std::io::Error::other("none")) } }
    /// use stanchion::Locks;
    /// use stanchion::store::Postgres;
    ///
    /// async fn locks(pool: Pool) -> stanchion::Result<Locks> {
    ///     let get = move || {
    ///         let pool = pool.clone();
    ///         async move { pool.get().await }
    ///     };
    ///     let store = Postgres::from_pool("postgres://db.example/app", get, |connection| connection)?;
    ///     Locks::with_store(store).await
    /// }
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) if the URL is malformed, or outside of a Tokio
    /// runtime.
    pub fn from_pool<C, E, F>(
        url: &str,
        get: impl Fn() -> F + Send + Sync + 'static,
        client: impl for<'a> Fn(&'a C) -> &'a tokio_postgres::Client + Send + Sync + 'static,
    ) -> Result<Self>
    where
        C: Send + Sync + 'static,
        E: std::fmt::Display,
        F: Future<Output = std::result::Result<C, E>> + Send + 'static,
    {
        Ok(Self::new(Config::from_url(url)?, Some(UsersPool::new(get, client)?)))
    }

    fn new(config: Config, users: Option<UsersPool>) -> Self {
        let inner = Inner {
            creates_schema: AtomicBool::new(config.create_schema),
            pool: Arc::new(Pool::new(config, users)),
            calls: Mutex::default(),
            is_checked: tokio::sync::Mutex::new(false),
            streams: Streams::default(),
            notifications_down: Arc::new(AtomicBool::new(false)),
            tidied_at: Mutex::new(BootTime::from_nanos(0)),
            clock: Clock::system(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Sets whether a missing schema is created when a handle is opened. Off by default, because a service should not
    /// have the right to create.
    #[must_use]
    pub fn create_schema(self, create: bool) -> Self {
        self.inner.creates_schema.store(create, Ordering::Relaxed);
        self
    }

    /// Returns the product and the version of the server, such as `PostgreSQL 17.2`, for people. Needs no schema.
    ///
    /// # Errors
    /// The errors of a request.
    ///
    /// # Cancel safety
    /// Only reads.
    pub async fn server(&self) -> Result<String> {
        self.inner.server().await
    }

    /// Returns the SQL that creates the schema, or upgrades it. Applying it again changes nothing.
    pub fn schema_sql(&self) -> String {
        self.inner.schema_sql()
    }

    /// Runs [`schema_sql`](Self::schema_sql) if the database can store locks, and returns warnings about settings of
    /// the server that may lose locks. Several processes may apply the schema at the same time.
    ///
    /// The role that applies the schema owns it. A schema that another role created, as a whole or in part, is
    /// rejected, because its code would run with the rights of the applying role.
    ///
    /// # Errors
    /// - [`ErrorKind::Unauthorized`](crate::ErrorKind::Unauthorized) without the right to create.
    /// - [`ErrorKind::Misconfigured`](crate::ErrorKind::Misconfigured) if the database has a newer version of the
    ///   schema, a schema with foreign parts, or a setting that prevents storing locks.
    /// - [`ErrorKind::Unavailable`](crate::ErrorKind::Unavailable) if the server cannot be reached.
    ///
    /// # Cancel safety
    /// The script is one transaction. If this future is dropped, the transaction has either taken effect as a whole or
    /// not at all.
    pub async fn apply_schema(&self) -> Result<Vec<String>> {
        self.inner.apply().await
    }

    /// Checks in your transaction that the hold of `key` with this fence is live.
    ///
    /// If the check succeeds, nobody else gets the key until your transaction has ended, so its later writes are writes
    /// of the holder. Keep the transaction short, because other clients that want the key wait for it.
    ///
    /// The transaction must be one of `tokio-postgres` 0.7, in the database of the schema. From other clients, call the
    /// SQL function.
    /// ```no_run
    /// # async fn write(store: stanchion::store::Postgres, guard: stanchion::Guard, mut client: tokio_postgres::Client)
    /// #     -> Result<(), Box<dyn std::error::Error>> {
    /// let transaction = client.transaction().await?;
    /// store.check_fence(&transaction, guard.key(), guard.fence()).await?;
    /// transaction.execute("UPDATE reports SET status = 'sent' WHERE day = current_date", &[]).await?;
    /// transaction.commit().await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::Lost`](crate::ErrorKind::Lost) if the hold is over, or an error of the database. The transaction can
    /// then only be rolled back.
    pub async fn check_fence(&self, transaction: &Transaction<'_>, key: &Key, fence: Fence) -> Result<()> {
        let statement = format!("SELECT {}.check_fence($1,$2,$3)", self.inner.pool.config.schema);
        let fence = whole_fence(fence);
        let parameters = parameters![key.name() => TEXT, fence => INT8, key.namespace() => TEXT];
        transaction
            .query_typed(&statement, parameters)
            .await
            .map(drop)
            .map_err(from_answer)
            .map_err(|fault| fault.with_key(key))
    }
}

impl Inner {
    fn schema_sql(&self) -> String {
        SCHEMA.replace("@foreign@", FOREIGN).replace("@schema@", &self.pool.config.schema)
    }

    /// Calls a function of the schema, and returns its rows.
    async fn rows(&self, function: &str, parameters: &[Parameter<'_>]) -> Result<Vec<Row>> {
        self.pool.query(&self.statement(function, parameters.len()), parameters).await
    }

    /// Calls a function of the schema that only reads, and returns its rows.
    async fn read_rows(
        &self,
        function: &str,
        parameters: Vec<(Box<dyn ToSql + Sync + Send>, Type)>,
    ) -> Result<Vec<Row>> {
        self.pool.read(self.statement(function, parameters.len()), parameters).await
    }

    /// Calls a function of the schema that concerns the session, and returns its rows.
    async fn session_rows(&self, function: &str, parameters: &[Parameter<'_>]) -> Result<Vec<Row>> {
        self.pool.query_session(&self.statement(function, parameters.len()), parameters).await
    }

    fn statement(&self, function: &str, parameters: usize) -> String {
        let places: Vec<_> = (1..=parameters).map(|place| format!("${place}")).collect();
        format!("SELECT * FROM {}.{function}({})", self.pool.config.schema, places.join(","))
    }

    /// Calls a function of the schema, and returns its first row.
    async fn row(&self, function: &str, parameters: &[Parameter<'_>]) -> Result<Row> {
        self.rows(function, parameters).await?.into_iter().next().ok_or_else(malformed)
    }

    fn queued(&self, row: &Row) -> Result<Queued> {
        Ok(Queued { ahead: number(row)?, check_in: self.check_in(row)?, in_use: in_use(row)? })
    }

    /// Returns the time after which a waiter polls again.
    fn check_in(&self, row: &Row) -> Result<Option<Duration>> {
        let needed = column::<Option<i64>>(row, "check_in")?.map(span);
        let without_push = self.notifications_down.load(Ordering::Relaxed).then(|| jitter(POLL_INTERVAL_WITHOUT_PUSH));
        Ok(needed.into_iter().chain(without_push).min())
    }

    /// Returns whether the sessions of this store receive pushes.
    fn receives_pushes(&self) -> bool {
        self.pool.config.listen.is_some() && !self.notifications_down.load(Ordering::Relaxed)
    }

    async fn listen(&self, session: SessionId) -> Result<()> {
        if self.pool.config.listen.is_none() {
            return Ok(());
        }
        let start = |pushes| push::start(&self.pool, session, pushes, self.notifications_down.clone());
        if let Some(tried) = self.streams.fill(session, start)? {
            let _ = within(MAX_LISTEN_WAIT, tried).await; // A late attempt continues in its task.
        }
        Ok(())
    }

    /// Starts a round of housekeeping if one is due. Errors are ignored because a later round does the same work.
    fn tidy(self: &Arc<Self>) {
        let now = self.clock.now();
        {
            let mut tidied_at = lock(&self.tidied_at);
            if now.since(*tidied_at) < TIDY_INTERVAL {
                return;
            }
            *tidied_at = now;
        }
        if let Ok(runtime) = self.pool.runtime() {
            let inner = self.clone();
            runtime.spawn(async move { drop(inner.rows("tidy", &[]).await) });
        }
    }

    async fn end(self: &Arc<Self>, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<Reply<EndOutcome>> {
        let row = batch::run(self, KeyCall::Finish { key: key.clone(), token, cooldown }).await?;
        let outcome = match column(&row, "outcome")? {
            "released" => EndOutcome::Released,
            "dequeued" => EndOutcome::Dequeued,
            "nothing" => EndOutcome::Nothing,
            _ => return Err(malformed()),
        };
        Ok(Reply { time: time(&row)?, outcome })
    }
}

fn text(text: &str) -> (Box<dyn ToSql + Sync + Send>, Type) {
    (Box::new(text.to_owned()), Type::TEXT)
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Store for Postgres {
    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::new(NAME);
        capabilities.push = self.inner.pool.config.listen.is_some();
        capabilities
    }

    async fn open_session(&self, request: OpenSession) -> Result<Reply<OpenOutcome>> {
        let inner = &self.inner;
        let OpenSession { session, ttl, owner } = request;
        inner.check(session).await?;
        inner.listen(session).await?;
        let id = session.as_bytes().as_slice();
        let parameters = parameters![id => BYTEA, micros(ttl) => INT8, owner => TEXT];
        let rows = inner.session_rows("open_session", parameters).await?;
        let row = rows.first().ok_or_else(malformed)?;
        let outcome = match column(row, "outcome")? {
            "opened" => OpenOutcome::Opened,
            "gone" => OpenOutcome::Gone,
            _ => return Err(malformed()),
        };
        Ok(Reply { time: time(row)?, outcome })
    }

    async fn renew_session(&self, session: SessionId) -> Result<Reply<RenewOutcome>> {
        let id = session.as_bytes().as_slice();
        let rows = self.inner.session_rows("renew_session", parameters![id => BYTEA]).await?;
        let (first, lost) = rows.split_first().ok_or_else(malformed)?;
        let time = time(first)?;
        if column::<&str>(first, "outcome")? == "gone" {
            return Ok(Reply { time, outcome: RenewOutcome::Gone });
        }
        let lost = lost.iter().map(|row| {
            let token: &[u8] = column(row, "token")?;
            let token = TokenId::from_bytes(token.try_into().map_err(|_| malformed())?);
            Ok(LostToken { key: Key::from_encoded(column(row, "key")?)?, token, reason: column(row, "reason")? })
        });
        let lost = lost.collect::<Result<_>>()?;
        self.inner.tidy();
        Ok(Reply { time, outcome: RenewOutcome::Alive { lost } })
    }

    async fn close_session(&self, session: SessionId) -> Result<Reply<()>> {
        // This comes first, so that the listener ends even if the request fails.
        self.inner.streams.end(session);
        let id = session.as_bytes().as_slice();
        let rows = self.inner.session_rows("close_session", parameters![id => BYTEA]).await?;
        Ok(Reply { time: time(rows.first().ok_or_else(malformed)?)?, outcome: () })
    }

    async fn session_lives(&self, session: SessionId) -> Result<Reply<bool>> {
        // Many callers may query any session, so this does not use the connection that renews the own session.
        let rows =
            self.inner.read_rows("session_lives", vec![(Box::new(session.as_bytes().to_vec()), Type::BYTEA)]).await?;
        let row = rows.first().ok_or_else(malformed)?;
        Ok(Reply { time: time(row)?, outcome: column(row, "alive")? })
    }

    async fn acquire(&self, request: AcquireRequest) -> Result<Reply<AcquireOutcome>> {
        let row = batch::run(&self.inner, KeyCall::Acquire(request)).await?;
        let outcome = match column(&row, "outcome")? {
            "granted" => AcquireOutcome::Granted(granted(&row)?),
            "queued" => AcquireOutcome::Queued(self.inner.queued(&row)?),
            "busy" => {
                let check_in = column::<Option<i64>>(&row, "check_in")?.map(span);
                // The number of a busy key is that of its holds that linger.
                AcquireOutcome::Busy { check_in, in_use: in_use(&row)?, lingers: number(&row)? > 0 }
            }
            "stale" => AcquireOutcome::Stale,
            "forced" => AcquireOutcome::ForceReleased,
            "session_gone" => AcquireOutcome::SessionGone,
            "full" => AcquireOutcome::QueueFull { limit: number(&row)? },
            _ => return Err(malformed()),
        };
        Ok(Reply { time: time(&row)?, outcome })
    }

    async fn poll(&self, key: &Key, tokens: &[TokenId]) -> Result<Reply<Vec<PollOutcome>>> {
        let polled: Vec<Vec<u8>> = tokens.iter().map(|token| token.as_bytes().to_vec()).collect();
        let parameters = vec![text(key.as_encoded()), (Box::new(polled) as _, Type::BYTEA_ARRAY)];
        let rows = self.inner.read_rows("poll_many", parameters).await?;
        let (first, rows) = rows.split_first().ok_or_else(malformed)?;
        if rows.len() != tokens.len() {
            return Err(malformed());
        }
        let (check_in, in_use) = (self.inner.check_in(first)?, in_use(first)?);
        let outcomes = rows.iter().map(|row| {
            if column::<Option<i64>>(row, "fence")?.is_some() {
                return Ok(PollOutcome::Granted(granted(row)?));
            }
            if column::<Option<i64>>(row, "number")?.is_some() {
                return Ok(PollOutcome::Queued(Queued { ahead: number(row)?, check_in, in_use }));
            }
            Ok(PollOutcome::Gone)
        });
        Ok(Reply { time: time(first)?, outcome: outcomes.collect::<Result<_>>()? })
    }

    async fn abandon(&self, key: &Key, token: TokenId) -> Result<Reply<EndOutcome>> {
        self.inner.end(key, token, None).await
    }

    async fn release(&self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<Reply<EndOutcome>> {
        self.inner.end(key, token, cooldown).await
    }

    async fn extend(&self, key: &Key, token: TokenId, ttl: Duration) -> Result<Reply<ExtendOutcome>> {
        let token = token.as_bytes().as_slice();
        let parameters = parameters![key.as_encoded() => TEXT, token => BYTEA, micros(ttl) => INT8];
        let row = self.inner.row("extend", parameters).await?;
        let outcome = match column(&row, "outcome")? {
            "extended" => ExtendOutcome::Extended,
            "not_held" => ExtendOutcome::NotHeld,
            _ => return Err(malformed()),
        };
        Ok(Reply { time: time(&row)?, outcome })
    }

    async fn linger(&self, key: &Key, token: TokenId) -> Result<Reply<LingerOutcome>> {
        if !self.inner.receives_pushes() {
            // Nobody could recall the hold, so it stays as it is.
            let Reply { time, outcome } = self.poll(key, &[token]).await?;
            let is_held = matches!(outcome.first(), Some(PollOutcome::Granted(_)));
            return Ok(Reply { time, outcome: if is_held { LingerOutcome::Wanted } else { LingerOutcome::Gone } });
        }
        let token = token.as_bytes().as_slice();
        let row = self.inner.row("linger", parameters![key.as_encoded() => TEXT, token => BYTEA]).await?;
        let outcome = match column(&row, "outcome")? {
            "lingers" => LingerOutcome::Lingers { fence: fence(&row, "fence")?, up_to: fence(&row, "up_to")? },
            "wanted" => LingerOutcome::Wanted,
            "gone" => LingerOutcome::Gone,
            _ => return Err(malformed()),
        };
        Ok(Reply { time: time(&row)?, outcome })
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Reply<AdoptOutcome>> {
        let [from, to] = [&request.from, &request.to].map(|token| token.as_bytes().as_slice());
        let session = request.session.as_bytes().as_slice();
        let parameters = parameters![
            request.key.as_encoded() => TEXT,
            from => BYTEA,
            to => BYTEA,
            session => BYTEA,
            not_after(request.not_after) => INT8,
        ];
        let row = self.inner.row("adopt", parameters).await?;
        let outcome = match column(&row, "outcome")? {
            "adopted" => AdoptOutcome::Adopted { granted: granted(&row)?, session_bound: column(&row, "bound")? },
            "gone" => AdoptOutcome::Gone,
            "stale" => AdoptOutcome::Stale,
            "session_gone" => AdoptOutcome::SessionGone,
            _ => return Err(malformed()),
        };
        Ok(Reply { time: time(&row)?, outcome })
    }

    async fn force_release(&self, request: ForceReleaseRequest) -> Result<Reply<ForceReleaseOutcome>> {
        let fence = whole_fence(request.fence);
        let parameters = parameters![request.key.as_encoded() => TEXT, fence => INT8, request.reason => TEXT];
        let row = self.inner.row("force_release", parameters).await?;
        let outcome = match column(&row, "outcome")? {
            "evicted" => ForceReleaseOutcome::Released,
            "no_such_hold" => {
                let live = column::<Option<&str>>(&row, "live")?.unwrap_or_default().split_whitespace();
                let live = live.map(|fence| fence.parse().map(Fence::new).map_err(|_| malformed()));
                ForceReleaseOutcome::NoSuchHold { live: live.collect::<Result<_>>()? }
            }
            _ => return Err(malformed()),
        };
        Ok(Reply { time: time(&row)?, outcome })
    }

    async fn inspect(&self, key: &Key) -> Result<Reply<KeyState>> {
        let rows = self.inner.read_rows("inspect", vec![text(key.as_encoded())]).await?;
        let Reply { time, outcome: Listing { keys, damaged, .. } } = listing(&rows)?;
        if let Some(entry) = damaged.into_iter().next() {
            return Err(error(ErrorKind::Internal, entry.problem));
        }
        let nothing =
            KeyState { key: key.clone(), holders: Vec::new(), waiters: Vec::new(), last_fence: None, closed_for: None };
        Ok(Reply { time, outcome: keys.into_iter().next().unwrap_or(nothing) })
    }

    async fn list(&self, prefix: &str, cursor: Option<&Cursor>, limit: usize) -> Result<Reply<Listing>> {
        let after = cursor.map_or("", Cursor::as_str);
        let limit = i64::try_from(limit.clamp(1, MAX_KEYS_PER_PAGE)).unwrap_or(1);
        let parameters = vec![text(prefix), text(after), (Box::new(limit) as _, Type::INT8)];
        let mut page = listing(&self.inner.read_rows("list_page", parameters).await?)?;
        let is_used =
            |state: &KeyState| !(state.holders.is_empty() && state.waiters.is_empty() && state.closed_for.is_none());
        page.outcome.keys.retain(is_used);
        Ok(page)
    }

    fn grants(&self, session: SessionId) -> GrantStream {
        self.inner.streams.begin(session)
    }
}
