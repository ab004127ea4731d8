//! The primitives built on locks: readers and writers, semaphores, `lock_all`, `once` and elections.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use stanchion::{
    Error, ErrorKind, Event, EventStream, Fence, KeyRequest, Locks, LossCause, OnceOutcome, OwnerStatus, Released,
    Store,
};

use crate::environment::{Environment, GENEROUS, Random, list_all, seed, until};

const MINUTE: Duration = Duration::from_secs(60);

pub async fn readers_share_and_writer_excludes<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let readers = [one.read("k").await.unwrap(), two.read("k").await.unwrap()];
    assert!(one.write("k").try_acquire().await.unwrap().is_none());
    for reader in readers {
        reader.release().await.unwrap();
    }
    let writer = two.write("k").await.unwrap();
    assert!(one.read("k").try_acquire().await.unwrap().is_none());
    assert!(one.write("k").try_acquire().await.unwrap().is_none());
    assert!(one.lock("k").try_acquire().await.unwrap().is_none(), "a mutex excludes writers, too");
    writer.release().await.unwrap();
}

pub async fn permits_are_granted_up_to_the_limit<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let both = one.semaphore("k", 3).permits(2).await.unwrap();
    let third = two.semaphore("k", 3).await.unwrap();
    assert!(one.semaphore("k", 3).try_acquire().await.unwrap().is_none());
    assert!(one.semaphore("k", 4).try_acquire().await.unwrap().is_none(), "the smaller limit applies");
    drop(both);
    until("both permits are free", async || two.semaphore("k", 3).permits(2).try_acquire().await.unwrap().is_some())
        .await;
    for (limit, permits) in [(0, 1), (3, 0), (3, 4), (u32::MAX, 1)] {
        let error = one.semaphore("k", limit).permits(permits).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{limit} {permits}");
    }
    third.release().await.unwrap();
}

pub async fn differing_limits_are_reported<S: Store>(env: &Environment<S>) {
    let (old, new) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let held = old.semaphore("k", 3).permits(2).await.unwrap();
    let mut events = new.events();
    let next_report = async |events: &mut EventStream| {
        let mut next = async || loop {
            if let Event::LimitsDiffer { key, in_use, asked, .. } = events.next().await.expect("the handle is open") {
                return (key.name().to_owned(), in_use, asked);
            }
        };
        tokio::time::timeout(GENEROUS, next()).await.expect("an event reports the limits")
    };
    assert!(new.semaphore("k", 5).permits(4).try_acquire().await.unwrap().is_none());
    assert_eq!(next_report(&mut events).await, ("k".into(), 3, 5));
    let waiting = tokio::spawn({
        let new = new.clone();
        async move { new.semaphore("k", 5).permits(4).await }
    });
    assert_eq!(next_report(&mut events).await, ("k".into(), 3, 5));
    held.release().await.unwrap();
    let guard = tokio::time::timeout(GENEROUS, waiting).await.expect("the waiter is served").unwrap().unwrap();
    // An exclusive request takes the whole key, so its limit cannot differ from another one.
    assert!(old.lock("k").try_acquire().await.unwrap().is_none());
    guard.release().await.unwrap();
    let exclusive = old.lock("k").await.unwrap();
    assert!(new.read("k").try_acquire().await.unwrap().is_none());
    exclusive.release().await.unwrap();
    new.drain("done");
    loop {
        match events.next().await {
            Some(Event::Draining { .. }) => break,
            event => {
                assert!(!matches!(event, Some(Event::LimitsDiffer { .. }) | None), "unexpected event: {event:?}")
            }
        }
    }
}

