//! Deadlines, cooldowns, and what is said about them beforehand.

use std::time::{Duration, Instant};

use stanchion::Store;
use stanchion::store::{AcquireOutcome, AcquireRequest, Demand, EndOutcome, ExtendOutcome, Lifetime, PollOutcome};

use crate::environment::{Actor, Environment, key, until};

const SHORT: Duration = Duration::from_secs(2);
const BIT: Duration = Duration::from_millis(10);
const MINUTE: Duration = Duration::from_secs(60);

fn fixed<S: Store>(actor: &Actor<S>, ttl: Duration) -> AcquireRequest {
    AcquireRequest { lifetime: Lifetime::Fixed(ttl), ..actor.request(&key("k")) }
}

fn permit<S: Store>(actor: &Actor<S>, lifetime: Lifetime) -> AcquireRequest {
    AcquireRequest { lifetime, demand: Demand::new(1, 2).unwrap(), ..actor.request(&key("k")) }
}

pub async fn lifetimes_of_any_length_are_kept<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    // The longest that a call takes: a store may refuse what is much longer.
    for ttl in [Duration::from_millis(100), Duration::from_secs(1), MINUTE * 60, *stanchion::DURATION_RANGE.end()] {
        for lifetime in [Lifetime::Fixed(ttl), Lifetime::Session { max_hold: Some(ttl) }] {
            let request = AcquireRequest { lifetime, ..actor.request(&key("k")) };
            let asked = Instant::now();
            let remaining = actor.gets(&request).await.remaining.unwrap();
            assert!(remaining <= ttl && remaining > ttl / 2, "{ttl:?}: {remaining:?}");
            // A lifetime of 100 ms may have ended on a machine that stood still.
            assert!(actor.sees_held(&key("k")).await || asked.elapsed() >= ttl, "{ttl:?}");
            actor.releases(&key("k"), request.token).await;
        }
    }
}

pub async fn max_hold_counts_from_the_grant<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.actor().await, env.actor().await);
    let (token, _) = holder.takes(&key("k")).await;
    let lifetime = Lifetime::Session { max_hold: Some(MINUTE) };
    let request = AcquireRequest { lifetime, ..waiter.request(&key("k")) };
    waiter.waits(&request).await;
    env.pass(SHORT).await;
    holder.releases(&key("k"), token).await;
    let remaining = waiter.granted(&key("k"), request.token).await.unwrap().remaining.unwrap();
    assert!(remaining > MINUTE - SHORT && remaining <= MINUTE, "{remaining:?}");
}

pub async fn max_hold_ends_with_its_session<S: Store>(env: &Environment<S>) {
    let (holder, other) = (env.actor().await, env.actor().await);
    let lifetime = Lifetime::Session { max_hold: Some(MINUTE) };
    let request = AcquireRequest { lifetime, ..holder.request(&key("k")) };
    holder.gets(&request).await;
    assert!(other.sees(&key("k")).await.holders[0].session_bound);
    let extended = holder.store.extend(&key("k"), request.token, MINUTE * 9).await.unwrap().outcome;
    assert_eq!(extended, ExtendOutcome::Extended, "it has a deadline");
    holder.store.close_session(holder.session).await.unwrap();
    other.takes(&key("k")).await;
}

pub async fn renewal_moves_no_deadline<S: Store>(env: &Environment<S>) {
    let (actor, other) = (env.actor().await, env.actor().await);
    let lifetime = Lifetime::Session { max_hold: Some(SHORT) };
    let request = AcquireRequest { lifetime, ..actor.request(&key("k")) };
    actor.gets(&request).await;
    for _ in 0..4 {
        env.pass(SHORT / 4 + BIT).await;
        actor.store.renew_session(actor.session).await.unwrap();
    }
    other.takes(&key("k")).await;
}

