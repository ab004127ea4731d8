//! Holds: granted, released, extended, adopted, ended by time.

use std::time::Duration;

use stanchion::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, EndOutcome, ExtendOutcome, Lifetime, PollOutcome,
};
use stanchion::{Store, TokenId};

use crate::environment::{Actor, Environment, key};

const SHORT: Duration = Duration::from_secs(2);
const MINUTE: Duration = Duration::from_secs(60);

fn fixed<S: Store>(actor: &Actor<S>, ttl: Duration) -> AcquireRequest {
    AcquireRequest { lifetime: Lifetime::Fixed(ttl), ..actor.request(&key("k")) }
}

pub async fn a_free_key_is_granted_and_released<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let (token, granted) = actor.takes(&key("k")).await;
    assert_eq!(granted.remaining, None, "a session hold has no deadline");
    assert!(actor.sees_held(&key("k")).await);
    assert_eq!(actor.releases(&key("k"), token).await, EndOutcome::Released);
    assert!(!actor.sees_held(&key("k")).await);
}

pub async fn three_keys_at_once_are_independent<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let (a, _) = actor.takes(&key("a")).await;
    actor.takes(&key("b")).await;
    actor.takes(&key("c")).await;
    actor.releases(&key("a"), a).await;
    assert!(!actor.sees_held(&key("a")).await);
    assert!(actor.sees_held(&key("b")).await && actor.sees_held(&key("c")).await);
}

pub async fn a_held_key_is_busy_also_for_its_holder<S: Store>(env: &Environment<S>) {
    let (holder, other) = (env.actor().await, env.actor().await);
    holder.takes(&key("k")).await;
    for actor in [&holder, &other] {
        let request = AcquireRequest { enqueue: false, ..actor.request(&key("k")) };
        assert!(matches!(actor.ask(&request).await, AcquireOutcome::Busy { .. }));
        assert_eq!(actor.polls(&key("k"), request.token).await, PollOutcome::Gone, "nothing was entered");
    }
    assert!(holder.sees(&key("k")).await.waiters.is_empty());
}

pub async fn a_repeated_acquire_returns_the_same_grant<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let request = actor.request(&key("k"));
    let first = actor.gets(&request).await;
    assert_eq!(actor.gets(&request).await, first);
    assert_eq!(actor.granted(&key("k"), request.token).await, Some(first));
    assert_eq!(actor.sees(&key("k")).await.holders.len(), 1);
    actor.releases(&key("k"), request.token).await;
    assert!(!actor.sees_held(&key("k")).await, "one release is enough");
}

pub async fn a_repeated_release_finds_nothing<S: Store>(env: &Environment<S>) {
    let (actor, other) = (env.actor().await, env.actor().await);
    let (token, _) = actor.takes(&key("k")).await;
    assert_eq!(actor.releases(&key("k"), token).await, EndOutcome::Released);
    assert_eq!(actor.releases(&key("k"), token).await, EndOutcome::Nothing);
    let (next, _) = other.takes(&key("k")).await;
    assert_eq!(actor.releases(&key("k"), token).await, EndOutcome::Nothing);
    assert!(other.granted(&key("k"), next).await.is_some(), "the next holder is not touched");
}

pub async fn a_wrong_token_does_nothing<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let request = fixed(&actor, MINUTE);
    let granted = actor.gets(&request).await;
    let (other_key, _) = actor.takes(&key("other")).await;
    for _ in 0..20 {
        for wrong in [TokenId::random().unwrap(), other_key] {
            assert_eq!(actor.releases(&key("k"), wrong).await, EndOutcome::Nothing);
            let abandoned = actor.store.abandon(&key("k"), wrong).await.unwrap().outcome;
            assert_eq!(abandoned, EndOutcome::Nothing);
            let extended = actor.store.extend(&key("k"), wrong, MINUTE * 9).await.unwrap().outcome;
            assert_eq!(extended, ExtendOutcome::NotHeld);
            assert_eq!(actor.polls(&key("k"), wrong).await, PollOutcome::Gone);
        }
    }
    let now = actor.granted(&key("k"), request.token).await.unwrap();
    assert_eq!(now.fence, granted.fence);
    assert!(now.remaining.unwrap() <= MINUTE, "nobody made it longer");
    assert_eq!(actor.releases(&key("k"), request.token).await, EndOutcome::Released);
}

pub async fn an_abandoned_grant_is_gone<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let (token, _) = actor.takes(&key("k")).await;
    assert_eq!(actor.store.abandon(&key("k"), token).await.unwrap().outcome, EndOutcome::Released);
    assert!(!actor.sees_held(&key("k")).await);
}

