//! Tests the handle, its requests and its guards on the memory store.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests wait on the real clock, and may panic"
)]

use std::sync::Arc;
use std::time::Duration;

use crate::support::until;
use stanchion::store::{Fault, Faulty, Memory, Operation, Store};
use stanchion::{Demand, ErrorKind, Event, Locks, LossCause, Released, RetryPolicy, VirtualClock};

const SECOND: Duration = Duration::from_secs(1);

async fn is_free(locks: &Locks, key: &str) -> bool {
    let state = locks.inspect(key).await.unwrap();
    state.holders.is_empty() && state.waiters.is_empty()
}

#[tokio::test]
async fn lock_serves_waiters_in_order() {
    let locks = Locks::open("memory:").await.unwrap();
    let first = locks.lock("k").await.unwrap();
    assert!(locks.try_lock("k").await.unwrap().is_none());
    let mut waiters = Vec::new();
    for i in 0..5 {
        let task = tokio::spawn({
            let locks = locks.clone();
            async move { (i, locks.lock("k").await.unwrap().fence()) }
        });
        until("the call waits", async || locks.inspect("k").await.unwrap().waiters.len() == i + 1).await;
        waiters.push(task);
    }
    let mut last = first.fence();
    drop(first);
    for (expected, task) in waiters.into_iter().enumerate() {
        let (i, fence) = task.await.unwrap();
        assert_eq!(i, expected);
        assert!(fence > last, "the fence did not rise");
        last = fence;
    }
    until("the key is free", async || is_free(&locks, "k").await).await;
}

#[tokio::test]
async fn expired_wait_leaves_nothing() {
    let locks = Locks::open("memory:").await.unwrap();
    let held = locks.lock("k").await.unwrap();
    let error = locks.lock("k").wait(Duration::from_millis(30)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert_eq!(error.to_string(), "key `k` in memory: not obtained within 30ms");
    assert_eq!(locks.lock("k").wait(Duration::ZERO).await.unwrap_err().kind(), ErrorKind::Busy);
    until("the queue is empty", async || locks.inspect("k").await.unwrap().waiters.is_empty()).await;
    assert_eq!(held.release().await.unwrap(), Released::Now);
}

#[tokio::test]
async fn loss_needs_no_store() {
    let time = VirtualClock::new();
    let store = Faulty::with_clock(Memory::with_clock(time.clock()), &time);
    let faults = store.faults();
    let locks = Locks::builder_with_store(store).clock(time.clock()).open().await.unwrap();
    let guard = locks.lock("k").await.unwrap();
    // The keeper renews the session at 2, 4, … seconds.
    for _ in 0..20 {
        let renewals = faults.count(Operation::RenewSession);
        time.advance(2 * SECOND);
        until("the keeper renews the session", async || faults.count(Operation::RenewSession) > renewals).await;
    }
    assert!(guard.is_held());
    let left = guard.remaining().unwrap();
    assert!(left > 7 * SECOND && left < 8 * SECOND, "{left:?}");
    faults.always(Operation::RenewSession, Fault::Fail(ErrorKind::Unavailable));
    time.advance(left);
    assert!(!guard.is_held());
    assert!(guard.valid_for().unwrap() >= 2 * SECOND, "the store keeps the hold during the grace");
    assert_eq!(guard.lost().await, LossCause::SessionExpired);
    assert_eq!(guard.release().await.unwrap(), Released::AlreadyLost);
    faults.clear();
    // The handle opens a new session, but the key stays locked during the grace of the old holder.
    assert!(locks.try_lock("k").await.unwrap().is_none());
    time.advance(3 * SECOND);
    until("another caller gets the key", async || locks.try_lock("k").await.unwrap().is_some()).await;
}

#[tokio::test]
async fn session_counts_from_first_open_request() {
    let time = VirtualClock::new();
    let store = Faulty::with_clock(Memory::with_clock(time.clock()), &time);
    let faults = store.faults();
    // The store opens the session at once, and the handle learns of it five seconds later.
    faults.next(Operation::OpenSession, Fault::LoseReply);
    faults.always(Operation::RenewSession, Fault::Fail(ErrorKind::Unavailable));
    let started = time.clock().now();
    let opening = tokio::spawn(Locks::builder_with_store(store).clock(time.clock()).open());
    until("the handle has sent its request", async || faults.count(Operation::OpenSession) == 1).await;
    time.advance(5 * SECOND);
    until("the handle is open", async || {
        time.advance(Duration::from_millis(1));
        opening.is_finished()
    })
    .await;
    let locks = opening.await.unwrap().unwrap();
    let guard = locks.lock("k").await.unwrap();
    assert!(guard.is_held());
    let expires_in_store = started.after(10 * SECOND);
    time.advance(expires_in_store.since(time.clock().now()));
    assert!(!guard.is_held(), "the guard is valid although the session has expired in the store");
}

#[tokio::test]
async fn lost_reply_is_retried_with_same_grant() {
    let store = Faulty::new(Memory::new());
    let faults = store.faults();
    let locks = Locks::with_store(store).await.unwrap();
    faults.next(Operation::Acquire, Fault::LoseReply);
    let guard = locks.lock("k").await.unwrap();
    assert_eq!(locks.inspect("k").await.unwrap().holders.len(), 1);
    faults.next(Operation::Release, Fault::LoseReply);
    assert_eq!(
        guard.release().await.unwrap(),
        Released::Now,
        "the repeat finds nothing, because the first request released the key"
    );
    until("the key is free", async || is_free(&locks, "k").await).await;
}

#[tokio::test]
async fn unknown_outcome_is_reported_and_cleaned() {
    let store = Faulty::new(Memory::new());
    let faults = store.faults();
    let retry = RetryPolicy { attempts: 2, ..RetryPolicy::default() };
    let locks = Locks::builder_with_store(store).retry(retry).session_ttl(SECOND).open().await.unwrap();
    faults.always(Operation::Acquire, Fault::LoseReply);
    let error = locks.lock("k").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Indeterminate);
    assert!(error.token().is_some());
    faults.clear();
    until("the keeper has cleaned up", async || is_free(&locks, "k").await).await;
}

