//! Redis against the whole suite.

use std::sync::OnceLock;

use stanchion::TokenId;
use stanchion::store::Redis;
use stanchion_testkit::servers::{Redis as Kind, RedisServer};
use stanchion_testkit::{Environment, conformance};

/// Fresh data on a server that all cases share: a prefix of their own.
fn fresh(server: &'static RedisServer) -> Environment<Redis> {
    let prefix = TokenId::random().unwrap().to_hex();
    let url = format!("redis://127.0.0.1:{}?prefix={prefix}", server.port());
    Environment::new(move || Redis::from_url(&url).unwrap())
}

fn redis_7() -> Environment<Redis> {
    static SERVER: OnceLock<RedisServer> = OnceLock::new();
    fresh(SERVER.get_or_init(|| RedisServer::start(Kind::Redis7)))
}

conformance!(redis7, redis_7);
