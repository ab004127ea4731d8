//! Checks the cost of operations, and that old rows are deleted.

use super::*;

#[test]
fn acquire_and_release_are_one_statement_each() {
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
        // The only other statements are renewals, housekeeping, and the check of a new connection.
        let others = server.psql(
            "SELECT query FROM pg_stat_statements WHERE toplevel AND query NOT LIKE '%acquire(%' \
             AND query NOT LIKE '%finish(%' AND query NOT LIKE '%renew_session(%' AND query NOT LIKE '%tidy(%' \
             AND query NOT LIKE '%pg_is_in_recovery%' AND query NOT LIKE '%pg_stat_statements%'",
        );
        assert_eq!(others.trim(), "");
    });
}

#[test]
fn only_hand_offs_notify() {
    let server = PostgresServer::with(Kind::V15, &[("pg_stat_statements.track", "all")]);
    server.psql(&Postgres::from_url(&server.url()).unwrap().schema_sql());
    server.psql("CREATE EXTENSION pg_stat_statements");
    const WAITERS: usize = 1_000;
    let sent = || -> usize {
        let sent = server.psql("SELECT coalesce(sum(calls), 0) FROM pg_stat_statements WHERE query LIKE '%pg_notify%' AND NOT toplevel AND query NOT LIKE '%pg_stat%'");
        sent.trim().parse().unwrap()
    };
    block_on(async {
        // The limits are long, because this test counts requests and must not depend on the speed of the machine.
        let retry = RetryPolicy { attempt: 60 * SECOND, total: 60 * SECOND, ..RetryPolicy::default() };
        let locks = Locks::builder(&server.url()).session_ttl(60 * SECOND).retry(retry).open().await.unwrap();
        for _ in 0..20 {
            locks.lock("k").await.unwrap().release().await.unwrap();
        }
        assert_eq!(sent(), 0, "nobody waits, so nothing is sent");
        let mut held = locks.lock("k").await.unwrap();
        let waiting: Vec<_> = (0..WAITERS)
            .map(|_| {
                let locks = locks.clone();
                tokio::spawn(async move { locks.lock("k").await.unwrap().release().await.unwrap() })
            })
            .collect();
        until("all tasks wait", async || {
            // The count below blocks the thread that also runs the tasks, so give the tasks some time.
            tokio::time::sleep(Duration::from_millis(50)).await;
            server.psql("SELECT count(*) FROM stanchion.queue") == WAITERS.to_string()
        })
        .await;
        assert_eq!(locks.inspect("k").await.unwrap().waiters.len(), WAITERS);
        let most = connections(&server, "true");
        assert!(most <= 18, "{most} connections");
        // Each request is one transaction for all calls that were queued when it left.
        let entered = server.psql(
            "SELECT sum(calls) FROM pg_stat_statements WHERE toplevel \
             AND (query LIKE '%.acquire(%' OR query LIKE '%.together(%') \
             AND query NOT LIKE '%pg_stat%'",
        );
        let entered = entered.trim().parse::<usize>().unwrap() - 21;
        println!("{entered} requests for {WAITERS} waiters");
        assert!(entered < WAITERS / 5, "{entered} requests for {WAITERS} waiters");
        held.check().unwrap();
        held.release().await.unwrap();
        for task in waiting {
            task.await.unwrap();
        }
        assert_eq!(sent(), WAITERS);
        held = locks.lock("k").await.unwrap();
        drop(held);
    });
}

/// The server compiles a plan whose estimated cost is high, and the compilation takes longer than the operation.
#[test]
fn no_operation_is_compiled() {
    let server = PostgresServer::with(Kind::V15, &[("pg_stat_statements.track", "all")]);
    server.psql(&Postgres::from_url(&server.url()).unwrap().schema_sql());
    server.psql("CREATE EXTENSION pg_stat_statements");
    block_on(async {
        let (locks, other) = (locks(&server).await, locks(&server).await);
        let held = locks.lock("k").wait(SECOND).ttl(60 * SECOND).await.unwrap();
        let waiting = tokio::spawn(async move { other.lock("k").await.unwrap() });
        until("the other handle waits", async || locks.inspect("k").await.unwrap().waiters.len() == 1).await;
        held.extend(50 * SECOND).await.unwrap();
        held.release().await.unwrap();
        let held = waiting.await.unwrap();
        let fence = held.fence();
        locks.force_release("k", fence, "stuck").await.unwrap();
        assert_eq!(locks.list("").await.unwrap().len(), 0);
        server.psql("SELECT stanchion.tidy()");
        locks.close().await.unwrap();
    });
    let compiled = "SELECT count(*) || ' of ' || sum(calls), sum(jit_functions) FROM pg_stat_statements \
                    WHERE query LIKE '%stanchion%'";
    let compiled = server.psql(compiled);
    assert!(compiled.ends_with("|0"), "{compiled}");
}