pub async fn lock_all_takes_all_keys_or_none<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let guards = one.lock_all(["c", "a", "b", "a"]).await.unwrap();
    assert_eq!(guards.iter().map(|guard| guard.key().name()).collect::<Vec<_>>(), ["a", "b", "c"]);
    for name in ["a", "b", "c"] {
        assert_eq!(guards.fence(name), Some(two.inspect(name).await.unwrap().holders[0].fence));
    }
    assert!(guards.fence("d").is_none() && guards.is_held());
    assert!(two.lock_all(["0", "b"]).try_acquire().await.unwrap().is_none());
    until("the failed call leaves nothing", async || !two.is_locked("0").await.unwrap()).await;
    assert_eq!(guards.release().await.unwrap(), Released::Now);
    assert!(two.list("").await.unwrap().is_empty());
    // A shared key and an exclusive key in one request.
    let wanted = || [KeyRequest::read("shared"), KeyRequest::lock("alone")];
    let mixed = one.lock_all(wanted()).await.unwrap();
    drop(two.lock_all([KeyRequest::read("shared"), KeyRequest::semaphore("permits", 2, 2)]).await.unwrap());
    assert!(two.lock_all(wanted()).try_acquire().await.unwrap().is_none());
    drop(mixed);
    for wanted in
        [vec![], vec![KeyRequest::read("k"), KeyRequest::write("k")], vec![KeyRequest::lock("k"), KeyRequest::lock("")]]
    {
        let error = one.lock_all(wanted).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    }
    until("the store is empty", async || two.list("").await.unwrap().is_empty()).await;
}

pub async fn lock_all_has_one_wait_limit<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let mut limits = [2, 8, 32].map(Duration::from_secs).into_iter();
    // On a slow machine the limit may expire before the test has seen both waits, so the test retries with a longer
    // one.
    let error = loop {
        let limit = limits.next().expect("one limit applies to all keys");
        if let Some(error) = wait_for_two_keys(env, &one, &two, limit).await {
            assert!(error.to_string().contains(&format!("{limit:?}")), "{error}");
            break error;
        }
    };
    assert_eq!((error.kind(), error.key().map(|key| key.name().to_owned())), (ErrorKind::Timeout, Some("b".into())));
    until("the failed call leaves nothing", async || one.list("").await.unwrap().is_empty()).await;
    // If the call loses one key while it waits for another, it fails.
    let held = one.lock("b").await.unwrap();
    let waiting = tokio::spawn(two.lock_all(["a", "b"]).into_future());
    until("the call waits", async || one.inspect("b").await.unwrap().waiters.len() == 1).await;
    let fence = one.inspect("a").await.unwrap().holders[0].fence;
    one.force_release("a", fence, "for a test").await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap_err().kind(), ErrorKind::Lost(LossCause::ForceReleased));
    held.release().await.unwrap();
    until("the store is empty", async || one.list("").await.unwrap().is_empty()).await;
}

/// Waits for two keys, of which the first takes three quarters of the limit, and returns the error of the call.
///
/// Returns `None` if the test did not see the call wait for both keys, or if the call did not fail soon after the
/// limit. A call with a separate limit for each key would not fail that soon.
async fn wait_for_two_keys<S: Store>(env: &Environment<S>, one: &Locks, two: &Locks, limit: Duration) -> Option<Error> {
    let (first, held) = (one.lock("a").await.unwrap(), one.lock("b").await.unwrap());
    let mut waiting = tokio::spawn(two.lock_all(["a", "b", "c"]).wait(limit).into_future());
    let waits = async |key| one.inspect(key).await.unwrap().waiters.len() == 1;
    until("the call waits for the first key or has failed", async || waits("a").await || waiting.is_finished()).await;
    env.advance(limit * 3 / 4).await;
    first.release().await.unwrap();
    until("the call waits for the second key or has failed", async || waits("b").await || waiting.is_finished()).await;
    if !one.is_locked("a").await.unwrap() || one.is_locked("c").await.unwrap() {
        until("the call has failed", async || waiting.is_finished()).await;
    }
    let was_late = waiting.is_finished();
    env.advance(limit / 4 + Duration::from_millis(10)).await;
    let ended = tokio::time::timeout(limit * 3 / 5, &mut waiting).await;
    waiting.abort();
    until("the failed call leaves nothing", async || !one.is_locked("a").await.unwrap()).await;
    until("the queue is empty", async || one.inspect("b").await.unwrap().waiters.is_empty()).await;
    held.release().await.unwrap();
    let error = ended.ok()?.unwrap().unwrap_err();
    (!was_late).then_some(error)
}

/// Returns the duration of the two crowd cases: `STANCHION_CROWD_SECONDS`, or 700 ms.
fn crowd_duration() -> Duration {
    match std::env::var("STANCHION_CROWD_SECONDS") {
        Ok(seconds) => Duration::from_secs(seconds.parse().expect("STANCHION_CROWD_SECONDS is a number")),
        Err(_) => Duration::from_millis(700),
    }
}

