//! Checks connections that break or block, pools of the user, poolers, and hosts that do not answer.

use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

use stanchion_testkit::servers::PgBouncer;

use super::*;

#[test]
fn ended_connections_are_replaced_without_loss() {
    let server = server();
    block_on(async {
        let locks = locks(&server).await;
        let held = locks.lock("held").await.unwrap();
        let mut last = 0;
        for _ in 0..10 {
            server.psql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'stanchion'");
            let guard = locks.lock("k").wait(10 * SECOND).await.unwrap();
            assert!(guard.fence().get() > last);
            last = guard.fence().get();
            server.psql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'stanchion'");
            guard.release().await.unwrap();
        }
        // Waiters receive pushes again.
        let waiting = {
            let locks = locks.clone();
            tokio::spawn(async move { locks.lock("held").await.unwrap() })
        };
        until("the task waits", async || locks.inspect("held").await.unwrap().waiters.len() == 1).await;
        held.check().unwrap();
        held.release().await.unwrap();
        drop(waiting.await.unwrap());
    });
}

#[test]
fn restarted_server_keeps_holds_and_waiters() {
    let mut server = server();
    block_on(async {
        let locks = Locks::builder(&server.url()).session_ttl(30 * SECOND).open().await.unwrap();
        let held = locks.lock("k").await.unwrap();
        let waiting = {
            let locks = locks.clone();
            tokio::spawn(async move { locks.lock("k").await.unwrap() })
        };
        until("the task waits", async || locks.inspect("k").await.unwrap().waiters.len() == 1).await;
        server.kill();
        server.restart();
        until("the server answers", async || locks.inspect("k").await.is_ok_and(|state| state.waiters.len() == 1))
            .await;
        held.check().unwrap();
        let fence = held.fence();
        held.release().await.unwrap();
        assert!(waiting.await.unwrap().fence() > fence);
    });
}

/// All connections for operations wait for a row, and the session stays alive all the same.
#[test]
fn waiting_operations_do_not_delay_renewals() {
    let server = server();
    block_on(async {
        let locks = Locks::builder(&format!("{}?pool=2", server.url())).session_ttl(3 * SECOND).open().await.unwrap();
        let held = locks.lock("kept").await.unwrap();
        let locked = locks.lock("k").await.unwrap();
        let mut transaction = sleeping_transaction(&server, locked.fence().get(), 8, "SELECT").await;
        let crowd: Vec<_> = (0..40)
            .map(|_| {
                let locks = locks.clone();
                tokio::spawn(async move { locks.lock("k").wait(6 * SECOND).await.map(drop) })
            })
            .collect();
        let released = tokio::spawn(locked.release());
        for waiter in crowd {
            drop(waiter.await.unwrap());
        }
        held.check().unwrap();
        let _ = released.await.unwrap(); // The outcome of the release may be unknown.
        transaction.wait().unwrap();
        held.check().unwrap();
    });
}

/// The server continues an operation whose caller gave up. Nothing else may wait behind it, least of all a renewal.
#[test]
fn abandoned_call_blocks_nothing() {
    let server = server();
    block_on(async {
        let held = locks(&server).await.lock("k").await.unwrap();
        let mut transaction = sleeping_transaction(&server, held.fence().get(), 8, "SELECT").await;
        let store = Postgres::from_url(&server.url()).unwrap();
        let key = Key::new("", "k").unwrap();
        let waits = async || store.extend(&key, TokenId::random().unwrap(), SECOND).await;
        assert!(
            tokio::time::timeout(SECOND / 2, async { tokio::join!(waits(), waits()) }).await.is_err(),
            "both operations wait"
        );
        let sent_at = Instant::now();
        store.renew_session(SessionId::random().unwrap()).await.unwrap();
        assert!(sent_at.elapsed() < 4 * SECOND, "the renewal waited {:?}", sent_at.elapsed());
        transaction.wait().unwrap();
        // Both connections are used again.
        until("all connections are idle", async || {
            connections(&server, "state = 'idle'") == connections(&server, "true")
        })
        .await;
        let before = connections(&server, "true");
        let _ = tokio::join!(store.inspect(&key), store.inspect(&key));
        assert_eq!(connections(&server, "true"), before);
    });
}

