//! Sessions: how they stay alive, and which holds and places end with them.

use std::time::Duration;

use stanchion::store::{
    AcquireOutcome, AcquireRequest, Demand, EndOutcome, Lifetime, OpenOutcome, OpenSession, PollOutcome, RenewOutcome,
};
use stanchion::{SessionId, Store};

use crate::Environment;
use crate::environment::{key, until};

const SHORT: Duration = Duration::from_secs(2);

pub async fn reopening_keeps_the_session<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let (token, granted) = client.lock(&key("k")).await;
    let request = OpenSession { session: client.session, ttl: Duration::from_secs(3_600), owner: "again".into() };
    assert_eq!(client.store.open_session(request).await.unwrap().outcome, OpenOutcome::Opened);
    assert_eq!(client.current_grant(&key("k"), token).await, Some(granted));
}

pub async fn renewing_unknown_session_answers_gone<S: Store>(env: &Environment<S>) {
    let store = env.open();
    let unknown = SessionId::random().unwrap();
    assert_eq!(store.renew_session(unknown).await.unwrap().outcome, RenewOutcome::Gone);
    assert_eq!(store.renew_session(unknown).await.unwrap().outcome, RenewOutcome::Gone, "a renewal creates no session");
}

pub async fn renewed_session_stays_alive<S: Store>(env: &Environment<S>) {
    let client = env.client_with_ttl(SHORT).await;
    let (token, _) = client.lock(&key("k")).await;
    for _ in 0..6 {
        env.advance(SHORT / 3).await;
        assert_eq!(
            client.store.renew_session(client.session).await.unwrap().outcome,
            RenewOutcome::Alive { lost: vec![] }
        );
    }
    assert!(client.current_grant(&key("k"), token).await.is_some());
}

pub async fn closed_session_cannot_reopen<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    client.store.close_session(client.session).await.unwrap();
    client.store.close_session(client.session).await.unwrap();
    assert_eq!(client.store.renew_session(client.session).await.unwrap().outcome, RenewOutcome::Gone);
    let request = OpenSession { session: client.session, ttl: SHORT, owner: String::new() };
    assert_eq!(client.store.open_session(request).await.unwrap().outcome, OpenOutcome::Gone);
    assert_eq!(client.acquire(&client.request(&key("k"))).await, AcquireOutcome::SessionGone);
    assert!(!client.is_locked(&key("k")).await);
}

pub async fn unrenewed_session_expires_for_good<S: Store>(env: &Environment<S>) {
    let client = env.client_with_ttl(SHORT).await;
    let other = env.client().await;
    let (token, _) = client.lock(&key("k")).await;
    env.advance(SHORT * 2).await;
    assert_eq!(client.store.renew_session(client.session).await.unwrap().outcome, RenewOutcome::Gone);
    assert_eq!(client.poll(&key("k"), token).await, PollOutcome::Gone);
    assert_eq!(client.acquire(&client.request(&key("k"))).await, AcquireOutcome::SessionGone);
    other.lock(&key("k")).await;
}

pub async fn session_lives_as_long_as_its_process<S: Store>(env: &Environment<S>) {
    let (client, other) = (env.client_with_ttl(SHORT).await, env.client().await);
    let (token, _) = client.lock(&key("k")).await;
    let waiting = other.enqueue(&key("k")).await;
    env.advance(SHORT * 2).await;
    assert!(client.current_grant(&key("k"), token).await.is_some(), "the session needs no renewal");
    assert_eq!(client.store.renew_session(client.session).await.unwrap().outcome, RenewOutcome::Alive { lost: vec![] });
    env.kill(client).await;
    until("the waiter has the key", async || other.current_grant(&key("k"), waiting).await.is_some()).await;
}

pub async fn closing_session_hands_off_its_keys<S: Store>(env: &Environment<S>) {
    let (leaving, mut waiting) = (env.client().await, env.client().await);
    let (_, first) = leaving.lock(&key("k")).await;
    let token = waiting.enqueue(&key("k")).await;
    leaving.store.close_session(leaving.session).await.unwrap();
    let (pushed, fence) = waiting.next_grant().await;
    assert_eq!(pushed, token);
    assert!(fence > first.fence);
    assert_eq!(waiting.current_grant(&key("k"), token).await.unwrap().fence, fence);
}

