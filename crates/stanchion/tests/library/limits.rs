//! Tests time limits while the store is unavailable, and `open` when the system is out of threads or descriptors.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "tests wait on the real clock, print and may panic"
)]

use std::process::Command;
use std::time::{Duration, Instant};

use stanchion::store::{Fault, Faulty, Memory, Operation};
use stanchion::{ErrorKind, Locks, RetryPolicy, VirtualClock};

use crate::support::until;

const SECOND: Duration = Duration::from_secs(1);

/// A handle on a virtual clock whose store can become unavailable.
struct Bench {
    time: VirtualClock,
    faults: stanchion::store::Faults,
    locks: Locks,
}

impl Bench {
    async fn new(policy: RetryPolicy) -> Self {
        let time = VirtualClock::new();
        let store = Faulty::with_clock(Memory::with_clock(time.clock()), &time);
        let faults = store.faults();
        let locks = Locks::builder_with_store(store).clock(time.clock()).retry(policy).open().await.unwrap();
        Self { time, faults, locks }
    }

    fn make_unavailable(&self, fault: Fault) {
        for operation in Operation::ALL {
            self.faults.always(*operation, fault);
        }
    }

    /// Moves the clock on until the call returns. Returns its outcome and its duration on the virtual clock.
    async fn timed<T>(&self, call: impl Future<Output = T>) -> (T, Duration) {
        let start = self.time.clock().now();
        let ticking = async {
            loop {
                tokio::time::sleep(Duration::from_micros(200)).await;
                self.time.advance(SECOND / 50);
            }
        };
        let outcome = tokio::select! {
            outcome = call => outcome,
            () = ticking => unreachable!(),
        };
        (outcome, self.time.clock().now().since(start))
    }
}

const OUTAGES: [Fault; 2] = [Fault::Fail(ErrorKind::Unavailable), Fault::Delay(Duration::from_secs(3_600))];

#[tokio::test]
async fn calls_keep_limits_during_outage() {
    for fault in OUTAGES {
        let bench = Bench::new(RetryPolicy { attempts: 1_000, ..RetryPolicy::default() }).await;
        bench.make_unavailable(fault);
        for (limit, wait) in [(SECOND, Duration::ZERO), (2 * SECOND, 2 * SECOND), (30 * SECOND, 30 * SECOND)] {
            let (outcome, took) = bench.timed(bench.locks.lock("k").wait(wait).into_future()).await;
            let error = outcome.unwrap_err();
            assert!(error.is_transient(), "{fault:?}, {wait:?}: {error:?}");
            assert!(took >= limit && took < limit + SECOND, "{fault:?}, {wait:?}: {took:?}");
        }
        // If the call has no limit, the retry policy limits its first request.
        let (outcome, took) = bench.timed(bench.locks.lock("k").into_future()).await;
        assert!(outcome.unwrap_err().is_transient() && took < 11 * SECOND, "{fault:?}: {took:?}");
    }
}

#[tokio::test]
async fn waiters_outlive_an_outage() {
    for fault in OUTAGES {
        let bench = Bench::new(RetryPolicy::default()).await;
        let held = bench.locks.lock("k").await.unwrap();
        let waits = |request: stanchion::LockRequest| tokio::spawn(async move { request.await.map(drop) });
        let mut waiters = vec![waits(bench.locks.lock("k")), waits(bench.locks.lock("k").wait(600 * SECOND))];
        until("both calls wait", async || bench.locks.inspect("k").await.unwrap().waiters.len() == 2).await;
        bench.make_unavailable(fault);
        waiters.push(waits(bench.locks.lock("k").wait(600 * SECOND)));
        bench.timed(bench.time.clock().sleep(60 * SECOND)).await;
        assert!(waiters.iter().all(|waiter| !waiter.is_finished()), "{fault:?}: a waiter failed before its limit");
        bench.faults.clear();
        drop(held);
        for waiter in waiters {
            bench.timed(waiter).await.0.unwrap().unwrap();
        }
    }
}

