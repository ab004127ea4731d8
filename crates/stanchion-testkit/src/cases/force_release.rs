//! Force-releases: which holds they end, and how the old holder learns of it.

use std::time::Duration;

use stanchion::store::{
    AcquireOutcome, AcquireRequest, Demand, EndOutcome, ExtendOutcome, ForceReleaseOutcome, ForceReleaseRequest,
    Lifetime, LostToken, PollOutcome, Push, RenewOutcome,
};
use stanchion::{Fence, Key, Store, TokenId};

use crate::environment::{Actor, Environment, key};

const SHORT: Duration = Duration::from_secs(2);
const MINUTE: Duration = Duration::from_secs(60);

pub(super) async fn force<S: Store>(actor: &Actor<S>, key: &Key, fence: Fence) -> ForceReleaseOutcome {
    let request = ForceReleaseRequest { key: key.clone(), fence, reason: "stuck".into() };
    actor.store.force_release(request).await.unwrap().outcome
}

/// Renews the session and returns the losses that the store reports.
async fn reported_losses<S: Store>(actor: &Actor<S>) -> Vec<LostToken> {
    match actor.store.renew_session(actor.session).await.unwrap().outcome {
        RenewOutcome::Alive { lost } => lost,
        RenewOutcome::Gone => panic!("the session is gone"),
    }
}

/// Returns the tokens of the reported losses, sorted.
pub(super) async fn lost<S: Store>(actor: &Actor<S>) -> Vec<TokenId> {
    let mut tokens: Vec<_> = reported_losses(actor).await.into_iter().map(|lost| lost.token).collect();
    tokens.sort();
    tokens
}

pub async fn force_release_needs_the_current_fence<S: Store>(env: &Environment<S>) {
    let (holder, operator) = (env.actor().await, env.actor().await);
    let (token, granted) = holder.takes(&key("k")).await;
    let wrong = Fence::new(granted.fence.get() - 1);
    assert_eq!(force(&operator, &key("k"), wrong).await, ForceReleaseOutcome::NoSuchHold { live: vec![granted.fence] });
    assert!(holder.granted(&key("k"), token).await.is_some());
    assert_eq!(force(&operator, &key("k"), granted.fence).await, ForceReleaseOutcome::Released);
    assert_eq!(force(&operator, &key("k"), granted.fence).await, ForceReleaseOutcome::NoSuchHold { live: vec![] });
    let (_, next) = operator.takes(&key("k")).await;
    assert!(next.fence.get() > granted.fence.get() + 1, "a forced release raises the fence by itself");
    assert_eq!(
        force(&operator, &key("k"), granted.fence).await,
        ForceReleaseOutcome::NoSuchHold { live: vec![next.fence] }
    );
}

pub async fn force_release_is_pushed_and_in_renewals<S: Store>(env: &Environment<S>) {
    let (mut holder, operator) = (env.actor().await, env.actor().await);
    let (token, granted) = holder.takes(&key("k")).await;
    force(&operator, &key("k"), granted.fence).await;
    let expected = LostToken { key: key("k"), token, reason: "stuck".into() };
    assert_eq!(holder.pushed().await, Push::ForceReleased(expected.clone()));
    for _ in 0..2 {
        assert_eq!(reported_losses(&holder).await, vec![expected.clone()], "until the token is ended");
    }
    assert_eq!(holder.releases(&key("k"), token).await, EndOutcome::Nothing);
    assert_eq!(reported_losses(&holder).await, vec![]);
}

pub async fn force_released_token_is_gone<S: Store>(env: &Environment<S>) {
    let (holder, operator) = (env.actor().await, env.actor().await);
    let request = holder.request(&key("k"));
    let granted = holder.gets(&request).await;
    let waiting = operator.queues(&key("k")).await;
    force(&operator, &key("k"), granted.fence).await;
    assert!(operator.granted(&key("k"), waiting).await.is_some(), "handed on in the same step");
    assert_eq!(holder.polls(&key("k"), request.token).await, PollOutcome::Gone);
    assert_eq!(holder.ask(&request).await, AcquireOutcome::ForceReleased, "a repeat is not granted anew");
    let extended = holder.store.extend(&key("k"), request.token, Duration::from_secs(9)).await.unwrap().outcome;
    assert_eq!(extended, ExtendOutcome::NotHeld);
    assert_eq!(operator.sees(&key("k")).await.waiters.len(), 0);
}

pub async fn one_permit_can_be_force_released<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let mut grants = Vec::new();
    for _ in 0..3 {
        let demand = Demand::new(1, 3).unwrap();
        let request = AcquireRequest { demand, ..actor.request(&key("k")) };
        grants.push((request.token, actor.gets(&request).await.fence));
    }
    force(&actor, &key("k"), grants[1].1).await;
    assert!(actor.granted(&key("k"), grants[0].0).await.is_some());
    assert_eq!(actor.polls(&key("k"), grants[1].0).await, PollOutcome::Gone);
    assert!(actor.granted(&key("k"), grants[2].0).await.is_some());
}

