//! Tests the polls of waiting calls, and calls that wait while polls or pushes fail.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests wait on the real clock, and may panic"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::support::until;
use stanchion::store::{Fault, Faulty, Memory, Observed, Operation};
use stanchion::{ErrorKind, Locks, VirtualClock};

const WAITERS: usize = 1_000;

#[tokio::test]
async fn waiters_of_a_key_share_its_polls() {
    let time = VirtualClock::new();
    let memory = Memory::with_clock(time.clock());
    let polls = Arc::new(AtomicU64::new(0));
    let store = Observed::new(Faulty::with_clock(memory.clone(), &time), {
        let polls = polls.clone();
        move |done| {
            polls.fetch_add(u64::from(done.operation == Operation::Poll), Ordering::Relaxed);
        }
    });
    let holder = Locks::builder_with_store(memory).clock(time.clock()).open().await.unwrap();
    let locks = Locks::builder_with_store(store).clock(time.clock()).open().await.unwrap();
    let held = holder.lock("k").await.unwrap();
    let waiting: Vec<_> = (0..WAITERS)
        .map(|_| {
            let locks = locks.clone();
            tokio::spawn(async move { locks.lock("k").await.unwrap().release().await.unwrap() })
        })
        .collect();
    until("all calls wait", async || holder.inspect("k").await.unwrap().waiters.len() == WAITERS).await;
    for _ in 0..100 {
        time.advance(Duration::from_millis(50));
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    until("the key is polled", async || polls.load(Ordering::Relaxed) > 0).await;
    // The handle polls once per second. A slow machine makes fewer polls, never more.
    let polled = polls.load(Ordering::Relaxed);
    assert!(polled <= 10, "{polled} polls in five seconds");
    drop(held);
    for waiter in waiting {
        waiter.await.unwrap();
    }
}

#[tokio::test]
async fn lost_pushes_cost_only_time() {
    let time = VirtualClock::new();
    let store = Faulty::with_clock(Memory::with_clock(time.clock()), &time);
    let faults = store.faults();
    let locks = Locks::builder_with_store(store).clock(time.clock()).open().await.unwrap();
    let held = locks.lock("k").await.unwrap();
    faults.lose_pushes(true);
    let waiting: Vec<_> = (0..5)
        .map(|number| {
            let locks = locks.clone();
            tokio::spawn(async move {
                let request = locks.lock("k");
                // A handle confirms the pushed grant of a fixed hold by a poll. Without pushes the poll finds the
                // grant.
                let request = if number % 2 == 0 { request.ttl(Duration::from_secs(60)) } else { request };
                request.await.unwrap().release().await.unwrap()
            })
        })
        .collect();
    until("all calls wait", async || locks.inspect("k").await.unwrap().waiters.len() == 5).await;
    drop(held);
    until("all calls have returned", async || {
        time.advance(Duration::from_millis(50));
        waiting.iter().all(tokio::task::JoinHandle::is_finished)
    })
    .await;
    for waiter in waiting {
        waiter.await.unwrap();
    }
}

#[tokio::test]
async fn panicking_poll_fails_only_its_call() {
    let time = VirtualClock::new();
    let store = Faulty::with_clock(Memory::with_clock(time.clock()), &time);
    let faults = store.faults();
    let locks = Locks::builder_with_store(store).clock(time.clock()).open().await.unwrap();
    let held = locks.lock("k").await.unwrap();
    faults.next(Operation::Poll, Fault::Panic);
    let waiting = tokio::spawn({
        let locks = locks.clone();
        async move { locks.lock("k").await.map(drop) }
    });
    until("the call has failed", async || {
        time.advance(Duration::from_millis(20));
        waiting.is_finished()
    })
    .await;
    assert_eq!(waiting.await.unwrap().unwrap_err().kind(), ErrorKind::Internal);
    assert!(held.is_held());
    until("the queue is empty", async || locks.inspect("k").await.unwrap().waiters.is_empty()).await;
    held.release().await.unwrap();
}

#[tokio::test]
async fn wait_limit_reports_unanswered_polls() {
    let time = VirtualClock::new();
    let store = Faulty::with_clock(Memory::with_clock(time.clock()), &time);
    let faults = store.faults();
    let locks = Locks::builder_with_store(store).clock(time.clock()).open().await.unwrap();
    let _held = locks.lock("k").await.unwrap();
    faults.always(Operation::Poll, Fault::Delay(Duration::from_secs(3_600)));
    let waiting = tokio::spawn({
        let locks = locks.clone();
        async move { locks.lock("k").wait(Duration::from_secs(3)).await.map(drop) }
    });
    until("the wait limit has expired", async || {
        time.advance(Duration::from_millis(20));
        waiting.is_finished()
    })
    .await;
    assert_eq!(waiting.await.unwrap().unwrap_err().kind(), ErrorKind::NetworkTimeout);
}

#[tokio::test]
async fn cancelled_call_gets_no_lingering_key() {
    const LINGER: Duration = Duration::from_secs(30);
    let locks = Locks::open("memory:").await.unwrap();
    until("the key lingers", async || {
        drop(locks.lock("k").linger(LINGER).await.unwrap());
        locks.inspect("k").await.unwrap().holders.first().is_some_and(|holder| holder.lingers)
    })
    .await;
    let token = tokio_util::sync::CancellationToken::new();
    token.cancel();
    let cancelled = locks.lock("k").linger(LINGER).cancel(token).await;
    assert_eq!(cancelled.unwrap_err().kind(), ErrorKind::Cancelled);
    assert!(locks.lock("k").linger(LINGER).try_acquire().await.unwrap().is_some());
}

/// The answer to the request to linger comes when the lease, which counts from that request, is over.
#[tokio::test]
async fn slow_answer_gives_no_lease() {
    const LINGER: Duration = Duration::from_millis(200);
    let time = VirtualClock::new();
    let store = Faulty::with_clock(Memory::with_clock(time.clock()), &time);
    let faults = store.faults();
    let locks = Locks::builder_with_store(store).clock(time.clock()).open().await.unwrap();
    faults.always(Operation::Linger, Fault::DelayReply(LINGER + Duration::from_millis(50)));
    for _ in 0..2 {
        let guard = locks.lock("k").linger(LINGER).await.unwrap();
        time.advance(Duration::from_millis(1));
        guard.release().await.unwrap();
    }
    let mut events = locks.events();
    let waiting = tokio::spawn(locks.lock("k").linger(LINGER).into_future());
    until("the call has the key", async || {
        time.advance(Duration::from_millis(10));
        waiting.is_finished()
    })
    .await;
    drop(waiting.await.unwrap().unwrap());
    let event = loop {
        if let event @ stanchion::Event::Acquired { .. } = events.next().await.unwrap() {
            break event;
        }
    };
    assert!(matches!(event, stanchion::Event::Acquired { is_local: false, .. }), "{event:?}");
}
