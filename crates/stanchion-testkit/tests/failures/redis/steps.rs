//! Tests many concurrent callers, in order or in batches, and that expired sessions and closed handles leave nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use stanchion::store::{AcquireOutcome, AcquireRequest, EndOutcome, PollOutcome, Redis, StoreTime};
use stanchion::{ErrorKind, Locks, Store};
use stanchion_testkit::servers::{Redis as Kind, RedisServer};
use stanchion_testkit::{block_on, until};

use super::{SECOND, is_free, key, locks, store, url};

/// Waiters of four processes want one key: 10,000 grants, and nobody overtakes.
#[test]
fn ten_thousand_grants_keep_request_order() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let mut actors = Vec::new();
        for _ in 0..4 {
            actors.push(environment.client().await);
        }
        let mut queue = std::collections::VecDeque::new();
        for turn in 0..64 {
            let actor = &actors[turn % 4];
            let request = actor.request(&key("k"));
            actor.acquire(&request).await;
            queue.push_back((turn % 4, request.token));
        }
        let mut last = None;
        for turn in 0..10_000 {
            let (actor, token) = queue.pop_front().unwrap();
            let granted = actors[actor]
                .current_grant(&key("k"), token)
                .await
                .unwrap_or_else(|| panic!("grant {turn} overtook a waiter"));
            assert!(Some(granted.fence) > last);
            last = Some(granted.fence);
            assert_eq!(actors[actor].release(&key("k"), token).await, EndOutcome::Released);
            let next = (turn * 7) % 4;
            queue.push_back((next, actors[next].enqueue(&key("k")).await));
        }
    });
}

/// A session that expires while its request is in flight gets no valid grant, and leaves no hold.
#[test]
fn grant_to_an_expired_session_is_reaped() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let (holder, next) = (environment.client().await, environment.client().await);
        let dying = environment.client_with_ttl(SECOND).await;
        let (held, _) = holder.lock(&key("k")).await;
        dying.enqueue(&key("k")).await;
        let waiting = next.enqueue(&key("k")).await;
        // By the server's clock the session has expired then.
        tokio::time::sleep(SECOND + SECOND / 4).await;
        // The hand-off goes to the expired session, because no script sees sessions.
        assert_eq!(holder.release(&key("k"), held).await, EndOutcome::Released);
        assert!(next.current_grant(&key("k"), waiting).await.is_some(), "the next request reaps the expired session");
        let state = next.inspect(&key("k")).await;
        assert_eq!((state.holders.len(), state.waiters.len()), (1, 0));
    });
}

/// Calls of many tasks share requests, also those for the same key: still only one task holds a key at a time.
#[test]
fn batched_calls_exclude_each_other() {
    const TASKS: usize = 64;
    const TURNS: usize = 150;
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let locks = locks(server.port()).await;
        let keys: Arc<Vec<_>> = Arc::new((0..TASKS / 2).map(|_| (AtomicBool::new(false), AtomicU64::new(0))).collect());
        let tasks: Vec<_> = (0..TASKS)
            .map(|task| {
                let (locks, keys) = (locks.clone(), keys.clone());
                tokio::spawn(async move {
                    let mut obtained = 0;
                    for turn in 0..TURNS {
                        let at = (task + turn * 5) % keys.len();
                        // Attempts and waits, mixed.
                        let guard = match turn % 3 {
                            0 => locks.try_lock(format!("k{at}")).await.unwrap(),
                            _ => Some(locks.lock(format!("k{at}")).await.unwrap()),
                        };
                        let Some(guard) = guard else { continue };
                        let (inside, last) = &keys[at];
                        assert!(!inside.swap(true, Ordering::SeqCst), "two tasks hold the key");
                        assert!(
                            last.swap(guard.fence().get(), Ordering::SeqCst) < guard.fence().get(),
                            "fences must rise"
                        );
                        tokio::task::yield_now().await;
                        inside.store(false, Ordering::SeqCst);
                        guard.release().await.unwrap();
                        obtained += 1;
                    }
                    obtained
                })
            })
            .collect();
        let mut obtained = 0;
        for task in tasks {
            obtained += task.await.unwrap();
        }
        assert!(obtained >= TASKS * TURNS * 2 / 3, "{obtained}");
        let stats = server.command(&["INFO", "commandstats"]);
        assert!(stats.contains("cmdstat_mget:"), "calls were batched");
        until("nothing is left", async || locks.list("").await.unwrap().is_empty()).await;
    });
}

