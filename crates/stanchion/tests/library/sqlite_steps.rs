//! Tests the operations of the embedded store one by one, through the [`Store`] trait.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, reason = "helpers of tests")]

use std::time::Duration;

use crate::sqlite_support::{Handle, SESSION, folder, granted, key, queued, until, within};
use stanchion::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, Cursor, Demand, EndOutcome, ExtendOutcome,
    ForceReleaseOutcome, ForceReleaseRequest, Lifetime, LingerOutcome, LostToken, MAX_WAITERS, OpenOutcome,
    OpenSession, PollOutcome, Prefixed, Push, RenewOutcome, Sqlite, Store, StoreTime,
};
use stanchion::{ErrorKind, Fence, Key, SessionId, TokenId, VirtualClock};

const SECOND: Duration = Duration::from_secs(1);

/// Opens two handles on one folder, with a clock that the test moves.
async fn pair(time: &VirtualClock, folder: &std::path::Path) -> (Handle, Handle) {
    let open = || Sqlite::open_with(folder, time.clock(), "boot").unwrap();
    (Handle::on(open()).await, Handle::on(open()).await)
}

#[tokio::test]
async fn uncontended_cycle_writes_twice() {
    let (_temp, folder) = folder();
    let a = Handle::open(&folder).await;
    let job = key("job");
    for round in 0..3 {
        let before = a.store.write_transactions();
        let (token, _) = a.hold(&job).await;
        assert_eq!(a.store.write_transactions() - before, 1, "acquire, round {round}");
        assert_eq!(a.release(&job, token).await, EndOutcome::Released);
        assert_eq!(a.store.write_transactions() - before, 2, "release, round {round}");
    }
    let (token, _) = a.hold(&job).await;
    let before = a.store.write_transactions();
    a.poll(&job, token).await;
    a.store.renew_session(a.session).await.unwrap();
    a.store.inspect(&job).await.unwrap();
    a.store.list("", None, 10).await.unwrap();
    let (waiting, _) = a.queue(&job).await;
    a.poll(&job, waiting).await;
    assert_eq!(a.store.write_transactions() - before, 1, "only entering the queue writes");
}

