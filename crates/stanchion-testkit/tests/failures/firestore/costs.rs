//! What steps cost, in requests.

use std::collections::HashMap;

use stanchion::store::{AcquireOutcome, AcquireRequest, EndOutcome, Lifetime, PollOutcome, Push, RenewOutcome};
use stanchion::{Fence, Store as _};
use stanchion_testkit::servers::FirestoreFake;
use stanchion_testkit::{block_on, until};

use super::{Client, MINUTE, SHORT};

#[test]
fn an_acquire_and_a_release_are_one_request_each() {
    let fake = FirestoreFake::start();
    block_on(async {
        let client = Client::open(&fake.url(), MINUTE).await;
        let before = fake.calls();
        for i in 0..50 {
            let lifetime = if i % 2 == 0 { Lifetime::Fixed(MINUTE) } else { Lifetime::Session { max_hold: None } };
            let request = AcquireRequest { lifetime, ..client.request(&format!("k{}", i % 3)) };
            client.gets(&request).await;
            let ended = client.store.release(&request.key, request.token, None).await.unwrap().outcome;
            assert_eq!(ended, EndOutcome::Released);
        }
        let mut after = fake.calls();
        *after.get_mut("Commit").unwrap() -= 100;
        assert_eq!(after, before, "100 commits and nothing else");
    });
}

#[test]
fn a_beat_is_one_request() {
    let fake = FirestoreFake::start();
    block_on(async {
        let client = Client::open(&fake.url(), MINUTE).await;
        let before = fake.calls();
        for _ in 0..20 {
            let beaten = client.store.renew_session(client.session).await.unwrap().outcome;
            assert_eq!(beaten, RenewOutcome::Alive { lost: vec![] });
        }
        let mut after = fake.calls();
        *after.get_mut("Commit").unwrap() -= 20;
        assert_eq!(after, before);
    });
}

/// Requests since then, by kind: commits, reads of documents.
fn since(before: &HashMap<String, u64>, fake: &FirestoreFake) -> (u64, u64) {
    let count = |method| fake.called(method) - before.get(method).copied().unwrap_or_default();
    (count("Commit"), count("BatchGetDocuments"))
}

impl Client {
    async fn queues(&self, name: &str) -> AcquireRequest {
        let request = self.request(name);
        assert!(matches!(self.asks(&request).await, AcquireOutcome::Queued(_)));
        request
    }

    async fn releases(&self, request: &AcquireRequest) {
        let ended = self.store.release(&request.key, request.token, None).await.unwrap().outcome;
        assert_eq!(ended, EndOutcome::Released);
    }

    async fn is_called(&mut self, request: &AcquireRequest) -> Fence {
        loop {
            match self.pushes.next().await {
                Some(Push::Granted { token, fence, .. }) if token == request.token => return fence,
                Some(_) => {}
                None => panic!("the stream is over"),
            }
        }
    }

    /// Everything that was written before this is heard by this one, on its stream: what is called twice comes after it.
    async fn has_heard(&mut self, other: &Self) {
        for signal in ["first signal", "second signal"] {
            let held = other.request(signal);
            other.gets(&held).await;
            let waiting = self.queues(signal).await;
            other.releases(&held).await;
            self.is_called(&waiting).await;
            self.releases(&waiting).await;
        }
    }
}

#[test]
fn a_release_that_hands_over_is_one_request() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (mut one, mut two) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        let mut held = one.request("k");
        let mut last = one.gets(&held).await;
        for _ in 0..4 {
            let waiting = two.queues("k").await;
            one.has_heard(&two).await;
            let before = fake.calls();
            one.releases(&held).await;
            assert_eq!(since(&before, &fake), (1, 0), "a commit, and nothing read");
            let fence = two.is_called(&waiting).await;
            assert!(fence > last);
            assert_eq!(two.holders("k").await, [fence]);
            (held, last) = (waiting, fence);
            std::mem::swap(&mut one, &mut two);
        }
    });
}

