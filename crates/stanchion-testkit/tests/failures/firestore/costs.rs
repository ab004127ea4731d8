//! Checks how many requests each operation costs.

use std::collections::HashMap;

use stanchion::store::{AcquireOutcome, AcquireRequest, EndOutcome, Lifetime, PollOutcome, Push, RenewOutcome};
use stanchion::{Fence, Store as _};
use stanchion_testkit::servers::FirestoreFake;
use stanchion_testkit::{block_on, until};

use super::{Client, MINUTE, SHORT};

#[test]
fn acquire_and_release_take_one_request_each() {
    let fake = FirestoreFake::start();
    block_on(async {
        let client = Client::open(&fake.url(), MINUTE).await;
        let before = fake.request_counts();
        for i in 0..50 {
            let lifetime = if i % 2 == 0 { Lifetime::Fixed(MINUTE) } else { Lifetime::Session { max_hold: None } };
            let request = AcquireRequest { lifetime, ..client.request(&format!("k{}", i % 3)) };
            client.lock(&request).await;
            let ended = client.store.release(&request.key, request.token, None).await.unwrap().outcome;
            assert_eq!(ended, EndOutcome::Released);
        }
        let mut after = fake.request_counts();
        *after.get_mut("Commit").unwrap() -= 100;
        assert_eq!(after, before, "the client sends 100 commits and nothing else");
    });
}

#[test]
fn renewal_takes_one_request() {
    let fake = FirestoreFake::start();
    block_on(async {
        let client = Client::open(&fake.url(), MINUTE).await;
        let before = fake.request_counts();
        for _ in 0..20 {
            let renewed = client.store.renew_session(client.session).await.unwrap().outcome;
            assert_eq!(renewed, RenewOutcome::Alive { lost: vec![] });
        }
        let mut after = fake.request_counts();
        *after.get_mut("Commit").unwrap() -= 20;
        assert_eq!(after, before);
    });
}

/// Returns the number of commits and of document reads since `before`.
pub(super) fn requests_since(before: &HashMap<String, u64>, fake: &FirestoreFake) -> (u64, u64) {
    let count = |method| fake.request_count(method) - before.get(method).copied().unwrap_or_default();
    (count("Commit"), count("BatchGetDocuments"))
}

impl Client {
    pub(super) async fn enqueue(&self, name: &str) -> AcquireRequest {
        let request = self.request(name);
        assert!(matches!(self.acquire(&request).await, AcquireOutcome::Queued(_)));
        request
    }

    pub(super) async fn release(&self, request: &AcquireRequest) {
        let ended = self.store.release(&request.key, request.token, None).await.unwrap().outcome;
        assert_eq!(ended, EndOutcome::Released);
    }

    pub(super) async fn wait_for_grant(&mut self, request: &AcquireRequest) -> Fence {
        loop {
            match self.pushes.next().await {
                Some(Push::Granted { token, fence, .. }) if token == request.token => return fence,
                Some(_) => {}
                None => panic!("the stream ended"),
            }
        }
    }

    /// Waits until this client has received every notification that was written before this call. Two grants on extra
    /// keys mark that point, because their notifications come later on the same stream.
    pub(super) async fn receive_all_from(&mut self, other: &Self) {
        for signal in ["first signal", "second signal"] {
            let held = other.request(signal);
            other.lock(&held).await;
            let waiting = self.enqueue(signal).await;
            other.release(&held).await;
            self.wait_for_grant(&waiting).await;
            self.release(&waiting).await;
        }
    }
}

#[test]
fn hand_off_takes_one_request() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (mut one, mut two) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        let mut held = one.request("k");
        let mut last = one.lock(&held).await;
        for _ in 0..4 {
            let waiting = two.enqueue("k").await;
            one.receive_all_from(&two).await;
            let before = fake.request_counts();
            one.release(&held).await;
            assert_eq!(requests_since(&before, &fake), (1, 0), "the hand-off takes one commit and no read");
            let fence = two.wait_for_grant(&waiting).await;
            assert!(fence > last);
            assert_eq!(two.holders("k").await, [fence]);
            (held, last) = (waiting, fence);
            std::mem::swap(&mut one, &mut two);
        }
    });
}