#[tokio::test]
async fn acquire_is_idempotent_by_token() {
    let (_temp, folder) = folder();
    let (a, b) = (Handle::open(&folder).await, Handle::open(&folder).await);
    let job = key("job");
    let request = a.request(&job);
    let first = granted(a.acquire(request.clone()).await);
    assert_eq!(granted(a.acquire(request.clone()).await), first);
    assert_eq!(a.poll(&job, request.token).await, PollOutcome::Granted(first));
    let waiting = b.request(&job);
    assert_eq!(queued(b.acquire(waiting.clone()).await).ahead, 0);
    assert_eq!(queued(b.acquire(waiting.clone()).await).ahead, 0, "the same place");
    assert_eq!(a.store.inspect(&job).await.unwrap().outcome.waiters.len(), 1);
    assert_eq!(a.release(&job, request.token).await, EndOutcome::Released);
    assert_eq!(a.release(&job, request.token).await, EndOutcome::Nothing);
    match b.poll(&job, waiting.token).await {
        PollOutcome::Granted(second) => assert!(second.fence > first.fence),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn release_hands_off_with_one_push() {
    let (_temp, folder) = folder();
    let (mut a, mut b) = (Handle::open(&folder).await, Handle::open(&folder).await);
    let job = key("job");
    let (held, first) = a.hold(&job).await;
    let (own, place) = a.queue(&job).await;
    assert_eq!(place.ahead, 0);
    let (other, place) = b.queue(&job).await;
    assert_eq!(place.ahead, 1);
    let before = a.store.write_transactions();
    a.release(&job, held).await;
    let Push::Granted { key: of, token, fence } = a.push().await else { panic!("no grant") };
    assert_eq!((of, token), (job.clone(), own));
    assert!(fence > first.fence);
    assert_eq!(
        b.poll(&job, other).await,
        PollOutcome::Queued(stanchion::store::Queued { ahead: 0, check_in: None, in_use: None })
    );
    a.release(&job, own).await;
    let Push::Granted { token, .. } = b.push().await else { panic!("no grant") };
    assert_eq!(token, other, "the push reaches the other handle through its socket");
    assert_eq!(a.store.write_transactions() - before, 2, "a hand-off is part of the release");
    assert_eq!(b.release(&job, other).await, EndOutcome::Released);
}

#[tokio::test]
async fn polls_and_late_requests_create_nothing() {
    let (_temp, folder) = folder();
    let a = Handle::open(&folder).await;
    let job = key("job");
    assert_eq!(a.poll(&job, TokenId::random().unwrap()).await, PollOutcome::Gone);
    let now = a.store.inspect(&job).await.unwrap().time;
    let late = AcquireRequest { not_after: StoreTime::from_micros(now.as_micros() - 1), ..a.request(&job) };
    assert_eq!(a.acquire(late).await, AcquireOutcome::Stale);
    let state = a.store.inspect(&job).await.unwrap().outcome;
    assert!(state.holders.is_empty() && state.waiters.is_empty());
    let busy = AcquireRequest { enqueue: false, ..a.request(&job) };
    let (held, _) = a.hold(&job).await;
    let token = busy.token;
    assert_eq!(a.acquire(busy).await, AcquireOutcome::Busy { check_in: None, in_use: None, lingers: false });
    assert_eq!(a.poll(&job, token).await, PollOutcome::Gone, "the store entered nothing");
    assert_eq!(a.store.abandon(&job, held).await.unwrap().outcome, EndOutcome::Released);
}

#[tokio::test]
async fn capacity_is_shared_in_order() {
    let (_temp, folder) = folder();
    let (a, mut b) = (Handle::open(&folder).await, Handle::open(&folder).await);
    let pool = key("pool");
    let take =
        |handle: &Handle, units| AcquireRequest { demand: Demand::new(units, 3).unwrap(), ..handle.request(&pool) };
    let (one, two, three) = (take(&a, 1), take(&a, 2), take(&b, 3));
    let (first, second) = (one.token, two.token);
    granted(a.acquire(one).await);
    granted(a.acquire(two).await);
    let all = three.token;
    queued(b.acquire(three).await);
    assert_eq!(queued(a.acquire(take(&a, 1)).await).ahead, 1, "no request overtakes the waiter");
    a.release(&pool, first).await;
    assert!(matches!(b.poll(&pool, all).await, PollOutcome::Queued(_)));
    let small = AcquireRequest { enqueue: false, ..take(&a, 1) };
    let busy = AcquireOutcome::Busy { check_in: None, in_use: Some(3), lingers: false };
    assert_eq!(a.acquire(small).await, busy, "this also applies if there is room for one unit");
    a.release(&pool, second).await;
    b.granted(&pool, all).await;
    let state = a.store.inspect(&pool).await.unwrap().outcome;
    assert_eq!((state.capacity(), state.holders.len(), state.waiters.len()), (Some(3), 1, 1));
}

#[tokio::test]
async fn writer_waits_for_all_readers() {
    let (_temp, folder) = folder();
    let a = Handle::open(&folder).await;
    let page = key("page");
    let mut readers = Vec::new();
    for _ in 0..100 {
        let request = AcquireRequest { demand: Demand::READ, ..a.request(&page) };
        readers.push(request.token);
        granted(a.acquire(request).await);
    }
    let write = AcquireRequest { demand: Demand::WRITE, ..a.request(&page) };
    let writer = write.token;
    queued(a.acquire(write).await);
    for reader in readers {
        assert!(matches!(a.poll(&page, writer).await, PollOutcome::Queued(_)));
        a.release(&page, reader).await;
    }
    assert!(matches!(a.poll(&page, writer).await, PollOutcome::Granted(_)));
}

#[tokio::test]
async fn cooldown_closes_the_key_until_its_end() {
    let (_temp, folder) = folder();
    let time = VirtualClock::new();
    let (a, mut b) = pair(&time, &folder).await;
    let job = key("job");
    let (held, _) = a.hold(&job).await;
    let (waiting, place) = b.queue(&job).await;
    assert_eq!(place.check_in, None);
    a.store.release(&job, held, Some(60 * SECOND)).await.unwrap();
    assert_eq!(
        b.push().await,
        Push::Recheck { token: waiting },
        "the head is notified, so that it polls at the end of the cooldown"
    );
    match b.poll(&job, waiting).await {
        PollOutcome::Queued(place) => assert_eq!(place.check_in, Some(60 * SECOND)),
        other => panic!("{other:?}"),
    }
    let busy = AcquireRequest { enqueue: false, ..a.request(&job) };
    assert_eq!(
        a.acquire(busy).await,
        AcquireOutcome::Busy { check_in: Some(60 * SECOND), in_use: None, lingers: false }
    );
    assert_eq!(a.store.inspect(&job).await.unwrap().outcome.closed_for, Some(60 * SECOND));
    time.advance(60 * SECOND);
    assert!(matches!(b.poll(&job, waiting).await, PollOutcome::Granted(_)));
    b.store.release(&job, waiting, Some(60 * SECOND)).await.unwrap();
    assert_eq!(a.store.list("", None, 9).await.unwrap().outcome.len(), 1);
    time.advance(60 * SECOND);
    assert!(a.store.list("", None, 9).await.unwrap().outcome.is_empty());
    a.hold(&job).await;
}

#[tokio::test]
async fn expired_waiter_leaves_cooldown() {
    let (_temp, folder) = folder();
    let time = VirtualClock::new();
    let (a, b) = pair(&time, &folder).await;
    let job = key("job");
    let (held, _) = a.hold(&job).await;
    b.queue(&job).await;
    a.store.release(&job, held, Some(60 * SECOND)).await.unwrap();
    std::fs::remove_file(folder.join("sessions").join(format!("{}.lock", b.session.to_hex()))).unwrap();
    let of_three = AcquireRequest { demand: Demand::new(1, 3).unwrap(), enqueue: false, ..a.request(&job) };
    assert_eq!(
        a.acquire(of_three).await,
        AcquireOutcome::Busy { check_in: Some(60 * SECOND), in_use: None, lingers: false }
    );
    assert_eq!(a.store.inspect(&job).await.unwrap().outcome.waiters, []);
}

#[tokio::test]
async fn extend_moves_the_deadline() {
    let (_temp, folder) = folder();
    let time = VirtualClock::new();
    let (a, mut b) = pair(&time, &folder).await;
    let job = key("job");
    let fixed = AcquireRequest { lifetime: Lifetime::Fixed(10 * SECOND), ..a.request(&job) };
    let token = fixed.token;
    assert_eq!(granted(a.acquire(fixed.clone()).await).remaining, Some(10 * SECOND));
    time.advance(4 * SECOND);
    assert_eq!(granted(a.acquire(fixed).await).remaining, Some(6 * SECOND), "the lifetime counts from the grant");
    let (waiting, place) = b.queue(&job).await;
    assert_eq!(place.check_in, Some(6 * SECOND));
    assert_eq!(a.store.extend(&job, token, 20 * SECOND).await.unwrap().outcome, ExtendOutcome::Extended);
    assert_eq!(a.store.extend(&job, waiting, SECOND).await.unwrap().outcome, ExtendOutcome::NotHeld);
    time.advance(19 * SECOND);
    assert!(matches!(b.poll(&job, waiting).await, PollOutcome::Queued(_)));
    assert_eq!(a.store.extend(&job, token, SECOND / 2).await.unwrap().outcome, ExtendOutcome::Extended);
    assert_eq!(b.push().await, Push::Recheck { token: waiting }, "the head is notified of an earlier deadline");
    time.advance(SECOND / 2);
    assert!(matches!(b.poll(&job, waiting).await, PollOutcome::Granted(_)));
    assert_eq!(a.poll(&job, token).await, PollOutcome::Gone);
    assert_eq!(a.release(&job, token).await, EndOutcome::Nothing);
    assert_eq!(
        b.store.extend(&job, waiting, SECOND).await.unwrap().outcome,
        ExtendOutcome::NotHeld,
        "the hold has no deadline"
    );
    // A session-bound hold may have a deadline too.
    b.release(&job, waiting).await;
    let limited = AcquireRequest { lifetime: Lifetime::Session { max_hold: Some(SECOND) }, ..a.request(&job) };
    assert_eq!(granted(a.acquire(limited).await).remaining, Some(SECOND));
    time.advance(SECOND);
    b.hold(&job).await;
}

#[tokio::test]
async fn fixed_hold_outlives_session_with_owner() {
    let (_temp, folder) = folder();
    let time = VirtualClock::new();
    let (a, b) = pair(&time, &folder).await;
    let job = key("job");
    let fixed =
        AcquireRequest { lifetime: Lifetime::Fixed(10 * SECOND), metadata: Some("m".into()), ..a.request(&job) };
    granted(a.acquire(fixed).await);
    let owner = b.store.inspect(&job).await.unwrap().outcome.holders[0].owner.clone();
    assert!(owner.starts_with("test "));
    a.store.close_session(a.session).await.unwrap();
    a.store.close_session(a.session).await.unwrap();
    let state = b.store.inspect(&job).await.unwrap().outcome;
    assert_eq!((state.holders[0].owner.as_str(), state.holders[0].metadata.as_deref()), (owner.as_str(), Some("m")));
    assert!(!state.holders[0].session_bound);
    let (waiting, _) = b.queue(&job).await;
    time.advance(10 * SECOND);
    assert!(matches!(b.poll(&job, waiting).await, PollOutcome::Granted(_)));
}

#[tokio::test]
async fn renewals_report_force_releases_until_release() {
    let (_temp, folder) = folder();
    let (mut a, mut b) = (Handle::open(&folder).await, Handle::open(&folder).await);
    let job = key("job");
    let request = a.request(&job);
    let token = request.token;
    let first = granted(a.acquire(request.clone()).await);
    let (waiting, _) = b.queue(&job).await;
    let force = |fence| ForceReleaseRequest { key: job.clone(), fence, reason: "stuck".into() };
    let wrong = b.store.force_release(force(Fence::new(1))).await.unwrap().outcome;
    assert_eq!(wrong, ForceReleaseOutcome::NoSuchHold { live: vec![first.fence] });
    assert_eq!(b.store.force_release(force(first.fence)).await.unwrap().outcome, ForceReleaseOutcome::Released);
    let lost = LostToken { key: job.clone(), token, reason: "stuck".into() };
    assert_eq!(a.push().await, Push::ForceReleased(lost.clone()));
    let next = b.granted(&job, waiting).await;
    assert!(next.fence.get() > first.fence.get() + 1, "the force-release raised the fence too");
    assert_eq!(a.poll(&job, token).await, PollOutcome::Gone);
    assert_eq!(a.acquire(request.clone()).await, AcquireOutcome::ForceReleased);
    for _ in 0..2 {
        let outcome = a.store.renew_session(a.session).await.unwrap().outcome;
        assert_eq!(outcome, RenewOutcome::Alive { lost: vec![lost.clone()] });
    }
    assert_eq!(a.release(&job, token).await, EndOutcome::Nothing);
    assert_eq!(a.store.renew_session(a.session).await.unwrap().outcome, RenewOutcome::Alive { lost: vec![] });
}

#[tokio::test]
async fn concurrent_adopt_has_one_winner() {
    let (_temp, folder) = folder();
    let (a, b) = (Handle::open(&folder).await, Handle::open(&folder).await);
    let job = key("job");
    let (from, first) = a.hold(&job).await;
    let request = |handle: &Handle| AdoptRequest {
        key: job.clone(),
        from,
        to: TokenId::random().unwrap(),
        session: handle.session,
        not_after: StoreTime::from_micros(u64::MAX),
    };
    let stale = AdoptRequest { not_after: StoreTime::from_micros(0), ..request(&b) };
    assert_eq!(b.store.adopt(stale).await.unwrap().outcome, AdoptOutcome::Stale);
    let (by_a, by_b) = (request(&a), request(&b));
    let (one, two) = tokio::join!(a.store.adopt(by_a.clone()), b.store.adopt(by_b.clone()));
    let adopted = AdoptOutcome::Adopted { granted: first, session_bound: true };
    let outcomes = [one.unwrap().outcome, two.unwrap().outcome];
    assert!(outcomes == [adopted, AdoptOutcome::Gone] || outcomes == [AdoptOutcome::Gone, adopted], "{outcomes:?}");
    let (winner, request) = if outcomes[0] == adopted { (&a, by_a) } else { (&b, by_b) };
    assert_eq!(winner.store.adopt(request.clone()).await.unwrap().outcome, adopted, "the second call is idempotent");
    assert_eq!(a.release(&job, from).await, EndOutcome::Nothing);
    assert_eq!(a.release(&job, request.to).await, EndOutcome::Released);
}

#[tokio::test]
async fn closed_session_hands_off_keys() {
    let (_temp, folder) = folder();
    let (a, mut b) = (Handle::open(&folder).await, Handle::open(&folder).await);
    let (job, other) = (key("job"), key("other"));
    let (mine, _) = a.hold(&job).await;
    let (theirs, _) = b.hold(&other).await;
    let (waiting, _) = b.queue(&job).await;
    let (left, _) = a.queue(&other).await;
    let (last, place) = b.queue(&other).await;
    assert_eq!(place.ahead, 1);
    a.store.close_session(a.session).await.unwrap();
    b.granted(&job, waiting).await;
    assert_eq!(b.poll(&other, left).await, PollOutcome::Gone);
    assert!(matches!(b.poll(&other, last).await, PollOutcome::Queued(place) if place.ahead == 0));
    assert_eq!(a.poll(&job, mine).await, PollOutcome::Gone);
    assert_eq!(a.store.renew_session(a.session).await.unwrap().outcome, RenewOutcome::Gone);
    assert_eq!(a.acquire(a.request(&job)).await, AcquireOutcome::SessionGone);
    let again = OpenSession { session: a.session, ttl: SECOND, owner: String::new() };
    assert_eq!(a.store.open_session(again).await.unwrap().outcome, OpenOutcome::Gone, "an id can be used once");
    assert!(a.store.session_descriptor(a.session).is_none() && b.store.session_descriptor(b.session).is_some());
    b.release(&other, theirs).await;
    b.granted(&other, last).await;
    let files = std::fs::read_dir(folder.join("sessions")).unwrap().count();
    assert_eq!(files, 2, "the lock file and the socket of the open session remain");
}

#[tokio::test]
async fn dropped_store_closes_sessions() {
    let (_temp, folder) = folder();
    let (a, mut b) = (Handle::open(&folder).await, Handle::open(&folder).await);
    let job = key("job");
    a.hold(&job).await;
    let (waiting, _) = b.queue(&job).await;
    let Handle { store, mut grants, .. } = a;
    drop(store);
    assert!(matches!(b.push().await, Push::Granted { token, .. } if token == waiting));
    let ended = async { while grants.next().await.is_some() {} };
    within(ended).await; // the stream of the dropped store ends
}

#[tokio::test]
async fn dropped_store_closes_all_files() {
    let (_temp, folder) = folder();
    let ours = || {
        let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        links.filter_map(|link| std::fs::read_link(link.path()).ok()).filter(|link| link.starts_with(&folder)).count()
    };
    for _ in 0..3 {
        let a = Handle::open(&folder).await;
        assert!(ours() > 3);
        drop(a);
    }
    until("all descriptors are closed", async || ours() == 0).await;
}

#[tokio::test]
async fn queue_has_a_limit_and_exact_places() {
    let (_temp, folder) = folder();
    let a = Handle::open(&folder).await;
    let job = key("job");
    let (held, _) = a.hold(&job).await;
    let mut tokens = Vec::new();
    for ahead in 0..MAX_WAITERS {
        let (token, place) = a.queue(&job).await;
        assert_eq!(place.ahead, ahead);
        tokens.push(token);
    }
    assert_eq!(a.acquire(a.request(&job)).await, AcquireOutcome::QueueFull { limit: MAX_WAITERS });
    for gone in [5_000, 100, 0] {
        let token = tokens.remove(gone);
        assert_eq!(a.store.abandon(&job, token).await.unwrap().outcome, EndOutcome::Dequeued);
    }
    assert!(matches!(a.poll(&job, tokens[9_000]).await, PollOutcome::Queued(place) if place.ahead == 9_000));
    a.release(&job, held).await;
    assert!(matches!(a.poll(&job, tokens[0]).await, PollOutcome::Granted(_)));
    assert!(matches!(a.poll(&job, tokens[9_000]).await, PollOutcome::Queued(place) if place.ahead == 8_999));
}

#[tokio::test]
async fn prefixed_errors_name_the_callers_key() {
    let (_temp, folder) = folder();
    let store = Prefixed::new(Sqlite::open(&folder).unwrap(), "tenant").unwrap();
    store.inspect(&key("job")).await.unwrap();
    rusqlite::Connection::open(folder.join("locks.db")).unwrap().execute_batch("DROP TABLE keys").unwrap();
    let fault = store.inspect(&key("job")).await.unwrap_err();
    assert_eq!(fault.key(), Some(&key("job")), "{fault}");
}

#[tokio::test]
async fn deleted_idle_keys_never_repeat_fences() {
    let (_temp, folder) = folder();
    let time = VirtualClock::new();
    let (a, _b) = pair(&time, &folder).await;
    let mut newest = Fence::new(0);
    for n in 0..10_000 {
        let job = key(&format!("job-{n}"));
        let (token, grant) = a.hold(&job).await;
        newest = newest.max(grant.fence);
        a.release(&job, token).await;
        // The wall clock does not raise the fences here, because it stands still with the virtual clock.
    }
    time.advance(Duration::from_secs(2 * 3600));
    let rows = || {
        let db = rusqlite::Connection::open(folder.join("locks.db")).unwrap();
        db.query_row("SELECT count(*) FROM keys", [], |row| row.get::<_, i64>(0)).unwrap()
    };
    assert_eq!(rows(), 10_000);
    let busy = key("busy");
    for _ in 0..6_000 {
        let (token, _) = a.hold(&busy).await;
        a.release(&busy, token).await;
    }
    assert_eq!(rows(), 1, "the sweeps deleted all rows except the row of the busy key");
    // The system clock is years behind the virtual clock, as after a step back, so only the floor keeps the fences
    // rising.
    let c = Handle::on(Sqlite::open_with(&folder, stanchion::Clock::system(), "boot").unwrap()).await;
    let (_, grant) = c.hold(&key("job-0")).await;
    assert!(grant.fence > newest, "{:?} after {newest:?}", grant.fence);
}

#[tokio::test]
async fn wall_clock_step_back_repeats_no_fence() {
    let (_temp, folder) = folder();
    // The virtual wall clock begins in 2030, so the system clock is years behind it.
    let time = VirtualClock::new();
    let job = key("job");
    let first = {
        let a = Handle::on(Sqlite::open_with(&folder, time.clock(), "boot").unwrap()).await;
        let (token, grant) = a.hold(&job).await;
        a.release(&job, token).await;
        grant
    };
    let b = Handle::on(Sqlite::open_with(&folder, stanchion::Clock::system(), "boot").unwrap()).await;
    let (_, grant) = b.hold(&job).await;
    assert_eq!(grant.fence.get(), first.fence.get() + 1);
}

#[tokio::test]
async fn restart_keeps_cooldowns_and_raises_fences() {
    let (_temp, folder) = folder();
    let time = VirtualClock::new();
    let (job, closed) = (key("job"), key("closed"));
    let (a, b) = pair(&time, &folder).await;
    let fixed = AcquireRequest { lifetime: Lifetime::Fixed(3600 * SECOND), ..a.request(&job) };
    let first = granted(a.acquire(fixed).await);
    b.queue(&job).await;
    let (token, second) = a.hold(&closed).await;
    a.store.release(&closed, token, Some(100 * SECOND)).await.unwrap();
    time.advance(40 * SECOND);
    // After a restart the boot-time clock starts again and the wall clock continues. In a virtual clock they advance
    // together, so the end of the cooldown stays the same.
    let c = Handle::on(Sqlite::open_with(&folder, time.clock(), "next boot").unwrap()).await;
    let state = c.store.inspect(&job).await.unwrap().outcome;
    assert!(state.holders.is_empty() && state.waiters.is_empty());
    assert_eq!(c.store.inspect(&closed).await.unwrap().outcome.closed_for, Some(60 * SECOND));
    let (_, grant) = c.hold(&job).await;
    assert!(grant.fence.get() > first.fence.get() + 600_000_000, "the last commits before the restart may be lost");
    assert_eq!(a.store.renew_session(a.session).await.unwrap().outcome, RenewOutcome::Gone);
    time.advance(60 * SECOND);
    let (_, grant) = c.hold(&closed).await;
    assert!(grant.fence.get() > second.fence.get() + 600_000_000);
}

#[tokio::test]
async fn deleted_folder_ends_its_sessions() {
    let (_temp, folder) = folder();
    let a = Handle::open(&folder).await;
    a.hold(&key("job")).await;
    assert!(matches!(a.store.renew_session(a.session).await.unwrap().outcome, RenewOutcome::Alive { .. }));
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(a.store.renew_session(a.session).await.unwrap().outcome, RenewOutcome::Gone);
    let error = a.store.acquire(a.request(&key("other"))).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "no other process would see the hold: {error}");
    let b = Handle::open(&folder).await;
    b.hold(&key("job")).await;
    assert_eq!(a.store.renew_session(a.session).await.unwrap().outcome, RenewOutcome::Gone);
}

/// All processes must share each of these files, so replacing a single one splits the processes too.
#[tokio::test]
async fn deleted_and_replaced_files_end_sessions() {
    let lock_of = |a: &Handle| format!("sessions/{}.lock", a.session.to_hex());
    for name in ["gate", "locks.db", "locks.db-wal", "locks.db-shm", "sessions"] {
        for is_replaced in [false, true] {
            let (_temp, folder) = folder();
            let mut a = Handle::open(&folder).await;
            let job = key("job");
            a.hold(&job).await;
            let path = folder.join(name);
            std::fs::rename(&path, folder.join("away")).unwrap();
            if is_replaced && name == "sessions" {
                std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(&path).unwrap();
            } else if is_replaced {
                std::fs::copy(folder.join("away"), &path).unwrap();
            }
            if !is_replaced || name != "gate" {
                // A writing request detects the change too, not only a renewal.
                let refused = a.store.acquire(a.request(&key("other"))).await;
                let is_refused = match &refused {
                    Ok(reply) => reply.outcome == AcquireOutcome::SessionGone,
                    Err(error) => {
                        error.kind() == ErrorKind::Unavailable
                            && error.to_string().contains("was deleted or replaced while it was in use")
                    }
                };
                assert!(is_refused, "{name}: {refused:?}");
            }
            assert_eq!(a.store.renew_session(a.session).await.unwrap().outcome, RenewOutcome::Gone, "{name}");
            let file = if name == "sessions" { lock_of(&a) } else { name.to_owned() };
            let expected = format!("{} was deleted or replaced while it was in use", folder.join(file).display());
            assert!(matches!(a.push().await, Push::Warning(message) if message == expected), "{name}");
            drop(a);
            // Handles of one process share open files in SQLite, so wait until the old files are closed.
            until("all descriptors are closed", async || {
                let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
                !links.filter_map(|link| std::fs::read_link(link.path()).ok()).any(|link| link.starts_with(&folder))
            })
            .await;
            let b = Handle::open(&folder).await;
            b.hold(&job).await;
        }
    }
}

/// A process whose database was deleted relies on its holds until its next renewal. The new database grants nothing
/// before that.
#[tokio::test]
async fn new_database_waits_for_holders_of_the_old_one() {
    let (_temp, folder) = folder();
    let a = Handle::open(&folder).await;
    a.hold(&key("job")).await;
    std::fs::remove_file(folder.join("locks.db")).unwrap();
    let error = Sqlite::open(&folder).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(
        error.to_string().contains("deleted or replaced while it was in use, and a process still holds"),
        "{error}"
    );
    let opening = std::thread::spawn({
        let folder = folder.clone();
        move || Sqlite::open(folder)
    });
    assert_eq!(a.store.renew_session(a.session).await.unwrap().outcome, RenewOutcome::Gone);
    let b = Handle::on(opening.join().unwrap().unwrap()).await;
    b.hold(&key("job")).await;
}

#[tokio::test]
async fn renewals_touch_files_and_lock_folders() {
    let (_temp, folder) = folder();
    let time = VirtualClock::new();
    let a = Handle::on(Sqlite::open_with(&folder, time.clock(), "boot").unwrap()).await;
    let lock = format!("sessions/{}.lock", a.session.to_hex());
    let names = ["gate", "locks.db", "locks.db-wal", "locks.db-shm", &lock];
    let long_ago = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    let is_old = |name: &&&str| std::fs::metadata(folder.join(name)).unwrap().modified().unwrap() == long_ago;
    a.store.renew_session(a.session).await.unwrap();
    for name in names {
        let file = std::fs::File::open(folder.join(name)).unwrap();
        file.set_times(std::fs::FileTimes::new().set_modified(long_ago).set_accessed(long_ago)).unwrap();
    }
    a.store.renew_session(a.session).await.unwrap();
    assert_eq!(names.iter().filter(is_old).count(), names.len(), "not every renewal touches the files");
    time.advance(Duration::from_secs(600));
    a.store.renew_session(a.session).await.unwrap();
    assert_eq!(names.iter().filter(is_old).count(), 0);
    // systemd-tmpfiles tries to lock a folder in the same way before it cleans the folder.
    for locked in [folder.clone(), folder.join("sessions")] {
        let dir = std::fs::File::open(&locked).unwrap();
        assert!(dir.try_lock().is_err(), "{locked:?}");
    }
}

/// The store grants the highest number of its fence column once, and nothing after it.
#[tokio::test]
async fn highest_fence_is_granted_once() {
    let (_temp, folder) = folder();
    let a = Handle::open(&folder).await;
    let job = key("job");
    let (token, _) = a.hold(&job).await;
    let db = rusqlite::Connection::open(folder.join("locks.db")).unwrap();
    db.execute("UPDATE keys SET fence = ?1", [i64::MAX - 2]).unwrap();
    let mut b = Handle::open(&folder).await;
    let mut c = Handle::open(&folder).await;
    let mut waiting = Vec::new();
    for handle in [&b, &b, &c] {
        waiting.push(handle.queue(&job).await.0);
    }
    assert_eq!(a.release(&job, token).await, EndOutcome::Released);
    assert_eq!(b.granted(&job, waiting[0]).await.fence.get(), i64::MAX as u64 - 1);
    assert_eq!(b.release(&job, waiting[0]).await, EndOutcome::Released);
    assert_eq!(b.granted(&job, waiting[1]).await.fence.get(), i64::MAX as u64);
    let used_up = |error: stanchion::Error| {
        assert_eq!(error.kind(), ErrorKind::Internal, "{error}");
        assert!(error.to_string().contains("the highest number there is"), "{error}");
    };
    used_up(a.store.acquire(a.request(&job)).await.unwrap_err());
    used_up(c.store.poll(&job, &[waiting[2]]).await.unwrap_err());
    assert_eq!(b.release(&job, waiting[1]).await, EndOutcome::Released, "the hold can be released");
    used_up(c.store.poll(&job, &[waiting[2]]).await.unwrap_err());
    used_up(a.store.acquire(AcquireRequest { enqueue: false, ..a.request(&job) }).await.unwrap_err());
    assert_eq!(c.release(&job, waiting[2]).await, EndOutcome::Dequeued);
    a.hold(&key("another")).await;
    // A restart of the machine does not change this.
    let d = Handle::on(Sqlite::open_with(&folder, stanchion::Clock::system(), "next boot").unwrap()).await;
    used_up(d.store.acquire(d.request(&job)).await.unwrap_err());
    let _ = (&mut b, &mut c);
}

#[tokio::test]
async fn session_without_lock_file_is_gone() {
    let (_temp, folder) = folder();
    let (a, mut b) = (Handle::open(&folder).await, Handle::open(&folder).await);
    let job = key("job");
    a.hold(&job).await;
    let (waiting, _) = b.queue(&job).await;
    std::fs::remove_file(folder.join("sessions").join(format!("{}.lock", a.session.to_hex()))).unwrap();
    assert_eq!(a.store.renew_session(a.session).await.unwrap().outcome, RenewOutcome::Gone);
    b.granted(&job, waiting).await;
    assert_eq!(a.acquire(a.request(&job)).await, AcquireOutcome::SessionGone);
}

#[tokio::test]
async fn list_pages_through_keys_in_order() {
    let (_temp, folder) = folder();
    let a = Handle::open(&folder).await;
    for name in ["b:2", "a:1", "b:1", "b:3", "c:1"] {
        a.hold(&key(name)).await;
    }
    let (token, _) = a.hold(&key("b:0")).await;
    a.release(&key("b:0"), token).await;
    let page = async |prefix: &str, cursor: Option<Cursor>, limit| {
        let listed = a.store.list(prefix, cursor.as_ref(), limit).await.unwrap().outcome;
        let names: Vec<_> = listed.keys.iter().map(|state| state.key.name().to_owned()).collect();
        (names, listed.next)
    };
    assert_eq!(page("", None, 10).await.0, ["a:1", "b:1", "b:2", "b:3", "c:1"]);
    let (names, next) = page(":b:", None, 2).await;
    assert_eq!(names, ["b:1", "b:2"]);
    assert_eq!(page(":b:", next, 10).await, (vec!["b:3".to_owned()], None));
}

#[tokio::test]
async fn damaged_rows_are_skipped() {
    let (_temp, folder) = folder();
    let a = Handle::open(&folder).await;
    for name in ["good", "far", "negative", "foreign"] {
        a.hold(&key(name)).await;
    }
    let db = rusqlite::Connection::open(folder.join("locks.db")).unwrap();
    db.execute_batch(
        "UPDATE holds SET granted_wall = 9223372036854775807, granted = -9223372036854775808
             WHERE key_id = (SELECT id FROM keys WHERE name = ':far');
         UPDATE holds SET units = -1 WHERE key_id = (SELECT id FROM keys WHERE name = ':negative');
         UPDATE holds SET session = x'00' WHERE key_id = (SELECT id FROM keys WHERE name = ':foreign');
         INSERT INTO keys SELECT NULL, 'no key', fence, used, holders, waiting, capacity, next_deadline, closed_until,
             closed_until_wall, touched FROM keys WHERE name = ':good';
         INSERT INTO keys SELECT NULL, CAST(x'3aff' AS TEXT), fence, used, holders, waiting, capacity, next_deadline,
             closed_until, closed_until_wall, touched FROM keys WHERE name = ':good';",
    )
    .unwrap();
    let listing = a.store.list("", None, 100).await.unwrap().outcome;
    assert_eq!(listing.keys.iter().map(|state| state.key.name()).collect::<Vec<_>>(), ["far", "good"]);
    let damaged: Vec<_> = listing.damaged.iter().map(|entry| &*entry.name).collect();
    assert_eq!(damaged, [":foreign", ":negative", ":\u{fffd}", "no key"]);
    assert!(a.store.inspect(&key("negative")).await.unwrap_err().to_string().contains("cannot be read"));
    // The listing continues after a name that is not UTF-8.
    let mut cursor = None;
    for _ in 0..10 {
        let page = a.store.list("", cursor.as_ref(), 1).await.unwrap().outcome;
        cursor = page.next;
        if cursor.is_none() {
            return;
        }
    }
    panic!("the listing does not end");
}

#[tokio::test]
async fn listing_of_expired_sessions_writes_nothing() {
    let (_temp, folder) = folder();
    let (a, b) = (Handle::open(&folder).await, Handle::open(&folder).await);
    for at in 0..200 {
        a.hold(&key(&format!("k{at}"))).await;
    }
    // Without its lock file the session has expired, as if its process had been killed.
    std::fs::remove_file(folder.join("sessions").join(format!("{}.lock", a.session.to_hex()))).unwrap();
    let before = b.store.write_transactions();
    assert!(b.store.list("", None, 1_000).await.unwrap().outcome.is_empty());
    assert_eq!(b.store.write_transactions(), before);
}

#[tokio::test]
async fn dropped_operations_leave_nothing() {
    let (_temp, folder) = folder();
    let a = Handle::open(&folder).await;
    let job = key("job");
    for _ in 0..200 {
        let request = a.request(&job);
        let token = request.token;
        let mut acquire = Box::pin(a.store.acquire(request));
        let polled =
            std::future::poll_fn(|context| std::task::Poll::Ready(acquire.as_mut().poll(context).is_ready())).await;
        drop(acquire);
        let ended = a.store.abandon(&job, token).await.unwrap().outcome;
        assert!(ended == EndOutcome::Released || (!polled && ended == EndOutcome::Nothing), "{ended:?}");
    }
    a.hold(&job).await;
}

#[tokio::test]
async fn unknown_session_gets_nothing() {
    let (_temp, folder) = folder();
    let a = Handle::open(&folder).await;
    let stranger = SessionId::random().unwrap();
    let request = AcquireRequest { session: stranger, lifetime: SESSION, ..a.request(&key("job")) };
    assert_eq!(a.acquire(request).await, AcquireOutcome::SessionGone);
    assert_eq!(a.store.renew_session(stranger).await.unwrap().outcome, RenewOutcome::Gone);
    a.store.close_session(stranger).await.unwrap();
}

#[tokio::test]
async fn failed_request_spares_its_transaction() {
    let (_temp, folder) = folder();
    let (a, b) = (Handle::open(&folder).await, Handle::open(&folder).await);
    let c = Handle::open(&folder).await;
    let (bad, good) = (key("bad"), key("good"));
    // From now on, probing the session that waits for `bad` fails, so the store cannot reconcile `bad`.
    c.hold(&bad).await;
    b.queue(&bad).await;
    let lock = folder.join("sessions").join(format!("{}.lock", b.session.to_hex()));
    std::fs::remove_file(&lock).unwrap();
    std::os::unix::fs::symlink("/dev/null", &lock).unwrap();
    for _ in 0..50 {
        let (first, last) = (a.request(&good), a.request(&key("other")));
        let token = first.token;
        let (first, failed, refused, last) = tokio::join!(
            a.store.acquire(first),
            a.store.close_session(c.session),
            a.store.acquire(a.request(&bad)),
            a.store.acquire(last)
        );
        granted(first.unwrap().outcome);
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::Misconfigured);
        let error = refused.unwrap_err();
        assert_eq!((error.kind(), error.key()), (ErrorKind::Misconfigured, Some(&bad)), "{error}");
        let outcome = last.unwrap().outcome;
        assert!(matches!(outcome, AcquireOutcome::Granted(_) | AcquireOutcome::Queued(_)), "{outcome:?}");
        assert!(matches!(a.poll(&good, token).await, PollOutcome::Granted(_)), "an answered request is committed");
        let outcome = c.store.renew_session(c.session).await.unwrap().outcome;
        assert!(matches!(outcome, RenewOutcome::Alive { .. }), "a failed request changed nothing");
        assert_eq!(a.release(&good, token).await, EndOutcome::Released);
    }
}

