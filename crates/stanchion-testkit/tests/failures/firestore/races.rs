//! Two who do something at once, and what comes when nobody waits for it any more.

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

/// What is tried once, and waits for nothing.
fn at_once(request: AcquireRequest) -> AcquireRequest {
    AcquireRequest { enqueue: false, ..request }
}

/// What was known of a session a moment ago says until when it lives, not that it is dead after that.
#[test]
fn a_session_that_was_beaten_since_it_was_looked_at_lives() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let time = VirtualClock::new();
        let holder = Client::open(&url, MINUTE).await;
        let other = Client::with(Firestore::with_clock(&url, time.clock()).unwrap(), 60 * MINUTE).await;
        holder.gets(&holder.request("k")).await;
        let try_it = || at_once(AcquireRequest { not_after: holder.opened.after(60 * MINUTE), ..other.request("k") });
        for seconds in [50, 100, 150] {
            fake.set_clock_off_by(seconds);
            let beaten = holder.store.renew_session(holder.session).await.unwrap().outcome;
            assert_eq!(beaten, RenewOutcome::Alive { lost: vec![] });
            // Later than the beat before this one was good for, and within a moment of the other's own clock.
            fake.set_clock_off_by(seconds + 30);
            let asked = other.asks(&try_it()).await;
            assert!(matches!(asked, AcquireOutcome::Busy { .. }), "after {seconds} s: {asked:?}");
        }
    });
}

/// One that was not there yet when it was looked at is not dead for that.
#[test]
fn a_session_that_was_asked_for_before_it_was_opened_lives() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (store, other) = (Firestore::from_url(&url).unwrap(), Client::open(&url, MINUTE).await);
        let session = SessionId::random().unwrap();
        assert!(!other.store.session_lives(session).await.unwrap().outcome);
        store.open_session(OpenSession { session, ttl: MINUTE, owner: String::new() }).await.unwrap();
        let request = AcquireRequest { session, ..other.request("k") };
        assert!(matches!(store.acquire(request).await.unwrap().outcome, AcquireOutcome::Granted(_)));
        let asked = other.asks(&at_once(other.request("k"))).await;
        assert!(matches!(asked, AcquireOutcome::Busy { .. }), "{asked:?}");
    });
}

/// Processes that live for a moment sweep nothing, and leave a document each.
#[test]
fn a_crowd_of_short_processes_is_swept_at_once() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let time = VirtualClock::new();
        let sweeper = Client::with(Firestore::with_clock(&url, time.clock()).unwrap(), 600 * MINUTE).await;
        for _ in 0..100 {
            let short = Client::open(&url, MINUTE).await;
            short.store.close_session(short.session).await.unwrap();
        }
        fake.set_clock_off_by(10_000);
        time.advance(MINUTE * 2);
        sweeper.store.renew_session(sweeper.session).await.unwrap();
        until("all of it is gone", async || fake.documents().len() == 1).await;
    });
}

/// Some of many sessions are read earlier than the others, and are judged by that time.
#[test]
fn sessions_that_are_read_in_several_requests_are_not_taken_for_dead() {
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
            readers.gets(&request).await;
            sessions.push(session);
        }
        // It is read with the first ones.
        let session = sessions.into_iter().min().unwrap();
        let beat = async || {
            let beaten = readers.store.renew_session(session).await.unwrap().outcome;
            assert_eq!(beaten, RenewOutcome::Alive { lost: vec![] });
        };
        fake.set_clock_off_by(30);
        beat().await;
        fake.set_clock_off_by(65);
        // The key, the first sessions; and the last ones a minute later.
        fake.hold_reads_after(2);
        let not_after = readers.opened.after(60 * MINUTE);
        let write = at_once(AcquireRequest { demand: Demand::WRITE, not_after, ..other.request("k") });
        let trying = tokio::spawn({
            let store = other.store.clone();
            async move { store.acquire(write).await.unwrap().outcome }
        });
        until("the last are read", async || fake.reads_held() == 1).await;
        beat().await;
        fake.set_clock_off_by(100);
        fake.answer_reads();
        let tried = trying.await.unwrap();
        assert!(matches!(tried, AcquireOutcome::Busy { .. }), "{tried:?}");
    });
}

