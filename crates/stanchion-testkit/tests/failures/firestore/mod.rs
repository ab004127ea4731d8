//! Firestore where something goes wrong, and what it costs. In the fake, so these run everywhere.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "test code")]

mod costs;
mod listing;
mod races;

use std::time::Duration;

use stanchion::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, Demand, EndOutcome, ExtendOutcome, Firestore,
    GrantStream, Lifetime, OpenSession, PollOutcome, Push, RenewOutcome, StoreTime,
};
use stanchion::{ErrorKind, Fence, Key, Locks, Released, SessionId, Store, TokenId, VirtualClock};
use stanchion_testkit::servers::{CommitFault, FirestoreFake};
use stanchion_testkit::{block_on, until};
use tonic::Code;

const MINUTE: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(400);

fn key(name: &str) -> Key {
    Key::new("", name).unwrap()
}

/// A process: a handle and its session.
struct Client {
    store: Firestore,
    session: SessionId,
    pushes: GrantStream,
    opened: StoreTime,
}

impl Client {
    async fn open(url: &str, ttl: Duration) -> Self {
        Self::with(Firestore::from_url(url).unwrap(), ttl).await
    }

    async fn with(store: Firestore, ttl: Duration) -> Self {
        let session = SessionId::random().unwrap();
        let pushes = store.grants(session);
        let opened = store.open_session(OpenSession { session, ttl, owner: "somebody".into() }).await.unwrap().time;
        Self { store, session, pushes, opened }
    }

    fn request(&self, name: &str) -> AcquireRequest {
        AcquireRequest {
            key: key(name),
            token: TokenId::random().unwrap(),
            session: self.session,
            demand: Demand::MUTEX,
            lifetime: Lifetime::Session { max_hold: None },
            enqueue: true,
            not_after: self.opened.after(MINUTE),
            metadata: None,
            trace: None,
        }
    }

    async fn asks(&self, request: &AcquireRequest) -> AcquireOutcome {
        self.store.acquire(request.clone()).await.unwrap().outcome
    }

    async fn gets(&self, request: &AcquireRequest) -> Fence {
        match self.asks(request).await {
            AcquireOutcome::Granted(granted) => granted.fence,
            other => panic!("not granted: {other:?}"),
        }
    }

    async fn holders(&self, name: &str) -> Vec<Fence> {
        let state = self.store.inspect(&key(name)).await.unwrap().outcome;
        state.holders.iter().map(|holder| holder.fence).collect()
    }
}

/// Nothing that a step did is done again by the store, and what was done without an answer is found.
#[test]
fn an_answer_that_was_lost_leaves_one_hold() {
    let fake = FirestoreFake::start();
    block_on(async {
        let client = Client::open(&fake.url(), MINUTE).await;
        let request = client.request("k");
        fake.next_commits([CommitFault::DoneBut(Code::Unavailable)]);
        let fault = client.store.acquire(request.clone()).await.unwrap_err();
        assert!(fault.is_in_doubt() && fault.is_transient(), "{fault:?}");
        let fence = client.gets(&request).await;
        assert_eq!(client.holders("k").await, [fence], "the repeat found what the first one did");
        fake.next_commits([CommitFault::DoneBut(Code::DeadlineExceeded)]);
        let fault = client.store.release(&key("k"), request.token, None).await.unwrap_err();
        assert!(fault.is_in_doubt() && fault.kind() == ErrorKind::NetworkTimeout, "{fault:?}");
        let again = client.store.release(&key("k"), request.token, None).await.unwrap().outcome;
        assert_eq!(again, EndOutcome::Nothing);
        fake.next_commits([CommitFault::Refused(Code::ResourceExhausted)]);
        let fault = client.store.acquire(client.request("other")).await.unwrap_err();
        assert!(!fault.is_in_doubt() && fault.kind() == ErrorKind::RateLimited, "{fault:?}");
        assert!(client.holders("other").await.is_empty());
    });
}

#[test]
fn a_library_without_answers_gets_the_lock_and_leaves_nothing() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let locks = Locks::open(&url).await.unwrap();
        for fault in
            [CommitFault::DoneBut(Code::Unavailable), CommitFault::Silent, CommitFault::Refused(Code::Internal)]
        {
            fake.next_commits([fault]);
            let guard = locks.lock("k").await.unwrap();
            guard.check().unwrap();
            assert_eq!(guard.release().await.unwrap(), Released::Now, "{fault:?}");
        }
        locks.close().await.unwrap();
        until("no key is left", async || !fake.documents().iter().any(|name| name.starts_with("stanchion_keys"))).await;
    });
}

