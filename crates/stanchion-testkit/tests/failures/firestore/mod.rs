//! Checks the Firestore store against faults, and counts its requests. The tests use the fake, so they run on every
//! machine.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs, reason = "test code")]

mod costs;
mod lingering;
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

/// A process with one handle and one session.
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
        let opened = store.open_session(OpenSession { session, ttl, owner: "owner".into() }).await.unwrap().time;
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

    async fn acquire(&self, request: &AcquireRequest) -> AcquireOutcome {
        self.store.acquire(request.clone()).await.unwrap().outcome
    }

    async fn lock(&self, request: &AcquireRequest) -> Fence {
        match self.acquire(request).await {
            AcquireOutcome::Granted(granted) => granted.fence,
            other => panic!("not granted: {other:?}"),
        }
    }

    async fn holders(&self, name: &str) -> Vec<Fence> {
        let state = self.store.inspect(&key(name)).await.unwrap().outcome;
        state.holders.iter().map(|holder| holder.fence).collect()
    }
}

/// The store repeats no request itself, and a caller that repeats an unanswered one finds its result.
#[test]
fn lost_response_leaves_one_hold() {
    let fake = FirestoreFake::start();
    block_on(async {
        let client = Client::open(&fake.url(), MINUTE).await;
        let request = client.request("k");
        fake.next_commits([CommitFault::DoneWithError(Code::Unavailable)]);
        let fault = client.store.acquire(request.clone()).await.unwrap_err();
        assert!(fault.is_in_doubt() && fault.is_transient(), "{fault:?}");
        let fence = client.lock(&request).await;
        assert_eq!(client.holders("k").await, [fence], "the repeated acquire returns the first one's hold");
        fake.next_commits([CommitFault::DoneWithError(Code::DeadlineExceeded)]);
        let fault = client.store.release(&key("k"), request.token, None).await.unwrap_err();
        assert!(fault.is_in_doubt() && fault.kind() == ErrorKind::NetworkTimeout, "{fault:?}");
        let again = client.store.release(&key("k"), request.token, None).await.unwrap().outcome;
        assert_eq!(again, EndOutcome::Nothing);
        fake.next_commits([CommitFault::Rejected(Code::ResourceExhausted)]);
        let fault = client.store.acquire(client.request("other")).await.unwrap_err();
        assert!(!fault.is_in_doubt() && fault.kind() == ErrorKind::RateLimited, "{fault:?}");
        assert!(client.holders("other").await.is_empty());
    });
}

#[test]
fn failed_commits_leak_nothing() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let locks = Locks::open(&url).await.unwrap();
        for fault in [
            CommitFault::DoneWithError(Code::Unavailable),
            CommitFault::Unanswered,
            CommitFault::Rejected(Code::Internal),
        ] {
            fake.next_commits([fault]);
            let guard = locks.lock("k").await.unwrap();
            guard.check().unwrap();
            assert_eq!(guard.release().await.unwrap(), Released::Now, "{fault:?}");
        }
        locks.close().await.unwrap();
        until("no key's document is left", async || {
            !fake.documents().iter().any(|name| name.starts_with("stanchion_keys"))
        })
        .await;
    });
}

/// Case C1 of the model: an acquire arrives after the release of its token was answered.
#[test]
fn late_acquire_never_takes_effect() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (late, other) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        for (name, is_queued) in [("free", false), ("held", true)] {
            let holder = other.request(name);
            if is_queued {
                other.lock(&holder).await;
            }
            let now = late.store.inspect(&key(name)).await.unwrap().time;
            let request = AcquireRequest { not_after: now.after(SHORT), ..late.request(name) };
            fake.next_commits([CommitFault::Delayed]);
            assert!(late.store.acquire(request.clone()).await.unwrap_err().is_in_doubt());
            let mut ended = late.store.abandon(&key(name), request.token).await.unwrap();
            while ended.time <= request.not_after {
                ended = late.store.abandon(&key(name), request.token).await.unwrap();
            }
            assert_eq!(ended.outcome, EndOutcome::Nothing, "the token has nothing and can get nothing any more");
            assert_eq!(fake.finish_delayed_commits(), 1, "the delayed commit succeeds");
            assert_eq!(late.store.poll(&key(name), &[request.token]).await.unwrap().outcome[0], PollOutcome::Gone);
            assert_eq!(late.acquire(&request).await, AcquireOutcome::Stale);
            let state = other.store.inspect(&key(name)).await.unwrap().outcome;
            assert_eq!((state.holders.len(), state.waiters.len()), (usize::from(is_queued), 0));
            if is_queued {
                other.store.release(&key(name), holder.token, None).await.unwrap();
            }
            let next = other.request(name);
            other.lock(&next).await;
            other.store.release(&key(name), next.token, None).await.unwrap();
        }
    });
}

