//! Checks fences in transactions of the user, keys that such a transaction blocks, and races for a hold.

use std::task::Poll;

use super::*;

#[allow(dead_code, reason = "the test does not call main")]
#[path = "../../../../stanchion/examples/postgres_fence.rs"]
mod example;

#[test]
fn only_the_holder_writes_after_check_fence() {
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
                until("the other handle waits", async || locks.inspect("it's").await.unwrap().waiters.len() == 1).await;
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
fn check_fence_reserves_the_key_until_commit() {
    let server = server();
    block_on(async {
        let (locks, other) = (locks(&server).await, locks(&server).await);
        let guard = locks.lock("k").await.unwrap();
        let fence = guard.fence().get();
        server.psql("CREATE TABLE written (at timestamptz)");
        let mut transaction =
            sleeping_transaction(&server, fence, 4, "INSERT INTO written VALUES (clock_timestamp())").await;
        // The release is sent while the transaction locks the row, and takes effect afterwards.
        let released = tokio::spawn(guard.release());
        let got = other.lock("k").wait(20 * SECOND).await.unwrap();
        assert_eq!(
            server.psql("SELECT count(*) FROM written").trim(),
            "1",
            "the transaction has ended before the grant"
        );
        assert!(got.fence().get() > fence);
        released.await.unwrap().unwrap();
        assert!(transaction.wait().unwrap().success());
    });
}

/// Creates a function that returns whether `check_fence` accepts a fence of `k`.
fn create_accepts(server: &PostgresServer) {
    server.psql(
        "CREATE FUNCTION accepts(fence bigint) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN \
         PERFORM stanchion.check_fence('k', fence); RETURN true; \
         EXCEPTION WHEN SQLSTATE 'SF001' THEN RETURN false; END $$",
    );
}

/// A process uses the fences of a hold that lingers one after the other, and the server sees only the checks.
#[test]
fn check_fence_refuses_older_local_fence() {
    use stanchion::store::{AdoptOutcome, AdoptRequest};
    let server = server();
    create_accepts(&server);
    block_on(async {
        let mut holder = Holder::begin(&server.url()).await;
        let accepts = |fence: u64| server.psql(&format!("SELECT accepts({fence})")) == "t";
        let first = holder.fence;
        assert!(accepts(first) && !accepts(first + 1), "a hold that does not linger has one fence");
        tokio::time::sleep(Duration::from_millis(2)).await;
        let newest = holder.mark().await;
        assert!(newest > first + 2, "{first} to {newest}");
        assert!(!accepts(first - 1) && accepts(first), "the fences begin with that of the hold");
        assert!(accepts(first + 2) && accepts(first + 2), "one task checks twice");
        assert!(!accepts(first + 1) && !accepts(first), "earlier tasks are late");
        // A transaction that is rolled back has changed nothing.
        server.psql(&format!("BEGIN; SELECT stanchion.check_fence('k', {newest}); ROLLBACK"));
        assert!(accepts(first + 2) && accepts(newest) && !accepts(newest - 1));
        assert!(!accepts(newest + 1), "the process may not use this fence yet");
        tokio::time::sleep(Duration::from_millis(2)).await;
        assert!(holder.mark().await > newest && accepts(newest + 1));

        let newest = holder.mark().await;
        let request = AdoptRequest {
            key: k(),
            from: holder.token,
            to: TokenId::random().unwrap(),
            session: holder.session,
            not_after: StoreTime::from_micros(i64::MAX as u64),
        };
        let to = request.to;
        let AdoptOutcome::Adopted { granted, .. } = holder.store.adopt(request).await.unwrap().outcome else {
            panic!()
        };
        (holder.token, holder.fence) = (to, granted.fence.get());
        let adopted = holder.fence;
        assert!(adopted > newest && accepts(adopted), "{newest}, then {adopted}");
        assert!(!accepts(newest) && !accepts(adopted + 1), "the adopted hold has one fence");
        tokio::time::sleep(Duration::from_millis(2)).await;
        let newest = holder.mark().await;
        assert!(accepts(adopted) && accepts(newest));
        server.psql("UPDATE stanchion.sessions SET expires = 0");
        assert!(!accepts(newest), "the session has expired");
    });
}

/// The next task of a process checks its fence while the transaction of the task before is open.
#[test]
fn check_fence_makes_the_next_task_wait() {
    let server = server();
    create_accepts(&server);
    block_on(async {
        let holder = Holder::begin(&server.url()).await;
        tokio::time::sleep(Duration::from_millis(2)).await;
        holder.mark().await;
        server.psql("CREATE TABLE written (at timestamptz)");
        let (task, next) = (holder.fence + 1, holder.fence + 2);
        let then = "INSERT INTO written VALUES (clock_timestamp())";
        let mut transaction = sleeping_transaction(&server, task, 3, then).await;
        let checked = format!("BEGIN; SELECT stanchion.check_fence('k', {next}); SELECT count(*) FROM written; COMMIT");
        let written = server.psql(&checked);
        assert!(written.ends_with('1'), "the next task began before the transaction had ended: {written}");
        assert!(transaction.wait().unwrap().success());
        assert_eq!(server.psql(&format!("SELECT accepts({task})")), "f", "the task is late now");
    });
}

/// A process grants a key that lingers to its tasks without the server, which accepts the fence of each grant.
#[test]
fn check_fence_accepts_local_grants() {
    let server = server();
    create_accepts(&server);
    block_on(async {
        let locks = locks(&server).await;
        let lock = || locks.lock("k").linger(30 * SECOND);
        let holder = async || locks.inspect("k").await.unwrap().holders.into_iter().next();
        until("the key lingers", async || {
            let guard = lock().await.unwrap();
            tokio::time::sleep(Duration::from_millis(2)).await;
            guard.release().await.unwrap();
            holder().await.is_some_and(|holder| holder.lingers)
        })
        .await;
        let accepts = |fence: u64| server.psql(&format!("SELECT accepts({fence})")) == "t";
        let mut last = 0;
        for _ in 0..20 {
            let guard = lock().await.unwrap();
            let fence = guard.fence().get();
            assert!(accepts(fence) && !accepts(last), "{fence} after {last}");
            last = fence;
            guard.release().await.unwrap();
        }
        assert!(holder().await.unwrap().fence.get() < last, "the last grants were local");
    });
}

#[test]
fn example_writes_as_the_holder() {
    let server = server();
    block_on(example::run(&server.url())).unwrap();
    assert_eq!(server.psql("SELECT cents FROM payouts").trim(), "4200");
}

/// Operations wait for a key whose fence a transaction has checked, and operations on other keys continue.
#[test]
fn blocked_key_does_not_block_other_keys() {
    let server = server();
    block_on(async {
        let locks = locks(&server).await;
        let held = locks.lock("k").await.unwrap();
        locks.lock("other").await.unwrap().release().await.unwrap();
        let mut transaction = sleeping_transaction(&server, held.fence().get(), 6, "SELECT").await;
        let crowd: Vec<_> = (0..40)
            .map(|_| {
                let locks = locks.clone();
                tokio::spawn(async move { locks.lock("k").await.map(drop) })
            })
            .collect();
        until("an operation waits", async || connections(&server, "wait_event_type = 'Lock'") > 0).await;
        let start = Instant::now();
        for _ in 0..20 {
            locks.lock("other").await.unwrap().release().await.unwrap();
        }
        // Callers that gave up may leave abandoned requests at the server.
        let waiting = connections(&server, "wait_event_type = 'Lock'");
        assert!((1..=3).contains(&waiting), "{waiting} connections wait for one key");
        assert!(transaction.try_wait().unwrap().is_none(), "the transaction is still open");
        assert!(start.elapsed() < 4 * SECOND, "{:?}", start.elapsed());
        transaction.wait().unwrap();
        held.release().await.unwrap();
        // A call may have failed because the transaction blocked the key for too long.
        for call in crowd {
            drop(call.await.unwrap());
        }
    });
}

/// Many polls may wait for a blocked key. They have separate connections, so other operations continue.
#[test]
fn polls_of_a_blocked_key_do_not_block_others() {
    let server = server();
    block_on(async {
        let store = Postgres::from_url(&server.url()).unwrap();
        let locks = Locks::builder_with_store(store.clone()).session_ttl(30 * SECOND).open().await.unwrap();
        let held = locks.lock("k").await.unwrap();
        let mut transaction = sleeping_transaction(&server, held.fence().get(), 4, "SELECT").await;
        let polls: Vec<_> = (0..40)
            .map(|_| {
                let (store, key) = (store.clone(), held.key().clone());
                tokio::spawn(async move { store.poll(&key, &[TokenId::random().unwrap()]).await })
            })
            .collect();
        until("some polls wait", async || connections(&server, "wait_event_type = 'Lock'") >= 4).await;
        for _ in 0..20 {
            locks.lock("other").await.unwrap().release().await.unwrap();
        }
        assert!(transaction.try_wait().unwrap().is_none(), "the transaction is still open");
        assert!(transaction.wait().unwrap().success());
        for poll in polls {
            assert_eq!(poll.await.unwrap().unwrap().outcome, [PollOutcome::Gone]);
        }
    });
}

/// Many calls of one process queue for a key that a transaction blocks. The release of its holder goes before them.
#[test]
fn release_goes_before_queued_acquires() {
    let server = server();
    block_on(async {
        let retry = RetryPolicy { attempt: 30 * SECOND, no_wait: 30 * SECOND, ..RetryPolicy::default() };
        let locks = Locks::builder(&server.url()).session_ttl(30 * SECOND).retry(retry).open().await.unwrap();
        let held = locks.lock("k").await.unwrap();
        let mut transaction = sleeping_transaction(&server, held.fence().get(), 1, "SELECT").await;
        let wants = || {
            let locks = locks.clone();
            tokio::spawn(async move { locks.try_lock("k").await.unwrap().is_some() })
        };
        let mut crowd = vec![wants()];
        until("the first call waits", async || connections(&server, "wait_event_type = 'Lock'") == 1).await;
        crowd.extend((0..100).map(|_| wants()));
        tokio::task::yield_now().await;
        let released = tokio::spawn(held.release());
        assert!(transaction.wait().unwrap().success());
        let mut granted = 0;
        for call in crowd {
            granted += u32::from(call.await.unwrap());
        }
        assert!(granted > 0, "the release came after all acquires, so none of them got the key");
        assert_eq!(released.await.unwrap().unwrap(), Released::Now);
    });
}

/// A caller that never polls its future again must not block the calls of other callers.
#[test]
fn unpolled_call_blocks_nothing() {
    let server = server();
    block_on(async {
        let locks = locks(&server).await;
        let held = locks.lock("k").await.unwrap();
        let mut forgotten = Box::pin(locks.lock("k").into_future());
        let first = std::future::poll_fn(|context| Poll::Ready(forgotten.as_mut().poll(context).is_pending()));
        assert!(first.await);
        assert!(locks.try_lock("k").await.unwrap().is_none());
        assert_eq!(held.release().await.unwrap(), Released::Now);
        drop(forgotten.await.unwrap());
    });
}

/// While a transaction blocks a key with waiters, the key can be inspected and listed, and its holder's session can be
/// closed, which releases the other keys of that session.
#[test]
fn blocked_key_does_not_block_reads_or_close() {
    let server = server();
    block_on(async {
        let open = async || Locks::builder(&server.url()).session_ttl(30 * SECOND).open().await.unwrap();
        let (one, two) = (open().await, open().await);
        let blocked = one.lock("k").await.unwrap();
        // This key sorts before `k`, so the close visits it first.
        let _other = one.lock("a").await.unwrap();
        let waits = |key: &'static str| {
            let two = two.clone();
            tokio::spawn(async move { two.lock(key).await.unwrap() })
        };
        let (wants_blocked, wants_other) = (waits("k"), waits("a"));
        until("both tasks wait", async || server.psql("SELECT sum(waiting) FROM stanchion.keys") == "2").await;
        let mut transaction = sleeping_transaction(&server, blocked.fence().get(), 5, "SELECT").await;
        assert_eq!(two.list("").await.unwrap().len(), 2);
        assert_eq!(two.inspect("k").await.unwrap().waiters.len(), 1);
        one.close().await.unwrap();
        drop(wants_other.await.unwrap());
        assert!(transaction.try_wait().unwrap().is_none(), "the transaction is still open");
        assert!(!wants_blocked.is_finished(), "the waiter got a key under which a transaction still writes");
        assert!(transaction.wait().unwrap().success());
        drop(wants_blocked.await.unwrap());
    });
}

