//! Tests that calls keep their time limits while a store is unavailable, and that they never block an executor thread.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "test code")]

use std::time::{Duration, Instant};

use stanchion::{Error, ErrorKind, Locks, RetryPolicy};
use stanchion_testkit::proxy::Proxy;
use stanchion_testkit::servers::{
    Away, FirestoreFake, Postgres as PostgresKind, PostgresServer, Redis as RedisKind, RedisServer,
};
use stanchion_testkit::{block_on, until};

const SECOND: Duration = Duration::from_secs(1);

/// Maximum delay of a call beyond its limit on a busy machine. A broken limit would take ten seconds.
const SLACK: Duration = Duration::from_secs(4);

/// Runs a call in a single-threaded runtime together with a task that ticks every 5 ms.
///
/// Returns the outcome of the call, its duration, and the longest gap between two ticks.
fn with_ticker<T>(call: impl Future<Output = T>) -> (T, Duration, Duration) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let ticks = tokio::spawn(async {
            let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
            loop {
                tokio::time::sleep(Duration::from_millis(5)).await;
                longest = longest.max(last.elapsed());
                last = Instant::now();
                LONGEST.with(|cell| cell.set(longest));
            }
        });
        let start = Instant::now();
        let outcome = call.await;
        let took = start.elapsed();
        // Tick on for a moment, because the drop of the failed call could block the thread, too.
        tokio::time::sleep(Duration::from_millis(50)).await;
        ticks.abort();
        (outcome, took, LONGEST.with(std::cell::Cell::get))
    })
}

thread_local! {
    static LONGEST: std::cell::Cell<Duration> = const { std::cell::Cell::new(Duration::ZERO) };
}

fn check_limit(what: &str, limit: Duration, (outcome, took, gap): (Result<(), Error>, Duration, Duration)) {
    let error = outcome.unwrap_err();
    eprintln!("{what}: {took:.2?} for a limit of {limit:?}, longest gap {gap:.1?}: {error}");
    assert!(error.is_transient(), "{what}: {error:?}");
    assert!(error.kind() != ErrorKind::Indeterminate || error.is_in_doubt(), "{what}: {error:?}");
    assert!(took >= limit, "{what}: failed before the limit, after {took:?}: {error}");
    assert!(took < limit + SLACK, "{what}: took {took:?}: {error}");
    assert!(gap < SECOND / 2, "{what}: the executor was blocked for {gap:?}");
}

fn opening_keeps_its_limit(url: impl Fn(&str) -> String) {
    for away in Away::all() {
        let url = url(&away.address);
        for limit in [SECOND / 2, 2 * SECOND] {
            let open = async { Locks::builder(&url).open_within(limit).open().await.map(drop) };
            check_limit(&format!("opening {}", away.name), limit, with_ticker(open));
        }
    }
}

fn wrong_password_fails_at_once(url: &str) {
    let (outcome, took, gap) = with_ticker(async { Locks::open(url).await.map(drop) });
    let error = outcome.unwrap_err();
    eprintln!("a wrong password: {took:.2?}, longest gap {gap:.1?}: {error}");
    assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
    assert!(took < SLACK && gap < SECOND / 2, "{took:?}, {gap:?}");
}

/// Checks the limits of calls on an open handle while the server is stopped.
fn calls_keep_their_limits(url: &str, stop: impl Fn(bool)) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let policy = RetryPolicy { total: SECOND, ..RetryPolicy::default() };
    let locks = runtime.block_on(Locks::builder(url).retry(policy).open()).unwrap();
    let held = runtime.block_on(locks.lock("k").into_future()).unwrap();
    // One waiter with a limit and one without; a third one starts while the server is stopped.
    let waits = |limit: Option<Duration>| {
        let request = locks.lock("k");
        let request = limit.map_or(request.clone(), |limit| request.wait(limit));
        runtime.spawn(async move { request.await.map(|guard| drop(guard)) })
    };
    let mut waiters = vec![waits(Some(60 * SECOND)), waits(None)];
    block_on(until("both calls wait", async || locks.inspect("k").await.unwrap().waiters.len() == 2));
    stop(true);
    for (limit, call) in [
        (
            SECOND,
            Box::pin(async { locks.try_lock("other").await.map(drop) }) as std::pin::Pin<Box<dyn Future<Output = _>>>,
        ),
        (2 * SECOND, Box::pin(async { locks.lock("other").wait(2 * SECOND).await.map(drop) })),
    ] {
        check_limit("a stopped server", limit, with_ticker(call));
    }
    waiters.push(waits(Some(60 * SECOND)));
    std::thread::sleep(SECOND);
    for waiter in &waiters {
        assert!(!waiter.is_finished(), "a waiter failed before its limit");
    }
    stop(false);
    drop(held);
    for waiter in waiters {
        runtime.block_on(waiter).unwrap().unwrap();
    }
}

#[test]
fn redis_keeps_limits_while_away() {
    opening_keeps_its_limit(|address| format!("redis://{address}"));
    opening_keeps_its_limit(|address| format!("redis+cluster://{address}"));
    opening_keeps_its_limit(|address| format!("redis+sentinel://{address}/service"));
    let server = RedisServer::with(RedisKind::Redis7, &["--requirepass", "right"]);
    let url = |password: &str| format!("redis://:{password}@127.0.0.1:{}", server.port());
    wrong_password_fails_at_once(&url("wrong"));
    let signal = |stop| server.process().unwrap().signal(if stop { "STOP" } else { "CONT" });
    calls_keep_their_limits(&url("right"), signal);
}

#[test]
fn postgres_keeps_limits_while_away() {
    opening_keeps_its_limit(|address| format!("postgres://me@{address}/app?sslmode=disable"));
    let server = PostgresServer::with_passwords(PostgresKind::V15, &[]);
    let url = |password: &str| server.url().replace("of-postgres", password);
    wrong_password_fails_at_once(&url("wrong"));
    server.psql(&stanchion::store::Postgres::from_url(&server.url()).unwrap().schema_sql());
    let signal = |stop| {
        for pid in server.processes() {
            let name = if stop { "-STOP" } else { "-CONT" };
            // The process may have ended already.
            let _ = std::process::Command::new("kill").args([name, &pid.to_string()]).status();
        }
    };
    calls_keep_their_limits(&server.url(), signal);
}

#[test]
fn firestore_outage_keeps_limits() {
    opening_keeps_its_limit(|address| format!("firestore://project/database?emulator={address}"));
    let fake = FirestoreFake::start();
    fake.refuse_credentials(true);
    wrong_password_fails_at_once(&fake.url());
    fake.refuse_credentials(false);
    let port = fake.url().rsplit_once(':').unwrap().1.parse().unwrap();
    let proxy = Proxy::start(port, 7);
    let url = format!("firestore://away?emulator=127.0.0.1:{}", proxy.port());
    calls_keep_their_limits(&url, |stop| proxy.faults().silence(stop));
}
