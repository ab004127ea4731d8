//! PostgreSQL: locks where the data already is.
//!
//! Each step is a function in the database (`schema.sql`), and one round trip. What is here turns requests into calls,
//! and answers into outcomes.

mod borrowed;
mod check;
mod config;
mod connect;
mod error;
mod listen;
mod rows;
mod server;
mod together;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Row, Transaction};

use self::borrowed::UsersPool;
use self::config::Config;
use self::connect::{Parameter, Pool, lock, within};
use self::error::{NAME, error, from_answer, malformed};
use self::rows::{column, granted, in_use, listing, micros, not_after, number, parameters, span, time, whole_fence};
use self::together::{Operation, Together};
use crate::clock::{BootTime, Clock, jitter};
use crate::error::{ErrorKind, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::store::streams::Streams;
use crate::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, Capabilities, Cursor, EndOutcome, ExtendOutcome,
    ForceReleaseOutcome, ForceReleaseRequest, GrantStream, KeyState, Listing, LostToken, OpenOutcome, OpenSession,
    PollOutcome, Queued, RenewOutcome, Reply, Store,
};
use crate::token::{SessionId, TokenId};

/// The schema, with `@schema@` for its name and `@foreign@` for what follows.
const SCHEMA: &str = include_str!("schema.sql");

/// Lists what makes a schema unsafe to use.
const FOREIGN: &str = include_str!("foreign.sql");

/// Housekeeping is done with a beat, not more often than this.
const TIDY_EVERY: Duration = Duration::from_secs(10);

/// A session is opened while its first attempt to listen goes on, if that takes longer.
const TRIED_WITHIN: Duration = Duration::from_millis(500);

/// Maximum number of keys on one page of a listing.
const MAX_KEYS_PER_PAGE: usize = 10_000;

/// How often a waiter asks where no push comes.
const PACE_WITHOUT_PUSH: Duration = Duration::from_millis(50);

/// Locks in a PostgreSQL database, version 15 or later.
///
/// The tables and functions are in a schema of their own, which is made before:
/// `stanchion schema --store URL --apply`, or [`create_schema`](Self::create_schema).
///
/// # URL
/// `postgres://user:password@host:5432/database`, with these options and those of the client (`host`, `port`, `user`,
/// `password`, `dbname`, …). Several hosts, `one:5432,two:5432`, are a primary and its standbys: they are tried in order, each
/// for its part of three seconds, until one is the primary.
///
/// | option | |
/// |---|---|
/// | `schema` | the schema's name; `stanchion` |
/// | `pool` | the most connections for steps on keys; 16. One more keeps the session, one listens for pushes |
/// | `listen` | the URL (percent-encoded) of the server itself, where `host` is a transaction pooler; `none`: no pushes |
/// | `sslmode` | `disable` or `verify-full`; by default encrypted and verified, but for sockets and this very machine |
/// | `ca_file`, `cert_file`, `key_file` | PEM files: the authority, a client's certificate and its key |
/// | `create_schema` | `true`: the schema is made if it is not there |
///
/// # Behind a pooler
/// Every step works through a transaction pooler. Pushes do not: that is noticed, told as a warning, and waiting calls
/// ask every 50 ms. With `listen` they come as without a pooler.
///
/// # Isolation
/// Steps are done in `read committed` alone. The store's own connections see to that; behind a pooler, and in a pool of yours,
/// it must be the default of the role, which it is unless you changed it:
/// `ALTER ROLE … SET default_transaction_isolation = 'read committed'`. Your own transactions may call `check_fence` in any.
///
/// # Rights
/// Let a role of its own own the schema, which is no superuser: the functions run with its rights. To apply the schema it
/// needs `CREATE` on the database, and later nothing more.
/// ```sql
/// CREATE ROLE stanchion_owner LOGIN;
/// GRANT CREATE ON DATABASE app TO stanchion_owner;
/// ```
/// A service needs no right to a table. After the schema was applied, its owner gives the role of the service these:
/// ```sql
#[doc = include_str!("rights.sql")]
/// ```
/// With these rights a service can use every key of the schema, force-release included, but it cannot write what others could
/// not read: the functions check the limits too. Services that do not trust each other need a schema each.
///
/// The store refuses a schema, as misconfigured, if a part of it does not belong to its owner, if others may create in it or
/// add triggers to its tables, or if its tables have triggers, rules or policies: such code would run within the operations. A
/// role that may create in the database can make the schema first. Applying it tells that, and a service cannot tell it: apply
/// the schema before the services have its name.
///
/// A role that may connect can take any advisory lock. The numbers that the store uses are made with a secret of the schema,
/// so that nobody can block a key by its name. What remains: the numbers in use are shown in `pg_locks`, and a role that takes
/// the number of a key blocks it, as long as its transaction or session lasts; calls for the key fail then with
/// `Unavailable` after 5 s each. The owner changes all numbers with
/// `UPDATE stanchion.meta SET secret = uuid_send(gen_random_uuid())`. Give `CONNECT` only to roles that you trust that far.
///
/// # In your own transactions
/// `stanchion.check_fence(key, fence)` goes on only while the hold with this fence is live, and keeps the key from being
/// given to anybody else until your transaction has ended: the write that comes after it is the write of the holder.
/// Otherwise the SQLSTATE is `SF001`, and the transaction is over. A namespace is its third argument.
/// ```sql
/// BEGIN;
/// SELECT stanchion.check_fence('report', 1764000000000000);
/// UPDATE reports SET status = 'sent' WHERE day = current_date;
/// COMMIT;
/// ```
/// Who wants the key meanwhile is told after five seconds at most that the store is unavailable, and tries again.
///
/// # What it does not do
/// A commit that the server answers and then loses (`synchronous_commit=off` and a crash, an asynchronous standby that is
/// promoted) loses a grant. The next fence is higher all the same, as long as the clocks of the two servers differ by less
/// than the time between.
#[derive(Clone, Debug)]
pub struct Postgres {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    pool: Arc<Pool>,
    together: Mutex<Together>,
    creates_schema: AtomicBool,
    is_checked: tokio::sync::Mutex<bool>,
    streams: Streams,
    /// Pushes do not come.
    is_deaf: Arc<AtomicBool>,
    tidied: Mutex<BootTime>,
    clock: Clock,
}

