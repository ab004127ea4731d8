//! Checks the PostgreSQL store on real servers: failures, costs, limits and foreign parts of the schema.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "test code")]

mod adoption;
mod batches;
mod bulk;
mod connections;
mod costs;
mod failover;
mod fences;
mod isolation;
mod limits;
mod listing;
mod polls;
mod settings;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use stanchion::store::{PollOutcome, Postgres, Store};
use stanchion::{ErrorKind, Key, Locks, Released, RetryPolicy, SessionId, TokenId};
use stanchion_testkit::servers::{Postgres as Kind, PostgresServer};
use stanchion_testkit::{block_on, until};

const SECOND: Duration = Duration::from_secs(1);

fn server() -> PostgresServer {
    let server = PostgresServer::start(Kind::V15);
    server.psql(&Postgres::from_url(&server.url()).unwrap().schema_sql());
    server
}

async fn locks(server: &PostgresServer) -> Locks {
    Locks::builder(&server.url()).session_ttl(3 * SECOND).open().await.unwrap()
}

/// Starts a transaction that checks the fence of `k`, sleeps for some seconds and then runs a statement. Returns when
/// it sleeps.
async fn sleeping_transaction(server: &PostgresServer, fence: u64, seconds: u32, then: &str) -> std::process::Child {
    let script =
        format!("BEGIN; SELECT stanchion.check_fence('k', {fence}); SELECT pg_sleep({seconds}); {then}; COMMIT");
    let transaction = std::process::Command::new("psql")
        .args([server.url().as_str(), "-qc", &script])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    until("the transaction sleeps", async || {
        server.psql("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'").trim() == "1"
    })
    .await;
    transaction
}

fn connections(server: &PostgresServer, which: &str) -> u32 {
    let ours = format!("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'stanchion' AND {which}");
    server.psql(&ours).trim().parse().unwrap()
}
