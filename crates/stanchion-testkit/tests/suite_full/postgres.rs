//! Runs the suite on every supported version of PostgreSQL and over every kind of connection.

use std::sync::OnceLock;

use stanchion::store::{Postgres, Prefixed, Store as _};
use stanchion::{Key, TokenId};
use stanchion_testkit::servers::{PgBouncer, Postgres as Kind, PostgresServer};
use stanchion_testkit::{Environment, conformance};
use tokio_util::sync::CancellationToken;

use crate::environments::{ROOM, postgres_15, postgres_at as fresh, schema_of};

conformance!(direct direct, postgres_15);

fn postgres_18() -> Environment<Postgres> {
    static SERVER: OnceLock<PostgresServer> = OnceLock::new();
    let server = SERVER.get_or_init(|| PostgresServer::with(Kind::V18, ROOM));
    fresh(server, &server.url())
}
conformance!(dynamic postgres_18, postgres_18);

fn in_a_prefix() -> Environment<Prefixed<Postgres>> {
    postgres_15().prefixed()
}
conformance!(dynamic prefixed, in_a_prefix);

/// Connects over verified TLS as a user with only the documented rights.
fn with_few_rights_over_tls() -> Environment<Postgres> {
    static SERVER: OnceLock<PostgresServer> = OnceLock::new();
    let server = SERVER.get_or_init(|| {
        let server = PostgresServer::with_tls(Kind::V15);
        server.psql("CREATE ROLE locker LOGIN");
        server
    });
    let url = format!(
        "postgres://locker@localhost:{}/postgres?sslmode=verify-full&ca_file={}&schema={}",
        server.port(),
        server.ca_file().display(),
        schema_of(server),
    );
    let schema = url.rsplit_once('=').unwrap().1;
    let rights = include_str!("../../../stanchion/src/store/postgres/rights.sql");
    server.psql(&rights.replace("@schema@", schema).replace("@role@", "locker"));
    Environment::new(move || Postgres::from_url(&url).unwrap())
}
conformance!(dynamic tls_and_least_rights, with_few_rights_over_tls);

/// Runs operations on a pool and in a runtime that the user provides.
fn with_users_pool() -> Environment<Postgres> {
    static SERVER: OnceLock<PostgresServer> = OnceLock::new();
    let server = SERVER.get_or_init(|| PostgresServer::with(Kind::V15, ROOM));
    let url = format!("{}?schema={}", server.url(), schema_of(server));
    let settings: tokio_postgres::Config = server.url().parse().unwrap();
    static RUNTIME: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    let runtime = RUNTIME
        .get_or_init(|| tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap());
    Environment::new(move || {
        let _entered = runtime.enter();
        let manager = deadpool_postgres::Manager::new(settings.clone(), tokio_postgres::NoTls);
        let pool = deadpool_postgres::Pool::builder(manager).max_size(4).build().unwrap();
        let get = move || {
            let pool = pool.clone();
            async move { pool.get().await }
        };
        Postgres::from_pool(&url, get, |connection| connection).unwrap()
    })
}
conformance!(dynamic users_pool, with_users_pool);

/// Keeps the store busy with other tasks of the process, so that nearly every operation is sent in a batch.
fn in_a_crowd() -> Environment<Postgres> {
    static SERVER: OnceLock<PostgresServer> = OnceLock::new();
    static RUNTIME: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    let server = SERVER.get_or_init(|| PostgresServer::with(Kind::V15, ROOM));
    let runtime = RUNTIME.get_or_init(|| tokio::runtime::Builder::new_current_thread().build().unwrap());
    static THREAD: OnceLock<std::thread::JoinHandle<()>> = OnceLock::new();
    THREAD.get_or_init(|| std::thread::spawn(|| runtime.block_on(std::future::pending())));
    let url = format!("{}?schema={}", server.url(), schema_of(server));
    let case = CancellationToken::new();
    let ends = case.clone().drop_guard();
    Environment::new(move || {
        let store = Postgres::from_url(&url).unwrap();
        for number in 0..6 {
            let (store, case) = (store.clone(), case.clone());
            // These keys are never locked, so no case sees them.
            let key = Key::new("crowd", &number.to_string()).unwrap();
            runtime.spawn(case.run_until_cancelled_owned(async move {
                loop {
                    let _ = store.abandon(&key, TokenId::random().unwrap()).await; // only makes load
                }
            }));
        }
        store
    })
    .keeping(ends)
}
conformance!(dynamic crowd, in_a_crowd);

/// Returns a server behind a transaction pooler.
fn pooled() -> &'static (PostgresServer, PgBouncer) {
    static SERVERS: OnceLock<(PostgresServer, PgBouncer)> = OnceLock::new();
    SERVERS.get_or_init(|| {
        let server = PostgresServer::with(Kind::V15, ROOM);
        let pooler = PgBouncer::with(&server, &[("max_client_conn", "1000"), ("default_pool_size", "50")]);
        (server, pooler)
    })
}

/// Connects through the pooler, without pushes.
fn through_a_pooler() -> Environment<Postgres> {
    let (server, pooler) = pooled();
    fresh(server, &format!("{}?listen=none", pooler.url()))
}
conformance!(dynamic pooler, through_a_pooler);

/// Connects through the pooler, and to the server itself for pushes.
fn through_a_pooler_with_pushes() -> Environment<Postgres> {
    let (server, pooler) = pooled();
    let listen = server.url().replace(':', "%3A").replace('/', "%2F").replace('@', "%40");
    fresh(server, &format!("{}?listen={listen}", pooler.url()))
}
conformance!(dynamic pooler_with_pushes, through_a_pooler_with_pushes);
