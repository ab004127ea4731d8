//! Hand-offs: the operation that ends a hold or a wait also grants the waiters that fit afterwards.

use std::time::Duration;

use stanchion::store::{
    AcquireOutcome, AcquireRequest, Demand, EndOutcome, ForceReleaseOutcome, ForceReleaseRequest, Lifetime,
    MAX_WAITERS, PollOutcome, Push,
};
use stanchion::{Store, TokenId};

use crate::environment::{Client, Environment, key, until};

const SHORT: Duration = Duration::from_secs(2);

fn taking<S: Store>(client: &Client<S>, units: u32) -> AcquireRequest {
    AcquireRequest { demand: Demand::new(units, 3).unwrap(), ..client.request(&key("k")) }
}

pub async fn poll_finds_handoff_without_push<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.client().await, env.client().await);
    let (token, granted) = holder.lock(&key("k")).await;
    let request = waiter.request(&key("k"));
    assert!(matches!(waiter.acquire(&request).await, AcquireOutcome::Queued(_)));
    holder.release(&key("k"), token).await;
    let polled = waiter.current_grant(&key("k"), request.token).await.expect("a poll alone finds the grant");
    assert!(polled.fence > granted.fence);
    assert_eq!(waiter.expect_grant(&request).await, polled, "a repeated acquire returns the same grant");
}

pub async fn abandoning_head_lets_next_waiter_in<S: Store>(env: &Environment<S>) {
    let (holder, big, small) = (env.client().await, env.client().await, env.client().await);
    holder.expect_grant(&taking(&holder, 2)).await;
    let head = taking(&big, 2);
    big.expect_queued(&head).await;
    let next = taking(&small, 1);
    small.expect_queued(&next).await;
    assert_eq!(big.store.abandon(&key("k"), head.token).await.unwrap().outcome, EndOutcome::Dequeued);
    let state = holder.inspect(&key("k")).await;
    assert_eq!((state.holders.len(), state.waiters.len()), (2, 0), "the abandon also grants the next waiter");
    assert!(small.current_grant(&key("k"), next.token).await.is_some());
}

pub async fn abandoning_writer_lets_readers_in<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let demanding = |demand| AcquireRequest { demand, ..client.request(&key("k")) };
    client.expect_grant(&demanding(Demand::READ)).await;
    let writer = demanding(Demand::WRITE);
    client.expect_queued(&writer).await;
    let readers = [demanding(Demand::READ), demanding(Demand::READ)];
    for reader in &readers {
        client.expect_queued(reader).await;
    }
    assert_eq!(client.release(&key("k"), writer.token).await, EndOutcome::Dequeued);
    for reader in &readers {
        assert!(client.current_grant(&key("k"), reader.token).await.is_some());
    }
    assert_eq!(client.inspect(&key("k")).await.holders.len(), 3);
}

pub async fn reader_stream_never_starves_a_writer<S: Store>(env: &Environment<S>) {
    let (readers, writer) = (env.client().await, env.client().await);
    let reading = || AcquireRequest { demand: Demand::READ, ..readers.request(&key("k")) };
    let mut inside: Vec<TokenId> = Vec::new();
    for _ in 0..3 {
        let reader = reading();
        readers.expect_grant(&reader).await;
        inside.push(reader.token);
    }
    let write = AcquireRequest { demand: Demand::WRITE, ..writer.request(&key("k")) };
    writer.expect_queued(&write).await;
    // For each reader that leaves, a new one comes and waits behind the writer.
    let mut behind = Vec::new();
    for token in inside {
        let reader = reading();
        readers.expect_queued(&reader).await;
        behind.push(reader.token);
        readers.release(&key("k"), token).await;
    }
    assert!(writer.current_grant(&key("k"), write.token).await.is_some());
    writer.release(&key("k"), write.token).await;
    for token in behind {
        assert!(readers.current_grant(&key("k"), token).await.is_some());
    }
}

