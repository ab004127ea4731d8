//! Sessions: proof of life, and what ends with them.

use std::time::Duration;

use stanchion::store::{
    AcquireOutcome, AcquireRequest, Demand, EndOutcome, Lifetime, OpenOutcome, OpenSession, PollOutcome, RenewOutcome,
};
use stanchion::{SessionId, Store};

use crate::Environment;
use crate::environment::{key, until};

const SHORT: Duration = Duration::from_secs(2);

pub async fn reopening_keeps_the_session<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let (token, granted) = actor.takes(&key("k")).await;
    let request = OpenSession { session: actor.session, ttl: Duration::from_secs(3_600), owner: "again".into() };
    assert_eq!(actor.store.open_session(request).await.unwrap().outcome, OpenOutcome::Opened);
    assert_eq!(actor.granted(&key("k"), token).await, Some(granted));
}

pub async fn renewing_unknown_session_answers_gone<S: Store>(env: &Environment<S>) {
    let store = env.open();
    let unknown = SessionId::random().unwrap();
    assert_eq!(store.renew_session(unknown).await.unwrap().outcome, RenewOutcome::Gone);
    assert_eq!(store.renew_session(unknown).await.unwrap().outcome, RenewOutcome::Gone, "a beat does not create");
}

pub async fn renewed_session_stays_alive<S: Store>(env: &Environment<S>) {
    let actor = env.mortal(SHORT).await;
    let (token, _) = actor.takes(&key("k")).await;
    for _ in 0..6 {
        env.pass(SHORT / 3).await;
        assert_eq!(
            actor.store.renew_session(actor.session).await.unwrap().outcome,
            RenewOutcome::Alive { lost: vec![] }
        );
    }
    assert!(actor.granted(&key("k"), token).await.is_some());
}

pub async fn closed_session_cannot_reopen<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    actor.store.close_session(actor.session).await.unwrap();
    actor.store.close_session(actor.session).await.unwrap();
    assert_eq!(actor.store.renew_session(actor.session).await.unwrap().outcome, RenewOutcome::Gone);
    let request = OpenSession { session: actor.session, ttl: SHORT, owner: String::new() };
    assert_eq!(actor.store.open_session(request).await.unwrap().outcome, OpenOutcome::Gone);
    assert_eq!(actor.ask(&actor.request(&key("k"))).await, AcquireOutcome::SessionGone);
    assert!(!actor.sees_held(&key("k")).await);
}

pub async fn unrenewed_session_expires_for_good<S: Store>(env: &Environment<S>) {
    let actor = env.mortal(SHORT).await;
    let other = env.actor().await;
    let (token, _) = actor.takes(&key("k")).await;
    env.pass(SHORT * 2).await;
    assert_eq!(actor.store.renew_session(actor.session).await.unwrap().outcome, RenewOutcome::Gone);
    assert_eq!(actor.polls(&key("k"), token).await, PollOutcome::Gone);
    assert_eq!(actor.ask(&actor.request(&key("k"))).await, AcquireOutcome::SessionGone);
    other.takes(&key("k")).await;
}

pub async fn session_lives_as_long_as_its_process<S: Store>(env: &Environment<S>) {
    let (actor, other) = (env.mortal(SHORT).await, env.actor().await);
    let (token, _) = actor.takes(&key("k")).await;
    let waiting = other.queues(&key("k")).await;
    env.pass(SHORT * 2).await;
    assert!(actor.granted(&key("k"), token).await.is_some(), "beaten or not");
    assert_eq!(actor.store.renew_session(actor.session).await.unwrap().outcome, RenewOutcome::Alive { lost: vec![] });
    env.dies(actor).await;
    until("the waiter has it", async || other.granted(&key("k"), waiting).await.is_some()).await;
}

pub async fn closing_session_hands_off_its_keys<S: Store>(env: &Environment<S>) {
    let (leaving, mut waiting) = (env.actor().await, env.actor().await);
    let (_, first) = leaving.takes(&key("k")).await;
    let token = waiting.queues(&key("k")).await;
    leaving.store.close_session(leaving.session).await.unwrap();
    let (pushed, fence) = waiting.pushed_grant().await;
    assert_eq!(pushed, token);
    assert!(fence > first.fence);
    assert_eq!(waiting.granted(&key("k"), token).await.unwrap().fence, fence);
}

