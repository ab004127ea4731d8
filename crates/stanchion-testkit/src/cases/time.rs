//! Deadlines and cooldowns, and the times at which waiters are told to poll again.

use std::time::{Duration, Instant};

use stanchion::Store;
use stanchion::store::{AcquireOutcome, AcquireRequest, Demand, EndOutcome, ExtendOutcome, Lifetime, PollOutcome};

use crate::environment::{Client, Environment, key, until};

const SHORT: Duration = Duration::from_secs(2);
const BIT: Duration = Duration::from_millis(10);
const MINUTE: Duration = Duration::from_secs(60);

fn fixed<S: Store>(client: &Client<S>, ttl: Duration) -> AcquireRequest {
    AcquireRequest { lifetime: Lifetime::Fixed(ttl), ..client.request(&key("k")) }
}

fn permit<S: Store>(client: &Client<S>, lifetime: Lifetime) -> AcquireRequest {
    AcquireRequest { lifetime, demand: Demand::new(1, 2).unwrap(), ..client.request(&key("k")) }
}

pub async fn lifetimes_of_any_length_are_kept<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    // The longest duration that a call accepts. A store may reject a much longer one.
    for ttl in [Duration::from_millis(100), Duration::from_secs(1), MINUTE * 60, *stanchion::DURATION_RANGE.end()] {
        for lifetime in [Lifetime::Fixed(ttl), Lifetime::Session { max_hold: Some(ttl) }] {
            let request = AcquireRequest { lifetime, ..client.request(&key("k")) };
            let sent_at = Instant::now();
            let remaining = client.expect_grant(&request).await.remaining.unwrap();
            assert!(remaining <= ttl && remaining > ttl / 2, "{ttl:?}: {remaining:?}");
            // A lifetime of 100 ms may have ended if the machine stalled.
            assert!(client.is_locked(&key("k")).await || sent_at.elapsed() >= ttl, "{ttl:?}");
            client.release(&key("k"), request.token).await;
        }
    }
}

pub async fn max_hold_counts_from_the_grant<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.client().await, env.client().await);
    let (token, _) = holder.lock(&key("k")).await;
    let lifetime = Lifetime::Session { max_hold: Some(MINUTE) };
    let request = AcquireRequest { lifetime, ..waiter.request(&key("k")) };
    waiter.expect_queued(&request).await;
    env.advance(SHORT).await;
    holder.release(&key("k"), token).await;
    let remaining = waiter.current_grant(&key("k"), request.token).await.unwrap().remaining.unwrap();
    assert!(remaining > MINUTE - SHORT && remaining <= MINUTE, "{remaining:?}");
}

pub async fn max_hold_ends_with_its_session<S: Store>(env: &Environment<S>) {
    let (holder, other) = (env.client().await, env.client().await);
    let lifetime = Lifetime::Session { max_hold: Some(MINUTE) };
    let request = AcquireRequest { lifetime, ..holder.request(&key("k")) };
    holder.expect_grant(&request).await;
    assert!(other.inspect(&key("k")).await.holders[0].session_bound);
    let extended = holder.store.extend(&key("k"), request.token, MINUTE * 9).await.unwrap().outcome;
    assert_eq!(extended, ExtendOutcome::Extended, "a hold with max_hold can be extended");
    holder.store.close_session(holder.session).await.unwrap();
    other.lock(&key("k")).await;
}

pub async fn renewal_moves_no_deadline<S: Store>(env: &Environment<S>) {
    let (client, other) = (env.client().await, env.client().await);
    let lifetime = Lifetime::Session { max_hold: Some(SHORT) };
    let request = AcquireRequest { lifetime, ..client.request(&key("k")) };
    client.expect_grant(&request).await;
    for _ in 0..4 {
        env.advance(SHORT / 4 + BIT).await;
        client.store.renew_session(client.session).await.unwrap();
    }
    other.lock(&key("k")).await;
}