pub async fn next_waiter_replaces_dead_holder<S: Store>(env: &Environment<S>) {
    let (dying, waiting, late) = (env.client_with_ttl(SHORT).await, env.client().await, env.client().await);
    let (_, first) = dying.lock(&key("k")).await;
    let token = waiting.enqueue(&key("k")).await;
    env.kill(dying).await;
    until("the waiter has the key", async || waiting.current_grant(&key("k"), token).await.is_some()).await;
    assert!(waiting.current_grant(&key("k"), token).await.unwrap().fence > first.fence);
    late.enqueue(&key("k")).await;
}

pub async fn dead_holder_loses_all_its_keys<S: Store>(env: &Environment<S>) {
    let (dying, other) = (env.client_with_ttl(2 * SHORT).await, env.client().await);
    let keys: Vec<_> = (0..50).map(|i| key(&format!("k{i}"))).collect();
    for key in &keys {
        dying.lock(key).await;
    }
    env.kill(dying).await;
    until("the first key is free", async || !other.is_locked(&keys[0]).await).await;
    for key in &keys {
        other.lock(key).await;
    }
}

pub async fn one_release_skips_all_dead_waiters<S: Store>(env: &Environment<S>) {
    let (holder, dying, last) = (env.client().await, env.client_with_ttl(SHORT).await, env.client().await);
    let (token, _) = holder.lock(&key("k")).await;
    for _ in 0..50 {
        dying.enqueue(&key("k")).await;
    }
    let waiting = last.enqueue(&key("k")).await;
    env.kill(dying).await;
    // In some stores a process takes a moment to die, so wait until its places are gone.
    until("the dead waiters are gone", async || last.inspect(&key("k")).await.waiters.len() == 1).await;
    holder.release(&key("k"), token).await;
    assert!(last.current_grant(&key("k"), waiting).await.is_some(), "one release is enough");
}

pub async fn fixed_hold_outlives_its_session<S: Store>(env: &Environment<S>) {
    let (client, other) = (env.client().await, env.client().await);
    let request = AcquireRequest { lifetime: Lifetime::Fixed(Duration::from_secs(60)), ..client.request(&key("k")) };
    let granted = client.expect_grant(&request).await;
    client.store.close_session(client.session).await.unwrap();
    let now = other.current_grant(&key("k"), request.token).await.unwrap();
    assert_eq!(now.fence, granted.fence);
    assert!(now.remaining.unwrap() <= granted.remaining.unwrap());
    let state = other.inspect(&key("k")).await;
    assert!(!state.holders[0].session_bound);
    assert_eq!(state.holders[0].owner, "somebody", "the store still knows the owner");
    other.enqueue(&key("k")).await;
}

pub async fn fixed_waiter_ends_with_its_session<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.client().await, env.client().await);
    let (token, _) = holder.lock(&key("k")).await;
    let request = AcquireRequest { lifetime: Lifetime::Fixed(Duration::from_secs(60)), ..waiter.request(&key("k")) };
    waiter.expect_queued(&request).await;
    waiter.store.close_session(waiter.session).await.unwrap();
    holder.release(&key("k"), token).await;
    assert!(!holder.is_locked(&key("k")).await);
}

pub async fn fixed_grant_to_dead_waiter_blocks_nobody<S: Store>(env: &Environment<S>) {
    let (holder, dying, next) = (env.client().await, env.client_with_ttl(SHORT).await, env.client().await);
    let (token, _) = holder.lock(&key("k")).await;
    let request = AcquireRequest { lifetime: Lifetime::Fixed(Duration::from_secs(600)), ..dying.request(&key("k")) };
    dying.expect_queued(&request).await;
    env.kill(dying).await;
    assert_eq!(holder.release(&key("k"), token).await, EndOutcome::Released);
    let request = next.request(&key("k"));
    until("the next client has the key", async || match next.acquire(&request).await {
        AcquireOutcome::Granted(_) => true,
        _ => next.current_grant(&key("k"), request.token).await.is_some(),
    })
    .await;
}

