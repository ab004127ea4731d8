//! Messages that are late, repeated or lost, and polls.

use std::time::Duration;

use stanchion::Store;
use stanchion::TokenId;
use stanchion::store::{AcquireOutcome, AcquireRequest, Demand, EndOutcome, Lifetime, PollOutcome, StoreTime};

use crate::environment::{Environment, key};

pub async fn reply_times_never_decrease<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let mut last = StoreTime::from_micros(0);
    for _ in 0..5 {
        env.advance(Duration::from_millis(2)).await;
        let request = client.request(&key("k"));
        let times = [
            client.store.acquire(request.clone()).await.unwrap().time,
            client.store.poll(&key("k"), &[request.token]).await.unwrap().time,
            client.store.inspect(&key("k")).await.unwrap().time,
            client.store.renew_session(client.session).await.unwrap().time,
            client.store.release(&key("k"), request.token, None).await.unwrap().time,
        ];
        for time in times {
            assert!(time >= last);
            last = time;
        }
    }
}

pub async fn late_acquire_changes_nothing<S: Store>(env: &Environment<S>) {
    let (client, holder) = (env.client().await, env.client().await);
    let now = client.store.inspect(&key("k")).await.unwrap().time;
    env.advance(Duration::from_millis(20)).await;
    let late = AcquireRequest { not_after: now, ..client.request(&key("k")) };
    assert_eq!(client.acquire(&late).await, AcquireOutcome::Stale);
    assert!(!client.is_locked(&key("k")).await);
    holder.lock(&key("k")).await;
    assert_eq!(client.acquire(&late).await, AcquireOutcome::Stale, "a late acquire is not queued either");
    assert!(client.inspect(&key("k")).await.waiters.is_empty());
}

pub async fn acquire_after_abandon_can_be_abandoned<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let request = client.request(&key("k"));
    assert_eq!(client.store.abandon(&key("k"), request.token).await.unwrap().outcome, EndOutcome::Nothing);
    // The store keeps no record of ended tokens, so an acquire that arrives before its `not_after` still counts.
    client.expect_grant(&request).await;
    assert_eq!(client.store.abandon(&key("k"), request.token).await.unwrap().outcome, EndOutcome::Released);
    let now = client.store.inspect(&key("k")).await.unwrap().time;
    env.advance(Duration::from_millis(20)).await;
    let late = AcquireRequest { not_after: now, ..request };
    assert_eq!(client.acquire(&late).await, AcquireOutcome::Stale, "an acquire after its `not_after` never counts");
}

pub async fn poll_never_creates<S: Store>(env: &Environment<S>) {
    let (holder, other) = (env.client().await, env.client().await);
    let unknown = TokenId::random().unwrap();
    assert_eq!(other.poll(&key("k"), unknown).await, PollOutcome::Gone);
    let (token, _) = holder.lock(&key("k")).await;
    assert_eq!(other.poll(&key("k"), unknown).await, PollOutcome::Gone);
    let waiting = other.enqueue(&key("k")).await;
    other.store.abandon(&key("k"), waiting).await.unwrap();
    assert_eq!(other.poll(&key("k"), waiting).await, PollOutcome::Gone, "a late poll revives no token");
    holder.release(&key("k"), token).await;
    assert_eq!(other.poll(&key("k"), waiting).await, PollOutcome::Gone);
    assert!(!other.is_locked(&key("k")).await && other.inspect(&key("k")).await.waiters.is_empty());
}

