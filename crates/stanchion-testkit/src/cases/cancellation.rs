//! Drops every future of the library at its first, second, … n-th poll, and checks that the store is empty soon after.

use std::future::Future;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use stanchion::store::{Fault, Faulty, Operation};
use stanchion::{Error, KeyRequest, Locks, Store};

use crate::environment::{Environment, until};

const MINUTE: Duration = Duration::from_secs(60);

/// Maximum number of polls until a future completes.
const MAX_POLLS: usize = 400;

/// A handle on a slow store, and a second handle that observes the same data.
struct Handles<S> {
    slow: Arc<Faulty<S>>,
    locks: Locks,
    observer: Locks,
}

/// Calls `each` twice: with a store that delays every operation, and with a store that delays every reply.
async fn with_slow_stores<S: Store>(env: &Environment<S>, mut each: impl AsyncFnMut(Handles<S>)) {
    for fault in [Fault::Delay, Fault::DelayReply] {
        let slow = Arc::new(Faulty::new(env.open()));
        for operation in Operation::ALL {
            slow.faults().always(*operation, fault(Duration::from_millis(1)));
        }
        let locks = env.locks_on(slow.clone()).open().await.unwrap();
        let observer = env.locks().open().await.unwrap();
        each(Handles { slow, locks, observer }).await;
    }
}

/// Polls a future up to `polls` times and drops it. Returns whether the future completed.
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
            // Drop the future while it waits for a reply, and not only after a reply has woken it.
            Poll::Pending if polled == polls => Poll::Ready(false),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Waits until the store has neither holds nor waiters.
async fn until_empty(observer: &Locks, what: &str, polls: usize) {
    let left = async || observer.list("").await.unwrap();
    until(&format!("{what}, dropped after {polls} polls, leaves nothing"), async || left().await.is_empty()).await;
}

/// Calls `work` again and again, drops its future one poll later each time, and stops when a future completes.
async fn at_every_poll<T>(observer: &Locks, what: &str, mut work: impl AsyncFnMut() -> T) {
    for polls in 0..MAX_POLLS {
        let completed = dropped_after(polls, work()).await;
        until_empty(observer, what, polls).await;
        if completed {
            assert!(polls > 0, "{what} completed without a poll");
            return;
        }
    }
    panic!("{what} did not complete within {MAX_POLLS} polls");
}

pub async fn dropped_calls_leave_nothing<S: Store>(env: &Environment<S>) {
    with_slow_stores(env, async |Handles { slow, locks, observer }| {
        at_every_poll(&observer, "lock", async || locks.lock("k").await.unwrap()).await;
        at_every_poll(&observer, "a fixed lifetime", async || locks.lock("k").ttl(MINUTE).await.unwrap()).await;
        at_every_poll(&observer, "a wait limit", async || locks.lock("k").wait(MINUTE).await.unwrap()).await;
        at_every_poll(&observer, "try_lock", async || locks.try_lock("k").await.unwrap()).await;
        at_every_poll(&observer, "run", async || locks.lock("k").run(async |_| ()).await.unwrap()).await;
        let released = async || locks.lock("k").await.unwrap().release().await.unwrap();
        at_every_poll(&observer, "lock and release", released).await;
        let extended = async || locks.lock("k").ttl(MINUTE).await.unwrap().extend(MINUTE * 2).await.unwrap();
        at_every_poll(&observer, "extend", extended).await;
        let force_released = async || {
            let guard = observer.lock("k").await.unwrap();
            locks.force_release("k", guard.fence(), "test").await.unwrap()
        };
        at_every_poll(&observer, "force_release", force_released).await;
        let inspected = async || {
            locks.inspect("k").await.unwrap();
            locks.is_locked("k").await.unwrap();
            locks.list("").await.unwrap()
        };
        at_every_poll(&observer, "inspect, is_locked and list", inspected).await;
        let slept = async || {
            let guard = locks.lock("k").await.unwrap();
            guard.verify().await.unwrap();
            let time_passes = async {
                loop {
                    env.advance(Duration::from_millis(5)).await;
                    tokio::task::yield_now().await;
                }
            };
            tokio::select! {
                slept = guard.sleep(Duration::from_millis(20)) => slept.unwrap(),
                () = time_passes => {}
            }
        };
        at_every_poll(&observer, "verify and sleep", slept).await;
        let closed = async || {
            let another = env.locks_on(slow.clone()).open().await.unwrap();
            let _guard = another.lock("k").await.unwrap();
            another.close().await.unwrap();
        };
        at_every_poll(&observer, "open and close", closed).await;
    })
    .await;
}

