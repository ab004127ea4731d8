//! The queue: its order, demands, cooldowns and limit.

use std::time::Duration;

use stanchion::Store;
use stanchion::store::{AcquireOutcome, AcquireRequest, Demand, EndOutcome, Lifetime, MAX_WAITERS, PollOutcome, Push};

use crate::environment::{Client, Environment, key, until};

const SHORT: Duration = Duration::from_secs(2);

fn demanding<S: Store>(client: &Client<S>, demand: Demand) -> AcquireRequest {
    AcquireRequest { demand, ..client.request(&key("k")) }
}

pub async fn release_grants_and_notifies_only_the_head<S: Store>(env: &Environment<S>) {
    let (holder, mut first, mut second) = (env.client().await, env.client().await, env.client().await);
    let (token, granted) = holder.lock(&key("k")).await;
    let a = first.enqueue(&key("k")).await;
    let b = second.enqueue(&key("k")).await;
    holder.release(&key("k"), token).await;
    let state = holder.inspect(&key("k")).await;
    assert_eq!((state.holders.len(), state.waiters.len()), (1, 1), "the release also grants the head");
    let (pushed, fence) = first.next_grant().await;
    assert_eq!(pushed, a);
    assert!(fence > granted.fence);
    assert_eq!(state.holders[0].fence, fence);
    assert_eq!(first.release(&key("k"), a).await, EndOutcome::Released);
    assert_eq!(second.next_grant().await.0, b, "the second waiter got no push before its own grant");
}

pub async fn waiters_are_served_in_order<S: Store>(env: &Environment<S>) {
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(env.client().await);
    }
    let (mut token, mut granted) = clients[0].lock(&key("k")).await;
    let mut queue = Vec::new();
    for i in 0..64 {
        let request = clients[i % 4].request(&key("k"));
        assert_eq!(clients[i % 4].expect_queued(&request).await.ahead, i as u32);
        queue.push((i % 4, request.token));
    }
    let mut holder = 0;
    for (next_holder, waiting) in queue {
        clients[holder].release(&key("k"), token).await;
        let next = clients[next_holder].current_grant(&key("k"), waiting).await.expect("the oldest waiter is granted");
        assert!(next.fence > granted.fence);
        (holder, token, granted) = (next_holder, waiting, next);
    }
    clients[holder].release(&key("k"), token).await;
    assert!(!clients[0].is_locked(&key("k")).await);
}

pub async fn new_request_cannot_pass_the_queue<S: Store>(env: &Environment<S>) {
    let (holder, waiter, passing) = (env.client().await, env.client().await, env.client().await);
    let (token, _) = holder.lock(&key("k")).await;
    let waiting = waiter.enqueue(&key("k")).await;
    let request = AcquireRequest { enqueue: false, ..passing.request(&key("k")) };
    assert!(matches!(passing.acquire(&request).await, AcquireOutcome::Busy { .. }));
    holder.release(&key("k"), token).await;
    assert!(matches!(passing.acquire(&request).await, AcquireOutcome::Busy { .. }));
    assert!(waiter.current_grant(&key("k"), waiting).await.is_some());
}

pub async fn repeated_acquire_keeps_queue_place<S: Store>(env: &Environment<S>) {
    let (holder, a, b) = (env.client().await, env.client().await, env.client().await);
    let (token, _) = holder.lock(&key("k")).await;
    let first = a.request(&key("k"));
    a.expect_queued(&first).await;
    let second = b.enqueue(&key("k")).await;
    for _ in 0..3 {
        assert_eq!(a.expect_queued(&first).await.ahead, 0);
        assert!(matches!(a.poll(&key("k"), first.token).await, PollOutcome::Queued(queued) if queued.ahead == 0));
        assert!(matches!(b.poll(&key("k"), second).await, PollOutcome::Queued(queued) if queued.ahead == 1));
    }
    assert_eq!(holder.inspect(&key("k")).await.waiters.len(), 2);
    holder.release(&key("k"), token).await;
    assert_eq!(a.expect_grant(&first).await, a.current_grant(&key("k"), first.token).await.unwrap());
}