#[tokio::test]
async fn new_predecessor_is_pushed_to_the_waiter() {
    let (_temp, folder) = folder();
    let (a, b) = (Handle::open(&folder).await, Handle::open(&folder).await);
    let mut c = Handle::open(&folder).await;
    let job = key("job");
    let (held, _) = a.hold(&job).await;
    let (middle, _) = b.queue(&job).await;
    let (last, _) = c.queue(&job).await;
    b.store.abandon(&job, middle).await.unwrap();
    assert_eq!(c.push().await, Push::Recheck { token: last }, "the waiter before it left the queue");
    a.release(&job, held).await;
    assert!(matches!(c.push().await, Push::Granted { token, .. } if token == last));
    // The head watches all holders, so the store notifies a waiter that becomes the head.
    let pool = key("pool");
    let take = |handle: &Handle| AcquireRequest { demand: Demand::new(1, 2).unwrap(), ..handle.request(&pool) };
    let (first, second, third, fourth) = (take(&a), take(&b), take(&b), take(&c));
    let (ended, last) = (first.token, fourth.token);
    granted(a.acquire(first).await);
    granted(b.acquire(second).await);
    queued(b.acquire(third).await);
    queued(c.acquire(fourth).await);
    a.release(&pool, ended).await;
    assert_eq!(c.push().await, Push::Recheck { token: last });
}