pub async fn crowd_on_key_sets_never_deadlocks<S: Store>(env: &Environment<S>) {
    const KEYS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
    let seed = seed("crowd_on_key_sets_never_deadlocks");
    let handles =
        [env.locks().open().await.unwrap(), env.locks().open().await.unwrap(), env.locks().open().await.unwrap()];
    // For each key, the number of its readers, or −1 if a writer holds it.
    let inside: Arc<BTreeMap<&str, AtomicI64>> = Arc::new(KEYS.map(|key| (key, AtomicI64::new(0))).into());
    let end = Instant::now() + crowd_duration();
    let tasks: Vec<_> = (0..50)
        .map(|task| {
            let (locks, inside) = (handles[task % 3].clone(), inside.clone());
            let mut random = Random::new(seed.wrapping_add(task as u64));
            tokio::spawn(async move {
                let mut rounds = 0;
                while Instant::now() < end || rounds == 0 {
                    let mut wanted = BTreeMap::new();
                    for _ in 0..=random.below(3) {
                        wanted.insert(KEYS[random.below(6) as usize], random.below(2) == 0);
                    }
                    let keys = wanted
                        .iter()
                        .map(|(key, reads)| if *reads { KeyRequest::read(*key) } else { KeyRequest::write(*key) });
                    let request = locks.lock_all(keys);
                    if random.below(8) == 0 {
                        // Drops the call at a random point.
                        let limit = Duration::from_micros(random.below(5_000));
                        drop(tokio::time::timeout(limit, request.into_future()).await);
                        continue;
                    }
                    let guards = request.await.unwrap();
                    for (key, reads) in &wanted {
                        let before = if *reads {
                            inside[key].fetch_add(1, Ordering::SeqCst)
                        } else {
                            inside[key].fetch_sub(1, Ordering::SeqCst)
                        };
                        assert!(if *reads { before >= 0 } else { before == 0 }, "{key}: {before} holders inside");
                    }
                    tokio::task::yield_now().await;
                    for (key, reads) in &wanted {
                        inside[key].fetch_add(if *reads { -1 } else { 1 }, Ordering::SeqCst);
                    }
                    assert_eq!(guards.release().await.unwrap(), Released::Now);
                    rounds += 1;
                }
                rounds
            })
        })
        .collect();
    let mut rounds = 0;
    for task in tasks {
        rounds += task.await.unwrap();
    }
    println!("{rounds} sets of keys were locked");
    assert!(rounds >= 50, "{rounds}");
    until("the store is empty", async || handles[0].list("").await.unwrap().is_empty()).await;
}

