//! Compares the store with the memory store, operation by operation.

use std::collections::HashMap;
use std::time::Duration;

use stanchion::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, Demand, ForceReleaseOutcome, ForceReleaseRequest,
    Granted, KeyState, Lifetime, LingerOutcome, Memory, PollOutcome, Queued, RenewOutcome,
};
use stanchion::{Fence, Key, Store, TokenId};

use super::lingering::mark;
use crate::environment::{Client, Random, key};
use crate::{Environment, seed};

/// Lifetimes and cooldowns that outlast the test: time decides nothing here.
const HOUR: Duration = Duration::from_secs(3_600);

/// An acquire that was granted or queued, and may have ended since.
struct Call {
    client: usize,
    key: Key,
    token: TokenId,
    demand: Demand,
    lifetime: Lifetime,
    enqueue: bool,
    /// The request can be sent again: the token and its session are those of the request.
    can_repeat: bool,
}

impl Call {
    fn request<S: Store>(&self, client: &Client<S>) -> AcquireRequest {
        let Self { token, demand, lifetime, enqueue, .. } = *self;
        AcquireRequest { token, demand, lifetime, enqueue, ..client.request(&self.key) }
    }
}

/// The fences of the two stores that belong to the same grant.
#[derive(Default)]
struct Fences(HashMap<Key, Vec<(Fence, Fence)>>);

impl Fences {
    /// Fails the test unless both fences belong to one grant: to a known grant, or to another one with the same place in the
    /// order of all known grants. A grant may be seen after a later one, because one operation can make several.
    fn compare(&mut self, key: &Key, real: Fence, memory: Fence, round: usize) {
        let known = self.0.entry(key.clone()).or_default();
        if known.contains(&(real, memory)) {
            return;
        }
        let has_its_place = known.iter().all(|(a, b)| *a != real && *b != memory && (*a < real) == (*b < memory));
        assert!(has_its_place, "round {round}, {key}: {real} and {memory} are not of one grant: {known:?}");
        known.push((real, memory));
    }

    fn granted(&mut self, key: &Key, (real, memory): (Granted, Granted), round: usize) {
        assert_eq!(real.remaining.is_some(), memory.remaining.is_some(), "round {round}, {key}");
        self.compare(key, real.fence, memory.fence, round);
    }

    fn state(&mut self, (real, memory): (&KeyState, &KeyState), round: usize) {
        let key = &real.key;
        let shape = |state: &KeyState| {
            let holders = state
                .holders
                .iter()
                .map(|one| (one.units, one.capacity, one.session_bound, one.remaining.is_some(), one.lingers));
            let waiters = state.waiters.iter().map(|one| (one.units, one.capacity));
            (holders.collect::<Vec<_>>(), waiters.collect::<Vec<_>>(), state.closed_for.is_some())
        };
        assert_eq!(shape(real), shape(memory), "round {round}, {key}");
        for (one, other) in real.holders.iter().zip(&memory.holders) {
            self.compare(key, one.fence, other.fence, round);
        }
    }
}

fn queued(real: Queued, memory: Queued, round: usize) {
    assert_eq!((real.ahead, real.in_use), (memory.ahead, memory.in_use), "round {round}");
}

/// Evaluates an operation on a client of the store and on the same client of the memory store.
macro_rules! both {
    ($clients:ident, $at:expr, $one:ident, $operation:expr) => {{
        let (real, memory) = &$clients[$at];
        let real = {
            let $one = real;
            $operation
        };
        let memory = {
            let $one = memory;
            $operation
        };
        (real, memory)
    }};
}

/// Returns a client whose holds can linger, because its session hears recalls.
async fn client_that_hears<S: Store>(env: &Environment<S>) -> Client<S> {
    let client = env.client().await;
    let (token, _) = client.lock(&key("scratch")).await;
    mark(&client, "scratch", token).await;
    client.release(&key("scratch"), token).await;
    client
}