/// All waiters of two processes queue before the first grant, and each releases as soon as it is granted.
#[test]
fn queued_hand_offs_take_one_request_each() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let mut clients = [Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await];
        let held = clients[0].request("k");
        clients[0].lock(&held).await;
        let mut waiting = Vec::new();
        // The holder's own handle adds the last waiter, so it knows the whole queue.
        for number in 1..21 {
            waiting.push(clients[number % 2].enqueue("k").await);
        }
        clients[0].release(&held).await;
        let before = fake.request_counts();
        let mut fences = Vec::new();
        for (number, waiting) in (1..).zip(&waiting) {
            fences.push(clients[number % 2].wait_for_grant(waiting).await);
            clients[number % 2].release(waiting).await;
        }
        assert_eq!(requests_since(&before, &fake), (20, 0));
        assert!(fences.is_sorted_by(|a, b| a < b), "{fences:?}");
        assert!(!fake.documents().iter().any(|name| name.contains("_calls") || name.starts_with("stanchion_keys")));
    });
}

/// The holder's cached record is outdated: a waiter has joined and another one has left. The release must still grant
/// the key to the right waiter.
#[test]
fn outdated_release_grants_next_waiter() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (mut one, two) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        let mut three = Client::open(&url, MINUTE).await;
        let held = one.request("k");
        let last = one.lock(&held).await;
        let abandoned = two.enqueue("k").await;
        one.receive_all_from(&two).await;
        let waiting = three.enqueue("k").await;
        two.store.abandon(&abandoned.key, abandoned.token).await.unwrap();
        let before = fake.request_counts();
        one.release(&held).await;
        assert_eq!(requests_since(&before, &fake), (2, 1), "the first commit is rejected, then the key is read");
        let fence = three.wait_for_grant(&waiting).await;
        assert!(fence > last);
        assert_eq!(one.holders("k").await, [fence]);
        assert_eq!(two.store.poll(&abandoned.key, &[abandoned.token]).await.unwrap().outcome[0], PollOutcome::Gone);
        // The next holder of this handle reads the key first, and learns that its cached record was right.
        let again = one.enqueue("k").await;
        three.release(&waiting).await;
        one.wait_for_grant(&again).await;
        for reads in [1, 0] {
            let before = fake.request_counts();
            one.release(&again).await;
            assert_eq!(requests_since(&before, &fake), (1, reads));
            let AcquireOutcome::Granted(_) = one.acquire(&again).await else { panic!("the free key was not granted") };
        }
    });
}

/// The head of the queue has expired. The release must grant the key to the next waiter, because nobody polls.
#[test]
fn release_skips_expired_waiters() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (mut one, expired) = (Client::open(&url, MINUTE).await, Client::open(&url, SHORT).await);
        let held = one.request("k");
        let last = one.lock(&held).await;
        expired.enqueue("k").await;
        // This handle has added the last waiter, so it knows the whole queue.
        let waiting = one.enqueue("k").await;
        fake.set_clock_offset(10);
        one.store.renew_session(one.session).await.unwrap();
        one.release(&held).await;
        let granted = tokio::time::timeout(MINUTE, one.wait_for_grant(&waiting)).await;
        assert!(granted.expect("the release must grant the key, because nobody polls") > last);
    });
}

/// A cached record says only until when the session at the head lives. At each renewal the holder reads that session
/// again.
#[test]
fn late_hand_off_takes_one_request() {
    const TTL: std::time::Duration = std::time::Duration::from_secs(30);
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (mut one, mut two) = (Client::open(&url, MINUTE).await, Client::open(&url, TTL).await);
        let held = one.request("k");
        one.lock(&held).await;
        let waiting = two.enqueue("k").await;
        one.receive_all_from(&two).await;
        fake.set_clock_offset(20);
        two.store.renew_session(two.session).await.unwrap();
        fake.set_clock_offset(40);
        let before = fake.request_counts();
        one.store.renew_session(one.session).await.unwrap();
        until("the holder reads the head's session", async || requests_since(&before, &fake).1 == 1).await;
        // This request is sent later on the same connection, so the background read is finished when it returns.
        one.holders("other").await;
        // The head's session lives 2 seconds longer.
        fake.set_clock_offset(48);
        let before = fake.request_counts();
        one.release(&held).await;
        assert_eq!(requests_since(&before, &fake), (1, 0));
        two.wait_for_grant(&waiting).await;
        let state = two.store.inspect(&waiting.key).await.unwrap();
        let age = state.outcome.holders[0].age;
        assert!(
            age < std::time::Duration::from_secs(7),
            "the hold starts at the commit, not at the cached time: {age:?}"
        );
    });
}
