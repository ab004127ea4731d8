//! Measures the cost of stanchion. Figures drift with the machine, so compare only figures of one run.
//!
//! Usage: `cargo run --release -p stanchion-bench [WHAT…]`, with `pairs`, `handoff`, `processes`, `redis`, `postgres`,
//! `firestore`, `held`, `waiters` or `linger`. Without arguments everything is measured.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a benchmark prints, reads the clock and may stop at the first error"
)]

mod firestore;
mod linger;
mod postgres;
mod redis;
mod waiters;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use stanchion::store::{Faulty, Memory, Operation, Sqlite};
use stanchion::{Clock, Locks};

fn main() {
    // One thread by default, because a second one would compete with the server for the other core.
    let runtime = match std::env::var("STANCHION_BENCH_THREADS") {
        Ok(threads) => tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads.parse().unwrap())
            .enable_all()
            .build()
            .unwrap(),
        Err(_) => tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
    };
    if let Ok(folder) = std::env::var("STANCHION_BENCH_WAITER") {
        return runtime.block_on(waiter(Path::new(&folder)));
    }
    if let Ok(order) = std::env::var(redis::WAITER) {
        return runtime.block_on(redis::waiter(&order));
    }
    if let Ok(order) = std::env::var(waiters::ORDER) {
        return runtime.block_on(waiters::sleep(&order));
    }
    if let Ok(order) = std::env::var(linger::ORDER) {
        return runtime.block_on(linger::compete_as_ordered(&order));
    }
    let selected: Vec<String> = std::env::args().skip(1).collect();
    let is_selected = |what: &str| selected.is_empty() || selected.iter().any(|name| name == what);
    let folder = tempfile::tempdir().unwrap();
    runtime.block_on(async {
        if is_selected("pairs") {
            pairs(folder.path()).await;
        }
        if is_selected("handoff") {
            handoff(folder.path()).await;
        }
        if is_selected("processes") {
            processes(folder.path()).await;
        }
        if is_selected("redis") {
            redis::pairs().await;
            if std::env::var("PAIRS_ONLY").is_err() {
                redis::handoff().await;
                redis::held().await;
            }
        }
        if is_selected("postgres") {
            postgres::all().await;
        }
        if is_selected("firestore") {
            firestore::all().await;
        }
        if is_selected("held") {
            held(folder.path()).await;
        }
        if is_selected("linger") {
            linger::all(folder.path()).await;
        }
        if is_selected("waiters") {
            waiters::all(folder.path()).await;
        }
    });
}

fn median(spans: &mut [Duration]) -> Duration {
    spans.sort_unstable();
    spans[spans.len() / 2]
}

async fn open(folder: &Path) -> Locks {
    Locks::with_store(Sqlite::open(folder.join("store")).unwrap()).await.unwrap()
}

/// Measures uncontended acquire + release with one and with fifty tasks.
async fn pairs(folder: &Path) {
    const PAIRS: u32 = 20_000;
    for (name, locks) in [("memory", Locks::open("memory:").await.unwrap()), ("sqlite", open(folder).await)] {
        for tasks in [1, 50] {
            let start = Instant::now();
            let work: Vec<_> = (0..tasks)
                .map(|task| {
                    let locks = locks.clone();
                    tokio::spawn(async move {
                        for _ in 0..PAIRS / tasks {
                            locks.lock(format!("k{task}")).await.unwrap().release().await.unwrap();
                        }
                    })
                })
                .collect();
            for task in work {
                task.await.unwrap();
            }
            let rate = f64::from(PAIRS) / start.elapsed().as_secs_f64();
            println!("pairs      {name}, {tasks} task(s): {rate:.0} acquire + release a second");
        }
        locks.close().await.unwrap();
    }
}

/// Measures the time from a release until the waiting call returns, with two handles in one process.
async fn handoff(folder: &Path) {
    const TURNS: usize = 2_000;
    let locks = [open(folder).await, open(folder).await];
    let spans = in_turn(&locks, TURNS, async || {}).await.into_iter().map(|(_, handed_off)| handed_off).collect();
    print_spans("handoff    sqlite, two handles", spans);
}

/// Hands the key back and forth between two handles.
///
/// Returns for each turn the time from the release until its reply, and the time until the waiting call returned.
/// `pause` runs while one handle holds the key and the other one waits; its time is not measured.
async fn in_turn(locks: &[Locks; 2], turns: usize, pause: impl AsyncFn()) -> Vec<(Duration, Duration)> {
    let clock = Clock::system();
    let mut spans = Vec::with_capacity(turns);
    let mut held = locks[0].lock("handoff").await.unwrap();
    for turn in 0..turns {
        let waiter = locks[(turn + 1) % 2].clone();
        let waiting = tokio::spawn({
            let clock = clock.clone();
            async move {
                let guard = waiter.lock("handoff").await.unwrap();
                (guard, clock.now())
            }
        });
        while locks[0].inspect("handoff").await.unwrap().waiters.is_empty() {}
        pause().await;
        let released = clock.now();
        held.release().await.unwrap();
        let answered = clock.now().since(released);
        let (guard, returned) = waiting.await.unwrap();
        spans.push((answered, returned.since(released)));
        held = guard;
    }
    held.release().await.unwrap();
    spans
}

