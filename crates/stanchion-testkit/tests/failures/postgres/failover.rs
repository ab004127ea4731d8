//! A failover behind an address that stays the same: connections to the server from before stay, and are of no use.

use stanchion::store::OpenSession;
use stanchion_testkit::proxy::Proxy;

use super::connections::store_with_users_pool;
use super::*;

/// A primary, its standby, and an address that leads to the primary.
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

    /// The standby has all that was committed, the old server takes no writes any more and keeps its connections, and the
    /// standby is the primary. The address still leads to the old one.
    async fn fail_over(&self) {
        self.old.psql("ALTER SYSTEM SET default_transaction_read_only = on");
        self.old.psql("SELECT pg_reload_conf()");
        until("it takes no writes", async || self.old.psql("SHOW transaction_read_only") == "on").await;
        let written = self.old.psql("SELECT pg_current_wal_lsn()");
        let has_all = format!("SELECT pg_last_wal_replay_lsn() >= '{written}'");
        until("the standby has it", async || self.new.psql(&has_all) == "t").await;
        self.new.promote();
        self.new.psql("ALTER SYSTEM RESET default_transaction_read_only");
        self.new.psql("SELECT pg_reload_conf()");
        until("it takes writes", async || self.new.psql("SHOW transaction_read_only") == "off").await;
    }

    fn lead_to_new(&self) {
        self.address.faults().lead_to(self.new.port());
    }
}

fn waiter(locks: &Locks, key: &'static str) -> tokio::task::JoinHandle<stanchion::Guard> {
    let locks = locks.clone();
    tokio::spawn(async move { locks.lock(key).await.unwrap() })
}

/// Takes keys of its own at the same time, for which several connections are made.
async fn many(locks: &Locks, count: usize) {
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
        until("it waits", async || locks.inspect("held").await.unwrap().waiters.len() == 1).await;
        // Many connections: each of them would cost an attempt.
        many(&locks, 40).await;
        pair.fail_over().await;
        // Some attempts reach the old server.
        let _in_doubt_or_refused = locks.lock("during").wait(SECOND / 2).await;
        pair.lead_to_new();
        let led = Instant::now();
        locks.lock("new").wait(20 * SECOND).await.unwrap().release().await.unwrap();
        println!("served {:?} after the address led to the new server", led.elapsed());
        assert!(led.elapsed() < 10 * SECOND, "{:?}", led.elapsed());
        held.check().unwrap();
        // Both listen there: the hand-off is a push.
        until("they listen at the new server", async || connections(&pair.new, "query LIKE 'LISTEN%'") >= 2).await;
        held.release().await.unwrap();
        waiting.await.unwrap().check().unwrap();
        until("nothing is left at the old server", async || connections(&pair.old, "true") == 0).await;
    });
}

/// A look must not take the old server's word, which knows nothing of what came after.
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
        until("it takes no writes", async || server.psql("SHOW transaction_read_only") == "on").await;
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
        until("all its connections are dropped", async || connections(&server, "true") == 0).await;
    });
}

/// Of several hosts the one that takes writes is looked for again.
#[test]
fn failover_between_hosts_loses_nothing() {
    let pair = Pair::start();
    block_on(async {
        let url = format!("postgres://postgres@127.0.0.1:{},127.0.0.1:{}/postgres", pair.old.port(), pair.new.port());
        let locks = Locks::builder(&url).session_ttl(10 * SECOND).open().await.unwrap();
        let held = locks.lock("held").await.unwrap();
        let waiting = waiter(&locks, "held");
        until("it waits", async || locks.inspect("held").await.unwrap().waiters.len() == 1).await;
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

/// The connections of a user's pool from before the failover are ended one by one, so that the pool makes others.
#[test]
fn failover_behind_a_users_pool_loses_nothing() {
    let pair = Pair::start();
    block_on(async {
        let (store, pool) = store_with_users_pool(pair.address.port(), 8, "postgres", &pair.url()).unwrap();
        let locks = Locks::builder_with_store(store).session_ttl(10 * SECOND).open().await.unwrap();
        let held = locks.lock("held").await.unwrap();
        let waiting = waiter(&locks, "held");
        until("it waits", async || locks.inspect("held").await.unwrap().waiters.len() == 1).await;
        // All that there may be.
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
fn dropped_acquire_is_abandoned_at_once() {
    let server = server();
    let link = Proxy::start(server.port(), 1);
    block_on(async {
        let url = format!("postgres://postgres@127.0.0.1:{}/postgres", link.port());
        let locks = Locks::builder(&url).session_ttl(30 * SECOND).open().await.unwrap();
        let other = Locks::builder(&server.url()).session_ttl(30 * SECOND).open().await.unwrap();
        // Several connections.
        many(&locks, 8).await;
        let mut counted = 0;
        for round in 0..20 {
            let key = format!("dropped{round}");
            link.faults().silence(true);
            let silent = Instant::now();
            let asked = tokio::time::timeout(Duration::from_millis(50), locks.lock(&key).into_future()).await;
            assert!(asked.is_err(), "nothing passes");
            // The end of it is sent, if it is sent at once.
            tokio::time::sleep(Duration::from_millis(150)).await;
            link.faults().silence(false);
            let was_short = silent.elapsed() < Duration::from_millis(700);
            let passes = Instant::now();
            tokio::time::sleep(Duration::from_millis(100)).await;
            let free = async || other.try_lock(&key).await.unwrap().is_some();
            until("it is free", free).await;
            // On a machine that is too busy it was sent after a second.
            if was_short {
                counted += 1;
                assert!(passes.elapsed() < 3 * SECOND, "{:?}", passes.elapsed());
            }
        }
        println!("{counted} rounds");
        assert!(counted > 0);
    });
}
