//! Breaks Redis: answers get lost, connections are cut, and servers are killed, frozen, promoted or full.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use std::time::Duration;

use stanchion::store::Redis;
use stanchion::{Key, Locks};
use stanchion_testkit::Environment;

mod bulk;
mod clusters;
mod commands;
mod damage;
mod failovers;
mod forgetting;
mod lingering;
mod listing;
mod messages;
mod processes;
mod refusals;
mod sessions;
mod steps;

const SECOND: Duration = Duration::from_secs(1);

fn url(port: u16) -> String {
    format!("redis://127.0.0.1:{port}")
}

fn key(name: &str) -> Key {
    Key::new("", name).unwrap()
}

fn store(port: u16) -> Environment<Redis> {
    let url = url(port);
    Environment::new(move || Redis::from_url(&url).unwrap())
}

async fn locks(port: u16) -> Locks {
    Locks::open(&url(port)).await.unwrap()
}

async fn is_free(locks: &Locks, key: &str) -> bool {
    let state = locks.inspect(key).await.unwrap();
    state.holders.is_empty() && state.waiters.is_empty()
}
