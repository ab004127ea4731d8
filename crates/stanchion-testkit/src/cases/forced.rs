//! Releases by force, and holds that change hands.

use std::time::Duration;

use stanchion::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, Demand, EndOutcome, ExtendOutcome, ForceReleaseOutcome,
    ForceReleaseRequest, Lifetime, LostToken, PollOutcome, RenewOutcome,
};
use stanchion::{Fence, Key, Store, TokenId};

use crate::environment::{Actor, Environment, key};

const SHORT: Duration = Duration::from_secs(2);
const MINUTE: Duration = Duration::from_secs(60);

async fn force<S: Store>(actor: &Actor<S>, key: &Key, fence: Fence) -> ForceReleaseOutcome {
    let request = ForceReleaseRequest { key: key.clone(), fence, reason: "stuck".into() };
    actor.store.force_release(request).await.unwrap().outcome
}

async fn lost<S: Store>(actor: &Actor<S>) -> Vec<TokenId> {
    match actor.store.renew_session(actor.session).await.unwrap().outcome {
        RenewOutcome::Alive { lost } => {
            let mut tokens: Vec<_> = lost.into_iter().map(|LostToken { token, .. }| token).collect();
            tokens.sort();
            tokens
        }
        RenewOutcome::Gone => panic!("the session is gone"),
    }
}

fn adopting<S: Store>(actor: &Actor<S>, from: TokenId) -> AdoptRequest {
    let request = actor.request(&key("k"));
    AdoptRequest { key: key("k"), from, to: request.token, session: actor.session, not_after: request.not_after }
}

async fn adopts<S: Store>(actor: &Actor<S>, request: &AdoptRequest) -> AdoptOutcome {
    actor.store.adopt(request.clone()).await.unwrap().outcome
}