pub(super) fn store_with_users_pool(
    port: u16,
    size: usize,
    database: &str,
    url: &str,
) -> stanchion::Result<(Postgres, deadpool_postgres::Pool)> {
    let mut settings = tokio_postgres::Config::new();
    settings.user("postgres").host("127.0.0.1").port(port).dbname(database);
    let manager = deadpool_postgres::Manager::new(settings, tokio_postgres::NoTls);
    let pool = deadpool_postgres::Pool::builder(manager).max_size(size).build().unwrap();
    let get = {
        let pool = pool.clone();
        move || {
            let pool = pool.clone();
            async move { pool.get().await }
        }
    };
    Ok((Postgres::from_pool(url, get, |connection| connection)?, pool))
}

/// While the user's work has all connections of the pool, nothing is lost. Afterwards operations continue.
#[test]
fn exhausted_pool_ends_no_session() {
    let server = server();
    block_on(async {
        let (store, pool) = store_with_users_pool(server.port(), 2, "postgres", &server.url()).unwrap();
        let locks = Locks::builder_with_store(store).session_ttl(2 * SECOND).open().await.unwrap();
        let (held, waited_for) = (locks.lock("held").await.unwrap(), locks.lock("waited").await.unwrap());
        let waiting = {
            let locks = locks.clone();
            tokio::spawn(async move { locks.lock("waited").await.unwrap() })
        };
        until("the task waits", async || locks.inspect("waited").await.unwrap().waiters.len() == 1).await;
        until("the waiter occupies no connection", async || pool.status().available == pool.status().size).await;
        let used = (pool.get().await.unwrap(), pool.get().await.unwrap());
        let expires = || -> u64 { server.psql("SELECT max(expires) FROM stanchion.sessions").trim().parse().unwrap() };
        let before = expires();
        let fault = locks.lock("other").wait(SECOND).await.unwrap_err();
        assert!(fault.kind() == ErrorKind::Timeout || fault.is_transient(), "{fault:?}");
        until("the session lives on", async || expires() > before + 4_000_000).await;
        held.check().unwrap();
        drop(used);
        waited_for.release().await.unwrap();
        waiting.await.unwrap().check().unwrap();
    });
}

#[test]
fn pool_of_another_database_is_rejected() {
    let server = server();
    server.psql("CREATE DATABASE other");
    block_on(async {
        let (store, _pool) = store_with_users_pool(server.port(), 2, "other", &server.url()).unwrap();
        let fault = Locks::with_store(store).await.unwrap_err();
        assert_eq!(fault.kind(), ErrorKind::Misconfigured, "the other database has no schema: {fault}");
        let url = format!("{}other", server.url().strip_suffix("postgres").unwrap());
        server.psql_in("other", &Postgres::from_url(&url).unwrap().schema_sql());
        let (store, _pool) = store_with_users_pool(server.port(), 2, "other", &server.url()).unwrap();
        let fault = Locks::with_store(store).await.unwrap_err();
        assert!(fault.to_string().contains("another database"), "{fault}");
        let (store, _pool) = store_with_users_pool(server.port(), 2, "other", &url).unwrap();
        Locks::with_store(store).await.unwrap().lock("k").await.unwrap().release().await.unwrap();
    });
    let outside = store_with_users_pool(server.port(), 2, "postgres", &server.url()).unwrap_err();
    assert_eq!(outside.kind(), ErrorKind::InvalidArgument);
}

/// The store notices a pooler that the URL does not mention, reports a warning, and waiting calls poll.
#[test]
fn transaction_pooler_causes_a_warning() {
    let server = server();
    let pooler = PgBouncer::with(&server, &[("max_client_conn", "1000"), ("default_pool_size", "20")]);
    block_on(async {
        let (locks, other) = (Locks::open(&pooler.url()).await.unwrap(), Locks::open(&pooler.url()).await.unwrap());
        let warned =
            |locks: &Locks| locks.warnings().iter().any(|warning| warning.contains("notifications do not arrive"));
        until("both handles warn", async || warned(&locks) && warned(&other)).await;
        let held = locks.lock("k").await.unwrap();
        let waiting = {
            let other = other.clone();
            tokio::spawn(async move { other.lock("k").await.unwrap() })
        };
        until("the task waits", async || locks.inspect("k").await.unwrap().waiters.len() == 1).await;
        held.release().await.unwrap();
        waiting.await.unwrap().check().unwrap();
        // Without the pooler there is no warning.
        let direct = Locks::open(&server.url()).await.unwrap();
        assert!(!warned(&direct));
    });
}