/// A hand-off and a read each remove all expired waiters at the front of a queue with one statement.
#[test]
fn many_expired_waiters_cost_one_statement() {
    let server = PostgresServer::with(Kind::V15, &[("pg_stat_statements.track", "all")]);
    server.psql(&Postgres::from_url(&server.url()).unwrap().schema_sql());
    server.psql("CREATE EXTENSION pg_stat_statements");
    const EXPIRED: usize = 5_000;
    let deletions = || -> usize {
        let calls = "SELECT coalesce(sum(calls), 0) FROM pg_stat_statements WHERE NOT toplevel \
                     AND query LIKE 'DELETE FROM %.queue %'";
        server.psql(calls).parse().unwrap()
    };
    // These waiters look as if their session had expired since the last operation.
    let insert_expired = || {
        server.psql(&format!(
            "INSERT INTO stanchion.queue (key, place, token, session, bound, units, capacity, at) OVERRIDING SYSTEM VALUE \
             SELECT ':k', -n, int8send(n), '\\xdead', true, 1, 1, 0 FROM generate_series(1, {EXPIRED}) n; \
             UPDATE stanchion.keys SET waiting = waiting + {EXPIRED}, busy = true; SELECT pg_stat_statements_reset()"
        ));
    };
    let assert_removed = || {
        let left = "SELECT waiting + (SELECT count(*) FROM stanchion.queue) FROM stanchion.keys";
        assert_eq!(server.psql(left), "0");
        // Housekeeping may have run too.
        assert!((1..=9).contains(&deletions()), "{} deletions for {EXPIRED} waiters", deletions());
    };
    block_on(async {
        let (one, other) = (locks(&server).await, locks(&server).await);
        let held = one.lock("k").await.unwrap();
        let waiting = tokio::spawn(async move { other.lock("k").await.unwrap() });
        until("the other handle waits", async || one.inspect("k").await.unwrap().waiters.len() == 1).await;
        insert_expired();
        held.release().await.unwrap();
        let next = waiting.await.unwrap();
        assert_removed();
        insert_expired();
        assert_eq!(one.inspect("k").await.unwrap().waiters.len(), 0);
        assert_removed();
        next.release().await.unwrap();
    });
}

/// Fifty tasks of one handle use ten shared keys and one key of their own each, while connections break.
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
                        let own = lock_at_last(&locks, &format!("own {task}")).await;
                        let shared = lock_at_last(&locks, &format!("shared {at}")).await;
                        let (count, last) = &keys[at];
                        // Read, yield, write: two holders at the same time would lose a count.
                        let before = count.load(Relaxed);
                        tokio::task::yield_now().await;
                        count.store(before + 1, Relaxed);
                        let fence = shared.fence().get();
                        assert!(last.swap(fence, Relaxed) < fence, "fences increase");
                        // The keeper retries releases whose outcome is unknown after a broken connection.
                        let _ = (shared.release().await, own.release().await);
                    }
                })
            })
            .collect();
        let ended = until_done(tasks, async || {
            server.psql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'stanchion'");
        })
        .await;
        assert!(ended > 0, "connections broke during the test");
        let total: u64 = keys.iter().map(|(count, _)| count.load(Relaxed)).sum();
        assert_eq!(total, (TASKS * ROUNDS) as u64);
        until("nothing is left", async || locks.list("").await.unwrap().is_empty()).await;
        let (batches, singles) = (calls("together"), calls("acquire") + calls("finish"));
        let operations = (TASKS * ROUNDS * 4) as u64;
        let counts = format!("{operations} operations in {batches} batches and {singles} single requests");
        println!("{counts}");
        assert!(batches > 0 && batches + singles < operations, "{counts}");
    });
}

/// A hundred tasks of each of two handles want one key, while connections break.
#[test]
fn two_busy_handles_share_a_key_without_loss() {
    let server = server();
    const TASKS: usize = 200;
    block_on(async {
        let open = async || Locks::builder(&server.url()).session_ttl(30 * SECOND).open().await.unwrap();
        let handles = [open().await, open().await];
        let key = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
        let tasks: Vec<_> = (0..TASKS)
            .map(|task| {
                let (locks, key) = (handles[task % 2].clone(), key.clone());
                tokio::spawn(async move {
                    let guard = lock_at_last(&locks, "k").await;
                    let (count, last) = &*key;
                    let before = count.load(Relaxed);
                    tokio::task::yield_now().await;
                    count.store(before + 1, Relaxed);
                    let fence = guard.fence().get();
                    assert!(last.swap(fence, Relaxed) < fence, "fences increase");
                    let _ = guard.release().await; // The keeper retries a release whose outcome is unknown.
                })
            })
            .collect();
        let ended = until_done(tasks, async || {
            server.psql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'stanchion'");
        })
        .await;
        assert!(ended > 0, "connections broke during the test");
        assert_eq!(key.0.load(Relaxed), TASKS as u64);
        until("nothing is left", async || handles[0].list("").await.unwrap().is_empty()).await;
    });
}

/// Locks a key while connections break: on a slow machine each attempt of a request may lose its answer, and the call fails.
async fn lock_at_last(locks: &Locks, key: &str) -> stanchion::Guard {
    loop {
        match locks.lock(key).await {
            Ok(guard) => return guard,
            Err(error) => assert!(error.is_transient(), "{error:?}"),
        }
    }
}

