//! Every future of the public interface, dropped at its first, second, … n-th poll: a second later nothing is left.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests wait on the real clock, and may panic")]

use std::future::Future;
use std::task::Poll;
use std::time::{Duration, Instant};

use stanchion::store::{Fault, Faulty, Memory, Step};
use stanchion::{Guard, Locks, Store, Wanted};

/// Polls a future `polls` times and drops it. Tells whether it had completed.
async fn dropped_after<T>(polls: usize, future: impl Future<Output = T>) -> bool {
    let mut future = Box::pin(future);
    let mut polled = 0;
    std::future::poll_fn(|context| {
        if polled == polls {
            return Poll::Ready(false);
        }
        polled += 1;
        match future.as_mut().poll(context) {
            Poll::Ready(_) => Poll::Ready(true),
            // Dropped while it waits for an answer, not only when one has come.
            Poll::Pending if polled == polls => Poll::Ready(false),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// A second later nothing is left: no hold, no place in a queue.
async fn nothing_is_left(observer: &Locks, what: &str, polls: usize) {
    let start = Instant::now();
    loop {
        let left = observer.list("").await.unwrap();
        if left.is_empty() {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(1), "{what}, dropped after {polls} polls, left {left:#?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Drops what `work` makes at each of its polls, until it completes.
async fn at_every_poll<T>(observer: &Locks, what: &str, mut work: impl AsyncFnMut() -> T, most: usize) {
    for polls in 0..most {
        let completed = dropped_after(polls, work()).await;
        nothing_is_left(observer, what, polls).await;
        if completed {
            assert!(polls > 0, "{what} did not run");
            return;
        }
    }
    panic!("{what} did not complete within {most} polls");
}

const MINUTE: Duration = Duration::from_secs(60);

/// The whole interface, on a store whose every answer takes a moment, before or after it is done.
async fn the_whole_interface(store: impl Store + Clone, fault: Fault) {
    let slow = Faulty::new(store.clone());
    for step in [
        Step::OpenSession,
        Step::Beat,
        Step::CloseSession,
        Step::SessionLives,
        Step::Acquire,
        Step::Poll,
        Step::Abandon,
        Step::Release,
        Step::Extend,
        Step::Adopt,
        Step::Evict,
        Step::Inspect,
        Step::List,
    ] {
        slow.faults().always(step, fault);
    }
    let locks = Locks::with_store(slow.clone()).await.unwrap();
    let observer = Locks::with_store(store).await.unwrap();
    let held = async |ttl: Option<Duration>| -> Guard {
        let request = observer.lock("held");
        match ttl {
            Some(ttl) => request.ttl(ttl).await.unwrap(),
            None => request.await.unwrap(),
        }
    };
    let most = 400;
    at_every_poll(&observer, "lock", async || locks.lock("k").await.unwrap(), most).await;
    at_every_poll(&observer, "lock for a fixed term", async || locks.lock("k").ttl(MINUTE).await.unwrap(), most).await;
    at_every_poll(&observer, "lock with a limit", async || locks.lock("k").wait(MINUTE).await.unwrap(), most).await;
    at_every_poll(&observer, "try_lock", async || locks.try_lock("k").await.unwrap(), most).await;
    at_every_poll(&observer, "run", async || locks.lock("k").run(async |guard| guard.fence()).await.unwrap(), most)
        .await;
    at_every_poll(
        &observer,
        "lock and release",
        async || locks.lock("k").await.unwrap().release().await.unwrap(),
        most,
    )
    .await;
    let waits_for_a_hand_off = async |ttl: Option<Duration>| {
        let first = held(ttl).await;
        let request = locks.lock("held");
        let request = if let Some(ttl) = ttl { request.ttl(ttl) } else { request };
        let mut waiting = Box::pin(request.into_future());
        // Let go as soon as it waits, so that the grant and the end of the wait can meet.
        let mut first = Some(first);
        std::future::poll_fn(|context| {
            let poll = waiting.as_mut().poll(context);
            drop(first.take());
            poll
        })
        .await
        .unwrap()
    };
    at_every_poll(&observer, "a hand-off", async || waits_for_a_hand_off(None).await, most).await;
    at_every_poll(&observer, "a hand-off for a fixed term", async || waits_for_a_hand_off(Some(MINUTE)).await, most)
        .await;
    at_every_poll(
        &observer,
        "extend",
        async || {
            let guard = locks.lock("k").ttl(MINUTE).await.unwrap();
            guard.extend(MINUTE * 2).await.unwrap();
        },
        most,
    )
    .await;
    at_every_poll(
        &observer,
        "force_release",
        async || {
            let guard = held(None).await;
            let _outcome = locks.force_release("held", guard.fence(), "test").await.unwrap();
        },
        most,
    )
    .await;
    at_every_poll(
        &observer,
        "lost",
        async || {
            let guard = locks.lock("k").await.unwrap();
            let _outcome = observer.force_release("k", guard.fence(), "test").await.unwrap();
            guard.lost().await
        },
        most,
    )
    .await;
    at_every_poll(
        &observer,
        "inspect and its like",
        async || {
            locks.inspect("k").await.unwrap();
            locks.is_locked("k").await.unwrap();
            locks.list("").await.unwrap()
        },
        most,
    )
    .await;
    at_every_poll(
        &observer,
        "open and close",
        async || {
            let another = Locks::with_store(slow.clone()).await.unwrap();
            let _guard = another.lock("k").await.unwrap();
            another.close().await.unwrap();
        },
        most,
    )
    .await;
    primitives(&locks, &observer, most).await;
    // What is detached is left on purpose, until somebody adopts it: then the one who gives up releases it.
    for polls in 0..most {
        let token = held(Some(MINUTE)).await.detach();
        let completed = dropped_after(polls, async { locks.adopt(token.clone()).await.unwrap() }).await;
        // If adopting was not even asked for, the old token still holds.
        if observer.owns(&token).await.unwrap() {
            drop(observer.adopt(token).await);
        }
        nothing_is_left(&observer, "adopt", polls).await;
        if completed {
            break;
        }
        assert!(polls < most - 1, "adopt did not complete");
    }
}

/// What is made of locks.
async fn primitives(locks: &Locks, observer: &Locks, most: usize) {
    at_every_poll(observer, "read", async || locks.read("k").await.unwrap(), most).await;
    at_every_poll(observer, "write", async || locks.write("k").await.unwrap(), most).await;
    at_every_poll(observer, "permits", async || locks.semaphore("k", 3).permits(2).await.unwrap(), most).await;
    let several = || locks.lock_all([Wanted::lock("a"), Wanted::read("b"), Wanted::semaphore("c", 2, 1)]);
    at_every_poll(observer, "lock_all", async || several().await.unwrap(), most).await;
    at_every_poll(observer, "lock_all and release", async || several().await.unwrap().release().await.unwrap(), most)
        .await;
    at_every_poll(
        observer,
        "lock_all and run",
        async || several().run(async |guards| guards.len()).await.unwrap(),
        most,
    )
    .await;
    let taken = async || {
        let _guard = observer.lock("b").await.unwrap();
        locks.lock_all(["a", "b"]).try_acquire().await.unwrap()
    };
    at_every_poll(observer, "lock_all of what is taken", taken, most).await;
    let once = async || locks.once("k").run(async |_| Ok::<_, stanchion::Error>(())).await.unwrap();
    at_every_poll(observer, "once", once, most).await;
    let skipped = async || {
        let _guard = observer.lock("k").await.unwrap();
        locks.once("k").run(async |_| Ok::<_, stanchion::Error>(())).await.unwrap()
    };
    at_every_poll(observer, "once, while it runs", skipped, most).await;
    let election = locks.elect("k");
    at_every_poll(observer, "campaign", async || election.campaign().await.unwrap(), most).await;
    at_every_poll(observer, "resign", async || election.campaign().await.unwrap().resign().await.unwrap(), most).await;
    at_every_poll(observer, "lead", async || election.lead(async |_| ()).await.unwrap(), most).await;
    let status = async || {
        let token = observer.lock("k").await.unwrap().detach();
        let status = locks.status(&token).await;
        drop(observer.adopt(token).await);
        status
    };
    // Given up before it is adopted again it stays, as detached holds do: only the whole of it is looked at.
    status().await.unwrap();
    nothing_is_left(observer, "status", 0).await;
    let verify = async || {
        let guard = locks.lock("k").await.unwrap();
        guard.verify().await.unwrap();
        guard.sleep(Duration::from_millis(20)).await.unwrap();
    };
    at_every_poll(observer, "verify and sleep", verify, most).await;
}

#[tokio::test]
async fn memory_with_slow_requests() {
    the_whole_interface(Memory::new(), Fault::Delay(Duration::from_millis(1))).await;
}

#[tokio::test]
async fn memory_with_slow_answers() {
    the_whole_interface(Memory::new(), Fault::DelayReply(Duration::from_millis(1))).await;
}

/// The embedded store: no file of a session is left either.
#[cfg(feature = "sqlite")]
#[tokio::test]
async fn sqlite_with_slow_requests_and_slow_answers() {
    use stanchion::store::Sqlite;
    use std::sync::Arc;

    for fault in [Fault::Delay(Duration::from_millis(1)), Fault::DelayReply(Duration::from_millis(1))] {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(Sqlite::open(folder.path().join("store")).unwrap());
        the_whole_interface(store.clone(), fault).await;
        let sessions = folder.path().join("store/sessions");
        let files =
            || -> Vec<_> { std::fs::read_dir(&sessions).unwrap().map(|file| file.unwrap().file_name()).collect() };
        let start = Instant::now();
        while !files().is_empty() {
            assert!(start.elapsed() < Duration::from_secs(5), "{fault:?}: files of sessions are left: {:?}", files());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
