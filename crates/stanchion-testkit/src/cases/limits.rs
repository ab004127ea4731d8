//! Users of one key with different limits: what fits beside what, and what they are told.

use stanchion::store::{
    AcquireOutcome, AcquireRequest, Demand, EndOutcome, ForceReleaseOutcome, ForceReleaseRequest, PollOutcome,
};
use stanchion::{Fence, Store, TokenId};

use crate::environment::{Actor, Environment, Random, key, seed};
use crate::reference::Reference;

fn of(units: u32, capacity: u32) -> Demand {
    Demand::new(units, capacity).unwrap()
}

fn wanting<S: Store>(actor: &Actor<S>, demand: Demand) -> AcquireRequest {
    AcquireRequest { demand, ..actor.request(&key("k")) }
}

/// The limit that the answer of a request tells that does not wait.
async fn refused<S: Store>(actor: &Actor<S>, demand: Demand) -> Option<u32> {
    match actor.ask(&AcquireRequest { enqueue: false, ..wanting(actor, demand) }).await {
        AcquireOutcome::Busy { in_use, .. } => in_use,
        other => panic!("{demand:?} beside the others: {other:?}"),
    }
}

pub async fn exclusive_excludes_readers_and_permits<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let exclusive = [Demand::MUTEX, Demand::WRITE, of(3, 3), of(Demand::MAX, Demand::MAX)];
    let shared = [Demand::READ, of(1, 3), of(2, 5)];
    for whole in exclusive {
        let held = wanting(&actor, whole);
        actor.gets(&held).await;
        for other in exclusive.into_iter().chain(shared) {
            assert_eq!(refused(&actor, other).await, None, "the key is not shared");
        }
        assert_eq!(actor.releases(&key("k"), held.token).await, EndOutcome::Released);
    }
    for part in shared {
        let held = wanting(&actor, part);
        actor.gets(&held).await;
        for whole in exclusive {
            assert_eq!(refused(&actor, whole).await, Some(part.capacity()));
        }
        assert_eq!(actor.releases(&key("k"), held.token).await, EndOutcome::Released);
    }
}

pub async fn one_queue_serves_every_kind_in_order<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let (token, _) = actor.takes(&key("k")).await;
    let kinds = [Demand::READ, of(1, 3), Demand::MUTEX, Demand::READ, of(3, 3), of(2, 3), of(2, 3)];
    let queue = kinds.map(|demand| wanting(&actor, demand));
    for request in &queue {
        actor.waits(request).await;
    }
    let mut held = vec![token];
    // Each group is what fits together; the last of them waits for the one before it.
    for group in [0..2, 2..3, 3..4, 4..5, 5..6, 6..7] {
        for token in held.drain(..) {
            assert_eq!(actor.releases(&key("k"), token).await, EndOutcome::Released);
        }
        for (at, request) in queue.iter().enumerate().skip(group.start) {
            let is_held = actor.granted(&key("k"), request.token).await.is_some();
            assert_eq!(is_held, group.contains(&at), "{at} of {group:?}");
        }
        held.extend(queue[group].iter().map(|request| request.token));
    }
}

pub async fn smaller_limit_applies_until_release<S: Store>(env: &Environment<S>) {
    let (old, new) = (env.actor().await, env.actor().await);
    let of_three = wanting(&old, of(1, 3));
    old.gets(&of_three).await;
    new.gets(&wanting(&new, of(2, 5))).await;
    assert_eq!(new.sees(&key("k")).await.capacity(), Some(3));
    let capacities: Vec<_> = new.sees(&key("k")).await.holders.iter().map(|holder| holder.capacity).collect();
    assert_eq!(capacities, [3, 5], "each holder has its own");
    assert_eq!(refused(&new, of(1, 5)).await, Some(3));
    assert_eq!(refused(&old, of(1, 3)).await, Some(3));
    let waiting = wanting(&new, of(1, 5));
    assert_eq!(new.waits(&waiting).await.in_use, Some(3));
    assert_eq!(new.sees(&key("k")).await.waiters[0].capacity, 5);
    let PollOutcome::Queued(queued) = new.polls(&key("k"), waiting.token).await else { panic!("not waiting") };
    assert_eq!(queued.in_use, Some(3), "a poll tells it too");
    assert_eq!(old.releases(&key("k"), of_three.token).await, EndOutcome::Released);
    assert!(new.granted(&key("k"), waiting.token).await.is_some(), "with the holder its limit is gone");
    new.gets(&wanting(&new, of(2, 5))).await;
    assert_eq!(refused(&new, of(1, 5)).await, Some(5));
    assert_eq!(new.sees(&key("k")).await.capacity(), Some(5));
}

