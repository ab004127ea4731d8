//! What steps cost, and what they leave behind.

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
        // Nothing else but the beats, and housekeeping, and the look at a new connection where they meet a step.
        let others = server.psql(
            "SELECT query FROM pg_stat_statements WHERE toplevel AND query NOT LIKE '%acquire(%' \
             AND query NOT LIKE '%finish(%' AND query NOT LIKE '%beat(%' AND query NOT LIKE '%tidy(%' \
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
        // With time: how many requests are sent is the question, not how long they take on a busy machine.
        let retry = RetryPolicy { attempt: 60 * SECOND, total: 60 * SECOND, ..RetryPolicy::default() };
        let locks = Locks::builder(&server.url()).session_ttl(60 * SECOND).retry(retry).open().await.unwrap();
        for _ in 0..20 {
            locks.lock("k").await.unwrap().release().await.unwrap();
        }
        assert_eq!(sent(), 0, "nobody waits");
        let mut held = locks.lock("k").await.unwrap();
        let waiting: Vec<_> = (0..WAITERS)
            .map(|_| {
                let locks = locks.clone();
                tokio::spawn(async move { locks.lock("k").await.unwrap().release().await.unwrap() })
            })
            .collect();
        until("all wait", async || {
            // Who counts stops this thread, on which they are: they need time.
            tokio::time::sleep(Duration::from_millis(50)).await;
            server.psql("SELECT count(*) FROM stanchion.queue") == WAITERS.to_string()
        })
        .await;
        assert_eq!(locks.inspect("k").await.unwrap().waiters.len(), WAITERS);
        let most = connections(&server, "true");
        assert!(most <= 18, "{most} connections");
        // Each is one transaction, of as many as were there to enter.
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
        for one in waiting {
            one.await.unwrap();
        }
        assert_eq!(sent(), WAITERS);
        held = locks.lock("k").await.unwrap();
        drop(held);
    });
}

/// A plan that seems dear is compiled by the server, which takes longer than all that it does.
#[test]
fn no_operation_is_compiled() {
    let server = PostgresServer::with(Kind::V15, &[("pg_stat_statements.track", "all")]);
    server.psql(&Postgres::from_url(&server.url()).unwrap().schema_sql());
    server.psql("CREATE EXTENSION pg_stat_statements");
    block_on(async {
        let (locks, other) = (locks(&server).await, locks(&server).await);
        let held = locks.lock("k").wait(SECOND).ttl(60 * SECOND).await.unwrap();
        let waiting = tokio::spawn(async move { other.lock("k").await.unwrap() });
        until("it waits", async || locks.inspect("k").await.unwrap().waiters.len() == 1).await;
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

/// What a queue has of dead waiters is passed over at once, by a hand-off and by a look.
#[test]
fn many_expired_waiters_cost_one_statement() {
    let server = PostgresServer::with(Kind::V15, &[("pg_stat_statements.track", "all")]);
    server.psql(&Postgres::from_url(&server.url()).unwrap().schema_sql());
    server.psql("CREATE EXTENSION pg_stat_statements");
    const DEAD: usize = 5_000;
    let deletions = || -> usize {
        let calls = "SELECT coalesce(sum(calls), 0) FROM pg_stat_statements WHERE NOT toplevel \
                     AND query LIKE 'DELETE FROM %.queue %'";
        server.psql(calls).parse().unwrap()
    };
    // As if they had died after they were looked at for the last time.
    let enter_the_dead = || {
        server.psql(&format!(
            "INSERT INTO stanchion.queue (key, place, token, session, bound, units, capacity, at) OVERRIDING SYSTEM VALUE \
             SELECT ':k', -n, int8send(n), '\\xdead', true, 1, 1, 0 FROM generate_series(1, {DEAD}) n; \
             UPDATE stanchion.keys SET waiting = waiting + {DEAD}, busy = true; SELECT pg_stat_statements_reset()"
        ));
    };
    let all_passed = || {
        let left = "SELECT waiting + (SELECT count(*) FROM stanchion.queue) FROM stanchion.keys";
        assert_eq!(server.psql(left), "0");
        // Housekeeping may have come too.
        assert!((1..=9).contains(&deletions()), "{} deletions for {DEAD}", deletions());
    };
    block_on(async {
        let (one, other) = (locks(&server).await, locks(&server).await);
        let held = one.lock("k").await.unwrap();
        let waiting = tokio::spawn(async move { other.lock("k").await.unwrap() });
        until("it waits", async || one.inspect("k").await.unwrap().waiters.len() == 1).await;
        enter_the_dead();
        held.release().await.unwrap();
        let next = waiting.await.unwrap();
        all_passed();
        enter_the_dead();
        assert_eq!(one.inspect("k").await.unwrap().waiters.len(), 0);
        all_passed();
        next.release().await.unwrap();
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

/// Two handles, a hundred tasks each, want one key, while connections are ended: who is asked for together loses nothing.
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
                    // A broken connection may leave one without an answer: it asks again.
                    let guard = loop {
                        if let Ok(guard) = locks.lock("k").await {
                            break guard;
                        }
                    };
                    let (count, last) = &*key;
                    let before = count.load(Relaxed);
                    tokio::task::yield_now().await;
                    count.store(before + 1, Relaxed);
                    let fence = guard.fence().get();
                    assert!(last.swap(fence, Relaxed) < fence, "fences rise");
                    let _in_doubt = guard.release().await;
                })
            })
            .collect();
        let ended = until_done(tasks, async || {
            server.psql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'stanchion'");
        })
        .await;
        assert!(ended > 0, "connections were ended meanwhile");
        assert_eq!(key.0.load(Relaxed), TASKS as u64);
        until("nothing is left", async || handles[0].list("").await.unwrap().is_empty()).await;
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

/// Whoever waits for a lock holds no transaction open.
#[test]
fn waiters_do_not_block_index_or_vacuum() {
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

/// A service may have a key for each thing that it does, a thousand in a second.
#[test]
fn idle_keys_are_deleted_as_fast_as_they_come() {
    let server = server();
    block_on(async {
        let locks = locks(&server).await;
        let held = locks.lock("n3").await.unwrap();
        server.psql("INSERT INTO stanchion.keys (key, fence) SELECT ':o' || n, n FROM generate_series(1, 9000) n");
        let mut rounds = 0;
        until("only what is held is left", async || {
            rounds += 1;
            server.psql("SELECT stanchion.tidy(); SELECT string_agg(key, ' ') FROM stanchion.keys").trim() == ":n3"
        })
        .await;
        // One may have met another's, and one may have begun in the middle.
        assert!(rounds <= 3, "{rounds} rounds");
        assert_eq!(server.psql("SELECT fence_floor FROM stanchion.meta"), "9000");
        held.check().unwrap();
    });
}

/// Steps that share a call share no fault.
#[test]
fn key_at_its_highest_fence_fails_alone() {
    let server = server();
    server.psql(&format!("INSERT INTO stanchion.keys (key, fence) VALUES (':spent', {})", i64::MAX));
    block_on(async {
        let locks = locks(&server).await;
        // More than once: the first calls take so long that they do little.
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
