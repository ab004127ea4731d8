//! Tests for every store that a handle can end many tokens at once, and that calls can be dropped at any point.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "test code")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use stanchion::{Guard, Locks};
use stanchion_testkit::{seed, until};

const SECOND: Duration = Duration::from_secs(1);

/// Returns the current and the peak resident memory of this process, in MB.
fn memory() -> [usize; 2] {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    ["VmRSS:", "VmHWM:"].map(|name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("0");
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap_or(0) / 1_024
    })
}

/// Returns the number in an environment variable, or a default. A longer run for measurements sets the variable.
pub(super) fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).map_or(default, |number| number.parse().unwrap())
}

/// Drops `count` guards of one handle at once, while another guard of the handle must stay valid.
pub(super) async fn drop_many(url: &str, count: usize) {
    println!("memory at the start: {:?} MB", memory());
    let locks = Locks::builder(url).session_ttl(10 * SECOND).open().await.unwrap();
    let observer = Locks::open(url).await.unwrap();
    let kept = locks.lock("kept").await.unwrap();
    let session = locks.session();
    let started = Instant::now();
    let guards = acquire_many(&locks, count).await;
    println!("{count} acquired within {:?}, memory {:?} MB", started.elapsed(), memory());
    let started = Instant::now();
    drop(guards);
    println!("dropped within {:?}", started.elapsed());
    // The keeper releases the tokens in the order of the drops, so the last key is free last.
    let last = format!("k{}", count - 1);
    let mut longest = Duration::ZERO;
    let mut printed = Instant::now();
    while observer.is_locked(&last).await.unwrap() {
        kept.check().unwrap();
        longest = longest.max(10 * SECOND - kept.remaining().unwrap_or(10 * SECOND).min(10 * SECOND));
        if printed.elapsed() > SECOND {
            printed = Instant::now();
            println!("after {:?}: memory {:?} MB", started.elapsed(), memory());
        }
        assert!(started.elapsed() < 120 * SECOND, "the last key was never released");
        tokio::time::sleep(SECOND / 100).await;
    }
    println!("all free after {:?}, memory {:?} MB", started.elapsed(), memory());
    println!("at most {longest:?} of the 10 s session ttl passed between renewals");
    for at in (0..count).step_by(count.div_ceil(200)) {
        until("the key is free", async || !observer.is_locked(format!("k{at}")).await.unwrap()).await;
    }
    kept.check().unwrap();
    assert_eq!(locks.session(), session);
    for _ in 0..number("STANCHION_TEST_MINUTES", 0) * 6 {
        tokio::time::sleep(10 * SECOND).await;
        println!("after {:?}: memory {:?} MB", started.elapsed(), memory());
    }
    kept.check().unwrap();
    assert_eq!(locks.session(), session);
}

pub(super) async fn acquire_many(locks: &Locks, count: usize) -> Vec<Guard> {
    let tasks: Vec<_> = (0..64)
        .map(|task| {
            let locks = locks.clone();
            tokio::spawn(async move {
                let mut guards = Vec::new();
                for at in (task..count).step_by(64) {
                    guards.push((at, locks.lock(format!("k{at}")).await.unwrap()));
                }
                guards
            })
        })
        .collect();
    let mut guards = Vec::new();
    for task in tasks {
        guards.extend(task.await.unwrap());
    }
    guards.sort_unstable_by_key(|(at, _)| *at);
    guards.into_iter().map(|(_, guard)| guard).collect()
}

/// Drops `count` calls at random points under load, and returns the longest time after which the next caller had the
/// key.
pub(super) async fn drop_calls(url: &str, count: usize, test: &str) -> Duration {
    let mut random = seed(test);
    let mut below = |limit: u64| {
        random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (random ^ (random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 31)) % limit
    };
    let (locks, next, loading) =
        (Locks::open(url).await.unwrap(), Locks::open(url).await.unwrap(), Locks::open(url).await.unwrap());
    let load_ends = Arc::new(AtomicBool::new(false));
    let load: Vec<_> = (0..16)
        .map(|task| {
            let (loading, load_ends) = (loading.clone(), load_ends.clone());
            tokio::spawn(async move {
                while !load_ends.load(Ordering::Relaxed) {
                    loading.lock(format!("load{}", task % 4)).await.unwrap().release().await.unwrap();
                }
            })
        })
        .collect();
    let mut waits = Vec::new();
    // Each batch drops 16 calls and then requests the same keys at once.
    while waits.len() < count {
        let mut dropped = Vec::new();
        for at in 0..16 {
            let key = format!("k{at}");
            let call = tokio::spawn(locks.lock(&key).into_future());
            tokio::time::sleep(Duration::from_micros(below(400))).await;
            call.abort();
            drop(call.await);
            dropped.push(key);
        }
        let next_calls = dropped.into_iter().map(|key| {
            let next = next.clone();
            tokio::spawn(async move {
                let started = Instant::now();
                next.lock(key).wait(30 * SECOND).await.unwrap().release().await.unwrap();
                started.elapsed()
            })
        });
        for call in next_calls.collect::<Vec<_>>() {
            waits.push(call.await.unwrap());
        }
    }
    load_ends.store(true, Ordering::Relaxed);
    for task in load {
        task.await.unwrap();
    }
    waits.sort_unstable();
    let late = waits.iter().filter(|wait| **wait > SECOND).count();
    let longest = waits[waits.len() - 1];
    println!(
        "{} calls dropped; the next caller had the key after p50 {:?}, p99 {:?}, at most {longest:?}, {late} after more than a second",
        waits.len(),
        waits[waits.len() / 2],
        waits[waits.len() * 99 / 100]
    );
    longest
}

/// Tests of the embedded store.
mod sqlite {
    use super::*;
    use stanchion_testkit::block_on;

    #[test]
    fn many_dropped_guards_are_released_soon() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}", folder.path().join("store").display());
        block_on(drop_many(&url, number("STANCHION_TEST_GUARDS", 20_000)));
    }
}
