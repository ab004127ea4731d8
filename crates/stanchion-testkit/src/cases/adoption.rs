//! Adoption: a hold moves from one token, and maybe one session, to another.

use std::time::Duration;

use stanchion::store::{
    AcquireRequest, AdoptOutcome, AdoptRequest, EndOutcome, ExtendOutcome, ForceReleaseOutcome, Lifetime, PollOutcome,
    StoreTime,
};
use stanchion::{Store, TokenId};

use super::force_release::{force, lost};
use crate::environment::{Client, Environment, key};

const SHORT: Duration = Duration::from_secs(2);
const MINUTE: Duration = Duration::from_secs(60);

fn fixed<S: Store>(client: &Client<S>, ttl: Duration) -> AcquireRequest {
    AcquireRequest { lifetime: Lifetime::Fixed(ttl), ..client.request(&key("k")) }
}

/// Returns a request to move the hold of `from` to a fresh token of the client's session.
fn adopting<S: Store>(client: &Client<S>, from: TokenId) -> AdoptRequest {
    let request = client.request(&key("k"));
    AdoptRequest { key: key("k"), from, to: request.token, session: client.session, not_after: request.not_after }
}

async fn adopts<S: Store>(client: &Client<S>, request: &AdoptRequest) -> AdoptOutcome {
    client.store.adopt(request.clone()).await.unwrap().outcome
}

pub async fn concurrent_adopt_has_one_winner<S: Store>(env: &Environment<S>) {
    let (first, second, third) = (env.client().await, env.client().await, env.client().await);
    let request = fixed(&first, MINUTE);
    let fence = first.expect_grant(&request).await.fence;
    let (a, b) = (adopting(&second, request.token), adopting(&third, request.token));
    let (one, two) = tokio::join!(second.store.adopt(a.clone()), third.store.adopt(b.clone()));
    let outcomes = [one.unwrap().outcome, two.unwrap().outcome];
    let adopted: Vec<_> = outcomes.iter().filter(|outcome| matches!(outcome, AdoptOutcome::Adopted { .. })).collect();
    assert_eq!(adopted.len(), 1, "{outcomes:?}");
    let AdoptOutcome::Adopted { granted, session_bound } = *adopted[0] else { unreachable!() };
    assert_eq!(granted.fence, fence);
    assert!(granted.remaining.unwrap() <= MINUTE && !session_bound);
    assert_eq!(first.poll(&key("k"), request.token).await, PollOutcome::Gone, "the old token has ended");
    // A repeated adopt gets the same answer.
    let again =
        if matches!(outcomes[0], AdoptOutcome::Adopted { .. }) { second.store.adopt(a) } else { third.store.adopt(b) };
    assert!(matches!(again.await.unwrap().outcome, AdoptOutcome::Adopted { .. }));
}

pub async fn adopt_moves_hold_to_new_session<S: Store>(env: &Environment<S>) {
    let (first, second) = (env.client().await, env.client().await);
    let (token, granted) = first.lock(&key("k")).await;
    let request = adopting(&second, token);
    let outcome = second.store.adopt(request.clone()).await.unwrap().outcome;
    assert_eq!(outcome, AdoptOutcome::Adopted { granted, session_bound: true });
    first.store.close_session(first.session).await.unwrap();
    assert!(second.current_grant(&key("k"), request.to).await.is_some());
    second.store.close_session(second.session).await.unwrap();
    assert!(!env.client().await.is_locked(&key("k")).await);
}

pub async fn failed_adopt_changes_nothing<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let request = adopting(&client, TokenId::random().unwrap());
    assert_eq!(client.store.adopt(request.clone()).await.unwrap().outcome, AdoptOutcome::Gone);
    let request_late = AdoptRequest { not_after: StoreTime::from_micros(0), ..request };
    let held = fixed(&client, MINUTE);
    client.expect_grant(&held).await;
    let late = AdoptRequest { from: held.token, ..request_late };
    assert_eq!(client.store.adopt(late).await.unwrap().outcome, AdoptOutcome::Stale);
    assert!(client.current_grant(&key("k"), held.token).await.is_some());
    client.store.close_session(client.session).await.unwrap();
    let dead = adopting(&client, held.token);
    assert_eq!(client.store.adopt(dead).await.unwrap().outcome, AdoptOutcome::SessionGone);
}