pub async fn waiter_learns_shortened_deadline<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.client().await, env.client().await);
    let held = fixed(&holder, MINUTE);
    holder.expect_grant(&held).await;
    let waiting = waiter.enqueue(&key("k")).await;
    let reported = async || match waiter.poll(&key("k"), waiting).await {
        PollOutcome::Queued(queued) => queued.check_in.expect("a deadline is reported"),
        other => panic!("{other:?}"),
    };
    assert!(reported().await <= MINUTE);
    holder.store.extend(&key("k"), held.token, SHORT).await.unwrap();
    let check_in = reported().await;
    assert!(check_in <= SHORT, "{check_in:?}");
    env.advance(check_in + BIT).await;
    assert!(waiter.current_grant(&key("k"), waiting).await.is_some());
}

pub async fn extended_hold_keeps_waiter_waiting<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.client().await, env.client().await);
    let held = fixed(&holder, SHORT * 4);
    holder.expect_grant(&held).await;
    let waiting = waiter.enqueue(&key("k")).await;
    holder.store.extend(&key("k"), held.token, MINUTE).await.unwrap();
    env.advance(SHORT * 4 + BIT).await;
    assert!(
        matches!(waiter.poll(&key("k"), waiting).await, PollOutcome::Queued(_)),
        "the old deadline no longer counts"
    );
    assert!(holder.current_grant(&key("k"), held.token).await.is_some());
}

pub async fn waiter_learns_earliest_deadline<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let (long, short) = (permit(&client, Lifetime::Fixed(MINUTE)), permit(&client, Lifetime::Fixed(SHORT)));
    client.expect_grant(&long).await;
    client.expect_grant(&short).await;
    let waiting = permit(&client, Lifetime::Session { max_hold: None });
    let check_in = client.expect_queued(&waiting).await.check_in.expect("a deadline is reported");
    assert!(check_in <= SHORT, "{check_in:?}");
    env.advance(check_in + BIT).await;
    assert!(client.current_grant(&key("k"), waiting.token).await.is_some());
    assert!(client.current_grant(&key("k"), long.token).await.is_some(), "the longer hold stays");
}

pub async fn extend_moves_only_its_own_permit<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let (one, two) = (permit(&client, Lifetime::Fixed(SHORT)), permit(&client, Lifetime::Fixed(SHORT)));
    client.expect_grant(&one).await;
    client.expect_grant(&two).await;
    let extended = client.store.extend(&key("k"), one.token, MINUTE).await.unwrap().outcome;
    assert_eq!(extended, ExtendOutcome::Extended);
    env.advance(SHORT + BIT).await;
    assert!(client.current_grant(&key("k"), one.token).await.is_some());
    assert_eq!(client.poll(&key("k"), two.token).await, PollOutcome::Gone);
}

pub async fn extend_ignores_a_waiter<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.client().await, env.client().await);
    let (token, _) = holder.lock(&key("k")).await;
    let request = fixed(&waiter, MINUTE);
    waiter.expect_queued(&request).await;
    let extended = waiter.store.extend(&key("k"), request.token, MINUTE * 9).await.unwrap().outcome;
    assert_eq!(extended, ExtendOutcome::NotHeld);
    holder.release(&key("k"), token).await;
    assert!(waiter.current_grant(&key("k"), request.token).await.unwrap().remaining.unwrap() <= MINUTE);
}

pub async fn expiry_serves_fitting_waiters<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let all = AcquireRequest { demand: Demand::new(3, 3).unwrap(), ..fixed(&client, SHORT) };
    client.expect_grant(&all).await;
    let mut waiting = Vec::new();
    for _ in 0..4 {
        let request = AcquireRequest { demand: Demand::new(1, 3).unwrap(), ..client.request(&key("k")) };
        client.expect_queued(&request).await;
        waiting.push(request.token);
    }
    env.advance(SHORT + BIT).await;
    let state = client.inspect(&key("k")).await;
    assert_eq!(
        (state.holders.len(), state.waiters.len()),
        (3, 1),
        "the first operation after the deadline grants the waiters"
    );
    assert!(client.current_grant(&key("k"), waiting[2]).await.is_some());
    assert_eq!(client.current_grant(&key("k"), waiting[3]).await, None);
}