/// Acquires a key and marks its hold. Returns the token, the fence and the newest fence of the key.
async fn lingering(handle: &Handle, key: &Key) -> (TokenId, Fence, Fence) {
    let (token, _) = handle.hold(key).await;
    match handle.store.linger(key, token).await.unwrap().outcome {
        LingerOutcome::Lingers { fence, up_to } => (token, fence, up_to),
        other => panic!("expected a hold that lingers: {other:?}"),
    }
}

#[tokio::test]
async fn only_the_head_recalls() {
    let (_temp, folder) = folder();
    let (mut a, b) = (Handle::open(&folder).await, Handle::open(&folder).await);
    let (first, other) = (key("first"), key("other"));
    let (recalled, ..) = lingering(&a, &first).await;
    let (other_recalled, ..) = lingering(&a, &other).await;
    let (head, _) = b.queue(&first).await;
    assert_eq!(a.push().await, Push::Recall { token: recalled });
    let before = b.store.write_transactions();
    b.poll(&first, head).await;
    assert_eq!(a.push().await, Push::Recall { token: recalled });
    assert_eq!(b.store.write_transactions(), before, "a poll that recalls writes nothing");
    let (second, queued) = b.queue(&first).await;
    assert_eq!(queued.ahead, 1);
    b.poll(&first, second).await;
    b.queue(&other).await;
    assert_eq!(a.push().await, Push::Recall { token: other_recalled }, "the second waiter recalled nothing");
}

