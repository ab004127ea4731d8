//! Checks concurrent operations, and responses that arrive when nobody waits for them any more.

use std::time::Duration;

use stanchion::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, Demand, EndOutcome, Firestore, Lifetime, OpenOutcome,
    OpenSession, PollOutcome, RenewOutcome,
};
use stanchion::{ErrorKind, SessionId, Store as _, TokenId, VirtualClock};
use stanchion_testkit::servers::{CommitFault, FirestoreFake};
use stanchion_testkit::{block_on, until};
use tonic::Code;

use super::{Client, MINUTE, SHORT, key};

/// Returns the request as a single attempt that does not queue.
fn without_queue(request: AcquireRequest) -> AcquireRequest {
    AcquireRequest { enqueue: false, ..request }
}

/// A cached expiry says until when a session lives at least, not that it has expired afterwards.
#[test]
fn renewed_session_outlives_cached_state() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let time = VirtualClock::new();
        let holder = Client::open(&url, MINUTE).await;
        let other = Client::with(Firestore::with_clock(&url, time.clock()).unwrap(), 60 * MINUTE).await;
        holder.lock(&holder.request("k")).await;
        let attempt =
            || without_queue(AcquireRequest { not_after: holder.opened.after(60 * MINUTE), ..other.request("k") });
        for seconds in [50, 100, 150] {
            fake.set_clock_offset(seconds);
            let renewed = holder.store.renew_session(holder.session).await.unwrap().outcome;
            assert_eq!(renewed, RenewOutcome::Alive { lost: vec![] });
            // This is after the expiry that the other handle has cached, and its own clock has not moved.
            fake.set_clock_offset(seconds + 30);
            let outcome = other.acquire(&attempt()).await;
            assert!(matches!(outcome, AcquireOutcome::Busy { .. }), "after {seconds} s: {outcome:?}");
        }
    });
}

/// A session that was missing when it was read must not be cached as expired.
#[test]
fn session_queried_before_opening_is_alive() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (store, other) = (Firestore::from_url(&url).unwrap(), Client::open(&url, MINUTE).await);
        let session = SessionId::random().unwrap();
        assert!(!other.store.session_lives(session).await.unwrap().outcome);
        store.open_session(OpenSession { session, ttl: MINUTE, owner: String::new() }).await.unwrap();
        let request = AcquireRequest { session, ..other.request("k") };
        assert!(matches!(store.acquire(request).await.unwrap().outcome, AcquireOutcome::Granted(_)));
        let outcome = other.acquire(&without_queue(other.request("k"))).await;
        assert!(matches!(outcome, AcquireOutcome::Busy { .. }), "{outcome:?}");
    });
}

/// Short-lived processes run no reaper, and each leaves one document.
#[test]
fn one_run_reaps_100_closed_sessions() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let time = VirtualClock::new();
        let reaper = Client::with(Firestore::with_clock(&url, time.clock()).unwrap(), 600 * MINUTE).await;
        for _ in 0..100 {
            let short = Client::open(&url, MINUTE).await;
            short.store.close_session(short.session).await.unwrap();
        }
        fake.set_clock_offset(10_000);
        time.advance(MINUTE * 2);
        reaper.store.renew_session(reaper.session).await.unwrap();
        until("only the reaper's session is left", async || fake.documents().len() == 1).await;
    });
}

