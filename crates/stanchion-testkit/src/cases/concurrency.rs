//! Many at once, and random operations beside an oracle.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use stanchion::Store;
use stanchion::store::{AcquireOutcome, AcquireRequest, EndOutcome, PollOutcome};
use stanchion::{Fence, TokenId};
use tokio::task::LocalSet;

use crate::environment::{Environment, Random, key, seed};

pub async fn contending_tasks_have_one_winner<S: Store>(env: &Environment<S>) {
    let mut actors = Vec::new();
    for _ in 0..8 {
        actors.push(std::rc::Rc::new(env.actor().await));
    }
    for round in 0..20 {
        let local = LocalSet::new();
        let tries: Vec<_> = actors
            .iter()
            .map(|actor| {
                let actor = actor.clone();
                local.spawn_local(async move {
                    let request = AcquireRequest { enqueue: false, ..actor.request(&key("k")) };
                    matches!(actor.ask(&request).await, AcquireOutcome::Granted(_)).then_some(request.token)
                })
            })
            .collect();
        local.await;
        let mut winners = Vec::new();
        for one in tries {
            winners.extend(one.await.unwrap());
        }
        assert_eq!(winners.len(), 1, "round {round}");
        assert_eq!(actors[0].releases(&key("k"), winners[0]).await, EndOutcome::Released);
    }
    assert!(!actors[0].sees_held(&key("k")).await, "nothing is left");
}

pub async fn rapid_cycles_leave_nothing<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    for _ in 0..200 {
        let (token, _) = actor.takes(&key("k")).await;
        assert_eq!(actor.releases(&key("k"), token).await, EndOutcome::Released);
    }
    assert!(actor.lists("").await.is_empty());
}

/// What the oracle knows of a key.
#[derive(Default)]
struct Expected {
    held: Option<(usize, TokenId, Fence)>,
    queue: VecDeque<(usize, TokenId)>,
    last: Option<Fence>,
}

pub async fn random_operations_match_an_oracle<S: Store>(env: &Environment<S>) {
    let mut random = Random::new(seed("random_operations_match_an_oracle"));
    let mut actors = Vec::new();
    for _ in 0..4 {
        actors.push(env.actor().await);
    }
    let keys = ["a", "b", "c"].map(key);
    let mut expected: HashMap<usize, Expected> = HashMap::new();
    for step in 0..600 {
        let (k, who) = (random.below(3) as usize, random.below(4) as usize);
        let (key, actor) = (&keys[k], &actors[who]);
        let state = expected.entry(k).or_default();
        match random.below(7) {
            0 | 1 => {
                let enqueue = random.below(3) > 0;
                let request = AcquireRequest { enqueue, ..actor.request(key) };
                match actor.ask(&request).await {
                    AcquireOutcome::Granted(granted) => {
                        assert!(state.held.is_none(), "step {step}: granted beside a holder");
                        assert!(Some(granted.fence) > state.last, "step {step}");
                        state.last = Some(granted.fence);
                        state.held = Some((who, request.token, granted.fence));
                    }
                    AcquireOutcome::Queued(queued) => {
                        assert!(enqueue && state.held.is_some(), "step {step}");
                        assert_eq!(queued.ahead as usize, state.queue.len(), "step {step}");
                        state.queue.push_back((who, request.token));
                    }
                    AcquireOutcome::Busy { .. } => assert!(!enqueue && state.held.is_some(), "step {step}"),
                    other => panic!("step {step}: {other:?}"),
                }
            }
            2 | 3 => {
                let Some((_, token, _)) = state.held.take() else { continue };
                assert_eq!(actor.releases(key, token).await, EndOutcome::Released, "step {step}");
            }
            4 => {
                if state.queue.is_empty() {
                    continue;
                }
                let at = random.below(state.queue.len() as u64) as usize;
                let (_, token) = state.queue.remove(at).unwrap();
                assert_eq!(actor.store.abandon(key, token).await.unwrap().outcome, EndOutcome::Dequeued, "step {step}");
            }
            5 => {
                let stranger = TokenId::random().unwrap();
                assert_eq!(actor.releases(key, stranger).await, EndOutcome::Nothing, "step {step}");
                assert_eq!(actor.polls(key, stranger).await, PollOutcome::Gone, "step {step}");
            }
            _ => env.pass(Duration::from_micros(200)).await,
        }
        // A release hands on.
        if state.held.is_none()
            && let Some((next, token)) = state.queue.pop_front()
        {
            let granted = actors[next].granted(key, token).await.expect("the head was granted");
            assert!(Some(granted.fence) > state.last, "step {step}");
            state.last = Some(granted.fence);
            state.held = Some((next, token, granted.fence));
        }
        let seen = actor.sees(key).await;
        let holders: Vec<_> = seen.holders.iter().map(|holder| holder.fence).collect();
        let fences: Vec<_> = state.held.iter().map(|(_, _, fence)| *fence).collect();
        assert_eq!(holders, fences, "step {step}");
        assert_eq!(seen.waiters.len(), state.queue.len(), "step {step}");
    }
    assert!(expected.values().all(|state| state.last.is_some()), "a run that granted nothing shows nothing");
}
