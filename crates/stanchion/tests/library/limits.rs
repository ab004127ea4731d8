//! Limits of calls while the store is away, and what opening does where the system has nothing left.
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

/// A handle whose store can go away, on a virtual clock.
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

    fn go_away(&self, fault: Fault) {
        for step in Operation::ALL {
            self.faults.always(*step, fault);
        }
    }

    /// Moves the clock on until the call is done. Returns its outcome and the time that it took by that clock.
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

const AWAY: [Fault; 2] = [Fault::Fail(ErrorKind::Unavailable), Fault::Delay(Duration::from_secs(3_600))];

#[tokio::test]
async fn calls_keep_limits_during_outage() {
    for fault in AWAY {
        let bench = Bench::new(RetryPolicy { attempts: 1_000, ..RetryPolicy::default() }).await;
        bench.go_away(fault);
        for (limit, wait) in [(SECOND, Duration::ZERO), (2 * SECOND, 2 * SECOND), (30 * SECOND, 30 * SECOND)] {
            let (outcome, took) = bench.timed(bench.locks.lock("k").wait(wait).into_future()).await;
            let error = outcome.unwrap_err();
            assert!(error.is_transient(), "{fault:?}, {wait:?}: {error:?}");
            assert!(took >= limit && took < limit + SECOND, "{fault:?}, {wait:?}: {took:?}");
        }
        // Without a limit the policy limits the first contact.
        let (outcome, took) = bench.timed(bench.locks.lock("k").into_future()).await;
        assert!(outcome.unwrap_err().is_transient() && took < 11 * SECOND, "{fault:?}: {took:?}");
    }
}

#[tokio::test]
async fn waiters_outlive_an_outage() {
    for fault in AWAY {
        let bench = Bench::new(RetryPolicy::default()).await;
        let held = bench.locks.lock("k").await.unwrap();
        let waits = |request: stanchion::LockRequest| tokio::spawn(async move { request.await.map(drop) });
        let mut waiters = vec![waits(bench.locks.lock("k")), waits(bench.locks.lock("k").wait(600 * SECOND))];
        until("they wait", async || bench.locks.inspect("k").await.unwrap().waiters.len() == 2).await;
        bench.go_away(fault);
        waiters.push(waits(bench.locks.lock("k").wait(600 * SECOND)));
        bench.timed(bench.time.clock().sleep(60 * SECOND)).await;
        assert!(waiters.iter().all(|waiter| !waiter.is_finished()), "{fault:?}: gave up before its limit");
        bench.faults.clear();
        drop(held);
        for waiter in waiters {
            bench.timed(waiter).await.0.unwrap().unwrap();
        }
    }
}

#[tokio::test]
async fn opening_keeps_its_limit() {
    for fault in AWAY {
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

/// Neither an error nor a drop blocks the one thread of this runtime.
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

/// Runs a part of this file in a process with limits of its own.
fn played(part: &str, program: &str, arguments: &[&str]) -> std::process::Output {
    let me = std::env::current_exe().unwrap();
    let mut command = Command::new(program);
    command.args(arguments).arg(me).args(["--exact", &format!("limits::{part}"), "--ignored", "--nocapture"]);
    command.args(["--test-threads", "1"]).output().unwrap()
}

fn open_in_every_way() {
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
#[ignore = "a part that another test has played"]
fn part_opens_without_threads() {
    // As a user who has processes enough already: root has no such limit.
    let refused = std::thread::Builder::new().spawn(|| {}).is_err();
    assert!(refused, "the test is worth nothing: there are threads");
    open_in_every_way();
}

#[test]
#[ignore = "a part that another test has played"]
fn part_opens_with_few_descriptors() {
    open_in_every_way();
}

#[test]
fn opening_without_a_thread_is_an_error() {
    let user = ["--reuid", "54321", "--regid", "54321", "--clear-groups", "prlimit", "--nproc=1"];
    if !rustix::process::getuid().is_root() {
        return eprintln!("NOT TESTED: a limit on threads: only root can become a user of its own");
    }
    // One thread is that of the test harness.
    let output = played("part_opens_without_threads", "setpriv", &user);
    let told = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("no panic") && !told.contains("panicked"), "{told}");
    assert!(
        told.contains("async memory:: Err((Internal") && told.contains("blocking memory:: Err((Internal"),
        "{told}"
    );
}

#[test]
fn open_with_few_descriptors_never_panics() {
    let mut refused = 0;
    for limit in 8..30 {
        let output = played("part_opens_with_few_descriptors", "prlimit", &[&format!("--nofile={limit}")]);
        let told = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(told.contains("no panic") && !told.contains("panicked"), "{limit} descriptors: {told}");
        refused += usize::from(told.contains("Err("));
    }
    assert!(refused > 0, "the test is worth nothing: there were descriptors");
}