/// Runs random operations of all kinds on the store and on the memory store, and compares all outcomes.
pub async fn random_operations_match_memory<S: Store>(env: &Environment<S>) {
    let mut random = Random::new(seed("random_operations_match_memory"));
    let shared = Memory::new();
    let model = Environment::new(move || shared.clone());
    let keys: Vec<Key> = (0..4).map(|number| key(&format!("k{number}"))).collect();
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push((client_that_hears(env).await, model.client().await));
    }
    let (mut fences, mut calls) = (Fences::default(), Vec::<Call>::new());
    for round in 0..300 {
        let chosen = random.below(3) as usize;
        let some = (!calls.is_empty()).then(|| random.below(calls.len() as u64) as usize);
        let k = &keys[random.below(4) as usize];
        match (random.below(22), some) {
            (0..6, _) | (_, None) => {
                let capacity = 1 + random.below(4) as u32;
                let demand = match random.below(5) {
                    0 | 1 => Demand::MUTEX,
                    2 => Demand::READ,
                    _ => Demand::new(1 + random.below(capacity.into()) as u32, capacity).unwrap(),
                };
                let enqueue = random.below(4) > 0;
                let lifetime = match random.below(4) {
                    // A store may end a fixed hold with its session until the caller has learned of the grant (rule 2).
                    0 if !enqueue => Lifetime::Fixed(HOUR),
                    1 => Lifetime::Session { max_hold: Some(HOUR) },
                    _ => Lifetime::Session { max_hold: None },
                };
                let (key, token) = (k.clone(), TokenId::random().unwrap());
                let call = Call { client: chosen, key, token, demand, lifetime, enqueue, can_repeat: true };
                match both!(clients, chosen, one, one.acquire(&call.request(one)).await) {
                    (AcquireOutcome::Granted(real), AcquireOutcome::Granted(memory)) => {
                        fences.granted(k, (real, memory), round);
                        calls.push(call);
                    }
                    (AcquireOutcome::Queued(real), AcquireOutcome::Queued(memory)) => {
                        queued(real, memory, round);
                        calls.push(call);
                    }
                    (
                        AcquireOutcome::Busy { in_use: real, lingers: one, .. },
                        AcquireOutcome::Busy { in_use: memory, lingers: other, .. },
                    ) => assert_eq!((real, one), (memory, other), "round {round}"),
                    differing => panic!("round {round}: {demand:?}, {lifetime:?} on {k}: {differing:?}"),
                }
            }
            (6, Some(at)) if calls[at].can_repeat => {
                let call = &calls[at];
                match both!(clients, call.client, one, one.acquire(&call.request(one)).await) {
                    (AcquireOutcome::Granted(real), AcquireOutcome::Granted(memory)) => {
                        fences.granted(&call.key, (real, memory), round);
                    }
                    (AcquireOutcome::Queued(real), AcquireOutcome::Queued(memory)) => queued(real, memory, round),
                    (AcquireOutcome::Busy { .. }, AcquireOutcome::Busy { .. }) => drop(calls.remove(at)),
                    (real, memory) => {
                        assert_eq!(real, memory, "round {round}");
                        calls.remove(at);
                    }
                }
            }
            (7..10, Some(at)) => {
                let Call { key, token, .. } = calls.remove(at);
                let cooldown = (random.below(12) == 0).then_some(HOUR);
                let (real, memory) =
                    both!(clients, chosen, one, one.store.release(&key, token, cooldown).await.unwrap().outcome);
                assert_eq!(real, memory, "round {round}: release on {key}");
            }
            (10, Some(at)) => {
                let Call { key, token, .. } = calls.remove(at);
                let (real, memory) = both!(clients, chosen, one, one.store.abandon(&key, token).await.unwrap().outcome);
                assert_eq!(real, memory, "round {round}: abandon on {key}");
            }
            (11 | 12, Some(at)) => {
                let key = calls[at].key.clone();
                let of_key = calls.iter().filter(|call| call.key == key);
                let tokens: Vec<TokenId> = of_key.map(|call| call.token).chain([TokenId::random().unwrap()]).collect();
                let (real, memory) = both!(clients, chosen, one, one.store.poll(&key, &tokens).await.unwrap().outcome);
                assert_eq!((real.len(), memory.len()), (tokens.len(), tokens.len()), "round {round}");
                for outcomes in real.into_iter().zip(memory) {
                    match outcomes {
                        (PollOutcome::Granted(real), PollOutcome::Granted(memory)) => {
                            fences.granted(&key, (real, memory), round);
                        }
                        (PollOutcome::Queued(real), PollOutcome::Queued(memory)) => queued(real, memory, round),
                        (real, memory) => assert_eq!(real, memory, "round {round}: poll on {key}"),
                    }
                }
            }
            (13, Some(at)) => {
                let Call { key, token, .. } = &calls[at];
                let (real, memory) =
                    both!(clients, chosen, one, one.store.extend(key, *token, 2 * HOUR).await.unwrap().outcome);
                assert_eq!(real, memory, "round {round}: extend on {key}");
            }
            (14, Some(at)) => {
                let (call, to) = (&calls[at], TokenId::random().unwrap());
                let (key, from) = (call.key.clone(), call.token);
                let outcomes = both!(clients, chosen, one, {
                    let request = AdoptRequest {
                        key: key.clone(),
                        from,
                        to,
                        session: one.session,
                        not_after: one.request(&key).not_after,
                    };
                    one.store.adopt(request).await.unwrap().outcome
                });
                match outcomes {
                    (
                        AdoptOutcome::Adopted { granted: real, session_bound: one },
                        AdoptOutcome::Adopted { granted: memory, session_bound: other },
                    ) => {
                        assert_eq!(one, other, "round {round}");
                        fences.granted(&key, (real, memory), round);
                        (calls[at].token, calls[at].client, calls[at].can_repeat) = (to, chosen, false);
                    }
                    (real, memory) => assert_eq!(real, memory, "round {round}: adopt on {key}"),
                }
            }
            (15 | 16, Some(_)) => {
                let known = fences.0.entry(k.clone()).or_default();
                known.sort();
                let Some(last) = known.len().checked_sub(1) else { continue };
                // Sometimes the fence of a hold that has ended.
                let (real_fence, memory_fence) = known[last - (random.below(3) as usize).min(last)];
                let request = |fence| ForceReleaseRequest { key: k.clone(), fence, reason: "differential".into() };
                let (real, memory) = &clients[chosen];
                let real = real.store.force_release(request(real_fence)).await.unwrap().outcome;
                let memory = memory.store.force_release(request(memory_fence)).await.unwrap().outcome;
                match (real, memory) {
                    (ForceReleaseOutcome::Released, ForceReleaseOutcome::Released) => {}
                    (ForceReleaseOutcome::NoSuchHold { live: a }, ForceReleaseOutcome::NoSuchHold { live: b }) => {
                        assert_eq!(a.len(), b.len(), "round {round}");
                    }
                    differing => panic!("round {round}: force-release on {k}: {differing:?}"),
                }
            }
            (17, Some(_)) => {
                let (real, memory) =
                    both!(clients, chosen, one, one.store.renew_session(one.session).await.unwrap().outcome);
                let losses = |outcome: RenewOutcome| match outcome {
                    RenewOutcome::Alive { lost } => {
                        let mut lost: Vec<_> =
                            lost.into_iter().map(|lost| (lost.token, lost.key, lost.reason)).collect();
                        lost.sort();
                        Some(lost)
                    }
                    RenewOutcome::Gone => None,
                };
                assert_eq!(losses(real), losses(memory), "round {round}: renew");
            }
            (18, Some(_)) => {
                let (real, memory) =
                    std::mem::replace(&mut clients[chosen], (client_that_hears(env).await, model.client().await));
                real.store.close_session(real.session).await.unwrap();
                memory.store.close_session(memory.session).await.unwrap();
                // Its tokens belong to no open session. Fixed holds live on.
                calls.retain(|call| call.client != chosen || matches!(call.lifetime, Lifetime::Fixed(_)));
                calls.iter_mut().filter(|call| call.client == chosen).for_each(|call| call.can_repeat = false);
            }
            (19 | 20, Some(at)) => {
                let Call { key, token, .. } = &calls[at];
                match both!(clients, chosen, one, one.store.linger(key, *token).await.unwrap().outcome) {
                    (
                        LingerOutcome::Lingers { fence: real, up_to: real_end },
                        LingerOutcome::Lingers { fence: memory, up_to: memory_end },
                    ) => {
                        fences.compare(key, real, memory, round);
                        // The clocks differ, so the reserved fences do too.
                        assert!(real_end >= real && memory_end >= memory, "round {round}: linger on {key}");
                    }
                    (real, memory) => assert_eq!(real, memory, "round {round}: linger on {key}"),
                }
            }
            (_, Some(_)) => {
                let (real, memory) = both!(clients, chosen, one, one.list("").await);
                let names = |states: &[KeyState]| states.iter().map(|state| state.key.clone()).collect::<Vec<_>>();
                assert_eq!(names(&real), names(&memory), "round {round}: list");
                real.iter().zip(&memory).for_each(|states| fences.state(states, round));
            }
        }
        let (real, memory) = both!(clients, chosen, one, one.inspect(k).await);
        fences.state((&real, &memory), round);
    }
}
