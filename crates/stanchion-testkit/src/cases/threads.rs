//! Many at once, each in a thread of its own: steps that meet in the middle of another.

use std::future::Future;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use stanchion::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, Demand, EndOutcome, ForceReleaseOutcome,
    ForceReleaseRequest, PollOutcome,
};
use stanchion::{Store, TokenId};

use crate::environment::{Actor, Environment, block_on, key, until};

/// Runs one job per actor, each in a thread, all let go at once. Gives the actors back.
fn at_once<S: Store, T: Send, F: Future<Output = T>>(
    actors: Vec<Actor<S>>,
    job: impl Fn(usize, Arc<Actor<S>>) -> F + Sync,
) -> (Vec<Actor<S>>, Vec<T>) {
    let gate = Barrier::new(actors.len());
    std::thread::scope(|scope| {
        let threads: Vec<_> = actors
            .into_iter()
            .enumerate()
            .map(|(at, actor)| {
                let (gate, job) = (&gate, &job);
                scope.spawn(move || {
                    let actor = Arc::new(actor);
                    gate.wait();
                    let result = block_on(job(at, actor.clone()));
                    (Arc::into_inner(actor).expect("a job keeps no actor"), result)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).unzip()
    })
}

async fn several<S: Store>(env: &Environment<S>, count: usize) -> Vec<Actor<S>> {
    let mut actors = Vec::new();
    for _ in 0..count {
        actors.push(env.actor().await);
    }
    actors
}

pub async fn contending_threads_have_one_winner<S: Store>(env: &Environment<S>) {
    let mut actors = several(env, 6).await;
    let mut last = None;
    for round in 0..20 {
        let (back, outcomes) = at_once(actors, |_, actor| async move {
            let request = AcquireRequest { enqueue: false, ..actor.request(&key("k")) };
            (request.token, actor.ask(&request).await)
        });
        actors = back;
        let won: Vec<_> = outcomes
            .iter()
            .filter_map(|(token, outcome)| match outcome {
                AcquireOutcome::Granted(granted) => Some((*token, granted.fence)),
                _ => None,
            })
            .collect();
        assert_eq!(won.len(), 1, "round {round}: {outcomes:?}");
        assert!(Some(won[0].1) > last, "round {round}");
        last = Some(won[0].1);
        assert_eq!(actors[0].releases(&key("k"), won[0].0).await, EndOutcome::Released);
    }
}

pub async fn contended_semaphore_fills_its_capacity<S: Store>(env: &Environment<S>) {
    let mut actors = several(env, 6).await;
    for round in 0..10 {
        let (back, outcomes) = at_once(actors, |_, actor| async move {
            let demand = Demand::new(1, 4).unwrap();
            let request = AcquireRequest { enqueue: false, demand, ..actor.request(&key("k")) };
            matches!(actor.ask(&request).await, AcquireOutcome::Granted(_)).then_some(request.token)
        });
        actors = back;
        let won: Vec<TokenId> = outcomes.into_iter().flatten().collect();
        assert_eq!(won.len(), 4, "round {round}");
        let state = actors[0].sees(&key("k")).await;
        assert!(state.holders.windows(2).all(|two| two[0].fence < two[1].fence), "a fence each");
        for token in won {
            actors[0].releases(&key("k"), token).await;
        }
    }
}

pub async fn concurrent_repeats_are_one_hold<S: Store>(env: &Environment<S>) {
    let (mut actors, asker) = (several(env, 5).await, env.actor().await);
    for _ in 0..10 {
        let request = asker.request(&key("k"));
        let (back, outcomes) = at_once(actors, |_, actor| {
            let request = request.clone();
            async move { actor.ask(&request).await }
        });
        actors = back;
        assert!(outcomes.iter().all(|outcome| *outcome == outcomes[0]), "{outcomes:?}");
        assert!(matches!(outcomes[0], AcquireOutcome::Granted(_)));
        assert_eq!(asker.sees(&key("k")).await.holders.len(), 1);
        assert_eq!(asker.releases(&key("k"), request.token).await, EndOutcome::Released);
        assert!(!asker.sees_held(&key("k")).await, "one release is enough");
    }
}

pub async fn concurrent_ends_release_a_token_once<S: Store>(env: &Environment<S>) {
    let mut actors = several(env, 6).await;
    for round in 0..10 {
        let (token, granted) = actors[0].takes(&key("k")).await;
        let (back, ended) = at_once(actors, |at, actor| async move {
            match at % 3 {
                0 => actor.releases(&key("k"), token).await == EndOutcome::Released,
                1 => actor.store.abandon(&key("k"), token).await.unwrap().outcome == EndOutcome::Released,
                _ => {
                    let request = ForceReleaseRequest { key: key("k"), fence: granted.fence, reason: String::new() };
                    actor.store.force_release(request).await.unwrap().outcome == ForceReleaseOutcome::Released
                }
            }
        });
        actors = back;
        assert_eq!(ended.iter().filter(|ended| **ended).count(), 1, "round {round}");
        actors[0].releases(&key("k"), token).await;
    }
}

pub async fn concurrent_wrong_tokens_end_nothing<S: Store>(env: &Environment<S>) {
    let (actors, holder) = (several(env, 6).await, env.actor().await);
    let (token, granted) = holder.takes(&key("k")).await;
    let (_, ended) = at_once(actors, |_, actor| async move {
        let mut ended = false;
        for _ in 0..20 {
            ended |= actor.releases(&key("k"), TokenId::random().unwrap()).await != EndOutcome::Nothing;
        }
        ended
    });
    assert!(ended.iter().all(|ended| !ended));
    assert_eq!(holder.granted(&key("k"), token).await, Some(granted));
    assert_eq!(holder.releases(&key("k"), token).await, EndOutcome::Released);
}

pub async fn adopting_threads_have_one_winner<S: Store>(env: &Environment<S>) {
    let mut actors = several(env, 5).await;
    for round in 0..8 {
        let (from, granted) = actors[0].takes(&key("k")).await;
        let (back, outcomes) = at_once(actors, |_, actor| async move {
            let request = actor.request(&key("k"));
            let (to, not_after) = (request.token, request.not_after);
            let adopt = AdoptRequest { key: key("k"), from, to, session: actor.session, not_after };
            (to, actor.store.adopt(adopt).await.unwrap().outcome)
        });
        actors = back;
        let adopted: Vec<_> = outcomes.iter().filter(|(_, outcome)| *outcome != AdoptOutcome::Gone).collect();
        assert_eq!(adopted.len(), 1, "round {round}: {outcomes:?}");
        assert_eq!(adopted[0].1, AdoptOutcome::Adopted { granted, session_bound: true });
        actors[0].releases(&key("k"), adopted[0].0).await;
    }
}

pub async fn waiting_threads_never_overlap<S: Store>(env: &Environment<S>) {
    let inside = AtomicU32::new(0);
    let (back, fences) = at_once(several(env, 6).await, |_, actor| {
        let inside = &inside;
        async move {
            let mut fences = Vec::new();
            for _ in 0..25 {
                let request = actor.request(&key("k"));
                actor.ask(&request).await;
                let held = async || actor.granted(&key("k"), request.token).await.is_some();
                until("its turn", held).await;
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "somebody is inside");
                fences.push(actor.granted(&key("k"), request.token).await.unwrap().fence);
                std::thread::yield_now();
                inside.fetch_sub(1, Ordering::SeqCst);
                assert_eq!(actor.releases(&key("k"), request.token).await, EndOutcome::Released);
            }
            fences
        }
    });
    let mut all: Vec<_> = fences.iter().flatten().copied().collect();
    assert!(fences.iter().all(|of_one| of_one.is_sorted()));
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 150, "every grant has a fence of its own");
    assert!(back[0].lists("").await.is_empty());
}

pub async fn locked_counter_loses_no_increment<S: Store>(env: &Environment<S>) {
    let counter = AtomicU32::new(0);
    let (_, results) = at_once(several(env, 5).await, |_, actor| {
        let counter = &counter;
        async move {
            let mut seen = Vec::new();
            for _ in 0..20 {
                let request = actor.request(&key("counter"));
                actor.ask(&request).await;
                until("its turn", async || actor.granted(&key("counter"), request.token).await.is_some()).await;
                // Not atomic on purpose: the lock is what makes it one.
                let read = counter.load(Ordering::SeqCst);
                std::thread::yield_now();
                counter.store(read + 1, Ordering::SeqCst);
                seen.push(read + 1);
                actor.releases(&key("counter"), request.token).await;
            }
            seen
        }
    });
    let mut seen: Vec<u32> = results.into_iter().flatten().collect();
    seen.sort_unstable();
    assert_eq!(seen, (1..=100).collect::<Vec<_>>());
}

pub async fn different_keys_never_block_each_other<S: Store>(env: &Environment<S>) {
    let actors = several(env, 6).await;
    let (_, busy) = at_once(actors, |at, actor| async move {
        let own = key(&format!("k{at}"));
        let mut busy = 0;
        for _ in 0..30 {
            let request = AcquireRequest { enqueue: false, ..actor.request(&own) };
            match actor.ask(&request).await {
                AcquireOutcome::Granted(_) => {
                    assert_eq!(actor.releases(&own, request.token).await, EndOutcome::Released)
                }
                _ => busy += 1,
            }
        }
        busy
    });
    assert_eq!(busy, vec![0; 6], "nobody else wants it");
}

pub async fn abandoning_threads_leave_nothing<S: Store>(env: &Environment<S>) {
    let (back, _) = at_once(several(env, 6).await, |at, actor| async move {
        for round in 0..25 {
            let request = actor.request(&key("k"));
            actor.ask(&request).await;
            if (at + round) % 3 == 0 {
                // Gives up without having looked whether it has been granted meanwhile.
                assert_ne!(
                    actor.store.abandon(&key("k"), request.token).await.unwrap().outcome,
                    EndOutcome::Nothing,
                    "it waited or held"
                );
            } else {
                until("its turn", async || actor.granted(&key("k"), request.token).await.is_some()).await;
                actor.store.release(&key("k"), request.token, Some(Duration::ZERO)).await.unwrap();
            }
            assert_eq!(actor.polls(&key("k"), request.token).await, PollOutcome::Gone);
        }
    });
    assert!(back[0].lists("").await.is_empty());
}

pub async fn sessions_closed_midway_leave_nothing<S: Store>(env: &Environment<S>) {
    for _ in 0..3 {
        let actors = several(env, 5).await;
        let (_, _) = at_once(actors, |at, actor| async move {
            for round in 0..10 {
                let request = actor.request(&key("k"));
                let outcome = actor.ask(&request).await;
                if at % 2 == 0 && round == 5 {
                    // Waiting or holding, as it comes.
                    actor.store.close_session(actor.session).await.unwrap();
                    return;
                }
                assert!(matches!(outcome, AcquireOutcome::Granted(_) | AcquireOutcome::Queued(_)), "{outcome:?}");
                until("its turn", async || actor.granted(&key("k"), request.token).await.is_some()).await;
                actor.releases(&key("k"), request.token).await;
            }
        });
    }
    assert!(env.actor().await.lists("").await.is_empty());
}