/// The sessions of a large key are read in several requests, and each must be judged by the time of the first one.
#[test]
fn sessions_read_in_batches_stay_alive() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let readers = Client::open(&url, MINUTE).await;
        let other = Client::open(&url, 60 * MINUTE).await;
        let mut sessions = Vec::new();
        for _ in 0..301 {
            let session = SessionId::random().unwrap();
            let open = OpenSession { session, ttl: MINUTE, owner: String::new() };
            readers.store.open_session(open).await.unwrap();
            let request = AcquireRequest { demand: Demand::READ, session, ..readers.request("k") };
            readers.lock(&request).await;
            sessions.push(session);
        }
        // The lowest ID is read in the first request.
        let session = sessions.into_iter().min().unwrap();
        let renew = async || {
            let renewed = readers.store.renew_session(session).await.unwrap().outcome;
            assert_eq!(renewed, RenewOutcome::Alive { lost: vec![] });
        };
        fake.set_clock_offset(30);
        renew().await;
        fake.set_clock_offset(65);
        // Allow two reads, the key and the first batch of sessions. The last batch is read later.
        fake.hold_reads_after(2);
        let not_after = readers.opened.after(60 * MINUTE);
        let write = without_queue(AcquireRequest { demand: Demand::WRITE, not_after, ..other.request("k") });
        let trying = tokio::spawn({
            let store = other.store.clone();
            async move { store.acquire(write).await.unwrap().outcome }
        });
        until("the last batch is being read", async || fake.held_reads() == 1).await;
        renew().await;
        fake.set_clock_offset(100);
        fake.answer_reads();
        let outcome = trying.await.unwrap();
        assert!(matches!(outcome, AcquireOutcome::Busy { .. }), "{outcome:?}");
    });
}

/// The returned time must be one at which the result was true: a client that releases a token relies on it to know that
/// the token's acquire can no longer take effect.
#[test]
fn reply_time_is_not_after_its_read() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let holder = Client::open(&url, MINUTE).await;
        let client = Client::open(&url, 60 * MINUTE).await;
        holder.lock(&holder.request("k")).await;
        fake.set_clock_offset(30);
        holder.store.renew_session(holder.session).await.unwrap();
        // The cached expiry of the holder's session is over, so the session has to be read.
        fake.set_clock_offset(65);
        holder.store.renew_session(holder.session).await.unwrap();
        assert_eq!(client.holders("k").await.len(), 1);
        let not_after = holder.opened.after(Duration::from_secs(105));
        let request = AcquireRequest { not_after, ..client.request("k") };
        fake.next_commits([CommitFault::Delayed]);
        let fault = client.store.acquire(request.clone()).await.unwrap_err();
        assert!(fault.is_in_doubt(), "{fault:?}");
        let other = Client::open(&url, 60 * MINUTE).await;
        fake.hold_reads_after(1);
        let ending = tokio::spawn({
            let (store, token) = (other.store.clone(), request.token);
            async move { store.abandon(&key("k"), token).await.unwrap() }
        });
        until("the key has been read and the session has not", async || fake.held_reads() == 1).await;
        assert_eq!(fake.finish_delayed_commits(), 1, "the acquire is committed in time");
        fake.set_clock_offset(110);
        fake.answer_reads();
        let ended = ending.await.unwrap();
        assert_eq!(ended.outcome, EndOutcome::Nothing);
        assert!(ended.time <= not_after, "the returned time does not rule out a late acquire");
        let again = client.store.abandon(&key("k"), request.token).await.unwrap().outcome;
        assert_eq!(again, EndOutcome::Dequeued);
    });
}

#[test]
fn two_opens_start_one_listener() {
    let fake = FirestoreFake::start();
    block_on(async {
        let store = Firestore::from_url(&fake.url()).unwrap();
        let session = SessionId::random().unwrap();
        let _pushes = store.grants(session);
        fake.ignore_listens(true);
        let open = || store.open_session(OpenSession { session, ttl: MINUTE, owner: String::new() });
        // The second call repeats the first one, which has no response yet.
        let (first, second) = tokio::join!(open(), open());
        assert_eq!((first.unwrap().outcome, second.unwrap().outcome), (OpenOutcome::Opened, OpenOutcome::Opened));
        fake.ignore_listens(false);
        until("the session has a stream", async || fake.streams() > 0).await;
        store.close_session(session).await.unwrap();
        until("the stream is closed", async || fake.streams() == 0).await;
    });
}

