//! Many tokens end at once, and calls are dropped at any point: the same for every store.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "test code")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use stanchion::{Guard, Locks};
use stanchion_testkit::{seed, until};

const SECOND: Duration = Duration::from_secs(1);

/// The resident memory of this process in MB: now, and its peak.
fn memory() -> [usize; 2] {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    ["VmRSS:", "VmHWM:"].map(|name| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("0");
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap_or(0) / 1_024
    })
}

/// The number in this variable, for a measured run.
pub(super) fn number(variable: &str, otherwise: usize) -> usize {
    std::env::var(variable).map_or(otherwise, |number| number.parse().unwrap())
}

/// Drops `count` guards of one handle at once. Another hold of the handle is kept all the time.
pub(super) async fn drop_many(url: &str, count: usize) {
    println!("memory at first: {:?} MB", memory());
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
    // The keeper ends them in the order in which they were dropped.
    let last = format!("k{}", count - 1);
    let mut longest = Duration::ZERO;
    let mut told = Instant::now();
    while observer.is_locked(&last).await.unwrap() {
        kept.check().unwrap();
        longest = longest.max(10 * SECOND - kept.remaining().unwrap_or(10 * SECOND).min(10 * SECOND));
        if told.elapsed() > SECOND {
            told = Instant::now();
            println!("after {:?}: memory {:?} MB", started.elapsed(), memory());
        }
        assert!(started.elapsed() < 120 * SECOND, "never free");
        tokio::time::sleep(SECOND / 100).await;
    }
    println!("all free after {:?}, memory {:?} MB", started.elapsed(), memory());
    println!("of its 10 s, the session had lost at most {longest:?} without a renewal");
    for at in (0..count).step_by(count.div_ceil(200)) {
        until("free", async || !observer.is_locked(format!("k{at}")).await.unwrap()).await;
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

/// Drops `count` calls at random points while others work, and looks how soon the next caller has the key.
pub(super) async fn drop_calls(url: &str, count: usize, test: &str) -> Duration {
    let mut random = seed(test);
    let mut below = |limit: u64| {
        random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (random ^ (random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 31)) % limit
    };
    let (locks, next, loading) =
        (Locks::open(url).await.unwrap(), Locks::open(url).await.unwrap(), Locks::open(url).await.unwrap());
    let over = Arc::new(AtomicBool::new(false));
    let load: Vec<_> = (0..16)
        .map(|task| {
            let (loading, over) = (loading.clone(), over.clone());
            tokio::spawn(async move {
                while !over.load(Ordering::Relaxed) {
                    loading.lock(format!("load{}", task % 4)).await.unwrap().release().await.unwrap();
                }
            })
        })
        .collect();
    let mut waits = Vec::new();
    // In batches: what a batch drops is asked for at once.
    while waits.len() < count {
        let mut dropped = Vec::new();
        for at in 0..16 {
            let key = format!("k{at}");
            let asking = tokio::spawn(locks.lock(&key).into_future());
            tokio::time::sleep(Duration::from_micros(below(400))).await;
            asking.abort();
            drop(asking.await);
            dropped.push(key);
        }
        let asking = dropped.into_iter().map(|key| {
            let next = next.clone();
            tokio::spawn(async move {
                let started = Instant::now();
                next.lock(key).wait(30 * SECOND).await.unwrap().release().await.unwrap();
                started.elapsed()
            })
        });
        for asked in asking.collect::<Vec<_>>() {
            waits.push(asked.await.unwrap());
        }
    }
    over.store(true, Ordering::Relaxed);
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

/// The embedded store.
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
