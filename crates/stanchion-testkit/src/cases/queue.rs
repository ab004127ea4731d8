//! The queue: order, hand-off, demands, cooldowns.

use std::time::Duration;

use stanchion::Store;
use stanchion::store::{AcquireOutcome, AcquireRequest, Demand, EndOutcome, Lifetime, MAX_WAITERS, PollOutcome, Push};

use crate::environment::{Actor, Environment, key, until};

const SHORT: Duration = Duration::from_secs(2);

fn demanding<S: Store>(actor: &Actor<S>, demand: Demand) -> AcquireRequest {
    AcquireRequest { demand, ..actor.request(&key("k")) }
}

pub async fn release_grants_and_notifies_only_the_head<S: Store>(env: &Environment<S>) {
    let (holder, mut first, mut second) = (env.actor().await, env.actor().await, env.actor().await);
    let (token, granted) = holder.takes(&key("k")).await;
    let a = first.queues(&key("k")).await;
    let b = second.queues(&key("k")).await;
    holder.releases(&key("k"), token).await;
    let state = holder.sees(&key("k")).await;
    assert_eq!((state.holders.len(), state.waiters.len()), (1, 1), "granted in the same step");
    let (pushed, fence) = first.pushed_grant().await;
    assert_eq!(pushed, a);
    assert!(fence > granted.fence);
    assert_eq!(state.holders[0].fence, fence);
    assert_eq!(first.releases(&key("k"), a).await, EndOutcome::Released);
    assert_eq!(second.pushed_grant().await.0, b, "its first grant is its own");
}

pub async fn waiters_are_served_in_order<S: Store>(env: &Environment<S>) {
    let mut actors = Vec::new();
    for _ in 0..4 {
        actors.push(env.actor().await);
    }
    let (mut token, mut granted) = actors[0].takes(&key("k")).await;
    let mut queue = Vec::new();
    for i in 0..64 {
        let request = actors[i % 4].request(&key("k"));
        assert_eq!(actors[i % 4].waits(&request).await.ahead, i as u32);
        queue.push((i % 4, request.token));
    }
    let mut holder = 0;
    for (who, waiting) in queue {
        actors[holder].releases(&key("k"), token).await;
        let next = actors[who].granted(&key("k"), waiting).await.expect("the one who asked first");
        assert!(next.fence > granted.fence);
        (holder, token, granted) = (who, waiting, next);
    }
    actors[holder].releases(&key("k"), token).await;
    assert!(!actors[0].sees_held(&key("k")).await);
}

pub async fn new_request_cannot_pass_the_queue<S: Store>(env: &Environment<S>) {
    let (holder, waiter, passing) = (env.actor().await, env.actor().await, env.actor().await);
    let (token, _) = holder.takes(&key("k")).await;
    let waiting = waiter.queues(&key("k")).await;
    let request = AcquireRequest { enqueue: false, ..passing.request(&key("k")) };
    assert!(matches!(passing.ask(&request).await, AcquireOutcome::Busy { .. }));
    holder.releases(&key("k"), token).await;
    assert!(matches!(passing.ask(&request).await, AcquireOutcome::Busy { .. }));
    assert!(waiter.granted(&key("k"), waiting).await.is_some());
}

pub async fn repeated_acquire_keeps_queue_place<S: Store>(env: &Environment<S>) {
    let (holder, a, b) = (env.actor().await, env.actor().await, env.actor().await);
    let (token, _) = holder.takes(&key("k")).await;
    let first = a.request(&key("k"));
    a.waits(&first).await;
    let second = b.queues(&key("k")).await;
    for _ in 0..3 {
        assert_eq!(a.waits(&first).await.ahead, 0);
        assert!(matches!(a.polls(&key("k"), first.token).await, PollOutcome::Queued(queued) if queued.ahead == 0));
        assert!(matches!(b.polls(&key("k"), second).await, PollOutcome::Queued(queued) if queued.ahead == 1));
    }
    assert_eq!(holder.sees(&key("k")).await.waiters.len(), 2);
    holder.releases(&key("k"), token).await;
    assert_eq!(a.gets(&first).await, a.granted(&key("k"), first.token).await.unwrap());
}