#[tokio::test]
async fn late_acquire_leaves_no_hold() {
    let store = Faulty::new(Memory::new());
    let faults = store.faults();
    let retry = RetryPolicy { attempts: 1, ..RetryPolicy::default() };
    let locks = Locks::builder_with_store(store).retry(retry).session_ttl(2 * SECOND).open().await.unwrap();
    faults.next(Operation::Acquire, Fault::Hold);
    assert_eq!(locks.lock("k").await.unwrap_err().kind(), ErrorKind::Indeterminate);
    until("the keeper has abandoned the token once", async || faults.count(Operation::Abandon) > 0).await;
    assert_eq!(faults.deliver().await, 1);
    assert!(!is_free(&locks, "k").await, "the late request had no effect, so the test proves nothing");
    until("the keeper has cleaned up again", async || is_free(&locks, "k").await).await;
}

#[tokio::test]
async fn holder_learns_of_force_release() {
    for lose_pushes in [false, true] {
        let store = Faulty::new(Memory::new());
        let faults = store.faults();
        let locks = Locks::builder_with_store(store).session_ttl(SECOND).open().await.unwrap();
        let mut events = locks.events();
        let guard = locks.lock("k").await.unwrap();
        faults.lose_pushes(lose_pushes);
        locks.force_release("k", guard.fence(), "the operator's reason").await.unwrap();
        assert_eq!(guard.lost().await, LossCause::ForceReleased);
        let reason = loop {
            if let Event::Lost { reason, .. } = events.next().await.unwrap() {
                break reason;
            }
        };
        assert_eq!(reason.as_deref(), Some("the operator's reason"));
        assert!(locks.lock("k").await.unwrap().fence() > guard.fence());
    }
}

#[tokio::test]
async fn force_release_reaches_orphaned_fixed_hold() {
    let memory = Memory::new();
    let locks = Locks::builder_with_store(memory.clone()).session_ttl(SECOND / 2).open().await.unwrap();
    let guard = locks.lock("k").ttl(60 * SECOND).await.unwrap();
    let session = locks.session().unwrap();
    memory.close_session(session).await.unwrap();
    until("the handle has a new session", async || locks.session().is_some_and(|now| now != session)).await;
    assert!(guard.is_held(), "a fixed hold outlives its session");
    locks.force_release("k", guard.fence(), "stuck").await.unwrap();
    assert_eq!(guard.lost().await, LossCause::Missing);
}