/// The model's C1: the create arrives after its end was answered.
#[test]
fn an_acquire_that_arrives_after_its_time_never_was() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (late, other) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        for (name, is_queued) in [("free", false), ("held", true)] {
            let holder = other.request(name);
            if is_queued {
                other.gets(&holder).await;
            }
            let now = late.store.inspect(&key(name)).await.unwrap().time;
            let request = AcquireRequest { not_after: now.after(SHORT), ..late.request(name) };
            fake.next_commits([CommitFault::HeldBack]);
            assert!(late.store.acquire(request.clone()).await.unwrap_err().is_in_doubt());
            let mut ended = late.store.abandon(&key(name), request.token).await.unwrap();
            while ended.time <= request.not_after {
                ended = late.store.abandon(&key(name), request.token).await.unwrap();
            }
            assert_eq!(ended.outcome, EndOutcome::Nothing, "from now on nothing of it can appear");
            assert_eq!(fake.let_go(), 1, "its commit is done");
            assert_eq!(late.store.poll(&key(name), &[request.token]).await.unwrap().outcome[0], PollOutcome::Gone);
            assert_eq!(late.asks(&request).await, AcquireOutcome::Stale);
            let state = other.store.inspect(&key(name)).await.unwrap().outcome;
            assert_eq!((state.holders.len(), state.waiters.len()), (usize::from(is_queued), 0));
            if is_queued {
                other.store.release(&key(name), holder.token, None).await.unwrap();
            }
            let next = other.request(name);
            other.gets(&next).await;
            other.store.release(&key(name), next.token, None).await.unwrap();
        }
    });
}

/// The same for one that was late on its way and is answered.
#[test]
fn an_acquire_that_is_answered_too_late_is_stale_and_leaves_nothing() {
    let fake = FirestoreFake::start();
    block_on(async {
        let client = Client::open(&fake.url(), MINUTE).await;
        let now = client.store.inspect(&key("k")).await.unwrap().time;
        let request = AcquireRequest { not_after: now, ..client.request("k") };
        assert_eq!(client.asks(&request).await, AcquireOutcome::Stale);
        assert!(!fake.documents().iter().any(|name| name.starts_with("stanchion_keys")));
    });
}

#[test]
fn an_adoption_that_arrives_after_its_time_changes_nothing() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (first, second) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        let request = AcquireRequest { lifetime: Lifetime::Fixed(MINUTE), ..first.request("k") };
        first.gets(&request).await;
        let now = second.store.inspect(&key("k")).await.unwrap().time;
        let to = TokenId::random().unwrap();
        let not_after = now.after(SHORT);
        let adopt = AdoptRequest { key: key("k"), from: request.token, to, session: second.session, not_after };
        fake.next_commits([CommitFault::HeldBack]);
        assert!(second.store.adopt(adopt.clone()).await.unwrap_err().is_in_doubt());
        until("it is late", async || second.store.inspect(&key("k")).await.unwrap().time > not_after).await;
        assert_eq!(fake.let_go(), 1);
        assert_eq!(second.store.poll(&key("k"), &[to]).await.unwrap().outcome[0], PollOutcome::Gone);
        assert_eq!(second.store.adopt(adopt).await.unwrap().outcome, AdoptOutcome::Stale);
        let polled = first.store.poll(&key("k"), &[request.token]).await.unwrap().outcome[0];
        assert!(matches!(polled, PollOutcome::Granted(_)), "it is still the first one's: {polled:?}");
    });
}

/// A beat that comes after the end of its session does not bring it back.
#[test]
fn a_beat_that_arrives_late_revives_nothing() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (late, other) = (Client::open(&url, SHORT).await, Client::open(&url, MINUTE).await);
        let held = late.request("k");
        let first = late.gets(&held).await;
        fake.next_commits([CommitFault::HeldBack]);
        assert!(late.store.renew_session(late.session).await.is_err());
        // Nobody has looked meanwhile: only the beat itself says that it came too late.
        assert_eq!(fake.let_go(), 1);
        assert_eq!(late.store.renew_session(late.session).await.unwrap().outcome, RenewOutcome::Gone);
        assert_eq!(late.asks(&late.request("k")).await, AcquireOutcome::SessionGone);
        assert!(other.gets(&other.request("k")).await > first);
        let again = OpenSession { session: late.session, ttl: MINUTE, owner: String::new() };
        assert_eq!(late.store.open_session(again).await.unwrap().outcome, stanchion::store::OpenOutcome::Gone);
    });
}