#[tokio::test]
async fn session_without_socket_cannot_linger() {
    let (_temp, folder) = folder();
    let a = Handle::open(&folder).await;
    let job = key("job");
    let (token, _) = a.hold(&job).await;
    std::fs::remove_file(folder.join("sessions").join(format!("{}.sock", a.session.to_hex()))).unwrap();
    assert_eq!(a.store.linger(&job, token).await.unwrap().outcome, LingerOutcome::Wanted);
    assert!(!a.store.inspect(&job).await.unwrap().outcome.holders[0].lingers);
}

#[tokio::test]
async fn wall_clock_step_back_reserves_no_fence() {
    let (_temp, folder) = folder();
    // The virtual wall clock begins in 2030, so the system clock is years behind it.
    let time = VirtualClock::new();
    let job = key("job");
    let a = Handle::on(Sqlite::open_with(&folder, time.clock(), "boot").unwrap()).await;
    let (token, _) = a.hold(&job).await;
    a.release(&job, token).await;
    let b = Handle::on(Sqlite::open_with(&folder, stanchion::Clock::system(), "boot").unwrap()).await;
    let (token, fence, up_to) = lingering(&b, &job).await;
    assert_eq!(up_to, fence);
    b.release(&job, token).await;
    assert_eq!(b.hold(&job).await.1.fence.get(), up_to.get() + 1);
}

