//! Defines the tests of the blocking API that run on every store.
#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "tests wait on the real clock, and may panic"
)]

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use stanchion::blocking::Locks;
use stanchion::store::ForceReleaseOutcome;
use stanchion::{ErrorKind, LossCause, Released};

/// Opens a handle. Each call returns a handle on the same data.
pub(crate) type Open<'a> = &'a dyn Fn() -> Locks;

const LONG: Duration = Duration::from_secs(30);

/// Makes a test of every case for a store. The expression creates fresh data and returns an [`Open`].
#[macro_export]
macro_rules! blocking_cases {
    ($name:ident, $open:expr) => {
        mod $name {
            #[allow(unused_imports)]
            use super::*;
            $crate::blocking_cases! { $open;
                every_method_works_without_a_runtime, threads_hold_one_at_a_time, lock_works_in_spawn_blocking,
                lock_works_inside_a_current_thread_task, body_learns_of_a_lost_lock,
                closed_handle_rejects_calls, other_thread_cancels_a_wait,
            }
        }
    };
    ($open:expr; $($case:ident),* $(,)?) => {
        $(#[test] fn $case() {
            let open = $open;
            $crate::cases::$case(&open);
        })*
    };
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LONG, "timed out while waiting until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub(crate) fn every_method_works_without_a_runtime(open: Open<'_>) {
    let (locks, other) = (open(), open());
    let guard = locks.lock("k").metadata("first").acquire().unwrap();
    let first = guard.fence();
    assert!(guard.is_held());
    assert!(locks.is_locked("k").unwrap());
    let state = other.inspect("k").unwrap();
    assert_eq!((state.holders[0].fence, state.holders[0].metadata.as_deref()), (first, Some("first")));
    assert_eq!(other.list("").unwrap().len(), 1);
    assert!(other.try_lock("k").unwrap().is_none());
    let timed_out = other.lock("k").wait(Duration::from_millis(20)).acquire();
    assert_eq!(timed_out.unwrap_err().kind(), ErrorKind::Timeout);
    let waiter = std::thread::spawn({
        let other = other.clone();
        move || other.lock("k").acquire().unwrap()
    });
    until("the call waits", || locks.inspect("k").unwrap().waiters.len() == 1);
    assert_eq!(guard.release().unwrap(), Released::Now);
    let guard = waiter.join().unwrap();
    assert!(guard.fence() > first);
    drop(guard);

    let guard = locks.lock("fixed").ttl(LONG).acquire().unwrap();
    guard.extend(LONG * 3).unwrap();
    assert!(guard.remaining().unwrap() > LONG);
    let token = guard.detach();
    assert!(other.owns(&token).unwrap());
    let guard = other.adopt(token).unwrap();
    let outcome = locks.force_release("fixed", guard.fence(), "a test").unwrap();
    assert_eq!(outcome, ForceReleaseOutcome::Released);
    assert_eq!(guard.lost(), LossCause::ForceReleased);
    assert_eq!(guard.release().unwrap(), Released::AlreadyLost);
    other.drain("enough");
    assert_eq!(other.lock("new").acquire().unwrap_err().kind(), ErrorKind::Draining);
    other.close().unwrap();
    locks.close().unwrap();
}

pub(crate) fn threads_hold_one_at_a_time(open: Open<'_>) {
    let (inside, total) = (AtomicU32::new(0), AtomicU32::new(0));
    let handles = [open(), open()];
    std::thread::scope(|scope| {
        for locks in &handles {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..5 {
                        let work = || {
                            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "another thread is inside");
                            std::thread::yield_now();
                            inside.fetch_sub(1, Ordering::SeqCst);
                            total.fetch_add(1, Ordering::SeqCst);
                        };
                        locks.lock("k").run(|_| work()).unwrap();
                    }
                });
            }
        }
    });
    assert_eq!(total.into_inner(), 40);
    assert!(!handles[0].is_locked("k").unwrap());
}

pub(crate) fn lock_works_in_spawn_blocking(open: Open<'_>) {
    let locks = open();
    let mut runtimes = [tokio::runtime::Builder::new_current_thread(), tokio::runtime::Builder::new_multi_thread()];
    for builder in &mut runtimes {
        let runtime = builder.enable_all().build().unwrap();
        let held = locks.lock("k").acquire().unwrap();
        let before = held.fence();
        let waiter = locks.clone();
        let waiting = runtime.spawn_blocking(move || waiter.lock("k").run(|guard| guard.fence()));
        until("the call waits", || locks.inspect("k").unwrap().waiters.len() == 1);
        drop(held);
        assert!(runtime.block_on(waiting).unwrap().unwrap() > before);
    }
}

/// The task blocks the only thread of its runtime, so the handle must not depend on that runtime.
///
/// The task does not yield either, so Tokio never renews its budget of 128 operations.
pub(crate) fn lock_works_inside_a_current_thread_task(open: Open<'_>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let locks = open();
    let (done, is_done) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let task = async move {
            for _ in 0..150 {
                locks.lock("k").acquire().unwrap().release().unwrap();
            }
            locks.close().unwrap();
        };
        runtime.block_on(async { tokio::spawn(task).await }).unwrap();
        done.send(()).unwrap();
    });
    is_done.recv_timeout(LONG).expect("the call does not wait for its own runtime");
    thread.join().unwrap();
}

pub(crate) fn body_learns_of_a_lost_lock(open: Open<'_>) {
    let (locks, other) = (open(), open());
    let outcome = locks.lock("k").run(|guard| {
        let token = guard.cancel_token();
        other.force_release("k", guard.fence(), "a test").unwrap();
        until("the token is cancelled", || token.is_cancelled());
        guard.check().unwrap_err().kind()
    });
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Lost(LossCause::ForceReleased));
    assert_eq!(locks.lock("k").run(|_| 42).unwrap(), 42);
    assert!(!other.is_locked("k").unwrap(), "the key is free when the call returns");
}

pub(crate) fn closed_handle_rejects_calls(open: Open<'_>) {
    let locks = open();
    let guard = locks.lock("k").acquire().unwrap();
    locks.close().unwrap();
    assert_eq!(guard.lost(), LossCause::Closed);
    assert_eq!(locks.lock("other").acquire().unwrap_err().kind(), ErrorKind::Draining);
    let _ = locks.inspect("k"); // may succeed or fail, but must return
}

pub(crate) fn other_thread_cancels_a_wait(open: Open<'_>) {
    let locks = open();
    let _held = locks.lock("k").acquire().unwrap();
    let cancel = tokio_util::sync::CancellationToken::new();
    let waiting = std::thread::spawn({
        let request = locks.lock("k").cancel(cancel.clone());
        move || request.acquire().unwrap_err()
    });
    until("the call waits", || locks.inspect("k").unwrap().waiters.len() == 1);
    cancel.cancel();
    assert_eq!(waiting.join().unwrap().kind(), ErrorKind::Cancelled);
    until("the queue is empty", || locks.inspect("k").unwrap().waiters.is_empty());
}