/// Two clients, one of which lags: what it decided before the other came does nothing any more.
#[test]
fn of_two_clients_the_one_that_lags_changes_nothing() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (lags, other) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        let mut last = Fence::new(0);
        for round in 0..4 {
            let request = AcquireRequest { lifetime: Lifetime::Fixed(SHORT), ..lags.request("k") };
            let fence = lags.gets(&request).await;
            assert!(fence > last);
            fake.next_commits([CommitFault::HeldBack]);
            let held_back = match round % 2 {
                0 => lags.store.extend(&key("k"), request.token, MINUTE).await.map(drop),
                _ => lags.store.release(&key("k"), request.token, Some(MINUTE)).await.map(drop),
            };
            assert!(held_back.unwrap_err().is_in_doubt());
            // Its lifetime is over, and the key another's, by the time that its commit is done.
            let next = other.request("k");
            let mut taken = other.asks(&next).await;
            until("the other has it", async || {
                taken = other.asks(&next).await;
                matches!(taken, AcquireOutcome::Granted(_))
            })
            .await;
            assert_eq!(fake.let_go(), 0, "refused: the key has changed");
            let AcquireOutcome::Granted(granted) = taken else { unreachable!() };
            assert!(granted.fence > fence);
            assert_eq!(other.holders("k").await, [granted.fence], "never two");
            let extended = lags.store.extend(&key("k"), request.token, MINUTE).await.unwrap().outcome;
            assert_eq!(extended, ExtendOutcome::NotHeld);
            other.store.release(&key("k"), next.token, None).await.unwrap();
            last = granted.fence;
        }
    });
}

#[test]
fn a_storm_of_aborted_commits_passes_or_is_told() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (one, two) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        fake.next_commits([CommitFault::Refused(Code::Aborted); 4]);
        let held = one.request("k");
        let first = one.gets(&held).await;
        assert_eq!(fake.faults_left(), 0);
        let waiting = two.request("k");
        fake.next_commits([CommitFault::Refused(Code::Aborted); 4]);
        assert!(matches!(two.asks(&waiting).await, AcquireOutcome::Queued(_)));
        fake.next_commits([CommitFault::Refused(Code::Aborted); 4]);
        let ended = one.store.release(&key("k"), held.token, None).await.unwrap().outcome;
        assert_eq!(ended, EndOutcome::Released);
        assert!(two.gets(&waiting).await > first);
        fake.next_commits([CommitFault::Refused(Code::Aborted); 100]);
        let fault = one.store.acquire(one.request("k")).await.unwrap_err();
        assert!(fault.is_transient() && !fault.is_in_doubt(), "{fault:?}");
        assert!(fake.faults_left() > 0, "it does not try for ever");
    });
}

#[test]
fn credentials_that_are_refused_are_told_and_may_get_better() {
    let fake = FirestoreFake::start();
    block_on(async {
        let client = Client::open(&fake.url(), MINUTE).await;
        fake.refuse_credentials(true);
        let faults = [
            client.store.acquire(client.request("k")).await.map(drop).unwrap_err(),
            client.store.renew_session(client.session).await.map(drop).unwrap_err(),
            client.store.inspect(&key("k")).await.map(drop).unwrap_err(),
            client.store.list("", None, 10).await.map(drop).unwrap_err(),
        ];
        for fault in faults {
            assert_eq!((fault.kind(), fault.is_in_doubt()), (ErrorKind::Unauthorized, false), "{fault:?}");
            assert!(!format!("{fault:?} {fault}").contains("Bearer"), "{fault:?}");
        }
        fake.refuse_credentials(false);
        client.gets(&client.request("k")).await;
    });
}

#[test]
fn nobody_there_is_no_doubt() {
    block_on(async {
        let port = stanchion_testkit::servers::free_port();
        let store = Firestore::from_url(&format!("firestore://p?emulator=127.0.0.1:{port}")).unwrap();
        let session = SessionId::random().unwrap();
        let open = OpenSession { session, ttl: MINUTE, owner: String::new() };
        let fault = store.open_session(open).await.unwrap_err();
        assert_eq!((fault.kind(), fault.is_in_doubt()), (ErrorKind::Unavailable, false), "{fault:?}");
    });
}

#[test]
fn a_stream_that_ends_is_opened_again() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (one, mut two) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        let held = one.request("k");
        one.gets(&held).await;
        let waiting = two.request("k");
        two.asks(&waiting).await;
        until("both listen", async || fake.streams() == 2).await;
        let listened = fake.called("Listen");
        fake.end_streams();
        one.store.release(&key("k"), held.token, None).await.unwrap();
        let called = tokio::time::timeout(MINUTE, async {
            loop {
                match two.pushes.next().await {
                    Some(Push::Granted { token, .. }) => return token,
                    Some(_) => {}
                    None => panic!("the stream is over"),
                }
            }
        });
        assert_eq!(called.await.unwrap(), waiting.token, "what was called meanwhile is told too");
        assert!(fake.called("Listen") > listened);
    });
}

