//! Holds that linger: what marks them, who recalls them, and their fences.

use std::time::Duration;

use stanchion::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, Demand, EndOutcome, ForceReleaseOutcome, Lifetime,
    LingerOutcome, PollOutcome, Push,
};
use stanchion::{Fence, Store, TokenId};

use super::force_release::force;
use crate::environment::{Client, Environment, key, until};

const MINUTE: Duration = Duration::from_secs(60);
/// Time after which the store's clock is certain to be ahead of a fence that it has just made.
const MOMENT: Duration = Duration::from_millis(2);

async fn linger<S: Store>(client: &Client<S>, name: &str, token: TokenId) -> LingerOutcome {
    client.store.linger(&key(name), token).await.unwrap().outcome
}

/// Marks a hold, and returns its fence and the newest fence of the key.
///
/// A store may refuse until it knows that the session hears of recalls.
pub(super) async fn mark<S: Store>(client: &Client<S>, name: &str, token: TokenId) -> (Fence, Fence) {
    let mut marked = None;
    until("the hold lingers", async || match linger(client, name, token).await {
        LingerOutcome::Lingers { fence, up_to } => marked.insert((fence, up_to)).0 == fence,
        LingerOutcome::Wanted => false,
        LingerOutcome::Gone => panic!("the hold is gone"),
    })
    .await;
    marked.unwrap()
}

/// Acquires a key, marks its hold a moment later, and returns the token, the fence and the newest fence.
async fn lock_and_mark<S: Store>(env: &Environment<S>, client: &Client<S>, name: &str) -> (TokenId, Fence, Fence) {
    let (token, granted) = client.lock(&key(name)).await;
    env.advance(MOMENT).await;
    let (fence, up_to) = mark(client, name, token).await;
    assert_eq!(fence, granted.fence);
    (token, fence, up_to)
}

/// Returns a request to move the hold of `from` to a fresh token of the client's session.
fn adopting<S: Store>(client: &Client<S>, from: TokenId) -> AdoptRequest {
    let AcquireRequest { key, token: to, session, not_after, .. } = client.request(&key("k"));
    AdoptRequest { key, from, to, session, not_after }
}

pub async fn linger_answers_fences_up_to_the_clock<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let (token, fence, up_to) = lock_and_mark(env, &client, "k").await;
    assert!(up_to.get() >= fence.get() + 1_000, "{fence} to {up_to}: the clock has moved by {MOMENT:?}");
    env.advance(MOMENT).await;
    let (_, later) = mark(&client, "k", token).await;
    assert!(later.get() >= up_to.get() + 1_000, "{up_to} to {later}");
    assert_eq!(client.inspect(&key("k")).await.last_fence, Some(later));
}

pub async fn next_grant_is_above_the_reserved_fences<S: Store>(env: &Environment<S>) {
    let other = env.client().await;
    for end in 0..4 {
        let client = env.client().await;
        let (token, fence, up_to) = lock_and_mark(env, &client, "k").await;
        match end {
            0 => assert_eq!(client.release(&key("k"), token).await, EndOutcome::Released),
            1 => assert_eq!(client.store.abandon(&key("k"), token).await.unwrap().outcome, EndOutcome::Released),
            2 => assert_eq!(force(&other, &key("k"), fence).await, ForceReleaseOutcome::Released),
            _ => drop(client.store.close_session(client.session).await.unwrap()),
        }
        let (next, granted) = other.lock(&key("k")).await;
        assert!(granted.fence > up_to, "{end}: {} after {up_to}", granted.fence);
        other.release(&key("k"), next).await;
    }
}

pub async fn waiter_behind_lingering_hold_is_granted<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.client().await, env.client().await);
    let (token, _, up_to) = lock_and_mark(env, &holder, "k").await;
    let waiting = waiter.enqueue(&key("k")).await;
    assert!(waiter.current_grant(&key("k"), waiting).await.is_none(), "a recall ends nothing");
    assert_eq!(holder.release(&key("k"), token).await, EndOutcome::Released);
    let granted = waiter.current_grant(&key("k"), waiting).await.expect("the waiter is granted");
    assert!(granted.fence > up_to, "{} after {up_to}", granted.fence);
    assert!(!waiter.inspect(&key("k")).await.holders[0].lingers, "the mark went with its hold");
}