#[tokio::test]
async fn opening_keeps_its_limit() {
    for fault in OUTAGES {
        let time = VirtualClock::new();
        let store = Faulty::with_clock(Memory::with_clock(time.clock()), &time);
        store.faults().always(Operation::OpenSession, fault);
        let bench = Bench::new(RetryPolicy::default()).await;
        let open = Locks::builder_with_store(store).clock(bench.time.clock()).open_within(3 * SECOND).open();
        let (outcome, took) = bench.timed(open).await;
        let error = outcome.unwrap_err();
        assert!(error.is_transient(), "{error:?}");
        assert!(took >= 3 * SECOND && took < 4 * SECOND, "{took:?}");
    }
}

/// Neither a failed open nor a drop blocks the only thread of this runtime.
#[tokio::test]
async fn drop_never_blocks_the_executor() {
    for fails in [true, false] {
        let store = Faulty::new(Memory::new());
        if fails {
            store.faults().always(Operation::OpenSession, Fault::Fail(ErrorKind::Unauthorized));
        }
        store.faults().always(Operation::CloseSession, Fault::DelayReply(3_600 * SECOND));
        let start = Instant::now();
        let opened = Locks::with_store(store).await;
        assert_eq!(opened.is_err(), fails);
        drop(opened);
        assert!(start.elapsed() < SECOND * 3 / 4, "blocked for {:?}", start.elapsed());
    }
}

/// Runs a part of this file in a child process with its own limits.
fn run_part(part: &str, program: &str, arguments: &[&str]) -> std::process::Output {
    let me = std::env::current_exe().unwrap();
    let mut command = Command::new(program);
    command.args(arguments).arg(me).args(["--exact", &format!("limits::{part}"), "--ignored", "--nocapture"]);
    command.args(["--test-threads", "1"]).output().unwrap()
}

fn open_async_and_blocking() {
    let folder = tempfile::tempdir().unwrap();
    let sqlite = format!("sqlite:{}", folder.path().join("locks").display());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    for url in ["memory:", &sqlite] {
        if let Ok(runtime) = &runtime {
            let opened = runtime.block_on(Locks::builder(url).open_within(SECOND / 5).open());
            println!("async {url}: {:?}", opened.map(drop).map_err(|error| (error.kind(), error.to_string())));
        }
        let opened = Locks::builder(url).open_within(SECOND / 5).open_blocking();
        println!("blocking {url}: {:?}", opened.map(drop).map_err(|error| (error.kind(), error.to_string())));
    }
    println!("no panic");
}

#[test]
#[ignore = "a part that another test runs in a child process"]
fn part_opens_without_threads() {
    // The parent runs this part as another user, because root has no limit on threads.
    let has_failed = std::thread::Builder::new().spawn(|| {}).is_err();
    assert!(has_failed, "a thread could be started, so the test proves nothing");
    open_async_and_blocking();
}

#[test]
#[ignore = "a part that another test runs in a child process"]
fn part_opens_with_few_descriptors() {
    open_async_and_blocking();
}

#[test]
fn opening_without_a_thread_is_an_error() {
    let user = ["--reuid", "54321", "--regid", "54321", "--clear-groups", "prlimit", "--nproc=1"];
    if !rustix::process::getuid().is_root() {
        return eprintln!("NOT TESTED: a limit on threads, because only root can switch to another user");
    }
    // The limit leaves one thread, which the test harness uses.
    let output = run_part("part_opens_without_threads", "setpriv", &user);
    let printed = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(printed.contains("no panic") && !printed.contains("panicked"), "{printed}");
    assert!(
        printed.contains("async memory:: Err((Internal") && printed.contains("blocking memory:: Err((Internal"),
        "{printed}"
    );
}

#[test]
fn open_with_few_descriptors_never_panics() {
    let mut failures = 0;
    for limit in 8..30 {
        let output = run_part("part_opens_with_few_descriptors", "prlimit", &[&format!("--nofile={limit}")]);
        let printed = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(printed.contains("no panic") && !printed.contains("panicked"), "{limit} descriptors: {printed}");
        failures += usize::from(printed.contains("Err("));
    }
    assert!(failures > 0, "every open succeeded, so the test proves nothing");
}