/// Waiters of two processes, who were all there before the first was granted, and let go at once.
#[test]
fn a_wave_of_waiters_is_one_request_for_each() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let mut clients = [Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await];
        let held = clients[0].request("k");
        clients[0].gets(&held).await;
        let mut waiting = Vec::new();
        // The last of them comes from the one who holds it: that one knows of all.
        for turn in 1..21 {
            waiting.push(clients[turn % 2].queues("k").await);
        }
        clients[0].releases(&held).await;
        let before = fake.calls();
        let mut fences = Vec::new();
        for (turn, waiting) in (1..).zip(&waiting) {
            fences.push(clients[turn % 2].is_called(waiting).await);
            clients[turn % 2].releases(waiting).await;
        }
        assert_eq!(since(&before, &fake), (20, 0));
        assert!(fences.is_sorted_by(|a, b| a < b), "{fences:?}");
        assert!(!fake.documents().iter().any(|name| name.contains("_calls") || name.starts_with("stanchion_keys")));
    });
}

/// What a holder was told is older than what is there: whoever came meanwhile is next all the same.
#[test]
fn a_release_that_knows_too_little_grants_who_is_next() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (mut one, two) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        let mut three = Client::open(&url, MINUTE).await;
        let held = one.request("k");
        let last = one.gets(&held).await;
        let gives_up = two.queues("k").await;
        one.has_heard(&two).await;
        let waiting = three.queues("k").await;
        two.store.abandon(&gives_up.key, gives_up.token).await.unwrap();
        let before = fake.calls();
        one.releases(&held).await;
        assert_eq!(since(&before, &fake), (2, 1), "refused, and done again from what is there");
        let fence = three.is_called(&waiting).await;
        assert!(fence > last);
        assert_eq!(one.holders("k").await, [fence]);
        assert_eq!(two.store.poll(&gives_up.key, &[gives_up.token]).await.unwrap().outcome[0], PollOutcome::Gone);
        // The next who holds it by this handle looks first, and finds that it need not have.
        let again = one.queues("k").await;
        three.releases(&waiting).await;
        one.is_called(&again).await;
        for reads in [1, 0] {
            let before = fake.calls();
            one.releases(&again).await;
            assert_eq!(since(&before, &fake), (1, reads));
            let AcquireOutcome::Granted(_) = one.asks(&again).await else { panic!("nobody has it") };
        }
    });
}

/// The dead at the head of the queue cost nobody else any time.
#[test]
fn a_release_passes_over_the_dead() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (mut one, dead) = (Client::open(&url, MINUTE).await, Client::open(&url, SHORT).await);
        let held = one.request("k");
        let last = one.gets(&held).await;
        dead.queues("k").await;
        // This handle knows all of the queue.
        let waiting = one.queues("k").await;
        fake.set_clock_off_by(10);
        one.store.renew_session(one.session).await.unwrap();
        one.releases(&held).await;
        let called = tokio::time::timeout(MINUTE, one.is_called(&waiting)).await;
        assert!(called.expect("nobody asks again, so nobody else finds it") > last);
    });
}

/// What a record says of the session at the head runs out. With its beats a holder looks at that again.
#[test]
fn a_release_after_a_long_wait_is_one_request() {
    const TERM: std::time::Duration = std::time::Duration::from_secs(30);
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (mut one, mut two) = (Client::open(&url, MINUTE).await, Client::open(&url, TERM).await);
        let held = one.request("k");
        one.gets(&held).await;
        let waiting = two.queues("k").await;
        one.has_heard(&two).await;
        fake.set_clock_off_by(20);
        two.store.renew_session(two.session).await.unwrap();
        fake.set_clock_off_by(40);
        let before = fake.calls();
        one.store.renew_session(one.session).await.unwrap();
        until("the head is looked at", async || since(&before, &fake).1 == 1).await;
        // The answer is here when a later one is.
        one.holders("other").await;
        // The head's session has two seconds more.
        fake.set_clock_off_by(48);
        let before = fake.calls();
        one.releases(&held).await;
        assert_eq!(since(&before, &fake), (1, 0));
        two.is_called(&waiting).await;
        let state = two.store.inspect(&waiting.key).await.unwrap();
        let age = state.outcome.holders[0].age;
        assert!(age < std::time::Duration::from_secs(7), "it begins with the commit, not with what was known: {age:?}");
    });
}
