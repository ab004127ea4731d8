//! Force-releases: which holds they end, and how the old holder learns of it.

use std::time::Duration;

use stanchion::store::{
    AcquireOutcome, AcquireRequest, Demand, EndOutcome, ExtendOutcome, ForceReleaseOutcome, ForceReleaseRequest,
    Lifetime, LostToken, PollOutcome, Push, RenewOutcome,
};
use stanchion::{Fence, Key, Store, TokenId};

use crate::environment::{Client, Environment, key};

const SHORT: Duration = Duration::from_secs(2);
const MINUTE: Duration = Duration::from_secs(60);

pub(super) async fn force<S: Store>(client: &Client<S>, key: &Key, fence: Fence) -> ForceReleaseOutcome {
    let request = ForceReleaseRequest { key: key.clone(), fence, reason: "stuck".into() };
    client.store.force_release(request).await.unwrap().outcome
}

/// Renews the session and returns the losses that the store reports.
async fn reported_losses<S: Store>(client: &Client<S>) -> Vec<LostToken> {
    match client.store.renew_session(client.session).await.unwrap().outcome {
        RenewOutcome::Alive { lost } => lost,
        RenewOutcome::Gone => panic!("the session is gone"),
    }
}

/// Returns the tokens of the reported losses, sorted.
pub(super) async fn lost<S: Store>(client: &Client<S>) -> Vec<TokenId> {
    let mut tokens: Vec<_> = reported_losses(client).await.into_iter().map(|lost| lost.token).collect();
    tokens.sort();
    tokens
}

pub async fn force_release_needs_the_current_fence<S: Store>(env: &Environment<S>) {
    let (holder, operator) = (env.client().await, env.client().await);
    let (token, granted) = holder.lock(&key("k")).await;
    let wrong = Fence::new(granted.fence.get() - 1);
    assert_eq!(force(&operator, &key("k"), wrong).await, ForceReleaseOutcome::NoSuchHold { live: vec![granted.fence] });
    assert!(holder.current_grant(&key("k"), token).await.is_some());
    assert_eq!(force(&operator, &key("k"), granted.fence).await, ForceReleaseOutcome::Released);
    assert_eq!(force(&operator, &key("k"), granted.fence).await, ForceReleaseOutcome::NoSuchHold { live: vec![] });
    let (_, next) = operator.lock(&key("k")).await;
    assert!(next.fence.get() > granted.fence.get() + 1, "the force-release itself uses up a fence");
    assert_eq!(
        force(&operator, &key("k"), granted.fence).await,
        ForceReleaseOutcome::NoSuchHold { live: vec![next.fence] }
    );
}

pub async fn force_release_is_pushed_and_in_renewals<S: Store>(env: &Environment<S>) {
    let (mut holder, operator) = (env.client().await, env.client().await);
    let (token, granted) = holder.lock(&key("k")).await;
    force(&operator, &key("k"), granted.fence).await;
    let expected = LostToken { key: key("k"), token, reason: "stuck".into() };
    assert_eq!(holder.next_push().await, Push::ForceReleased(expected.clone()));
    for _ in 0..2 {
        assert_eq!(
            reported_losses(&holder).await,
            vec![expected.clone()],
            "every renewal reports the loss until the token is released"
        );
    }
    assert_eq!(holder.release(&key("k"), token).await, EndOutcome::Nothing);
    assert_eq!(reported_losses(&holder).await, vec![]);
}

pub async fn force_released_token_is_gone<S: Store>(env: &Environment<S>) {
    let (holder, operator) = (env.client().await, env.client().await);
    let request = holder.request(&key("k"));
    let granted = holder.expect_grant(&request).await;
    let waiting = operator.enqueue(&key("k")).await;
    force(&operator, &key("k"), granted.fence).await;
    assert!(
        operator.current_grant(&key("k"), waiting).await.is_some(),
        "the force-release also grants the next waiter"
    );
    assert_eq!(holder.poll(&key("k"), request.token).await, PollOutcome::Gone);
    assert_eq!(holder.acquire(&request).await, AcquireOutcome::ForceReleased, "a repeated acquire gets no new grant");
    let extended = holder.store.extend(&key("k"), request.token, Duration::from_secs(9)).await.unwrap().outcome;
    assert_eq!(extended, ExtendOutcome::NotHeld);
    assert_eq!(operator.inspect(&key("k")).await.waiters.len(), 0);
}

pub async fn one_permit_can_be_force_released<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let mut grants = Vec::new();
    for _ in 0..3 {
        let demand = Demand::new(1, 3).unwrap();
        let request = AcquireRequest { demand, ..client.request(&key("k")) };
        grants.push((request.token, client.expect_grant(&request).await.fence));
    }
    force(&client, &key("k"), grants[1].1).await;
    assert!(client.current_grant(&key("k"), grants[0].0).await.is_some());
    assert_eq!(client.poll(&key("k"), grants[1].0).await, PollOutcome::Gone);
    assert!(client.current_grant(&key("k"), grants[2].0).await.is_some());
}

pub async fn failed_force_release_changes_nothing<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    assert_eq!(force(&client, &key("never"), Fence::new(7)).await, ForceReleaseOutcome::NoSuchHold { live: vec![] });
    let (token, granted) = client.lock(&key("k")).await;
    let (_, other) = client.lock(&key("other")).await;
    if other.fence != granted.fence {
        let outcome = force(&client, &key("k"), other.fence).await;
        assert_eq!(outcome, ForceReleaseOutcome::NoSuchHold { live: vec![granted.fence] });
    }
    let state = client.inspect(&key("k")).await;
    assert_eq!(state.last_fence, Some(granted.fence), "a failed force-release uses up no fence");
    assert!(client.current_grant(&key("k"), token).await.is_some());
    assert_eq!(lost(&client).await, vec![]);
}

