//! Tests work on a hold by its token: release and extend without adopting.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests wait on the real clock, and may panic"
)]

use std::time::Duration;

use crate::support::until;
use stanchion::store::{Fault, Faulty, Memory, Operation};
use stanchion::{ErrorKind, Locks, LossCause, Released, RetryPolicy, VirtualClock, blocking};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test]
async fn token_releases_hold_of_closed_handle() {
    let store = Memory::new();
    let first = Locks::with_store(store.clone()).await.unwrap();
    let second = Locks::with_store(store).await.unwrap();
    let token = first.lock("k").ttl(60 * SECOND).await.unwrap().detach();
    first.close().await.unwrap();
    assert!(second.is_locked("k").await.unwrap());
    assert_eq!(second.release(&token, None).await.unwrap(), Released::Now);
    assert!(!second.is_locked("k").await.unwrap());
    assert_eq!(second.release(&token, None).await.unwrap(), Released::AlreadyLost);
}

#[tokio::test]
async fn release_by_token_touches_no_other_hold() {
    let locks = Locks::open("memory:").await.unwrap();
    let token = locks.lock("k").ttl(60 * SECOND).await.unwrap().detach();
    assert_eq!(locks.release(&token, Some(10 * SECOND)).await.unwrap(), Released::Now);
    assert!(locks.inspect("k").await.unwrap().closed_for.is_some(), "the cooldown keeps the key closed");
    let token = locks.lock("other").ttl(60 * SECOND).await.unwrap().detach();
    locks.release(&token, None).await.unwrap();
    let guard = locks.lock("other").await.unwrap();
    assert_eq!(locks.release(&token, None).await.unwrap(), Released::AlreadyLost);
    guard.verify().await.unwrap();
    let error = locks.release(&token, Some(Duration::ZERO)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

#[tokio::test]
async fn release_with_lost_reply_has_released() {
    let store = Faulty::new(Memory::new());
    let faults = store.faults();
    let locks = Locks::with_store(store).await.unwrap();
    let token = locks.lock("k").ttl(60 * SECOND).await.unwrap().detach();
    faults.next(Operation::Release, Fault::LoseReply);
    assert_eq!(locks.release(&token, None).await.unwrap(), Released::Now);
    assert_eq!(faults.count(Operation::Release), 2);
    assert_eq!(locks.release(&token, None).await.unwrap(), Released::AlreadyLost);
}

#[tokio::test]
async fn guard_is_lost_after_release_by_token() {
    let store = Memory::new();
    let holder = Locks::builder_with_store(store.clone()).session_ttl(SECOND / 2).open().await.unwrap();
    let other = Locks::with_store(store).await.unwrap();
    let guard = holder.lock("k").await.unwrap();
    assert_eq!(other.release(&guard.token(), None).await.unwrap(), Released::Now);
    assert_eq!(guard.lost().await, LossCause::Missing, "the keeper verifies its holds");
    assert_eq!(guard.release().await.unwrap(), Released::AlreadyLost);
    let guard = holder.lock("k").await.unwrap();
    assert_eq!(holder.release(&guard.token(), None).await.unwrap(), Released::Now);
    assert_eq!(guard.loss(), Some(LossCause::Missing), "a guard of the same handle is lost at once");
    until("the key is free", async || !other.is_locked("k").await.unwrap()).await;
}

#[tokio::test]
async fn extend_by_token_counts_from_now() {
    let time = VirtualClock::new();
    let store = Memory::with_clock(time.clock());
    let locks = Locks::builder_with_store(store).clock(time.clock()).open().await.unwrap();
    let token = locks.lock("k").ttl(10 * SECOND).await.unwrap().detach();
    time.advance(8 * SECOND);
    locks.extend(&token, 10 * SECOND).await.unwrap();
    time.advance(10 * SECOND);
    assert!(locks.owns(&token).await.unwrap(), "the user has the whole time");
    // Shorter works too. The grace is a quarter of the lifetime.
    locks.extend(&token, 2 * SECOND).await.unwrap();
    time.advance(3 * SECOND);
    assert!(!locks.owns(&token).await.unwrap());
    let error = locks.extend(&token, 10 * SECOND).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Lost(LossCause::Missing));
    assert!(!locks.is_locked("k").await.unwrap(), "an extension revives nothing");
}

#[tokio::test]
async fn extend_by_token_needs_a_deadline() {
    let store = Memory::new();
    let holder = Locks::with_store(store.clone()).await.unwrap();
    let other = Locks::with_store(store).await.unwrap();
    let guard = holder.lock("k").await.unwrap();
    let error = other.extend(&guard.token(), 10 * SECOND).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.to_string().contains("lasts as long as its session"), "{error}");
    let fixed = holder.lock("fixed").ttl(60 * SECOND).await.unwrap();
    let error = holder.extend(&fixed.token(), 10 * SECOND).await.unwrap_err();
    assert!(error.to_string().contains("Guard::extend"), "{error}");
    for ttl in [Duration::ZERO, Duration::MAX] {
        assert_eq!(other.extend(&fixed.token(), ttl).await.unwrap_err().kind(), ErrorKind::InvalidArgument);
    }
    assert!(guard.is_held() && fixed.is_held());
}

#[tokio::test]
async fn failed_call_by_token_can_be_repeated() {
    let store = Faulty::new(Memory::new());
    let faults = store.faults();
    let locks = Locks::builder_with_store(store).retry(RetryPolicy::never()).open().await.unwrap();
    let token = locks.lock("k").ttl(60 * SECOND).await.unwrap().detach();
    for (operation, fault) in [(Operation::Extend, Fault::LoseRequest), (Operation::Release, Fault::LoseRequest)] {
        faults.next(operation, fault);
        let failed = match operation {
            Operation::Extend => locks.extend(&token, 60 * SECOND).await.unwrap_err(),
            _ => locks.release(&token, None).await.unwrap_err(),
        };
        assert!(failed.is_transient() && failed.key().is_some(), "{failed:?}");
        assert!(locks.owns(&token).await.unwrap());
    }
    locks.extend(&token, 60 * SECOND).await.unwrap();
    assert_eq!(locks.release(&token, None).await.unwrap(), Released::Now);
}

#[test]
fn blocking_calls_work_by_token() {
    let locks = blocking::Locks::open("memory:").unwrap();
    let token = locks.lock("k").ttl(60 * SECOND).acquire().unwrap().detach();
    locks.extend(&token, 120 * SECOND).unwrap();
    assert!(locks.inspect("k").unwrap().holders[0].remaining.unwrap() > 100 * SECOND);
    assert_eq!(locks.release(&token, None).unwrap(), Released::Now);
    assert_eq!(locks.release(&token, None).unwrap(), Released::AlreadyLost);
    let guard = locks.lock("k").acquire().unwrap();
    assert!(locks.owns(&guard.token()).unwrap());
}
