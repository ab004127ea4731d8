//! Hand-offs: whoever leaves, the step that lets it go grants to those who fit then.

use std::time::Duration;

use stanchion::store::{
    AcquireOutcome, AcquireRequest, Demand, EndOutcome, ForceReleaseOutcome, ForceReleaseRequest, Lifetime,
    MAX_WAITERS, PollOutcome, Push,
};
use stanchion::{Store, TokenId};

use crate::environment::{Actor, Environment, key, until};

const SHORT: Duration = Duration::from_secs(2);

fn taking<S: Store>(actor: &Actor<S>, units: u32) -> AcquireRequest {
    AcquireRequest { demand: Demand::new(units, 3).unwrap(), ..actor.request(&key("k")) }
}

pub async fn poll_finds_handoff_without_push<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.actor().await, env.actor().await);
    let (token, granted) = holder.takes(&key("k")).await;
    let request = waiter.request(&key("k"));
    assert!(matches!(waiter.ask(&request).await, AcquireOutcome::Queued(_)));
    holder.releases(&key("k"), token).await;
    let polled = waiter.granted(&key("k"), request.token).await.expect("no push is needed");
    assert!(polled.fence > granted.fence);
    assert_eq!(waiter.gets(&request).await, polled, "asking again gives the same");
}

pub async fn abandoning_head_lets_next_waiter_in<S: Store>(env: &Environment<S>) {
    let (holder, big, small) = (env.actor().await, env.actor().await, env.actor().await);
    holder.gets(&taking(&holder, 2)).await;
    let head = taking(&big, 2);
    big.waits(&head).await;
    let next = taking(&small, 1);
    small.waits(&next).await;
    assert_eq!(big.store.abandon(&key("k"), head.token).await.unwrap().outcome, EndOutcome::Dequeued);
    let state = holder.sees(&key("k")).await;
    assert_eq!((state.holders.len(), state.waiters.len()), (2, 0), "in the same step");
    assert!(small.granted(&key("k"), next.token).await.is_some());
}

pub async fn abandoning_writer_lets_readers_in<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let demanding = |demand| AcquireRequest { demand, ..actor.request(&key("k")) };
    actor.gets(&demanding(Demand::READ)).await;
    let writer = demanding(Demand::WRITE);
    actor.waits(&writer).await;
    let readers = [demanding(Demand::READ), demanding(Demand::READ)];
    for reader in &readers {
        actor.waits(reader).await;
    }
    assert_eq!(actor.releases(&key("k"), writer.token).await, EndOutcome::Dequeued);
    for reader in &readers {
        assert!(actor.granted(&key("k"), reader.token).await.is_some());
    }
    assert_eq!(actor.sees(&key("k")).await.holders.len(), 3);
}

pub async fn reader_stream_never_starves_a_writer<S: Store>(env: &Environment<S>) {
    let (readers, writer) = (env.actor().await, env.actor().await);
    let reading = || AcquireRequest { demand: Demand::READ, ..readers.request(&key("k")) };
    let mut inside: Vec<TokenId> = Vec::new();
    for _ in 0..3 {
        let reader = reading();
        readers.gets(&reader).await;
        inside.push(reader.token);
    }
    let write = AcquireRequest { demand: Demand::WRITE, ..writer.request(&key("k")) };
    writer.waits(&write).await;
    // One goes, one comes: the one that comes waits behind the writer.
    let mut behind = Vec::new();
    for token in inside {
        let reader = reading();
        readers.waits(&reader).await;
        behind.push(reader.token);
        readers.releases(&key("k"), token).await;
    }
    assert!(writer.granted(&key("k"), write.token).await.is_some());
    writer.releases(&key("k"), write.token).await;
    for token in behind {
        assert!(readers.granted(&key("k"), token).await.is_some());
    }
}