pub async fn a_fixed_term_ends_and_another_can_have_the_key<S: Store>(env: &Environment<S>) {
    let (actor, other) = (env.actor().await, env.actor().await);
    let request = fixed(&actor, SHORT);
    let granted = actor.gets(&request).await;
    assert!(granted.remaining.unwrap() <= SHORT);
    assert!(other.sees_held(&key("k")).await);
    env.pass(SHORT + Duration::from_millis(10)).await;
    assert_eq!(actor.polls(&key("k"), request.token).await, PollOutcome::Gone);
    let (token, next) = other.takes(&key("k")).await;
    assert!(next.fence > granted.fence);
    // The one that was late can do nothing to it.
    assert_eq!(actor.releases(&key("k"), request.token).await, EndOutcome::Nothing);
    let extended = actor.store.extend(&key("k"), request.token, MINUTE).await.unwrap().outcome;
    assert_eq!(extended, ExtendOutcome::NotHeld);
    assert!(other.granted(&key("k"), token).await.is_some());
}

pub async fn a_fixed_term_counts_from_the_grant_not_from_the_question<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let request = fixed(&actor, MINUTE);
    let first = actor.gets(&request).await.remaining.unwrap();
    env.pass(Duration::from_millis(100)).await;
    let repeated = actor.gets(&request).await.remaining.unwrap();
    let polled = actor.granted(&key("k"), request.token).await.unwrap().remaining.unwrap();
    assert!(first - repeated >= Duration::from_millis(100), "a repeat moves no deadline: {first:?}, {repeated:?}");
    assert!(polled <= repeated);
}

pub async fn a_session_hold_ends_at_its_max_hold<S: Store>(env: &Environment<S>) {
    let (actor, other) = (env.actor().await, env.actor().await);
    let lifetime = Lifetime::Session { max_hold: Some(SHORT) };
    let request = AcquireRequest { lifetime, ..actor.request(&key("k")) };
    assert!(actor.gets(&request).await.remaining.unwrap() <= SHORT);
    env.pass(SHORT + Duration::from_millis(10)).await;
    other.takes(&key("k")).await;
}

pub async fn extending_counts_from_now_keeps_the_fence_and_may_shorten<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    // A third of it is left for a machine that is busy.
    let ttl = 2 * SHORT;
    let request = fixed(&actor, ttl);
    let fence = actor.gets(&request).await.fence;
    for _ in 0..2 {
        env.pass(ttl * 2 / 3).await;
        let extended = actor.store.extend(&key("k"), request.token, ttl).await.unwrap().outcome;
        assert_eq!(extended, ExtendOutcome::Extended);
    }
    let granted = actor.granted(&key("k"), request.token).await.expect("held past its first deadline");
    assert_eq!(granted.fence, fence);
    assert!(granted.remaining.unwrap() <= ttl, "set anew, not added up");
    actor.store.extend(&key("k"), request.token, MINUTE).await.unwrap();
    actor.store.extend(&key("k"), request.token, Duration::from_millis(50)).await.unwrap();
    env.pass(Duration::from_millis(60)).await;
    assert_eq!(actor.polls(&key("k"), request.token).await, PollOutcome::Gone);
}

pub async fn extending_never_creates_and_never_revives<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let request = fixed(&actor, SHORT);
    actor.gets(&request).await;
    env.pass(SHORT + Duration::from_millis(10)).await;
    let extend = async || actor.store.extend(&key("k"), request.token, MINUTE).await.unwrap().outcome;
    assert_eq!(extend().await, ExtendOutcome::NotHeld);
    assert!(!actor.sees_held(&key("k")).await);
    let (bound, _) = actor.takes(&key("k")).await;
    let extended = actor.store.extend(&key("k"), bound, SHORT).await.unwrap().outcome;
    assert_eq!(extended, ExtendOutcome::NotHeld, "a hold without a deadline does not get one");
    assert_eq!(extend().await, ExtendOutcome::NotHeld);
}

pub async fn extending_races_a_contender_at_the_end_and_one_of_them_wins<S: Store>(env: &Environment<S>) {
    let (actor, other) = (env.actor().await, env.actor().await);
    for _ in 0..8 {
        let request = fixed(&actor, Duration::from_millis(30));
        actor.gets(&request).await;
        env.pass(Duration::from_millis(30)).await;
        let contend = other.request(&key("k"));
        let contend = AcquireRequest { enqueue: false, ..contend };
        let k = key("k");
        let (extended, contended) = tokio::join!(actor.store.extend(&k, request.token, MINUTE), other.ask(&contend));
        let extended = extended.unwrap().outcome == ExtendOutcome::Extended;
        let taken = matches!(contended, AcquireOutcome::Granted(_));
        assert!(extended != taken, "extended: {extended}, taken: {taken}");
        assert_eq!(actor.sees(&key("k")).await.holders.len(), 1);
        actor.releases(&key("k"), request.token).await;
        other.releases(&key("k"), contend.token).await;
    }
}

