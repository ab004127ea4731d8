//! Checks holds that linger: their requests, their fences, and commits that come late.

use stanchion::store::{
    AdoptOutcome, AdoptRequest, EndOutcome, ForceReleaseOutcome, ForceReleaseRequest, LingerOutcome, LostToken,
    PollOutcome, Push,
};
use stanchion::{Fence, Store as _, TokenId};
use stanchion_testkit::servers::{CommitFault, FirestoreFake};
use stanchion_testkit::{block_on, until};
use tonic::Code;

use super::costs::requests_since;
use super::{Client, MINUTE, SHORT, key};

impl Client {
    async fn linger(&self, token: TokenId) -> LingerOutcome {
        self.store.linger(&key("k"), token).await.unwrap().outcome
    }

    /// Marks the hold of `k`. Returns its fence and the newest fence of the key.
    async fn mark(&self, token: TokenId) -> (Fence, Fence) {
        match self.linger(token).await {
            LingerOutcome::Lingers { fence, up_to } => (fence, up_to),
            other => panic!("the hold cannot linger: {other:?}"),
        }
    }

    async fn lingers(&self) -> bool {
        self.store.inspect(&key("k")).await.unwrap().outcome.holders[0].lingers
    }

    async fn next_push(&mut self) -> Push {
        tokio::time::timeout(MINUTE, self.pushes.next()).await.expect("a push arrives").expect("the stream is open")
    }
}

#[test]
fn linger_takes_one_commit() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (client, mut other) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        let held = client.request("k");
        let mut last = client.lock(&held).await;
        let before = fake.request_counts();
        for _ in 0..5 {
            let (_, up_to) = client.mark(held.token).await;
            assert!(up_to > last);
            last = up_to;
        }
        assert_eq!(requests_since(&before, &fake), (5, 0), "a hold of a free key");
        let before = fake.request_counts();
        client.release(&held).await;
        assert_eq!(requests_since(&before, &fake), (1, 0), "its release");
        // A hold that was granted from the queue has a notification, which the mark deletes.
        client.lock(&held).await;
        let waiting = other.enqueue("k").await;
        client.release(&held).await;
        last = other.wait_for_grant(&waiting).await;
        other.mark(waiting.token).await;
        assert!(!fake.documents().iter().any(|name| name.contains("_calls")), "{:?}", fake.documents());
        let before = fake.request_counts();
        assert!(other.mark(waiting.token).await.1 > last);
        other.release(&waiting).await;
        assert_eq!(requests_since(&before, &fake), (2, 0));
    });
}

/// The record of a hold with long metadata is not cached, so it is read once for each mark.
#[test]
fn hold_with_long_metadata_lingers_too() {
    let fake = FirestoreFake::start();
    block_on(async {
        let client = Client::open(&fake.url(), MINUTE).await;
        let held = stanchion::store::AcquireRequest { metadata: Some("m".repeat(4_096)), ..client.request("k") };
        client.lock(&held).await;
        let before = fake.request_counts();
        client.mark(held.token).await;
        client.mark(held.token).await;
        assert_eq!(requests_since(&before, &fake), (2, 2));
        let state = client.store.inspect(&key("k")).await.unwrap().outcome;
        assert_eq!(state.holders[0].metadata, held.metadata);
    });
}

/// Each poll of the head writes the holder's notification and leaves the key alone, so the holder's next request needs no
/// read. The polls behind an ordinary hold write nothing.
#[test]
fn repeated_recalls_leave_the_key_alone() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (mut holder, mut waiter) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        let held = holder.request("k");
        let fence = holder.lock(&held).await;
        holder.mark(held.token).await;
        let waiting = waiter.enqueue("k").await;
        assert_eq!(holder.next_push().await, Push::Recall { token: held.token });
        for _ in 0..3 {
            let before = fake.request_counts();
            let polled = waiter.store.poll(&key("k"), &[waiting.token]).await.unwrap().outcome[0];
            assert!(matches!(polled, PollOutcome::Queued(_)), "{polled:?}");
            assert_eq!(holder.next_push().await, Push::Recall { token: held.token });
            assert_eq!(requests_since(&before, &fake), (1, 1));
        }
        let before = fake.request_counts();
        holder.release(&held).await;
        assert_eq!(requests_since(&before, &fake), (1, 0), "the hand-off needs no read");
        assert!(waiter.wait_for_grant(&waiting).await > fence);
        // The hold that was handed off does not linger.
        let next = holder.enqueue("k").await;
        let mut commits = Vec::new();
        for polls in [0, 0, 5] {
            let before = fake.request_counts();
            for _ in 0..polls {
                holder.store.poll(&key("k"), &[next.token]).await.unwrap();
            }
            holder.receive_all_from(&waiter).await;
            commits.push(requests_since(&before, &fake).0);
        }
        // Commits of other work may be among them, but not one for each poll.
        assert!(commits[2] < commits[1] + 5, "the polls write: {commits:?}");
    });
}