/// Repeats an action every 300 ms until all tasks have ended. Returns the number of repetitions.
async fn until_done(tasks: Vec<tokio::task::JoinHandle<()>>, action: impl AsyncFn()) -> u32 {
    let mut done = 0;
    for task in tasks {
        while !task.is_finished() {
            action().await;
            done += 1;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        task.await.unwrap();
    }
    done
}

/// A waiter keeps no transaction open, which would delay `CREATE INDEX CONCURRENTLY` and `VACUUM`.
#[test]
fn waiters_do_not_block_index_or_vacuum() {
    let server = server();
    block_on(async {
        let (locks, other) = (locks(&server).await, locks(&server).await);
        let held = locks.lock("k").await.unwrap();
        let waiting = tokio::spawn(async move { other.lock("k").await.map(drop) });
        until("the other handle waits", async || locks.inspect("k").await.unwrap().waiters.len() == 1).await;
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

/// Many locks and releases of a few keys do not make the tables grow.
#[test]
#[ignore = "long"]
fn old_rows_do_not_accumulate() {
    let server = server();
    block_on(async {
        let locks = locks(&server).await;
        let tasks: Vec<_> = (0..10)
            .map(|task| {
                let locks = locks.clone();
                tokio::spawn(async move {
                    for i in 0..2_000 {
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
        println!("20 keys after 20,000 cycles: {size} bytes");
        assert!(size < 4_000_000, "{size} bytes");
    });
}

#[test]
fn leftovers_of_expired_sessions_are_deleted() {
    let server = server();
    block_on(async {
        let locks = locks(&server).await;
        for i in 0..30 {
            locks.lock(format!("k{i}")).await.unwrap().release().await.unwrap();
        }
        // A session expired long ago and left a hold and a force-released token. The other keys are idle.
        server.psql(
            "INSERT INTO stanchion.sessions VALUES ('\\x01', 'dead', 1000000, 1);
             INSERT INTO stanchion.keys (key, fence, token, session, at) VALUES (':dead', 5, '\\x02', '\\x01', 1);
             INSERT INTO stanchion.forced VALUES ('\\x09', '\\x01', ':x', 'why', 1);
             UPDATE stanchion.keys SET fence = 7 WHERE key LIKE ':k%'",
        );
        // A renewal does this from time to time.
        let left = || {
            server.psql("SELECT stanchion.tidy(); SELECT (SELECT count(*) FROM stanchion.keys) + (SELECT count(*) FROM stanchion.forced) + (SELECT count(*) FROM stanchion.sessions WHERE owner = 'dead')")
        };
        until("all leftovers are deleted", async || left().split_whitespace().last() == Some("0")).await;
        // The floor still covers the fences of the deleted keys.
        assert_eq!(server.psql("SELECT fence_floor FROM stanchion.meta").trim(), "7");
        assert!(locks.lock("k1").await.unwrap().fence().get() > 7);
    });
}

/// A service may use a key for each item of its work, a thousand per second.
#[test]
fn idle_keys_are_deleted_as_fast_as_they_come() {
    let server = server();
    block_on(async {
        let locks = locks(&server).await;
        let held = locks.lock("n3").await.unwrap();
        server.psql("INSERT INTO stanchion.keys (key, fence) SELECT ':o' || n, n FROM generate_series(1, 9000) n");
        let mut rounds = 0;
        until("only the held key is left", async || {
            rounds += 1;
            server.psql("SELECT stanchion.tidy(); SELECT string_agg(key, ' ') FROM stanchion.keys").trim() == ":n3"
        })
        .await;
        // One round may have met a round of another process, and one may have begun in the middle of the keys.
        assert!(rounds <= 3, "{rounds} rounds");
        assert_eq!(server.psql("SELECT fence_floor FROM stanchion.meta"), "9000");
        held.check().unwrap();
    });
}

/// Operations that share a batch do not share errors.
#[test]
fn highest_fence_fails_alone() {
    let server = server();
    server.psql(&format!("INSERT INTO stanchion.keys (key, fence) VALUES (':spent', {})", i64::MAX));
    block_on(async {
        let locks = locks(&server).await;
        // Repeat this, because the first batches of a connection are slow and skip most of their calls.
        for _ in 0..10 {
            let tasks: Vec<_> = (0..40)
                .map(|task| {
                    let locks = locks.clone();
                    let key = if task % 8 == 7 { "spent".to_owned() } else { format!("k{task}") };
                    tokio::spawn(async move { (key.clone(), locks.lock(key).await.map(drop)) })
                })
                .collect();
            for task in tasks {
                let (key, outcome) = task.await.unwrap();
                match outcome {
                    Ok(()) => assert_ne!(key, "spent"),
                    Err(fault) => {
                        assert!(key == "spent" && fault.kind() == ErrorKind::Misconfigured, "{key}: {fault}");
                    }
                }
            }
        }
    });
}
