//! Runs many tasks at once, and compares random operations with an oracle.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use stanchion::Store;
use stanchion::store::{AcquireOutcome, AcquireRequest, EndOutcome, PollOutcome};
use stanchion::{Fence, TokenId};
use tokio::task::LocalSet;

use crate::environment::{Environment, Random, key, seed};

pub async fn contending_tasks_have_one_winner<S: Store>(env: &Environment<S>) {
    let mut clients = Vec::new();
    for _ in 0..8 {
        clients.push(std::rc::Rc::new(env.client().await));
    }
    for round in 0..20 {
        let local = LocalSet::new();
        let tries: Vec<_> = clients
            .iter()
            .map(|client| {
                let client = client.clone();
                local.spawn_local(async move {
                    let request = AcquireRequest { enqueue: false, ..client.request(&key("k")) };
                    matches!(client.acquire(&request).await, AcquireOutcome::Granted(_)).then_some(request.token)
                })
            })
            .collect();
        local.await;
        let mut winners = Vec::new();
        for attempt in tries {
            winners.extend(attempt.await.unwrap());
        }
        assert_eq!(winners.len(), 1, "round {round}");
        assert_eq!(clients[0].release(&key("k"), winners[0]).await, EndOutcome::Released);
    }
    assert!(!clients[0].is_locked(&key("k")).await, "the key is free at the end");
}

pub async fn rapid_cycles_leave_nothing<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    for _ in 0..200 {
        let (token, _) = client.lock(&key("k")).await;
        assert_eq!(client.release(&key("k"), token).await, EndOutcome::Released);
    }
    assert!(client.list("").await.is_empty());
}

/// State that the oracle expects of a key.
#[derive(Default)]
struct Expected {
    held: Option<(usize, TokenId, Fence)>,
    queue: VecDeque<(usize, TokenId)>,
    last: Option<Fence>,
}

pub async fn random_operations_match_an_oracle<S: Store>(env: &Environment<S>) {
    let mut random = Random::new(seed("random_operations_match_an_oracle"));
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(env.client().await);
    }
    let keys = ["a", "b", "c"].map(key);
    let mut expected: HashMap<usize, Expected> = HashMap::new();
    for round in 0..600 {
        let (k, chosen) = (random.below(3) as usize, random.below(4) as usize);
        let (key, client) = (&keys[k], &clients[chosen]);
        let state = expected.entry(k).or_default();
        match random.below(7) {
            0 | 1 => {
                let enqueue = random.below(3) > 0;
                let request = AcquireRequest { enqueue, ..client.request(key) };
                match client.acquire(&request).await {
                    AcquireOutcome::Granted(granted) => {
                        assert!(state.held.is_none(), "round {round}: granted while another client holds the key");
                        assert!(Some(granted.fence) > state.last, "round {round}");
                        state.last = Some(granted.fence);
                        state.held = Some((chosen, request.token, granted.fence));
                    }
                    AcquireOutcome::Queued(queued) => {
                        assert!(enqueue && state.held.is_some(), "round {round}");
                        assert_eq!(queued.ahead as usize, state.queue.len(), "round {round}");
                        state.queue.push_back((chosen, request.token));
                    }
                    AcquireOutcome::Busy { .. } => assert!(!enqueue && state.held.is_some(), "round {round}"),
                    other => panic!("round {round}: {other:?}"),
                }
            }
            2 | 3 => {
                let Some((_, token, _)) = state.held.take() else { continue };
                assert_eq!(client.release(key, token).await, EndOutcome::Released, "round {round}");
            }
            4 => {
                if state.queue.is_empty() {
                    continue;
                }
                let at = random.below(state.queue.len() as u64) as usize;
                let (_, token) = state.queue.remove(at).unwrap();
                assert_eq!(
                    client.store.abandon(key, token).await.unwrap().outcome,
                    EndOutcome::Dequeued,
                    "round {round}"
                );
            }
            5 => {
                let stranger = TokenId::random().unwrap();
                assert_eq!(client.release(key, stranger).await, EndOutcome::Nothing, "round {round}");
                assert_eq!(client.poll(key, stranger).await, PollOutcome::Gone, "round {round}");
            }
            _ => env.advance(Duration::from_micros(200)).await,
        }
        // A release hands the key to the head of the queue.
        if state.held.is_none()
            && let Some((next, token)) = state.queue.pop_front()
        {
            let granted = clients[next].current_grant(key, token).await.expect("the head of the queue has a grant");
            assert!(Some(granted.fence) > state.last, "round {round}");
            state.last = Some(granted.fence);
            state.held = Some((next, token, granted.fence));
        }
        let seen = client.inspect(key).await;
        let holders: Vec<_> = seen.holders.iter().map(|holder| holder.fence).collect();
        let fences: Vec<_> = state.held.iter().map(|(_, _, fence)| *fence).collect();
        assert_eq!(holders, fences, "round {round}");
        assert_eq!(seen.waiters.len(), state.queue.len(), "round {round}");
    }
    assert!(expected.values().all(|state| state.last.is_some()), "a run that granted nothing shows nothing");
}
