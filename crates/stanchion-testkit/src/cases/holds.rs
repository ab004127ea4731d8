//! Holds: how they are granted, released and extended, and how they expire.

use std::time::Duration;

use stanchion::store::{AcquireOutcome, AcquireRequest, EndOutcome, ExtendOutcome, Lifetime, PollOutcome};
use stanchion::{Store, TokenId};

use crate::environment::{Client, Environment, key};

const SHORT: Duration = Duration::from_secs(2);
const MINUTE: Duration = Duration::from_secs(60);

fn fixed<S: Store>(client: &Client<S>, ttl: Duration) -> AcquireRequest {
    AcquireRequest { lifetime: Lifetime::Fixed(ttl), ..client.request(&key("k")) }
}

pub async fn free_key_is_granted_and_released<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let (token, granted) = client.lock(&key("k")).await;
    assert_eq!(granted.remaining, None, "a session hold has no deadline");
    assert!(client.is_locked(&key("k")).await);
    assert_eq!(client.release(&key("k"), token).await, EndOutcome::Released);
    assert!(!client.is_locked(&key("k")).await);
}

pub async fn held_keys_are_independent<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let (a, _) = client.lock(&key("a")).await;
    client.lock(&key("b")).await;
    client.lock(&key("c")).await;
    client.release(&key("a"), a).await;
    assert!(!client.is_locked(&key("a")).await);
    assert!(client.is_locked(&key("b")).await && client.is_locked(&key("c")).await);
}

pub async fn held_key_is_busy_even_for_its_holder<S: Store>(env: &Environment<S>) {
    let (holder, other) = (env.client().await, env.client().await);
    holder.lock(&key("k")).await;
    for client in [&holder, &other] {
        let request = AcquireRequest { enqueue: false, ..client.request(&key("k")) };
        assert!(matches!(client.acquire(&request).await, AcquireOutcome::Busy { .. }));
        assert_eq!(
            client.poll(&key("k"), request.token).await,
            PollOutcome::Gone,
            "a rejected request leaves no entry"
        );
    }
    assert!(holder.inspect(&key("k")).await.waiters.is_empty());
}

pub async fn repeated_acquire_returns_same_grant<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let request = client.request(&key("k"));
    let first = client.expect_grant(&request).await;
    assert_eq!(client.expect_grant(&request).await, first);
    assert_eq!(client.current_grant(&key("k"), request.token).await, Some(first));
    assert_eq!(client.inspect(&key("k")).await.holders.len(), 1);
    client.release(&key("k"), request.token).await;
    assert!(!client.is_locked(&key("k")).await, "one release is enough");
}

pub async fn repeated_release_finds_nothing<S: Store>(env: &Environment<S>) {
    let (client, other) = (env.client().await, env.client().await);
    let (token, _) = client.lock(&key("k")).await;
    assert_eq!(client.release(&key("k"), token).await, EndOutcome::Released);
    assert_eq!(client.release(&key("k"), token).await, EndOutcome::Nothing);
    let (next, _) = other.lock(&key("k")).await;
    assert_eq!(client.release(&key("k"), token).await, EndOutcome::Nothing);
    assert!(other.current_grant(&key("k"), next).await.is_some(), "the next holder keeps the key");
}

pub async fn wrong_token_changes_nothing<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let request = fixed(&client, MINUTE);
    let granted = client.expect_grant(&request).await;
    let (other_key, _) = client.lock(&key("other")).await;
    for _ in 0..20 {
        for wrong in [TokenId::random().unwrap(), other_key] {
            assert_eq!(client.release(&key("k"), wrong).await, EndOutcome::Nothing);
            let abandoned = client.store.abandon(&key("k"), wrong).await.unwrap().outcome;
            assert_eq!(abandoned, EndOutcome::Nothing);
            let extended = client.store.extend(&key("k"), wrong, MINUTE * 9).await.unwrap().outcome;
            assert_eq!(extended, ExtendOutcome::NotHeld);
            assert_eq!(client.poll(&key("k"), wrong).await, PollOutcome::Gone);
        }
    }
    let now = client.current_grant(&key("k"), request.token).await.unwrap();
    assert_eq!(now.fence, granted.fence);
    assert!(now.remaining.unwrap() <= MINUTE, "no wrong token moved the deadline");
    assert_eq!(client.release(&key("k"), request.token).await, EndOutcome::Released);
}

pub async fn abandon_releases_the_grant<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let (token, _) = client.lock(&key("k")).await;
    assert_eq!(client.store.abandon(&key("k"), token).await.unwrap().outcome, EndOutcome::Released);
    assert!(!client.is_locked(&key("k")).await);
}

pub async fn expired_fixed_hold_frees_the_key<S: Store>(env: &Environment<S>) {
    let (client, other) = (env.client().await, env.client().await);
    let request = fixed(&client, SHORT);
    let granted = client.expect_grant(&request).await;
    assert!(granted.remaining.unwrap() <= SHORT);
    assert!(other.is_locked(&key("k")).await);
    env.advance(SHORT + Duration::from_millis(10)).await;
    assert_eq!(client.poll(&key("k"), request.token).await, PollOutcome::Gone);
    let (token, next) = other.lock(&key("k")).await;
    assert!(next.fence > granted.fence);
    // The expired token cannot change the next hold.
    assert_eq!(client.release(&key("k"), request.token).await, EndOutcome::Nothing);
    let extended = client.store.extend(&key("k"), request.token, MINUTE).await.unwrap().outcome;
    assert_eq!(extended, ExtendOutcome::NotHeld);
    assert!(other.current_grant(&key("k"), token).await.is_some());
}