/// A handle polls a key for all of its waiters at once, so the tokens may be few or many, unknown or repeated.
pub async fn poll_answers_in_token_order<S: Store>(env: &Environment<S>) {
    let (holder, other) = (env.client().await, env.client().await);
    let (held, granted) = holder.lock(&key("k")).await;
    let mut waiting = Vec::new();
    for place in 0..20 {
        waiting.push(if place % 2 == 0 { holder.enqueue(&key("k")).await } else { other.enqueue(&key("k")).await });
    }
    let unknown = TokenId::random().unwrap();
    let few = vec![unknown, waiting[5], held, waiting[0], waiting[5]];
    let mut many: Vec<TokenId> = waiting.iter().rev().copied().collect();
    many.extend(few.iter().copied());
    for tokens in [Vec::new(), few, many, vec![held; 10], vec![unknown; 10]] {
        let outcomes = other.store.poll(&key("k"), &tokens).await.unwrap().outcome;
        assert_eq!(outcomes.len(), tokens.len());
        for (token, outcome) in tokens.iter().zip(outcomes) {
            match outcome {
                PollOutcome::Granted(got) => assert_eq!((*token, got), (held, granted)),
                PollOutcome::Queued(queued) => assert_eq!(*token, waiting[queued.ahead as usize]),
                PollOutcome::Gone => assert_eq!(*token, unknown),
            }
        }
    }
}

pub async fn poll_reconciles_a_key_once<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.client().await, env.client().await);
    let two = Demand::new(1, 2).unwrap();
    for _ in 0..2 {
        let lifetime = Lifetime::Fixed(Duration::from_secs(2));
        holder.expect_grant(&AcquireRequest { lifetime, demand: two, ..holder.request(&key("k")) }).await;
    }
    let mut waiting = Vec::new();
    for _ in 0..12 {
        let request = AcquireRequest { demand: two, ..waiter.request(&key("k")) };
        waiter.expect_queued(&request).await;
        waiting.push(request.token);
    }
    env.advance(Duration::from_millis(2_100)).await;
    let outcomes = waiter.store.poll(&key("k"), &waiting).await.unwrap().outcome;
    for (place, outcome) in (0..).zip(&outcomes) {
        match outcome {
            PollOutcome::Granted(_) => assert!(place < 2, "{place} was granted"),
            PollOutcome::Queued(queued) => assert_eq!(queued.ahead + 2, place),
            PollOutcome::Gone => panic!("{place} is gone"),
        }
    }
    let fences: Vec<_> = waiter.inspect(&key("k")).await.holders.iter().map(|holder| holder.fence).collect();
    let granted = outcomes.iter().filter_map(|outcome| match outcome {
        PollOutcome::Granted(granted) => Some(granted.fence),
        _ => None,
    });
    assert_eq!(granted.collect::<Vec<_>>(), fences);
}

pub async fn poll_of_ended_tokens_answers_gone<S: Store>(env: &Environment<S>) {
    let (holder, other, ended) = (env.client().await, env.client().await, env.client().await);
    holder.lock(&key("k")).await;
    let (mut tokens, mut gone) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        gone.push(ended.enqueue(&key("k")).await);
        tokens.push(other.enqueue(&key("k")).await);
    }
    let abandoned = other.enqueue(&key("k")).await;
    other.store.abandon(&key("k"), abandoned).await.unwrap();
    gone.push(abandoned);
    ended.store.close_session(ended.session).await.unwrap();
    let polled: Vec<_> = gone.iter().chain(&tokens).copied().collect();
    let outcomes = other.store.poll(&key("k"), &polled).await.unwrap().outcome;
    for (token, outcome) in polled.iter().zip(outcomes) {
        assert_eq!(outcome == PollOutcome::Gone, gone.contains(token), "{outcome:?}");
    }
}

pub async fn dropped_acquire_can_be_abandoned<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    for polls in 0..3 {
        let now = client.store.inspect(&key("k")).await.unwrap().time;
        let not_after = now.after(Duration::from_millis(200));
        let request = AcquireRequest { not_after, ..client.request(&key("k")) };
        {
            let mut acquiring = Box::pin(client.store.acquire(request.clone()));
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            for _ in 0..polls {
                if acquiring.as_mut().poll(&mut context).is_ready() {
                    break;
                }
            }
        }
        // The acquire may take effect at any time until `not_after`. After that time an abandon ends it for certain.
        while client.store.abandon(&key("k"), request.token).await.unwrap().time <= not_after {
            env.advance(Duration::from_millis(20)).await;
        }
        assert!(!client.is_locked(&key("k")).await);
        let (token, _) = client.lock(&key("k")).await;
        client.release(&key("k"), token).await;
    }
}