/// The time of an answer is one at which it was so: by that, who ends a token knows that nothing of it can come.
#[test]
fn nothing_is_found_at_a_time_at_which_nobody_looked() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let holder = Client::open(&url, MINUTE).await;
        let client = Client::open(&url, 60 * MINUTE).await;
        holder.gets(&holder.request("k")).await;
        fake.set_clock_off_by(30);
        holder.store.renew_session(holder.session).await.unwrap();
        // Its session has to be read from now on.
        fake.set_clock_off_by(65);
        holder.store.renew_session(holder.session).await.unwrap();
        assert_eq!(client.holders("k").await.len(), 1);
        let not_after = holder.opened.after(Duration::from_secs(105));
        let request = AcquireRequest { not_after, ..client.request("k") };
        fake.next_commits([CommitFault::HeldBack]);
        let fault = client.store.acquire(request.clone()).await.unwrap_err();
        assert!(fault.is_in_doubt(), "{fault:?}");
        let other = Client::open(&url, 60 * MINUTE).await;
        fake.hold_reads_after(1);
        let ending = tokio::spawn({
            let (store, token) = (other.store.clone(), request.token);
            async move { store.abandon(&key("k"), token).await.unwrap() }
        });
        until("the key is read, the session is not", async || fake.reads_held() == 1).await;
        assert_eq!(fake.let_go(), 1, "it is entered, and in time");
        fake.set_clock_off_by(110);
        fake.answer_reads();
        let ended = ending.await.unwrap();
        assert_eq!(ended.outcome, EndOutcome::Nothing);
        assert!(ended.time <= not_after, "as if nothing could come any more");
        let again = client.store.abandon(&key("k"), request.token).await.unwrap().outcome;
        assert_eq!(again, EndOutcome::Dequeued);
    });
}

#[test]
fn a_session_that_is_opened_again_at_once_is_listened_to_once() {
    let fake = FirestoreFake::start();
    block_on(async {
        let store = Firestore::from_url(&fake.url()).unwrap();
        let session = SessionId::random().unwrap();
        let _pushes = store.grants(session);
        fake.be_mute(true);
        let open = || store.open_session(OpenSession { session, ttl: MINUTE, owner: String::new() });
        // Who asked first had no answer in time, and asks again.
        let (first, second) = tokio::join!(open(), open());
        assert_eq!((first.unwrap().outcome, second.unwrap().outcome), (OpenOutcome::Opened, OpenOutcome::Opened));
        fake.be_mute(false);
        until("somebody listens", async || fake.streams() > 0).await;
        store.close_session(session).await.unwrap();
        until("nobody listens", async || fake.streams() == 0).await;
    });
}

#[test]
fn what_is_adopted_while_its_new_session_is_closed_is_free() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (first, leaving) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        let request = first.request("k");
        first.gets(&request).await;
        let (to, not_after) = (TokenId::random().unwrap(), first.opened.after(MINUTE));
        let adopt = AdoptRequest { key: key("k"), from: request.token, to, session: leaving.session, not_after };
        fake.next_commits([CommitFault::HeldBack]);
        let adopting = tokio::spawn({
            let store = leaving.store.clone();
            async move { store.adopt(adopt).await.unwrap().outcome }
        });
        until("it is on its way", async || fake.held_back() == 1).await;
        leaving.store.close_session(leaving.session).await.unwrap();
        assert_eq!(fake.let_go(), 1);
        let adopted = adopting.await.unwrap();
        assert!(matches!(adopted, AdoptOutcome::Adopted { .. }), "until its session ended: {adopted:?}");
        first.gets(&at_once(first.request("k"))).await;
    });
}

/// Who is not answered asks again, and nothing stays of the first question.
#[test]
fn who_is_not_answered_listens_once() {
    let fake = FirestoreFake::start();
    block_on(async {
        fake.be_mute(true);
        let client = Client::open(&fake.url(), 10 * MINUTE).await;
        until("it has asked again", async || fake.called("Listen") == 3).await;
        fake.be_mute(false);
        let (held, waiting) = (client.request("k"), client.request("k"));
        client.gets(&held).await;
        client.asks(&waiting).await;
        client.store.release(&key("k"), held.token, None).await.unwrap();
        let mut pushes = client.pushes;
        tokio::time::timeout(MINUTE, pushes.next()).await.unwrap().unwrap();
        assert_eq!(fake.streams(), 1);
        client.store.close_session(client.session).await.unwrap();
        until("nobody listens", async || fake.streams() == 0).await;
    });
}

/// An adoption that never was has moved nothing: the hold goes with the session that it is bound to.
#[test]
fn what_was_adopted_too_late_goes_with_its_own_session() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (first, second) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        let request = first.request("k");
        first.gets(&request).await;
        let not_after = second.store.inspect(&key("k")).await.unwrap().time.after(SHORT);
        let to = TokenId::random().unwrap();
        let adopt = AdoptRequest { key: key("k"), from: request.token, to, session: second.session, not_after };
        fake.next_commits([CommitFault::HeldBack]);
        assert!(second.store.adopt(adopt).await.unwrap_err().is_in_doubt());
        assert_eq!(fake.let_go(), 1, "two seconds later");
        first.store.close_session(first.session).await.unwrap();
        let keys: Vec<_> = fake.documents().into_iter().filter(|name| name.starts_with("stanchion_keys")).collect();
        assert!(keys.is_empty(), "{keys:?}");
    });
}