/// An extension at the deadline of a hold races an acquire. At most one of the two gets the key.
#[test]
fn late_extension_never_makes_two_holders() {
    use stanchion::store::ExtendOutcome;
    let server = server();
    block_on(async {
        let store = Postgres::from_url(&server.url()).unwrap();
        let session = SessionId::random().unwrap();
        let _stream = store.grants(session);
        store.open_session(OpenSession { session, ttl: 600 * SECOND, owner: "racer".into() }).await.unwrap();
        let request = move |key: &Key, lifetime| AcquireRequest {
            key: key.clone(),
            token: TokenId::random().unwrap(),
            session,
            demand: Demand::MUTEX,
            lifetime,
            enqueue: false,
            not_after: StoreTime::from_micros(i64::MAX as u64),
            metadata: None,
            trace: None,
        };
        let racers: Vec<_> = (0..20)
            .map(|racer| {
                let store = store.clone();
                let key = Key::new("", &format!("race{racer}")).unwrap();

                tokio::spawn(async move {
                    let (mut kept, mut taken) = (0, 0);
                    for round in 0..500u64 {
                        let first = request(&key, Lifetime::Fixed(Duration::from_millis(10)));
                        assert!(matches!(
                            store.acquire(first.clone()).await.unwrap().outcome,
                            AcquireOutcome::Granted(_)
                        ));
                        tokio::time::sleep(Duration::from_micros(6_000 + 97 * round % 4_000)).await;
                        let second = request(&key, Lifetime::Fixed(SECOND * 60));
                        let (extended, acquired) =
                            tokio::join!(store.extend(&key, first.token, SECOND * 60), store.acquire(second.clone()));
                        let extended = extended.unwrap().outcome == ExtendOutcome::Extended;
                        let granted = matches!(acquired.unwrap().outcome, AcquireOutcome::Granted(_));
                        assert!(!(extended && granted), "the key has two holders");
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
        for racer in racers {
            let (k, t) = racer.await.unwrap();
            (kept, taken) = (kept + k, taken + t);
        }
        println!("10,000 races: {kept} extended, {taken} taken");
        assert!(kept > 0 && taken > 0, "the test was no race: {kept} extended, {taken} taken");
    });
}

/// A session with a long ttl is renewed rarely, and still learns hours later that its hold was force-released.
#[test]
fn live_session_learns_of_an_old_forced_release() {
    use stanchion::store::{ForceReleaseRequest, RenewOutcome};
    let server = server();
    block_on(async {
        let store = Postgres::from_url(&server.url()).unwrap();
        let (session, token, key) =
            (SessionId::random().unwrap(), TokenId::random().unwrap(), Key::new("", "k").unwrap());
        let _stream = store.grants(session);
        store.open_session(OpenSession { session, ttl: 24 * 3600 * SECOND, owner: "slow".into() }).await.unwrap();
        let request = AcquireRequest {
            key: key.clone(),
            token,
            session,
            demand: Demand::MUTEX,
            lifetime: Lifetime::Session { max_hold: None },
            enqueue: false,
            not_after: StoreTime::from_micros(i64::MAX as u64),
            metadata: None,
            trace: None,
        };
        let AcquireOutcome::Granted(granted) = store.acquire(request.clone()).await.unwrap().outcome else { panic!() };
        store.force_release(ForceReleaseRequest { key, fence: granted.fence, reason: "stuck".into() }).await.unwrap();
        server.psql("UPDATE stanchion.forced SET at = at - 5 * 3600000000; SELECT stanchion.tidy()");
        assert_eq!(store.acquire(request).await.unwrap().outcome, AcquireOutcome::ForceReleased);
        let RenewOutcome::Alive { lost } = store.renew_session(session).await.unwrap().outcome else {
            panic!("the session has ended")
        };
        assert_eq!(lost.len(), 1);
        // The forced release is deleted after the session has expired.
        server.psql("UPDATE stanchion.sessions SET expires = 0");
        // A round that the renewal has started makes other rounds do nothing.
        let left = || server.psql("SELECT stanchion.tidy(); SELECT count(*) FROM stanchion.forced");
        until("the forced release is deleted", async || left().trim() == "0").await;
    });
}