pub async fn dropped_waits_leave_nothing<S: Store>(env: &Environment<S>) {
    with_slow_stores(env, async |Handles { locks, observer, .. }| {
        for ttl in [None, Some(MINUTE)] {
            let held = async || match ttl {
                Some(ttl) => observer.lock("k").ttl(ttl).await.unwrap(),
                None => observer.lock("k").await.unwrap(),
            };
            let handed_over = async || {
                let mut first = Some(held().await);
                let request = locks.lock("k");
                let mut waiting = Box::pin(if let Some(ttl) = ttl { request.ttl(ttl) } else { request }.into_future());
                // Release the key right after the first poll, so that the grant can race the drop of the wait.
                let granted = std::future::poll_fn(|context| {
                    let poll = waiting.as_mut().poll(context);
                    drop(first.take());
                    poll
                });
                granted.await.unwrap()
            };
            at_every_poll(&observer, "a hand-off", handed_over).await;
            // A detached hold stays until a call adopts it. If that call is dropped, its handle must release the hold.
            for polls in 0..MAX_POLLS {
                let token = held().await.detach();
                let completed = dropped_after(polls, async { locks.adopt(token.clone()).await.unwrap() }).await;
                // If the call was dropped before it sent its request, the old token still holds the key.
                if observer.owns(&token).await.unwrap() {
                    drop(observer.adopt(token).await);
                }
                until_empty(&observer, "adopt", polls).await;
                if completed {
                    break;
                }
                assert!(polls < MAX_POLLS - 1, "adopt did not complete");
            }
        }
        let lost = async || {
            let guard = locks.lock("k").await.unwrap();
            observer.force_release("k", guard.fence(), "test").await.unwrap();
            guard.lost().await
        };
        at_every_poll(&observer, "lost", lost).await;
    })
    .await;
}

pub async fn dropped_primitives_leave_nothing<S: Store>(env: &Environment<S>) {
    with_slow_stores(env, async |Handles { locks, observer, .. }| {
        at_every_poll(&observer, "read", async || locks.read("k").await.unwrap()).await;
        at_every_poll(&observer, "write", async || locks.write("k").await.unwrap()).await;
        at_every_poll(&observer, "permits", async || locks.semaphore("k", 3).permits(2).await.unwrap()).await;
        let several =
            || locks.lock_all([KeyRequest::lock("a"), KeyRequest::read("b"), KeyRequest::semaphore("c", 2, 1)]);
        at_every_poll(&observer, "lock_all", async || several().await.unwrap()).await;
        let released = async || several().await.unwrap().release().await.unwrap();
        at_every_poll(&observer, "lock_all and release", released).await;
        at_every_poll(&observer, "lock_all and run", async || several().run(async |_| ()).await.unwrap()).await;
        let taken = async || {
            let _guard = observer.lock("b").await.unwrap();
            locks.lock_all(["a", "b"]).try_acquire().await.unwrap()
        };
        at_every_poll(&observer, "lock_all of a locked key", taken).await;
        let once = async || locks.once("k").run(async |_| Ok::<_, Error>(())).await.unwrap();
        at_every_poll(&observer, "once", once).await;
        let skipped = async || {
            let _guard = observer.lock("k").await.unwrap();
            locks.once("k").run(async |_| Ok::<_, Error>(())).await.unwrap()
        };
        at_every_poll(&observer, "once during another run", skipped).await;
        let forgotten = async || {
            observer.once("k").run(async |_| Ok::<_, Error>(())).await.unwrap();
            locks.forget_run("k").await.unwrap()
        };
        at_every_poll(&observer, "forget_run", forgotten).await;
        let election = locks.elect("k");
        at_every_poll(&observer, "campaign", async || election.campaign().await.unwrap()).await;
        let resigned = async || election.campaign().await.unwrap().resign().await.unwrap();
        at_every_poll(&observer, "resign", resigned).await;
        at_every_poll(&observer, "lead", async || election.clone().lead(async |_| ()).await.unwrap()).await;
        // Querying the status of a token that has ended creates nothing.
        let token = observer.lock("k").await.unwrap().detach();
        drop(observer.adopt(token.clone()).await.unwrap());
        until_empty(&observer, "adopt", 0).await;
        at_every_poll(&observer, "status", async || locks.status(&token).await.unwrap()).await;
    })
    .await;
}