pub async fn release_serves_fitting_waiters_in_order<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let all = taking(&actor, 3);
    let mut last = actor.gets(&all).await.fence;
    let waiting = [taking(&actor, 1), taking(&actor, 2), taking(&actor, 1)];
    for request in &waiting {
        actor.waits(request).await;
    }
    actor.releases(&key("k"), all.token).await;
    for request in &waiting[..2] {
        let fence = actor.granted(&key("k"), request.token).await.expect("it fits").fence;
        assert!(fence > last, "fences in the order of the queue");
        last = fence;
    }
    let third = actor.polls(&key("k"), waiting[2].token).await;
    assert!(matches!(third, PollOutcome::Queued(queued) if queued.ahead == 0), "{third:?}");
}

pub async fn small_demand_cannot_pass_a_large_one<S: Store>(env: &Environment<S>) {
    let (actor, other) = (env.actor().await, env.actor().await);
    let held = taking(&actor, 1);
    actor.gets(&held).await;
    let large = taking(&actor, 3);
    actor.waits(&large).await;
    let small = taking(&other, 1);
    other.waits(&small).await;
    let at_once = AcquireRequest { enqueue: false, ..taking(&other, 1) };
    assert!(matches!(other.ask(&at_once).await, AcquireOutcome::Busy { .. }), "there is room, but not its turn");
    actor.releases(&key("k"), held.token).await;
    assert!(actor.granted(&key("k"), large.token).await.is_some());
    assert_eq!(other.granted(&key("k"), small.token).await, None);
}

pub async fn mixed_demands_never_exceed_capacity<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let mut open = Vec::new();
    for units in [2, 1, 3, 2, 2, 1, 1, 3, 1, 2] {
        let request = taking(&actor, units);
        actor.ask(&request).await;
        open.push(request.token);
    }
    while !open.is_empty() {
        let state = actor.sees(&key("k")).await;
        let used: u32 = state.holders.iter().map(|holder| holder.units).sum();
        assert!(used <= 3, "{used} units are held");
        assert!(used > 0, "there are waiters and nobody holds");
        let mut held = None;
        for (at, token) in open.iter().enumerate() {
            if actor.granted(&key("k"), *token).await.is_some() {
                held = Some(at);
                break;
            }
        }
        let token = open.remove(held.expect("somebody holds"));
        assert_eq!(actor.releases(&key("k"), token).await, EndOutcome::Released);
    }
    assert!(!actor.sees_held(&key("k")).await);
}

pub async fn every_kind_of_release_notifies_next<S: Store>(env: &Environment<S>) {
    for way in 0..4 {
        let (holder, mut waiter) = (env.actor().await, env.actor().await);
        let (token, granted) = holder.takes(&key("k")).await;
        let waiting = waiter.queues(&key("k")).await;
        match way {
            0 => drop(holder.releases(&key("k"), token).await),
            1 => drop(holder.store.abandon(&key("k"), token).await.unwrap()),
            2 => {
                let request = ForceReleaseRequest { key: key("k"), fence: granted.fence, reason: String::new() };
                assert_eq!(waiter.store.force_release(request).await.unwrap().outcome, ForceReleaseOutcome::Released);
            }
            _ => holder.store.close_session(holder.session).await.unwrap().outcome,
        }
        let (pushed, fence) = waiter.pushed_grant().await;
        assert_eq!(pushed, waiting, "way {way}");
        assert_eq!(waiter.granted(&key("k"), waiting).await.unwrap().fence, fence);
        waiter.releases(&key("k"), waiting).await;
    }
}

pub async fn push_reaches_each_token_of_a_session<S: Store>(env: &Environment<S>) {
    let (holder, mut waiter) = (env.actor().await, env.actor().await);
    let mut expected = Vec::new();
    for name in ["a", "b", "c"] {
        let (token, _) = holder.takes(&key(name)).await;
        let waiting = waiter.queues(&key(name)).await;
        holder.releases(&key(name), token).await;
        expected.push((key(name), waiting));
    }
    let mut told = Vec::new();
    while told.len() < 3 {
        if let Push::Granted { key, token, .. } = waiter.pushed().await
            && !told.contains(&(key.clone(), token))
        {
            told.push((key, token));
        }
    }
    told.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(told, expected);
}

