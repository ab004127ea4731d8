//! Holds: granted, released, extended, adopted, ended by time.

use std::time::Duration;

use stanchion::store::{AcquireOutcome, AcquireRequest, EndOutcome, ExtendOutcome, Lifetime, PollOutcome};
use stanchion::{Store, TokenId};

use crate::environment::{Actor, Environment, key};

const SHORT: Duration = Duration::from_secs(2);
const MINUTE: Duration = Duration::from_secs(60);

fn fixed<S: Store>(actor: &Actor<S>, ttl: Duration) -> AcquireRequest {
    AcquireRequest { lifetime: Lifetime::Fixed(ttl), ..actor.request(&key("k")) }
}

pub async fn free_key_is_granted_and_released<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let (token, granted) = actor.takes(&key("k")).await;
    assert_eq!(granted.remaining, None, "a session hold has no deadline");
    assert!(actor.sees_held(&key("k")).await);
    assert_eq!(actor.releases(&key("k"), token).await, EndOutcome::Released);
    assert!(!actor.sees_held(&key("k")).await);
}

pub async fn held_keys_are_independent<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let (a, _) = actor.takes(&key("a")).await;
    actor.takes(&key("b")).await;
    actor.takes(&key("c")).await;
    actor.releases(&key("a"), a).await;
    assert!(!actor.sees_held(&key("a")).await);
    assert!(actor.sees_held(&key("b")).await && actor.sees_held(&key("c")).await);
}

pub async fn held_key_is_busy_even_for_its_holder<S: Store>(env: &Environment<S>) {
    let (holder, other) = (env.actor().await, env.actor().await);
    holder.takes(&key("k")).await;
    for actor in [&holder, &other] {
        let request = AcquireRequest { enqueue: false, ..actor.request(&key("k")) };
        assert!(matches!(actor.ask(&request).await, AcquireOutcome::Busy { .. }));
        assert_eq!(actor.polls(&key("k"), request.token).await, PollOutcome::Gone, "nothing was entered");
    }
    assert!(holder.sees(&key("k")).await.waiters.is_empty());
}

pub async fn repeated_acquire_returns_same_grant<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let request = actor.request(&key("k"));
    let first = actor.gets(&request).await;
    assert_eq!(actor.gets(&request).await, first);
    assert_eq!(actor.granted(&key("k"), request.token).await, Some(first));
    assert_eq!(actor.sees(&key("k")).await.holders.len(), 1);
    actor.releases(&key("k"), request.token).await;
    assert!(!actor.sees_held(&key("k")).await, "one release is enough");
}

pub async fn repeated_release_finds_nothing<S: Store>(env: &Environment<S>) {
    let (actor, other) = (env.actor().await, env.actor().await);
    let (token, _) = actor.takes(&key("k")).await;
    assert_eq!(actor.releases(&key("k"), token).await, EndOutcome::Released);
    assert_eq!(actor.releases(&key("k"), token).await, EndOutcome::Nothing);
    let (next, _) = other.takes(&key("k")).await;
    assert_eq!(actor.releases(&key("k"), token).await, EndOutcome::Nothing);
    assert!(other.granted(&key("k"), next).await.is_some(), "the next holder is not touched");
}

pub async fn wrong_token_changes_nothing<S: Store>(env: &Environment<S>) {
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

pub async fn abandon_releases_the_grant<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let (token, _) = actor.takes(&key("k")).await;
    assert_eq!(actor.store.abandon(&key("k"), token).await.unwrap().outcome, EndOutcome::Released);
    assert!(!actor.sees_held(&key("k")).await);
}

pub async fn expired_fixed_hold_frees_the_key<S: Store>(env: &Environment<S>) {
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

pub async fn repeated_acquire_moves_no_deadline<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let request = fixed(&actor, MINUTE);
    let first = actor.gets(&request).await.remaining.unwrap();
    env.pass(Duration::from_millis(100)).await;
    let repeated = actor.gets(&request).await.remaining.unwrap();
    let polled = actor.granted(&key("k"), request.token).await.unwrap().remaining.unwrap();
    assert!(first - repeated >= Duration::from_millis(100), "a repeat moves no deadline: {first:?}, {repeated:?}");
    assert!(polled <= repeated);
}

pub async fn session_hold_ends_at_max_hold<S: Store>(env: &Environment<S>) {
    let (actor, other) = (env.actor().await, env.actor().await);
    let lifetime = Lifetime::Session { max_hold: Some(SHORT) };
    let request = AcquireRequest { lifetime, ..actor.request(&key("k")) };
    assert!(actor.gets(&request).await.remaining.unwrap() <= SHORT);
    env.pass(SHORT + Duration::from_millis(10)).await;
    other.takes(&key("k")).await;
}

pub async fn extend_sets_deadline_and_keeps_fence<S: Store>(env: &Environment<S>) {
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

pub async fn extend_never_creates_or_revives<S: Store>(env: &Environment<S>) {
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

pub async fn extend_or_contender_wins_at_expiry<S: Store>(env: &Environment<S>) {
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

pub async fn fences_rise_however_holds_end<S: Store>(env: &Environment<S>) {
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

pub async fn reused_keys_never_repeat_fences<S: Store>(env: &Environment<S>) {
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
