//! Tests of the keeper against a store with faults, on a virtual clock.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "test code")]

use super::*;
use crate::clock::VirtualClock;
use crate::event::Event;
use crate::locks::Locks;
use crate::observer::EventStream;
use crate::store::{Fault, Faults, Faulty, Memory, Operation, Store};

const SECOND: Duration = Duration::from_secs(1);

struct Bench {
    time: VirtualClock,
    memory: Memory,
    faults: Faults,
    locks: Locks,
}

impl Bench {
    async fn new() -> Self {
        let time = VirtualClock::new();
        let memory = Memory::with_clock(time.clock());
        let store = Faulty::with_clock(memory.clone(), &time);
        let faults = store.faults();
        let locks = Locks::builder_with_store(store).clock(time.clock()).open().await.unwrap();
        Self { time, memory, faults, locks }
    }

    /// Checks all holds, as a push of the store does.
    fn verify(&self) -> tokio::task::JoinHandle<()> {
        let mut verification = Verification::new(self.locks.handle.shared.clone());
        tokio::spawn(async move {
            verification.all();
            verification.finish().await;
        })
    }

    async fn until(&self, what: &str, mut so: impl AsyncFnMut() -> bool) {
        for _ in 0..10_000 {
            if so().await {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("never: {what}");
    }

    async fn until_free(&self) {
        let is_free = async || self.locks.inspect("k").await.unwrap().holders.is_empty();
        self.until("free", is_free).await;
    }
}

/// Returns the events of key `k` until now.
async fn told(bench: &Bench, events: &mut EventStream) -> Vec<Event> {
    drop(bench.locks.lock("last").await.unwrap());
    let mut told = Vec::new();
    loop {
        match events.next().await.unwrap() {
            Event::Released { key, .. } if key.name() == "last" => return told,
            event @ (Event::Released { .. } | Event::Lost { .. }) => told.push(event),
            _ => {}
        }
    }
}

#[tokio::test]
async fn hold_in_release_is_not_lost() {
    let bench = Bench::new().await;
    let guard = bench.locks.lock("k").await.unwrap();
    let mut events = bench.locks.events();
    bench.faults.next(Operation::Release, Fault::DelayReply(SECOND));
    let releasing = tokio::spawn(guard.release());
    bench.until_free().await;
    bench.verify().await.unwrap();
    bench.time.advance(SECOND);
    assert_eq!(releasing.await.unwrap().unwrap(), crate::Released::Now);
    let told = told(&bench, &mut events).await;
    assert!(matches!(told[..], [Event::Released { .. }]), "{told:?}");
}

#[tokio::test]
async fn hold_given_up_during_a_check_is_not_lost() {
    let bench = Bench::new().await;
    for way in ["released", "dropped", "detached"] {
        let guard = bench.locks.lock("k").await.unwrap();
        let mut events = bench.locks.events();
        let asked = bench.faults.count(Operation::Poll);
        bench.faults.next(Operation::Poll, Fault::Delay(SECOND));
        let verifying = bench.verify();
        bench.until("asked", async || bench.faults.count(Operation::Poll) > asked).await;
        match way {
            "released" => drop(guard.release().await.unwrap()),
            "dropped" => drop(guard),
            // Its token is another one from then on.
            _ => drop(bench.locks.adopt(guard.detach()).await.unwrap()),
        }
        bench.until_free().await;
        bench.time.advance(SECOND);
        verifying.await.unwrap();
        let told = told(&bench, &mut events).await;
        assert!(matches!(told[..], [Event::Released { .. }]), "{way}: {told:?}");
    }
}

#[tokio::test]
async fn repeated_grant_leaves_a_lost_hold_its_grace() {
    let bench = Bench::new().await;
    let guard = bench.locks.lock("k").heartbeat_within(SECOND).await.unwrap();
    let shared = &bench.locks.handle.shared;
    let token = shared.tokens.holds()[0].token;
    bench.time.advance(SECOND);
    assert_eq!(guard.loss(), Some(LossCause::HeartbeatMissed));
    receive(shared, Push::Granted { key: guard.key().clone(), token, fence: guard.fence() });
    // The keeper cleans up this token after all tokens that it got before.
    drop(bench.locks.lock("other").await.unwrap());
    bench.until("the keeper came to it", async || bench.faults.count(Operation::Release) > 0).await;
    assert_eq!(bench.locks.inspect("k").await.unwrap().holders.len(), 1);
    bench.time.advance(SECOND / 4);
    bench.until_free().await;
}

#[tokio::test]
async fn expired_detached_holds_are_forgotten() {
    let time = VirtualClock::new();
    let store = Memory::with_clock(time.clock());
    let builder = Locks::builder_with_store(store).clock(time.clock()).session_ttl(3_600 * SECOND);
    let locks = builder.open().await.unwrap();
    drop(locks.lock("as long as the session").await.unwrap().detach());
    for turn in 0..500 {
        drop(locks.lock(format!("k{turn}")).ttl(SECOND).await.unwrap().detach());
        time.advance(SECOND);
    }
    let detached = locks.handle.shared.tokens.detached();
    assert!(detached.len() < 250, "{}", detached.len());
    assert!(detached.iter().any(|(_, detached)| detached.until == crate::clock::BootTime::NEVER));
}

#[tokio::test]
async fn recovered_store_gets_a_renewal_at_once() {
    let bench = Bench::new().await;
    let before = bench.faults.count(Operation::RenewSession);
    let beats = async || {
        receive(&bench.locks.handle.shared, Push::VerifyAll);
        bench.faults.count(Operation::RenewSession) > before
    };
    bench.until("a beat, and no time has gone by", beats).await;
}

#[tokio::test]
async fn forgotten_hold_is_lost() {
    let bench = Bench::new().await;
    let guard = bench.locks.lock("k").await.unwrap();
    let token = bench.locks.handle.shared.tokens.holds()[0].token;
    bench.memory.release(guard.key(), token, None).await.unwrap();
    bench.verify().await.unwrap();
    assert_eq!(guard.loss(), Some(LossCause::Missing));
}

#[tokio::test]
async fn unanswered_shorter_extension_counts() {
    let bench = Bench::new().await;
    let guard = bench.locks.lock("k").max_hold(60 * SECOND).await.unwrap();
    bench.faults.next(Operation::Extend, Fault::DelayReply(3_600 * SECOND));
    let asked = bench.time.clock().now();
    tokio::select! {
        _ = guard.extend(20 * SECOND) => unreachable!(),
        () = bench.until("extended", async || bench.faults.count(Operation::Extend) == 1) => {}
    }
    let hold = bench.locks.handle.shared.tokens.holds().remove(0);
    // With the grace in which the holder stops.
    assert!(hold.own_until() <= asked.after(26 * SECOND), "{:?}", hold.own_until().since(asked));
}

#[tokio::test]
async fn hanging_renewal_does_not_delay_the_loss() {
    let bench = Bench::new().await;
    let guard = bench.locks.lock("k").await.unwrap();
    let told = guard.cancel_token();
    bench.faults.always(Operation::RenewSession, Fault::DelayReply(3_600 * SECOND));
    // Beats hang at two seconds, at four and a half, at seven; the last one beyond the time at which the session is over.
    for _ in 0..74 {
        bench.time.advance(SECOND / 10);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    // Nobody looks at the guard, which would see it by the clock.
    bench.until("told", async || told.is_cancelled()).await;
    assert_eq!(guard.loss(), Some(LossCause::SessionExpired));
}

#[tokio::test]
async fn adopt_during_close_is_rejected() {
    let bench = Bench::new().await;
    let token = bench.locks.lock("k").await.unwrap().detach();
    bench.faults.next(Operation::Adopt, Fault::DelayReply(SECOND));
    bench.faults.next(Operation::CloseSession, Fault::DelayReply(3 * SECOND));
    let adopting = tokio::spawn({
        let locks = bench.locks.clone();
        async move { locks.adopt(token).await.map(|guard| guard.fence()) }
    });
    bench.until("asked", async || bench.faults.count(Operation::Adopt) == 1).await;
    let closing = tokio::spawn({
        let locks = bench.locks.clone();
        async move { locks.close().await }
    });
    bench.until("closed in the store", async || bench.faults.count(Operation::CloseSession) == 1).await;
    bench.time.advance(SECOND);
    assert_eq!(adopting.await.unwrap().unwrap_err().kind(), ErrorKind::Draining);
    bench.time.advance(3 * SECOND);
    closing.await.unwrap().unwrap();
}

#[tokio::test]
async fn close_releases_the_lifetime_of_a_dropped_call() {
    let bench = Bench::new().await;
    bench.faults.next(Operation::Acquire, Fault::DelayReply(3_600 * SECOND));
    bench.faults.next(Operation::CloseSession, Fault::DelayReply(SECOND));
    let mut asking = Box::pin(bench.locks.lock("k").ttl(3_600 * SECOND).into_future());
    tokio::select! {
        biased;
        _ = &mut asking => unreachable!(),
        () = bench.until("asked", async || bench.faults.count(Operation::Acquire) == 1) => {}
    }
    let closing = tokio::spawn({
        let locks = bench.locks.clone();
        async move { locks.close().await }
    });
    bench.until("closed in the store", async || bench.faults.count(Operation::CloseSession) == 1).await;
    drop(asking);
    bench.time.advance(SECOND);
    closing.await.unwrap().unwrap();
    let key = crate::Key::new("", "k").unwrap();
    assert!(bench.memory.inspect(&key).await.unwrap().outcome.holders.is_empty());
}

#[tokio::test]
async fn hanging_work_frees_the_key_after_its_grace() {
    let bench = Bench::new().await;
    let guard = bench.locks.lock("k").ttl(3_600 * SECOND).heartbeat_within(SECOND).await.unwrap();
    bench.time.advance(SECOND);
    bench.until("lost", async || bench.locks.handle.shared.tokens.holds().is_empty()).await;
    assert_eq!(guard.loss(), Some(LossCause::HeartbeatMissed));
    assert!(guard.valid_for().unwrap() <= SECOND / 4, "{:?}", guard.valid_for());
    bench.time.advance(SECOND / 4);
    bench.until_free().await;
}

#[tokio::test]
async fn always_late_requests_fail() {
    let bench = Bench::new().await;
    bench.faults.always(Operation::Acquire, Fault::Delay(SECOND / 20));
    let asking = bench.locks.lock("k").ttl(SECOND / 20).into_future();
    let moving = async {
        loop {
            tokio::time::sleep(Duration::from_millis(1)).await;
            bench.time.advance(SECOND / 20);
        }
    };
    let limit = Duration::from_secs(30);
    let asked = async {
        tokio::select! { asked = asking => asked, () = moving => unreachable!() }
    };
    let error = tokio::time::timeout(limit, asked).await.expect("an end").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains("ask for a longer ttl"), "{error}");
}

#[tokio::test]
async fn repeated_reports_start_one_cleanup() {
    let bench = Bench::new().await;
    bench.faults.always(Operation::Abandon, Fault::LoseRequest);
    let token = crate::TokenId::random().unwrap();
    let key = crate::Key::new("", "k").unwrap();
    for _ in 0..50 {
        let lost = crate::store::LostToken { key: key.clone(), token, reason: String::new() };
        session::force_released(&bench.locks.handle.shared, lost);
    }
    bench.until("tried", async || bench.faults.count(Operation::Abandon) > 0).await;
    // By now the keeper has tried everything that was reported before.
    drop(bench.locks.lock("last").await.unwrap());
    bench.until("the keeper came to it", async || bench.faults.count(Operation::Release) > 0).await;
    assert_eq!(bench.faults.count(Operation::Abandon), 1);
}

#[tokio::test]
async fn late_answer_does_not_set_the_store_clock_back() {
    let bench = Bench::new().await;
    bench.faults.next(Operation::Inspect, Fault::DelayReply(3 * SECOND / 2));
    let looking = tokio::spawn({
        let locks = bench.locks.clone();
        async move { locks.inspect("k").await }
    });
    bench.until("asked", async || bench.faults.count(Operation::Inspect) == 1).await;
    bench.time.advance(3 * SECOND / 2);
    looking.await.unwrap().unwrap();
    let _guard = bench.locks.lock("k").ttl(SECOND).await.unwrap();
    assert_eq!(bench.faults.count(Operation::Acquire), 1, "the first question was in time");
}

#[tokio::test]
async fn store_clock_follows_a_clock_set_back() {
    let bench = Bench::new().await;
    let shared = &bench.locks.handle.shared;
    let set_back = crate::store::StoreTime::from_micros(shared.store_time().as_micros() - 60_000_000);
    shared.saw_store_time(set_back, bench.time.clock().now());
    assert_eq!(shared.store_time(), set_back);
}

#[tokio::test]
async fn panic_of_the_store_does_not_end_a_cleanup() {
    let bench = Bench::new().await;
    let session = bench.locks.session();
    let guard = bench.locks.lock("k").await.unwrap();
    bench.faults.next(Operation::Release, Fault::Panic);
    drop(guard);
    // Nobody tells the keeper of it again.
    let tried_again = async || {
        bench.time.advance(SECOND / 100);
        bench.faults.count(Operation::Release) > 1
    };
    bench.until("tried again", tried_again).await;
    bench.until_free().await;
    assert_eq!(bench.locks.session(), session, "it did not go with its session");
}

#[tokio::test]
async fn repeated_grant_keeps_the_cooldown() {
    let bench = Bench::new().await;
    let guard = bench.locks.lock("k").cooldown(60 * SECOND).await.unwrap();
    let (key, fence) = (guard.key().clone(), guard.fence());
    let token = bench.locks.handle.shared.tokens.held()[0];
    bench.faults.next(Operation::Release, Fault::Fail(ErrorKind::Unavailable));
    drop(guard);
    bench.until("it failed once", async || bench.faults.count(Operation::Release) == 1).await;
    // As a store does whose pushes begin anew.
    receive(&bench.locks.handle.shared, Push::Granted { key, token, fence });
    let tried_again = async || {
        bench.time.advance(SECOND / 100);
        bench.locks.inspect("k").await.unwrap().holders.is_empty()
    };
    bench.until("released", tried_again).await;
    assert!(bench.locks.inspect("k").await.unwrap().closed_for.is_some(), "its cooldown");
    bench.until("over", async || bench.locks.handle.shared.tokens.cleaning_up() == 0).await;
}

#[tokio::test]
async fn late_request_of_a_detached_hold_is_released() {
    let bench = Bench::new().await;
    let session = bench.locks.session();
    let builder = Locks::builder_with_store(bench.memory.clone()).clock(bench.time.clock());
    let other = builder.open().await.unwrap();
    let mut tokens = Vec::new();
    for key in ["taken up", "stays"] {
        let asked = bench.faults.count(Operation::Acquire);
        // On its way for long; its repeat is answered.
        bench.faults.next(Operation::Acquire, Fault::Hold);
        let asking = tokio::spawn(bench.locks.lock(key).into_future());
        bench.until("asked", async || bench.faults.count(Operation::Acquire) > asked).await;
        bench.time.advance(SECOND / 10);
        tokens.push(asking.await.unwrap().unwrap().detach());
    }
    let is_locked = async |key| bench.locks.is_locked(key).await.unwrap();
    other.adopt(tokens.remove(0)).await.unwrap().release().await.unwrap();
    assert!(!is_locked("taken up").await);
    assert_eq!(bench.faults.deliver().await, 2);
    assert!(is_locked("taken up").await, "the late question made a hold: the test is worth something");
    // Now no more of it can come.
    bench.time.advance(6 * SECOND);
    bench.until("ended", async || !is_locked("taken up").await).await;
    assert_eq!(bench.locks.session(), session, "it did not go with its session");
    let adopted = other.adopt(tokens.remove(0)).await.unwrap();
    assert_eq!(adopted.release().await.unwrap(), crate::Released::Now);
}

#[tokio::test]
async fn close_releases_the_lifetime_of_a_late_request() {
    let bench = Bench::new().await;
    bench.faults.next(Operation::Acquire, Fault::Hold);
    let mut asking = Box::pin(bench.locks.lock("k").ttl(3_600 * SECOND).into_future());
    tokio::select! {
        biased;
        _ = &mut asking => unreachable!(),
        () = bench.until("asked", async || bench.faults.count(Operation::Acquire) == 1) => {}
    }
    drop(asking);
    bench.until("ended once", async || bench.faults.count(Operation::Abandon) == 1).await;
    assert_eq!(bench.faults.deliver().await, 1);
    let key = crate::Key::new("", "k").unwrap();
    let holders = async || bench.memory.inspect(&key).await.unwrap().outcome.holders.len();
    assert_eq!(holders().await, 1, "the late question made a hold: the test is worth something");
    bench.locks.close().await.unwrap();
    assert_eq!(holders().await, 0);
}

#[tokio::test]
async fn close_releases_the_lifetime_of_an_idle_call() {
    let bench = Bench::new().await;
    bench.faults.next(Operation::Acquire, Fault::DelayReply(3_600 * SECOND));
    let mut asking = Box::pin(bench.locks.lock("k").ttl(3_600 * SECOND).into_future());
    tokio::select! {
        biased;
        _ = &mut asking => unreachable!(),
        () = bench.until("asked", async || bench.faults.count(Operation::Acquire) == 1) => {}
    }
    bench.locks.close().await.unwrap();
    drop(asking);
    let key = crate::Key::new("", "k").unwrap();
    assert!(bench.memory.inspect(&key).await.unwrap().outcome.holders.is_empty());
}

#[tokio::test]
async fn adopt_after_the_keeper_ended_is_rejected() {
    let bench = Bench::new().await;
    let token = bench.locks.lock("k").await.unwrap().detach();
    bench.faults.next(Operation::Adopt, Fault::DelayReply(2 * SECOND));
    bench.faults.next(Operation::RenewSession, Fault::Panic);
    let mut adopting = Box::pin(bench.locks.adopt(token));
    tokio::select! {
        biased;
        _ = &mut adopting => unreachable!(),
        () = bench.until("asked", async || bench.faults.count(Operation::Adopt) == 1) => {}
    }
    // Its answer comes while the keeper ends, and is read after that.
    bench.time.advance(2 * SECOND);
    bench.locks.handle.shared.lifecycle.reached(crate::lifecycle::Phase::Closed).await;
    assert_eq!(adopting.await.unwrap_err().kind(), ErrorKind::Draining);
}

#[tokio::test]
async fn drain_ends_waiting_adopt() {
    let bench = Bench::new().await;
    let token = bench.locks.lock("k").ttl(3_600 * SECOND).await.unwrap().detach();
    bench.faults.always(Operation::OpenSession, Fault::Fail(ErrorKind::Unavailable));
    bench.memory.close_session(bench.locks.session().unwrap()).await.unwrap();
    bench.time.advance(2 * SECOND);
    bench.until("there is no session", async || bench.locks.session().is_none()).await;
    let mut taking_up = Box::pin(bench.locks.adopt(token));
    tokio::select! {
        biased;
        _ = &mut taking_up => unreachable!(),
        () = std::future::ready(()) => {}
    }
    bench.locks.drain("a test");
    let ended = tokio::time::timeout(10 * SECOND, taking_up).await.expect("at once, and no time goes by");
    assert_eq!(ended.unwrap_err().kind(), ErrorKind::Draining);
    assert_eq!(bench.faults.count(Operation::Adopt), 0);
}

#[tokio::test]
async fn holds_adopted_elsewhere_are_forgotten() {
    let bench = Bench::new().await;
    let builder = Locks::builder_with_store(bench.memory.clone()).clock(bench.time.clock());
    let other = builder.open().await.unwrap();
    let stays = bench.locks.lock("stays").await.unwrap().detach();
    for turn in 0..crate::tokens::QUERY_DETACHED_AT {
        let token = bench.locks.lock(format!("k{turn}")).await.unwrap().detach();
        other.adopt(token).await.unwrap().release().await.unwrap();
    }
    let shared = &bench.locks.handle.shared;
    bench.until("forgotten", async || shared.tokens.detached().len() < 10).await;
    assert!(shared.tokens.detached().iter().any(|(token, _)| *token == stays.id()));
}

#[tokio::test]
async fn release_is_reported_once() {
    let bench = Bench::new().await;
    let mut events = bench.locks.events();
    bench.faults.next(Operation::Acquire, Fault::Hold);
    let asking = tokio::spawn(bench.locks.lock("k").ttl(3_600 * SECOND).into_future());
    bench.until("asked", async || bench.faults.count(Operation::Acquire) == 1).await;
    bench.time.advance(SECOND / 10);
    drop(asking.await.unwrap().unwrap());
    bench.until_free().await;
    bench.locks.close().await.unwrap();
    drop(bench.locks);
    let mut told = 0;
    while let Some(event) = events.next().await {
        told += usize::from(matches!(event, Event::Released { .. }));
    }
    assert_eq!(told, 1);
}

#[tokio::test]
async fn cleanups_in_flight_are_limited() {
    let bench = Bench::new().await;
    let mut guards = Vec::new();
    for turn in 0..1_000 {
        guards.push(bench.locks.lock(format!("k{turn}")).await.unwrap());
    }
    bench.faults.always(Operation::Release, Fault::DelayReply(3_600 * SECOND));
    drop(guards);
    bench.until("some are on their way", async || bench.faults.count(Operation::Release) > 0).await;
    // The keeper has taken all of them by then.
    drop(bench.locks.lock("last").await.unwrap());
    bench.until("ending", async || bench.locks.handle.shared.tokens.cleaning_up() == 1_001).await;
    tokio::time::sleep(SECOND / 10).await;
    assert_eq!(bench.faults.count(Operation::Release), cleanup::IN_FLIGHT as u64);
    bench.faults.clear();
    bench
        .until("all are ended", async || {
            bench.time.advance(SECOND);
            bench.locks.list("").await.unwrap().is_empty()
        })
        .await;
}

#[tokio::test]
async fn failing_cleanups_delay_no_others() {
    let bench = Bench::new().await;
    let mut guards = Vec::new();
    for turn in 0..600 {
        guards.push(bench.locks.lock(format!("k{turn}")).await.unwrap());
    }
    for _ in 0..400 {
        bench.faults.next(Operation::Release, Fault::Fail(ErrorKind::Internal));
    }
    drop(guards);
    // No time goes by.
    bench.until("the others are ended", async || bench.locks.list("").await.unwrap().len() == 400).await;
    bench
        .until("so are they", async || {
            bench.time.advance(SECOND / 10);
            bench.locks.list("").await.unwrap().is_empty()
        })
        .await;
}

#[tokio::test]
async fn overtaken_request_is_released_soon() {
    let bench = Bench::new().await;
    bench.faults.next(Operation::Acquire, Fault::Hold);
    let mut asking = Box::pin(bench.locks.lock("k").into_future());
    tokio::select! {
        biased;
        _ = &mut asking => unreachable!(),
        () = bench.until("asked", async || bench.faults.count(Operation::Acquire) == 1) => {}
    }
    drop(asking);
    bench.until("ended once", async || bench.faults.count(Operation::Abandon) == 1).await;
    assert_eq!(bench.faults.deliver().await, 1);
    assert!(bench.locks.is_locked("k").await.unwrap(), "the late question made a hold");
    let shared = &bench.locks.handle.shared;
    bench.until("that was answered", async || shared.tokens.cleaning_up() == 0).await;
    bench.time.advance(SECOND / 50);
    bench.until_free().await;
    // It found something: the last one alone remains.
    bench.time.advance(4 * SECOND);
    tokio::time::sleep(SECOND / 20).await;
    assert_eq!(bench.faults.count(Operation::Abandon), 2);
    bench
        .until("the last one", async || {
            bench.time.advance(SECOND / 10);
            bench.faults.count(Operation::Abandon) == 3
        })
        .await;
}

#[tokio::test]
async fn close_leaves_holds_to_session() {
    let bench = Bench::new().await;
    let mut guards = Vec::new();
    for turn in 0..1_000 {
        guards.push(bench.locks.lock(format!("k{turn}")).await.unwrap());
    }
    let fixed = bench.locks.lock("fixed").ttl(60 * SECOND).await.unwrap();
    bench.locks.close().await.unwrap();
    assert_eq!((bench.faults.count(Operation::Release), bench.faults.count(Operation::Abandon)), (0, 1));
    assert!(!fixed.is_held() && guards.iter().all(|guard| !guard.is_held()));
    assert!(bench.memory.list("", None, 10).await.unwrap().outcome.is_empty());
}

/// The store forgot the grant of `k`, and gave the key to another one.
async fn forget_grant(bench: &Bench) -> (crate::Guard, crate::TokenId, Locks, crate::Guard) {
    let builder = Locks::builder_with_store(bench.memory.clone()).clock(bench.time.clock());
    let other = builder.open().await.unwrap();
    let guard = bench.locks.lock("k").await.unwrap();
    let token = bench.locks.handle.shared.tokens.held()[0];
    bench.memory.release(guard.key(), token, None).await.unwrap();
    let holder = other.lock("k").await.unwrap();
    let shared = &bench.locks.handle.shared;
    let request = crate::store::AcquireRequest {
        key: guard.key().clone(),
        token,
        session: bench.locks.session().unwrap(),
        demand: crate::store::Demand::MUTEX,
        lifetime: crate::store::Lifetime::Session { max_hold: None },
        enqueue: true,
        not_after: shared.store_time().after(SECOND),
        metadata: None,
        trace: None,
    };
    bench.memory.acquire(request).await.unwrap();
    (guard, token, other, holder)
}

#[tokio::test]
async fn queued_hold_is_lost() {
    for way in ["a failover", "the guard"] {
        let bench = Bench::new().await;
        let (guard, _, other, _holder) = forget_grant(&bench).await;
        match way {
            "the guard" => assert!(guard.verify().await.is_err()),
            _ => bench.verify().await.unwrap(),
        }
        assert_eq!(guard.loss(), Some(LossCause::Missing));
        bench.until("its place is given up", async || other.inspect("k").await.unwrap().waiters.is_empty()).await;
    }
}

#[tokio::test]
async fn another_fence_is_a_loss() {
    let bench = Bench::new().await;
    let (guard, token, other, holder) = forget_grant(&bench).await;
    let fence = crate::Fence::new(guard.fence().get() + 1);
    holder.release().await.unwrap();
    bench.time.advance(SECOND);
    // The message may come from the store or from anybody who can publish, so the keeper only checks the hold.
    receive(&bench.locks.handle.shared, Push::Granted { key: guard.key().clone(), token, fence });
    bench.until("lost", async || guard.loss() == Some(LossCause::Missing)).await;
    bench.until("ended", async || !other.is_locked("k").await.unwrap()).await;
}

#[tokio::test]
async fn forgotten_extension_is_undone() {
    let bench = Bench::new().await;
    let guard = bench.locks.lock("k").ttl(10 * SECOND).await.unwrap();
    let token = bench.locks.handle.shared.tokens.held()[0];
    guard.extend(60 * SECOND).await.unwrap();
    guard.verify().await.unwrap();
    assert!(guard.valid_for().unwrap() > 58 * SECOND);
    bench.memory.extend(guard.key(), token, 10 * SECOND).await.unwrap();
    guard.verify().await.unwrap();
    assert!(guard.valid_for().unwrap() <= 10 * SECOND);
}

#[tokio::test]
async fn deleted_hold_is_lost_within_some_renewals() {
    let bench = Bench::new().await;
    let mut guards = Vec::new();
    for turn in 0..100 {
        guards.push(bench.locks.lock(format!("k{turn}")).await.unwrap());
    }
    let token = match bench.locks.handle.shared.tokens.holds().iter().find(|hold| hold.fence == guards[50].fence()) {
        Some(hold) if hold.key == *guards[50].key() => hold.token,
        _ => bench.locks.handle.shared.tokens.holds().iter().find(|hold| hold.key == *guards[50].key()).unwrap().token,
    };
    bench.memory.release(guards[50].key(), token, None).await.unwrap();
    let mut beats = 0;
    while guards[50].is_held() {
        assert!(beats < 20);
        let before = (bench.faults.count(Operation::RenewSession), bench.faults.count(Operation::Poll));
        bench.time.advance(2 * SECOND);
        bench.until("renewed", async || bench.faults.count(Operation::RenewSession) > before.0).await;
        tokio::time::sleep(SECOND / 20).await;
        assert!(bench.faults.count(Operation::Poll) - before.1 <= 16);
        beats += 1;
    }
    assert_eq!(guards[50].loss(), Some(LossCause::Missing));
    assert!(guards.iter().filter(|guard| guard.is_held()).count() == 99);
}

#[tokio::test]
async fn foreign_grants_are_ignored() {
    let bench = Bench::new().await;
    let builder = Locks::builder_with_store(bench.memory.clone()).clock(bench.time.clock());
    let other = builder.open().await.unwrap();
    let guard = other.lock("k").await.unwrap();
    let token = other.handle.shared.tokens.held()[0];
    receive(&bench.locks.handle.shared, Push::Granted { key: guard.key().clone(), token, fence: guard.fence() });
    assert_eq!(bench.locks.handle.shared.tokens.cleaning_up(), 0);
    // A token of its own that nobody has any more is ended.
    let own = bench.locks.handle.shared.new_token(bench.locks.session().unwrap()).unwrap();
    receive(&bench.locks.handle.shared, Push::Granted { key: guard.key().clone(), token: own, fence: guard.fence() });
    bench.until("ended", async || bench.faults.count(Operation::Abandon) == 1).await;
    guard.check().unwrap();
}