/// Batched calls check tokens, deadlines and records as single calls do.
#[test]
fn batched_calls_change_only_their_own_keys() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let actor = Arc::new(environment.client().await);
        server.command(&["RPUSH", "stanchion:{:foreign}", "hello"]);
        let (token, _) = actor.lock(&key("k")).await;
        let (closed, _) = actor.lock(&key("closed")).await;
        actor.store.release(&key("closed"), closed, Some(60 * SECOND)).await.unwrap();
        let mut tasks = Vec::new();
        for turn in 0..60 {
            let actor = actor.clone();
            tasks.push(tokio::spawn(async move {
                let stranger = stanchion::TokenId::random().unwrap();
                let late = AcquireRequest { not_after: StoreTime::from_micros(1), ..actor.request(&key("late")) };
                let at_once = AcquireRequest { enqueue: false, ..actor.request(&key("k")) };
                let shut = AcquireRequest { enqueue: false, ..actor.request(&key("closed")) };
                let foreign = actor.request(&key("foreign"));
                match turn % 5 {
                    4 => assert!(actor.store.acquire(foreign).await.is_err(), "the record is foreign"),
                    0 => assert_eq!(actor.release(&key("k"), stranger).await, EndOutcome::Nothing),
                    1 => assert_eq!(actor.acquire(&late).await, AcquireOutcome::Stale),
                    2 => assert!(matches!(actor.acquire(&at_once).await, AcquireOutcome::Busy { .. })),
                    _ => assert!(matches!(actor.acquire(&shut).await, AcquireOutcome::Busy { check_in: Some(_), .. })),
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        assert!(actor.current_grant(&key("k"), token).await.is_some());
        assert_eq!(server.command(&["TYPE", "stanchion:{:foreign}"]), "list");
        assert!(server.command(&["INFO", "commandstats"]).contains("cmdstat_mget:"), "calls were batched");
    });
}

/// Closing a handle releases its holds, and takes its waiters out of the queues.
#[test]
fn a_closed_handle_leaves_nothing() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let locks = locks(server.port()).await;
        let guards: Vec<_> = {
            let mut guards = Vec::new();
            for turn in 0..500 {
                guards.push(locks.lock(format!("k{turn}")).await.unwrap());
            }
            guards
        };
        let waiting = tokio::spawn(locks.lock("k0").into_future());
        until("queued", async || locks.inspect("k0").await.unwrap().waiters.len() == 1).await;
        let start = Instant::now();
        locks.close().await.unwrap();
        assert!(waiting.await.unwrap().is_err());
        let other = super::locks(server.port()).await;
        assert_eq!(other.list("").await.unwrap().len(), 0, "after {:?}", start.elapsed());
        drop(guards);
        let (token, store) = (stanchion::TokenId::random().unwrap(), store(server.port()).open());
        assert_eq!(store.poll(&key("k0"), &[token]).await.unwrap().outcome[0], PollOutcome::Gone);
    });
}