pub async fn abandoned_waiter_leaves_the_queue<S: Store>(env: &Environment<S>) {
    let (holder, a, b) = (env.actor().await, env.actor().await, env.actor().await);
    let (token, _) = holder.takes(&key("k")).await;
    let first = a.queues(&key("k")).await;
    let second = b.queues(&key("k")).await;
    assert_eq!(a.store.abandon(&key("k"), first).await.unwrap().outcome, EndOutcome::Dequeued);
    assert_eq!(a.store.abandon(&key("k"), first).await.unwrap().outcome, EndOutcome::Nothing);
    assert!(matches!(b.polls(&key("k"), second).await, PollOutcome::Queued(queued) if queued.ahead == 0));
    // Releasing a waiter's token is giving up too.
    let third = a.queues(&key("k")).await;
    let released = a.store.release(&key("k"), third, Some(SHORT)).await.unwrap().outcome;
    assert_eq!(released, EndOutcome::Dequeued);
    holder.releases(&key("k"), token).await;
    assert!(b.granted(&key("k"), second).await.is_some());
    assert_eq!(b.sees(&key("k")).await.closed_for, None, "without a cooldown");
}

pub async fn abandon_ends_uncollected_grant<S: Store>(env: &Environment<S>) {
    let (holder, gone, next) = (env.actor().await, env.actor().await, env.actor().await);
    let (token, _) = holder.takes(&key("k")).await;
    let forgotten = gone.queues(&key("k")).await;
    let waiting = next.queues(&key("k")).await;
    holder.releases(&key("k"), token).await;
    assert_eq!(gone.store.abandon(&key("k"), forgotten).await.unwrap().outcome, EndOutcome::Released);
    assert!(next.granted(&key("k"), waiting).await.is_some());
}

pub async fn fixed_ttl_starts_at_handoff<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.actor().await, env.actor().await);
    let (token, _) = holder.takes(&key("k")).await;
    let lifetime = Lifetime::Fixed(Duration::from_secs(60));
    let request = AcquireRequest { lifetime, ..waiter.request(&key("k")) };
    waiter.waits(&request).await;
    // It waits for longer than a slow machine takes from the release to the answer.
    env.pass(Duration::from_secs(2)).await;
    holder.releases(&key("k"), token).await;
    let remaining = waiter.granted(&key("k"), request.token).await.unwrap().remaining.unwrap();
    assert!(remaining > Duration::from_millis(58_100), "counted from the grant: {remaining:?}");
    env.pass(Duration::from_millis(100)).await;
    let later = waiter.granted(&key("k"), request.token).await.unwrap().remaining.unwrap();
    assert!(later <= remaining - Duration::from_millis(100));
}

pub async fn poll_after_expiry_grants_the_waiter<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.actor().await, env.actor().await);
    let request = AcquireRequest { lifetime: Lifetime::Fixed(SHORT), ..holder.request(&key("k")) };
    holder.gets(&request).await;
    let waiting = waiter.request(&key("k"));
    let check_in = waiter.waits(&waiting).await.check_in.expect("time will free it");
    assert!(check_in <= SHORT, "{check_in:?}");
    env.pass(check_in + Duration::from_millis(5)).await;
    assert!(waiter.granted(&key("k"), waiting.token).await.is_some());
}

pub async fn semaphore_never_exceeds_capacity<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let permit = Demand::new(1, 3).unwrap();
    let mut held = Vec::new();
    for _ in 0..3 {
        let request = demanding(&actor, permit);
        actor.gets(&request).await;
        held.push(request.token);
    }
    let fourth = demanding(&actor, permit);
    actor.waits(&fourth).await;
    let two = demanding(&actor, Demand::new(2, 3).unwrap());
    actor.waits(&two).await;
    actor.releases(&key("k"), held[0]).await;
    assert!(actor.granted(&key("k"), fourth.token).await.is_some());
    actor.releases(&key("k"), held[1]).await;
    assert_eq!(actor.granted(&key("k"), two.token).await, None, "one unit is free, it needs two");
    actor.releases(&key("k"), held[2]).await;
    assert!(actor.granted(&key("k"), two.token).await.is_some());
    let fences: Vec<_> = actor.sees(&key("k")).await.holders.iter().map(|holder| holder.fence).collect();
    assert!(fences[0] < fences[1], "each permit has a fence of its own, oldest first");
}

pub async fn writer_waits_only_for_earlier_readers<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let (one, two) = (demanding(&actor, Demand::READ), demanding(&actor, Demand::READ));
    actor.gets(&one).await;
    actor.gets(&two).await;
    let writer = demanding(&actor, Demand::WRITE);
    actor.waits(&writer).await;
    let (three, four) = (demanding(&actor, Demand::READ), demanding(&actor, Demand::READ));
    actor.waits(&three).await;
    actor.waits(&four).await;
    actor.releases(&key("k"), one.token).await;
    assert_eq!(actor.granted(&key("k"), writer.token).await, None);
    actor.releases(&key("k"), two.token).await;
    assert!(actor.granted(&key("k"), writer.token).await.is_some(), "new readers did not pass it");
    assert_eq!(actor.granted(&key("k"), three.token).await, None);
    actor.releases(&key("k"), writer.token).await;
    assert!(actor.granted(&key("k"), three.token).await.is_some(), "all readers at the head enter together");
    assert!(actor.granted(&key("k"), four.token).await.is_some());
}

