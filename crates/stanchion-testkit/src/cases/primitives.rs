//! What is made of locks: readers and writers, permits, several keys, one run for all, leaders.

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

pub async fn readers_share_and_a_writer_is_alone<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let readers = [one.read("k").await.unwrap(), two.read("k").await.unwrap()];
    assert!(one.write("k").try_acquire().await.unwrap().is_none());
    for reader in readers {
        reader.release().await.unwrap();
    }
    let writer = two.write("k").await.unwrap();
    assert!(one.read("k").try_acquire().await.unwrap().is_none());
    assert!(one.write("k").try_acquire().await.unwrap().is_none());
    assert!(one.lock("k").try_acquire().await.unwrap().is_none(), "a lock is a writer");
    writer.release().await.unwrap();
}

pub async fn permits_are_given_up_to_the_limit<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let both = one.semaphore("k", 3).permits(2).await.unwrap();
    let third = two.semaphore("k", 3).await.unwrap();
    assert!(one.semaphore("k", 3).try_acquire().await.unwrap().is_none());
    assert!(one.semaphore("k", 4).try_acquire().await.unwrap().is_none(), "the smaller limit holds");
    drop(both);
    until("both permits are back", async || two.semaphore("k", 3).permits(2).try_acquire().await.unwrap().is_some())
        .await;
    for (limit, permits) in [(0, 1), (3, 0), (3, 4), (u32::MAX, 1)] {
        let error = one.semaphore("k", limit).permits(permits).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{limit} {permits}");
    }
    third.release().await.unwrap();
}

pub async fn differing_limits_are_told_and_refuse_nobody<S: Store>(env: &Environment<S>) {
    let (old, new) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let held = old.semaphore("k", 3).permits(2).await.unwrap();
    let mut events = new.events();
    let told = async |events: &mut EventStream| {
        let mut next = async || loop {
            if let Event::LimitsDiffer { key, in_use, asked, .. } = events.next().await.expect("a handle that lives") {
                return (key.name().to_owned(), in_use, asked);
            }
        };
        tokio::time::timeout(GENEROUS, next()).await.expect("the limits differ")
    };
    assert!(new.semaphore("k", 5).permits(4).try_acquire().await.unwrap().is_none());
    assert_eq!(told(&mut events).await, ("k".into(), 3, 5));
    let waiting = tokio::spawn({
        let new = new.clone();
        async move { new.semaphore("k", 5).permits(4).await }
    });
    assert_eq!(told(&mut events).await, ("k".into(), 3, 5));
    held.release().await.unwrap();
    let guard = tokio::time::timeout(GENEROUS, waiting).await.expect("it is served").unwrap().unwrap();
    // An exclusive request takes the whole key: no limit concerns it.
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
                assert!(!matches!(event, Some(Event::LimitsDiffer { .. }) | None), "nothing more to tell: {event:?}")
            }
        }
    }
}

pub async fn several_keys_are_taken_all_or_nothing<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let guards = one.lock_all(["c", "a", "b", "a"]).await.unwrap();
    assert_eq!(guards.iter().map(|guard| guard.key().name()).collect::<Vec<_>>(), ["a", "b", "c"]);
    for name in ["a", "b", "c"] {
        assert_eq!(guards.fence(name), Some(two.inspect(name).await.unwrap().holders[0].fence));
    }
    assert!(guards.fence("d").is_none() && guards.is_held());
    assert!(two.lock_all(["0", "b"]).try_acquire().await.unwrap().is_none());
    until("nothing of it stays", async || !two.is_locked("0").await.unwrap()).await;
    assert_eq!(guards.release().await.unwrap(), Released::Now);
    assert!(two.list("").await.unwrap().is_empty());
    // Readers of one key, alone on another.
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
    until("nothing is left", async || two.list("").await.unwrap().is_empty()).await;
}

pub async fn a_wait_for_several_keys_has_one_limit_and_keeps_nothing<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let mut limits = [2, 8, 32].map(Duration::from_secs).into_iter();
    // Real time goes on while a slow machine looks: it looks again with more of it.
    let error = loop {
        let limit = limits.next().expect("one limit for all keys");
        if let Some(error) = ended_by_one_limit(env, &one, &two, limit).await {
            assert!(error.to_string().contains(&format!("{limit:?}")), "{error}");
            break error;
        }
    };
    assert_eq!((error.kind(), error.key().map(|key| key.name().to_owned())), (ErrorKind::Timeout, Some("b".into())));
    until("nothing of it stays", async || one.list("").await.unwrap().is_empty()).await;
    // A key that is lost while another is waited for ends the call.
    let held = one.lock("b").await.unwrap();
    let waiting = tokio::spawn(two.lock_all(["a", "b"]).into_future());
    until("it waits", async || one.inspect("b").await.unwrap().waiters.len() == 1).await;
    let fence = one.inspect("a").await.unwrap().holders[0].fence;
    one.force_release("a", fence, "for a test").await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap_err().kind(), ErrorKind::Lost(LossCause::ForceReleased));
    held.release().await.unwrap();
    until("nothing is left", async || one.list("").await.unwrap().is_empty()).await;
}

