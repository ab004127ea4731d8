//! Messages that come late, twice or never, and releases by force.

use std::time::Duration;

use stanchion::Store;
use stanchion::TokenId;
use stanchion::store::{AcquireOutcome, AcquireRequest, Demand, EndOutcome, Lifetime, PollOutcome, StoreTime};

use crate::environment::{Environment, key};

pub async fn reply_times_never_decrease<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let mut last = StoreTime::from_micros(0);
    for _ in 0..5 {
        env.pass(Duration::from_millis(2)).await;
        let request = actor.request(&key("k"));
        let times = [
            actor.store.acquire(request.clone()).await.unwrap().time,
            actor.store.poll(&key("k"), &[request.token]).await.unwrap().time,
            actor.store.inspect(&key("k")).await.unwrap().time,
            actor.store.renew_session(actor.session).await.unwrap().time,
            actor.store.release(&key("k"), request.token, None).await.unwrap().time,
        ];
        for time in times {
            assert!(time >= last);
            last = time;
        }
    }
}

pub async fn late_acquire_changes_nothing<S: Store>(env: &Environment<S>) {
    let (actor, holder) = (env.actor().await, env.actor().await);
    let now = actor.store.inspect(&key("k")).await.unwrap().time;
    env.pass(Duration::from_millis(20)).await;
    let late = AcquireRequest { not_after: now, ..actor.request(&key("k")) };
    assert_eq!(actor.ask(&late).await, AcquireOutcome::Stale);
    assert!(!actor.sees_held(&key("k")).await);
    holder.takes(&key("k")).await;
    assert_eq!(actor.ask(&late).await, AcquireOutcome::Stale, "no place in the queue either");
    assert!(actor.sees(&key("k")).await.waiters.is_empty());
}

pub async fn acquire_after_abandon_can_be_abandoned<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    let request = actor.request(&key("k"));
    assert_eq!(actor.store.abandon(&key("k"), request.token).await.unwrap().outcome, EndOutcome::Nothing);
    // The store remembers nothing of a token that it ended: until `not_after` the late question counts.
    actor.gets(&request).await;
    assert_eq!(actor.store.abandon(&key("k"), request.token).await.unwrap().outcome, EndOutcome::Released);
    let now = actor.store.inspect(&key("k")).await.unwrap().time;
    env.pass(Duration::from_millis(20)).await;
    let late = AcquireRequest { not_after: now, ..request };
    assert_eq!(actor.ask(&late).await, AcquireOutcome::Stale, "after it, never");
}

pub async fn poll_never_creates<S: Store>(env: &Environment<S>) {
    let (holder, other) = (env.actor().await, env.actor().await);
    let unknown = TokenId::random().unwrap();
    assert_eq!(other.polls(&key("k"), unknown).await, PollOutcome::Gone);
    let (token, _) = holder.takes(&key("k")).await;
    assert_eq!(other.polls(&key("k"), unknown).await, PollOutcome::Gone);
    let waiting = other.queues(&key("k")).await;
    other.store.abandon(&key("k"), waiting).await.unwrap();
    assert_eq!(other.polls(&key("k"), waiting).await, PollOutcome::Gone, "a late poll of an ended token");
    holder.releases(&key("k"), token).await;
    assert_eq!(other.polls(&key("k"), waiting).await, PollOutcome::Gone);
    assert!(!other.sees_held(&key("k")).await && other.sees(&key("k")).await.waiters.is_empty());
}

/// A handle polls a key for all of its waiters at once: few tokens, many, unknown ones among them, one of them twice.
pub async fn poll_answers_in_token_order<S: Store>(env: &Environment<S>) {
    let (holder, other) = (env.actor().await, env.actor().await);
    let (held, granted) = holder.takes(&key("k")).await;
    let mut waiting = Vec::new();
    for place in 0..20 {
        waiting.push(if place % 2 == 0 { holder.queues(&key("k")).await } else { other.queues(&key("k")).await });
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
    let (holder, waiter) = (env.actor().await, env.actor().await);
    let two = Demand::new(1, 2).unwrap();
    for _ in 0..2 {
        let lifetime = Lifetime::Fixed(Duration::from_secs(2));
        holder.gets(&AcquireRequest { lifetime, demand: two, ..holder.request(&key("k")) }).await;
    }
    let mut waiting = Vec::new();
    for _ in 0..12 {
        let request = AcquireRequest { demand: two, ..waiter.request(&key("k")) };
        waiter.waits(&request).await;
        waiting.push(request.token);
    }
    env.pass(Duration::from_millis(2_100)).await;
    let outcomes = waiter.store.poll(&key("k"), &waiting).await.unwrap().outcome;
    for (place, outcome) in (0..).zip(&outcomes) {
        match outcome {
            PollOutcome::Granted(_) => assert!(place < 2, "{place} was granted"),
            PollOutcome::Queued(queued) => assert_eq!(queued.ahead + 2, place),
            PollOutcome::Gone => panic!("{place} is gone"),
        }
    }
    let fences: Vec<_> = waiter.sees(&key("k")).await.holders.iter().map(|holder| holder.fence).collect();
    let told = outcomes.iter().filter_map(|outcome| match outcome {
        PollOutcome::Granted(granted) => Some(granted.fence),
        _ => None,
    });
    assert_eq!(told.collect::<Vec<_>>(), fences);
}

pub async fn poll_of_ended_tokens_answers_gone<S: Store>(env: &Environment<S>) {
    let (holder, other, ended) = (env.actor().await, env.actor().await, env.actor().await);
    holder.takes(&key("k")).await;
    let (mut tokens, mut gone) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        gone.push(ended.queues(&key("k")).await);
        tokens.push(other.queues(&key("k")).await);
    }
    let given_up = other.queues(&key("k")).await;
    other.store.abandon(&key("k"), given_up).await.unwrap();
    gone.push(given_up);
    ended.store.close_session(ended.session).await.unwrap();
    let asked: Vec<_> = gone.iter().chain(&tokens).copied().collect();
    let outcomes = other.store.poll(&key("k"), &asked).await.unwrap().outcome;
    for (token, outcome) in asked.iter().zip(outcomes) {
        assert_eq!(outcome == PollOutcome::Gone, gone.contains(token), "{outcome:?}");
    }
}

pub async fn dropped_acquire_can_be_abandoned<S: Store>(env: &Environment<S>) {
    let actor = env.actor().await;
    for polls in 0..3 {
        let now = actor.store.inspect(&key("k")).await.unwrap().time;
        let not_after = now.after(Duration::from_millis(200));
        let request = AcquireRequest { not_after, ..actor.request(&key("k")) };
        {
            let mut asking = Box::pin(actor.store.acquire(request.clone()));
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            for _ in 0..polls {
                if asking.as_mut().poll(&mut context).is_ready() {
                    break;
                }
            }
        }
        // Done or not done, or done after the first end: an end after `not_after` makes it certain.
        while actor.store.abandon(&key("k"), request.token).await.unwrap().time <= not_after {
            env.pass(Duration::from_millis(20)).await;
        }
        assert!(!actor.sees_held(&key("k")).await);
        let (token, _) = actor.takes(&key("k")).await;
        actor.releases(&key("k"), token).await;
    }
}