#[tokio::test]
async fn lost_push_only_costs_time() {
    let store = Faulty::new(Memory::new());
    store.faults().lose_pushes(true);
    let locks = Locks::with_store(store).await.unwrap();
    let held = locks.lock("k").await.unwrap();
    let waiter = tokio::spawn({
        let locks = locks.clone();
        async move { locks.lock("k").await.map(|guard| guard.is_held()) }
    });
    until("the call waits", async || locks.inspect("k").await.unwrap().waiters.len() == 1).await;
    drop(held);
    assert!(waiter.await.unwrap().unwrap());
}

#[tokio::test]
async fn run_drops_the_body_on_loss() {
    let locks = Locks::open("memory:").await.unwrap();
    let dropped = Arc::new(());
    let seen = dropped.clone();
    let other = locks.clone();
    let ended = tokio::spawn(async move {
        let locks = other;
        locks
            .clone()
            .lock("k")
            .run(async move |guard| {
                let _seen = seen;
                locks.force_release("k", guard.fence(), "test").await.unwrap();
                std::future::pending::<()>().await;
            })
            .await
    });
    assert_eq!(ended.await.unwrap().unwrap_err().kind(), ErrorKind::Lost(LossCause::ForceReleased));
    assert_eq!(Arc::strong_count(&dropped), 1);
    assert!(locks.lock("k").run(async |guard| guard.is_held()).await.unwrap());
}

#[tokio::test]
async fn missed_heartbeat_and_max_hold_end_hold() {
    let time = VirtualClock::new();
    let locks = Locks::builder_with_store(Memory::with_clock(time.clock())).clock(time.clock()).open().await.unwrap();
    let quiet = locks.lock("a").heartbeat_within(SECOND).await.unwrap();
    let capped = locks.lock("b").max_hold(3 * SECOND).await.unwrap();
    time.advance(Duration::from_millis(900));
    quiet.heartbeat().unwrap();
    time.advance(Duration::from_millis(900));
    assert!(quiet.is_held());
    time.advance(Duration::from_millis(100));
    assert_eq!(quiet.lost().await, LossCause::HeartbeatMissed);
    assert!(quiet.heartbeat().is_err());
    assert!(!is_free(&locks, "a").await, "the grace is a quarter of the heartbeat limit");
    time.advance(Duration::from_millis(250));
    until("the key is free", async || is_free(&locks, "a").await).await;
    assert!(capped.is_held(), "the holder has its whole max_hold");
    time.advance(Duration::from_millis(900));
    assert_eq!(capped.lost().await, LossCause::MaxHold);
    assert!(!is_free(&locks, "b").await);
    drop(capped);
    until("the key is free", async || is_free(&locks, "b").await).await;
}

#[tokio::test]
async fn fixed_hold_is_adopted_once() {
    let store = Memory::new();
    let first = Locks::with_store(store.clone()).await.unwrap();
    let second = Locks::with_store(store).await.unwrap();
    let guard = first.lock("k").ttl(60 * SECOND).await.unwrap();
    let fence = guard.fence();
    let token = guard.detach();
    first.close().await.unwrap();
    assert!(second.owns(&token).await.unwrap());
    let adopted = second.adopt(token.to_string().parse().unwrap()).await.unwrap();
    assert_eq!(adopted.fence(), fence);
    assert_eq!(second.adopt(token).await.unwrap_err().kind(), ErrorKind::Lost(LossCause::Missing));
    adopted.extend(120 * SECOND).await.unwrap();
    assert!(adopted.remaining().unwrap() > 60 * SECOND);
    assert_eq!(adopted.release().await.unwrap(), Released::Now);
}