pub async fn failed_force_release_changes_nothing<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    assert_eq!(force(&actor, &key("never"), Fence::new(7)).await, ForceReleaseOutcome::NoSuchHold { live: vec![] });
    let (token, granted) = actor.takes(&key("k")).await;
    let (_, other) = actor.takes(&key("other")).await;
    if other.fence != granted.fence {
        let refused = force(&actor, &key("k"), other.fence).await;
        assert_eq!(refused, ForceReleaseOutcome::NoSuchHold { live: vec![granted.fence] });
    }
    let state = actor.sees(&key("k")).await;
    assert_eq!(state.last_fence, Some(granted.fence), "no fence was used up");
    assert!(actor.granted(&key("k"), token).await.is_some());
    assert_eq!(lost(&actor).await, vec![]);
}

pub async fn renewals_report_losses_until_released<S: Store>(env: &Environment<S>) {
    let (victim, bystander) = (env.actor().await, env.actor().await);
    let mut tokens = Vec::new();
    for name in ["a", "b", "c"] {
        let (token, granted) = victim.takes(&key(name)).await;
        assert_eq!(force(&bystander, &key(name), granted.fence).await, ForceReleaseOutcome::Released);
        tokens.push((name, token));
    }
    let mut all: Vec<_> = tokens.iter().map(|(_, token)| *token).collect();
    all.sort();
    assert_eq!(lost(&victim).await, all);
    assert_eq!(lost(&bystander).await, vec![], "only the one who lost it is told");
    let (name, token) = tokens[0];
    assert_eq!(victim.store.abandon(&key(name), token).await.unwrap().outcome, EndOutcome::Nothing);
    all.retain(|left| *left != token);
    assert_eq!(lost(&victim).await, all, "giving up ends it too");
    for (name, token) in &tokens[1..] {
        victim.releases(&key(name), *token).await;
    }
    assert_eq!(lost(&victim).await, vec![]);
}

pub async fn force_release_serves_fitting_waiters<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let demand = |units| Demand::new(units, 2).unwrap();
    let both = AcquireRequest { demand: demand(2), ..actor.request(&key("k")) };
    let fence = actor.gets(&both).await.fence;
    let mut waiting = Vec::new();
    for _ in 0..2 {
        let request = AcquireRequest { demand: demand(1), ..actor.request(&key("k")) };
        actor.waits(&request).await;
        waiting.push(request.token);
    }
    force(&actor, &key("k"), fence).await;
    assert_eq!(actor.sees(&key("k")).await.closed_for, None);
    let mut last = fence;
    for token in waiting {
        let granted = actor.granted(&key("k"), token).await.expect("there is room for both");
        assert!(granted.fence > last);
        last = granted.fence;
    }
}

pub async fn force_released_token_stays_rejected<S: Store>(env: &Environment<S>) {
    let (victim, next, last) = (env.actor().await, env.actor().await, env.actor().await);
    let request = victim.request(&key("k"));
    let fence = victim.gets(&request).await.fence;
    let second = next.queues(&key("k")).await;
    assert_eq!(force(&victim, &key("k"), fence).await, ForceReleaseOutcome::Released);
    assert!(next.granted(&key("k"), second).await.is_some());
    let third = last.queues(&key("k")).await;
    next.releases(&key("k"), second).await;
    assert!(last.granted(&key("k"), third).await.is_some());
    last.releases(&key("k"), third).await;
    assert_eq!(victim.ask(&request).await, AcquireOutcome::ForceReleased);
    assert_eq!(lost(&victim).await, vec![request.token]);
}

pub async fn fixed_hold_can_be_force_released<S: Store>(env: &Environment<S>) {
    let (victim, operator) = (env.actor().await, env.actor().await);
    let request = AcquireRequest { lifetime: Lifetime::Fixed(MINUTE), ..victim.request(&key("k")) };
    let fence = victim.gets(&request).await.fence;
    assert_eq!(force(&operator, &key("k"), fence).await, ForceReleaseOutcome::Released);
    assert_eq!(lost(&victim).await, vec![request.token]);
    assert_eq!(victim.ask(&request).await, AcquireOutcome::ForceReleased);
    assert_eq!(victim.polls(&key("k"), request.token).await, PollOutcome::Gone);
    operator.takes(&key("k")).await;
}

pub async fn hold_of_dead_session_can_be_force_released<S: Store>(env: &Environment<S>) {
    let (dead, operator) = (env.actor().await, env.actor().await);
    let request = AcquireRequest { lifetime: Lifetime::Fixed(MINUTE), ..dead.request(&key("k")) };
    let fence = dead.gets(&request).await.fence;
    dead.store.close_session(dead.session).await.unwrap();
    assert_eq!(force(&operator, &key("k"), fence).await, ForceReleaseOutcome::Released);
    assert!(!operator.sees_held(&key("k")).await);
    assert_eq!(dead.ask(&request).await, AcquireOutcome::SessionGone);
}

pub async fn ended_hold_cannot_be_force_released<S: Store>(env: &Environment<S>) {
    let (actor, operator) = (env.actor().await, env.actor().await);
    let (token, released) = actor.takes(&key("k")).await;
    actor.releases(&key("k"), token).await;
    assert_eq!(force(&operator, &key("k"), released.fence).await, ForceReleaseOutcome::NoSuchHold { live: vec![] });
    let request = AcquireRequest { lifetime: Lifetime::Fixed(SHORT), ..actor.request(&key("k")) };
    let expired = actor.gets(&request).await;
    env.pass(SHORT + Duration::from_millis(10)).await;
    assert_eq!(force(&operator, &key("k"), expired.fence).await, ForceReleaseOutcome::NoSuchHold { live: vec![] });
    assert_eq!(lost(&actor).await, vec![], "it was not forced");
}