pub async fn next_waiter_replaces_dead_holder<S: Store>(env: &Environment<S>) {
    let (dying, waiting, late) = (env.mortal(SHORT).await, env.actor().await, env.actor().await);
    let (_, first) = dying.takes(&key("k")).await;
    let token = waiting.queues(&key("k")).await;
    env.dies(dying).await;
    until("the waiter has it", async || waiting.granted(&key("k"), token).await.is_some()).await;
    assert!(waiting.granted(&key("k"), token).await.unwrap().fence > first.fence);
    late.queues(&key("k")).await;
}

pub async fn dead_holder_loses_all_its_keys<S: Store>(env: &Environment<S>) {
    let (dying, other) = (env.mortal(2 * SHORT).await, env.actor().await);
    let keys: Vec<_> = (0..50).map(|i| key(&format!("k{i}"))).collect();
    for key in &keys {
        dying.takes(key).await;
    }
    env.dies(dying).await;
    until("the first is free", async || !other.sees_held(&keys[0]).await).await;
    for key in &keys {
        other.takes(key).await;
    }
}

pub async fn one_release_skips_all_dead_waiters<S: Store>(env: &Environment<S>) {
    let (holder, dying, last) = (env.actor().await, env.mortal(SHORT).await, env.actor().await);
    let (token, _) = holder.takes(&key("k")).await;
    for _ in 0..50 {
        dying.queues(&key("k")).await;
    }
    let waiting = last.queues(&key("k")).await;
    env.dies(dying).await;
    // In a store where the end of a process takes a moment, it has ended when its places are gone.
    until("they are gone", async || last.sees(&key("k")).await.waiters.len() == 1).await;
    holder.releases(&key("k"), token).await;
    assert!(last.granted(&key("k"), waiting).await.is_some(), "one release is enough");
}

pub async fn fixed_hold_outlives_its_session<S: Store>(env: &Environment<S>) {
    let (actor, other) = (env.actor().await, env.actor().await);
    let request = AcquireRequest { lifetime: Lifetime::Fixed(Duration::from_secs(60)), ..actor.request(&key("k")) };
    let granted = actor.gets(&request).await;
    actor.store.close_session(actor.session).await.unwrap();
    let now = other.granted(&key("k"), request.token).await.unwrap();
    assert_eq!(now.fence, granted.fence);
    assert!(now.remaining.unwrap() <= granted.remaining.unwrap());
    let state = other.sees(&key("k")).await;
    assert!(!state.holders[0].session_bound);
    assert_eq!(state.holders[0].owner, "somebody", "who it was is still known");
    other.queues(&key("k")).await;
}

pub async fn fixed_waiter_ends_with_its_session<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.actor().await, env.actor().await);
    let (token, _) = holder.takes(&key("k")).await;
    let request = AcquireRequest { lifetime: Lifetime::Fixed(Duration::from_secs(60)), ..waiter.request(&key("k")) };
    waiter.waits(&request).await;
    waiter.store.close_session(waiter.session).await.unwrap();
    holder.releases(&key("k"), token).await;
    assert!(!holder.sees_held(&key("k")).await);
}

pub async fn fixed_grant_to_dead_waiter_blocks_nobody<S: Store>(env: &Environment<S>) {
    let (holder, dying, next) = (env.actor().await, env.mortal(SHORT).await, env.actor().await);
    let (token, _) = holder.takes(&key("k")).await;
    let request = AcquireRequest { lifetime: Lifetime::Fixed(Duration::from_secs(600)), ..dying.request(&key("k")) };
    dying.waits(&request).await;
    env.dies(dying).await;
    assert_eq!(holder.releases(&key("k"), token).await, EndOutcome::Released);
    let request = next.request(&key("k"));
    until("the next has it", async || match next.ask(&request).await {
        AcquireOutcome::Granted(_) => true,
        _ => next.granted(&key("k"), request.token).await.is_some(),
    })
    .await;
}

