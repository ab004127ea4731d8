//! Clients that use one key with different limits: which requests fit together, and which limit each reply names.

use stanchion::store::{
    AcquireOutcome, AcquireRequest, Demand, EndOutcome, ForceReleaseOutcome, ForceReleaseRequest, PollOutcome,
};
use stanchion::{Fence, Store, TokenId};

use crate::environment::{Client, Environment, Random, key, seed};
use crate::reference::Reference;

fn of(units: u32, capacity: u32) -> Demand {
    Demand::new(units, capacity).unwrap()
}

fn wanting<S: Store>(client: &Client<S>, demand: Demand) -> AcquireRequest {
    AcquireRequest { demand, ..client.request(&key("k")) }
}

/// Sends a request that must be rejected, and returns the limit that the reply names.
async fn rejected<S: Store>(client: &Client<S>, demand: Demand) -> Option<u32> {
    match client.acquire(&AcquireRequest { enqueue: false, ..wanting(client, demand) }).await {
        AcquireOutcome::Busy { in_use, .. } => in_use,
        other => panic!("{demand:?} was not rejected: {other:?}"),
    }
}

pub async fn exclusive_excludes_readers_and_permits<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let exclusive = [Demand::MUTEX, Demand::WRITE, of(3, 3), of(Demand::MAX, Demand::MAX)];
    let shared = [Demand::READ, of(1, 3), of(2, 5)];
    for whole in exclusive {
        let held = wanting(&client, whole);
        client.expect_grant(&held).await;
        for other in exclusive.into_iter().chain(shared) {
            assert_eq!(rejected(&client, other).await, None, "an exclusive hold names no limit");
        }
        assert_eq!(client.release(&key("k"), held.token).await, EndOutcome::Released);
    }
    for part in shared {
        let held = wanting(&client, part);
        client.expect_grant(&held).await;
        for whole in exclusive {
            assert_eq!(rejected(&client, whole).await, Some(part.capacity()));
        }
        assert_eq!(client.release(&key("k"), held.token).await, EndOutcome::Released);
    }
}

pub async fn one_queue_serves_every_kind_in_order<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let (token, _) = client.lock(&key("k")).await;
    let kinds = [Demand::READ, of(1, 3), Demand::MUTEX, Demand::READ, of(3, 3), of(2, 3), of(2, 3)];
    let queue = kinds.map(|demand| wanting(&client, demand));
    for request in &queue {
        client.expect_queued(request).await;
    }
    let mut held = vec![token];
    // Each group holds the requests that fit together. It is granted when the group before it has released.
    for group in [0..2, 2..3, 3..4, 4..5, 5..6, 6..7] {
        for token in held.drain(..) {
            assert_eq!(client.release(&key("k"), token).await, EndOutcome::Released);
        }
        for (at, request) in queue.iter().enumerate().skip(group.start) {
            let is_held = client.current_grant(&key("k"), request.token).await.is_some();
            assert_eq!(is_held, group.contains(&at), "{at} of {group:?}");
        }
        held.extend(queue[group].iter().map(|request| request.token));
    }
}

pub async fn smaller_limit_applies_until_release<S: Store>(env: &Environment<S>) {
    let (old, new) = (env.client().await, env.client().await);
    let of_three = wanting(&old, of(1, 3));
    old.expect_grant(&of_three).await;
    new.expect_grant(&wanting(&new, of(2, 5))).await;
    assert_eq!(new.inspect(&key("k")).await.capacity(), Some(3));
    let capacities: Vec<_> = new.inspect(&key("k")).await.holders.iter().map(|holder| holder.capacity).collect();
    assert_eq!(capacities, [3, 5], "each holder keeps its own limit");
    assert_eq!(rejected(&new, of(1, 5)).await, Some(3));
    assert_eq!(rejected(&old, of(1, 3)).await, Some(3));
    let waiting = wanting(&new, of(1, 5));
    assert_eq!(new.expect_queued(&waiting).await.in_use, Some(3));
    assert_eq!(new.inspect(&key("k")).await.waiters[0].capacity, 5);
    let PollOutcome::Queued(queued) = new.poll(&key("k"), waiting.token).await else { panic!("not waiting") };
    assert_eq!(queued.in_use, Some(3), "a poll names the limit, too");
    assert_eq!(old.release(&key("k"), of_three.token).await, EndOutcome::Released);
    assert!(new.current_grant(&key("k"), waiting.token).await.is_some(), "the limit ends with its holder");
    new.expect_grant(&wanting(&new, of(2, 5))).await;
    assert_eq!(rejected(&new, of(1, 5)).await, Some(5));
    assert_eq!(new.inspect(&key("k")).await.capacity(), Some(5));
}