pub async fn repeated_acquire_moves_no_deadline<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let request = fixed(&client, MINUTE);
    let first = client.expect_grant(&request).await.remaining.unwrap();
    env.advance(Duration::from_millis(100)).await;
    let repeated = client.expect_grant(&request).await.remaining.unwrap();
    let polled = client.current_grant(&key("k"), request.token).await.unwrap().remaining.unwrap();
    assert!(
        first - repeated >= Duration::from_millis(100),
        "a repeated acquire moved the deadline: {first:?}, {repeated:?}"
    );
    assert!(polled <= repeated);
}

pub async fn session_hold_ends_at_max_hold<S: Store>(env: &Environment<S>) {
    let (client, other) = (env.client().await, env.client().await);
    let lifetime = Lifetime::Session { max_hold: Some(SHORT) };
    let request = AcquireRequest { lifetime, ..client.request(&key("k")) };
    assert!(client.expect_grant(&request).await.remaining.unwrap() <= SHORT);
    env.advance(SHORT + Duration::from_millis(10)).await;
    other.lock(&key("k")).await;
}

pub async fn extend_sets_deadline_and_keeps_fence<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    // Each extend comes after two thirds of the ttl, so a busy machine has the last third to spare.
    let ttl = 2 * SHORT;
    let request = fixed(&client, ttl);
    let fence = client.expect_grant(&request).await.fence;
    for _ in 0..2 {
        env.advance(ttl * 2 / 3).await;
        let extended = client.store.extend(&key("k"), request.token, ttl).await.unwrap().outcome;
        assert_eq!(extended, ExtendOutcome::Extended);
    }
    let granted = client.current_grant(&key("k"), request.token).await.expect("the hold outlives its first deadline");
    assert_eq!(granted.fence, fence);
    assert!(granted.remaining.unwrap() <= ttl, "extend sets the deadline and does not add to it");
    client.store.extend(&key("k"), request.token, MINUTE).await.unwrap();
    client.store.extend(&key("k"), request.token, Duration::from_millis(50)).await.unwrap();
    env.advance(Duration::from_millis(60)).await;
    assert_eq!(client.poll(&key("k"), request.token).await, PollOutcome::Gone);
}

pub async fn extend_never_creates_or_revives<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let request = fixed(&client, SHORT);
    client.expect_grant(&request).await;
    env.advance(SHORT + Duration::from_millis(10)).await;
    let extend = async || client.store.extend(&key("k"), request.token, MINUTE).await.unwrap().outcome;
    assert_eq!(extend().await, ExtendOutcome::NotHeld);
    assert!(!client.is_locked(&key("k")).await);
    let (bound, _) = client.lock(&key("k")).await;
    let extended = client.store.extend(&key("k"), bound, SHORT).await.unwrap().outcome;
    assert_eq!(extended, ExtendOutcome::NotHeld, "extend gives no deadline to a hold without one");
    assert_eq!(extend().await, ExtendOutcome::NotHeld);
}

pub async fn extend_or_contender_wins_at_expiry<S: Store>(env: &Environment<S>) {
    let (client, other) = (env.client().await, env.client().await);
    for _ in 0..8 {
        let request = fixed(&client, Duration::from_millis(30));
        client.expect_grant(&request).await;
        env.advance(Duration::from_millis(30)).await;
        let contend = other.request(&key("k"));
        let contend = AcquireRequest { enqueue: false, ..contend };
        let k = key("k");
        let (extended, contended) =
            tokio::join!(client.store.extend(&k, request.token, MINUTE), other.acquire(&contend));
        let extended = extended.unwrap().outcome == ExtendOutcome::Extended;
        let taken = matches!(contended, AcquireOutcome::Granted(_));
        assert!(extended != taken, "extended: {extended}, taken: {taken}");
        assert_eq!(client.inspect(&key("k")).await.holders.len(), 1);
        client.release(&key("k"), request.token).await;
        other.release(&key("k"), contend.token).await;
    }
}

pub async fn fences_rise_however_holds_end<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let mut last = None;
    for round in 0..40 {
        let session = env.client().await;
        let request = fixed(&session, Duration::from_millis(20));
        let request = if round % 4 == 0 { request } else { session.request(&key("k")) };
        let granted = session.expect_grant(&request).await;
        assert!(Some(granted.fence) > last, "round {round}: {last:?}, then {:?}", granted.fence);
        assert!(granted.fence.get() < 1 << 53, "a fence is exact as a 64-bit float");
        assert_eq!(client.inspect(&key("k")).await.last_fence, Some(granted.fence));
        last = Some(granted.fence);
        match round % 4 {
            0 => env.advance(Duration::from_millis(25)).await,
            1 => drop(session.release(&key("k"), request.token).await),
            2 => drop(session.store.close_session(session.session).await.unwrap()),
            _ => drop(session.store.abandon(&key("k"), request.token).await.unwrap()),
        }
    }
}

pub async fn reused_keys_never_repeat_fences<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let mut fences = Vec::new();
    for round in 0..2 {
        for i in 0..200 {
            let (token, granted) = client.lock(&key(&format!("k{i}"))).await;
            if round == 0 {
                fences.push(granted.fence);
            } else {
                assert!(granted.fence > fences[i]);
            }
            client.release(&key(&format!("k{i}")), token).await;
        }
    }
}