#[tokio::test]
async fn late_extend_ends_no_valid_hold() {
    let store = Faulty::new(Memory::new());
    let faults = store.faults();
    let locks = Locks::builder_with_store(store).retry(RetryPolicy::never()).open().await.unwrap();
    let guard = locks.lock("k").ttl(60 * SECOND).await.unwrap();
    faults.next(Operation::Extend, Fault::Hold);
    assert!(guard.extend(10 * SECOND).await.is_err());
    assert!(guard.remaining().unwrap() < 11 * SECOND, "the failed extend may have taken effect");
    guard.extend(60 * SECOND).await.unwrap();
    assert!(guard.remaining().unwrap() < 10 * SECOND, "the failed extend may still arrive after this one");
    assert_eq!(faults.deliver().await, 1);
    let left = locks.inspect("k").await.unwrap().holders[0].remaining.unwrap();
    assert!(
        guard.valid_for().unwrap() <= left,
        "the guard counts on {:?}, and the store keeps {left:?}",
        guard.valid_for()
    );
    // The guard sends concurrent extends one after the other.
    let guard = locks.lock("other").ttl(60 * SECOND).await.unwrap();
    faults.next(Operation::Extend, Fault::DelayReply(Duration::from_millis(30)));
    let (long, short) = tokio::join!(guard.extend(90 * SECOND), guard.extend(20 * SECOND));
    long.and(short).unwrap();
    let left = locks.inspect("other").await.unwrap().holders[0].remaining.unwrap();
    assert!(guard.valid_for().unwrap() <= left && left < 27 * SECOND);
}

#[tokio::test]
async fn failed_extend_limits_no_other() {
    let store = Faulty::new(Memory::new());
    let faults = store.faults();
    let locks = Locks::builder_with_store(store).retry(RetryPolicy::never()).open().await.unwrap();
    let guard = locks.lock("k").ttl(60 * SECOND).await.unwrap();
    faults.next(Operation::Extend, Fault::Fail(ErrorKind::Unavailable));
    assert!(guard.extend(10 * SECOND).await.is_err());
    guard.extend(60 * SECOND).await.unwrap();
    assert!(guard.remaining().unwrap() > 40 * SECOND, "a rejected extend cannot arrive later");
}

#[tokio::test]
async fn ttl_too_short_for_store_is_an_error() {
    let store = Faulty::new(Memory::new());
    // When the answer comes, the hold has expired in the store too: otherwise the next attempt would queue behind it, and its
    // grant would come without this delay.
    store.faults().always(Operation::Acquire, Fault::DelayReply(Duration::from_millis(100)));
    let locks = Locks::with_store(store).await.unwrap();
    let error = locks.lock("k").ttl(Duration::from_millis(10)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("longer ttl"), "{error}");
}

#[tokio::test]
async fn holder_can_use_its_whole_ttl() {
    let time = VirtualClock::new();
    let memory = Memory::with_clock(time.clock());
    let open = || Locks::builder_with_store(memory.clone()).clock(time.clock()).session_ttl(3_600 * SECOND).open();
    let (locks, other) = (open().await.unwrap(), open().await.unwrap());
    for ttl in [SECOND / 5, SECOND, 10 * SECOND, 60 * SECOND] {
        let extended = locks.lock("c").ttl(2 * ttl.min(SECOND)).await.unwrap();
        extended.extend(ttl).await.unwrap();
        // This grant comes by a hand-off.
        let before = other.lock("d").await.unwrap();
        let waiting = tokio::spawn(locks.lock("d").ttl(ttl).into_future());
        until("the call waits", async || other.inspect("d").await.unwrap().waiters.len() == 1).await;
        drop(before);
        let guards = [
            locks.lock("a").ttl(ttl).await.unwrap(),
            locks.lock("b").max_hold(ttl).await.unwrap(),
            extended,
            waiting.await.unwrap().unwrap(),
        ];
        time.advance(ttl - ttl / 1_000);
        for guard in &guards {
            assert!(guard.is_held(), "{ttl:?}: {} was lost early: {:?}", guard.key(), guard.loss());
        }
        time.advance(ttl / 20);
        for guard in &guards {
            assert!(!guard.is_held(), "{ttl:?}: {} is held for longer than requested", guard.key());
            assert!(other.is_locked(guard.key().name()).await.unwrap(), "{ttl:?}: the holder has no grace");
        }
        drop(guards);
        for key in ["a", "b", "c", "d"] {
            until("the key is free", async || is_free(&locks, key).await).await;
        }
        // `expires_after` keeps the key locked for exactly this time.
        locks.lock("limit").expires_after(ttl).await.unwrap().detach();
        time.advance(ttl - Duration::from_millis(1));
        assert!(other.is_locked("limit").await.unwrap());
        time.advance(Duration::from_millis(2));
        assert!(!other.is_locked("limit").await.unwrap());
    }
}

#[tokio::test]
async fn longest_ttl_is_granted_whole() {
    let locks = Locks::open("memory:").await.unwrap();
    let longest = *stanchion::DURATION_RANGE.end();
    let guard = locks.lock("k").ttl(longest).await.unwrap();
    assert!(guard.remaining().unwrap() > longest - 60 * SECOND);
    guard.extend(longest).await.unwrap();
    assert!(guard.remaining().unwrap() > longest - 60 * SECOND);
}