/// The recall of a poll is written after the hold was force-released, and must not hide that.
#[test]
fn late_recall_keeps_a_force_release() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (mut holder, waiter) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        let held = holder.request("k");
        let fence = holder.lock(&held).await;
        holder.mark(held.token).await;
        let waiting = waiter.enqueue("k").await;
        assert_eq!(holder.next_push().await, Push::Recall { token: held.token });
        fake.next_commits([CommitFault::Delayed]);
        waiter.store.poll(&key("k"), &[waiting.token]).await.unwrap();
        until("the recall is on its way", async || fake.delayed_commits() == 1).await;
        let force = ForceReleaseRequest { key: key("k"), fence, reason: "test".into() };
        assert_eq!(waiter.store.force_release(force).await.unwrap().outcome, ForceReleaseOutcome::Released);
        let lost = LostToken { key: key("k"), token: held.token, reason: "test".into() };
        assert_eq!(holder.next_push().await, Push::ForceReleased(lost.clone()));
        assert_eq!(fake.finish_delayed_commits(), 1);
        assert_eq!(holder.next_push().await, Push::ForceReleased(lost));
        // A recall that comes after the release of its token writes nothing.
        holder.store.abandon(&key("k"), held.token).await.unwrap();
        waiter.store.abandon(&key("k"), waiting.token).await.unwrap();
        let held = holder.request("k");
        holder.lock(&held).await;
        holder.mark(held.token).await;
        let waiting = waiter.enqueue("k").await;
        fake.next_commits([CommitFault::Delayed]);
        waiter.store.poll(&key("k"), &[waiting.token]).await.unwrap();
        until("the recall is on its way", async || fake.delayed_commits() == 1).await;
        holder.release(&held).await;
        assert_eq!(fake.finish_delayed_commits(), 0);
    });
}

/// The commit of a mark is delayed until the hold is released, or its key has another holder.
#[test]
fn late_mark_changes_nothing() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (late, other) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        for has_next in [false, true] {
            let held = late.request("k");
            late.lock(&held).await;
            fake.next_commits([CommitFault::Delayed]);
            let fault = late.store.linger(&key("k"), held.token).await.unwrap_err();
            assert!(fault.is_in_doubt(), "{fault:?}");
            late.release(&held).await;
            let next = other.request("k");
            if has_next {
                other.lock(&next).await;
            }
            assert_eq!(fake.finish_delayed_commits(), 0, "the service rejects the commit");
            assert_eq!(late.linger(held.token).await, LingerOutcome::Gone);
            if has_next {
                assert!(!other.lingers().await);
                other.release(&next).await;
            }
            assert!(late.holders("k").await.is_empty());
        }
    });
}

/// A mark whose response is lost has raised the last fence.
#[test]
fn lost_response_of_a_mark_lowers_no_fence() {
    let fake = FirestoreFake::start();
    block_on(async {
        let client = Client::open(&fake.url(), MINUTE).await;
        let held = client.request("k");
        let fence = client.lock(&held).await;
        fake.next_commits([CommitFault::DoneWithError(Code::Unavailable)]);
        let fault = client.store.linger(&key("k"), held.token).await.unwrap_err();
        assert!(fault.is_in_doubt(), "{fault:?}");
        let state = client.store.inspect(&key("k")).await.unwrap().outcome;
        let raised = state.last_fence.unwrap();
        assert!(raised > fence && state.holders[0].lingers && state.holders[0].fence == fence, "{state:?}");
        assert!(client.mark(held.token).await.1 > raised);
        client.release(&held).await;
    });
}

/// An adoption that is committed too late leaves the hold, its fence and its mark to the first holder.
#[test]
fn late_adoption_leaves_the_mark() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (first, second) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        let held = first.request("k");
        let fence = first.lock(&held).await;
        let (_, up_to) = first.mark(held.token).await;
        let not_after = second.store.inspect(&key("k")).await.unwrap().time.after(SHORT);
        let to = TokenId::random().unwrap();
        let adopt = AdoptRequest { key: key("k"), from: held.token, to, session: second.session, not_after };
        fake.next_commits([CommitFault::Delayed]);
        assert!(second.store.adopt(adopt.clone()).await.unwrap_err().is_in_doubt());
        until("the adoption is late", async || second.store.inspect(&key("k")).await.unwrap().time > not_after).await;
        assert_eq!(fake.finish_delayed_commits(), 1);
        assert_eq!(second.store.adopt(adopt).await.unwrap().outcome, AdoptOutcome::Stale);
        let state = first.store.inspect(&key("k")).await.unwrap().outcome;
        assert_eq!((state.holders[0].fence, state.holders[0].lingers), (fence, true));
        let (same, later) = first.mark(held.token).await;
        assert!(same == fence && later > up_to, "{later} after {up_to}");
        first.release(&held).await;
        assert!(second.lock(&second.request("k")).await > later);
    });
}

/// The session of a hold expires before the mark is committed.
#[test]
fn hold_of_expired_session_cannot_linger() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (client, other) = (Client::open(&url, MINUTE).await, Client::open(&url, 100 * MINUTE).await);
        let held = client.request("k");
        client.lock(&held).await;
        let (_, up_to) = client.mark(held.token).await;
        fake.set_clock_offset(120);
        assert_eq!(client.linger(held.token).await, LingerOutcome::Gone);
        let next =
            stanchion::store::AcquireRequest { not_after: other.opened.after(100 * MINUTE), ..other.request("k") };
        assert!(other.lock(&next).await > up_to);
    });
}

/// A hold lingers only while its session hears a recall.
#[test]
fn deaf_session_lets_no_hold_linger() {
    let fake = FirestoreFake::start();
    block_on(async {
        fake.ignore_listens(true);
        let client = Client::open(&fake.url(), MINUTE).await;
        let held = client.request("k");
        client.lock(&held).await;
        assert_eq!(client.linger(held.token).await, LingerOutcome::Wanted);
        assert!(!client.lingers().await);
        fake.ignore_listens(false);
        until("the session hears", async || client.linger(held.token).await != LingerOutcome::Wanted).await;
        assert!(client.lingers().await);
        // The service ends streams from time to time. The next stream repeats what the session missed.
        until("the stream is open", async || fake.streams() == 1).await;
        fake.end_streams();
        client.mark(held.token).await;
        assert_eq!(client.store.release(&held.key, held.token, None).await.unwrap().outcome, EndOutcome::Released);
        assert_eq!(client.linger(held.token).await, LingerOutcome::Gone);
    });
}