pub async fn release_serves_fitting_waiters_in_order<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let all = taking(&client, 3);
    let mut last = client.expect_grant(&all).await.fence;
    let waiting = [taking(&client, 1), taking(&client, 2), taking(&client, 1)];
    for request in &waiting {
        client.expect_queued(request).await;
    }
    client.release(&key("k"), all.token).await;
    for request in &waiting[..2] {
        let fence = client.current_grant(&key("k"), request.token).await.expect("the request fits").fence;
        assert!(fence > last, "fences rise in queue order");
        last = fence;
    }
    let third = client.poll(&key("k"), waiting[2].token).await;
    assert!(matches!(third, PollOutcome::Queued(queued) if queued.ahead == 0), "{third:?}");
}

pub async fn small_demand_cannot_pass_a_large_one<S: Store>(env: &Environment<S>) {
    let (client, other) = (env.client().await, env.client().await);
    let held = taking(&client, 1);
    client.expect_grant(&held).await;
    let large = taking(&client, 3);
    client.expect_queued(&large).await;
    let small = taking(&other, 1);
    other.expect_queued(&small).await;
    let at_once = AcquireRequest { enqueue: false, ..taking(&other, 1) };
    assert!(
        matches!(other.acquire(&at_once).await, AcquireOutcome::Busy { .. }),
        "units are free, but the queue goes first"
    );
    client.release(&key("k"), held.token).await;
    assert!(client.current_grant(&key("k"), large.token).await.is_some());
    assert_eq!(other.current_grant(&key("k"), small.token).await, None);
}

pub async fn mixed_demands_never_exceed_capacity<S: Store>(env: &Environment<S>) {
    let client = env.client().await;
    let mut open = Vec::new();
    for units in [2, 1, 3, 2, 2, 1, 1, 3, 1, 2] {
        let request = taking(&client, units);
        client.acquire(&request).await;
        open.push(request.token);
    }
    while !open.is_empty() {
        let state = client.inspect(&key("k")).await;
        let used: u32 = state.holders.iter().map(|holder| holder.units).sum();
        assert!(used <= 3, "{used} units are held");
        assert!(used > 0, "requests wait although the key is free");
        let mut held = None;
        for (at, token) in open.iter().enumerate() {
            if client.current_grant(&key("k"), *token).await.is_some() {
                held = Some(at);
                break;
            }
        }
        let token = open.remove(held.expect("one request holds the key"));
        assert_eq!(client.release(&key("k"), token).await, EndOutcome::Released);
    }
    assert!(!client.is_locked(&key("k")).await);
}

pub async fn every_kind_of_release_notifies_next<S: Store>(env: &Environment<S>) {
    for way in 0..4 {
        let (holder, mut waiter) = (env.client().await, env.client().await);
        let (token, granted) = holder.lock(&key("k")).await;
        let waiting = waiter.enqueue(&key("k")).await;
        match way {
            0 => drop(holder.release(&key("k"), token).await),
            1 => drop(holder.store.abandon(&key("k"), token).await.unwrap()),
            2 => {
                let request = ForceReleaseRequest { key: key("k"), fence: granted.fence, reason: String::new() };
                assert_eq!(waiter.store.force_release(request).await.unwrap().outcome, ForceReleaseOutcome::Released);
            }
            _ => holder.store.close_session(holder.session).await.unwrap().outcome,
        }
        let (pushed, fence) = waiter.next_grant().await;
        assert_eq!(pushed, waiting, "way {way}");
        assert_eq!(waiter.current_grant(&key("k"), waiting).await.unwrap().fence, fence);
        waiter.release(&key("k"), waiting).await;
    }
}

pub async fn push_reaches_each_token_of_a_session<S: Store>(env: &Environment<S>) {
    let (holder, mut waiter) = (env.client().await, env.client().await);
    let mut expected = Vec::new();
    for name in ["a", "b", "c"] {
        let (token, _) = holder.lock(&key(name)).await;
        let waiting = waiter.enqueue(&key(name)).await;
        holder.release(&key(name), token).await;
        expected.push((key(name), waiting));
    }
    let mut pushed = Vec::new();
    while pushed.len() < 3 {
        if let Push::Granted { key, token, .. } = waiter.next_push().await
            && !pushed.contains(&(key.clone(), token))
        {
            pushed.push((key, token));
        }
    }
    pushed.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(pushed, expected);
}

