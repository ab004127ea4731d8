//! Checks failovers after which the connections to the old server stay open but are useless.

use stanchion::store::OpenSession;
use stanchion_testkit::proxy::Proxy;

use super::connections::store_with_users_pool;
use super::*;

/// A primary, its standby, and a proxy whose address leads to the primary.
struct Pair {
    old: PostgresServer,
    new: PostgresServer,
    address: Proxy,
}

impl Pair {
    fn start() -> Self {
        let old = server();
        let new = PostgresServer::standby_of(&old);
        let address = Proxy::start(old.port(), 1);
        Self { old, new, address }
    }

    fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.address.port())
    }

    /// Makes the standby the primary, after it has received every commit. The old server then rejects writes and keeps
    /// its connections, and the address still leads to it.
    async fn fail_over(&self) {
        self.old.psql("ALTER SYSTEM SET default_transaction_read_only = on");
        self.old.psql("SELECT pg_reload_conf()");
        until("the old server rejects writes", async || self.old.psql("SHOW transaction_read_only") == "on").await;
        let written = self.old.psql("SELECT pg_current_wal_lsn()");
        let has_all = format!("SELECT pg_last_wal_replay_lsn() >= '{written}'");
        until("the standby has every commit", async || self.new.psql(&has_all) == "t").await;
        self.new.promote();
        self.new.psql("ALTER SYSTEM RESET default_transaction_read_only");
        self.new.psql("SELECT pg_reload_conf()");
        until("the new server accepts writes", async || self.new.psql("SHOW transaction_read_only") == "off").await;
    }

    fn lead_to_new(&self) {
        self.address.faults().lead_to(self.new.port());
    }
}

fn waiter(locks: &Locks, key: &'static str) -> tokio::task::JoinHandle<stanchion::Guard> {
    let locks = locks.clone();
    tokio::spawn(async move { locks.lock(key).await.unwrap() })
}

/// Locks and releases keys at the same time, so that the store opens several connections.
async fn open_connections(locks: &Locks, count: usize) {
    let one = |n| async move { locks.lock(format!("k{n}")).await.map(drop).unwrap() };
    futures_util::future::join_all((0..count).map(one)).await;
}

#[test]
fn failover_behind_one_address_loses_nothing() {
    let pair = Pair::start();
    block_on(async {
        let open = async || Locks::builder(&pair.url()).session_ttl(10 * SECOND).open().await.unwrap();
        let (locks, other) = (open().await, open().await);
        let held = locks.lock("held").await.unwrap();
        let waiting = waiter(&other, "held");
        until("the waiter is queued", async || locks.inspect("held").await.unwrap().waiters.len() == 1).await;
        // Each useless connection could cost the store an attempt.
        open_connections(&locks, 40).await;
        pair.fail_over().await;
        // Some attempts reach the old server.
        let _ = locks.lock("during").wait(SECOND / 2).await; // The lock may fail.
        pair.lead_to_new();
        let switched = Instant::now();
        locks.lock("new").wait(20 * SECOND).await.unwrap().release().await.unwrap();
        println!("served {:?} after the address led to the new server", switched.elapsed());
        assert!(switched.elapsed() < 10 * SECOND, "{:?}", switched.elapsed());
        held.check().unwrap();
        // Both handles must listen at the new server, because the hand-off is a push.
        until("both handles listen at the new server", async || connections(&pair.new, "query LIKE 'LISTEN%'") >= 2)
            .await;
        held.release().await.unwrap();
        waiting.await.unwrap().check().unwrap();
        until("nothing is left at the old server", async || connections(&pair.old, "true") == 0).await;
    });
}

/// A read must not return the old server's data, because that server lacks all later changes.
#[test]
fn reads_on_a_read_only_server_are_rejected() {
    let server = server();
    block_on(async {
        let store = Postgres::from_url(&server.url()).unwrap();
        let session = SessionId::random().unwrap();
        let _stream = store.grants(session);
        store.open_session(OpenSession { session, ttl: 60 * SECOND, owner: "me".into() }).await.unwrap();
        let (key, token) = (Key::new("", "k").unwrap(), TokenId::random().unwrap());
        store.poll(&key, &[token]).await.unwrap();
        server.psql("ALTER SYSTEM SET default_transaction_read_only = on");
        server.psql("SELECT pg_reload_conf()");
        until("the server rejects writes", async || server.psql("SHOW transaction_read_only") == "on").await;
        let faults = [
            store.poll(&key, &[token]).await.map(drop).unwrap_err(),
            store.inspect(&key).await.map(drop).unwrap_err(),
            store.list("", None, 10).await.map(drop).unwrap_err(),
            store.session_lives(session).await.map(drop).unwrap_err(),
            store.renew_session(session).await.map(drop).unwrap_err(),
        ];
        for fault in faults {
            assert!(fault.is_transient() && !fault.is_in_doubt(), "{fault:?}");
        }
        until("all connections to the server are dropped", async || connections(&server, "true") == 0).await;
    });
}

