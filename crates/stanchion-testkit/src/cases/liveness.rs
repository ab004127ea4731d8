//! What the death of a session leaves, and what it does not.

use std::time::Duration;

use stanchion::store::{
    AcquireOutcome, AcquireRequest, Demand, EndOutcome, ExtendOutcome, Lifetime, OpenOutcome, OpenSession, PollOutcome,
    RenewOutcome,
};
use stanchion::{SessionId, Store};

use crate::environment::{Environment, key, until};

/// A session of which the store is told within this time is alive, also on a busy machine.
const SHORT: Duration = Duration::from_secs(2);
const MINUTE: Duration = Duration::from_secs(60);

pub async fn expired_session_cannot_reopen<S: Store>(env: &Environment<S>) {
    let actor = env.mortal(SHORT).await;
    env.pass(SHORT + Duration::from_millis(10)).await;
    let again = OpenSession { session: actor.session, ttl: MINUTE, owner: "again".into() };
    for _ in 0..2 {
        assert_eq!(actor.store.open_session(again.clone()).await.unwrap().outcome, OpenOutcome::Gone);
    }
    assert_eq!(actor.ask(&actor.request(&key("k"))).await, AcquireOutcome::SessionGone);
}

pub async fn renewal_keeps_only_its_own_session<S: Store>(env: &Environment<S>) {
    let life = 2 * SHORT;
    let (beating, silent, other) = (env.mortal(life).await, env.mortal(life).await, env.actor().await);
    let (kept, _) = beating.takes(&key("kept")).await;
    silent.takes(&key("left")).await;
    for _ in 0..6 {
        env.pass(life / 4).await;
        assert_eq!(
            beating.store.renew_session(beating.session).await.unwrap().outcome,
            RenewOutcome::Alive { lost: vec![] }
        );
    }
    assert!(other.granted(&key("kept"), kept).await.is_some());
    assert!(!other.sees_held(&key("left")).await);
    assert_eq!(silent.store.renew_session(silent.session).await.unwrap().outcome, RenewOutcome::Gone);
}

pub async fn requests_do_not_renew_session<S: Store>(env: &Environment<S>) {
    let actor = env.mortal(SHORT).await;
    let request = actor.request(&key("k"));
    for _ in 0..4 {
        env.pass(SHORT / 3).await;
        actor.ask(&request).await;
        actor.polls(&key("k"), request.token).await;
    }
    assert_eq!(actor.polls(&key("k"), request.token).await, PollOutcome::Gone, "only a beat renews");
}

pub async fn waiter_learns_session_deadline<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.mortal(SHORT).await, env.actor().await);
    holder.takes(&key("k")).await;
    let request = waiter.request(&key("k"));
    let check_in = waiter.waits(&request).await.check_in.expect("time will free it");
    assert!(check_in <= SHORT, "{check_in:?}");
    env.pass(check_in + Duration::from_millis(5)).await;
    // A store between machines is late by as much as an answer may take.
    until("granted", async || waiter.granted(&key("k"), request.token).await.is_some()).await;
}

pub async fn unknown_session_cannot_acquire<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let request = AcquireRequest { session: SessionId::random().unwrap(), ..actor.request(&key("k")) };
    assert_eq!(actor.ask(&request).await, AcquireOutcome::SessionGone);
    assert!(!actor.sees_held(&key("k")).await);
    actor.takes(&key("k")).await;
    assert_eq!(actor.ask(&request).await, AcquireOutcome::SessionGone);
    assert!(actor.sees(&key("k")).await.waiters.is_empty());
}

pub async fn closing_unknown_session_changes_nothing<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let (token, _) = actor.takes(&key("k")).await;
    actor.store.close_session(SessionId::random().unwrap()).await.unwrap();
    assert!(actor.granted(&key("k"), token).await.is_some());
}

pub async fn token_of_closed_session_changes_nothing<S: Store>(env: &Environment<S>) {
    let (dead, next) = (env.actor().await, env.actor().await);
    let request = AcquireRequest { lifetime: Lifetime::Session { max_hold: Some(MINUTE) }, ..dead.request(&key("k")) };
    dead.gets(&request).await;
    dead.store.close_session(dead.session).await.unwrap();
    let (token, granted) = next.takes(&key("k")).await;
    assert_eq!(dead.polls(&key("k"), request.token).await, PollOutcome::Gone);
    assert_eq!(dead.ask(&request).await, AcquireOutcome::SessionGone);
    let extended = dead.store.extend(&key("k"), request.token, MINUTE).await.unwrap().outcome;
    assert_eq!(extended, ExtendOutcome::NotHeld);
    assert_eq!(dead.releases(&key("k"), request.token).await, EndOutcome::Nothing);
    assert_eq!(dead.store.abandon(&key("k"), request.token).await.unwrap().outcome, EndOutcome::Nothing);
    assert_eq!(next.granted(&key("k"), token).await, Some(granted));
}