/// Measures hand-offs between ten processes, each of which reports when its waits returned and when it released the
/// key.
async fn processes(folder: &Path) {
    const WAITERS: usize = 10;
    let folder = folder.join("processes");
    std::fs::create_dir_all(&folder).unwrap();
    let locks = open(&folder).await;
    let first = locks.lock("handoff").await.unwrap();
    let children: Vec<Child> = (0..WAITERS)
        .map(|_| {
            Command::new(std::env::current_exe().unwrap())
                .env("STANCHION_BENCH_WAITER", &folder)
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    while locks.inspect("handoff").await.unwrap().waiters.len() < WAITERS {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    first.release().await.unwrap();
    let mut turns: Vec<(u64, u64)> = Vec::new();
    for child in children {
        let output = child.wait_with_output().unwrap();
        for line in String::from_utf8(output.stdout).unwrap().lines() {
            let (acquired_at, released_at) = line.split_once(' ').unwrap();
            turns.push((acquired_at.parse().unwrap(), released_at.parse().unwrap()));
        }
    }
    turns.sort_unstable();
    let spans = turns.windows(2).map(|two| Duration::from_nanos(two[1].0.saturating_sub(two[0].1))).collect();
    print_spans("handoff    sqlite, ten processes in turn", spans);
}

async fn waiter(folder: &Path) {
    let clock = Clock::system();
    let locks = open(folder).await;
    for _ in 0..100 {
        let guard = locks.lock("handoff").await.unwrap();
        let acquired_at = clock.now().as_nanos();
        // Hold the key until the previous holder is back in the queue.
        tokio::time::sleep(Duration::from_millis(2)).await;
        println!("{acquired_at} {}", clock.now().as_nanos());
        guard.release().await.unwrap();
    }
}

/// Measures the memory of each of ten thousand held locks, and the requests while nothing happens.
async fn held(folder: &Path) {
    const HOLDS: usize = 10_000;
    let store = Faulty::new(Sqlite::open(folder.join("store")).unwrap());
    let faults = store.faults();
    let locks = Locks::with_store(store).await.unwrap();
    // Fill caches and pools first, so that their memory does not count.
    for i in 0..1_000 {
        locks.lock(format!("warm{i}")).await.unwrap().release().await.unwrap();
    }
    let before = resident_bytes();
    let mut guards = Vec::with_capacity(HOLDS);
    for i in 0..HOLDS {
        guards.push(locks.lock(format!("held{i}")).await.unwrap());
    }
    let each = resident_bytes().saturating_sub(before) / HOLDS;
    println!("held       sqlite, {HOLDS} locks: {each} bytes of memory each");
    let count = || {
        let operations = [
            Operation::RenewSession,
            Operation::Acquire,
            Operation::Poll,
            Operation::Release,
            Operation::Abandon,
            Operation::Extend,
        ];
        operations.map(|operation| faults.count(operation)).iter().sum::<u64>()
    };
    let (all, renewals) = (count(), faults.count(Operation::RenewSession));
    tokio::time::sleep(Duration::from_secs(10)).await;
    let (all, renewals) = (count() - all, faults.count(Operation::RenewSession) - renewals);
    println!("held       sqlite, {HOLDS} locks: {all} requests in 10 s, of which {renewals} renewals");
    drop(guards);
    let memory = Locks::with_store(Memory::new()).await.unwrap();
    let before = resident_bytes();
    let mut guards = Vec::with_capacity(HOLDS);
    for i in 0..HOLDS {
        guards.push(memory.lock(format!("held{i}")).await.unwrap());
    }
    let each = resident_bytes().saturating_sub(before) / HOLDS;
    println!("held       memory, {HOLDS} locks: {each} bytes each, the store's own records included");
}

fn resident_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: usize = text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * 4_096
}

fn print_spans(what: &str, mut spans: Vec<Duration>) {
    spans.sort_unstable();
    let at = |share: f64| spans[((spans.len() - 1) as f64 * share) as usize];
    println!("{what}: p50 {:?}, p99 {:?}, longest {:?} ({} hand-offs)", at(0.5), at(0.99), at(1.0), spans.len());
}
