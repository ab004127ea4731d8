//! Firestore, in Google's emulator where the machine has it: what a commit takes, and a hand-off beside it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use stanchion::{Clock, Locks};
use stanchion_testkit::servers::FirestoreEmulator;

/// Pairs, hand-offs between two handles, and a wave of waiters.
pub(crate) async fn all() {
    const PAIRS: usize = 300;
    const TURNS: usize = 200;
    const WAITERS: usize = 50;
    let started = tokio::task::spawn_blocking(FirestoreEmulator::shared).await.unwrap();
    let Some(emulator) = started else {
        println!("firestore  NOT MEASURED: this machine has no emulator");
        return;
    };
    let clock = Clock::system();
    let url = emulator.url();
    let locks = [Locks::open(&url).await.unwrap(), Locks::open(&url).await.unwrap()];
    let mut commits = Vec::new();
    for _ in 0..PAIRS {
        let start = clock.now();
        let guard = locks[0].lock("pair").await.unwrap();
        let acquired = clock.now();
        guard.release().await.unwrap();
        commits.push(acquired.since(start));
        commits.push(clock.now().since(acquired));
    }
    let commit = super::median(&mut commits);
    println!("firestore  a step of one commit (acquire or release): p50 {commit:.2?}");
    let mut spans = Vec::new();
    let mut held = locks[0].lock("handoff").await.unwrap();
    for turn in 0..TURNS {
        let waiter = locks[(turn + 1) % 2].clone();
        let waiting = tokio::spawn({
            let clock = clock.clone();
            async move {
                let guard = waiter.lock("handoff").await.unwrap();
                (guard, clock.now())
            }
        });
        while locks[0].inspect("handoff").await.unwrap().waiters.is_empty() {}
        let released = clock.now();
        held.release().await.unwrap();
        let (guard, returned) = waiting.await.unwrap();
        spans.push(returned.since(released));
        held = guard;
    }
    held.release().await.unwrap();
    let handoff = super::median(&mut spans);
    let ratio = handoff.as_secs_f64() / commit.as_secs_f64();
    println!("firestore  hand-off, two handles: p50 {handoff:.2?}, {ratio:.2} commits");
    wave(&locks, WAITERS, commit).await;
}

/// Waiters that came one after another are served one after another.
async fn wave(locks: &[Locks; 2], waiters: usize, commit: Duration) {
    let clock = Clock::system();
    let held = locks[0].lock("wave").await.unwrap();
    let served = Arc::new(Mutex::new(Vec::new()));
    let mut waiting = Vec::new();
    for i in 0..waiters {
        let (waiter, served, clock) = (locks[i % 2].clone(), served.clone(), clock.clone());
        waiting.push(tokio::spawn(async move {
            let guard = waiter.lock("wave").await.unwrap();
            served.lock().unwrap().push((i, clock.now()));
            guard.release().await.unwrap();
        }));
        while locks[0].inspect("wave").await.unwrap().waiters.len() <= i {}
    }
    held.release().await.unwrap();
    for one in waiting {
        one.await.unwrap();
    }
    let served = served.lock().unwrap();
    let in_order = served.windows(2).filter(|pair| pair[0].0 < pair[1].0).count();
    let mut spans: Vec<_> = served.windows(2).map(|pair| pair[1].1.since(pair[0].1)).collect();
    let handoff = super::median(&mut spans);
    let ratio = handoff.as_secs_f64() / commit.as_secs_f64();
    println!(
        "firestore  wave of {waiters}: {in_order} of {} in order, hand-off p50 {handoff:.2?}, {ratio:.2} commits",
        waiters - 1
    );
}