pub async fn polled_fixed_grant_outlives_its_session<S: Store>(env: &Environment<S>) {
    let (holder, dying, next) = (env.client().await, env.client_with_ttl(SHORT).await, env.client().await);
    let (token, _) = holder.lock(&key("k")).await;
    let request = AcquireRequest { lifetime: Lifetime::Fixed(Duration::from_secs(600)), ..dying.request(&key("k")) };
    dying.expect_queued(&request).await;
    assert_eq!(holder.release(&key("k"), token).await, EndOutcome::Released);
    let granted = dying.current_grant(&key("k"), request.token).await.unwrap();
    env.kill(dying).await;
    let request_of_next = AcquireRequest { enqueue: false, ..next.request(&key("k")) };
    assert!(matches!(next.acquire(&request_of_next).await, AcquireOutcome::Busy { .. }));
    assert_eq!(next.current_grant(&key("k"), request.token).await.unwrap().fence, granted.fence);
}

pub async fn dead_holder_limits_nobody<S: Store>(env: &Environment<S>) {
    let (dying, next) = (env.client_with_ttl(SHORT).await, env.client().await);
    let of = |units, capacity| Demand::new(units, capacity).unwrap();
    dying.expect_grant(&AcquireRequest { demand: of(1, 2), ..dying.request(&key("k")) }).await;
    next.expect_grant(&AcquireRequest { demand: of(1, 5), ..next.request(&key("k")) }).await;
    let waiting = AcquireRequest { demand: of(4, 5), ..next.request(&key("k")) };
    next.expect_queued(&waiting).await;
    env.kill(dying).await;
    until("the dead holder's limit is gone", async || next.current_grant(&key("k"), waiting.token).await.is_some())
        .await;
}

pub async fn many_dead_sessions_block_nobody<S: Store>(env: &Environment<S>) {
    let (dying, next) = (env.client_with_ttl(4 * SHORT).await, env.client().await);
    dying.lock(&key("k")).await;
    for _ in 0..60 {
        let session = SessionId::random().unwrap();
        let request = OpenSession { session, ttl: 4 * SHORT, owner: "a crowd".into() };
        assert_eq!(dying.store.open_session(request).await.unwrap().outcome, OpenOutcome::Opened);
        dying.expect_queued(&AcquireRequest { session, ..dying.request(&key("k")) }).await;
    }
    env.kill(dying).await;
    let request = next.request(&key("k"));
    until("the next client has the key", async || match next.acquire(&request).await {
        AcquireOutcome::Granted(_) => true,
        _ => next.current_grant(&key("k"), request.token).await.is_some(),
    })
    .await;
    assert!(next.inspect(&key("k")).await.waiters.is_empty());
}

pub async fn sessions_of_one_process_are_independent<S: Store>(env: &Environment<S>) {
    let mut clients = Vec::new();
    for i in 0..10 {
        let client = env.client().await;
        client.lock(&key(&format!("k{i}"))).await;
        clients.push(client);
    }
    let first = clients.remove(0);
    first.store.close_session(first.session).await.unwrap();
    assert!(!clients[0].is_locked(&key("k0")).await);
    assert!(clients[0].is_locked(&key("k1")).await);
}

pub async fn other_clients_see_session_liveness<S: Store>(env: &Environment<S>) {
    let (closed, killed, other) = (env.client().await, env.client_with_ttl(SHORT).await, env.client().await);
    let lives = async |session| other.store.session_lives(session).await.unwrap().outcome;
    assert!(!lives(SessionId::random().unwrap()).await, "an unknown session is dead");
    assert!(lives(closed.session).await && lives(killed.session).await && lives(other.session).await);
    closed.store.close_session(closed.session).await.unwrap();
    assert!(!lives(closed.session).await);
    let session = killed.session;
    env.kill(killed).await;
    until("the killed session is reported as dead", async || !lives(session).await).await;
}

pub async fn querying_session_does_not_renew_it<S: Store>(env: &Environment<S>) {
    let (client, other) = (env.client_with_ttl(SHORT).await, env.client().await);
    for _ in 0..6 {
        env.advance(SHORT / 3).await;
        other.store.session_lives(client.session).await.unwrap();
    }
    assert!(!other.store.session_lives(client.session).await.unwrap().outcome);
    assert_eq!(client.store.renew_session(client.session).await.unwrap().outcome, RenewOutcome::Gone);
}