pub async fn crowd_of_readers_never_starves_writers<S: Store>(env: &Environment<S>) {
    let end = Instant::now() + crowd_duration();
    let (readers, writers) = (Arc::new(AtomicI64::new(0)), Arc::new(AtomicI64::new(0)));
    // Number of writers that have not had to wait yet. The readers go on until it is zero, so a slow store works, too.
    let not_yet_waited = Arc::new(AtomicI64::new(4));
    // The time of each reader's request, and its fence.
    let read = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = Vec::new();
    let handles = [env.locks().open().await.unwrap(), env.locks().open().await.unwrap()];
    for reader in 0..32 {
        let (locks, readers, writers, read) =
            (handles[reader % 2].clone(), readers.clone(), writers.clone(), read.clone());
        let not_yet_waited = not_yet_waited.clone();
        tasks.push(tokio::spawn(async move {
            while Instant::now() < end || not_yet_waited.load(Ordering::SeqCst) > 0 {
                let sent_at = Instant::now();
                let guard = locks.read("k").await.unwrap();
                assert!(readers.fetch_add(1, Ordering::SeqCst) < 32 && writers.load(Ordering::SeqCst) == 0);
                read.lock().unwrap().push((sent_at, guard.fence()));
                tokio::task::yield_now().await;
                readers.fetch_sub(1, Ordering::SeqCst);
                guard.release().await.unwrap();
            }
            Vec::new()
        }));
    }
    for _ in 0..4 {
        let locks = env.locks().open().await.unwrap();
        let (readers, writers, not_yet_waited) = (readers.clone(), writers.clone(), not_yet_waited.clone());
        tasks.push(tokio::spawn(async move {
            let mut events = locks.events();
            let mut written: Vec<(Instant, Fence)> = Vec::new();
            while Instant::now() < end || written.is_empty() {
                let writing = tokio::spawn(locks.write("k").into_future());
                // The time since which the writer is known to be queued.
                let mut queued_at = None;
                let guard = loop {
                    match events.next().await.unwrap() {
                        Event::Contended { .. } => queued_at = Some(Instant::now()),
                        Event::Acquired { .. } => break writing.await.unwrap().unwrap(),
                        _ => {}
                    }
                };
                assert!(writers.fetch_add(1, Ordering::SeqCst) == 0 && readers.load(Ordering::SeqCst) == 0);
                if let Some(at) = queued_at {
                    if written.is_empty() {
                        not_yet_waited.fetch_sub(1, Ordering::SeqCst);
                    }
                    written.push((at, guard.fence()));
                }
                tokio::task::yield_now().await;
                writers.fetch_sub(1, Ordering::SeqCst);
                guard.release().await.unwrap();
            }
            written
        }));
    }
    let mut written = Vec::new();
    for task in tasks {
        written.extend(task.await.unwrap());
    }
    let mut read = std::mem::take(&mut *read.lock().unwrap());
    println!("{} reads, {} writes that had to wait", read.len(), written.len());
    assert!(written.len() >= 4);
    // A reader that sent its request after a writer was queued gets its grant after that writer.
    read.sort_unstable();
    let mut lowest_fence_from = vec![u64::MAX; read.len() + 1];
    for (at, (_, fence)) in read.iter().enumerate().rev() {
        lowest_fence_from[at] = lowest_fence_from[at + 1].min(fence.get());
    }
    for (queued_at, fence) in written {
        let later = read.partition_point(|(sent_at, _)| *sent_at <= queued_at);
        assert!(lowest_fence_from[later] > fence.get(), "a later reader was granted before a waiting writer");
    }
}

/// A body that fails the test if it runs.
async fn must_not_run(_: &stanchion::OnceGuard) -> Result<i32, Error> {
    panic!("the body ran")
}

pub async fn once_skips_runs_during_cooldown<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let pause = Duration::from_millis(700);
    let ran = one.once("k").cooldown(pause).run(async |_| Ok::<_, Error>(7)).await.unwrap();
    assert_eq!(ran, OnceOutcome::Ran(7));
    match two.once("k").cooldown(pause).run(must_not_run).await.unwrap() {
        OnceOutcome::Skipped { last: Some(last), is_running: false, opens_in: Some(left), .. } => {
            assert!(last.succeeded && left <= pause && last.closed_for == pause);
        }
        other => panic!("{other:?}"),
    }
    // With `wait` the call returns at once, because the run is done.
    let done = two.once("k").cooldown(pause).wait().run(must_not_run).await.unwrap();
    assert!(matches!(done, OnceOutcome::DoneElsewhere { .. }));
    // The cooldown applies to `once` only, so the key itself is free.
    two.lock("k").await.unwrap().release().await.unwrap();
    env.advance(pause + Duration::from_millis(10)).await;
    // The body can change the cooldown.
    let body = async |guard: &stanchion::OnceGuard| -> Result<_, Error> {
        assert!(guard.last().is_some_and(|last| last.succeeded));
        guard.set_cooldown(None)?;
        Ok(8)
    };
    assert_eq!(two.once("k").cooldown(MINUTE).run(body).await.unwrap(), OnceOutcome::Ran(8));
    assert_eq!(one.once("k").cooldown(MINUTE).run(async |_| Ok::<_, Error>(9)).await.unwrap(), OnceOutcome::Ran(9));
    assert!(matches!(two.once("k").run(must_not_run).await.unwrap(), OnceOutcome::Skipped { .. }));
    let bad = two.once("k").cooldown(Duration::ZERO).run(must_not_run).await.unwrap_err();
    assert_eq!(bad.kind(), ErrorKind::InvalidArgument);
    let store = env.open();
    let records = async || -> usize {
        let keys = list_all(&store, "").await;
        keys.iter().map(|key| key.holders.len()).sum()
    };
    until("the earlier records are gone", async || records().await == 1).await;
}