/// The end of a wait for two keys, the first of which takes three quarters of the limit. Nothing if it was not seen to wait
/// for both, or did not end soon after the limit: it would not have to, were there a limit for each key.
async fn ended_by_one_limit<S: Store>(
    env: &Environment<S>,
    one: &Locks,
    two: &Locks,
    limit: Duration,
) -> Option<Error> {
    let (first, held) = (one.lock("a").await.unwrap(), one.lock("b").await.unwrap());
    let mut waiting = tokio::spawn(two.lock_all(["a", "b", "c"]).wait(limit).into_future());
    let waits = async |key| one.inspect(key).await.unwrap().waiters.len() == 1;
    until("it waits, or has given up", async || waits("a").await || waiting.is_finished()).await;
    env.pass(limit * 3 / 4).await;
    first.release().await.unwrap();
    until("it waits for the next, or has given up", async || waits("b").await || waiting.is_finished()).await;
    if !one.is_locked("a").await.unwrap() || one.is_locked("c").await.unwrap() {
        until("it has given up", async || waiting.is_finished()).await;
    }
    let was_late = waiting.is_finished();
    env.pass(limit / 4 + Duration::from_millis(10)).await;
    let ended = tokio::time::timeout(limit * 3 / 5, &mut waiting).await;
    waiting.abort();
    until("nothing of it stays", async || !one.is_locked("a").await.unwrap()).await;
    until("it waits for nothing", async || one.inspect("b").await.unwrap().waiters.is_empty()).await;
    held.release().await.unwrap();
    let error = ended.ok()?.unwrap().unwrap_err();
    (!was_late).then_some(error)
}

/// How long the two cases of a crowd last: `STANCHION_CROWD_SECONDS`, or a moment.
fn crowd_lasts() -> Duration {
    match std::env::var("STANCHION_CROWD_SECONDS") {
        Ok(seconds) => Duration::from_secs(seconds.parse().expect("STANCHION_CROWD_SECONDS is a number")),
        Err(_) => Duration::from_millis(700),
    }
}