/// Nobody could recall such a hold. The option `listen` makes pushes arrive.
#[test]
fn holds_without_pushes_cannot_linger() {
    let server = server();
    let pooler = PgBouncer::start(&server);
    let listen = server.url().replace(':', "%3A").replace('/', "%2F").replace('@', "%40");
    block_on(async {
        for url in [pooler.url(), format!("{}?listen=none", pooler.url()), format!("{}?listen=none", server.url())] {
            let holder = Holder::begin(&url).await;
            assert_eq!(holder.linger().await, LingerOutcome::Wanted, "{url}");
            assert!(!holder.store.inspect(&k()).await.unwrap().outcome.holders[0].lingers);
            let other = TokenId::random().unwrap();
            assert_eq!(holder.store.linger(&k(), other).await.unwrap().outcome, LingerOutcome::Gone);
            holder.store.close_session(holder.session).await.unwrap();
        }
        Holder::begin(&format!("{}?listen={listen}", pooler.url())).await.mark().await;
    });
}

/// The tables are on a small disk of their own, and another table fills that disk.
#[test]
fn full_disk_is_unavailable_until_there_is_room() {
    let server = PostgresServer::start(Kind::V15);
    let Some(disk) = SmallDisk::new(&server) else {
        // Most containers do not allow this. The machine that tests a release does.
        return eprintln!("NOT TESTED: a full disk: this system does not allow mounting a file system");
    };
    server.psql(&format!("CREATE TABLESPACE small LOCATION '{}'", disk.folder.display()));
    server.psql("ALTER DATABASE postgres SET default_tablespace = small");
    server.psql(&Postgres::from_url(&server.url()).unwrap().schema_sql());
    block_on(async {
        let locks = locks(&server).await;
        let held = locks.lock("held").await.unwrap();
        server.psql("CREATE TABLE filler (text text)");
        server.psql(
            "DO $$ BEGIN LOOP INSERT INTO filler VALUES (repeat('x', 1900)); END LOOP; \
             EXCEPTION WHEN disk_full THEN NULL; END $$",
        );
        // Each key needs a row, so at some point there is no room for another one.
        let mut fault = None;
        for n in 0..10_000 {
            match locks.lock(format!("{n} {}", "x".repeat(400))).wait(SECOND).await {
                Ok(guard) => drop(guard.release().await),
                Err(error) => {
                    fault = Some(error);
                    break;
                }
            }
        }
        let fault = fault.unwrap();
        assert!(fault.kind() == ErrorKind::Unavailable && fault.to_string().contains("disk is full"), "{fault}");
        server.psql("DROP TABLE filler");
        until("there is room again", async || locks.lock("new").wait(SECOND).await.is_ok()).await;
        locks.lock("after").await.unwrap().release().await.unwrap();
        drop(held);
        until("nothing is left", async || locks.list("").await.unwrap().is_empty()).await;
    });
}

/// A file system of 8 MB for a tablespace.
struct SmallDisk {
    folder: std::path::PathBuf,
}

impl SmallDisk {
    fn new(server: &PostgresServer) -> Option<Self> {
        let folder = server.folder().join("small");
        std::fs::create_dir(&folder).unwrap();
        let owner = std::fs::metadata(server.data_folder()).unwrap();
        let options = format!("size=8m,mode=0700,uid={},gid={}", owner.uid(), owner.gid());
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "none"]).arg(&folder).status().unwrap();
        mounted.success().then_some(Self { folder })
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Unmount lazily, because the server still has open files in it.
        let unmounted = Command::new("umount").arg("-l").arg(&self.folder).status();
        assert!(unmounted.is_ok_and(|status| status.success()));
    }
}