#[tokio::test]
async fn close_skips_grace_of_lost_holds() {
    let time = VirtualClock::new();
    let memory = Memory::with_clock(time.clock());
    let watch = Locks::builder_with_store(memory.clone()).clock(time.clock()).open().await.unwrap();
    let locks = Locks::builder_with_store(memory).clock(time.clock()).open().await.unwrap();
    let capped = locks.lock("a").max_hold(6 * SECOND).await.unwrap();
    let fixed = locks.lock("b").ttl(6 * SECOND).await.unwrap();
    time.advance(SECOND * 61 / 10);
    assert_eq!(capped.lost().await, LossCause::MaxHold);
    assert_eq!(fixed.lost().await, LossCause::TtlExpired);
    // The clock stands still, so a wait for the grace would never end.
    tokio::time::timeout(3 * SECOND, locks.close()).await.expect("close does not wait for the grace").unwrap();
    assert!(is_free(&watch, "a").await && is_free(&watch, "b").await);
}

#[tokio::test]
async fn close_ends_session_despite_failed_release() {
    let store = Faulty::new(Memory::new());
    let faults = store.faults();
    let locks = Locks::with_store(store.clone()).await.unwrap();
    let watch = Locks::with_store(store).await.unwrap();
    let _session_bound = locks.lock("a").await.unwrap();
    let released = locks.lock("b").cooldown(SECOND).await.unwrap();
    faults.always(Operation::Release, Fault::Fail(ErrorKind::Unavailable));
    drop(released);
    locks.close().await.unwrap();
    assert!(is_free(&watch, "a").await && is_free(&watch, "b").await);
}

#[tokio::test]
async fn drain_rejects_calls_and_close_loses_holds() {
    let locks = Locks::open("memory:").await.unwrap();
    let guard = locks.lock("k").await.unwrap();
    let waiter = tokio::spawn({
        let locks = locks.clone();
        async move { locks.lock("k").await }
    });
    until("the call waits", async || locks.inspect("k").await.unwrap().waiters.len() == 1).await;
    locks.drain("deploy");
    assert_eq!(waiter.await.unwrap().unwrap_err().kind(), ErrorKind::Draining);
    assert_eq!(guard.draining(), Some("deploy"));
    assert_eq!(guard.heartbeat().unwrap_err().kind(), ErrorKind::Draining);
    assert!(guard.is_held());
    locks.close().await.unwrap();
    assert_eq!(guard.lost().await, LossCause::Closed);
    assert_eq!(locks.lock("x").await.unwrap_err().kind(), ErrorKind::Draining);
    assert_eq!(locks.close().await.unwrap(), ());
}

#[tokio::test]
async fn dead_keeper_loses_holds_and_ends_waits() {
    let store = Faulty::new(Memory::new());
    let faults = store.faults();
    let locks = Locks::builder_with_store(store.clone()).session_ttl(SECOND).open().await.unwrap();
    let other = Locks::with_store(store).await.unwrap();
    let guard = locks.lock("k").await.unwrap();
    let held = other.lock("busy").await.unwrap();
    let waiting = tokio::spawn(locks.lock("busy").into_future());
    until("the call waits", async || other.inspect("busy").await.unwrap().waiters.len() == 1).await;
    faults.next(Operation::RenewSession, Fault::Panic);
    assert_eq!(guard.lost().await, LossCause::Closed);
    assert!(guard.cancel_token().is_cancelled());
    assert_eq!(waiting.await.unwrap().unwrap_err().kind(), ErrorKind::Draining);
    assert_eq!(guard.release().await.unwrap(), Released::AlreadyLost);
    assert_eq!(locks.lock("x").await.unwrap_err().kind(), ErrorKind::Draining);
    locks.close().await.unwrap();
    assert!(held.is_held(), "the other handle has its own keeper");
}