/// Calls keep their order also when they are batched, and when some of them are skipped by their batch.
#[test]
fn calls_of_a_process_are_served_in_order() {
    const CALLS: usize = 200;
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let locks = locks(server.port()).await;
        locks.lock("k").await.unwrap().release().await.unwrap();
        // Other calls keep the batches full.
        let busy: Vec<_> = (0..24)
            .map(|task| {
                let locks = locks.clone();
                tokio::spawn(async move {
                    loop {
                        locks.lock(format!("busy {task}")).await.unwrap().release().await.unwrap();
                    }
                })
            })
            .collect();
        for round in 0..20 {
            let held = if round % 2 == 0 { Some(locks.lock("k").await.unwrap()) } else { None };
            let begun = Arc::new(AtomicU64::new(0));
            let mut calls = Vec::new();
            for call in 0..CALLS {
                let (locks, begun) = (locks.clone(), begun.clone());
                calls.push(tokio::spawn(async move {
                    let place = begun.fetch_add(1, Ordering::SeqCst);
                    let guard = match call % 7 {
                        // This call is never part of a batch.
                        6 => locks.lock("k").max_hold(600 * SECOND).await.unwrap(),
                        _ => locks.lock("k").await.unwrap(),
                    };
                    let fence = guard.fence();
                    guard.release().await.unwrap();
                    (fence, place)
                }));
                // Some calls begin later, when the first ones are in flight.
                if call % 50 == 49 {
                    tokio::task::yield_now().await;
                }
            }
            if let Some(held) = held {
                until("all calls wait", async || locks.inspect("k").await.unwrap().waiters.len() == CALLS).await;
                held.release().await.unwrap();
            }
            let mut served = Vec::new();
            for call in calls {
                served.push(call.await.unwrap());
            }
            served.sort_unstable();
            let places: Vec<_> = served.into_iter().map(|(_, place)| place).collect();
            assert_eq!(places, (0..CALLS as u64).collect::<Vec<_>>(), "round {round}");
        }
        busy.iter().for_each(tokio::task::JoinHandle::abort);
        assert!(server.command(&["INFO", "commandstats"]).contains("cmdstat_mget:"), "calls were batched");
    });
}

/// Callers that give up in the queue of their own process leave the places of the others.
#[test]
fn dropped_calls_keep_the_order_of_the_rest() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let actor = environment.client().await;
        actor.lock(&key("warm")).await;
        for round in 0..20 {
            let name = key(&format!("k{round}"));
            let requests: Vec<_> = (0..100).map(|_| actor.request(&name)).collect();
            let mut calls: Vec<_> =
                requests.iter().map(|request| Some(Box::pin(actor.store.acquire(request.clone())))).collect();
            for call in calls.iter_mut().flatten() {
                let begun = std::future::poll_fn(|context| std::task::Poll::Ready(call.as_mut().poll(context)));
                assert!(begun.await.is_pending());
            }
            // Some calls are sent alone, one is queued, and some are blocked behind it.
            for place in (0..100).filter(|place| place % 3 == 2) {
                calls[place] = None;
            }
            let mut kept = Vec::new();
            for (request, call) in requests.iter().zip(calls) {
                if let Some(call) = call {
                    call.await.unwrap();
                    kept.push(request.token);
                }
            }
            for request in &requests {
                if !kept.contains(&request.token) {
                    actor.store.abandon(&name, request.token).await.unwrap();
                }
            }
            for token in kept {
                assert!(actor.current_grant(&name, token).await.is_some(), "in request order");
                assert_eq!(actor.release(&name, token).await, EndOutcome::Released);
            }
        }
    });
}

#[test]
fn renewal_overtakes_queued_releases() {
    const RELEASES: usize = 100_000;
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let actor = Arc::new(environment.client().await);
        let ended = Arc::new(AtomicU64::new(0));
        let start = Instant::now();
        let releases: Vec<_> = (0..RELEASES)
            .map(|release| {
                let (actor, ended) = (actor.clone(), ended.clone());
                tokio::spawn(async move {
                    let token = stanchion::TokenId::random().unwrap();
                    let key = key(&format!("k{}", release % 1_000));
                    assert_eq!(actor.release(&key, token).await, EndOutcome::Nothing);
                    ended.fetch_add(1, Ordering::SeqCst);
                })
            })
            .collect();
        // Spawned last, this task begins when all others have begun.
        let renewal = tokio::spawn({
            let (actor, ended) = (actor.clone(), ended.clone());
            async move {
                let before = ended.load(Ordering::SeqCst);
                actor.store.renew_session(actor.session).await.unwrap();
                ended.load(Ordering::SeqCst) - before
            }
        });
        let before = renewal.await.unwrap();
        println!("renewed after {before} releases, {:?}", start.elapsed());
        assert!(before < RELEASES as u64 / 10, "renewed after {before} releases");
        for release in releases {
            release.await.unwrap();
        }
        println!("{RELEASES} releases in {:?}", start.elapsed());
    });
}