pub async fn cooldown_delays_the_next_grant<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.actor().await, env.actor().await);
    let (token, _) = holder.takes(&key("k")).await;
    let request = waiter.request(&key("k"));
    waiter.waits(&request).await;
    let released = holder.store.release(&key("k"), token, Some(SHORT)).await.unwrap().outcome;
    assert_eq!(released, EndOutcome::Released);
    let busy = AcquireRequest { enqueue: false, ..holder.request(&key("k")) };
    match holder.ask(&busy).await {
        AcquireOutcome::Busy { check_in, .. } => assert!(check_in.unwrap() <= SHORT),
        other => panic!("closed, but {other:?}"),
    }
    let PollOutcome::Queued(queued) = waiter.polls(&key("k"), request.token).await else { panic!("not waiting") };
    let check_in = queued.check_in.expect("the end of a cooldown is known");
    assert!(holder.sees(&key("k")).await.closed_for.unwrap() <= SHORT);
    env.pass(check_in + Duration::from_millis(5)).await;
    assert!(waiter.granted(&key("k"), request.token).await.is_some());
    assert_eq!(holder.sees(&key("k")).await.closed_for, None);
}

pub async fn cooldown_ends_without_a_waiter<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let (token, first) = actor.takes(&key("k")).await;
    actor.store.release(&key("k"), token, Some(SHORT)).await.unwrap();
    // A repeated release does not make it longer.
    env.pass(SHORT * 2 / 3).await;
    actor.store.release(&key("k"), token, Some(SHORT)).await.unwrap();
    env.pass(SHORT / 2).await;
    let (_, second) = actor.takes(&key("k")).await;
    assert!(second.fence > first.fence);
}

pub async fn full_queue_rejects_requests<S: Store>(env: &Environment<S>) {
    let (holder, other) = (env.actor().await, env.actor().await);
    let (token, _) = holder.takes(&key("k")).await;
    let mut first = None;
    for _ in 0..MAX_WAITERS {
        let waiting = holder.queues(&key("k")).await;
        first.get_or_insert(waiting);
    }
    let request = other.request(&key("k"));
    assert_eq!(other.ask(&request).await, AcquireOutcome::QueueFull { limit: MAX_WAITERS });
    assert_eq!(other.polls(&key("k"), request.token).await, PollOutcome::Gone);
    holder.releases(&key("k"), token).await;
    assert!(holder.granted(&key("k"), first.unwrap()).await.is_some());
    other.waits(&request).await;
    // All of the queue ends with its session, in one go.
    holder.store.close_session(holder.session).await.unwrap();
    assert!(other.granted(&key("k"), request.token).await.is_some());
}

pub async fn push_names_key_token_and_fence<S: Store>(env: &Environment<S>) {
    let (holder, mut waiter) = (env.actor().await, env.actor().await);
    let odd = key("odd/ {key} é");
    let (token, _) = holder.takes(&odd).await;
    let waiting = waiter.queues(&odd).await;
    holder.releases(&odd, token).await;
    let push = loop {
        match waiter.pushed().await {
            Push::Recheck { .. } | Push::RecheckAll | Push::VerifyAll | Push::Warning(_) => {}
            push => break push,
        }
    };
    let fence = waiter.granted(&odd, waiting).await.unwrap().fence;
    assert_eq!(push, Push::Granted { key: odd, token: waiting, fence });
}

pub async fn waiter_in_other_process_is_notified<S: Store>(env: &Environment<S>) {
    // Each actor has a handle of its own, as a process has.
    let mut actors = Vec::new();
    for _ in 0..6 {
        actors.push(env.actor().await);
    }
    let (token, _) = actors[0].takes(&key("k")).await;
    let mut tokens = vec![token];
    for actor in &actors[1..] {
        tokens.push(actor.queues(&key("k")).await);
    }
    for i in 0..5 {
        assert_eq!(actors[i].releases(&key("k"), tokens[i]).await, EndOutcome::Released);
        assert_eq!(actors[i + 1].pushed_grant().await.0, tokens[i + 1]);
    }
    actors[5].releases(&key("k"), tokens[5]).await;
    until("free", async || !actors[0].sees_held(&key("k")).await).await;
}