pub async fn raised_limit_applies_after_old_holders<S: Store>(env: &Environment<S>) {
    let (old, new) = (env.client().await, env.client().await);
    let held: [_; 3] = std::array::from_fn(|_| wanting(&old, of(1, 3)));
    for request in &held {
        old.expect_grant(request).await;
    }
    let waiting: [_; 5] = std::array::from_fn(|_| wanting(&new, of(1, 5)));
    for request in &waiting {
        new.expect_queued(request).await;
    }
    let admitted = async || {
        let mut count = 0;
        for request in &waiting {
            count += usize::from(new.current_grant(&key("k"), request.token).await.is_some());
        }
        count
    };
    for (request, expected) in held.iter().zip([1, 2, 5]) {
        assert_eq!(old.release(&key("k"), request.token).await, EndOutcome::Released);
        assert_eq!(admitted().await, expected);
    }
}

pub async fn lowered_limit_waits_for_old_holders<S: Store>(env: &Environment<S>) {
    let (old, new) = (env.client().await, env.client().await);
    let held: [_; 4] = std::array::from_fn(|_| wanting(&old, of(1, 5)));
    for request in &held {
        old.expect_grant(request).await;
    }
    let waiting: [_; 2] = std::array::from_fn(|_| wanting(&new, of(1, 2)));
    for request in &waiting {
        assert_eq!(new.expect_queued(request).await.in_use, Some(5));
    }
    assert_eq!(rejected(&old, of(1, 5)).await, Some(5), "units are free, but the queue goes first");
    // The first new request fits after three of the four old holders have left, and the second after all four.
    for (request, expected) in held.iter().zip([[false, false], [false, false], [true, false], [true, true]]) {
        assert_eq!(old.release(&key("k"), request.token).await, EndOutcome::Released);
        for (request, expected) in waiting.iter().zip(expected) {
            assert_eq!(new.current_grant(&key("k"), request.token).await.is_some(), expected);
        }
    }
}

pub async fn force_released_holder_limits_nobody<S: Store>(env: &Environment<S>) {
    let (old, new) = (env.client().await, env.client().await);
    let fence = old.expect_grant(&wanting(&old, of(1, 2))).await.fence;
    new.expect_grant(&wanting(&new, of(1, 4))).await;
    let waiting = wanting(&new, of(3, 4));
    new.expect_queued(&waiting).await;
    let request = ForceReleaseRequest { key: key("k"), fence, reason: String::new() };
    assert_eq!(new.store.force_release(request).await.unwrap().outcome, ForceReleaseOutcome::Released);
    assert!(new.current_grant(&key("k"), waiting.token).await.is_some());
}

/// An acquire of the randomised case that may still hold or wait.
struct Call {
    client: usize,
    request: AcquireRequest,
    fence: Option<Fence>,
}