pub async fn expired_hold_starts_no_cooldown<S: Store>(env: &Environment<S>) {
    let (client, other) = (env.client().await, env.client().await);
    let request = fixed(&client, SHORT);
    client.expect_grant(&request).await;
    env.advance(SHORT + BIT).await;
    let late = client.store.release(&key("k"), request.token, Some(MINUTE)).await.unwrap().outcome;
    assert_eq!(late, EndOutcome::Nothing);
    assert_eq!(other.inspect(&key("k")).await.closed_for, None, "a late release starts no cooldown");
    other.lock(&key("k")).await;
}

pub async fn abandon_starts_no_cooldown<S: Store>(env: &Environment<S>) {
    let (client, other) = (env.client().await, env.client().await);
    let (token, _) = client.lock(&key("k")).await;
    assert_eq!(client.store.abandon(&key("k"), token).await.unwrap().outcome, EndOutcome::Released);
    assert_eq!(other.inspect(&key("k")).await.closed_for, None);
    other.lock(&key("k")).await;
}

pub async fn permit_cooldown_leaves_other_permits<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let session = Lifetime::Session { max_hold: None };
    let (one, two, three) = (permit(&client, session), permit(&client, session), permit(&client, session));
    let granted = client.expect_grant(&one).await;
    client.expect_grant(&two).await;
    client.store.release(&key("k"), two.token, Some(SHORT)).await.unwrap();
    let rejected = AcquireRequest { enqueue: false, ..three.clone() };
    assert!(
        matches!(client.acquire(&rejected).await, AcquireOutcome::Busy { .. }),
        "the key is closed although permits are free"
    );
    client.expect_queued(&three).await;
    assert_eq!(client.expect_grant(&one).await, granted, "a repeated acquire of a holder returns its grant");
    let check_in = client.expect_queued(&three).await.check_in.expect("the cooldown has an end");
    env.advance(check_in + BIT).await;
    assert!(client.current_grant(&key("k"), three.token).await.is_some());
    assert!(client.current_grant(&key("k"), one.token).await.is_some());
}

pub async fn shorter_cooldown_never_opens_sooner<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let session = Lifetime::Session { max_hold: None };
    let (one, two) = (permit(&client, session), permit(&client, session));
    client.expect_grant(&one).await;
    client.expect_grant(&two).await;
    client.store.release(&key("k"), one.token, Some(MINUTE)).await.unwrap();
    client.store.release(&key("k"), two.token, Some(SHORT)).await.unwrap();
    assert!(client.inspect(&key("k")).await.closed_for.unwrap() > SHORT);
    client.expect_queued(&permit(&client, session)).await;
}

pub async fn zero_cooldown_closes_nothing<S: Store>(env: &Environment<S>) {
    let (client, other) = (env.client().await, env.client().await);
    let (token, _) = client.lock(&key("k")).await;
    let waiting = other.enqueue(&key("k")).await;
    let released = client.store.release(&key("k"), token, Some(Duration::ZERO)).await.unwrap().outcome;
    assert_eq!(released, EndOutcome::Released);
    until("the waiter has the key", async || other.current_grant(&key("k"), waiting).await.is_some()).await;
}

pub async fn closed_key_keeps_waiters_in_order<S: Store>(env: &Environment<S>) {
    let (holder, first, second) = (env.client().await, env.client().await, env.client().await);
    let (token, _) = holder.lock(&key("k")).await;
    holder.store.release(&key("k"), token, Some(SHORT)).await.unwrap();
    // Both requests arrive while the key is closed and has no holder.
    let (a, b) = (first.enqueue(&key("k")).await, second.enqueue(&key("k")).await);
    let other = AcquireRequest { demand: Demand::READ, ..second.request(&key("k")) };
    assert_eq!(second.expect_queued(&other).await.ahead, 2, "a reader is queued, too");
    env.advance(SHORT + BIT).await;
    assert!(first.current_grant(&key("k"), a).await.is_some());
    assert!(matches!(second.poll(&key("k"), b).await, PollOutcome::Queued(queued) if queued.ahead == 0));
}
