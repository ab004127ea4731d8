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

use stanchion::store::{
    AcquireOutcome, AcquireRequest, Demand, GrantStream, Lifetime, LingerOutcome, OpenSession, PollOutcome, Postgres,
    Store, StoreTime,
};
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

/// Returns the name of `k` as a key.
fn k() -> Key {
    Key::new("", "k").unwrap()
}

/// A session with a hold of `k`, and the store's own operations on that hold.
struct Holder {
    store: Postgres,
    session: SessionId,
    token: TokenId,
    fence: u64,
    _pushes: GrantStream,
}

impl Holder {
    async fn begin(url: &str) -> Self {
        let store = Postgres::from_url(url).unwrap();
        let (session, token) = (SessionId::random().unwrap(), TokenId::random().unwrap());
        let pushes = store.grants(session);
        store.open_session(OpenSession { session, ttl: 600 * SECOND, owner: "holder".into() }).await.unwrap();
        let mut holder = Self { store, session, token, fence: 0, _pushes: pushes };
        let AcquireOutcome::Granted(granted) = holder.acquire(token).await else { panic!("the key is not free") };
        holder.fence = granted.fence.get();
        holder
    }

    /// Requests `k`, and waits in the queue if it is locked.
    async fn acquire(&self, token: TokenId) -> AcquireOutcome {
        let request = AcquireRequest {
            key: k(),
            token,
            session: self.session,
            demand: Demand::MUTEX,
            lifetime: Lifetime::Session { max_hold: None },
            enqueue: true,
            not_after: StoreTime::from_micros(i64::MAX as u64),
            metadata: None,
            trace: None,
        };
        self.store.acquire(request).await.unwrap().outcome
    }

    async fn linger(&self) -> LingerOutcome {
        self.store.linger(&k(), self.token).await.unwrap().outcome
    }

    /// Marks the hold as lingering, as soon as pushes arrive. Returns the newest fence of the key.
    async fn mark(&self) -> u64 {
        let mut newest = 0;
        until("the hold lingers", async || match self.linger().await {
            LingerOutcome::Lingers { fence, up_to } => {
                newest = up_to.get();
                fence.get() == self.fence
            }
            _ => false,
        })
        .await;
        newest
    }
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