pub async fn abandoned_waiter_leaves_the_queue<S: Store>(env: &Environment<S>) {
    let (holder, a, b) = (env.client().await, env.client().await, env.client().await);
    let (token, _) = holder.lock(&key("k")).await;
    let first = a.enqueue(&key("k")).await;
    let second = b.enqueue(&key("k")).await;
    assert_eq!(a.store.abandon(&key("k"), first).await.unwrap().outcome, EndOutcome::Dequeued);
    assert_eq!(a.store.abandon(&key("k"), first).await.unwrap().outcome, EndOutcome::Nothing);
    assert!(matches!(b.poll(&key("k"), second).await, PollOutcome::Queued(queued) if queued.ahead == 0));
    // Releasing the token of a waiter abandons the wait, too.
    let third = a.enqueue(&key("k")).await;
    let released = a.store.release(&key("k"), third, Some(SHORT)).await.unwrap().outcome;
    assert_eq!(released, EndOutcome::Dequeued);
    holder.release(&key("k"), token).await;
    assert!(b.current_grant(&key("k"), second).await.is_some());
    assert_eq!(b.inspect(&key("k")).await.closed_for, None, "a waiter's release starts no cooldown");
}

pub async fn abandon_ends_uncollected_grant<S: Store>(env: &Environment<S>) {
    let (holder, gone, next) = (env.client().await, env.client().await, env.client().await);
    let (token, _) = holder.lock(&key("k")).await;
    let forgotten = gone.enqueue(&key("k")).await;
    let waiting = next.enqueue(&key("k")).await;
    holder.release(&key("k"), token).await;
    assert_eq!(gone.store.abandon(&key("k"), forgotten).await.unwrap().outcome, EndOutcome::Released);
    assert!(next.current_grant(&key("k"), waiting).await.is_some());
}

pub async fn fixed_ttl_starts_at_handoff<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.client().await, env.client().await);
    let (token, _) = holder.lock(&key("k")).await;
    let lifetime = Lifetime::Fixed(Duration::from_secs(60));
    let request = AcquireRequest { lifetime, ..waiter.request(&key("k")) };
    waiter.expect_queued(&request).await;
    // The wait is longer than the time that a slow machine takes between the release and the reply.
    env.advance(Duration::from_secs(2)).await;
    holder.release(&key("k"), token).await;
    let remaining = waiter.current_grant(&key("k"), request.token).await.unwrap().remaining.unwrap();
    assert!(remaining > Duration::from_millis(58_100), "the ttl was counted from the request: {remaining:?} remain");
    env.advance(Duration::from_millis(100)).await;
    let later = waiter.current_grant(&key("k"), request.token).await.unwrap().remaining.unwrap();
    assert!(later <= remaining - Duration::from_millis(100));
}

pub async fn poll_after_expiry_grants_the_waiter<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.client().await, env.client().await);
    let request = AcquireRequest { lifetime: Lifetime::Fixed(SHORT), ..holder.request(&key("k")) };
    holder.expect_grant(&request).await;
    let waiting = waiter.request(&key("k"));
    let check_in = waiter.expect_queued(&waiting).await.check_in.expect("the hold has a deadline");
    assert!(check_in <= SHORT, "{check_in:?}");
    env.advance(check_in + Duration::from_millis(5)).await;
    assert!(waiter.current_grant(&key("k"), waiting.token).await.is_some());
}

pub async fn semaphore_never_exceeds_capacity<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let permit = Demand::new(1, 3).unwrap();
    let mut held = Vec::new();
    for _ in 0..3 {
        let request = demanding(&client, permit);
        client.expect_grant(&request).await;
        held.push(request.token);
    }
    let fourth = demanding(&client, permit);
    client.expect_queued(&fourth).await;
    let two = demanding(&client, Demand::new(2, 3).unwrap());
    client.expect_queued(&two).await;
    client.release(&key("k"), held[0]).await;
    assert!(client.current_grant(&key("k"), fourth.token).await.is_some());
    client.release(&key("k"), held[1]).await;
    assert_eq!(client.current_grant(&key("k"), two.token).await, None, "the request needs two units, and one is free");
    client.release(&key("k"), held[2]).await;
    assert!(client.current_grant(&key("k"), two.token).await.is_some());
    let fences: Vec<_> = client.inspect(&key("k")).await.holders.iter().map(|holder| holder.fence).collect();
    assert!(fences[0] < fences[1], "each permit has its own fence, oldest first");
}

pub async fn writer_waits_only_for_earlier_readers<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let (one, two) = (demanding(&client, Demand::READ), demanding(&client, Demand::READ));
    client.expect_grant(&one).await;
    client.expect_grant(&two).await;
    let writer = demanding(&client, Demand::WRITE);
    client.expect_queued(&writer).await;
    let (three, four) = (demanding(&client, Demand::READ), demanding(&client, Demand::READ));
    client.expect_queued(&three).await;
    client.expect_queued(&four).await;
    client.release(&key("k"), one.token).await;
    assert_eq!(client.current_grant(&key("k"), writer.token).await, None);
    client.release(&key("k"), two.token).await;
    assert!(client.current_grant(&key("k"), writer.token).await.is_some(), "no later reader passed the writer");
    assert_eq!(client.current_grant(&key("k"), three.token).await, None);
    client.release(&key("k"), writer.token).await;
    assert!(
        client.current_grant(&key("k"), three.token).await.is_some(),
        "all readers at the head are granted together"
    );
    assert!(client.current_grant(&key("k"), four.token).await.is_some());
}