/// The same the other way round: the session that it was adopted from has nothing of it, and closing finds that once.
#[test]
fn what_was_adopted_stays_when_its_former_session_goes() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (first, second) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        let request = first.request("k");
        let fence = first.gets(&request).await;
        let (to, not_after) = (TokenId::random().unwrap(), first.opened.after(MINUTE));
        let adopt = AdoptRequest { key: key("k"), from: request.token, to, session: second.session, not_after };
        let adopted = second.store.adopt(adopt).await.unwrap().outcome;
        assert!(matches!(adopted, AdoptOutcome::Adopted { .. }), "{adopted:?}");
        first.store.close_session(first.session).await.unwrap();
        assert_eq!(second.holders("k").await, [fence]);
        let before = fake.calls();
        first.store.close_session(first.session).await.unwrap();
        let mut after = fake.calls();
        *after.get_mut("Commit").unwrap() -= 1;
        *after.get_mut("RunQuery").unwrap() -= 1;
        assert_eq!(after, before, "no key names it");
    });
}

#[test]
fn an_acquire_that_cannot_be_taken_back_is_in_doubt() {
    let fake = FirestoreFake::start();
    block_on(async {
        let client = Client::open(&fake.url(), MINUTE).await;
        let request = AcquireRequest { lifetime: Lifetime::Fixed(MINUTE), ..client.request("k") };
        fake.next_commits([CommitFault::AnsweredLate]);
        let asking = tokio::spawn({
            let (store, request) = (client.store.clone(), request.clone());
            async move { store.acquire(request).await.unwrap_err() }
        });
        until("it is done", async || fake.held_back() == 1).await;
        client.store.close_session(client.session).await.unwrap();
        fake.next_commits([CommitFault::Refused(Code::ResourceExhausted)]);
        fake.let_go();
        let fault = asking.await.unwrap();
        assert!(fault.kind() == ErrorKind::RateLimited && fault.is_in_doubt(), "{fault:?}");
        let polled = client.store.poll(&key("k"), &[request.token]).await.unwrap().outcome[0];
        assert!(matches!(polled, PollOutcome::Granted(_)), "it was entered: {polled:?}");
    });
}

#[test]
fn a_beat_that_is_answered_after_the_end_of_its_session_revives_nothing() {
    let fake = FirestoreFake::start();
    block_on(async {
        let client = Client::open(&fake.url(), MINUTE).await;
        fake.next_commits([CommitFault::AnsweredLate]);
        let beating = tokio::spawn({
            let (store, session) = (client.store.clone(), client.session);
            async move { store.renew_session(session).await }
        });
        until("it is done", async || fake.held_back() == 1).await;
        client.store.close_session(client.session).await.unwrap();
        fake.let_go();
        let _whichever = beating.await.unwrap();
        assert_eq!(client.asks(&client.request("k")).await, AcquireOutcome::SessionGone);
    });
}

/// A hold that time has ended leaves nothing that calls it, though its session lives on for weeks.
#[test]
fn what_called_a_hold_goes_with_it() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (first, second) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        for lifetime in [Lifetime::Fixed(SHORT), Lifetime::Session { max_hold: Some(SHORT) }] {
            let held = first.request("k");
            first.gets(&held).await;
            let waiting = AcquireRequest { lifetime, ..second.request("k") };
            assert!(matches!(second.asks(&waiting).await, AcquireOutcome::Queued(_)));
            first.store.release(&key("k"), held.token, None).await.unwrap();
            let polled = second.store.poll(&key("k"), &[waiting.token]).await.unwrap().outcome[0];
            assert!(matches!(polled, PollOutcome::Granted(_)), "{polled:?}");
            until("its time is over", async || first.holders("k").await.is_empty()).await;
            let ended = second.store.release(&key("k"), waiting.token, None).await.unwrap().outcome;
            assert_eq!(ended, EndOutcome::Nothing);
            let calls: Vec<_> = fake.documents().into_iter().filter(|name| name.contains("_calls/")).collect();
            assert!(calls.is_empty(), "{lifetime:?}: {calls:?}");
        }
    });
}

/// One document that cannot be read does not keep the others.
#[test]
fn a_sweep_passes_over_what_cannot_be_swept() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let time = VirtualClock::new();
        let sweeper = Client::with(Firestore::with_clock(&url, time.clock()).unwrap(), 600 * MINUTE).await;
        for turn in 0..6 {
            let dead = Client::open(&url, SHORT).await;
            dead.gets(&dead.request(&format!("k{turn}"))).await;
            let fixed = AcquireRequest { lifetime: Lifetime::Fixed(SHORT), ..dead.request(&format!("fixed{turn}")) };
            dead.gets(&fixed).await;
        }
        let own = format!("stanchion_sessions/{}", sweeper.session.to_hex());
        let of = |begin: &str| -> Vec<String> {
            fake.documents().into_iter().filter(|name| name.starts_with(begin) && *name != own).collect()
        };
        let (session, key) = (of("stanchion_sessions")[0].clone(), of("stanchion_keys")[0].clone());
        fake.spoil(&session);
        fake.spoil(&key);
        fake.set_clock_off_by(10_000);
        time.advance(MINUTE * 2);
        sweeper.store.renew_session(sweeper.session).await.unwrap();
        until("all others are gone", async || {
            let left = fake.documents().into_iter().filter(|name| *name != own && *name != session && *name != key);
            // Of what cannot be read: the key of that session, and the session of that key.
            left.count() <= 2
        })
        .await;
    });
}