/// The commit is too late, but the client receives its response.
#[test]
fn late_acquire_is_stale_and_leaves_nothing() {
    let fake = FirestoreFake::start();
    block_on(async {
        let client = Client::open(&fake.url(), MINUTE).await;
        let now = client.store.inspect(&key("k")).await.unwrap().time;
        let request = AcquireRequest { not_after: now, ..client.request("k") };
        assert_eq!(client.acquire(&request).await, AcquireOutcome::Stale);
        assert!(!fake.documents().iter().any(|name| name.starts_with("stanchion_keys")));
    });
}

#[test]
fn late_adoption_changes_nothing() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (first, second) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        let request = AcquireRequest { lifetime: Lifetime::Fixed(MINUTE), ..first.request("k") };
        first.lock(&request).await;
        let now = second.store.inspect(&key("k")).await.unwrap().time;
        let to = TokenId::random().unwrap();
        let not_after = now.after(SHORT);
        let adopt = AdoptRequest { key: key("k"), from: request.token, to, session: second.session, not_after };
        fake.next_commits([CommitFault::Delayed]);
        assert!(second.store.adopt(adopt.clone()).await.unwrap_err().is_in_doubt());
        until("the adoption is late", async || second.store.inspect(&key("k")).await.unwrap().time > not_after).await;
        assert_eq!(fake.finish_delayed_commits(), 1);
        assert_eq!(second.store.poll(&key("k"), &[to]).await.unwrap().outcome[0], PollOutcome::Gone);
        assert_eq!(second.store.adopt(adopt).await.unwrap().outcome, AdoptOutcome::Stale);
        let polled = first.store.poll(&key("k"), &[request.token]).await.unwrap().outcome[0];
        assert!(matches!(polled, PollOutcome::Granted(_)), "the first client still holds the key: {polled:?}");
    });
}

/// The renewal is committed after its session has expired.
#[test]
fn late_renewal_revives_nothing() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (late, other) = (Client::open(&url, SHORT).await, Client::open(&url, MINUTE).await);
        let held = late.request("k");
        let first = late.lock(&held).await;
        fake.next_commits([CommitFault::Delayed]);
        assert!(late.store.renew_session(late.session).await.is_err());
        // Nobody has read the session since, so only the renewal's own record says that it came too late.
        assert_eq!(fake.finish_delayed_commits(), 1);
        assert_eq!(late.store.renew_session(late.session).await.unwrap().outcome, RenewOutcome::Gone);
        assert_eq!(late.acquire(&late.request("k")).await, AcquireOutcome::SessionGone);
        assert!(other.lock(&other.request("k")).await > first);
        let again = OpenSession { session: late.session, ttl: MINUTE, owner: String::new() };
        assert_eq!(late.store.open_session(again).await.unwrap().outcome, stanchion::store::OpenOutcome::Gone);
    });
}

