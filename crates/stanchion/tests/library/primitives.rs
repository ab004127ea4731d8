//! Tests the primitives built on locks under faults: late messages, long outages, and many losses at once.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests wait on the real clock, and may panic")]

use std::collections::HashSet;
use std::sync::mpsc;
use std::time::Duration;

use crate::support::until;
use stanchion::store::{Fault, Faulty, Memory, Operation};
use stanchion::{Error, ErrorKind, Locks, OnLost, OnceGuard, OnceOutcome, RetryPolicy, VirtualClock};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test]
async fn failed_lock_all_cools_nothing() {
    let locks = Locks::open("memory:").await.unwrap();
    let held = locks.lock("b").await.unwrap();
    let request = || locks.lock_all(["a", "b"]).cooldown(60 * SECOND);
    assert!(request().try_acquire().await.unwrap().is_none());
    let error = request().wait(Duration::from_millis(20)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert_eq!(request().wait(Duration::ZERO).await.unwrap_err().kind(), ErrorKind::Busy);
    drop(tokio::time::timeout(Duration::from_millis(20), request().into_future()).await);
    until("the first key is free", async || !locks.is_locked("a").await.unwrap()).await;
    assert_eq!(locks.inspect("a").await.unwrap().closed_for, None, "a call that failed must not start a cooldown");
    drop(held);
    drop(request().await.unwrap());
    until("the first key is closed", async || locks.inspect("a").await.unwrap().closed_for.is_some()).await;
}

#[tokio::test]
async fn lock_all_keeps_first_key_while_waiting() {
    let time = VirtualClock::new();
    let store = Memory::with_clock(time.clock());
    let locks = Locks::builder_with_store(store).clock(time.clock()).open().await.unwrap();
    let held = locks.lock("b").await.unwrap();
    let waiting = tokio::spawn(locks.lock_all(["a", "b"]).heartbeat_within(SECOND).into_future());
    until("the call waits", async || locks.inspect("b").await.unwrap().waiters.len() == 1).await;
    // The heartbeat limit does not count yet, because work that has not begun cannot send heartbeats.
    for _ in 0..50 {
        time.advance(SECOND / 10);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    held.release().await.unwrap();
    let guards = waiting.await.unwrap().unwrap();
    guards.check().unwrap();
    // From now on the work must send heartbeats.
    time.advance(SECOND * 2);
    assert!(guards.check().is_err());
}

#[tokio::test]
async fn late_record_is_not_the_last_run() {
    let memory = Memory::new();
    let slow = Faulty::new(memory.clone());
    let retry = RetryPolicy { attempts: 1, ..RetryPolicy::default() };
    let one = Locks::builder_with_store(slow.clone()).retry(retry).open().await.unwrap();
    let two = Locks::with_store(memory).await.unwrap();
    let ran = one.once("k").slot(5).run(async |_| {
        // The record of this run is delayed.
        slow.faults().next(Operation::Acquire, Fault::Hold);
        Ok::<_, Error>(())
    });
    assert_eq!(ran.await.unwrap(), OnceOutcome::Ran(()), "the run counts even if its record is delayed");
    two.once("k").slot(6).run(async |_| Ok::<_, Error>(())).await.unwrap();
    assert_eq!(slow.faults().deliver().await, 1);
    assert_eq!(two.last_run("k").await.unwrap().unwrap().slot, Some(6));
    let again = two.once("k").slot(6).run(async |_| Ok::<_, Error>(())).await.unwrap();
    assert!(matches!(again, OnceOutcome::Skipped { .. }), "{again:?}");
}

#[tokio::test]
async fn run_is_recorded_after_long_outage() {
    let time = VirtualClock::new();
    let store = Faulty::with_clock(Memory::with_clock(time.clock()), &time);
    let faults = store.faults();
    let locks = Locks::builder_with_store(store).clock(time.clock()).open().await.unwrap();
    let running = tokio::spawn({
        let (locks, faults) = (locks.clone(), faults.clone());
        async move {
            let body = async |_: &OnceGuard| {
                faults.next(Operation::Acquire, Fault::LoseRequest);
                Ok::<_, Error>(())
            };
            locks.once("k").run(body).await
        }
    });
    until("the handle has sent the record", async || faults.count(Operation::Acquire) == 2).await;
    time.advance(6 * SECOND);
    assert_eq!(running.await.unwrap().unwrap(), OnceOutcome::Ran(()));
    assert!(locks.last_run("k").await.unwrap().is_some_and(|run| run.succeeded));
}

#[tokio::test]
async fn one_thread_reports_many_losses() {
    let (sender, calls) = mpsc::channel();
    let hook = OnLost::hook(move |loss| sender.send((loss.fence, std::thread::current().id())).unwrap());
    let locks = Locks::builder("memory:").on_lost(hook).open().await.unwrap();
    let mut guards = Vec::new();
    for key in 0..500 {
        guards.push(locks.lock(format!("k{key}")).await.unwrap());
    }
    locks.close().await.unwrap();
    let mut reported = HashSet::new();
    let mut threads = HashSet::new();
    for _ in 0..500 {
        let (fence, thread) = calls.recv_timeout(30 * SECOND).unwrap();
        reported.insert(fence);
        threads.insert(thread);
    }
    assert_eq!((reported.len(), threads.len()), (500, 1));
}

#[tokio::test]
async fn failed_slot_keeps_finished_slots() {
    let locks = Locks::open("memory:").await.unwrap();
    let ran = async |slot, succeeds: bool| {
        let once = locks.once("k");
        let once = if let Some(slot) = slot { once.slot(slot) } else { once };
        let fault = || Error::new(ErrorKind::Internal, "error of the body");
        matches!(
            once.run(async |_| if succeeds { Ok(()) } else { Err(fault()) }).await,
            Ok(OnceOutcome::Ran(())) | Err(_)
        )
    };
    assert!(ran(Some(5), true).await);
    for _ in 0..3 {
        assert!(ran(Some(6), false).await);
        assert!(!locks.last_run("k").await.unwrap().unwrap().succeeded, "the last run is the failed one");
        for done in [5, 4] {
            assert!(!ran(Some(done), true).await, "slot {done} ran again");
        }
    }
    // A run without a slot does not reset the finished slots either.
    let before = locks.last_run("k").await.unwrap().unwrap().fence;
    assert!(ran(None, true).await && !ran(Some(5), true).await);
    assert!(locks.last_run("k").await.unwrap().unwrap().fence > before);
    assert!(ran(Some(6), true).await && !ran(Some(6), true).await && !ran(Some(5), true).await);
}

#[tokio::test]
async fn lead_retries_through_long_outage() {
    let store = Faulty::new(Memory::new());
    let faults = store.faults();
    let millis = Duration::from_millis;
    let retry = RetryPolicy { attempts: 2, pause: millis(1), longest_pause: millis(2), ..RetryPolicy::default() };
    let locks = Locks::builder_with_store(store).retry(retry).open().await.unwrap();
    let lead = || {
        let locks = locks.clone();
        tokio::spawn(async move { locks.elect("k").lead(async |leadership| leadership.is_leader()).await })
    };
    faults.always(Operation::Acquire, Fault::Fail(ErrorKind::Unavailable));
    let leads = lead();
    until("the candidate keeps retrying", async || leads.is_finished() || faults.count(Operation::Acquire) > 10).await;
    faults.clear();
    assert!(leads.await.unwrap().unwrap());
    // A lasting error ends the campaign.
    faults.always(Operation::Acquire, Fault::Fail(ErrorKind::Unauthorized));
    assert_eq!(lead().await.unwrap().unwrap_err().kind(), ErrorKind::Unauthorized);
    faults.always(Operation::Acquire, Fault::Fail(ErrorKind::Unavailable));
    let (leads, before) = (lead(), faults.count(Operation::Acquire));
    until("the candidate keeps retrying", async || {
        leads.is_finished() || faults.count(Operation::Acquire) > before + 10
    })
    .await;
    locks.drain("a test");
    assert_eq!(leads.await.unwrap().unwrap_err().kind(), ErrorKind::Draining);
}
