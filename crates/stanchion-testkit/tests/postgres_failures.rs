//! PostgreSQL where something goes wrong, and what it costs. Real servers.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "test code")]

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use stanchion::store::{Postgres, Store};
use stanchion::{ErrorKind, Key, Locks, SessionId, TokenId};
use stanchion_testkit::servers::{Postgres as Kind, PostgresServer};
use stanchion_testkit::{block_on, until};

#[allow(dead_code, reason = "its main is for a shell")]
#[path = "../../stanchion/examples/postgres_fence.rs"]
mod example;

const SECOND: Duration = Duration::from_secs(1);

fn server() -> PostgresServer {
    let server = PostgresServer::start(Kind::V15);
    server.psql(&Postgres::from_url(&server.url()).unwrap().schema_sql());
    server
}

/// A transaction that has checked the fence of `k`, sleeps for so many seconds, and does something more. It sleeps by now.
async fn sleeping_transaction(server: &PostgresServer, fence: u64, seconds: u32, then: &str) -> std::process::Child {
    let script =
        format!("BEGIN; SELECT stanchion.check_fence('k', {fence}); SELECT pg_sleep({seconds}); {then}; COMMIT");
    let transaction = std::process::Command::new("psql")
        .args([server.url().as_str(), "-qc", &script])
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    until("it sleeps", async || {
        server.psql("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'").trim() == "1"
    })
    .await;
    transaction
}

fn connections(server: &PostgresServer, which: &str) -> u32 {
    let ours = format!("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'stanchion' AND {which}");
    server.psql(&ours).trim().parse().unwrap()
}

async fn locks(server: &PostgresServer) -> Locks {
    Locks::builder(&server.url()).session_ttl(3 * SECOND).open().await.unwrap()
}

#[test]
fn an_acquire_and_a_release_are_one_statement_each() {
    let server = server();
    server.psql("CREATE EXTENSION pg_stat_statements");
    block_on(async {
        let locks = locks(&server).await;
        locks.lock("k").await.unwrap().release().await.unwrap();
        server.psql("SELECT pg_stat_statements_reset()");
        for _ in 0..100 {
            locks.lock("k").await.unwrap().release().await.unwrap();
        }
        let calls = |of: &str| {
            server.psql(&format!(
                "SELECT coalesce(sum(calls), 0) FROM pg_stat_statements WHERE toplevel AND query LIKE '%{of}%' \
             AND query NOT LIKE '%pg_stat_statements%'"
            ))
        };
        assert_eq!((calls("acquire(").trim(), calls("finish(").trim()), ("100", "100"));
        // Nothing else but the beats, and housekeeping.
        let others = server.psql(
            "SELECT query FROM pg_stat_statements WHERE toplevel AND query NOT LIKE '%acquire(%' \
             AND query NOT LIKE '%finish(%' AND query NOT LIKE '%beat(%' AND query NOT LIKE '%tidy(%' \
             AND query NOT LIKE '%pg_stat_statements%'",
        );
        assert_eq!(others.trim(), "");
    });
}

#[test]
fn only_a_hand_off_notifies() {
    let server = PostgresServer::with(Kind::V15, &[("pg_stat_statements.track", "all")]);
    server.psql(&Postgres::from_url(&server.url()).unwrap().schema_sql());
    server.psql("CREATE EXTENSION pg_stat_statements");
    let sent = || -> u32 {
        let sent = server.psql("SELECT coalesce(sum(calls), 0) FROM pg_stat_statements WHERE query LIKE '%pg_notify%' AND NOT toplevel AND query NOT LIKE '%pg_stat%'");
        sent.trim().parse().unwrap()
    };
    block_on(async {
        let locks = locks(&server).await;
        for _ in 0..20 {
            locks.lock("k").await.unwrap().release().await.unwrap();
        }
        assert_eq!(sent(), 0, "nobody waits");
        let mut held = locks.lock("k").await.unwrap();
        let waiting: Vec<_> = (0..100)
            .map(|_| {
                let locks = locks.clone();
                tokio::spawn(async move { locks.lock("k").await.unwrap().release().await.unwrap() })
            })
            .collect();
        until("all wait", async || locks.inspect("k").await.unwrap().waiters.len() == 100).await;
        let most = connections(&server, "true");
        assert!(most <= 18, "{most} connections");
        held.check().unwrap();
        held.release().await.unwrap();
        for one in waiting {
            one.await.unwrap();
        }
        assert_eq!(sent(), 100);
        held = locks.lock("k").await.unwrap();
        drop(held);
    });
}