/// Runs random operations with random demands on the store and on the reference, and compares the states after each.
pub async fn random_limits_match_the_reference<S: Store>(env: &Environment<S>) {
    let mut random = Random::new(seed("random_limits_match_the_reference"));
    let k = key("k");
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(env.client().await);
    }
    let (mut reference, mut calls, mut last) = (Reference::<TokenId>::default(), Vec::<Call>::new(), None);
    let (mut most_held, mut waited) = (0, 0);
    for round in 0..400 {
        let chosen = random.below(3) as usize;
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
                let request = AcquireRequest { demand, enqueue, ..clients[chosen].request(&k) };
                let granted = reference.acquire(request.token, demand, enqueue);
                let in_use = reference.in_use();
                match clients[chosen].acquire(&request).await {
                    AcquireOutcome::Granted(_) => assert!(granted, "round {round}: {demand:?} was granted"),
                    AcquireOutcome::Queued(queued) => {
                        assert!(enqueue && !granted, "round {round}: {demand:?} was queued");
                        assert_eq!(queued.ahead as usize, reference.ahead(request.token).unwrap(), "round {round}");
                        assert_eq!(queued.in_use, in_use, "round {round}");
                    }
                    AcquireOutcome::Busy { in_use: reported, .. } => {
                        assert!(!enqueue && !granted, "round {round}: {demand:?} was rejected");
                        assert_eq!(reported, in_use, "round {round}");
                    }
                    other => panic!("round {round}: {other:?}"),
                }
                if granted || enqueue {
                    calls.push(Call { client: chosen, request, fence: None });
                }
            }
            (7..11, Some(at)) => {
                let call = calls.remove(at);
                let was_held = reference.end(call.request.token);
                let expected = if was_held { EndOutcome::Released } else { EndOutcome::Dequeued };
                let token = call.request.token;
                // Both operations end a hold or a wait.
                let ended = match random.below(2) {
                    0 => clients[chosen].store.release(&k, token, None).await,
                    _ => clients[chosen].store.abandon(&k, token).await,
                };
                assert_eq!(ended.unwrap().outcome, expected, "round {round}");
            }
            (11, Some(at)) => {
                // A repeated acquire gets the same answer.
                let Call { client, request, fence } = &calls[at];
                match clients[*client].acquire(request).await {
                    AcquireOutcome::Granted(granted) => assert_eq!(Some(granted.fence), *fence, "round {round}"),
                    AcquireOutcome::Queued(queued) => {
                        assert_eq!(Some(queued.ahead as usize), reference.ahead(request.token), "round {round}");
                    }
                    other => panic!("round {round}: {other:?}"),
                }
            }
            (12 | 13, Some(at)) => {
                let request = &calls[at].request;
                match clients[chosen].poll(&k, request.token).await {
                    PollOutcome::Granted(granted) => assert_eq!(Some(granted.fence), calls[at].fence, "round {round}"),
                    PollOutcome::Queued(queued) => {
                        assert_eq!(Some(queued.ahead as usize), reference.ahead(request.token), "round {round}");
                        assert_eq!(queued.in_use, reference.in_use(), "round {round}");
                    }
                    PollOutcome::Gone => panic!("round {round}: gone"),
                }
            }
            (14, Some(at)) => {
                let Some(fence) = calls[at].fence else { continue };
                let request = ForceReleaseRequest { key: k.clone(), fence, reason: String::new() };
                assert_eq!(
                    clients[chosen].store.force_release(request).await.unwrap().outcome,
                    ForceReleaseOutcome::Released
                );
                reference.end(calls.remove(at).request.token);
            }
            (_, Some(_)) => {
                let client = std::mem::replace(&mut clients[chosen], env.client().await);
                client.store.close_session(client.session).await.unwrap();
                let ended: Vec<_> = calls.extract_if(.., |call| call.client == chosen).collect();
                reference.end_all(&ended.iter().map(|call| call.request.token).collect::<Vec<_>>());
            }
        }
        let seen = clients[chosen].inspect(&k).await;
        let holders: Vec<_> = seen.holders.iter().map(|holder| (holder.units, holder.capacity)).collect();
        let waiters: Vec<_> = seen.waiters.iter().map(|waiter| (waiter.units, waiter.capacity)).collect();
        assert_eq!((holders, waiters), (reference.holders(), reference.waiters()), "round {round}");
        // Both lists are in grant order.
        for (holder, token) in seen.holders.iter().zip(reference.held()) {
            let call = calls.iter_mut().find(|call| call.request.token == token).expect("the holder's call is known");
            if call.fence.is_none() {
                assert!(Some(holder.fence) > last, "round {round}: the fence did not rise");
                (call.fence, last) = (Some(holder.fence), Some(holder.fence));
            }
            assert_eq!(call.fence, Some(holder.fence), "round {round}");
        }
        (most_held, waited) = (most_held.max(seen.holders.len()), waited.max(seen.waiters.len()));
    }
    assert!(most_held > 1 && waited > 1, "no holds were shared or no request waited, so this run proves nothing");
}