/// One client's commit is delayed until another client has the key.
#[test]
fn lagging_client_changes_nothing() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (lagging, other) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        let mut last = Fence::new(0);
        for attempt in 0..4 {
            let request = AcquireRequest { lifetime: Lifetime::Fixed(SHORT), ..lagging.request("k") };
            let fence = lagging.lock(&request).await;
            assert!(fence > last);
            fake.next_commits([CommitFault::Delayed]);
            let result = match attempt % 2 {
                0 => lagging.store.extend(&key("k"), request.token, MINUTE).await.map(drop),
                _ => lagging.store.release(&key("k"), request.token, Some(MINUTE)).await.map(drop),
            };
            assert!(result.unwrap_err().is_in_doubt());
            // By the time of the delayed commit, the hold has expired and the other client has the key.
            let next = other.request("k");
            let mut acquired = other.acquire(&next).await;
            until("the other client has the key", async || {
                acquired = other.acquire(&next).await;
                matches!(acquired, AcquireOutcome::Granted(_))
            })
            .await;
            assert_eq!(fake.finish_delayed_commits(), 0, "the service rejects the commit because the key has changed");
            let AcquireOutcome::Granted(granted) = acquired else { unreachable!() };
            assert!(granted.fence > fence);
            assert_eq!(other.holders("k").await, [granted.fence], "the key has one holder");
            let extended = lagging.store.extend(&key("k"), request.token, MINUTE).await.unwrap().outcome;
            assert_eq!(extended, ExtendOutcome::NotHeld);
            other.store.release(&key("k"), next.token, None).await.unwrap();
            last = granted.fence;
        }
    });
}

#[test]
fn aborted_commits_are_retried_or_reported() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (one, two) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        fake.next_commits([CommitFault::Rejected(Code::Aborted); 4]);
        let held = one.request("k");
        let first = one.lock(&held).await;
        assert_eq!(fake.faults_left(), 0);
        let waiting = two.request("k");
        fake.next_commits([CommitFault::Rejected(Code::Aborted); 4]);
        assert!(matches!(two.acquire(&waiting).await, AcquireOutcome::Queued(_)));
        fake.next_commits([CommitFault::Rejected(Code::Aborted); 4]);
        let ended = one.store.release(&key("k"), held.token, None).await.unwrap().outcome;
        assert_eq!(ended, EndOutcome::Released);
        assert!(two.lock(&waiting).await > first);
        fake.next_commits([CommitFault::Rejected(Code::Aborted); 100]);
        let fault = one.store.acquire(one.request("k")).await.unwrap_err();
        assert!(fault.is_transient() && !fault.is_in_doubt(), "{fault:?}");
        assert!(fake.faults_left() > 0, "the store stops retrying");
    });
}

#[test]
fn rejected_credentials_are_reported() {
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
        client.lock(&client.request("k")).await;
    });
}

#[test]
fn failed_connection_has_a_known_outcome() {
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
fn ended_stream_is_reopened() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (one, mut two) = (Client::open(&url, MINUTE).await, Client::open(&url, MINUTE).await);
        let held = one.request("k");
        one.lock(&held).await;
        let waiting = two.request("k");
        two.acquire(&waiting).await;
        until("both clients listen", async || fake.streams() == 2).await;
        let listened = fake.request_count("Listen");
        fake.end_streams();
        one.store.release(&key("k"), held.token, None).await.unwrap();
        let granted_token = tokio::time::timeout(MINUTE, async {
            loop {
                match two.pushes.next().await {
                    Some(Push::Granted { token, .. }) => return token,
                    Some(_) => {}
                    None => panic!("the stream ended"),
                }
            }
        });
        assert_eq!(granted_token.await.unwrap(), waiting.token, "a grant between the two streams is pushed too");
        assert!(fake.request_count("Listen") > listened);
    });
}

#[test]
fn silent_stream_only_delays_a_waiter() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (one, two) = (Locks::open(&url).await.unwrap(), Locks::open(&url).await.unwrap());
        let guard = one.lock("k").await.unwrap();
        let waiting = tokio::spawn(two.lock("k").into_future());
        until("the call waits", async || one.inspect("k").await.unwrap().waiters.len() == 1).await;
        fake.suppress_changes(true);
        let fence = guard.fence();
        guard.release().await.unwrap();
        let granted = tokio::time::timeout(MINUTE, waiting).await.expect("the waiter polls by itself");
        assert!(granted.unwrap().unwrap().fence() > fence);
    });
}