pub async fn period_counts_from_run_start<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let period = MINUTE * 10;
    let body = async |_: &stanchion::OnceGuard| {
        env.advance(Duration::from_millis(20)).await;
        Ok::<_, Error>(())
    };
    assert_eq!(one.once("k").every(period).run(body).await.unwrap(), OnceOutcome::Ran(()));
    match two.once("k").every(period).run(must_not_run).await.unwrap() {
        OnceOutcome::Skipped { last: Some(last), opens_in: Some(left), .. } => {
            assert!(last.closed_for <= period / 10 * 9 - Duration::from_millis(19) && last.closed_for > period / 2);
            assert!(left <= last.closed_for && left > period / 2, "{left:?}");
        }
        other => panic!("{other:?}"),
    }
}

pub async fn failed_run_counts_only_on_request<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let fails = async |_: &stanchion::OnceGuard| Err::<i32, _>(Error::new(ErrorKind::Internal, "error of the body"));
    let error = one.once("k").cooldown(MINUTE).run(fails).await.unwrap_err();
    assert_eq!(error.to_string(), "error of the body", "the error is passed on unchanged");
    let last = two.last_run("k").await.unwrap().unwrap();
    assert!(!last.succeeded && last.closed_still_for().is_none());
    assert_eq!(
        two.once("k").cooldown(MINUTE).slot(1).run(async |_| Ok::<_, Error>(1)).await.unwrap(),
        OnceOutcome::Ran(1)
    );
    let error = one.once("j").slot(5).failures_count().run(fails).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal);
    assert!(matches!(two.once("j").slot(5).run(must_not_run).await.unwrap(), OnceOutcome::Skipped { .. }));
    // A call that is dropped in the middle does not count and frees the lock.
    let running = tokio::spawn({
        let one = one.clone();
        async move { one.once("i").cooldown(MINUTE).run(async |_| std::future::pending::<Result<(), Error>>().await).await }
    });
    until("the body runs", async || two.is_locked("i").await.unwrap()).await;
    match two.once("i").cooldown(MINUTE).run(must_not_run).await.unwrap() {
        OnceOutcome::Skipped { last: None, is_running: true, .. } => {}
        other => panic!("{other:?}"),
    }
    running.abort();
    assert_eq!(
        two.once("i").cooldown(MINUTE).wait().run(async |_| Ok::<_, Error>(2)).await.unwrap(),
        OnceOutcome::Ran(2)
    );
}

pub async fn waiting_once_sees_finished_run<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    for succeeds in [true, false] {
        let (finish, finished) = tokio::sync::oneshot::channel::<()>();
        let running = tokio::spawn({
            let one = one.clone();
            let body = async move |_: &stanchion::OnceGuard| {
                finished.await.unwrap();
                if succeeds { Ok(1) } else { Err(Error::new(ErrorKind::Internal, "error of the body")) }
            };
            async move { one.once("k").run(body).await }
        });
        until("the body runs", async || two.is_locked("k").await.unwrap()).await;
        let waiting = tokio::spawn({
            let two = two.clone();
            async move { two.once("k").wait().run(async |_| Ok::<_, Error>(2)).await }
        });
        until("the call waits", async || one.inspect("k").await.unwrap().waiters.len() == 1).await;
        finish.send(()).unwrap();
        assert_eq!(running.await.unwrap().is_ok(), succeeds);
        match waiting.await.unwrap().unwrap() {
            OnceOutcome::DoneElsewhere { last, .. } => assert!(succeeds && last.succeeded),
            OnceOutcome::Ran(2) => assert!(!succeeds),
            other => panic!("{other:?}"),
        }
    }
}

