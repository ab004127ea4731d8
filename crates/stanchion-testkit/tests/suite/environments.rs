//! Creates fresh data for each case, on servers that all cases of a process share.
#![allow(dead_code, clippy::unwrap_used, reason = "test code; each suite uses a part of it")]

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use stanchion::store::{Firestore, Memory, Postgres, Redis, Sqlite};
use stanchion::{TokenId, VirtualClock};
use stanchion_testkit::servers::{
    FirestoreFake, Postgres as PostgresKind, PostgresServer, Redis as RedisKind, RedisServer,
};
use stanchion_testkit::{Environment, Fixture};

/// The memory store on a virtual clock.
pub(crate) struct MemoryFixture;

impl Fixture for MemoryFixture {
    type Store = Memory;

    fn fresh(&self) -> Environment<Memory> {
        let time = VirtualClock::new();
        let store = Memory::with_clock(time.clock());
        Environment::new(move || store.clone()).with_time(time)
    }
}

/// Returns an environment of the embedded store with its own folder. Each client gets its own handle.
pub(crate) fn sqlite() -> Environment<Sqlite> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    Environment::new(move || Sqlite::open(&path).unwrap()).keeping(folder)
}

/// Returns an environment with its own prefix on the Redis server of the URL.
pub(crate) fn redis_at(url: &str) -> Environment<Redis> {
    let prefix = TokenId::random().unwrap().to_hex();
    let url = format!("{url}{}prefix={prefix}", if url.contains('?') { '&' } else { '?' });
    Environment::new(move || Redis::from_url(&url).unwrap())
}

pub(crate) fn redis_7() -> Environment<Redis> {
    static SERVER: OnceLock<RedisServer> = OnceLock::new();
    let server = SERVER.get_or_init(|| RedisServer::start(RedisKind::Redis7));
    redis_at(&format!("redis://127.0.0.1:{}", server.port()))
}

/// Returns an environment with its own schema on a PostgreSQL server, which handles reach by the URL.
pub(crate) fn postgres_at(server: &PostgresServer, url: &str) -> Environment<Postgres> {
    let url = format!("{url}{}schema={}", if url.contains('?') { '&' } else { '?' }, schema_of(server));
    Environment::new(move || Postgres::from_url(&url).unwrap())
}

/// Creates a schema and returns its name.
pub(crate) fn schema_of(server: &PostgresServer) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let schema = format!("s{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let store = Postgres::from_url(&format!("postgres://localhost?schema={schema}")).unwrap();
    server.psql(&store.schema_sql());
    schema
}

/// Server settings that allow many handles at once, each with its own connections.
pub(crate) const ROOM: &[(&str, &str)] = &[("max_connections", "500")];

pub(crate) fn postgres_15() -> Environment<Postgres> {
    static SERVER: OnceLock<PostgresServer> = OnceLock::new();
    let server = SERVER.get_or_init(|| PostgresServer::with(PostgresKind::V15, ROOM));
    postgres_at(server, &server.url())
}

/// Returns an environment with its own fake of Firestore.
pub(crate) fn firestore_fake() -> Environment<Firestore> {
    let fake = FirestoreFake::start();
    let url = fake.url();
    Environment::new(move || Firestore::from_url(&url).unwrap()).keeping(fake)
}