pub async fn waiter_learns_shortened_deadline<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.actor().await, env.actor().await);
    let held = fixed(&holder, MINUTE);
    holder.gets(&held).await;
    let waiting = waiter.queues(&key("k")).await;
    let told = async || match waiter.polls(&key("k"), waiting).await {
        PollOutcome::Queued(queued) => queued.check_in.expect("a deadline is known"),
        other => panic!("{other:?}"),
    };
    assert!(told().await <= MINUTE);
    holder.store.extend(&key("k"), held.token, SHORT).await.unwrap();
    let check_in = told().await;
    assert!(check_in <= SHORT, "{check_in:?}");
    env.pass(check_in + BIT).await;
    assert!(waiter.granted(&key("k"), waiting).await.is_some());
}

pub async fn extended_hold_keeps_waiter_waiting<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.actor().await, env.actor().await);
    let held = fixed(&holder, SHORT * 4);
    holder.gets(&held).await;
    let waiting = waiter.queues(&key("k")).await;
    holder.store.extend(&key("k"), held.token, MINUTE).await.unwrap();
    env.pass(SHORT * 4 + BIT).await;
    assert!(matches!(waiter.polls(&key("k"), waiting).await, PollOutcome::Queued(_)), "the old deadline is void");
    assert!(holder.granted(&key("k"), held.token).await.is_some());
}

pub async fn waiter_learns_earliest_deadline<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let (long, short) = (permit(&actor, Lifetime::Fixed(MINUTE)), permit(&actor, Lifetime::Fixed(SHORT)));
    actor.gets(&long).await;
    actor.gets(&short).await;
    let waiting = permit(&actor, Lifetime::Session { max_hold: None });
    let check_in = actor.waits(&waiting).await.check_in.expect("a deadline is known");
    assert!(check_in <= SHORT, "{check_in:?}");
    env.pass(check_in + BIT).await;
    assert!(actor.granted(&key("k"), waiting.token).await.is_some());
    assert!(actor.granted(&key("k"), long.token).await.is_some(), "only what ended is over");
}

pub async fn extend_moves_only_its_own_permit<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let (one, two) = (permit(&actor, Lifetime::Fixed(SHORT)), permit(&actor, Lifetime::Fixed(SHORT)));
    actor.gets(&one).await;
    actor.gets(&two).await;
    let extended = actor.store.extend(&key("k"), one.token, MINUTE).await.unwrap().outcome;
    assert_eq!(extended, ExtendOutcome::Extended);
    env.pass(SHORT + BIT).await;
    assert!(actor.granted(&key("k"), one.token).await.is_some());
    assert_eq!(actor.polls(&key("k"), two.token).await, PollOutcome::Gone);
}

pub async fn extend_ignores_a_waiter<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.actor().await, env.actor().await);
    let (token, _) = holder.takes(&key("k")).await;
    let request = fixed(&waiter, MINUTE);
    waiter.waits(&request).await;
    let extended = waiter.store.extend(&key("k"), request.token, MINUTE * 9).await.unwrap().outcome;
    assert_eq!(extended, ExtendOutcome::NotHeld);
    holder.releases(&key("k"), token).await;
    assert!(waiter.granted(&key("k"), request.token).await.unwrap().remaining.unwrap() <= MINUTE);
}

pub async fn expiry_serves_fitting_waiters<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let all = AcquireRequest { demand: Demand::new(3, 3).unwrap(), ..fixed(&actor, SHORT) };
    actor.gets(&all).await;
    let mut waiting = Vec::new();
    for _ in 0..4 {
        let request = AcquireRequest { demand: Demand::new(1, 3).unwrap(), ..actor.request(&key("k")) };
        actor.waits(&request).await;
        waiting.push(request.token);
    }
    env.pass(SHORT + BIT).await;
    let state = actor.sees(&key("k")).await;
    assert_eq!((state.holders.len(), state.waiters.len()), (3, 1), "in the first step that looks");
    assert!(actor.granted(&key("k"), waiting[2]).await.is_some());
    assert_eq!(actor.granted(&key("k"), waiting[3]).await, None);
}