pub async fn slot_runs_once_despite_clock_skew<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    assert_eq!(one.once("k").slot(100).run(async |_| Ok::<_, Error>(1)).await.unwrap(), OnceOutcome::Ran(1));
    env.advance(Duration::from_millis(300)).await;
    for late in [100, 99, 0] {
        let outcome = two.once("k").slot(late).run(must_not_run).await.unwrap();
        assert!(matches!(outcome, OnceOutcome::Skipped { last: Some(last), .. } if last.slot == Some(100)));
    }
    assert_eq!(two.once("k").slot(101).run(async |_| Ok::<_, Error>(2)).await.unwrap(), OnceOutcome::Ran(2));
    // With `every`, the key stays closed for nine tenths of the period, counted from the start of the last run.
    let period = Duration::from_millis(1_000);
    assert_eq!(one.once("p").every(period).run(async |_| Ok::<_, Error>(1)).await.unwrap(), OnceOutcome::Ran(1));
    let skipped = two.once("p").every(period).run(must_not_run).await.unwrap();
    assert!(matches!(skipped, OnceOutcome::Skipped { opens_in: Some(left), .. } if left <= period / 10 * 9));
    env.advance(period / 10 * 9 + Duration::from_millis(5)).await;
    assert_eq!(two.once("p").every(period).run(async |_| Ok::<_, Error>(2)).await.unwrap(), OnceOutcome::Ran(2));
}

pub async fn last_run_is_recorded<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().owner("the worker").open().await.unwrap(), env.locks().open().await.unwrap());
    assert_eq!(two.last_run("k").await.unwrap(), None);
    for round in 0..3 {
        let mut fence = None;
        let body = async |guard: &stanchion::OnceGuard| {
            fence = Some(guard.fence());
            env.advance(Duration::from_millis(30)).await;
            Ok::<_, Error>(())
        };
        one.once("k").slot(round).run(body).await.unwrap();
        env.advance(Duration::from_millis(40)).await;
        let last = two.last_run("k").await.unwrap().unwrap();
        assert_eq!((last.slot, last.owner.as_str(), Some(last.fence)), (Some(round), "the worker", fence));
        assert!(last.succeeded && last.age >= Duration::from_millis(39) && last.age < MINUTE);
        assert!(last.took >= Duration::from_millis(29) && last.took < MINUTE, "{last:?}");
    }
    assert!(two.list("").await.unwrap().is_empty(), "internal records are not listed");
    assert_eq!(two.last_run("another").await.unwrap(), None);
}

pub async fn run_of_longest_key_is_recorded<S: Store>(env: &Environment<S>) {
    // A store that cannot keep these bytes as they are escapes each with three bytes.
    let (namespace, key) = ("/".repeat(stanchion::MAX_NAMESPACE_BYTES), "\u{1}%".repeat(stanchion::MAX_KEY_BYTES / 2));
    let locks = env.locks().namespace(&namespace).open().await.unwrap();
    assert_eq!(locks.once(&key).slot(1).run(async |_| Ok::<_, Error>(1)).await.unwrap(), OnceOutcome::Ran(1));
    assert_eq!(locks.last_run(&key).await.unwrap().unwrap().slot, Some(1));
    assert!(matches!(locks.once(&key).slot(1).run(must_not_run).await.unwrap(), OnceOutcome::Skipped { .. }));
    let other = env.locks().namespace(&"/".repeat(stanchion::MAX_NAMESPACE_BYTES - 1)).open().await.unwrap();
    assert_eq!(other.last_run(&key).await.unwrap(), None);
}

pub async fn runs_are_listed_by_prefix<S: Store>(env: &Environment<S>) {
    let open = async |namespace: &str| env.locks().namespace(namespace).owner("the worker").open().await.unwrap();
    let (locks, other) = (open("tenant").await, open("tenant/1").await);
    assert!(locks.list_runs("").await.unwrap().runs.is_empty());
    let run = async |locks: &stanchion::Locks, key: &str, slot| {
        locks.once(key).slot(slot).run(async |_| Ok::<_, Error>(())).await.unwrap();
    };
    for (key, slots) in [("report:b", &[1, 2][..]), ("report:a", &[7]), ("mail%_*", &[3])] {
        for slot in slots {
            run(&locks, key, *slot).await;
        }
    }
    run(&other, "report:z", 9).await;
    let held = other.lock("report:held").await.unwrap();
    let listed = async |locks: &stanchion::Locks, prefix: &str| -> Vec<_> {
        let listing = locks.list_runs(prefix).await.unwrap();
        assert!(listing.damaged.is_empty());
        let runs = listing.runs.into_iter();
        runs.map(|(key, run)| (key.namespace().to_owned(), key.name().to_owned(), run.slot, run.owner)).collect()
    };
    let row =
        |namespace: &str, key: &str, slot| (namespace.to_owned(), key.to_owned(), Some(slot), "the worker".to_owned());
    let reports = [row("tenant", "report:a", 7), row("tenant", "report:b", 2)];
    assert_eq!(listed(&locks, "report:").await, reports);
    assert_eq!(listed(&locks, "").await, [&[row("tenant", "mail%_*", 3)][..], &reports].concat());
    assert_eq!(listed(&locks, "mail%_*").await.len(), 1);
    assert_eq!(listed(&other, "").await, [row("tenant/1", "report:z", 9)]);
    drop(held);
}