pub async fn hold_with_a_waiter_cannot_linger<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.client().await, env.client().await);
    let (token, granted) = holder.lock(&key("k")).await;
    mark(&holder, "k", token).await;
    let waiting = waiter.enqueue(&key("k")).await;
    for _ in 0..2 {
        assert_eq!(linger(&holder, "k", token).await, LingerOutcome::Wanted);
    }
    assert_eq!(holder.poll(&key("k"), token).await, PollOutcome::Granted(granted), "the refusal changed the hold");
    assert!(matches!(waiter.poll(&key("k"), waiting).await, PollOutcome::Queued(queued) if queued.ahead == 0));
    waiter.store.abandon(&key("k"), waiting).await.unwrap();
    assert!(matches!(linger(&holder, "k", token).await, LingerOutcome::Lingers { .. }));
}

pub async fn linger_never_creates<S: Store>(env: &Environment<S>) {
    let (client, other) = (env.client().await, env.client().await);
    assert_eq!(linger(&client, "k", TokenId::random().unwrap()).await, LingerOutcome::Gone);
    assert!(!client.is_locked(&key("k")).await);
    let (token, _) = client.lock(&key("k")).await;
    let waiting = other.enqueue(&key("k")).await;
    assert_eq!(linger(&other, "k", waiting).await, LingerOutcome::Gone, "a waiter has no hold");
    other.store.abandon(&key("k"), waiting).await.unwrap();
    assert_eq!(linger(&client, "k", TokenId::random().unwrap()).await, LingerOutcome::Gone, "another token");
    client.release(&key("k"), token).await;
    assert_eq!(linger(&client, "k", token).await, LingerOutcome::Gone, "a late request");
    let state = client.inspect(&key("k")).await;
    assert!(state.holders.is_empty() && state.waiters.is_empty());
    let next = other.lock(&key("k")).await.1;
    assert_eq!(linger(&client, "k", token).await, LingerOutcome::Gone, "the hold of another token");
    assert!(!client.inspect(&key("k")).await.holders[0].lingers && next.fence > Fence::new(0));
}

pub async fn only_exclusive_session_holds_can_linger<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let demand = |units, capacity| Demand::new(units, capacity).unwrap();
    let session = Lifetime::Session { max_hold: None };
    for (demand, lifetime, lingers) in [
        (Demand::WRITE, session, true),
        (demand(3, 3), session, true),
        (Demand::READ, session, false),
        (demand(2, 3), session, false),
        (Demand::MUTEX, Lifetime::Session { max_hold: Some(MINUTE) }, false),
        (Demand::MUTEX, Lifetime::Fixed(MINUTE), false),
    ] {
        let request = AcquireRequest { demand, lifetime, ..client.request(&key("k")) };
        let granted = client.expect_grant(&request).await;
        if lingers {
            assert_eq!(mark(&client, "k", request.token).await.0, granted.fence);
        } else {
            assert_eq!(linger(&client, "k", request.token).await, LingerOutcome::Wanted, "{demand:?}, {lifetime:?}");
        }
        assert_eq!(client.inspect(&key("k")).await.holders[0].lingers, lingers, "{demand:?}, {lifetime:?}");
        assert_eq!(client.release(&key("k"), request.token).await, EndOutcome::Released);
    }
}

pub async fn lingering_hold_keeps_its_grant<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let request = AcquireRequest { metadata: Some("text".into()), ..client.request(&key("k")) };
    let granted = client.expect_grant(&request).await;
    for _ in 0..3 {
        env.advance(MOMENT).await;
        mark(&client, "k", request.token).await;
        assert_eq!(client.poll(&key("k"), request.token).await, PollOutcome::Granted(granted));
        assert_eq!(client.acquire(&request).await, AcquireOutcome::Granted(granted), "a repeated acquire");
    }
    assert_eq!(client.inspect(&key("k")).await.holders[0].metadata.as_deref(), Some("text"));
    assert_eq!(client.release(&key("k"), request.token).await, EndOutcome::Released);
    assert_eq!(client.release(&key("k"), request.token).await, EndOutcome::Nothing);
}

pub async fn waiter_recalls_lingering_hold<S: Store>(env: &Environment<S>) {
    let (mut holder, waiter) = (env.client().await, env.client().await);
    let (token, ..) = lock_and_mark(env, &holder, "k").await;
    waiter.enqueue(&key("k")).await;
    assert_eq!(holder.next_push().await, Push::Recall { token });
    assert!(holder.current_grant(&key("k"), token).await.is_some());
}