#[test]
fn a_transaction_that_checks_a_fence_writes_as_the_holder_or_not_at_all() {
    let server = server();
    block_on(async {
        let (locks, other) = (locks(&server).await, locks(&server).await);
        for contended in [false, true] {
            let guard = locks.lock("it's").await.unwrap();
            let waiter = contended.then(|| {
                let other = other.clone();
                tokio::spawn(async move { other.lock("it's").await })
            });
            if contended {
                until("waits", async || locks.inspect("it's").await.unwrap().waiters.len() == 1).await;
            }
            let check = |fence: u64| {
                format!(
                    "DO $$ BEGIN PERFORM stanchion.check_fence('it''s', {fence}); EXCEPTION WHEN SQLSTATE 'SF001' THEN RAISE NOTICE 'stale'; INSERT INTO refused VALUES ({fence}); END $$"
                )
            };
            server.psql("CREATE TABLE IF NOT EXISTS refused (fence bigint)");
            let refused = || server.psql("SELECT fence FROM refused").split_whitespace().count();
            let before = refused();
            let fence = guard.fence().get();
            server.psql(&check(fence));
            assert_eq!(refused(), before);
            for wrong in [fence - 1, fence + 1, 0] {
                server.psql(&check(wrong));
            }
            assert_eq!(refused(), before + 3);
            guard.release().await.unwrap();
            server.psql(&check(fence));
            assert_eq!(refused(), before + 4);
            if let Some(waiter) = waiter {
                let next = waiter.await.unwrap().unwrap();
                server.psql(&check(next.fence().get()));
                assert_eq!(refused(), before + 4);
            }
        }
    });
}

#[test]
fn while_a_transaction_has_checked_the_fence_nobody_gets_the_key() {
    let server = server();
    block_on(async {
        let (locks, other) = (locks(&server).await, locks(&server).await);
        let guard = locks.lock("k").await.unwrap();
        let fence = guard.fence().get();
        server.psql("CREATE TABLE written (at timestamptz)");
        let mut transaction =
            sleeping_transaction(&server, fence, 4, "INSERT INTO written VALUES (clock_timestamp())").await;
        // The release is sent while the row is locked, and comes through after it.
        let released = tokio::spawn(guard.release());
        let got = other.lock("k").wait(20 * SECOND).await.unwrap();
        assert_eq!(server.psql("SELECT count(*) FROM written").trim(), "1", "the transaction ended first");
        assert!(got.fence().get() > fence);
        released.await.unwrap().unwrap();
        assert!(transaction.wait().unwrap().success());
    });
}

#[test]
fn ended_connections_are_made_again_and_nothing_is_lost() {
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
        // A waiter hears again.
        let waiting = {
            let locks = locks.clone();
            tokio::spawn(async move { locks.lock("held").await.unwrap() })
        };
        until("waits", async || locks.inspect("held").await.unwrap().waiters.len() == 1).await;
        held.check().unwrap();
        held.release().await.unwrap();
        drop(waiting.await.unwrap());
    });
}

#[test]
fn a_restarted_server_has_every_hold_and_every_waiter() {
    let mut server = server();
    block_on(async {
        let locks = Locks::builder(&server.url()).session_ttl(30 * SECOND).open().await.unwrap();
        let held = locks.lock("k").await.unwrap();
        let waiting = {
            let locks = locks.clone();
            tokio::spawn(async move { locks.lock("k").await.unwrap() })
        };
        until("waits", async || locks.inspect("k").await.unwrap().waiters.len() == 1).await;
        server.kill();
        server.restart();
        until("it answers", async || locks.inspect("k").await.is_ok_and(|state| state.waiters.len() == 1)).await;
        held.check().unwrap();
        let fence = held.fence();
        held.release().await.unwrap();
        assert!(waiting.await.unwrap().fence() > fence);
    });
}

#[test]
fn a_schema_can_be_applied_by_ten_at_once_and_again() {
    let server = PostgresServer::start(Kind::V15);
    block_on(async {
        for _ in 0..2 {
            let all: Vec<_> = (0..10)
                .map(|_| Postgres::from_url(&server.url()).unwrap())
                .map(|store| tokio::spawn(async move { store.apply_schema().await }))
                .collect();
            for one in all {
                one.await.unwrap().unwrap();
            }
        }
        drop(locks(&server).await.lock("k").await.unwrap());
        // A newer one is not touched, and not used.
        server.psql("UPDATE stanchion.meta SET version = 2");
        let store = Postgres::from_url(&server.url()).unwrap();
        assert_eq!(store.apply_schema().await.unwrap_err().kind(), ErrorKind::Misconfigured);
        let error = Locks::open(&server.url()).await.unwrap_err();
        assert!(
            error.kind() == ErrorKind::Misconfigured && error.to_string().contains("update this program"),
            "{error}"
        );
    });
}

