//! Contention between threads: operations that start while another operation on the same key is running.

use std::future::Future;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use stanchion::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, Demand, EndOutcome, ForceReleaseOutcome,
    ForceReleaseRequest, PollOutcome,
};
use stanchion::{Store, TokenId};

use crate::environment::{Client, Environment, block_on, key, until};

/// Runs one job per client, each in its own thread, all started at once. Returns the clients and the results.
fn at_once<S: Store, T: Send, F: Future<Output = T>>(
    clients: Vec<Client<S>>,
    job: impl Fn(usize, Arc<Client<S>>) -> F + Sync,
) -> (Vec<Client<S>>, Vec<T>) {
    let gate = Barrier::new(clients.len());
    std::thread::scope(|scope| {
        let threads: Vec<_> = clients
            .into_iter()
            .enumerate()
            .map(|(at, client)| {
                let (gate, job) = (&gate, &job);
                scope.spawn(move || {
                    let client = Arc::new(client);
                    gate.wait();
                    let result = block_on(job(at, client.clone()));
                    (Arc::into_inner(client).expect("the job has dropped its client"), result)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).unzip()
    })
}

async fn several<S: Store>(env: &Environment<S>, count: usize) -> Vec<Client<S>> {
    let mut clients = Vec::new();
    for _ in 0..count {
        clients.push(env.client().await);
    }
    clients
}

pub async fn contending_threads_have_one_winner<S: Store>(env: &Environment<S>) {
    let mut clients = several(env, 6).await;
    let mut last = None;
    for round in 0..20 {
        let (returned, outcomes) = at_once(clients, |_, client| async move {
            let request = AcquireRequest { enqueue: false, ..client.request(&key("k")) };
            (request.token, client.acquire(&request).await)
        });
        clients = returned;
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
        assert_eq!(clients[0].release(&key("k"), won[0].0).await, EndOutcome::Released);
    }
}

pub async fn contended_semaphore_fills_its_capacity<S: Store>(env: &Environment<S>) {
    let mut clients = several(env, 6).await;
    for round in 0..10 {
        let (returned, outcomes) = at_once(clients, |_, client| async move {
            let demand = Demand::new(1, 4).unwrap();
            let request = AcquireRequest { enqueue: false, demand, ..client.request(&key("k")) };
            matches!(client.acquire(&request).await, AcquireOutcome::Granted(_)).then_some(request.token)
        });
        clients = returned;
        let won: Vec<TokenId> = outcomes.into_iter().flatten().collect();
        assert_eq!(won.len(), 4, "round {round}");
        let state = clients[0].inspect(&key("k")).await;
        assert!(state.holders.windows(2).all(|two| two[0].fence < two[1].fence), "each permit has its own fence");
        for token in won {
            clients[0].release(&key("k"), token).await;
        }
    }
}

pub async fn concurrent_repeats_are_one_hold<S: Store>(env: &Environment<S>) {
    let (mut clients, owner) = (several(env, 5).await, env.client().await);
    for _ in 0..10 {
        let request = owner.request(&key("k"));
        let (returned, outcomes) = at_once(clients, |_, client| {
            let request = request.clone();
            async move { client.acquire(&request).await }
        });
        clients = returned;
        assert!(outcomes.iter().all(|outcome| *outcome == outcomes[0]), "{outcomes:?}");
        assert!(matches!(outcomes[0], AcquireOutcome::Granted(_)));
        assert_eq!(owner.inspect(&key("k")).await.holders.len(), 1);
        assert_eq!(owner.release(&key("k"), request.token).await, EndOutcome::Released);
        assert!(!owner.is_locked(&key("k")).await, "one release is enough");
    }
}

pub async fn concurrent_ends_release_a_token_once<S: Store>(env: &Environment<S>) {
    let mut clients = several(env, 6).await;
    for round in 0..10 {
        let (token, granted) = clients[0].lock(&key("k")).await;
        let (returned, ended) = at_once(clients, |at, client| async move {
            match at % 3 {
                0 => client.release(&key("k"), token).await == EndOutcome::Released,
                1 => client.store.abandon(&key("k"), token).await.unwrap().outcome == EndOutcome::Released,
                _ => {
                    let request = ForceReleaseRequest { key: key("k"), fence: granted.fence, reason: String::new() };
                    client.store.force_release(request).await.unwrap().outcome == ForceReleaseOutcome::Released
                }
            }
        });
        clients = returned;
        assert_eq!(ended.iter().filter(|ended| **ended).count(), 1, "round {round}");
        clients[0].release(&key("k"), token).await;
    }
}

pub async fn concurrent_wrong_tokens_end_nothing<S: Store>(env: &Environment<S>) {
    let (clients, holder) = (several(env, 6).await, env.client().await);
    let (token, granted) = holder.lock(&key("k")).await;
    let (_, ended) = at_once(clients, |_, client| async move {
        let mut ended = false;
        for _ in 0..20 {
            ended |= client.release(&key("k"), TokenId::random().unwrap()).await != EndOutcome::Nothing;
        }
        ended
    });
    assert!(ended.iter().all(|ended| !ended));
    assert_eq!(holder.current_grant(&key("k"), token).await, Some(granted));
    assert_eq!(holder.release(&key("k"), token).await, EndOutcome::Released);
}

pub async fn adopting_threads_have_one_winner<S: Store>(env: &Environment<S>) {
    let mut clients = several(env, 5).await;
    for round in 0..8 {
        let (from, granted) = clients[0].lock(&key("k")).await;
        let (returned, outcomes) = at_once(clients, |_, client| async move {
            let request = client.request(&key("k"));
            let (to, not_after) = (request.token, request.not_after);
            let adopt = AdoptRequest { key: key("k"), from, to, session: client.session, not_after };
            (to, client.store.adopt(adopt).await.unwrap().outcome)
        });
        clients = returned;
        let adopted: Vec<_> = outcomes.iter().filter(|(_, outcome)| *outcome != AdoptOutcome::Gone).collect();
        assert_eq!(adopted.len(), 1, "round {round}: {outcomes:?}");
        assert_eq!(adopted[0].1, AdoptOutcome::Adopted { granted, session_bound: true });
        clients[0].release(&key("k"), adopted[0].0).await;
    }
}

pub async fn waiting_threads_never_overlap<S: Store>(env: &Environment<S>) {
    let inside = AtomicU32::new(0);
    let (returned, fences) = at_once(several(env, 6).await, |_, client| {
        let inside = &inside;
        async move {
            let mut fences = Vec::new();
            for _ in 0..25 {
                let request = client.request(&key("k"));
                client.acquire(&request).await;
                let held = async || client.current_grant(&key("k"), request.token).await.is_some();
                until("the request is granted", held).await;
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "another client is inside");
                fences.push(client.current_grant(&key("k"), request.token).await.unwrap().fence);
                std::thread::yield_now();
                inside.fetch_sub(1, Ordering::SeqCst);
                assert_eq!(client.release(&key("k"), request.token).await, EndOutcome::Released);
            }
            fences
        }
    });
    let mut all: Vec<_> = fences.iter().flatten().copied().collect();
    assert!(fences.iter().all(|of_client| of_client.is_sorted()));
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 150, "every grant has its own fence");
    assert!(returned[0].list("").await.is_empty());
}

pub async fn locked_counter_loses_no_increment<S: Store>(env: &Environment<S>) {
    let counter = AtomicU32::new(0);
    let (_, results) = at_once(several(env, 5).await, |_, client| {
        let counter = &counter;
        async move {
            let mut seen = Vec::new();
            for _ in 0..20 {
                let request = client.request(&key("counter"));
                client.acquire(&request).await;
                until("the request is granted", async || {
                    client.current_grant(&key("counter"), request.token).await.is_some()
                })
                .await;
                // The increment is split on purpose: only the lock makes it atomic.
                let read = counter.load(Ordering::SeqCst);
                std::thread::yield_now();
                counter.store(read + 1, Ordering::SeqCst);
                seen.push(read + 1);
                client.release(&key("counter"), request.token).await;
            }
            seen
        }
    });
    let mut seen: Vec<u32> = results.into_iter().flatten().collect();
    seen.sort_unstable();
    assert_eq!(seen, (1..=100).collect::<Vec<_>>());
}

pub async fn different_keys_never_block_each_other<S: Store>(env: &Environment<S>) {
    let clients = several(env, 6).await;
    let (_, busy) = at_once(clients, |at, client| async move {
        let own = key(&format!("k{at}"));
        let mut busy = 0;
        for _ in 0..30 {
            let request = AcquireRequest { enqueue: false, ..client.request(&own) };
            match client.acquire(&request).await {
                AcquireOutcome::Granted(_) => {
                    assert_eq!(client.release(&own, request.token).await, EndOutcome::Released)
                }
                _ => busy += 1,
            }
        }
        busy
    });
    assert_eq!(busy, vec![0; 6], "no other client uses this key");
}

pub async fn abandoning_threads_leave_nothing<S: Store>(env: &Environment<S>) {
    let (returned, _) = at_once(several(env, 6).await, |at, client| async move {
        for round in 0..25 {
            let request = client.request(&key("k"));
            client.acquire(&request).await;
            if (at + round) % 3 == 0 {
                // Abandon without a poll, whether the request was granted or not.
                assert_ne!(
                    client.store.abandon(&key("k"), request.token).await.unwrap().outcome,
                    EndOutcome::Nothing,
                    "the request was neither queued nor granted"
                );
            } else {
                until("the request is granted", async || {
                    client.current_grant(&key("k"), request.token).await.is_some()
                })
                .await;
                client.store.release(&key("k"), request.token, Some(Duration::ZERO)).await.unwrap();
            }
            assert_eq!(client.poll(&key("k"), request.token).await, PollOutcome::Gone);
        }
    });
    assert!(returned[0].list("").await.is_empty());
}

pub async fn sessions_closed_midway_leave_nothing<S: Store>(env: &Environment<S>) {
    for _ in 0..3 {
        let clients = several(env, 5).await;
        let (_, _) = at_once(clients, |at, client| async move {
            for round in 0..10 {
                let request = client.request(&key("k"));
                let outcome = client.acquire(&request).await;
                if at % 2 == 0 && round == 5 {
                    // The request may be queued or granted at this point.
                    client.store.close_session(client.session).await.unwrap();
                    return;
                }
                assert!(matches!(outcome, AcquireOutcome::Granted(_) | AcquireOutcome::Queued(_)), "{outcome:?}");
                until("the request is granted", async || {
                    client.current_grant(&key("k"), request.token).await.is_some()
                })
                .await;
                client.release(&key("k"), request.token).await;
            }
        });
    }
    assert!(env.client().await.list("").await.is_empty());
}