/// The server process that renews the session stops, and the next renewal uses another connection.
#[test]
fn silent_connection_ends_no_session() {
    let server = server();
    block_on(async {
        let locks = locks(&server).await;
        let held = locks.lock("k").await.unwrap();
        let renewals =
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'stanchion' AND query LIKE '%.renew_session(%'";
        let mut pid = String::new();
        let is_one = async || {
            server.psql(renewals).trim().clone_into(&mut pid);
            pid.parse::<u32>().is_ok()
        };
        until("the session is renewed", is_one).await;
        let send = |signal: &str| assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
        let expires = || -> u64 { server.psql("SELECT max(expires) FROM stanchion.sessions").trim().parse().unwrap() };
        let before = expires();
        send("-STOP");
        until("the session lives on", async || held.check().is_err() || expires() > before + 6_000_000).await;
        send("-CONT");
        held.check().unwrap();
    });
}

/// The request that closes the session fails, and the listener ends all the same.
#[test]
fn failed_close_still_stops_the_listener() {
    let server = server();
    block_on(async {
        let store = Postgres::from_url(&server.url()).unwrap();
        let session = SessionId::random().unwrap();
        let _stream = store.grants(session);
        store.open_session(OpenSession { session, ttl: 60 * SECOND, owner: "me".into() }).await.unwrap();
        let listeners = || connections(&server, "query LIKE 'LISTEN%'");
        until("the store listens", async || listeners() == 1).await;
        server.psql("ALTER FUNCTION stanchion.close_session RENAME TO gone");
        store.close_session(session).await.unwrap_err();
        until("nobody listens", async || listeners() == 0).await;
    });
}

/// The host for pushes accepts connections and never answers. Waiting calls poll, and one task keeps trying to listen.
#[test]
fn silent_push_host_stops_nothing() {
    let server = server();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = format!("postgres%3A%2F%2Fpostgres%40127.0.0.1%3A{}%2Fpostgres", silent.local_addr().unwrap().port());
    let url = format!("{}?listen={listen}", server.url());
    block_on(async {
        let start = Instant::now();
        let locks = Locks::builder(&url).session_ttl(3 * SECOND).open().await.unwrap();
        assert!(start.elapsed() < 2 * SECOND, "opening waited for the first attempt: {:?}", start.elapsed());
        let held = locks.lock("k").await.unwrap();
        let waiting = {
            let locks = locks.clone();
            tokio::spawn(async move { locks.lock("k").await.unwrap() })
        };
        until("the task waits", async || locks.inspect("k").await.unwrap().waiters.len() == 1).await;
        held.release().await.unwrap();
        let released = Instant::now();
        waiting.await.unwrap().check().unwrap();
        assert!(released.elapsed() < SECOND, "the waiter polled too late: {:?}", released.elapsed());
        let warned =
            |locks: &Locks| locks.warnings().iter().any(|warning| warning.contains("notifications unavailable"));
        until("the handle warns", async || warned(&locks)).await;
    });
}

/// The URL names a standby, or a machine that does not answer, before the primary.
#[test]
fn primary_is_used_among_several_hosts() {
    let server = server();
    let standby = PostgresServer::standby_of(&server);
    let port = |server: &PostgresServer| server.url().rsplit(':').next().unwrap().split('/').next().unwrap().to_owned();
    block_on(async {
        // This listener accepts no connection, and its backlog is full.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let unresponsive = socket.local_addr().unwrap();
        let _listens = socket.listen(0).unwrap();
        let _fills_it: Vec<_> = (0..4).map(|_| tokio::spawn(tokio::net::TcpStream::connect(unresponsive))).collect();
        for before in [port(&standby), unresponsive.port().to_string()] {
            let url = format!("postgres://postgres@127.0.0.1:{before},127.0.0.1:{}/postgres", port(&server));
            // One attempt is too short to reach the primary. A later attempt uses the connection that an earlier one
            // began.
            let retry = RetryPolicy { attempts: 30, attempt: Duration::from_millis(300), ..RetryPolicy::default() };
            let locks = Locks::builder(&url).retry(retry).open().await.unwrap();
            locks.lock("k").await.unwrap().release().await.unwrap();
            locks.close().await.unwrap();
        }
    });
}