pub async fn raised_limit_applies_after_old_holders<S: Store>(env: &Environment<S>) {
    let (old, new) = (env.actor().await, env.actor().await);
    let held: [_; 3] = std::array::from_fn(|_| wanting(&old, of(1, 3)));
    for request in &held {
        old.gets(request).await;
    }
    let waiting: [_; 5] = std::array::from_fn(|_| wanting(&new, of(1, 5)));
    for request in &waiting {
        new.waits(request).await;
    }
    let admitted = async || {
        let mut count = 0;
        for request in &waiting {
            count += usize::from(new.granted(&key("k"), request.token).await.is_some());
        }
        count
    };
    for (request, expected) in held.iter().zip([1, 2, 5]) {
        assert_eq!(old.releases(&key("k"), request.token).await, EndOutcome::Released);
        assert_eq!(admitted().await, expected);
    }
}

pub async fn lowered_limit_waits_for_old_holders<S: Store>(env: &Environment<S>) {
    let (old, new) = (env.actor().await, env.actor().await);
    let held: [_; 4] = std::array::from_fn(|_| wanting(&old, of(1, 5)));
    for request in &held {
        old.gets(request).await;
    }
    let waiting: [_; 2] = std::array::from_fn(|_| wanting(&new, of(1, 2)));
    for request in &waiting {
        assert_eq!(new.waits(request).await.in_use, Some(5));
    }
    assert_eq!(refused(&old, of(1, 5)).await, Some(5), "there is room, but not its turn");
    // Four old ones leave room for a new one when three have gone, and for a second one when all have gone.
    for (request, expected) in held.iter().zip([[false, false], [false, false], [true, false], [true, true]]) {
        assert_eq!(old.releases(&key("k"), request.token).await, EndOutcome::Released);
        for (request, expected) in waiting.iter().zip(expected) {
            assert_eq!(new.granted(&key("k"), request.token).await.is_some(), expected);
        }
    }
}

pub async fn force_released_holder_limits_nobody<S: Store>(env: &Environment<S>) {
    let (old, new) = (env.actor().await, env.actor().await);
    let fence = old.gets(&wanting(&old, of(1, 2))).await.fence;
    new.gets(&wanting(&new, of(1, 4))).await;
    let waiting = wanting(&new, of(3, 4));
    new.waits(&waiting).await;
    let request = ForceReleaseRequest { key: key("k"), fence, reason: String::new() };
    assert_eq!(new.store.force_release(request).await.unwrap().outcome, ForceReleaseOutcome::Released);
    assert!(new.granted(&key("k"), waiting.token).await.is_some());
}

/// A call of the randomised case.
struct Call {
    actor: usize,
    request: AcquireRequest,
    fence: Option<Fence>,
}