pub async fn forgotten_run_runs_again<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let run = async || one.once("k").slot(1).cooldown(MINUTE).run(async |_| Ok::<_, Error>(1)).await.unwrap();
    assert!(!two.forget_run("k").await.unwrap());
    assert_eq!(run().await, OnceOutcome::Ran(1));
    one.once("other").slot(1).run(async |_| Ok::<_, Error>(())).await.unwrap();
    assert!(matches!(run().await, OnceOutcome::Skipped { .. }));
    assert!(two.forget_run("k").await.unwrap());
    assert_eq!(two.last_run("k").await.unwrap(), None);
    assert!(two.last_run("other").await.unwrap().is_some());
    assert!(!two.forget_run("k").await.unwrap());
    assert_eq!(run().await, OnceOutcome::Ran(1));
}

pub async fn forced_run_ignores_the_record<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let closing = || one.once("c").cooldown(MINUTE);
    assert_eq!(closing().run(async |_| Ok::<_, Error>(1)).await.unwrap(), OnceOutcome::Ran(1));
    assert!(matches!(closing().run(must_not_run).await.unwrap(), OnceOutcome::Skipped { .. }));
    assert_eq!(closing().force().run(async |_| Ok::<_, Error>(2)).await.unwrap(), OnceOutcome::Ran(2));
    let slot = |slot| two.once("k").slot(slot);
    for (number, request) in [(5, slot(5)), (4, slot(4).force())] {
        assert_eq!(request.run(async |_| Ok::<_, Error>(number)).await.unwrap(), OnceOutcome::Ran(number));
    }
    assert_eq!(one.last_run("k").await.unwrap().unwrap().slot, Some(4));
    let skipped = slot(5).run(must_not_run).await.unwrap();
    assert!(matches!(skipped, OnceOutcome::Skipped { .. }), "the earlier run still counts for its slot");
    // Two callers never run it at the same time, forced or not.
    let OnceOutcome::Ran(guard) = slot(6).force().begin().await.unwrap() else { panic!("forced, and skipped") };
    let beside = one.once("k").slot(7).force().run(must_not_run).await.unwrap();
    assert!(matches!(beside, OnceOutcome::Skipped { is_running: true, .. }));
    guard.finish(true).await.unwrap();
}

pub async fn next_candidate_leads_after_resign<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().owner("one").open().await.unwrap(), env.locks().owner("two").open().await.unwrap());
    let mut observed = two.elect("office").observe();
    assert_eq!(observed.next().await.unwrap(), None);
    let first = one.elect("office").metadata("address of one").campaign().await.unwrap();
    assert!(two.elect("office").try_campaign().await.unwrap().is_none());
    let next = tokio::spawn({
        let election = two.elect("office");
        async move { election.campaign().await }
    });
    until("the second candidate is queued", async || one.inspect("office").await.unwrap().waiters.len() == 1).await;
    let leader = two.elect("office").leader().await.unwrap().unwrap();
    assert_eq!((leader.term, leader.owner.as_str()), (first.term(), "one"));
    assert_eq!(leader.metadata.as_deref(), Some("address of one"));
    let term = first.term();
    assert_eq!(first.resign().await.unwrap(), Released::Now);
    let second = next.await.unwrap().unwrap();
    assert!(second.term() > term && second.is_leader());
    // A force-released leader learns that it has lost.
    one.force_release("office", second.term(), "for a test").await.unwrap();
    // The poll that confirms its grant may find the loss first, and then the cause is `Missing`.
    assert!(matches!(second.lost().await, LossCause::ForceReleased | LossCause::Missing));
    assert!(!second.is_leader() && second.check().is_err());
    // `lead` campaigns again after a loss, until the body returns.
    let terms = AtomicI64::new(0);
    let led = two.elect("office").lead(async |leadership| {
        if terms.fetch_add(1, Ordering::SeqCst) == 0 {
            one.force_release("office", leadership.term(), "for a test").await.unwrap();
            std::future::pending::<()>().await;
        }
        leadership.term()
    });
    let last = led.await.unwrap();
    assert!(last > second.term() && terms.into_inner() == 2);
    until("the leader has resigned", async || two.elect("office").leader().await.unwrap().is_none()).await;
}

