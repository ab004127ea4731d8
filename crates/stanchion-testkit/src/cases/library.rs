//! The public API of the library, on any store.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use stanchion::store::ForceReleaseOutcome;
use stanchion::{Demand, ErrorKind, LossCause, Released, Store};

use crate::environment::{Environment, until};

const MINUTE: Duration = Duration::from_secs(60);

pub async fn lock_waits_for_earlier_holder<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let guard = one.lock("k").metadata("first").await.unwrap();
    assert!(two.try_lock("k").await.unwrap().is_none());
    let waiting = tokio::spawn(two.lock("k").into_future());
    until("the second handle waits", async || two.inspect("k").await.unwrap().waiters.len() == 1).await;
    let fence = guard.fence();
    assert_eq!(guard.release().await.unwrap(), Released::Now);
    let guard = waiting.await.unwrap().unwrap();
    assert!(guard.fence() > fence && guard.is_held());
    drop(guard);
    until("the dropped guard has released the key", async || !one.is_locked("k").await.unwrap()).await;
}

pub async fn wait_limit_ends_the_wait<S: Store>(env: &Environment<S>) {
    let locks = env.locks().open().await.unwrap();
    let _guard = locks.lock("k").await.unwrap();
    let waiting = tokio::spawn(locks.lock("k").wait(Duration::from_millis(1500)).into_future());
    until("the second handle waits", async || locks.inspect("k").await.unwrap().waiters.len() == 1).await;
    env.advance(Duration::from_millis(1510)).await;
    assert_eq!(waiting.await.unwrap().unwrap_err().kind(), ErrorKind::Timeout);
    until("the queue is empty", async || locks.inspect("k").await.unwrap().waiters.is_empty()).await;
}