#[test]
fn what_cannot_be_used_says_why() {
    let server = PostgresServer::start(Kind::V15);
    block_on(async {
        let error = Locks::open(&server.url()).await.unwrap_err();
        assert!(
            error.kind() == ErrorKind::Misconfigured && error.to_string().contains("schema --store URL --apply"),
            "{error}"
        );
        let own = format!("{}?create_schema=true", server.url());
        drop(Locks::open(&own).await.unwrap().lock("k").await.unwrap());
        server.psql("CREATE ROLE nobody LOGIN");
        let stranger = server.url().replace("postgres@", "nobody@");
        let error = Locks::open(&stranger).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
        let standby = PostgresServer::standby_of(&server);
        let error = Locks::open(&standby.url()).await.unwrap_err();
        assert!(error.kind() == ErrorKind::Misconfigured && error.to_string().contains("standby"), "{error}");
        server.psql("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0");
        let latin = own.replace("/postgres?", "/latin?");
        let error = Locks::open(&latin).await.unwrap_err();
        assert!(error.kind() == ErrorKind::Misconfigured && error.to_string().contains("UTF-8"), "{error}");
    });
}

#[test]
fn what_is_left_behind_vanishes() {
    let server = server();
    block_on(async {
        let locks = locks(&server).await;
        for i in 0..30 {
            locks.lock(format!("k{i}")).await.unwrap().release().await.unwrap();
        }
        // Others died long ago, with a hold, a place in a queue, and idle keys.
        server.psql(
            "INSERT INTO stanchion.sessions VALUES ('\\x01', 'dead', 1000000, 1);
             INSERT INTO stanchion.keys (key, fence, token, session, at) VALUES (':dead', 5, '\\x02', '\\x01', 1);
             INSERT INTO stanchion.forced VALUES ('\\x09', '\\x01', ':x', 'why', 1);
             UPDATE stanchion.keys SET fence = 7 WHERE key LIKE ':k%'",
        );
        // As every beat does, now and then.
        let left = || {
            server.psql("SELECT stanchion.tidy(); SELECT (SELECT count(*) FROM stanchion.keys) + (SELECT count(*) FROM stanchion.forced) + (SELECT count(*) FROM stanchion.sessions WHERE owner = 'dead')")
        };
        until("all is gone", async || left().split_whitespace().last() == Some("0")).await;
        // What was forgotten still counts.
        assert_eq!(server.psql("SELECT fence_floor FROM stanchion.meta").trim(), "7");
        assert!(locks.lock("k1").await.unwrap().fence().get() > 7);
    });
}