pub async fn waiter_outlives_its_request_deadline<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.actor().await, env.actor().await);
    let (token, _) = holder.takes(&key("k")).await;
    let now = waiter.store.inspect(&key("k")).await.unwrap().time;
    let request = AcquireRequest { not_after: now.after(SHORT), ..waiter.request(&key("k")) };
    if waiter.ask(&request).await == AcquireOutcome::Stale {
        // The machine stood still for that long: this run shows nothing.
        return;
    }
    env.pass(SHORT + Duration::from_millis(10)).await;
    assert!(matches!(waiter.polls(&key("k"), request.token).await, PollOutcome::Queued(_)));
    holder.releases(&key("k"), token).await;
    assert!(waiter.granted(&key("k"), request.token).await.is_some(), "the question is late, its place is not");
    // Whatever a repeat of the question is told now, it changes nothing.
    let repeated = waiter.ask(&request).await;
    assert!(matches!(repeated, AcquireOutcome::Granted(_) | AcquireOutcome::Stale), "{repeated:?}");
    assert_eq!(waiter.sees(&key("k")).await.holders.len(), 1);
    assert_eq!(waiter.releases(&key("k"), request.token).await, EndOutcome::Released);
    assert_eq!(waiter.ask(&request).await, AcquireOutcome::Stale, "and after its end it creates nothing");
    assert!(!waiter.sees_held(&key("k")).await);
}

pub async fn late_messages_spare_the_next_token<S: Store>(env: &Environment<S>) {
    let (actor, other) = (env.actor().await, env.actor().await);
    let fixed = Lifetime::Fixed(Duration::from_secs(60));
    let old = AcquireRequest { lifetime: fixed, ..actor.request(&key("k")) };
    actor.gets(&old).await;
    actor.releases(&key("k"), old.token).await;
    let (token, granted) = actor.takes(&key("k")).await;
    let waiting = other.queues(&key("k")).await;
    // Duplicates of everything that was ever sent for the old token, but of its acquire, which was answered.
    for _ in 0..2 {
        assert_eq!(actor.store.release(&key("k"), old.token, Some(SHORT)).await.unwrap().outcome, EndOutcome::Nothing);
        assert_eq!(actor.store.abandon(&key("k"), old.token).await.unwrap().outcome, EndOutcome::Nothing);
        actor.store.extend(&key("k"), old.token, SHORT).await.unwrap();
        assert_eq!(actor.polls(&key("k"), old.token).await, PollOutcome::Gone);
    }
    assert_eq!(actor.granted(&key("k"), token).await, Some(granted), "same session, another call");
    let state = actor.sees(&key("k")).await;
    assert_eq!((state.waiters.len(), state.closed_for), (1, None));
    actor.releases(&key("k"), token).await;
    assert!(other.granted(&key("k"), waiting).await.is_some());
}

pub async fn full_queue_of_dead_waiters_has_room<S: Store>(env: &Environment<S>) {
    let (holder, dying, last) = (env.actor().await, env.mortal(Duration::from_secs(3)).await, env.actor().await);
    let (token, _) = holder.takes(&key("k")).await;
    let mut entered = 0;
    while let AcquireOutcome::Queued(_) = dying.ask(&dying.request(&key("k"))).await {
        entered += 1;
        if entered % 50 == 0 {
            dying.store.renew_session(dying.session).await.unwrap();
        }
    }
    assert_eq!(entered, MAX_WAITERS);
    env.dies(dying).await;
    let request = last.request(&key("k"));
    until("there is room", async || matches!(last.ask(&request).await, AcquireOutcome::Queued(_))).await;
    holder.releases(&key("k"), token).await;
    assert!(last.granted(&key("k"), request.token).await.is_some());
}