pub async fn status_reports_fate_of_a_hold<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().owner("one").open().await.unwrap(), env.locks().owner("two").open().await.unwrap());
    let token = one.lock("k").await.unwrap().detach();
    assert_eq!(two.status(&token).await.unwrap(), OwnerStatus::Running);
    assert_eq!(two.status_of_owner("k", "one").await.unwrap(), OwnerStatus::Running);
    assert!(matches!(two.status_of_owner("k", "two").await.unwrap(), OwnerStatus::SomeoneElse { .. }));
    let waiting = tokio::spawn(two.lock("k").into_future());
    until("the call waits", async || one.inspect("k").await.unwrap().waiters.len() == 1).await;
    assert_eq!(one.status_of_owner("k", "two").await.unwrap(), OwnerStatus::Waiting);
    waiting.abort();
    until("it has given up", async || one.inspect("k").await.unwrap().waiters.is_empty()).await;
    one.adopt(token.clone()).await.unwrap().release().await.unwrap();
    assert_eq!(two.status(&token).await.unwrap(), OwnerStatus::Nobody);
    assert_eq!(two.status_of_owner("k", "one").await.unwrap(), OwnerStatus::Nobody);
    let guard = two.lock("k").await.unwrap();
    match two.status(&token).await.unwrap() {
        OwnerStatus::SomeoneElse { holders, .. } => assert_eq!(holders[0].fence, guard.fence()),
        other => panic!("{other:?}"),
    }
    guard.release().await.unwrap();
    let (bound, fixed) = (one.lock("k").await.unwrap().detach(), one.lock("j").ttl(MINUTE).await.unwrap().detach());
    one.close().await.unwrap();
    assert_eq!(two.status(&bound).await.unwrap(), OwnerStatus::Dead);
    assert_eq!(two.status(&fixed).await.unwrap(), OwnerStatus::Dead, "the ttl runs on although the owner is dead");
    assert!(two.is_locked("j").await.unwrap());
}

pub async fn long_job_stops_on_loss_and_drain<S: Store>(env: &Environment<S>) {
    let (locks, operator) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let guard = locks.lock("k").heartbeat_within(MINUTE).await.unwrap();
    for _ in 0..10_000 {
        guard.heartbeat().unwrap();
    }
    guard.verify().await.unwrap();
    operator.force_release("k", guard.fence(), "for a test").await.unwrap();
    // The guard learns of the loss from a push or from its own query.
    assert!(matches!(guard.verify().await.unwrap_err().kind(), ErrorKind::Lost(_)));
    assert!(guard.heartbeat().is_err());
    // `sleep` ends early when the hold is lost or the handle drains.
    for ends in ["lost", "draining"] {
        let guard = locks.lock("k").await.unwrap();
        let fence = guard.fence();
        let sleeping = tokio::spawn(async move { (guard.sleep(MINUTE * 60).await.unwrap_err().kind(), guard) });
        if ends == "lost" {
            operator.force_release("k", fence, "for a test").await.unwrap();
            assert!(matches!(sleeping.await.unwrap().0, ErrorKind::Lost(_)));
        } else {
            locks.drain("for a test");
            let (kind, guard) = sleeping.await.unwrap();
            assert_eq!((kind, guard.is_held()), (ErrorKind::Draining, true));
            assert_eq!(guard.release().await.unwrap(), Released::Now);
        }
    }
}
