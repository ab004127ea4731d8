//! Tests the library on any runtime, on several runtimes, and without a runtime.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests wait on the real clock, and may panic")]

use std::future::Future;
use std::sync::Arc;
use std::task::{Context, Poll, Wake};
use std::thread::Thread;
use std::time::{Duration, Instant};

use stanchion::{ErrorKind, Locks};

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs a future on the calling thread, without a runtime.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let waker = Arc::new(Unpark(std::thread::current())).into();
    let mut context = Context::from_waker(&waker);
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(30), "timed out while waiting until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn locks_work_without_any_runtime() {
    let locks = block_on(Locks::open("memory:")).unwrap();
    let guard = block_on(locks.lock("k").ttl(Duration::from_secs(60)).into_future()).unwrap();
    let limit = Duration::from_millis(20);
    assert_eq!(block_on(locks.lock("k").wait(limit).into_future()).unwrap_err().kind(), ErrorKind::Timeout);
    block_on(guard.extend(Duration::from_secs(90))).unwrap();
    let waiter = std::thread::spawn({
        let locks = locks.clone();
        move || block_on(locks.lock("k").run(async |guard| guard.is_held())).unwrap()
    });
    until("the call waits", || block_on(locks.inspect("k")).unwrap().waiters.len() == 1);
    drop(guard);
    assert!(waiter.join().unwrap());
    block_on(locks.close()).unwrap();
}

#[test]
fn handle_outlives_the_runtimes_it_serves() {
    let first = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let locks = first.block_on(Locks::open("memory:")).unwrap();
    let guard = first.block_on(locks.lock("k").into_future()).unwrap();
    let second = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
    let waiting = second.spawn(locks.lock("k").into_future());
    until("the call waits", || block_on(locks.inspect("k")).unwrap().waiters.len() == 1);
    first.shutdown_background();
    drop(guard);
    let guard = second.block_on(waiting).unwrap().unwrap();
    assert!(guard.is_held());
    // A runtime that ends drops its tasks, and the handle abandons their requests.
    drop(second.spawn(locks.lock("k").into_future())); // the detached task waits until its runtime ends
    until("the call waits", || block_on(locks.inspect("k")).unwrap().waiters.len() == 1);
    second.shutdown_background();
    until("the queue is empty", || block_on(locks.inspect("k")).unwrap().waiters.is_empty());
    assert!(guard.is_held());
}

#[test]
fn guard_dropped_in_unwinding_releases() {
    let locks = block_on(Locks::open("memory:")).unwrap();
    let panicked = std::thread::spawn({
        let locks = locks.clone();
        move || {
            let _guard = block_on(locks.lock("k").into_future()).unwrap();
            std::panic::resume_unwind(Box::new("on purpose"));
        }
    });
    assert!(panicked.join().is_err());
    until("the key is free", || !block_on(locks.is_locked("k")).unwrap());
}

#[test]
fn last_drop_ends_the_session() {
    let store = stanchion::store::Memory::new();
    let watch = block_on(Locks::with_store(store.clone())).unwrap();
    let locks = block_on(Locks::with_store(store)).unwrap();
    let guard = block_on(locks.lock("k").into_future()).unwrap();
    drop(locks);
    assert!(guard.is_held(), "a guard keeps the session alive");
    assert!(block_on(watch.is_locked("k")).unwrap());
    drop(guard);
    assert!(!block_on(watch.is_locked("k")).unwrap(), "the drop returned before the key was free");
}

#[test]
fn open_and_close_leave_no_thread() {
    let threads = || std::fs::read_dir("/proc/self/task").map(Iterator::count).unwrap_or(0);
    for _ in 0..3 {
        block_on(async { Locks::open("memory:").await.unwrap().close().await.unwrap() });
    }
    let before = threads();
    for _ in 0..50 {
        block_on(async { Locks::open("memory:").await.unwrap().close().await.unwrap() });
    }
    // Other tests run at the same time and have their own threads, so the count is not exact.
    until("the threads have ended", || threads() < before + 20);
}

#[test]
fn invalid_settings_are_rejected_with_a_hint() {
    let no_project = match cfg!(feature = "firestore") {
        true => (ErrorKind::InvalidArgument, "project"),
        false => (ErrorKind::Unsupported, "this build"),
    };
    let cases = [
        ("", ErrorKind::InvalidArgument, "scheme"),
        ("nonsense", ErrorKind::InvalidArgument, "scheme"),
        ("etcd://localhost", ErrorKind::InvalidArgument, "`memory:`"),
        ("memory:x", ErrorKind::InvalidArgument, "nothing more"),
        ("firestore://:secret@localhost", no_project.0, no_project.1),
    ];
    for (url, kind, says) in cases {
        let error = block_on(Locks::open(url)).unwrap_err();
        assert_eq!(error.kind(), kind, "{url}");
        assert!(error.to_string().contains(says), "{url}: {error}");
        assert!(!format!("{error} {error:?} {:?}", Locks::builder(url)).contains("secret"));
    }
    let locks = block_on(Locks::open("memory:")).unwrap();
    let day = Duration::from_secs(24 * 60 * 60);
    for request in [
        locks.lock(""),
        locks.lock("x".repeat(513)),
        locks.lock("a\0b"),
        locks.lock("k").ttl(Duration::ZERO),
        locks.lock("k").ttl(31 * day),
        locks.lock("k").max_hold(Duration::from_nanos(1)),
        locks.lock("k").heartbeat_within(Duration::MAX),
        locks.lock("k").cooldown(Duration::from_millis(9)),
        locks.lock("k").wait(Duration::MAX),
        locks.lock("k").ttl(day).max_hold(day),
        locks.lock("k").metadata("x".repeat(4_097)),
    ] {
        let error = block_on(request.clone().into_future()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{request:?}: {error}");
    }
    assert!(block_on(locks.list("")).unwrap().is_empty());
    let error = block_on(Locks::builder("memory:").session_ttl(Duration::ZERO).open()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    let error = block_on(Locks::builder("memory:").owner(&"x".repeat(129)).open()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}