pub async fn evicting_nothing_changes_nothing<S: Store>(env: &Environment<S>) {
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

pub async fn everything_that_was_lost_is_told_until_it_is_ended<S: Store>(env: &Environment<S>) {
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

pub async fn a_forced_release_closes_nothing_and_serves_all_that_fit<S: Store>(env: &Environment<S>) {
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

pub async fn a_forced_token_is_refused_also_after_hand_offs<S: Store>(env: &Environment<S>) {
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

pub async fn a_fixed_term_can_be_forced_out_too<S: Store>(env: &Environment<S>) {
    let (victim, operator) = (env.actor().await, env.actor().await);
    let request = AcquireRequest { lifetime: Lifetime::Fixed(MINUTE), ..victim.request(&key("k")) };
    let fence = victim.gets(&request).await.fence;
    assert_eq!(force(&operator, &key("k"), fence).await, ForceReleaseOutcome::Released);
    assert_eq!(lost(&victim).await, vec![request.token]);
    assert_eq!(victim.ask(&request).await, AcquireOutcome::ForceReleased);
    assert_eq!(victim.polls(&key("k"), request.token).await, PollOutcome::Gone);
    operator.takes(&key("k")).await;
}

pub async fn a_hold_of_the_dead_can_be_forced_out<S: Store>(env: &Environment<S>) {
    let (dead, operator) = (env.actor().await, env.actor().await);
    let request = AcquireRequest { lifetime: Lifetime::Fixed(MINUTE), ..dead.request(&key("k")) };
    let fence = dead.gets(&request).await.fence;
    dead.store.close_session(dead.session).await.unwrap();
    assert_eq!(force(&operator, &key("k"), fence).await, ForceReleaseOutcome::Released);
    assert!(!operator.sees_held(&key("k")).await);
    assert_eq!(dead.ask(&request).await, AcquireOutcome::SessionGone);
}

pub async fn what_is_over_cannot_be_forced_out<S: Store>(env: &Environment<S>) {
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

pub async fn an_adopted_hold_keeps_fence_deadline_and_text<S: Store>(env: &Environment<S>) {
    let (first, second) = (env.actor().await, env.actor().await);
    for lifetime in [Lifetime::Fixed(MINUTE), Lifetime::Session { max_hold: Some(MINUTE) }] {
        let metadata = Some("what".to_owned());
        let request = AcquireRequest { lifetime, metadata, ..first.request(&key("k")) };
        let before = first.gets(&request).await;
        env.pass(Duration::from_millis(20)).await;
        let adopt = adopting(&second, request.token);
        let AdoptOutcome::Adopted { granted, session_bound } = adopts(&second, &adopt).await else {
            panic!("not adopted")
        };
        assert_eq!(granted.fence, before.fence);
        assert!(granted.remaining.unwrap() < before.remaining.unwrap(), "the deadline stays");
        assert_eq!(session_bound, matches!(lifetime, Lifetime::Session { .. }));
        assert_eq!(second.sees(&key("k")).await.holders[0].metadata.as_deref(), Some("what"));
        assert_eq!(second.releases(&key("k"), adopt.to).await, EndOutcome::Released);
    }
}

pub async fn the_old_token_of_an_adopted_hold_does_nothing<S: Store>(env: &Environment<S>) {
    let (first, second) = (env.actor().await, env.actor().await);
    let request = AcquireRequest { lifetime: Lifetime::Fixed(MINUTE), ..first.request(&key("k")) };
    first.gets(&request).await;
    let adopt = adopting(&second, request.token);
    adopts(&second, &adopt).await;
    assert_eq!(first.releases(&key("k"), request.token).await, EndOutcome::Nothing);
    assert_eq!(first.store.abandon(&key("k"), request.token).await.unwrap().outcome, EndOutcome::Nothing);
    let extended = first.store.extend(&key("k"), request.token, MINUTE * 9).await.unwrap().outcome;
    assert_eq!(extended, ExtendOutcome::NotHeld);
    assert_eq!(adopts(&first, &adopting(&first, request.token)).await, AdoptOutcome::Gone);
    assert!(second.granted(&key("k"), adopt.to).await.unwrap().remaining.unwrap() <= MINUTE);
}

pub async fn a_repeated_adopt_is_answered_the_same_also_late<S: Store>(env: &Environment<S>) {
    let (first, second) = (env.actor().await, env.actor().await);
    let (token, granted) = first.takes(&key("k")).await;
    let now = second.store.inspect(&key("k")).await.unwrap().time;
    let adopt = AdoptRequest { not_after: now.after(MINUTE), ..adopting(&second, token) };
    let expected = AdoptOutcome::Adopted { granted, session_bound: true };
    for _ in 0..3 {
        assert_eq!(adopts(&second, &adopt).await, expected);
    }
    assert_eq!(second.sees(&key("k")).await.holders.len(), 1);
    assert_eq!(second.releases(&key("k"), adopt.to).await, EndOutcome::Released);
    assert_eq!(adopts(&second, &adopt).await, AdoptOutcome::Gone, "it creates nothing");
    assert!(!second.sees_held(&key("k")).await);
}

pub async fn an_adopted_hold_that_is_forced_out_is_told_to_its_new_session<S: Store>(env: &Environment<S>) {
    let (first, second) = (env.actor().await, env.actor().await);
    for lifetime in [Lifetime::Fixed(MINUTE), Lifetime::Session { max_hold: None }] {
        let request = AcquireRequest { lifetime, ..first.request(&key("k")) };
        let fence = first.gets(&request).await.fence;
        let adopt = adopting(&second, request.token);
        adopts(&second, &adopt).await;
        assert_eq!(force(&first, &key("k"), fence).await, ForceReleaseOutcome::Released);
        assert_eq!(lost(&first).await, vec![]);
        assert_eq!(lost(&second).await, vec![adopt.to]);
        assert_eq!(adopts(&second, &adopt).await, AdoptOutcome::Gone, "a repeat takes nothing up");
        second.releases(&key("k"), adopt.to).await;
    }
}

pub async fn a_waiter_cannot_be_adopted<S: Store>(env: &Environment<S>) {
    let (holder, waiter, third) = (env.actor().await, env.actor().await, env.actor().await);
    let (token, _) = holder.takes(&key("k")).await;
    let waiting = waiter.queues(&key("k")).await;
    assert_eq!(adopts(&third, &adopting(&third, waiting)).await, AdoptOutcome::Gone);
    holder.releases(&key("k"), token).await;
    assert!(waiter.granted(&key("k"), waiting).await.is_some());
}

pub async fn what_is_over_cannot_be_adopted<S: Store>(env: &Environment<S>) {
    let (first, second) = (env.actor().await, env.actor().await);
    let expired = AcquireRequest { lifetime: Lifetime::Fixed(SHORT), ..first.request(&key("k")) };
    first.gets(&expired).await;
    env.pass(SHORT + Duration::from_millis(10)).await;
    assert_eq!(adopts(&second, &adopting(&second, expired.token)).await, AdoptOutcome::Gone);
    let (bound, _) = first.takes(&key("k")).await;
    first.store.close_session(first.session).await.unwrap();
    assert_eq!(adopts(&second, &adopting(&second, bound)).await, AdoptOutcome::Gone, "it ended with its session");
    assert!(!second.sees_held(&key("k")).await);
}
