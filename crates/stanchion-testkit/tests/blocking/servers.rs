//! Runs the blocking tests on the stores that need a server.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::OnceLock;

use stanchion::TokenId;
use stanchion::blocking::Locks;
use stanchion::store::Postgres;
use stanchion_testkit::servers::{Postgres as PostgresKind, PostgresServer, Redis, RedisServer};

/// Returns a new name for a prefix or a schema.
fn fresh() -> String {
    format!("s{}", TokenId::random().unwrap().to_hex())
}

blocking_cases!(redis, {
    static SERVER: OnceLock<RedisServer> = OnceLock::new();
    let server = SERVER.get_or_init(|| RedisServer::start(Redis::Redis7));
    let url = format!("redis://127.0.0.1:{}?prefix={}", server.port(), fresh());
    move || Locks::open(&url).unwrap()
});

blocking_cases!(postgres, {
    static SERVER: OnceLock<PostgresServer> = OnceLock::new();
    let server = SERVER.get_or_init(|| PostgresServer::start(PostgresKind::V15));
    let schema = fresh();
    let store = Postgres::from_url(&format!("postgres://localhost?schema={schema}")).unwrap();
    server.psql(&store.schema_sql());
    let url = server.url();
    let url = format!("{url}{}schema={schema}", if url.contains('?') { '&' } else { '?' });
    move || Locks::open(&url).unwrap()
});