/// The service's clock is an hour ahead of or behind the machine's clock.
#[test]
fn service_clock_offset_changes_nothing() {
    for seconds in [-3_600, 3_600] {
        let fake = FirestoreFake::start();
        fake.set_clock_offset(seconds);
        block_on(async {
            let url = fake.url();
            let (one, two) = (Locks::open(&url).await.unwrap(), Locks::open(&url).await.unwrap());
            let guard = one.lock("k").ttl(Duration::from_millis(1_500)).await.unwrap();
            let fence = guard.fence();
            assert!(guard.remaining().unwrap() > Duration::from_millis(500), "{seconds}: {:?}", guard.remaining());
            assert!(two.try_lock("k").await.unwrap().is_none(), "{seconds}");
            guard.detach();
            let guard = two.lock("k").await.unwrap();
            assert!(guard.fence() > fence, "{seconds}: the first hold has expired");
            assert_eq!(guard.release().await.unwrap(), Released::Now);
            one.close().await.unwrap();
            two.close().await.unwrap();
        });
    }
}

/// One client's clock jumps by hours, but its requests are granted and rejected like everyone else's.
#[test]
fn client_clock_decides_nothing() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let (ahead, behind) = (VirtualClock::new(), VirtualClock::new());
        ahead.advance(Duration::from_secs(7_200));
        let one = Client::with(Firestore::with_clock(&url, ahead.clock()).unwrap(), MINUTE).await;
        let two = Client::with(Firestore::with_clock(&url, behind.clock()).unwrap(), MINUTE).await;
        let held = AcquireRequest { lifetime: Lifetime::Fixed(MINUTE), ..two.request("k") };
        let fence = two.lock(&held).await;
        // An hour passes on this client's clock only.
        ahead.advance(Duration::from_secs(3_600));
        let contender = AcquireRequest { enqueue: false, ..one.request("k") };
        assert!(matches!(one.acquire(&contender).await, AcquireOutcome::Busy { .. }), "the hold has not expired");
        one.lock(&one.request("other")).await;
        let renewed = one.store.renew_session(one.session).await.unwrap().outcome;
        assert_eq!(renewed, RenewOutcome::Alive { lost: vec![] }, "the session has not expired");
        // An hour passes on the service's clock only.
        fake.set_clock_offset(3_600);
        assert_eq!(two.store.poll(&key("k"), &[held.token]).await.unwrap().outcome[0], PollOutcome::Gone);
        assert_eq!(two.store.renew_session(two.session).await.unwrap().outcome, RenewOutcome::Gone);
        let third = Client::open(&url, MINUTE).await;
        let request = AcquireRequest { not_after: third.opened.after(MINUTE), ..third.request("k") };
        assert!(third.lock(&request).await > fence);
    });
}

/// A process expires and leaves holds on keys that nobody uses again.
#[test]
fn reaper_deletes_expired_sessions_and_keys() {
    let fake = FirestoreFake::start();
    block_on(async {
        let url = fake.url();
        let time = VirtualClock::new();
        let reaper =
            Client::with(Firestore::with_clock(&url, time.clock()).unwrap(), Duration::from_secs(100_000)).await;
        let expired = Client::open(&url, SHORT).await;
        for i in 0..30 {
            expired.lock(&expired.request(&format!("k{i}"))).await;
        }
        let fixed = AcquireRequest { lifetime: Lifetime::Fixed(SHORT), ..expired.request("fixed") };
        expired.lock(&fixed).await;
        assert_eq!(fake.documents().iter().filter(|name| name.starts_with("stanchion_keys")).count(), 31);
        fake.set_clock_offset(10_000);
        time.advance(MINUTE * 2);
        reaper.store.renew_session(reaper.session).await.unwrap();
        let own = format!("stanchion_sessions/{}", reaper.session.to_hex());
        until("only the reaper's session is left", async || fake.documents() == [own.clone()]).await;
    });
}