/// The store tries its hosts again until it finds one that accepts writes.
#[test]
fn failover_between_hosts_loses_nothing() {
    let pair = Pair::start();
    block_on(async {
        let url = format!("postgres://postgres@127.0.0.1:{},127.0.0.1:{}/postgres", pair.old.port(), pair.new.port());
        let locks = Locks::builder(&url).session_ttl(10 * SECOND).open().await.unwrap();
        let held = locks.lock("held").await.unwrap();
        let waiting = waiter(&locks, "held");
        until("the waiter is queued", async || locks.inspect("held").await.unwrap().waiters.len() == 1).await;
        pair.fail_over().await;
        let promoted = Instant::now();
        locks.lock("new").wait(20 * SECOND).await.unwrap().release().await.unwrap();
        println!("served {:?} after the promotion", promoted.elapsed());
        held.check().unwrap();
        held.release().await.unwrap();
        waiting.await.unwrap().check().unwrap();
        until("nothing is left at the old server", async || connections(&pair.old, "true") == 0).await;
    });
}

/// The store ends each useless connection of the user's pool, so that the pool opens a new one.
#[test]
fn failover_behind_a_users_pool_loses_nothing() {
    let pair = Pair::start();
    block_on(async {
        let (store, pool) = store_with_users_pool(pair.address.port(), 8, "postgres", &pair.url()).unwrap();
        let locks = Locks::builder_with_store(store).session_ttl(10 * SECOND).open().await.unwrap();
        let held = locks.lock("held").await.unwrap();
        let waiting = waiter(&locks, "held");
        until("the waiter is queued", async || locks.inspect("held").await.unwrap().waiters.len() == 1).await;
        // Open as many connections as the pool may have.
        let mut all = Vec::new();
        for _ in 0..8 {
            all.push(pool.get().await.unwrap());
        }
        drop(all);
        pair.fail_over().await;
        pair.lead_to_new();
        locks.lock("new").wait(20 * SECOND).await.unwrap().release().await.unwrap();
        held.check().unwrap();
        held.release().await.unwrap();
        waiting.await.unwrap().check().unwrap();
        for n in 0..50 {
            locks.lock(format!("after{n}")).wait(20 * SECOND).await.unwrap().release().await.unwrap();
        }
    });
}

/// An abandon must not overtake the acquire of its token on another connection.
#[test]
fn dropped_acquire_ends_at_once() {
    let server = server();
    let link = Proxy::start(server.port(), 1);
    block_on(async {
        let url = format!("postgres://postgres@127.0.0.1:{}/postgres", link.port());
        let locks = Locks::builder(&url).session_ttl(30 * SECOND).open().await.unwrap();
        let other = Locks::builder(&server.url()).session_ttl(30 * SECOND).open().await.unwrap();
        // The acquire and the abandon could use different connections.
        open_connections(&locks, 8).await;
        let mut counted = 0;
        for round in 0..20 {
            let key = format!("dropped{round}");
            link.faults().silence(true);
            let silent = Instant::now();
            let outcome = tokio::time::timeout(Duration::from_millis(50), locks.lock(&key).into_future()).await;
            assert!(outcome.is_err(), "the proxy forwards nothing");
            // If the store abandons the acquire at once, it sends the abandon within this time.
            tokio::time::sleep(Duration::from_millis(150)).await;
            link.faults().silence(false);
            let was_short = silent.elapsed() < Duration::from_millis(700);
            let restored = Instant::now();
            tokio::time::sleep(Duration::from_millis(100)).await;
            let free = async || other.try_lock(&key).await.unwrap().is_some();
            until("the key is free", free).await;
            // After a longer silence, on a busy machine, the store has given the acquire up and sends the abandon
            // later.
            if was_short {
                counted += 1;
                assert!(restored.elapsed() < 3 * SECOND, "{:?}", restored.elapsed());
            }
        }
        println!("{counted} rounds were fast enough to count");
        assert!(counted > 0);
    });
}