#[test]
fn a_stream_that_says_nothing_costs_time_alone() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (one, two) = (Locks::open(&url).await.unwrap(), Locks::open(&url).await.unwrap());
        let guard = one.lock("k").await.unwrap();
        let waiting = tokio::spawn(two.lock("k").into_future());
        until("it waits", async || one.inspect("k").await.unwrap().waiters.len() == 1).await;
        fake.be_deaf(true);
        let fence = guard.fence();
        guard.release().await.unwrap();
        let granted = tokio::time::timeout(MINUTE, waiting).await.expect("it asks by itself");
        assert!(granted.unwrap().unwrap().fence() > fence);
    });
}

/// The service's clock an hour before or behind the machine's is the machine's clock an hour off.
#[test]
fn a_clock_that_is_an_hour_off_changes_nothing() {
    for seconds in [-3_600, 3_600] {
        let fake = FirestoreFake::start();
        fake.set_clock_off_by(seconds);
        block_on(async {
            let url = fake.url();
            let (one, two) = (Locks::open(&url).await.unwrap(), Locks::open(&url).await.unwrap());
            let guard = one.lock("k").ttl(Duration::from_millis(1_500)).await.unwrap();
            let fence = guard.fence();
            assert!(guard.remaining().unwrap() > Duration::from_millis(500), "{seconds}: {:?}", guard.remaining());
            assert!(two.try_lock("k").await.unwrap().is_none(), "{seconds}");
            guard.detach();
            let guard = two.lock("k").await.unwrap();
            assert!(guard.fence() > fence, "{seconds}: after its lifetime");
            assert_eq!(guard.release().await.unwrap(), Released::Now);
            one.close().await.unwrap();
            two.close().await.unwrap();
        });
    }
}

/// A process whose own clock jumps by hours, either way beside the other's, is refused and granted like any other.
#[test]
fn the_clients_clock_decides_nothing() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (ahead, behind) = (VirtualClock::new(), VirtualClock::new());
        ahead.advance(Duration::from_secs(7_200));
        let one = Client::with(Firestore::with_clock(&url, ahead.clock()).unwrap(), MINUTE).await;
        let two = Client::with(Firestore::with_clock(&url, behind.clock()).unwrap(), MINUTE).await;
        let held = AcquireRequest { lifetime: Lifetime::Fixed(MINUTE), ..two.request("k") };
        let fence = two.gets(&held).await;
        // An hour passes for one of them, and not for the service.
        ahead.advance(Duration::from_secs(3_600));
        let contends = AcquireRequest { enqueue: false, ..one.request("k") };
        assert!(matches!(one.asks(&contends).await, AcquireOutcome::Busy { .. }), "the lifetime has not passed");
        one.gets(&one.request("other")).await;
        let beaten = one.store.renew_session(one.session).await.unwrap().outcome;
        assert_eq!(beaten, RenewOutcome::Alive { lost: vec![] }, "nor has the session's");
        // An hour passes for the service alone.
        fake.set_clock_off_by(3_600);
        assert_eq!(two.store.poll(&key("k"), &[held.token]).await.unwrap().outcome[0], PollOutcome::Gone);
        assert_eq!(two.store.renew_session(two.session).await.unwrap().outcome, RenewOutcome::Gone);
        let third = Client::open(&url, MINUTE).await;
        let taken = AcquireRequest { not_after: third.opened.after(MINUTE), ..third.request("k") };
        assert!(third.gets(&taken).await > fence);
    });
}

/// What a process leaves that nobody ever asks for goes with the housekeeping of others.
#[test]
fn what_the_dead_leave_is_swept() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let time = VirtualClock::new();
        let sweeper =
            Client::with(Firestore::with_clock(&url, time.clock()).unwrap(), Duration::from_secs(100_000)).await;
        let dead = Client::open(&url, SHORT).await;
        for i in 0..30 {
            dead.gets(&dead.request(&format!("k{i}"))).await;
        }
        let fixed = AcquireRequest { lifetime: Lifetime::Fixed(SHORT), ..dead.request("fixed") };
        dead.gets(&fixed).await;
        assert_eq!(fake.documents().iter().filter(|name| name.starts_with("stanchion_keys")).count(), 31);
        fake.set_clock_off_by(10_000);
        time.advance(MINUTE * 2);
        sweeper.store.renew_session(sweeper.session).await.unwrap();
        let own = format!("stanchion_sessions/{}", sweeper.session.to_hex());
        until("all of it is gone", async || fake.documents() == [own.clone()]).await;
    });
}