pub async fn waiter_outlives_its_request_deadline<S: Store>(env: &Environment<S>) {
    let (holder, waiter) = (env.client().await, env.client().await);
    let (token, _) = holder.lock(&key("k")).await;
    let now = waiter.store.inspect(&key("k")).await.unwrap().time;
    let request = AcquireRequest { not_after: now.after(SHORT), ..waiter.request(&key("k")) };
    if waiter.acquire(&request).await == AcquireOutcome::Stale {
        // The machine stalled for longer than the deadline, so this run proves nothing.
        return;
    }
    env.advance(SHORT + Duration::from_millis(10)).await;
    assert!(matches!(waiter.poll(&key("k"), request.token).await, PollOutcome::Queued(_)));
    holder.release(&key("k"), token).await;
    assert!(
        waiter.current_grant(&key("k"), request.token).await.is_some(),
        "the deadline of the request does not end the wait"
    );
    // A repeated acquire may be answered either way now, but it changes nothing.
    let repeated = waiter.acquire(&request).await;
    assert!(matches!(repeated, AcquireOutcome::Granted(_) | AcquireOutcome::Stale), "{repeated:?}");
    assert_eq!(waiter.inspect(&key("k")).await.holders.len(), 1);
    assert_eq!(waiter.release(&key("k"), request.token).await, EndOutcome::Released);
    assert_eq!(
        waiter.acquire(&request).await,
        AcquireOutcome::Stale,
        "a late acquire creates nothing after the release"
    );
    assert!(!waiter.is_locked(&key("k")).await);
}

pub async fn late_messages_spare_the_next_token<S: Store>(env: &Environment<S>) {
    let (client, other) = (env.client().await, env.client().await);
    let fixed = Lifetime::Fixed(Duration::from_secs(60));
    let old = AcquireRequest { lifetime: fixed, ..client.request(&key("k")) };
    client.expect_grant(&old).await;
    client.release(&key("k"), old.token).await;
    let (token, granted) = client.lock(&key("k")).await;
    let waiting = other.enqueue(&key("k")).await;
    // Repeats every message of the old token except its acquire, which was already answered.
    for _ in 0..2 {
        assert_eq!(client.store.release(&key("k"), old.token, Some(SHORT)).await.unwrap().outcome, EndOutcome::Nothing);
        assert_eq!(client.store.abandon(&key("k"), old.token).await.unwrap().outcome, EndOutcome::Nothing);
        client.store.extend(&key("k"), old.token, SHORT).await.unwrap();
        assert_eq!(client.poll(&key("k"), old.token).await, PollOutcome::Gone);
    }
    assert_eq!(
        client.current_grant(&key("k"), token).await,
        Some(granted),
        "the next token of the same session keeps its grant"
    );
    let state = client.inspect(&key("k")).await;
    assert_eq!((state.waiters.len(), state.closed_for), (1, None));
    client.release(&key("k"), token).await;
    assert!(other.current_grant(&key("k"), waiting).await.is_some());
}

pub async fn full_queue_of_dead_waiters_has_room<S: Store>(env: &Environment<S>) {
    let (holder, dying, last) =
        (env.client().await, env.client_with_ttl(Duration::from_secs(3)).await, env.client().await);
    let (token, _) = holder.lock(&key("k")).await;
    let mut entered = 0;
    while let AcquireOutcome::Queued(_) = dying.acquire(&dying.request(&key("k"))).await {
        entered += 1;
        // Often, because an acquire takes long in a busy emulator.
        if entered % 10 == 0 {
            dying.store.renew_session(dying.session).await.unwrap();
        }
    }
    assert_eq!(entered, MAX_WAITERS);
    env.kill(dying).await;
    let request = last.request(&key("k"));
    until("the queue has room", async || matches!(last.acquire(&request).await, AcquireOutcome::Queued(_))).await;
    holder.release(&key("k"), token).await;
    assert!(last.current_grant(&key("k"), request.token).await.is_some());
}
