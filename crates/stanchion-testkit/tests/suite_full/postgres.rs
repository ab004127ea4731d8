//! PostgreSQL against the whole suite: every version that is supported, and every way to reach it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use stanchion::store::{Postgres, Prefixed, Store as _};
use stanchion::{Key, TokenId};
use stanchion_testkit::servers::{PgBouncer, Postgres as Kind, PostgresServer};
use stanchion_testkit::{Environment, conformance};
use tokio_util::sync::CancellationToken;

/// Fresh data on servers that all cases share: a schema of its own.
fn fresh(server: &PostgresServer, url: &str) -> Environment<Postgres> {
    let url = format!("{url}{}schema={}", if url.contains('?') { '&' } else { '?' }, schema_of(server));
    Environment::new(move || Postgres::from_url(&url).unwrap())
}

/// The name of a new one.
fn schema_of(server: &PostgresServer) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let schema = format!("s{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let store = Postgres::from_url(&format!("postgres://localhost?schema={schema}")).unwrap();
    server.psql(&store.schema_sql());
    schema
}

/// Many handles at once, each with connections of its own.
const ROOM: &[(&str, &str)] = &[("max_connections", "500")];

macro_rules! versions {
    ($($name:ident $kind:ident),* $(,)?) => { $(
        fn $name() -> Environment<Postgres> {
            static SERVER: OnceLock<PostgresServer> = OnceLock::new();
            let server = SERVER.get_or_init(|| PostgresServer::with(Kind::$kind, ROOM));
            fresh(server, &server.url())
        }
        mod $name {
            use super::*;
            conformance!(suite, super::$name);
        }
    )* };
}

versions! { postgres_15 V15, postgres_18 V18 }

fn in_a_prefix() -> Environment<Prefixed<Postgres>> {
    postgres_15().prefixed()
}
conformance!(prefixed, in_a_prefix);

/// With certificates that are verified, and as a user that has no more rights than the documentation says.
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
    let rights = include_str!("../../stanchion/src/store/postgres/rights.sql");
    server.psql(&rights.replace("@schema@", schema).replace("@role@", "locker"));
    Environment::new(move || Postgres::from_url(&url).unwrap())
}
conformance!(tls_and_least_rights, with_few_rights_over_tls);

/// Steps use a pool of the user's, in a runtime of the user's.
fn with_a_pool_of_the_users() -> Environment<Postgres> {
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
conformance!(users_pool, with_a_pool_of_the_users);

/// Other tasks of the process keep the store busy, so that nearly every step goes with others.
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
        for one in 0..6 {
            let (store, case) = (store.clone(), case.clone());
            // Nobody has this key, nobody sees it, and the crowd does not press.
            let key = Key::new("crowd", &one.to_string()).unwrap();
            runtime.spawn(case.run_until_cancelled_owned(async move {
                loop {
                    let _nothing = store.abandon(&key, TokenId::random().unwrap()).await;
                }
            }));
        }
        store
    })
    .keeping(ends)
}
conformance!(crowd, in_a_crowd);

/// Behind a transaction pooler.
fn pooled() -> &'static (PostgresServer, PgBouncer) {
    static SERVERS: OnceLock<(PostgresServer, PgBouncer)> = OnceLock::new();
    SERVERS.get_or_init(|| {
        let server = PostgresServer::with(Kind::V15, ROOM);
        let pooler = PgBouncer::with(&server, &[("max_client_conn", "1000"), ("default_pool_size", "50")]);
        (server, pooler)
    })
}

/// No pushes come.
fn through_a_pooler() -> Environment<Postgres> {
    let (server, pooler) = pooled();
    fresh(server, &format!("{}?listen=none", pooler.url()))
}
conformance!(pooler, through_a_pooler);

/// With a URL of the server itself for the pushes.
fn through_a_pooler_with_pushes() -> Environment<Postgres> {
    let (server, pooler) = pooled();
    let listen = server.url().replace(':', "%3A").replace('/', "%2F").replace('@', "%40");
    fresh(server, &format!("{}?listen={listen}", pooler.url()))
}
conformance!(pooler_with_pushes, through_a_pooler_with_pushes);