impl Postgres {
    /// A store at this URL. Nothing is connected yet.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) if the URL is malformed.
    pub fn from_url(url: &str) -> Result<Self> {
        Ok(Self::new(Config::from_url(url)?, None))
    }

    /// A store whose steps on keys use connections of your pool, `pool` of them at most (an option of the URL; 16).
    ///
    /// What keeps the session uses a connection of its own to the URL, and so do pushes: a waiting call has none of your
    /// connections, and work of yours that has all of them ends no session. A step is one statement; a connection is given
    /// back when it was answered.
    ///
    /// `get` takes a connection from the pool, and `client` tells where its client is (`tokio-postgres` 0.7). Both serve
    /// `deadpool-postgres`, `bb8-postgres` and the like:
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
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) if the URL is malformed, or outside of a runtime.
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
            together: Mutex::default(),
            is_checked: tokio::sync::Mutex::new(false),
            streams: Streams::default(),
            is_deaf: Arc::new(AtomicBool::new(false)),
            tidied: Mutex::new(BootTime::from_nanos(0)),
            clock: Clock::system(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Makes the schema when a handle is opened, if it is not there. Off by default: the right to create is not one that a
    /// service should have.
    #[must_use]
    pub fn create_schema(self, create: bool) -> Self {
        self.inner.creates_schema.store(create, Ordering::Relaxed);
        self
    }

    /// Returns the SQL that makes the schema. Idempotent.
    pub fn schema_sql(&self) -> String {
        self.inner.schema_sql()
    }

    /// Runs [`schema_sql`](Self::schema_sql) in a database that can keep locks, and returns warnings: settings of the server
    /// that may lose some. Several processes may apply it at the same time.
    ///
    /// The role that applies the schema owns it. A schema or a part of it that another role made is refused, because its code
    /// would run with the rights of the role that applies.
    ///
    /// # Errors
    /// - [`ErrorKind::Unauthorized`](crate::ErrorKind::Unauthorized) without the right to create.
    /// - [`ErrorKind::Misconfigured`](crate::ErrorKind::Misconfigured) if a newer version or something foreign is there, or
    ///   if the database would be refused when a handle is opened.
    /// - [`ErrorKind::Unavailable`](crate::ErrorKind::Unavailable) if the server cannot be reached.
    ///
    /// # Cancel safety
    /// The script is one transaction. If this future is dropped, the transaction is done or it is not.
    pub async fn apply_schema(&self) -> Result<Vec<String>> {
        self.inner.apply().await
    }

    /// Goes on only while the hold of `key` with this fence is live, and keeps the key from being given to anybody else
    /// until your transaction has ended: what it writes, the holder writes. Keep the transaction short.
    ///
    /// The transaction is of `tokio-postgres` 0.7, in the database that the schema is in. Others call the function in SQL.
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
    /// [`ErrorKind::Lost`](crate::ErrorKind::Lost) if the hold is over, or those of a step. The transaction can only be
    /// rolled back then.
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

    /// The rows of a function of the schema.
    async fn rows(&self, function: &str, parameters: &[Parameter<'_>]) -> Result<Vec<Row>> {
        self.pool.ask(&self.call(function, parameters.len()), parameters).await
    }

    /// The same for one that looks.
    async fn looked(&self, function: &str, parameters: Vec<(Box<dyn ToSql + Sync + Send>, Type)>) -> Result<Vec<Row>> {
        self.pool.look(self.call(function, parameters.len()), parameters).await
    }

    /// The same for a step of a session.
    async fn session_rows(&self, function: &str, parameters: &[Parameter<'_>]) -> Result<Vec<Row>> {
        self.pool.ask_for_session(&self.call(function, parameters.len()), parameters).await
    }

    fn call(&self, function: &str, parameters: usize) -> String {
        let places: Vec<_> = (1..=parameters).map(|place| format!("${place}")).collect();
        format!("SELECT * FROM {}.{function}({})", self.pool.config.schema, places.join(","))
    }

    /// The one row of a step.
    async fn step(&self, function: &str, parameters: &[Parameter<'_>]) -> Result<Row> {
        self.rows(function, parameters).await?.into_iter().next().ok_or_else(malformed)
    }

    fn queued(&self, row: &Row) -> Result<Queued> {
        Ok(Queued { ahead: number(row)?, check_in: self.check_in(row)?, in_use: in_use(row)? })
    }

    /// When to ask again.
    fn check_in(&self, row: &Row) -> Result<Option<Duration>> {
        let told = column::<Option<i64>>(row, "check_in")?.map(span);
        let own = self.is_deaf.load(Ordering::Relaxed).then(|| jitter(PACE_WITHOUT_PUSH));
        Ok(told.into_iter().chain(own).min())
    }

    async fn listen(&self, session: SessionId) -> Result<()> {
        if self.pool.config.listen.is_none() {
            return Ok(());
        }
        if let Some(pushes) = self.streams.unfilled(session) {
            let (task, tried) = listen::start(&self.pool, session, pushes, self.is_deaf.clone())?;
            // Before anything is waited for: who gives up there leaves no task that nobody ends.
            self.streams.fill(session, task);
            let _tried_or_late = within(TRIED_WITHIN, tried).await;
        }
        Ok(())
    }

    /// Housekeeping now and then. Nobody waits for it, and what fails is done another time.
    fn tidy(self: &Arc<Self>) {
        let now = self.clock.now();
        {
            let mut tidied = lock(&self.tidied);
            if now.since(*tidied) < TIDY_EVERY {
                return;
            }
            *tidied = now;
        }
        if let Ok(runtime) = self.pool.runtime() {
            let inner = self.clone();
            runtime.spawn(async move { drop(inner.rows("tidy", &[]).await) });
        }
    }

    async fn end(self: &Arc<Self>, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<Reply<EndOutcome>> {
        let row = together::step(self, Operation::Finish { key: key.clone(), token, cooldown }).await?;
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
        let mut can = Capabilities::new(NAME);
        can.push = self.inner.pool.config.listen.is_some();
        can
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
        // First: whether it is answered or not, nobody hears this session any more.
        self.inner.streams.end(session);
        let id = session.as_bytes().as_slice();
        let rows = self.inner.session_rows("close_session", parameters![id => BYTEA]).await?;
        Ok(Reply { time: time(rows.first().ok_or_else(malformed)?)?, outcome: () })
    }

    async fn session_lives(&self, session: SessionId) -> Result<Reply<bool>> {
        // Of any session, by as many as like: not where the own one is kept.
        let rows =
            self.inner.looked("session_lives", vec![(Box::new(session.as_bytes().to_vec()), Type::BYTEA)]).await?;
        let row = rows.first().ok_or_else(malformed)?;
        Ok(Reply { time: time(row)?, outcome: column(row, "alive")? })
    }

    async fn acquire(&self, request: AcquireRequest) -> Result<Reply<AcquireOutcome>> {
        let row = together::step(&self.inner, Operation::Acquire(request)).await?;
        let outcome = match column(&row, "outcome")? {
            "granted" => AcquireOutcome::Granted(granted(&row)?),
            "queued" => AcquireOutcome::Queued(self.inner.queued(&row)?),
            "busy" => {
                let check_in = column::<Option<i64>>(&row, "check_in")?.map(span);
                AcquireOutcome::Busy { check_in, in_use: in_use(&row)? }
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
        let asked: Vec<Vec<u8>> = tokens.iter().map(|token| token.as_bytes().to_vec()).collect();
        let parameters = vec![text(key.as_encoded()), (Box::new(asked) as _, Type::BYTEA_ARRAY)];
        let rows = self.inner.looked("poll_many", parameters).await?;
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
        let row = self.inner.step("extend", parameters).await?;
        let outcome = match column(&row, "outcome")? {
            "extended" => ExtendOutcome::Extended,
            "not_held" => ExtendOutcome::NotHeld,
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
        let row = self.inner.step("adopt", parameters).await?;
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
        let row = self.inner.step("force_release", parameters).await?;
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
        let rows = self.inner.looked("inspect", vec![text(key.as_encoded())]).await?;
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
        let mut page = listing(&self.inner.looked("list_page", parameters).await?)?;
        let is_used =
            |state: &KeyState| !(state.holders.is_empty() && state.waiters.is_empty() && state.closed_for.is_none());
        page.outcome.keys.retain(is_used);
        Ok(page)
    }

    fn grants(&self, session: SessionId) -> GrantStream {
        self.inner.streams.begin(session)
    }
}