pub async fn permits_never_exceed_capacity<S: Store>(env: &Environment<S>) {
    let handles = [env.locks().open().await.unwrap(), env.locks().open().await.unwrap()];
    let (inside, most) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let tasks: Vec<_> = (0..12)
        .map(|i| {
            let locks = handles[i % 2].clone();
            let (inside, most) = (inside.clone(), most.clone());
            tokio::spawn(async move {
                for _ in 0..10 {
                    let guard = locks.lock("k").demand(Demand::new(1, 3).unwrap()).await.unwrap();
                    most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    tokio::task::yield_now().await;
                    inside.fetch_sub(1, Ordering::SeqCst);
                    guard.release().await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert!(most.load(Ordering::SeqCst) <= 3);
    assert!(!handles[0].is_locked("k").await.unwrap());
}

pub async fn run_makes_read_modify_write_atomic<S: Store>(env: &Environment<S>) {
    let handles = [env.locks().open().await.unwrap(), env.locks().open().await.unwrap()];
    let counter = Arc::new(AtomicU32::new(0));
    let tasks: Vec<_> = (0..8)
        .map(|i| {
            let (locks, counter) = (handles[i % 2].clone(), counter.clone());
            tokio::spawn(async move {
                for _ in 0..15 {
                    let work = async |_: &stanchion::Guard| {
                        let read = counter.load(Ordering::SeqCst);
                        tokio::task::yield_now().await;
                        counter.store(read + 1, Ordering::SeqCst);
                    };
                    locks.lock("k").run(work).await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(counter.load(Ordering::SeqCst), 120);
}

pub async fn force_release_ends_running_body<S: Store>(env: &Environment<S>) {
    let (locks, operator) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let running = tokio::spawn({
        let locks = locks.clone();
        async move { locks.lock("k").run(async |_| std::future::pending::<()>().await).await }
    });
    until("the body runs", async || operator.is_locked("k").await.unwrap()).await;
    let fence = operator.inspect("k").await.unwrap().holders[0].fence;
    assert_eq!(operator.force_release("k", fence, "stuck").await.unwrap(), ForceReleaseOutcome::Released);
    assert_eq!(running.await.unwrap().unwrap_err().kind(), ErrorKind::Lost(LossCause::ForceReleased));
    assert!(operator.lock("k").await.unwrap().fence() > fence);
}

pub async fn other_handle_adopts_detached_hold<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let guard = one.lock("k").ttl(MINUTE).await.unwrap();
    let fence = guard.fence();
    let token = guard.detach();
    one.close().await.unwrap();
    assert!(two.owns(&token).await.unwrap());
    let guard = two.adopt(token.to_string().parse().unwrap()).await.unwrap();
    assert_eq!(guard.fence(), fence);
    assert!(!two.owns(&token).await.unwrap(), "the old token has ended");
    assert_eq!(two.adopt(token).await.unwrap_err().kind(), ErrorKind::Lost(LossCause::Missing));
    guard.extend(MINUTE * 2).await.unwrap();
    assert_eq!(guard.release().await.unwrap(), Released::Now);
    assert!(!two.is_locked("k").await.unwrap());
}

pub async fn fixed_hold_is_lost_before_key_is_free<S: Store>(env: &Environment<S>) {
    let locks = env.locks().open().await.unwrap();
    let ttl = Duration::from_millis(400);
    let guard = locks.lock("k").ttl(ttl).await.unwrap();
    let (valid_for, remaining) = (guard.valid_for().unwrap(), guard.remaining().unwrap());
    let slack = Duration::from_millis(10);
    assert!(
        remaining < ttl + slack && remaining < valid_for,
        "the guard has {remaining:?} of {ttl:?}, and the store keeps the hold for {valid_for:?}"
    );
    env.advance(remaining).await;
    assert!(!guard.is_held());
    assert!(locks.try_lock("k").await.unwrap().is_none(), "the key stays locked during the holder's grace");
    assert_eq!(guard.lost().await, LossCause::TtlExpired);
    assert_eq!(guard.extend(ttl).await.unwrap_err().kind(), ErrorKind::Lost(LossCause::TtlExpired));
    assert_eq!(guard.release().await.unwrap(), Released::AlreadyLost);
    until("the key is free", async || locks.try_lock("k").await.unwrap().is_some()).await;
}

pub async fn cooldown_rejects_early_requests<S: Store>(env: &Environment<S>) {
    let locks = env.locks().open().await.unwrap();
    let pause = Duration::from_millis(200);
    let mut ran = 0;
    for _ in 0..3 {
        if let Some(guard) = locks.lock("k").cooldown(pause).try_acquire().await.unwrap() {
            ran += 1;
            guard.release().await.unwrap();
        }
    }
    assert_eq!(ran, 1);
    env.advance(pause + Duration::from_millis(10)).await;
    assert!(locks.try_lock("k").await.unwrap().is_some());
}

pub async fn namespaces_are_isolated<S: Store>(env: &Environment<S>) {
    let one = env.locks().namespace("one").open().await.unwrap();
    let two = env.locks().namespace("two").open().await.unwrap();
    let _guard = one.lock("k").await.unwrap();
    let _other = two.try_lock("k").await.unwrap().expect("the other namespace has its own key");
    assert_eq!(one.list("").await.unwrap().len(), 1);
    assert!(one.list("x").await.unwrap().is_empty());
    assert!(env.locks().open().await.unwrap().list("").await.unwrap().is_empty());
}

pub async fn invalid_arguments_are_rejected<S: Store>(env: &Environment<S>) {
    let locks = env.locks().open().await.unwrap();
    for name in ["".to_owned(), "x".repeat(513), "a\0b".to_owned()] {
        for error in [
            locks.try_lock(name.clone()).await.map(drop).unwrap_err(),
            locks.inspect(name.clone()).await.map(drop).unwrap_err(),
            locks.force_release(name, stanchion::Fence::new(1), "x").await.map(drop).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        }
    }
    for ttl in [Duration::ZERO, Duration::from_millis(9), Duration::MAX] {
        assert_eq!(locks.lock("k").ttl(ttl).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
    }
    assert!(locks.list("").await.unwrap().is_empty());
}