pub async fn polled_fixed_grant_outlives_its_session<S: Store>(env: &Environment<S>) {
    let (holder, dying, next) = (env.actor().await, env.mortal(SHORT).await, env.actor().await);
    let (token, _) = holder.takes(&key("k")).await;
    let request = AcquireRequest { lifetime: Lifetime::Fixed(Duration::from_secs(600)), ..dying.request(&key("k")) };
    dying.waits(&request).await;
    assert_eq!(holder.releases(&key("k"), token).await, EndOutcome::Released);
    let granted = dying.granted(&key("k"), request.token).await.unwrap();
    env.dies(dying).await;
    let asked = AcquireRequest { enqueue: false, ..next.request(&key("k")) };
    assert!(matches!(next.ask(&asked).await, AcquireOutcome::Busy { .. }));
    assert_eq!(next.granted(&key("k"), request.token).await.unwrap().fence, granted.fence);
}

pub async fn dead_holder_limits_nobody<S: Store>(env: &Environment<S>) {
    let (dying, next) = (env.mortal(SHORT).await, env.actor().await);
    let of = |units, capacity| Demand::new(units, capacity).unwrap();
    dying.gets(&AcquireRequest { demand: of(1, 2), ..dying.request(&key("k")) }).await;
    next.gets(&AcquireRequest { demand: of(1, 5), ..next.request(&key("k")) }).await;
    let waiting = AcquireRequest { demand: of(4, 5), ..next.request(&key("k")) };
    next.waits(&waiting).await;
    env.dies(dying).await;
    until("its limit is gone with it", async || next.granted(&key("k"), waiting.token).await.is_some()).await;
}

pub async fn many_dead_sessions_block_nobody<S: Store>(env: &Environment<S>) {
    let (dying, next) = (env.mortal(4 * SHORT).await, env.actor().await);
    dying.takes(&key("k")).await;
    for _ in 0..60 {
        let session = SessionId::random().unwrap();
        let request = OpenSession { session, ttl: 4 * SHORT, owner: "one of many".into() };
        assert_eq!(dying.store.open_session(request).await.unwrap().outcome, OpenOutcome::Opened);
        dying.waits(&AcquireRequest { session, ..dying.request(&key("k")) }).await;
    }
    env.dies(dying).await;
    let request = next.request(&key("k"));
    until("the next has it", async || match next.ask(&request).await {
        AcquireOutcome::Granted(_) => true,
        _ => next.granted(&key("k"), request.token).await.is_some(),
    })
    .await;
    assert!(next.sees(&key("k")).await.waiters.is_empty());
}

pub async fn sessions_of_one_process_are_independent<S: Store>(env: &Environment<S>) {
    let mut actors = Vec::new();
    for i in 0..10 {
        let actor = env.actor().await;
        actor.takes(&key(&format!("k{i}"))).await;
        actors.push(actor);
    }
    let first = actors.remove(0);
    first.store.close_session(first.session).await.unwrap();
    assert!(!actors[0].sees_held(&key("k0")).await);
    assert!(actors[0].sees_held(&key("k1")).await);
}

pub async fn other_clients_see_session_liveness<S: Store>(env: &Environment<S>) {
    let (closed, killed, other) = (env.actor().await, env.mortal(SHORT).await, env.actor().await);
    let lives = async |session| other.store.session_lives(session).await.unwrap().outcome;
    assert!(!lives(SessionId::random().unwrap()).await, "one that never was");
    assert!(lives(closed.session).await && lives(killed.session).await && lives(other.session).await);
    closed.store.close_session(closed.session).await.unwrap();
    assert!(!lives(closed.session).await);
    let session = killed.session;
    env.dies(killed).await;
    until("it is seen to be dead", async || !lives(session).await).await;
}

pub async fn querying_session_does_not_renew_it<S: Store>(env: &Environment<S>) {
    let (actor, other) = (env.mortal(SHORT).await, env.actor().await);
    for _ in 0..6 {
        env.pass(SHORT / 3).await;
        other.store.session_lives(actor.session).await.unwrap();
    }
    assert!(!other.store.session_lives(actor.session).await.unwrap().outcome);
    assert_eq!(actor.store.renew_session(actor.session).await.unwrap().outcome, RenewOutcome::Gone);
}