/// A server whose users have set limits, or another isolation, takes the steps all the same.
#[test]
fn time_outs_and_isolation_of_the_database_change_nothing() {
    let server = PostgresServer::with(
        Kind::V15,
        &[("default_transaction_isolation", "serializable"), ("statement_timeout", "5s"), ("lock_timeout", "1s")],
    );
    server.psql(&Postgres::from_url(&server.url()).unwrap().schema_sql());
    block_on(async {
        let count = std::sync::Arc::new(std::sync::Mutex::new((0u32, 0u64)));
        let handles = [locks(&server).await, locks(&server).await];
        let tasks: Vec<_> = (0..8)
            .map(|task| {
                let (locks, count) = (handles[task % 2].clone(), count.clone());
                tokio::spawn(async move {
                    for _ in 0..25 {
                        let guard = locks.lock("k").wait(60 * SECOND).await.unwrap();
                        let before = {
                            let mut count = count.lock().unwrap();
                            assert!(guard.fence().get() > count.1, "fences rise");
                            count.1 = guard.fence().get();
                            count.0
                        };
                        tokio::task::yield_now().await;
                        count.lock().unwrap().0 = before + 1;
                        guard.release().await.unwrap();
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(count.lock().unwrap().0, 200, "one at a time");
    });
}

/// Whoever waits for a lock holds no transaction open.
#[test]
fn waiters_hold_up_no_index_and_no_vacuum() {
    let server = server();
    block_on(async {
        let (locks, other) = (locks(&server).await, locks(&server).await);
        let held = locks.lock("k").await.unwrap();
        let waiting = tokio::spawn(async move { other.lock("k").await.map(drop) });
        until("waits", async || locks.inspect("k").await.unwrap().waiters.len() == 1).await;
        server.psql("CREATE TABLE theirs AS SELECT g AS n FROM generate_series(1, 1000) g");
        server.psql("DELETE FROM theirs WHERE n % 2 = 0");
        server.psql("CREATE INDEX CONCURRENTLY theirs_n ON theirs (n)");
        server.psql("VACUUM theirs");
        let old =
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'stanchion' AND state LIKE '%transaction%'";
        assert_eq!(server.psql(old).trim(), "0");
        held.release().await.unwrap();
        waiting.await.unwrap().unwrap();
    });
}

/// Many cycles on few keys leave the tables as small as they were.
#[test]
fn rows_of_the_past_do_not_pile_up() {
    let server = server();
    block_on(async {
        let locks = locks(&server).await;
        let tasks: Vec<_> = (0..10)
            .map(|task| {
                let locks = locks.clone();
                tokio::spawn(async move {
                    for i in 0..1_000 {
                        let guard = locks.lock(format!("k{}", (task + i) % 20)).await.unwrap();
                        guard.release().await.unwrap();
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        for table in ["keys", "holds", "queue"] {
            server.psql(&format!("VACUUM stanchion.{table}"));
        }
        let rows = "SELECT (SELECT count(*) FROM stanchion.keys), (SELECT count(*) FROM stanchion.holds), (SELECT count(*) FROM stanchion.queue)";
        assert_eq!(server.psql(rows).trim(), "20|0|0");
        let size: u64 = server.psql("SELECT pg_total_relation_size('stanchion.keys')").trim().parse().unwrap();
        println!("20 keys after 10,000 cycles: {size} bytes");
        assert!(size < 4_000_000, "{size} bytes");
    });
}

/// Extending at the moment of the end races another's question: one of them has the key, never both.
#[test]
fn an_extension_at_the_end_never_makes_two_holders() {
    use stanchion::store::{
        AcquireOutcome, AcquireRequest, Demand, ExtendOutcome, OpenSession, Store, StoreTime, Term,
    };
    use stanchion::{Key, SessionId, TokenId};
    let server = server();
    block_on(async {
        let store = Postgres::from_url(&server.url()).unwrap();
        let session = SessionId::random().unwrap();
        let _stream = store.grants(session);
        store.open_session(OpenSession { session, ttl: 600 * SECOND, owner: "racer".into() }).await.unwrap();
        let request = move |key: &Key, term| AcquireRequest {
            key: key.clone(),
            token: TokenId::random().unwrap(),
            session,
            demand: Demand::MUTEX,
            term,
            enqueue: false,
            not_after: StoreTime::from_micros(i64::MAX as u64),
            metadata: None,
            trace: None,
        };
        let racing: Vec<_> = (0..20)
            .map(|racer| {
                let store = store.clone();
                let key = Key::new("", &format!("race{racer}")).unwrap();

                tokio::spawn(async move {
                    let (mut kept, mut taken) = (0, 0);
                    for round in 0..100u64 {
                        let first = request(&key, Term::Fixed(Duration::from_millis(10)));
                        assert!(matches!(
                            store.acquire(first.clone()).await.unwrap().outcome,
                            AcquireOutcome::Granted(_)
                        ));
                        tokio::time::sleep(Duration::from_micros(8_000 + 97 * round % 4_000)).await;
                        let second = request(&key, Term::Fixed(SECOND * 60));
                        let (extended, asked) =
                            tokio::join!(store.extend(&key, first.token, SECOND * 60), store.acquire(second.clone()));
                        let extended = extended.unwrap().outcome == ExtendOutcome::Extended;
                        let granted = matches!(asked.unwrap().outcome, AcquireOutcome::Granted(_));
                        assert!(!(extended && granted), "two holders");
                        kept += u32::from(extended);
                        taken += u32::from(granted);
                        for token in [first.token, second.token] {
                            store.release(&key, token, None).await.unwrap();
                        }
                    }
                    (kept, taken)
                })
            })
            .collect();
        let (mut kept, mut taken) = (0, 0);
        for racer in racing {
            let (k, t) = racer.await.unwrap();
            (kept, taken) = (kept + k, taken + t);
        }
        println!("2,000 races: {kept} extended, {taken} taken");
        assert!(kept > 0 && taken > 0, "it was a race: {kept} extended, {taken} taken");
    });
}

/// All connections for steps wait for a row; the session is kept all the same.
#[test]
fn a_crowd_of_steps_that_wait_delays_no_beat() {
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
        for one in crowd {
            drop(one.await.unwrap());
        }
        held.check().unwrap();
        let _in_doubt = released.await.unwrap();
        transaction.wait().unwrap();
        held.check().unwrap();
    });
}

/// A step that its caller gives up goes on at the server. Nothing else may wait behind it, least of all a beat.
#[test]
fn a_step_that_was_given_up_holds_up_nothing() {
    let server = server();
    block_on(async {
        let held = locks(&server).await.lock("k").await.unwrap();
        let mut transaction = sleeping_transaction(&server, held.fence().get(), 5, "SELECT").await;
        let store = Postgres::from_url(&server.url()).unwrap();
        let key = Key::new("", "k").unwrap();
        let waits = async || store.extend(&key, TokenId::random().unwrap(), SECOND).await;
        assert!(tokio::time::timeout(SECOND / 2, async { tokio::join!(waits(), waits()) }).await.is_err(), "both wait");
        let asked = Instant::now();
        store.beat(SessionId::random().unwrap()).await.unwrap();
        assert!(asked.elapsed() < 2 * SECOND, "it waited {:?}", asked.elapsed());
        transaction.wait().unwrap();
        // Both connections are used again.
        until("settled", async || connections(&server, "state = 'idle'") == connections(&server, "true")).await;
        let before = connections(&server, "true");
        let _both = tokio::join!(store.inspect(&key), store.inspect(&key));
        assert_eq!(connections(&server, "true"), before);
    });
}

/// Fifty tasks of one handle on ten keys and one key each, while connections are ended.
#[test]
fn many_callers_share_requests_and_never_a_key() {
    let server = PostgresServer::with(Kind::V15, &[("pg_stat_statements.track", "top")]);
    server.psql(&Postgres::from_url(&server.url()).unwrap().schema_sql());
    server.psql("CREATE EXTENSION pg_stat_statements");
    let calls = |of: &str| -> u64 {
        let calls = format!(
            "SELECT coalesce(sum(calls), 0) FROM pg_stat_statements WHERE query LIKE '%.{of}(%' AND query NOT LIKE '%pg_stat%'"
        );
        server.psql(&calls).trim().parse().unwrap()
    };
    const TASKS: usize = 50;
    const ROUNDS: usize = 20;
    const SHARED: usize = 10;
    block_on(async {
        let locks = Locks::builder(&server.url()).session_ttl(10 * SECOND).open().await.unwrap();
        let keys: Arc<Vec<_>> = Arc::new((0..SHARED).map(|_| (AtomicU64::new(0), AtomicU64::new(0))).collect());
        let tasks: Vec<_> = (0..TASKS)
            .map(|task| {
                let (locks, keys) = (locks.clone(), keys.clone());
                tokio::spawn(async move {
                    for round in 0..ROUNDS {
                        let at = (task + round) % SHARED;
                        let own = locks.lock(format!("own {task}")).await.unwrap();
                        let shared = locks.lock(format!("shared {at}")).await.unwrap();
                        let (count, last) = &keys[at];
                        // Read, give way, write: two holders at once would lose a count.
                        let before = count.load(Relaxed);
                        tokio::task::yield_now().await;
                        count.store(before + 1, Relaxed);
                        let fence = shared.fence().get();
                        assert!(last.swap(fence, Relaxed) < fence, "fences rise");
                        // What a broken connection leaves in doubt is ended in the background.
                        let _in_doubt = (shared.release().await, own.release().await);
                    }
                })
            })
            .collect();
        let ended = until_done(tasks, async || {
            server.psql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'stanchion'");
        })
        .await;
        assert!(ended > 0, "connections were ended meanwhile");
        let total: u64 = keys.iter().map(|(count, _)| count.load(Relaxed)).sum();
        assert_eq!(total, (TASKS * ROUNDS) as u64);
        until("nothing is left", async || locks.list("").await.unwrap().is_empty()).await;
        let (together, alone) = (calls("together"), calls("acquire") + calls("finish"));
        let steps = (TASKS * ROUNDS * 4) as u64;
        println!("{steps} steps: {together} calls of many, {alone} alone");
        assert!(together > 0 && together + alone < steps, "{together} calls of many, {alone} alone, {steps} steps");
    });
}

/// Does something now and then until all tasks have ended, and tells how often.
async fn until_done(tasks: Vec<tokio::task::JoinHandle<()>>, now_and_then: impl AsyncFn()) -> u32 {
    let mut done = 0;
    for task in tasks {
        while !task.is_finished() {
            now_and_then().await;
            done += 1;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        task.await.unwrap();
    }
    done
}

/// Steps that wait for a key that a transaction has checked hold up no step on another.
#[test]
fn steps_on_a_key_that_a_transaction_keeps_hold_up_no_others() {
    let server = server();
    block_on(async {
        let locks = locks(&server).await;
        let held = locks.lock("k").await.unwrap();
        locks.lock("other").await.unwrap().release().await.unwrap();
        let mut transaction = sleeping_transaction(&server, held.fence().get(), 4, "SELECT").await;
        let crowd: Vec<_> = (0..12)
            .map(|_| {
                let locks = locks.clone();
                tokio::spawn(async move { locks.lock("k").await.unwrap().release().await.unwrap() })
            })
            .collect();
        until("they wait", async || connections(&server, "wait_event_type = 'Lock'") == 12).await;
        let asked = Instant::now();
        for _ in 0..20 {
            locks.lock("other").await.unwrap().release().await.unwrap();
        }
        assert!(transaction.try_wait().unwrap().is_none(), "the transaction lasts");
        assert!(asked.elapsed() < 2 * SECOND, "{:?}", asked.elapsed());
        transaction.wait().unwrap();
        held.release().await.unwrap();
        for one in crowd {
            one.await.unwrap();
        }
    });
}

#[test]
fn the_example_writes_as_the_holder_and_is_refused_afterwards() {
    let server = server();
    block_on(example::run(&server.url())).unwrap();
    assert_eq!(server.psql("SELECT cents FROM payouts").trim(), "4200");
}

fn of_users(
    server: &PostgresServer,
    database: &str,
    url: &str,
) -> stanchion::Result<(Postgres, deadpool_postgres::Pool)> {
    let mut settings: tokio_postgres::Config = server.url().parse().unwrap();
    settings.dbname(database);
    let manager = deadpool_postgres::Manager::new(settings, tokio_postgres::NoTls);
    let pool = deadpool_postgres::Pool::builder(manager).max_size(2).build().unwrap();
    let get = {
        let pool = pool.clone();
        move || {
            let pool = pool.clone();
            async move { pool.get().await }
        }
    };
    Ok((Postgres::from_pool(url, get, |connection| connection)?, pool))
}

/// The user's work has all connections of the pool: nothing is lost, and steps go on when it is done.
#[test]
fn a_pool_that_is_used_up_ends_no_session() {
    let server = server();
    block_on(async {
        let (store, pool) = of_users(&server, "postgres", &server.url()).unwrap();
        let locks = Locks::builder_with_store(store).session_ttl(2 * SECOND).open().await.unwrap();
        let (held, waited_for) = (locks.lock("held").await.unwrap(), locks.lock("waited").await.unwrap());
        let waiting = {
            let locks = locks.clone();
            tokio::spawn(async move { locks.lock("waited").await.unwrap() })
        };
        until("it waits", async || locks.inspect("waited").await.unwrap().waiters.len() == 1).await;
        until("waiting takes none of the connections", async || pool.status().available == pool.status().size).await;
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
fn a_pool_of_another_database_is_refused() {
    let server = server();
    server.psql("CREATE DATABASE other");
    block_on(async {
        let (store, _pool) = of_users(&server, "other", &server.url()).unwrap();
        let fault = Locks::with_store(store).await.unwrap_err();
        assert_eq!(fault.kind(), ErrorKind::Misconfigured, "without a schema: {fault}");
        let url = format!("{}other", server.url().strip_suffix("postgres").unwrap());
        server.psql_in("other", &Postgres::from_url(&url).unwrap().schema_sql());
        let (store, _pool) = of_users(&server, "other", &server.url()).unwrap();
        let fault = Locks::with_store(store).await.unwrap_err();
        assert!(fault.to_string().contains("another database"), "{fault}");
        let (store, _pool) = of_users(&server, "other", &url).unwrap();
        Locks::with_store(store).await.unwrap().lock("k").await.unwrap().release().await.unwrap();
    });
    let outside = of_users(&server, "postgres", &server.url()).unwrap_err();
    assert_eq!(outside.kind(), ErrorKind::InvalidArgument);
}