pub async fn head_recalls_again_with_each_poll<S: Store>(env: &Environment<S>) {
    let (mut holder, waiter) = (env.client().await, env.client().await);
    let (token, ..) = lock_and_mark(env, &holder, "k").await;
    let waiting = waiter.enqueue(&key("k")).await;
    assert_eq!(holder.next_push().await, Push::Recall { token });
    for _ in 0..2 {
        assert!(matches!(waiter.poll(&key("k"), waiting).await, PollOutcome::Queued(_)));
        assert_eq!(holder.next_push().await, Push::Recall { token });
    }
}

pub async fn only_lingering_holders_are_recalled<S: Store>(env: &Environment<S>) {
    let (mut holder, waiter) = (env.client().await, env.client().await);
    holder.lock(&key("plain")).await;
    let waiting = waiter.enqueue(&key("plain")).await;
    waiter.poll(&key("plain"), waiting).await;
    let (token, ..) = lock_and_mark(env, &holder, "k").await;
    waiter.enqueue(&key("k")).await;
    assert_eq!(holder.next_push().await, Push::Recall { token }, "the first push is about the hold that lingers");
}

pub async fn busy_answer_names_lingering_hold<S: Store>(env: &Environment<S>) {
    let (holder, other) = (env.client().await, env.client().await);
    let (token, _) = holder.lock(&key("k")).await;
    let request = AcquireRequest { enqueue: false, ..other.request(&key("k")) };
    let lingers = async || match other.acquire(&request).await {
        AcquireOutcome::Busy { lingers, .. } => lingers,
        outcome => panic!("not busy: {outcome:?}"),
    };
    assert!(!lingers().await);
    mark(&holder, "k", token).await;
    assert!(lingers().await);
    holder.release(&key("k"), token).await;
    assert!(matches!(other.acquire(&request).await, AcquireOutcome::Granted(_)));
}

pub async fn adopted_lingering_hold_gets_a_new_fence<S: Store>(env: &Environment<S>) {
    let (holder, other) = (env.client().await, env.client().await);
    let (token, _, up_to) = lock_and_mark(env, &holder, "k").await;
    let request = adopting(&other, token);
    let outcome = other.store.adopt(request.clone()).await.unwrap().outcome;
    let AdoptOutcome::Adopted { granted, session_bound: true } = outcome else { panic!("{outcome:?}") };
    assert!(granted.fence > up_to, "{} after {up_to}", granted.fence);
    assert_eq!(other.store.adopt(request.clone()).await.unwrap().outcome, outcome, "a repeated adopt");
    let state = other.inspect(&key("k")).await;
    assert_eq!((state.holders[0].fence, state.holders[0].lingers), (granted.fence, false));
    assert_eq!(linger(&holder, "k", token).await, LingerOutcome::Gone, "the old token");
    assert_eq!(mark(&other, "k", request.to).await.0, granted.fence);
}

pub async fn force_release_names_the_stored_fence<S: Store>(env: &Environment<S>) {
    let (holder, operator) = (env.client().await, env.client().await);
    let (token, fence, up_to) = lock_and_mark(env, &holder, "k").await;
    assert_eq!(force(&operator, &key("k"), up_to).await, ForceReleaseOutcome::NoSuchHold { live: vec![fence] });
    assert_eq!(force(&operator, &key("k"), fence).await, ForceReleaseOutcome::Released);
    assert_eq!(linger(&holder, "k", token).await, LingerOutcome::Gone);
    assert!(operator.lock(&key("k")).await.1.fence > up_to);
}

pub async fn lingering_hold_is_shown<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let (token, granted) = client.lock(&key("k")).await;
    let shown = async || {
        let (inspected, listed) = (client.inspect(&key("k")).await, client.list("").await);
        assert_eq!((inspected.holders[0].fence, listed[0].holders[0].fence), (granted.fence, granted.fence));
        assert_eq!(inspected.holders[0].lingers, listed[0].holders[0].lingers);
        inspected.holders[0].lingers
    };
    assert!(!shown().await);
    env.advance(MOMENT).await;
    mark(&client, "k", token).await;
    assert!(shown().await);
}

pub async fn lingering_hold_ends_with_its_session<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.client_with_ttl(Duration::from_secs(1)).await, env.client().await);
    let (_, _, up_to) = lock_and_mark(env, &holder, "k").await;
    let waiting = waiter.enqueue(&key("k")).await;
    env.kill(holder).await;
    let granted = waiter.current_grant(&key("k"), waiting).await.expect("the waiter is granted");
    assert!(granted.fence > up_to, "{} after {up_to}", granted.fence);
}