/// One step after the other, with random kinds and limits, on the store and on the reference.
pub async fn random_limits_match_the_reference<S: Store>(env: &Environment<S>) {
    let mut random = Random::new(seed("random_limits_match_the_reference"));
    let k = key("k");
    let mut actors = Vec::new();
    for _ in 0..3 {
        actors.push(env.actor().await);
    }
    let (mut reference, mut calls, mut last) = (Reference::<TokenId>::default(), Vec::<Call>::new(), None);
    let (mut most_held, mut waited) = (0, 0);
    for step in 0..400 {
        let who = random.below(3) as usize;
        let some = (!calls.is_empty()).then(|| random.below(calls.len() as u64) as usize);
        match (random.below(16), some) {
            (0..7, _) | (_, None) => {
                let capacity = 1 + random.below(5) as u32;
                let demand = match random.below(6) {
                    0 => Demand::MUTEX,
                    1 => Demand::READ,
                    _ => of(1 + random.below(capacity.into()) as u32, capacity),
                };
                let enqueue = random.below(4) > 0;
                let request = AcquireRequest { demand, enqueue, ..actors[who].request(&k) };
                let granted = reference.acquire(request.token, demand, enqueue);
                let in_use = reference.in_use();
                match actors[who].ask(&request).await {
                    AcquireOutcome::Granted(_) => assert!(granted, "step {step}: {demand:?} was granted"),
                    AcquireOutcome::Queued(queued) => {
                        assert!(enqueue && !granted, "step {step}: {demand:?} was queued");
                        assert_eq!(queued.ahead as usize, reference.ahead(request.token).unwrap(), "step {step}");
                        assert_eq!(queued.in_use, in_use, "step {step}");
                    }
                    AcquireOutcome::Busy { in_use: told, .. } => {
                        assert!(!enqueue && !granted, "step {step}: {demand:?} was refused");
                        assert_eq!(told, in_use, "step {step}");
                    }
                    other => panic!("step {step}: {other:?}"),
                }
                if granted || enqueue {
                    calls.push(Call { actor: who, request, fence: None });
                }
            }
            (7..11, Some(at)) => {
                let call = calls.remove(at);
                let was_held = reference.end(call.request.token);
                let expected = if was_held { EndOutcome::Released } else { EndOutcome::Dequeued };
                let token = call.request.token;
                // Both end whatever there is.
                let ended = match random.below(2) {
                    0 => actors[who].store.release(&k, token, None).await,
                    _ => actors[who].store.abandon(&k, token).await,
                };
                assert_eq!(ended.unwrap().outcome, expected, "step {step}");
            }
            (11, Some(at)) => {
                // Asked again it is the same.
                let Call { actor, request, fence } = &calls[at];
                match actors[*actor].ask(request).await {
                    AcquireOutcome::Granted(granted) => assert_eq!(Some(granted.fence), *fence, "step {step}"),
                    AcquireOutcome::Queued(queued) => {
                        assert_eq!(Some(queued.ahead as usize), reference.ahead(request.token), "step {step}");
                    }
                    other => panic!("step {step}: {other:?}"),
                }
            }
            (12 | 13, Some(at)) => {
                let request = &calls[at].request;
                match actors[who].polls(&k, request.token).await {
                    PollOutcome::Granted(granted) => assert_eq!(Some(granted.fence), calls[at].fence, "step {step}"),
                    PollOutcome::Queued(queued) => {
                        assert_eq!(Some(queued.ahead as usize), reference.ahead(request.token), "step {step}");
                        assert_eq!(queued.in_use, reference.in_use(), "step {step}");
                    }
                    PollOutcome::Gone => panic!("step {step}: gone"),
                }
            }
            (14, Some(at)) => {
                let Some(fence) = calls[at].fence else { continue };
                let request = ForceReleaseRequest { key: k.clone(), fence, reason: String::new() };
                assert_eq!(
                    actors[who].store.force_release(request).await.unwrap().outcome,
                    ForceReleaseOutcome::Released
                );
                reference.end(calls.remove(at).request.token);
            }
            (_, Some(_)) => {
                let actor = std::mem::replace(&mut actors[who], env.actor().await);
                actor.store.close_session(actor.session).await.unwrap();
                let ended: Vec<_> = calls.extract_if(.., |call| call.actor == who).collect();
                reference.end_all(&ended.iter().map(|call| call.request.token).collect::<Vec<_>>());
            }
        }
        let seen = actors[who].sees(&k).await;
        let holders: Vec<_> = seen.holders.iter().map(|holder| (holder.units, holder.capacity)).collect();
        let waiters: Vec<_> = seen.waiters.iter().map(|waiter| (waiter.units, waiter.capacity)).collect();
        assert_eq!((holders, waiters), (reference.holders(), reference.waiters()), "step {step}");
        // Both are in the order of the grants.
        for (holder, token) in seen.holders.iter().zip(reference.held()) {
            let call = calls.iter_mut().find(|call| call.request.token == token).expect("a call that was made");
            if call.fence.is_none() {
                assert!(Some(holder.fence) > last, "step {step}: fences rise");
                (call.fence, last) = (Some(holder.fence), Some(holder.fence));
            }
            assert_eq!(call.fence, Some(holder.fence), "step {step}");
        }
        (most_held, waited) = (most_held.max(seen.holders.len()), waited.max(seen.waiters.len()));
    }
    assert!(most_held > 1 && waited > 1, "a run without sharing or waiting shows nothing");
}