#[tokio::test]
async fn restart_repeats_no_reserved_fence() {
    let (_temp, folder) = folder();
    let (time, job) = (VirtualClock::new(), key("job"));
    let (a, _b) = pair(&time, &folder).await;
    let (token, _) = a.hold(&job).await;
    time.advance(3600 * SECOND);
    let LingerOutcome::Lingers { fence, up_to } = a.store.linger(&job, token).await.unwrap().outcome else { panic!() };
    assert_eq!(up_to.get(), fence.get() + 3_600_000_000);
    let c = Handle::on(Sqlite::open_with(&folder, time.clock(), "next boot").unwrap()).await;
    let (_, granted) = c.hold(&job).await;
    assert!(granted.fence.get() > up_to.get() + 600_000_000, "the last commits before the restart may be lost");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_contenders_never_see_a_busy_database() {
    let (_temp, folder) = folder();
    let tasks: Vec<_> = (0..60)
        .map(|n| {
            let folder = folder.clone();
            tokio::spawn(async move {
                let handle = Handle::open(&folder).await;
                for round in 0..20 {
                    let job = key(&format!("job-{}", (n + round) % 7));
                    let request = AcquireRequest { enqueue: false, ..handle.request(&job) };
                    let token = request.token;
                    let outcome = handle.acquire(request).await;
                    assert!(matches!(outcome, AcquireOutcome::Granted(_) | AcquireOutcome::Busy { .. }), "{outcome:?}");
                    handle.store.abandon(&job, token).await.unwrap();
                }
                handle.store.close_session(handle.session).await.unwrap();
            })
        })
        .collect();
    for task in tasks {
        within(task).await.unwrap();
    }
}