fn adopting<S: Store>(actor: &Actor<S>, from: TokenId) -> AdoptRequest {
    let request = actor.request(&key("k"));
    AdoptRequest { key: key("k"), from, to: request.token, session: actor.session, not_after: request.not_after }
}

pub async fn of_two_who_adopt_one_gets_it<S: Store>(env: &Environment<S>) {
    let (first, second, third) = (env.actor().await, env.actor().await, env.actor().await);
    let request = fixed(&first, MINUTE);
    let fence = first.gets(&request).await.fence;
    let (a, b) = (adopting(&second, request.token), adopting(&third, request.token));
    let (one, two) = tokio::join!(second.store.adopt(a.clone()), third.store.adopt(b.clone()));
    let outcomes = [one.unwrap().outcome, two.unwrap().outcome];
    let adopted: Vec<_> = outcomes.iter().filter(|outcome| matches!(outcome, AdoptOutcome::Adopted { .. })).collect();
    assert_eq!(adopted.len(), 1, "{outcomes:?}");
    let AdoptOutcome::Adopted { granted, session_bound } = *adopted[0] else { unreachable!() };
    assert_eq!(granted.fence, fence);
    assert!(granted.remaining.unwrap() <= MINUTE && !session_bound);
    assert_eq!(first.polls(&key("k"), request.token).await, PollOutcome::Gone, "the old token is over");
    // Asked again, the answer is the same.
    let again =
        if matches!(outcomes[0], AdoptOutcome::Adopted { .. }) { second.store.adopt(a) } else { third.store.adopt(b) };
    assert!(matches!(again.await.unwrap().outcome, AdoptOutcome::Adopted { .. }));
}

pub async fn an_adopted_session_hold_moves_to_the_new_session<S: Store>(env: &Environment<S>) {
    let (first, second) = (env.actor().await, env.actor().await);
    let (token, granted) = first.takes(&key("k")).await;
    let request = adopting(&second, token);
    let outcome = second.store.adopt(request.clone()).await.unwrap().outcome;
    assert_eq!(outcome, AdoptOutcome::Adopted { granted, session_bound: true });
    first.store.close_session(first.session).await.unwrap();
    assert!(second.granted(&key("k"), request.to).await.is_some());
    second.store.close_session(second.session).await.unwrap();
    assert!(!env.actor().await.sees_held(&key("k")).await);
}

pub async fn adopting_nothing_creates_nothing<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let request = adopting(&actor, TokenId::random().unwrap());
    assert_eq!(actor.store.adopt(request.clone()).await.unwrap().outcome, AdoptOutcome::Gone);
    let request_late = AdoptRequest { not_after: stanchion::store::StoreTime::from_micros(0), ..request };
    let held = fixed(&actor, MINUTE);
    actor.gets(&held).await;
    let late = AdoptRequest { from: held.token, ..request_late };
    assert_eq!(actor.store.adopt(late).await.unwrap().outcome, AdoptOutcome::Stale);
    assert!(actor.granted(&key("k"), held.token).await.is_some());
    actor.store.close_session(actor.session).await.unwrap();
    let dead = adopting(&actor, held.token);
    assert_eq!(actor.store.adopt(dead).await.unwrap().outcome, AdoptOutcome::SessionGone);
}

pub async fn fences_rise_over_every_grant_however_the_last_one_ended<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let mut last = None;
    for round in 0..40 {
        let session = env.actor().await;
        let request = fixed(&session, Duration::from_millis(20));
        let request = if round % 4 == 0 { request } else { session.request(&key("k")) };
        let granted = session.gets(&request).await;
        assert!(Some(granted.fence) > last, "round {round}: {last:?}, then {:?}", granted.fence);
        assert!(granted.fence.get() < 1 << 53, "exact in a double");
        assert_eq!(actor.sees(&key("k")).await.last_fence, Some(granted.fence));
        last = Some(granted.fence);
        match round % 4 {
            0 => env.pass(Duration::from_millis(25)).await,
            1 => drop(session.releases(&key("k"), request.token).await),
            2 => drop(session.store.close_session(session.session).await.unwrap()),
            _ => drop(session.store.abandon(&key("k"), request.token).await.unwrap()),
        }
    }
}

pub async fn fences_of_many_keys_never_repeat_when_they_come_back<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let mut fences = Vec::new();
    for round in 0..2 {
        for i in 0..200 {
            let (token, granted) = actor.takes(&key(&format!("k{i}"))).await;
            if round == 0 {
                fences.push(granted.fence);
            } else {
                assert!(granted.fence > fences[i]);
            }
            actor.releases(&key(&format!("k{i}")), token).await;
        }
    }
}