pub async fn dead_head_lets_next_waiter_in<S: Store>(env: &Environment<S>) {
    let (holder, dying, next) = (env.actor().await, env.mortal(SHORT).await, env.actor().await);
    let permits = |units| Demand::new(units, 3).unwrap();
    let held = AcquireRequest { demand: permits(2), ..holder.request(&key("k")) };
    holder.gets(&held).await;
    let big = AcquireRequest { demand: permits(3), ..dying.request(&key("k")) };
    dying.waits(&big).await;
    let small = AcquireRequest { demand: permits(1), ..next.request(&key("k")) };
    next.waits(&small).await;
    env.dies(dying).await;
    until("the next is in", async || next.granted(&key("k"), small.token).await.is_some()).await;
    assert!(next.granted(&key("k"), held.token).await.is_some(), "beside the one that was there");
}

pub async fn dead_reader_leaves_other_readers<S: Store>(env: &Environment<S>) {
    let (staying, dying, writer) = (env.actor().await, env.mortal(SHORT).await, env.actor().await);
    let stays = AcquireRequest { demand: Demand::READ, ..staying.request(&key("k")) };
    staying.gets(&stays).await;
    let dies = AcquireRequest { demand: Demand::READ, ..dying.request(&key("k")) };
    dying.gets(&dies).await;
    let writes = AcquireRequest { demand: Demand::WRITE, ..writer.request(&key("k")) };
    writer.waits(&writes).await;
    env.dies(dying).await;
    until("one reader is left", async || writer.sees(&key("k")).await.holders.len() == 1).await;
    staying.releases(&key("k"), stays.token).await;
    assert!(writer.granted(&key("k"), writes.token).await.is_some());
}

pub async fn dead_session_leaves_no_cooldown<S: Store>(env: &Environment<S>) {
    let (dying, next) = (env.mortal(SHORT).await, env.actor().await);
    dying.takes(&key("k")).await;
    env.dies(dying).await;
    until("free", async || !next.sees_held(&key("k")).await).await;
    assert_eq!(next.sees(&key("k")).await.closed_for, None);
    next.takes(&key("k")).await;
}

pub async fn closed_session_leaves_every_queue<S: Store>(env: &Environment<S>) {
    let (holder, leaving, next) = (env.actor().await, env.actor().await, env.actor().await);
    let mut waiting = Vec::new();
    for name in ["a", "b", "c"] {
        let (token, _) = holder.takes(&key(name)).await;
        let left = leaving.queues(&key(name)).await;
        waiting.push((name, token, left, next.queues(&key(name)).await));
    }
    leaving.store.close_session(leaving.session).await.unwrap();
    for (name, token, left, behind) in waiting {
        assert_eq!(next.polls(&key(name), left).await, PollOutcome::Gone);
        assert!(matches!(next.polls(&key(name), behind).await, PollOutcome::Queued(queued) if queued.ahead == 0));
        holder.releases(&key(name), token).await;
        assert!(next.granted(&key(name), behind).await.is_some());
    }
}

pub async fn token_controls_fixed_hold_after_death<S: Store>(env: &Environment<S>) {
    let (dying, other) = (env.mortal(SHORT).await, env.actor().await);
    let request = AcquireRequest { lifetime: Lifetime::Fixed(MINUTE), ..dying.request(&key("k")) };
    let fence = dying.gets(&request).await.fence;
    env.dies(dying).await;
    let extended = other.store.extend(&key("k"), request.token, MINUTE * 2).await.unwrap().outcome;
    assert_eq!(extended, ExtendOutcome::Extended);
    let granted = other.granted(&key("k"), request.token).await.unwrap();
    assert_eq!(granted.fence, fence);
    assert!(granted.remaining.unwrap() > MINUTE);
    assert_eq!(other.releases(&key("k"), request.token).await, EndOutcome::Released);
}

pub async fn dead_session_leaves_its_fixed_permit<S: Store>(env: &Environment<S>) {
    let (dying, other) = (env.mortal(SHORT).await, env.actor().await);
    let two = |request: AcquireRequest| AcquireRequest { demand: Demand::new(1, 2).unwrap(), ..request };
    let fixed = two(AcquireRequest { lifetime: Lifetime::Fixed(MINUTE), ..dying.request(&key("k")) });
    let bound = two(dying.request(&key("k")));
    let fence = dying.gets(&fixed).await.fence;
    dying.gets(&bound).await;
    env.dies(dying).await;
    other.gets(&two(other.request(&key("k")))).await;
    let holders: Vec<_> = other.sees(&key("k")).await.holders.iter().map(|hold| hold.fence).collect();
    assert!(holders.len() == 2 && holders.contains(&fence), "{holders:?}, the fixed one is {fence:?}");
}

pub async fn dead_waiter_leaves_a_closed_key<S: Store>(env: &Environment<S>) {
    let (holder, dying, other) = (env.actor().await, env.mortal(SHORT).await, env.actor().await);
    let (token, _) = holder.takes(&key("k")).await;
    dying.waits(&dying.request(&key("k"))).await;
    holder.store.release(&key("k"), token, Some(MINUTE)).await.unwrap();
    env.dies(dying).await;
    let of_three = Demand::new(1, 3).unwrap();
    let request = AcquireRequest { demand: of_three, enqueue: false, ..other.request(&key("k")) };
    until("busy with a cooldown", async || matches!(other.ask(&request).await, AcquireOutcome::Busy { .. })).await;
    let state = other.sees(&key("k")).await;
    assert!(state.closed_for.is_some(), "the cooldown stays");
    assert_eq!((state.waiters.len(), state.capacity()), (0, None));
    other.waits(&AcquireRequest { demand: of_three, ..other.request(&key("k")) }).await;
}