pub async fn expired_hold_starts_no_cooldown<S: Store>(env: &Environment<S>) {
    let (actor, other) = (env.actor().await, env.actor().await);
    let request = fixed(&actor, SHORT);
    actor.gets(&request).await;
    env.pass(SHORT + BIT).await;
    let late = actor.store.release(&key("k"), request.token, Some(MINUTE)).await.unwrap().outcome;
    assert_eq!(late, EndOutcome::Nothing);
    assert_eq!(other.sees(&key("k")).await.closed_for, None, "who comes too late closes nothing");
    other.takes(&key("k")).await;
}

pub async fn abandon_starts_no_cooldown<S: Store>(env: &Environment<S>) {
    let (actor, other) = (env.actor().await, env.actor().await);
    let (token, _) = actor.takes(&key("k")).await;
    assert_eq!(actor.store.abandon(&key("k"), token).await.unwrap().outcome, EndOutcome::Released);
    assert_eq!(other.sees(&key("k")).await.closed_for, None);
    other.takes(&key("k")).await;
}

pub async fn permit_cooldown_leaves_other_permits<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let session = Lifetime::Session { max_hold: None };
    let (one, two, three) = (permit(&actor, session), permit(&actor, session), permit(&actor, session));
    let granted = actor.gets(&one).await;
    actor.gets(&two).await;
    actor.store.release(&key("k"), two.token, Some(SHORT)).await.unwrap();
    let refused = AcquireRequest { enqueue: false, ..three.clone() };
    assert!(matches!(actor.ask(&refused).await, AcquireOutcome::Busy { .. }), "closed, though there is room");
    actor.waits(&three).await;
    assert_eq!(actor.gets(&one).await, granted, "a holder that asks again is answered");
    let check_in = actor.waits(&three).await.check_in.expect("the end of a cooldown is known");
    env.pass(check_in + BIT).await;
    assert!(actor.granted(&key("k"), three.token).await.is_some());
    assert!(actor.granted(&key("k"), one.token).await.is_some());
}

pub async fn shorter_cooldown_never_opens_sooner<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let session = Lifetime::Session { max_hold: None };
    let (one, two) = (permit(&actor, session), permit(&actor, session));
    actor.gets(&one).await;
    actor.gets(&two).await;
    actor.store.release(&key("k"), one.token, Some(MINUTE)).await.unwrap();
    actor.store.release(&key("k"), two.token, Some(SHORT)).await.unwrap();
    assert!(actor.sees(&key("k")).await.closed_for.unwrap() > SHORT);
    actor.waits(&permit(&actor, session)).await;
}

pub async fn zero_cooldown_closes_nothing<S: Store>(env: &Environment<S>) {
    let (actor, other) = (env.actor().await, env.actor().await);
    let (token, _) = actor.takes(&key("k")).await;
    let waiting = other.queues(&key("k")).await;
    let released = actor.store.release(&key("k"), token, Some(Duration::ZERO)).await.unwrap().outcome;
    assert_eq!(released, EndOutcome::Released);
    until("it is handed on", async || other.granted(&key("k"), waiting).await.is_some()).await;
}

pub async fn closed_key_keeps_waiters_in_order<S: Store>(env: &Environment<S>) {
    let (holder, first, second) = (env.actor().await, env.actor().await, env.actor().await);
    let (token, _) = holder.takes(&key("k")).await;
    holder.store.release(&key("k"), token, Some(SHORT)).await.unwrap();
    // Both come while it is closed and free.
    let (a, b) = (first.queues(&key("k")).await, second.queues(&key("k")).await);
    let other = AcquireRequest { demand: Demand::READ, ..second.request(&key("k")) };
    assert_eq!(second.waits(&other).await.ahead, 2, "a reader waits its turn too");
    env.pass(SHORT + BIT).await;
    assert!(first.granted(&key("k"), a).await.is_some());
    assert!(matches!(second.polls(&key("k"), b).await, PollOutcome::Queued(queued) if queued.ahead == 0));
}