pub async fn adopted_hold_keeps_fence_and_deadline<S: Store>(env: &Environment<S>) {
    let (first, second) = (env.client().await, env.client().await);
    for lifetime in [Lifetime::Fixed(MINUTE), Lifetime::Session { max_hold: Some(MINUTE) }] {
        let metadata = Some("text".to_owned());
        let request = AcquireRequest { lifetime, metadata, ..first.request(&key("k")) };
        let before = first.expect_grant(&request).await;
        env.advance(Duration::from_millis(20)).await;
        let adopt = adopting(&second, request.token);
        let AdoptOutcome::Adopted { granted, session_bound } = adopts(&second, &adopt).await else {
            panic!("not adopted")
        };
        assert_eq!(granted.fence, before.fence);
        assert!(granted.remaining.unwrap() < before.remaining.unwrap(), "adopt moved the deadline");
        assert_eq!(session_bound, matches!(lifetime, Lifetime::Session { .. }));
        assert_eq!(second.inspect(&key("k")).await.holders[0].metadata.as_deref(), Some("text"));
        assert_eq!(second.release(&key("k"), adopt.to).await, EndOutcome::Released);
    }
}

pub async fn old_token_after_adopt_changes_nothing<S: Store>(env: &Environment<S>) {
    let (first, second) = (env.client().await, env.client().await);
    let request = AcquireRequest { lifetime: Lifetime::Fixed(MINUTE), ..first.request(&key("k")) };
    first.expect_grant(&request).await;
    let adopt = adopting(&second, request.token);
    adopts(&second, &adopt).await;
    assert_eq!(first.release(&key("k"), request.token).await, EndOutcome::Nothing);
    assert_eq!(first.store.abandon(&key("k"), request.token).await.unwrap().outcome, EndOutcome::Nothing);
    let extended = first.store.extend(&key("k"), request.token, MINUTE * 9).await.unwrap().outcome;
    assert_eq!(extended, ExtendOutcome::NotHeld);
    assert_eq!(adopts(&first, &adopting(&first, request.token)).await, AdoptOutcome::Gone);
    assert!(second.current_grant(&key("k"), adopt.to).await.unwrap().remaining.unwrap() <= MINUTE);
}

pub async fn repeated_adopt_returns_same_grant<S: Store>(env: &Environment<S>) {
    let (first, second) = (env.client().await, env.client().await);
    let (token, granted) = first.lock(&key("k")).await;
    let now = second.store.inspect(&key("k")).await.unwrap().time;
    let adopt = AdoptRequest { not_after: now.after(MINUTE), ..adopting(&second, token) };
    let expected = AdoptOutcome::Adopted { granted, session_bound: true };
    for _ in 0..3 {
        assert_eq!(adopts(&second, &adopt).await, expected);
    }
    assert_eq!(second.inspect(&key("k")).await.holders.len(), 1);
    assert_eq!(second.release(&key("k"), adopt.to).await, EndOutcome::Released);
    assert_eq!(adopts(&second, &adopt).await, AdoptOutcome::Gone, "a late repeat creates nothing");
    assert!(!second.is_locked(&key("k")).await);
}

pub async fn new_session_learns_of_force_release<S: Store>(env: &Environment<S>) {
    let (first, second) = (env.client().await, env.client().await);
    for lifetime in [Lifetime::Fixed(MINUTE), Lifetime::Session { max_hold: None }] {
        let request = AcquireRequest { lifetime, ..first.request(&key("k")) };
        let fence = first.expect_grant(&request).await.fence;
        let adopt = adopting(&second, request.token);
        adopts(&second, &adopt).await;
        assert_eq!(force(&first, &key("k"), fence).await, ForceReleaseOutcome::Released);
        assert_eq!(lost(&first).await, vec![]);
        assert_eq!(lost(&second).await, vec![adopt.to]);
        assert_eq!(adopts(&second, &adopt).await, AdoptOutcome::Gone, "a repeat adopts nothing");
        second.release(&key("k"), adopt.to).await;
    }
}

pub async fn waiter_cannot_be_adopted<S: Store>(env: &Environment<S>) {
    let (holder, waiter, third) = (env.client().await, env.client().await, env.client().await);
    let (token, _) = holder.lock(&key("k")).await;
    let waiting = waiter.enqueue(&key("k")).await;
    assert_eq!(adopts(&third, &adopting(&third, waiting)).await, AdoptOutcome::Gone);
    holder.release(&key("k"), token).await;
    assert!(waiter.current_grant(&key("k"), waiting).await.is_some());
}

pub async fn ended_hold_cannot_be_adopted<S: Store>(env: &Environment<S>) {
    let (first, second) = (env.client().await, env.client().await);
    let expired = AcquireRequest { lifetime: Lifetime::Fixed(SHORT), ..first.request(&key("k")) };
    first.expect_grant(&expired).await;
    env.advance(SHORT + Duration::from_millis(10)).await;
    assert_eq!(adopts(&second, &adopting(&second, expired.token)).await, AdoptOutcome::Gone);
    let (bound, _) = first.lock(&key("k")).await;
    first.store.close_session(first.session).await.unwrap();
    assert_eq!(adopts(&second, &adopting(&second, bound)).await, AdoptOutcome::Gone, "the hold ended with its session");
    assert!(!second.is_locked(&key("k")).await);
}