/// Closing releases many holds in one request, and hands on the keys that have waiters.
#[test]
fn closing_with_many_holds_takes_few_requests() {
    const HOLDS: usize = 50_000;
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let (locks, other) = (locks(server.port()).await, super::locks(server.port()).await);
        let mut guards = Vec::new();
        for some in 0..HOLDS / 1_000 {
            let calls = (0..1_000).map(|at| locks.lock(format!("k{}", some * 1_000 + at)).into_future());
            guards.extend(futures_util::future::try_join_all(calls).await.unwrap());
        }
        // The other process considers the session alive.
        assert!(other.try_lock("k7").await.unwrap().is_none());
        let waiting: Vec<_> =
            (0..50).map(|at| tokio::spawn(other.lock(format!("k{}", at * 999)).into_future())).collect();
        until("queued", async || other.inspect(format!("k{}", 49 * 999)).await.unwrap().waiters.len() == 1).await;
        let requests = || -> usize {
            let stats = server.command(&["INFO", "commandstats"]);
            let line = stats.lines().find_map(|line| line.strip_prefix("cmdstat_evalsha:calls=")).unwrap().to_owned();
            line.split(',').next().unwrap().parse().unwrap()
        };
        let (before, start) = (requests(), Instant::now());
        locks.close().await.unwrap();
        let (requests, took) = (requests() - before, start.elapsed());
        println!("closed {HOLDS} holds in {took:?}, {requests} requests");
        assert!(requests < HOLDS / 10, "{requests} requests");
        for at in [1, 7, 20_001, HOLDS - 1] {
            assert!(other.try_lock(format!("k{at}")).await.unwrap().is_some(), "the key is free at once");
        }
        for waiting in waiting {
            waiting.await.unwrap().unwrap().release().await.unwrap();
        }
        drop(guards);
        until("nothing is left", async || server.command(&["KEYS", "stanchion:*:queue"]).is_empty()).await;
    });
}

struct Unpark(std::thread::Thread);
impl std::task::Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}
/// Drives a future without any runtime.
fn drive<T>(work: impl Future<Output = T>) -> T {
    let mut work = Box::pin(work);
    let waker = Arc::new(Unpark(std::thread::current())).into();
    let mut context = std::task::Context::from_waker(&waker);
    loop {
        match work.as_mut().poll(&mut context) {
            std::task::Poll::Ready(value) => return value,
            std::task::Poll::Pending => std::thread::park(),
        }
    }
}

/// Two handles share a store: if either is closed, the keeper of the other serves callers without a runtime.
#[test]
fn any_open_handle_serves_without_a_runtime() {
    let server = RedisServer::start(Kind::Redis7);
    let store = Redis::from_url(&url(server.port())).unwrap();
    for first_goes in [true, false] {
        drive(async {
            let open = || Locks::builder_with_store(store.clone()).open();
            let (first, second) = (open().await.unwrap(), open().await.unwrap());
            let (goes, stays) = if first_goes { (first, second) } else { (second, first) };
            goes.lock("k").await.unwrap().release().await.unwrap();
            goes.close().await.unwrap();
            drop(goes);
            for _ in 0..100 {
                stays.lock("k").await.unwrap().release().await.unwrap();
            }
            stays.close().await.unwrap();
        });
    }
}

/// In runtimes that cannot do I/O, and without any, the keeper's connection is used.
#[test]
fn calls_work_without_io_or_runtime() {
    async fn use_it(url: String) {
        let locks = Locks::open(&url).await.unwrap();
        let guard = locks.lock("k").await.unwrap();
        let waiting = locks.lock("k").wait(SECOND / 10).await;
        assert_eq!(waiting.unwrap_err().kind(), ErrorKind::Timeout);
        guard.release().await.unwrap();
        let held = locks.lock("k").await.unwrap();
        assert_eq!(locks.list("").await.unwrap().len(), 1);
        drop(held);
        locks.close().await.unwrap();
    }
    let server = RedisServer::start(Kind::Redis7);
    drive(use_it(url(server.port())));
    let without_io = tokio::runtime::Builder::new_current_thread().build().unwrap();
    without_io.block_on(use_it(url(server.port())));
    // This guard outlives the runtime that created it.
    let first = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let locks = first.block_on(super::locks(server.port()));
    let guard = first.block_on(locks.lock("k").into_future()).unwrap();
    drop(first);
    assert!(guard.is_held());
    block_on(async {
        guard.release().await.unwrap();
        assert!(is_free(&locks, "k").await);
    });
}