pub async fn renewals_report_losses_until_released<S: Store>(env: &Environment<S>) {
    let (victim, bystander) = (env.client().await, env.client().await);
    let mut tokens = Vec::new();
    for name in ["a", "b", "c"] {
        let (token, granted) = victim.lock(&key(name)).await;
        assert_eq!(force(&bystander, &key(name), granted.fence).await, ForceReleaseOutcome::Released);
        tokens.push((name, token));
    }
    let mut all: Vec<_> = tokens.iter().map(|(_, token)| *token).collect();
    all.sort();
    assert_eq!(lost(&victim).await, all);
    assert_eq!(lost(&bystander).await, vec![], "only the session of the lost hold gets the report");
    let (name, token) = tokens[0];
    assert_eq!(victim.store.abandon(&key(name), token).await.unwrap().outcome, EndOutcome::Nothing);
    all.retain(|left| *left != token);
    assert_eq!(lost(&victim).await, all, "abandon ends the report of its token, too");
    for (name, token) in &tokens[1..] {
        victim.release(&key(name), *token).await;
    }
    assert_eq!(lost(&victim).await, vec![]);
}

pub async fn force_release_serves_fitting_waiters<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let demand = |units| Demand::new(units, 2).unwrap();
    let both = AcquireRequest { demand: demand(2), ..client.request(&key("k")) };
    let fence = client.expect_grant(&both).await.fence;
    let mut waiting = Vec::new();
    for _ in 0..2 {
        let request = AcquireRequest { demand: demand(1), ..client.request(&key("k")) };
        client.expect_queued(&request).await;
        waiting.push(request.token);
    }
    force(&client, &key("k"), fence).await;
    assert_eq!(client.inspect(&key("k")).await.closed_for, None);
    let mut last = fence;
    for token in waiting {
        let granted = client.current_grant(&key("k"), token).await.expect("both waiters fit");
        assert!(granted.fence > last);
        last = granted.fence;
    }
}

pub async fn force_released_token_stays_rejected<S: Store>(env: &Environment<S>) {
    let (victim, next, last) = (env.client().await, env.client().await, env.client().await);
    let request = victim.request(&key("k"));
    let fence = victim.expect_grant(&request).await.fence;
    let second = next.enqueue(&key("k")).await;
    assert_eq!(force(&victim, &key("k"), fence).await, ForceReleaseOutcome::Released);
    assert!(next.current_grant(&key("k"), second).await.is_some());
    let third = last.enqueue(&key("k")).await;
    next.release(&key("k"), second).await;
    assert!(last.current_grant(&key("k"), third).await.is_some());
    last.release(&key("k"), third).await;
    assert_eq!(victim.acquire(&request).await, AcquireOutcome::ForceReleased);
    assert_eq!(lost(&victim).await, vec![request.token]);
}

pub async fn fixed_hold_can_be_force_released<S: Store>(env: &Environment<S>) {
    let (victim, operator) = (env.client().await, env.client().await);
    let request = AcquireRequest { lifetime: Lifetime::Fixed(MINUTE), ..victim.request(&key("k")) };
    let fence = victim.expect_grant(&request).await.fence;
    assert_eq!(force(&operator, &key("k"), fence).await, ForceReleaseOutcome::Released);
    assert_eq!(lost(&victim).await, vec![request.token]);
    assert_eq!(victim.acquire(&request).await, AcquireOutcome::ForceReleased);
    assert_eq!(victim.poll(&key("k"), request.token).await, PollOutcome::Gone);
    operator.lock(&key("k")).await;
}

pub async fn hold_of_dead_session_can_be_force_released<S: Store>(env: &Environment<S>) {
    let (dead, operator) = (env.client().await, env.client().await);
    let request = AcquireRequest { lifetime: Lifetime::Fixed(MINUTE), ..dead.request(&key("k")) };
    let fence = dead.expect_grant(&request).await.fence;
    dead.store.close_session(dead.session).await.unwrap();
    assert_eq!(force(&operator, &key("k"), fence).await, ForceReleaseOutcome::Released);
    assert!(!operator.is_locked(&key("k")).await);
    assert_eq!(dead.acquire(&request).await, AcquireOutcome::SessionGone);
}

pub async fn ended_hold_cannot_be_force_released<S: Store>(env: &Environment<S>) {
    let (client, operator) = (env.client().await, env.client().await);
    let (token, released) = client.lock(&key("k")).await;
    client.release(&key("k"), token).await;
    assert_eq!(force(&operator, &key("k"), released.fence).await, ForceReleaseOutcome::NoSuchHold { live: vec![] });
    let request = AcquireRequest { lifetime: Lifetime::Fixed(SHORT), ..client.request(&key("k")) };
    let expired = client.expect_grant(&request).await;
    env.advance(SHORT + Duration::from_millis(10)).await;
    assert_eq!(force(&operator, &key("k"), expired.fence).await, ForceReleaseOutcome::NoSuchHold { live: vec![] });
    assert_eq!(lost(&client).await, vec![], "an ended hold is not reported as lost");
}