pub async fn a_crowd_over_sets_of_keys_neither_dead_locks_nor_leaves_anything<S: Store>(env: &Environment<S>) {
    const KEYS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
    let seed = seed("a_crowd_over_sets_of_keys");
    let handles =
        [env.locks().open().await.unwrap(), env.locks().open().await.unwrap(), env.locks().open().await.unwrap()];
    // Per key: how many read it, or −1 where one has it alone.
    let inside: Arc<BTreeMap<&str, AtomicI64>> = Arc::new(KEYS.map(|key| (key, AtomicI64::new(0))).into());
    let until_then = Instant::now() + crowd_lasts();
    let tasks: Vec<_> = (0..50)
        .map(|task| {
            let (locks, inside) = (handles[task % 3].clone(), inside.clone());
            let mut random = Random::new(seed.wrapping_add(task as u64));
            tokio::spawn(async move {
                let mut rounds = 0;
                while Instant::now() < until_then || rounds == 0 {
                    let mut wanted = BTreeMap::new();
                    for _ in 0..=random.below(3) {
                        wanted.insert(KEYS[random.below(6) as usize], random.below(2) == 0);
                    }
                    let keys = wanted
                        .iter()
                        .map(|(key, reads)| if *reads { KeyRequest::read(*key) } else { KeyRequest::write(*key) });
                    let request = locks.lock_all(keys);
                    if random.below(8) == 0 {
                        // Given up somewhere on its way.
                        let patience = Duration::from_micros(random.below(5_000));
                        drop(tokio::time::timeout(patience, request.into_future()).await);
                        continue;
                    }
                    let guards = request.await.unwrap();
                    for (key, reads) in &wanted {
                        let before = if *reads {
                            inside[key].fetch_add(1, Ordering::SeqCst)
                        } else {
                            inside[key].fetch_sub(1, Ordering::SeqCst)
                        };
                        assert!(if *reads { before >= 0 } else { before == 0 }, "{key}: {before} inside");
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
    println!("{rounds} sets of keys");
    assert!(rounds >= 50, "{rounds}");
    until("nothing is left", async || handles[0].list("").await.unwrap().is_empty()).await;
}

pub async fn a_crowd_of_readers_does_not_keep_a_writer_waiting<S: Store>(env: &Environment<S>) {
    let until_then = Instant::now() + crowd_lasts();
    let (readers, writers) = (Arc::new(AtomicI64::new(0)), Arc::new(AtomicI64::new(0)));
    // Those writers that have not had to wait yet: the crowd stays for them, in a slow store too.
    let unsatisfied = Arc::new(AtomicI64::new(4));
    // When each reader asked, and its fence.
    let read = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = Vec::new();
    let handles = [env.locks().open().await.unwrap(), env.locks().open().await.unwrap()];
    for reader in 0..32 {
        let (locks, readers, writers, read) =
            (handles[reader % 2].clone(), readers.clone(), writers.clone(), read.clone());
        let unsatisfied = unsatisfied.clone();
        tasks.push(tokio::spawn(async move {
            while Instant::now() < until_then || unsatisfied.load(Ordering::SeqCst) > 0 {
                let asked = Instant::now();
                let guard = locks.read("k").await.unwrap();
                assert!(readers.fetch_add(1, Ordering::SeqCst) < 32 && writers.load(Ordering::SeqCst) == 0);
                read.lock().unwrap().push((asked, guard.fence()));
                tokio::task::yield_now().await;
                readers.fetch_sub(1, Ordering::SeqCst);
                guard.release().await.unwrap();
            }
            Vec::new()
        }));
    }
    for _ in 0..4 {
        let locks = env.locks().open().await.unwrap();
        let (readers, writers, unsatisfied) = (readers.clone(), writers.clone(), unsatisfied.clone());
        tasks.push(tokio::spawn(async move {
            let mut events = locks.events();
            let mut written: Vec<(Instant, Fence)> = Vec::new();
            while Instant::now() < until_then || written.is_empty() {
                let asking = tokio::spawn(locks.write("k").into_future());
                // From when it is known to stand in line.
                let mut in_line = None;
                let guard = loop {
                    match events.next().await.unwrap() {
                        Event::Contended { .. } => in_line = Some(Instant::now()),
                        Event::Acquired { .. } => break asking.await.unwrap().unwrap(),
                        _ => {}
                    }
                };
                assert!(writers.fetch_add(1, Ordering::SeqCst) == 0 && readers.load(Ordering::SeqCst) == 0);
                if let Some(at) = in_line {
                    if written.is_empty() {
                        unsatisfied.fetch_sub(1, Ordering::SeqCst);
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
    // Those who asked when the writer stood in line already come after it.
    read.sort_unstable();
    let mut lowest_from = vec![u64::MAX; read.len() + 1];
    for (at, (_, fence)) in read.iter().enumerate().rev() {
        lowest_from[at] = lowest_from[at + 1].min(fence.get());
    }
    for (in_line, fence) in written {
        let later = read.partition_point(|(asked, _)| *asked <= in_line);
        assert!(lowest_from[later] > fence.get(), "a reader that came later was let in before a writer");
    }
}

/// A body that must not run.
async fn must_not_run(_: &stanchion::OnceGuard) -> Result<i32, Error> {
    panic!("it was run")
}

pub async fn what_was_run_once_is_not_run_again_for_its_cooldown<S: Store>(env: &Environment<S>) {
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
    // Who waits need not: it is done.
    let done = two.once("k").cooldown(pause).wait().run(must_not_run).await.unwrap();
    assert!(matches!(done, OnceOutcome::DoneElsewhere { .. }));
    // It is a matter of those who run it once; the key itself is free.
    two.lock("k").await.unwrap().release().await.unwrap();
    env.pass(pause + Duration::from_millis(10)).await;
    // The body decides how long this time.
    let body = async |turn: &stanchion::OnceGuard| -> Result<_, Error> {
        assert!(turn.last().is_some_and(|last| last.succeeded));
        turn.set_cooldown(None)?;
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
    until("the former records are gone", async || records().await == 1).await;
}

pub async fn a_period_counts_from_the_beginning_and_leaves_a_tenth<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let period = MINUTE * 10;
    let body = async |_: &stanchion::OnceGuard| {
        env.pass(Duration::from_millis(20)).await;
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

pub async fn a_run_that_fails_does_not_count_unless_it_is_to<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let fails = async |_: &stanchion::OnceGuard| Err::<i32, _>(Error::new(ErrorKind::Internal, "of the body"));
    let error = one.once("k").cooldown(MINUTE).run(fails).await.unwrap_err();
    assert_eq!(error.to_string(), "of the body", "as it is");
    let last = two.last_run("k").await.unwrap().unwrap();
    assert!(!last.succeeded && last.closed_still_for().is_none());
    assert_eq!(
        two.once("k").cooldown(MINUTE).slot(1).run(async |_| Ok::<_, Error>(1)).await.unwrap(),
        OnceOutcome::Ran(1)
    );
    let error = one.once("j").slot(5).failures_count().run(fails).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Internal);
    assert!(matches!(two.once("j").slot(5).run(must_not_run).await.unwrap(), OnceOutcome::Skipped { .. }));
    // Given up in the middle: nothing counts, and the lock is free.
    let running = tokio::spawn({
        let one = one.clone();
        async move { one.once("i").cooldown(MINUTE).run(async |_| std::future::pending::<Result<(), Error>>().await).await }
    });
    until("it runs", async || two.is_locked("i").await.unwrap()).await;
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

pub async fn who_waits_for_a_run_finds_it_done<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    for succeeds in [true, false] {
        let (finish, finished) = tokio::sync::oneshot::channel::<()>();
        let running = tokio::spawn({
            let one = one.clone();
            let body = async move |_: &stanchion::OnceGuard| {
                finished.await.unwrap();
                if succeeds { Ok(1) } else { Err(Error::new(ErrorKind::Internal, "of the body")) }
            };
            async move { one.once("k").run(body).await }
        });
        until("it runs", async || two.is_locked("k").await.unwrap()).await;
        let waiting = tokio::spawn({
            let two = two.clone();
            async move { two.once("k").wait().run(async |_| Ok::<_, Error>(2)).await }
        });
        until("it waits", async || one.inspect("k").await.unwrap().waiters.len() == 1).await;
        finish.send(()).unwrap();
        assert_eq!(running.await.unwrap().is_ok(), succeeds);
        match waiting.await.unwrap().unwrap() {
            OnceOutcome::DoneElsewhere { last, .. } => assert!(succeeds && last.succeeded),
            OnceOutcome::Ran(2) => assert!(!succeeds),
            other => panic!("{other:?}"),
        }
    }
}

pub async fn a_slot_is_run_once_however_clocks_differ<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    assert_eq!(one.once("k").slot(100).run(async |_| Ok::<_, Error>(1)).await.unwrap(), OnceOutcome::Ran(1));
    env.pass(Duration::from_millis(300)).await;
    for late in [100, 99, 0] {
        let outcome = two.once("k").slot(late).run(must_not_run).await.unwrap();
        assert!(matches!(outcome, OnceOutcome::Skipped { last: Some(last), .. } if last.slot == Some(100)));
    }
    assert_eq!(two.once("k").slot(101).run(async |_| Ok::<_, Error>(2)).await.unwrap(), OnceOutcome::Ran(2));
    // By its period: nine tenths of it from the beginning of the last run.
    let period = Duration::from_millis(1_000);
    assert_eq!(one.once("p").every(period).run(async |_| Ok::<_, Error>(1)).await.unwrap(), OnceOutcome::Ran(1));
    let skipped = two.once("p").every(period).run(must_not_run).await.unwrap();
    assert!(matches!(skipped, OnceOutcome::Skipped { opens_in: Some(left), .. } if left <= period / 10 * 9));
    env.pass(period / 10 * 9 + Duration::from_millis(5)).await;
    assert_eq!(two.once("p").every(period).run(async |_| Ok::<_, Error>(2)).await.unwrap(), OnceOutcome::Ran(2));
}

pub async fn the_last_run_is_known<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().owner("the worker").open().await.unwrap(), env.locks().open().await.unwrap());
    assert_eq!(two.last_run("k").await.unwrap(), None);
    for round in 0..3 {
        let mut fence = None;
        let body = async |turn: &stanchion::OnceGuard| {
            fence = Some(turn.fence());
            env.pass(Duration::from_millis(30)).await;
            Ok::<_, Error>(())
        };
        one.once("k").slot(round).run(body).await.unwrap();
        env.pass(Duration::from_millis(40)).await;
        let last = two.last_run("k").await.unwrap().unwrap();
        assert_eq!((last.slot, last.owner.as_str(), Some(last.fence)), (Some(round), "the worker", fence));
        assert!(last.succeeded && last.age >= Duration::from_millis(39) && last.age < MINUTE);
        assert!(last.took >= Duration::from_millis(29) && last.took < MINUTE, "{last:?}");
    }
    assert!(two.list("").await.unwrap().is_empty(), "what the library keeps for itself is not listed");
    assert_eq!(two.last_run("another").await.unwrap(), None);
}

pub async fn a_run_of_the_longest_name_is_recorded<S: Store>(env: &Environment<S>) {
    // Each byte of it is written as three where a store cannot have it as it is.
    let (namespace, key) = ("/".repeat(stanchion::MAX_NAMESPACE_BYTES), "\u{1}%".repeat(stanchion::MAX_KEY_BYTES / 2));
    let locks = env.locks().namespace(&namespace).open().await.unwrap();
    assert_eq!(locks.once(&key).slot(1).run(async |_| Ok::<_, Error>(1)).await.unwrap(), OnceOutcome::Ran(1));
    assert_eq!(locks.last_run(&key).await.unwrap().unwrap().slot, Some(1));
    assert!(matches!(locks.once(&key).slot(1).run(must_not_run).await.unwrap(), OnceOutcome::Skipped { .. }));
    let other = env.locks().namespace(&"/".repeat(stanchion::MAX_NAMESPACE_BYTES - 1)).open().await.unwrap();
    assert_eq!(other.last_run(&key).await.unwrap(), None);
}

pub async fn a_leader_resigns_and_the_next_in_line_leads<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().owner("one").open().await.unwrap(), env.locks().owner("two").open().await.unwrap());
    let mut observed = two.elect("office").observe();
    assert_eq!(observed.next().await.unwrap(), None);
    let first = one.elect("office").metadata("address of one").campaign().await.unwrap();
    assert!(two.elect("office").try_campaign().await.unwrap().is_none());
    let next = tokio::spawn({
        let election = two.elect("office");
        async move { election.campaign().await }
    });
    until("it stands in line", async || one.inspect("office").await.unwrap().waiters.len() == 1).await;
    let leader = two.elect("office").leader().await.unwrap().unwrap();
    assert_eq!((leader.term, leader.owner.as_str()), (first.term(), "one"));
    assert_eq!(leader.metadata.as_deref(), Some("address of one"));
    let term = first.term();
    assert_eq!(first.resign().await.unwrap(), Released::Now);
    let second = next.await.unwrap().unwrap();
    assert!(second.term() > term && second.is_leader());
    // A leader that is deposed knows it.
    one.force_release("office", second.term(), "for a test").await.unwrap();
    // The poll that confirms its grant may find out first.
    assert!(matches!(second.lost().await, LossCause::ForceReleased | LossCause::Missing));
    assert!(!second.is_leader() && second.check().is_err());
    // It leads anew until its work is done.
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
    until("it has resigned", async || two.elect("office").leader().await.unwrap().is_none()).await;
}

pub async fn what_became_of_a_hold_is_told<S: Store>(env: &Environment<S>) {
    let (one, two) = (env.locks().owner("one").open().await.unwrap(), env.locks().owner("two").open().await.unwrap());
    let token = one.lock("k").await.unwrap().detach();
    assert_eq!(two.status(&token).await.unwrap(), OwnerStatus::Running);
    assert_eq!(two.status_of_owner("k", "one").await.unwrap(), OwnerStatus::Running);
    assert!(matches!(two.status_of_owner("k", "two").await.unwrap(), OwnerStatus::SomeoneElse { .. }));
    let waiting = tokio::spawn(two.lock("k").into_future());
    until("it waits", async || one.inspect("k").await.unwrap().waiters.len() == 1).await;
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
    assert_eq!(two.status(&fixed).await.unwrap(), OwnerStatus::Dead, "its term runs on, with nobody behind it");
    assert!(two.is_locked("j").await.unwrap());
}

pub async fn a_long_job_gives_signs_of_life_and_hears_when_to_stop<S: Store>(env: &Environment<S>) {
    let (locks, operator) = (env.locks().open().await.unwrap(), env.locks().open().await.unwrap());
    let guard = locks.lock("k").heartbeat_within(MINUTE).await.unwrap();
    for _ in 0..10_000 {
        guard.heartbeat().unwrap();
    }
    guard.verify().await.unwrap();
    operator.force_release("k", guard.fence(), "for a test").await.unwrap();
    // By what it was told, or by what it found.
    assert!(matches!(guard.verify().await.unwrap_err().kind(), ErrorKind::Lost(_)));
    assert!(guard.heartbeat().is_err());
    // Sleeping it hears that it is lost, and that the process is to end.
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
