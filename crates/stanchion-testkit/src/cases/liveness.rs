//! Expired sessions: which of their holds and places end, and which stay.

use std::time::Duration;

use stanchion::store::{
    AcquireOutcome, AcquireRequest, Demand, EndOutcome, ExtendOutcome, Lifetime, OpenOutcome, OpenSession, PollOutcome,
    RenewOutcome,
};
use stanchion::{SessionId, Store};

use crate::environment::{Environment, key, until};

/// Session ttl that even a busy machine can renew in time.
const SHORT: Duration = Duration::from_secs(2);
const MINUTE: Duration = Duration::from_secs(60);

pub async fn expired_session_cannot_reopen<S: Store>(env: &Environment<S>) {
    let client = env.client_with_ttl(SHORT).await;
    env.advance(SHORT + Duration::from_millis(10)).await;
    let again = OpenSession { session: client.session, ttl: MINUTE, owner: "again".into() };
    for _ in 0..2 {
        assert_eq!(client.store.open_session(again.clone()).await.unwrap().outcome, OpenOutcome::Gone);
    }
    assert_eq!(client.acquire(&client.request(&key("k"))).await, AcquireOutcome::SessionGone);
}

pub async fn renewal_keeps_only_its_own_session<S: Store>(env: &Environment<S>) {
    let life = 2 * SHORT;
    let (renewing, silent, other) =
        (env.client_with_ttl(life).await, env.client_with_ttl(life).await, env.client().await);
    let (kept, _) = renewing.lock(&key("kept")).await;
    silent.lock(&key("left")).await;
    for _ in 0..6 {
        env.advance(life / 4).await;
        assert_eq!(
            renewing.store.renew_session(renewing.session).await.unwrap().outcome,
            RenewOutcome::Alive { lost: vec![] }
        );
    }
    assert!(other.current_grant(&key("kept"), kept).await.is_some());
    assert!(!other.is_locked(&key("left")).await);
    assert_eq!(silent.store.renew_session(silent.session).await.unwrap().outcome, RenewOutcome::Gone);
}

pub async fn requests_do_not_renew_session<S: Store>(env: &Environment<S>) {
    let client = env.client_with_ttl(SHORT).await;
    let request = client.request(&key("k"));
    for _ in 0..4 {
        env.advance(SHORT / 3).await;
        client.acquire(&request).await;
        client.poll(&key("k"), request.token).await;
    }
    assert_eq!(client.poll(&key("k"), request.token).await, PollOutcome::Gone, "only a renewal extends the session");
}

pub async fn waiter_learns_session_deadline<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.client_with_ttl(SHORT).await, env.client().await);
    holder.lock(&key("k")).await;
    let request = waiter.request(&key("k"));
    let check_in = waiter.expect_queued(&request).await.check_in.expect("the holder's session has a deadline");
    assert!(check_in <= SHORT, "{check_in:?}");
    env.advance(check_in + Duration::from_millis(5)).await;
    // A networked store may grant later, by the time that a reply can take.
    until("the waiter has a grant", async || waiter.current_grant(&key("k"), request.token).await.is_some()).await;
}

pub async fn unknown_session_cannot_acquire<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let request = AcquireRequest { session: SessionId::random().unwrap(), ..client.request(&key("k")) };
    assert_eq!(client.acquire(&request).await, AcquireOutcome::SessionGone);
    assert!(!client.is_locked(&key("k")).await);
    client.lock(&key("k")).await;
    assert_eq!(client.acquire(&request).await, AcquireOutcome::SessionGone);
    assert!(client.inspect(&key("k")).await.waiters.is_empty());
}

pub async fn closing_unknown_session_changes_nothing<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let (token, _) = client.lock(&key("k")).await;
    client.store.close_session(SessionId::random().unwrap()).await.unwrap();
    assert!(client.current_grant(&key("k"), token).await.is_some());
}

pub async fn token_of_closed_session_changes_nothing<S: Store>(env: &Environment<S>) {
    let (dead, next) = (env.client().await, env.client().await);
    let request = AcquireRequest { lifetime: Lifetime::Session { max_hold: Some(MINUTE) }, ..dead.request(&key("k")) };
    dead.expect_grant(&request).await;
    dead.store.close_session(dead.session).await.unwrap();
    let (token, granted) = next.lock(&key("k")).await;
    assert_eq!(dead.poll(&key("k"), request.token).await, PollOutcome::Gone);
    assert_eq!(dead.acquire(&request).await, AcquireOutcome::SessionGone);
    let extended = dead.store.extend(&key("k"), request.token, MINUTE).await.unwrap().outcome;
    assert_eq!(extended, ExtendOutcome::NotHeld);
    assert_eq!(dead.release(&key("k"), request.token).await, EndOutcome::Nothing);
    assert_eq!(dead.store.abandon(&key("k"), request.token).await.unwrap().outcome, EndOutcome::Nothing);
    assert_eq!(next.current_grant(&key("k"), token).await, Some(granted));
}

pub async fn dead_head_lets_next_waiter_in<S: Store>(env: &Environment<S>) {
    let (holder, dying, next) = (env.client().await, env.client_with_ttl(SHORT).await, env.client().await);
    let permits = |units| Demand::new(units, 3).unwrap();
    let held = AcquireRequest { demand: permits(2), ..holder.request(&key("k")) };
    holder.expect_grant(&held).await;
    let big = AcquireRequest { demand: permits(3), ..dying.request(&key("k")) };
    dying.expect_queued(&big).await;
    let small = AcquireRequest { demand: permits(1), ..next.request(&key("k")) };
    next.expect_queued(&small).await;
    env.kill(dying).await;
    until("the next waiter has a grant", async || next.current_grant(&key("k"), small.token).await.is_some()).await;
    assert!(next.current_grant(&key("k"), held.token).await.is_some(), "the earlier holder keeps its permits");
}