#[test]
fn adoption_into_closing_session_frees_key() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (first, leaving) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        let request = first.request("k");
        first.lock(&request).await;
        let (to, not_after) = (TokenId::random().unwrap(), first.opened.after(MINUTE));
        let adopt = AdoptRequest { key: key("k"), from: request.token, to, session: leaving.session, not_after };
        fake.next_commits([CommitFault::Delayed]);
        let adopting = tokio::spawn({
            let store = leaving.store.clone();
            async move { store.adopt(adopt).await.unwrap().outcome }
        });
        until("the adoption is delayed", async || fake.delayed_commits() == 1).await;
        leaving.store.close_session(leaving.session).await.unwrap();
        assert_eq!(fake.finish_delayed_commits(), 1);
        let adopted = adopting.await.unwrap();
        assert!(matches!(adopted, AdoptOutcome::Adopted { .. }), "the session closed after the adoption: {adopted:?}");
        first.lock(&without_queue(first.request("k"))).await;
    });
}

/// The client repeats a listen request that is not answered, and must abandon the first one.
#[test]
fn unanswered_listens_leave_one_stream() {
    let fake = FirestoreFake::start();
    block_on(async {
        fake.ignore_listens(true);
        let client = Client::open(&fake.url(), 10 * MINUTE).await;
        until("the client has repeated the request", async || fake.request_count("Listen") == 3).await;
        fake.ignore_listens(false);
        let (held, waiting) = (client.request("k"), client.request("k"));
        client.lock(&held).await;
        client.acquire(&waiting).await;
        client.store.release(&key("k"), held.token, None).await.unwrap();
        let mut pushes = client.pushes;
        tokio::time::timeout(MINUTE, pushes.next()).await.unwrap().unwrap();
        assert_eq!(fake.streams(), 1);
        client.store.close_session(client.session).await.unwrap();
        until("the stream is closed", async || fake.streams() == 0).await;
    });
}

/// The late adoption took no effect, so the hold is released with its original session.
#[test]
fn late_adoption_leaves_hold_to_old_session() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (first, second) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        let request = first.request("k");
        first.lock(&request).await;
        let not_after = second.store.inspect(&key("k")).await.unwrap().time.after(SHORT);
        let to = TokenId::random().unwrap();
        let adopt = AdoptRequest { key: key("k"), from: request.token, to, session: second.session, not_after };
        fake.next_commits([CommitFault::Delayed]);
        assert!(second.store.adopt(adopt).await.unwrap_err().is_in_doubt());
        assert_eq!(fake.finish_delayed_commits(), 1, "the commit succeeds, but 2 seconds later");
        first.store.close_session(first.session).await.unwrap();
        let keys: Vec<_> = fake.documents().into_iter().filter(|name| name.starts_with("stanchion_keys")).collect();
        assert!(keys.is_empty(), "{keys:?}");
    });
}

/// The adopted hold no longer belongs to its first session, and closing that session must find it only once.
#[test]
fn adopted_hold_outlives_its_old_session() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (first, second) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        let request = first.request("k");
        let fence = first.lock(&request).await;
        let (to, not_after) = (TokenId::random().unwrap(), first.opened.after(MINUTE));
        let adopt = AdoptRequest { key: key("k"), from: request.token, to, session: second.session, not_after };
        let adopted = second.store.adopt(adopt).await.unwrap().outcome;
        assert!(matches!(adopted, AdoptOutcome::Adopted { .. }), "{adopted:?}");
        first.store.close_session(first.session).await.unwrap();
        assert_eq!(second.holders("k").await, [fence]);
        let before = fake.request_counts();
        first.store.close_session(first.session).await.unwrap();
        let mut after = fake.request_counts();
        *after.get_mut("Commit").unwrap() -= 1;
        *after.get_mut("RunQuery").unwrap() -= 1;
        assert_eq!(after, before, "no key's document refers to the session");
    });
}