pub async fn cooldown_delays_the_next_grant<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.client().await, env.client().await);
    let (token, _) = holder.lock(&key("k")).await;
    let request = waiter.request(&key("k"));
    waiter.expect_queued(&request).await;
    let released = holder.store.release(&key("k"), token, Some(SHORT)).await.unwrap().outcome;
    assert_eq!(released, EndOutcome::Released);
    let busy = AcquireRequest { enqueue: false, ..holder.request(&key("k")) };
    match holder.acquire(&busy).await {
        AcquireOutcome::Busy { check_in, .. } => assert!(check_in.unwrap() <= SHORT),
        other => panic!("the key is closed, but the reply is {other:?}"),
    }
    let PollOutcome::Queued(queued) = waiter.poll(&key("k"), request.token).await else { panic!("not queued") };
    let check_in = queued.check_in.expect("the cooldown has an end");
    assert!(holder.inspect(&key("k")).await.closed_for.unwrap() <= SHORT);
    env.advance(check_in + Duration::from_millis(5)).await;
    assert!(waiter.current_grant(&key("k"), request.token).await.is_some());
    assert_eq!(holder.inspect(&key("k")).await.closed_for, None);
}

pub async fn cooldown_ends_without_a_waiter<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let (token, first) = client.lock(&key("k")).await;
    client.store.release(&key("k"), token, Some(SHORT)).await.unwrap();
    // A repeated release does not extend the cooldown.
    env.advance(SHORT * 2 / 3).await;
    client.store.release(&key("k"), token, Some(SHORT)).await.unwrap();
    env.advance(SHORT / 2).await;
    let (_, second) = client.lock(&key("k")).await;
    assert!(second.fence > first.fence);
}

pub async fn full_queue_rejects_requests<S: Store>(env: &Environment<S>) {
    let (holder, other) = (env.client().await, env.client().await);
    let (token, _) = holder.lock(&key("k")).await;
    let mut first = None;
    for _ in 0..MAX_WAITERS {
        let waiting = holder.enqueue(&key("k")).await;
        first.get_or_insert(waiting);
    }
    let request = other.request(&key("k"));
    assert_eq!(other.acquire(&request).await, AcquireOutcome::QueueFull { limit: MAX_WAITERS });
    assert_eq!(other.poll(&key("k"), request.token).await, PollOutcome::Gone);
    holder.release(&key("k"), token).await;
    assert!(holder.current_grant(&key("k"), first.unwrap()).await.is_some());
    other.expect_queued(&request).await;
    // Closing the session ends its hold and all its places at once.
    holder.store.close_session(holder.session).await.unwrap();
    assert!(other.current_grant(&key("k"), request.token).await.is_some());
}

pub async fn push_names_key_token_and_fence<S: Store>(env: &Environment<S>) {
    let (holder, mut waiter) = (env.client().await, env.client().await);
    let odd = key("odd/ {key} é");
    let (token, _) = holder.lock(&odd).await;
    let waiting = waiter.enqueue(&odd).await;
    holder.release(&odd, token).await;
    let push = loop {
        match waiter.next_push().await {
            Push::Recheck { .. } | Push::RecheckAll | Push::VerifyAll | Push::Warning(_) => {}
            push => break push,
        }
    };
    let fence = waiter.current_grant(&odd, waiting).await.unwrap().fence;
    assert_eq!(push, Push::Granted { key: odd, token: waiting, fence });
}

pub async fn waiter_in_other_process_is_notified<S: Store>(env: &Environment<S>) {
    // Each client has its own handle, like a process of its own.
    let mut clients = Vec::new();
    for _ in 0..6 {
        clients.push(env.client().await);
    }
    let (token, _) = clients[0].lock(&key("k")).await;
    let mut tokens = vec![token];
    for client in &clients[1..] {
        tokens.push(client.enqueue(&key("k")).await);
    }
    for i in 0..5 {
        assert_eq!(clients[i].release(&key("k"), tokens[i]).await, EndOutcome::Released);
        assert_eq!(clients[i + 1].next_grant().await.0, tokens[i + 1]);
    }
    clients[5].release(&key("k"), tokens[5]).await;
    until("the key is free", async || !clients[0].is_locked(&key("k")).await).await;
}