#[tokio::test]
async fn readers_share_and_never_starve_writers() {
    let locks = Locks::open("memory:").await.unwrap();
    let reader = locks.lock("k").demand(Demand::READ).await.unwrap();
    let second = locks.lock("k").demand(Demand::READ).await.unwrap();
    let writer = tokio::spawn({
        let locks = locks.clone();
        async move { locks.lock("k").demand(Demand::WRITE).await.unwrap() }
    });
    until("the writer waits", async || locks.inspect("k").await.unwrap().waiters.len() == 1).await;
    assert!(
        locks.lock("k").demand(Demand::READ).try_acquire().await.unwrap().is_none(),
        "a reader passed the waiting writer"
    );
    drop((reader, second));
    let writer = writer.await.unwrap();
    assert!(writer.is_held());
    let permit = locks.lock("k").demand(Demand::new(1, 3).unwrap());
    assert!(permit.try_acquire().await.unwrap().is_none(), "a writer must exclude permits of any limit");
}

#[test]
fn guard_outlives_its_runtime() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (locks, guard) = runtime.block_on(async {
        let locks = Locks::open("memory:").await.unwrap();
        let guard = locks.lock("k").await.unwrap();
        (locks, guard)
    });
    drop(runtime);
    drop(guard);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(until("the key is free", async || is_free(&locks, "k").await));
}

#[test]
fn requests_and_guards_are_send() {
    fn send<T: Send + 'static>() {}
    fn sync<T: Sync>() {}
    send::<Locks>();
    sync::<Locks>();
    send::<stanchion::Guard>();
    sync::<stanchion::Guard>();
    send::<stanchion::LockRequest>();
    fn send_value<T: Send>(_: T) {}
    let check = |locks: &Locks, guard: stanchion::Guard| {
        send_value(locks.try_lock("k"));
        send_value(locks.lock("k").run(async |guard| guard.is_held()));
        send_value(guard.extend(SECOND));
        send_value(guard.lost());
        send_value(guard.release());
        send_value(locks.close());
    };
    let _ = check; // only has to compile
}

#[tokio::test]
async fn excessive_drift_is_rejected() {
    let open = async |per_mille, fixed, ttl| {
        let drift = stanchion::Drift { per_mille, fixed };
        Locks::builder("memory:").drift(drift).session_ttl(ttl).open().await.map(drop)
    };
    let (ms, s) = (Duration::from_millis, Duration::from_secs);
    for (per_mille, fixed, ttl) in [
        (10, Duration::MAX, s(10)),
        (10, s(10), s(10)),
        (10, s(8), s(10)),
        (10, s(6), s(10)),
        (10, ms(3), ms(10)),
        (499, ms(2), ms(10)),
    ] {
        let error = open(per_mille, fixed, ttl).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{fixed:?} of {ttl:?}");
        assert!(error.to_string().contains("lower the drift, or use a longer session ttl"), "{error}");
    }
    for (per_mille, fixed, ttl) in
        [(10, ms(2), s(10)), (10, ms(2), ms(10)), (499, Duration::ZERO, s(10)), (10, s(1), s(10)), (0, s(60), s(3600))]
    {
        open(per_mille, fixed, ttl).await.unwrap();
    }
}

#[tokio::test]
async fn malformed_urls_show_no_secret() {
    for url in [
        "u:s3cr3t@h",
        "s3cr3t:x@h",
        "s3cr3t@h:1",
        "frob://u:s3cr3t@h",
        "frob:u:s3cr3t@h",
        "redis:/u:s3cr3t@h",
        "memory:u:s3cr3t@h",
        "memory://s3cr3t@h",
        "sqlite://u:s3cr3t@h",
        "sqlite:?u:s3cr3t@h",
        "sqlite:/a%?s3cr3t@h",
        "sqlite:/%u:s3cr3t@h",
        "s3cr3t",
        ":s3cr3t@h",
        "redis://u:s3 cr3t'\"@h:x",
    ] {
        let builder = Locks::builder(url);
        let shown = format!("{builder:?}");
        assert!(!shown.contains("cr3t"), "{url}: {shown}");
        let shown = builder.open().await.map(|_| ()).unwrap_err();
        assert!(!format!("{shown} {shown:?}").contains("cr3t"), "{url}: {shown:?}");
    }
    for url in
        ["redis://u:s3cr3t@h", "u:s3cr3t@h", "frob", "sqlite:/a?k=s3cr3t@", "sqlite://u:s3cr3t@h", "sqlite:/%s3cr3t"]
    {
        let error = stanchion::store::Sqlite::from_url(url).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("cr3t"), "{url}: {error:?}");
    }
}