#[test]
fn failed_undo_is_indeterminate() {
    let fake = FirestoreFake::start();
    block_on(async {
        let client = Client::open(&fake.url(), MINUTE).await;
        let request = AcquireRequest { lifetime: Lifetime::Fixed(MINUTE), ..client.request("k") };
        fake.next_commits([CommitFault::AnsweredLate]);
        let acquiring = tokio::spawn({
            let (store, request) = (client.store.clone(), request.clone());
            async move { store.acquire(request).await.unwrap_err() }
        });
        until("the commit is done", async || fake.delayed_commits() == 1).await;
        client.store.close_session(client.session).await.unwrap();
        fake.next_commits([CommitFault::Rejected(Code::ResourceExhausted)]);
        fake.finish_delayed_commits();
        let fault = acquiring.await.unwrap();
        assert!(fault.kind() == ErrorKind::RateLimited && fault.is_in_doubt(), "{fault:?}");
        let polled = client.store.poll(&key("k"), &[request.token]).await.unwrap().outcome[0];
        assert!(matches!(polled, PollOutcome::Granted(_)), "the acquire was committed: {polled:?}");
    });
}

#[test]
fn renewal_reply_does_not_revive_closed_session() {
    let fake = FirestoreFake::start();
    block_on(async {
        let client = Client::open(&fake.url(), MINUTE).await;
        fake.next_commits([CommitFault::AnsweredLate]);
        let renewing = tokio::spawn({
            let (store, session) = (client.store.clone(), client.session);
            async move { store.renew_session(session).await }
        });
        until("the commit is done", async || fake.delayed_commits() == 1).await;
        client.store.close_session(client.session).await.unwrap();
        fake.finish_delayed_commits();
        let _ = renewing.await.unwrap(); // either reply is fine
        assert_eq!(client.acquire(&client.request("k")).await, AcquireOutcome::SessionGone);
    });
}

/// The notification must not stay until the session ends, which can be weeks later.
#[test]
fn expired_hold_notifies_nobody() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (first, second) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        for lifetime in [Lifetime::Fixed(SHORT), Lifetime::Session { max_hold: Some(SHORT) }] {
            let held = first.request("k");
            first.lock(&held).await;
            let waiting = AcquireRequest { lifetime, ..second.request("k") };
            assert!(matches!(second.acquire(&waiting).await, AcquireOutcome::Queued(_)));
            first.store.release(&key("k"), held.token, None).await.unwrap();
            let polled = second.store.poll(&key("k"), &[waiting.token]).await.unwrap().outcome[0];
            assert!(matches!(polled, PollOutcome::Granted(_)), "{polled:?}");
            until("the hold has expired", async || first.holders("k").await.is_empty()).await;
            let ended = second.store.release(&key("k"), waiting.token, None).await.unwrap().outcome;
            assert_eq!(ended, EndOutcome::Nothing);
            let notifications: Vec<_> = fake.documents().into_iter().filter(|name| name.contains("_calls/")).collect();
            assert!(notifications.is_empty(), "{lifetime:?}: {notifications:?}");
        }
    });
}

/// An unreadable document must not keep the reaper from the other ones.
#[test]
fn reaper_skips_unreadable_documents() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let time = VirtualClock::new();
        let reaper = Client::with(Firestore::with_clock(&url, time.clock()).unwrap(), 600 * MINUTE).await;
        for number in 0..6 {
            let expired = Client::open(&url, SHORT).await;
            expired.lock(&expired.request(&format!("k{number}"))).await;
            let fixed =
                AcquireRequest { lifetime: Lifetime::Fixed(SHORT), ..expired.request(&format!("fixed{number}")) };
            expired.lock(&fixed).await;
        }
        let own = format!("stanchion_sessions/{}", reaper.session.to_hex());
        let of = |begin: &str| -> Vec<String> {
            fake.documents().into_iter().filter(|name| name.starts_with(begin) && *name != own).collect()
        };
        let (session, key) = (of("stanchion_sessions")[0].clone(), of("stanchion_keys")[0].clone());
        fake.corrupt(&session);
        fake.corrupt(&key);
        fake.set_clock_offset(10_000);
        time.advance(MINUTE * 2);
        reaper.store.renew_session(reaper.session).await.unwrap();
        until("all readable documents are gone", async || {
            let left = fake.documents().into_iter().filter(|name| *name != own && *name != session && *name != key);
            // The unreadable session still has a key, and the unreadable key still has a session.
            left.count() <= 2
        })
        .await;
    });
}
