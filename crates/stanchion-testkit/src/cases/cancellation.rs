//! Every future of the library, dropped at its first, second, … n-th poll: soon after, nothing is left.

use std::future::Future;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use stanchion::store::{Fault, Faulty, Operation};
use stanchion::{Error, KeyRequest, Locks, Store};

use crate::environment::{Environment, until};

const MINUTE: Duration = Duration::from_secs(60);

/// The most polls that a future may take until it completes.
const MOST: usize = 400;

/// A handle whose store takes a moment for every answer, and one that looks on.
struct Handles<S> {
    slow: Arc<Faulty<S>>,
    locks: Locks,
    observer: Locks,
}

/// With a store that is slow before it does a step, and with one that is slow after it.
async fn with_slow_stores<S: Store>(env: &Environment<S>, mut each: impl AsyncFnMut(Handles<S>)) {
    for fault in [Fault::Delay, Fault::DelayReply] {
        let slow = Arc::new(Faulty::new(env.open()));
        for step in Operation::ALL {
            slow.faults().always(*step, fault(Duration::from_millis(1)));
        }
        let locks = env.locks_on(slow.clone()).open().await.unwrap();
        let observer = env.locks().open().await.unwrap();
        each(Handles { slow, locks, observer }).await;
    }
}

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

/// No hold is left, and no place in a queue.
async fn nothing_is_left(observer: &Locks, what: &str, polls: usize) {
    let left = async || observer.list("").await.unwrap();
    until(&format!("nothing is left of {what}, dropped after {polls} polls"), async || left().await.is_empty()).await;
}

/// Drops what `work` makes at each of its polls, until it completes.
async fn at_every_poll<T>(observer: &Locks, what: &str, mut work: impl AsyncFnMut() -> T) {
    for polls in 0..MOST {
        let completed = dropped_after(polls, work()).await;
        nothing_is_left(observer, what, polls).await;
        if completed {
            assert!(polls > 0, "{what} did not run");
            return;
        }
    }
    panic!("{what} did not complete within {MOST} polls");
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
        let forced = async || {
            let guard = observer.lock("k").await.unwrap();
            locks.force_release("k", guard.fence(), "test").await.unwrap()
        };
        at_every_poll(&observer, "force_release", forced).await;
        let looked = async || {
            locks.inspect("k").await.unwrap();
            locks.is_locked("k").await.unwrap();
            locks.list("").await.unwrap()
        };
        at_every_poll(&observer, "inspect and its like", looked).await;
        let slept = async || {
            let guard = locks.lock("k").await.unwrap();
            guard.verify().await.unwrap();
            let time_passes = async {
                loop {
                    env.pass(Duration::from_millis(5)).await;
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
                // Let go as soon as it waits, so that the grant and the end of the wait can meet.
                let granted = std::future::poll_fn(|context| {
                    let poll = waiting.as_mut().poll(context);
                    drop(first.take());
                    poll
                });
                granted.await.unwrap()
            };
            at_every_poll(&observer, "a hand-off", handed_over).await;
            // What is detached is left on purpose, until somebody adopts it: then the one who gives up releases it.
            for polls in 0..MOST {
                let token = held().await.detach();
                let completed = dropped_after(polls, async { locks.adopt(token.clone()).await.unwrap() }).await;
                // If adopting was not even asked for, the old token still holds.
                if observer.owns(&token).await.unwrap() {
                    drop(observer.adopt(token).await);
                }
                nothing_is_left(&observer, "adopt", polls).await;
                if completed {
                    break;
                }
                assert!(polls < MOST - 1, "adopt did not complete");
            }
        }
        let lost = async || {
            let guard = locks.lock("k").await.unwrap();
            let _outcome = observer.force_release("k", guard.fence(), "test").await.unwrap();
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
        at_every_poll(&observer, "lock_all of what is taken", taken).await;
        let once = async || locks.once("k").run(async |_| Ok::<_, Error>(())).await.unwrap();
        at_every_poll(&observer, "once", once).await;
        let skipped = async || {
            let _guard = observer.lock("k").await.unwrap();
            locks.once("k").run(async |_| Ok::<_, Error>(())).await.unwrap()
        };
        at_every_poll(&observer, "once, while it runs", skipped).await;
        let election = locks.elect("k");
        at_every_poll(&observer, "campaign", async || election.campaign().await.unwrap()).await;
        let resigned = async || election.campaign().await.unwrap().resign().await.unwrap();
        at_every_poll(&observer, "resign", resigned).await;
        at_every_poll(&observer, "lead", async || election.clone().lead(async |_| ()).await.unwrap()).await;
        // A token that nobody has any more is told of, and nothing comes of asking.
        let token = observer.lock("k").await.unwrap().detach();
        drop(observer.adopt(token.clone()).await.unwrap());
        nothing_is_left(&observer, "adopt", 0).await;
        at_every_poll(&observer, "status", async || locks.status(&token).await.unwrap()).await;
    })
    .await;
}