pub async fn dead_reader_leaves_other_readers<S: Store>(env: &Environment<S>) {
    let (staying, dying, writer) = (env.client().await, env.client_with_ttl(SHORT).await, env.client().await);
    let read_of_staying = AcquireRequest { demand: Demand::READ, ..staying.request(&key("k")) };
    staying.expect_grant(&read_of_staying).await;
    let read_of_dying = AcquireRequest { demand: Demand::READ, ..dying.request(&key("k")) };
    dying.expect_grant(&read_of_dying).await;
    let writes = AcquireRequest { demand: Demand::WRITE, ..writer.request(&key("k")) };
    writer.expect_queued(&writes).await;
    env.kill(dying).await;
    until("one reader is left", async || writer.inspect(&key("k")).await.holders.len() == 1).await;
    staying.release(&key("k"), read_of_staying.token).await;
    assert!(writer.current_grant(&key("k"), writes.token).await.is_some());
}

pub async fn dead_session_leaves_no_cooldown<S: Store>(env: &Environment<S>) {
    let (dying, next) = (env.client_with_ttl(SHORT).await, env.client().await);
    dying.lock(&key("k")).await;
    env.kill(dying).await;
    until("the key is free", async || !next.is_locked(&key("k")).await).await;
    assert_eq!(next.inspect(&key("k")).await.closed_for, None);
    next.lock(&key("k")).await;
}

pub async fn closed_session_leaves_every_queue<S: Store>(env: &Environment<S>) {
    let (holder, leaving, next) = (env.client().await, env.client().await, env.client().await);
    let mut waiting = Vec::new();
    for name in ["a", "b", "c"] {
        let (token, _) = holder.lock(&key(name)).await;
        let left = leaving.enqueue(&key(name)).await;
        waiting.push((name, token, left, next.enqueue(&key(name)).await));
    }
    leaving.store.close_session(leaving.session).await.unwrap();
    for (name, token, left, behind) in waiting {
        assert_eq!(next.poll(&key(name), left).await, PollOutcome::Gone);
        assert!(matches!(next.poll(&key(name), behind).await, PollOutcome::Queued(queued) if queued.ahead == 0));
        holder.release(&key(name), token).await;
        assert!(next.current_grant(&key(name), behind).await.is_some());
    }
}

pub async fn token_controls_fixed_hold_after_death<S: Store>(env: &Environment<S>) {
    let (dying, other) = (env.client_with_ttl(SHORT).await, env.client().await);
    let request = AcquireRequest { lifetime: Lifetime::Fixed(MINUTE), ..dying.request(&key("k")) };
    let fence = dying.expect_grant(&request).await.fence;
    env.kill(dying).await;
    let extended = other.store.extend(&key("k"), request.token, MINUTE * 2).await.unwrap().outcome;
    assert_eq!(extended, ExtendOutcome::Extended);
    let granted = other.current_grant(&key("k"), request.token).await.unwrap();
    assert_eq!(granted.fence, fence);
    assert!(granted.remaining.unwrap() > MINUTE);
    assert_eq!(other.release(&key("k"), request.token).await, EndOutcome::Released);
}

pub async fn dead_session_leaves_its_fixed_permit<S: Store>(env: &Environment<S>) {
    let (dying, other) = (env.client_with_ttl(SHORT).await, env.client().await);
    let two = |request: AcquireRequest| AcquireRequest { demand: Demand::new(1, 2).unwrap(), ..request };
    let fixed = two(AcquireRequest { lifetime: Lifetime::Fixed(MINUTE), ..dying.request(&key("k")) });
    let bound = two(dying.request(&key("k")));
    let fence = dying.expect_grant(&fixed).await.fence;
    dying.expect_grant(&bound).await;
    env.kill(dying).await;
    other.expect_grant(&two(other.request(&key("k")))).await;
    let holders: Vec<_> = other.inspect(&key("k")).await.holders.iter().map(|hold| hold.fence).collect();
    assert!(holders.len() == 2 && holders.contains(&fence), "{holders:?} must have two fences, {fence:?} among them");
}

pub async fn dead_waiter_leaves_a_closed_key<S: Store>(env: &Environment<S>) {
    let (holder, dying, other) = (env.client().await, env.client_with_ttl(SHORT).await, env.client().await);
    let (token, _) = holder.lock(&key("k")).await;
    dying.expect_queued(&dying.request(&key("k"))).await;
    holder.store.release(&key("k"), token, Some(MINUTE)).await.unwrap();
    env.kill(dying).await;
    let of_three = Demand::new(1, 3).unwrap();
    let request = AcquireRequest { demand: of_three, enqueue: false, ..other.request(&key("k")) };
    until("the key is only closed", async || matches!(other.acquire(&request).await, AcquireOutcome::Busy { .. }))
        .await;
    let state = other.inspect(&key("k")).await;
    assert!(state.closed_for.is_some(), "the cooldown stays");
    assert_eq!((state.waiters.len(), state.capacity()), (0, None));
    other.expect_queued(&AcquireRequest { demand: of_three, ..other.request(&key("k")) }).await;
}
