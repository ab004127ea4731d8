//! Redis when things break: answers lost, connections cut, servers killed, frozen, promoted, full.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "test code")]

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use stanchion::store::{AcquireOutcome, AcquireRequest, EndOutcome, PollOutcome, Redis, StoreTime};
use stanchion::{Error, ErrorKind, Event, Key, Locks, LossCause, RetryPolicy, Store};
use stanchion_testkit::proxy::Proxy;
use stanchion_testkit::servers::{Redis as Kind, RedisCluster, RedisSentinel, RedisServer};
use stanchion_testkit::{Environment, block_on, seed, until};

const SECOND: Duration = Duration::from_secs(1);

fn url(port: u16) -> String {
    format!("redis://127.0.0.1:{port}")
}

fn key(name: &str) -> Key {
    Key::new("", name).unwrap()
}

fn store(port: u16) -> Environment<Redis> {
    let url = url(port);
    Environment::new(move || Redis::from_url(&url).unwrap())
}

async fn locks(port: u16) -> Locks {
    Locks::open(&url(port)).await.unwrap()
}

async fn is_free(locks: &Locks, key: &str) -> bool {
    let state = locks.inspect(key).await.unwrap();
    state.holders.is_empty() && state.waiters.is_empty()
}

/// 10,000 calls of eight tasks through a proxy that loses a fifth of all answers.
#[test]
fn lost_answers_leave_no_hold_and_no_false_failure() {
    let server = RedisServer::start(Kind::Redis7);
    let proxy = Proxy::start(server.port(), seed("lost_answers_leave_no_hold_and_no_false_failure"));
    block_on(async {
        let locks = Locks::builder(&url(proxy.port()))
            .retry(RetryPolicy { attempts: 60, pause: Duration::from_millis(1), ..RetryPolicy::default() })
            .open()
            .await
            .unwrap();
        let direct = crate::locks(server.port()).await;
        proxy.faults().lose_answers(200);
        let failed = Arc::new(AtomicU64::new(0));
        let tasks: Vec<_> = (0..8)
            .map(|task| {
                let (locks, direct, failed) = (locks.clone(), direct.clone(), failed.clone());
                tokio::spawn(async move {
                    let mut last = None;
                    for turn in 0..625 {
                        let name = format!("k{}", (task + turn) % 4);
                        let guard = match locks.lock(&name).wait(20 * SECOND).await {
                            Ok(guard) => guard,
                            Err(error) => {
                                assert!(error.is_transient(), "{error}");
                                failed.fetch_add(1, Ordering::SeqCst);
                                continue;
                            }
                        };
                        // What the guard says is what the store has.
                        if turn % 10 == 0 {
                            let state = direct.inspect(&name).await.unwrap();
                            assert_eq!(state.holders.len(), 1);
                            assert_eq!(state.holders[0].fence, guard.fence());
                        }
                        assert!(last != Some((name.clone(), guard.fence())));
                        last = Some((name, guard.fence()));
                        if let Err(error) = guard.release().await {
                            assert!(error.is_transient(), "{error}");
                            failed.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert!(proxy.faults().lost() > 500, "{} lost", proxy.faults().lost());
        assert!(failed.load(Ordering::SeqCst) < 20, "the retries were enough for nearly all: {failed:?}");
        proxy.faults().lose_answers(0);
        for name in ["k0", "k1", "k2", "k3"] {
            until("nothing is left", async || is_free(&direct, name).await).await;
        }
    });
}

/// The same question with the same token gives the same fence, whatever was lost of the answers before.
#[test]
fn a_repeated_question_gives_the_same_fence() {
    let server = RedisServer::start(Kind::Redis7);
    let proxy = Proxy::start(server.port(), seed("a_repeated_question_gives_the_same_fence"));
    block_on(async {
        let (through, direct) = (store(proxy.port()), store(server.port()));
        let (client, observer) = (through.actor().await, direct.actor().await);
        let mut repeated = 0;
        proxy.faults().lose_answers(400);
        for _ in 0..500 {
            let request = client.request(&key("k"));
            let mut attempts = 0;
            let granted = loop {
                attempts += 1;
                match client.store.acquire(request.clone()).await {
                    Ok(reply) => match reply.outcome {
                        AcquireOutcome::Granted(granted) => break granted,
                        other => panic!("{other:?}"),
                    },
                    Err(error) => assert!(error.is_transient(), "{error}"),
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            };
            let before: Vec<_> = observer.sees(&key("k")).await.holders.iter().map(|hold| hold.fence).collect();
            assert_eq!(before, [granted.fence], "one hold, and it is this one");
            repeated += u32::from(attempts > 1);
            loop {
                match client.store.release(&key("k"), request.token, None).await {
                    Ok(reply) => {
                        assert!(reply.outcome == EndOutcome::Released || attempts > 0);
                        break;
                    }
                    Err(error) => assert!(error.is_transient(), "{error}"),
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            assert!(!observer.sees_held(&key("k")).await);
        }
        assert!(repeated > 50, "{repeated} were asked again");
    });
}

/// What a server answers when it cannot serve, as errors: each kind provoked on a real one.
#[test]
fn every_fault_of_a_server_has_its_kind() {
    let mut server = RedisServer::start(Kind::Redis7);
    let other = RedisServer::start(Kind::Redis7);
    let port = server.port();
    block_on(async {
        let environment = store(port);
        let actor = environment.actor().await;
        let fault = async |what: &str| -> Error {
            let request = actor.request(&key(what));
            actor.store.acquire(request).await.expect_err(what)
        };
        let expect = async |what: &str, kind: ErrorKind, in_doubt: bool, says: &str| {
            let error = fault(what).await;
            assert_eq!((error.kind(), error.is_in_doubt()), (kind, in_doubt), "{what}: {error}");
            let text = error.to_string();
            assert!(text.starts_with("redis: 127.0.0.1:") || text.starts_with("redis: cannot connect"), "{text}");
            assert!(text.contains(says), "{what}: {text}");
            assert_eq!(error.is_transient(), matches!(kind, ErrorKind::Unavailable | ErrorKind::RateLimited));
        };
        // Out of memory: no new hold, and what there is can be released.
        let (token, _) = actor.takes(&key("held")).await;
        let waiting = actor.queues(&key("held")).await;
        server.command(&["CONFIG", "SET", "maxmemory", "1"]);
        expect("OOM", ErrorKind::Unavailable, false, "out of memory").await;
        assert_eq!(actor.releases(&key("held"), token).await, EndOutcome::Released);
        assert!(actor.granted(&key("held"), waiting).await.is_some(), "handed on");
        assert_eq!(actor.releases(&key("held"), waiting).await, EndOutcome::Released);
        actor.store.beat(actor.session).await.unwrap();
        server.command(&["CONFIG", "SET", "maxmemory", "0"]);
        // Too few replicas.
        server.command(&["CONFIG", "SET", "min-replicas-to-write", "1"]);
        expect("NOREPLICAS", ErrorKind::Unavailable, false, "too few replicas").await;
        server.command(&["CONFIG", "SET", "min-replicas-to-write", "0"]);
        // A replica: refused by the server, and then because it says that it is one.
        server.command(&["REPLICAOF", "127.0.0.1", &other.port().to_string()]);
        expect("READONLY", ErrorKind::Unavailable, false, "replica").await;
        expect("a replica", ErrorKind::Unavailable, false, "is a replica now").await;
        server.command(&["REPLICAOF", "NO", "ONE"]);
        until("a primary again", async || actor.store.inspect(&key("k")).await.is_ok()).await;
        // A script that does not end.
        let slow =
            "redis.call('SET', 'x', 1) local t = redis.call('TIME')[1] while redis.call('TIME')[1] - t < 1000 do end";
        server.command(&["CONFIG", "SET", "lua-time-limit", "1"]);
        let busy = std::thread::scope(|scope| {
            let read = "local t = redis.call('TIME') while true do end";
            let server = &server;
            let _slow = slow;
            scope.spawn(move || server.command(&["EVAL", read, "0"]));
            std::thread::sleep(Duration::from_millis(100));
            let error = block_on_thread(|| {
                let actor = store(port);
                async move { actor.open().inspect(&key("k")).await.unwrap_err() }
            });
            server.command(&["SCRIPT", "KILL"]);
            error
        });
        assert_eq!(busy.kind(), ErrorKind::Unavailable, "{busy}");
        assert!(busy.to_string().contains("busy"), "{busy}");
        // A key of ours that somebody else wrote.
        server.command(&["SET", "stanchion:{:foreign}", "hello"]);
        expect("foreign", ErrorKind::Misconfigured, false, "written by something else").await;
        server.command(&["DEL", "stanchion:{:foreign}"]);
        server.command(&["RPUSH", "stanchion:{:foreign}", "hello"]);
        expect("foreign", ErrorKind::Misconfigured, false, "written by something else").await;
        // The highest fence.
        server.command(&["SET", "stanchion:{:last}", "09007199254740991"]);
        expect("last", ErrorKind::Misconfigured, false, "highest fence").await;
        // Rights.
        server.command(&["ACL", "SETUSER", "default", "-set"]);
        expect("NOPERM in a script", ErrorKind::Unauthorized, false, "lacks a right").await;
        server.command(&["ACL", "SETUSER", "default", "+set", "-evalsha", "-eval"]);
        expect("NOPERM", ErrorKind::Unauthorized, false, "lacks a right").await;
        server.command(&["ACL", "SETUSER", "default", "+@all"]);
        // A password, asked for from the next connection on.
        server.command(&["CONFIG", "SET", "requirepass", "secret"]);
        let error = store(port).open().inspect(&key("k")).await.unwrap_err();
        assert_eq!((error.kind(), error.is_in_doubt()), (ErrorKind::Unauthorized, false), "{error}");
        let wrong = Redis::from_url(&format!("redis://:hunter2@127.0.0.1:{port}")).unwrap();
        let error = wrong.inspect(&key("k")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
        assert!(!format!("{error} {error:?} {wrong:?}").contains("hunter2"));
    });
    // A connection that breaks while the answer is awaited: in doubt. And one that is refused: not in doubt.
    let environment = store(port);
    server.kill();
    server.restart();
    block_on(async {
        let actor = environment.actor().await;
        actor.takes(&key("a")).await;
        server.process().unwrap().signal("STOP");
        let request = actor.request(&key("b"));
        let asking = tokio::spawn({
            let (store, request) = (actor.store.clone(), request.clone());
            async move { store.acquire(request).await }
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        server.kill();
        let error = asking.await.unwrap().unwrap_err();
        assert_eq!((error.kind(), error.is_in_doubt()), (ErrorKind::Unavailable, true), "{error}");
        let error = actor.store.acquire(request).await.unwrap_err();
        assert_eq!((error.kind(), error.is_in_doubt()), (ErrorKind::Unavailable, false), "{error}");
        assert!(error.to_string().contains("cannot connect to 127.0.0.1"), "{error}");
    });
}

/// Runs something in a thread with a runtime of its own.
fn block_on_thread<T: Send, F: Future<Output = T>>(make: impl FnOnce() -> F + Send) -> T {
    std::thread::scope(|scope| scope.spawn(|| block_on(make())).join().unwrap())
}

#[test]
fn a_server_that_would_lose_locks_is_refused_and_doubts_are_told() {
    let primary = RedisServer::start(Kind::Redis7);
    let evicting = RedisServer::with(Kind::Redis7, &["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"]);
    let replica = RedisServer::with(Kind::Redis7, &["--replicaof", &format!("127.0.0.1 {}", primary.port())]);
    let safe = RedisServer::with(Kind::Redis7, &["--appendonly", "yes", "--appendfsync", "always"]);
    block_on(async {
        let error = Locks::open(&url(evicting.port())).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Misconfigured);
        assert!(error.to_string().contains("set `maxmemory-policy noeviction`"), "{error}");
        let error = Locks::open(&url(replica.port())).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Misconfigured);
        assert!(error.to_string().contains("is a replica; name its primary"), "{error}");
        let warnings = locks(primary.port()).await.warnings();
        assert!(warnings.iter().any(|warning| warning.contains("set `appendonly yes`")), "{warnings:?}");
        assert_eq!(locks(safe.port()).await.warnings(), Vec::<String>::new());
    });
}

#[test]
fn without_the_right_to_subscribe_waiting_is_slower_and_that_is_told() {
    let server = RedisServer::start(Kind::Redis7);
    let rights = ["ACL", "SETUSER", "quiet", "on", ">pw", "~*", "+@all", "-subscribe"];
    assert_eq!(server.command(&rights), "OK");
    block_on(async {
        let locks = Locks::open(&format!("redis://quiet:pw@127.0.0.1:{}", server.port())).await.unwrap();
        until("told", async || locks.warnings().iter().any(|warning| warning.contains("no pushes"))).await;
        let guard = locks.lock("k").await.unwrap();
        let waiting = tokio::spawn(locks.lock("k").into_future());
        until("queued", async || locks.inspect("k").await.unwrap().waiters.len() == 1).await;
        let released = Instant::now();
        guard.release().await.unwrap();
        waiting.await.unwrap().unwrap().release().await.unwrap();
        assert!(released.elapsed() < 5 * SECOND, "{:?}", released.elapsed());
    });
}

#[test]
fn a_subscription_that_is_cut_is_made_anew() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let locks = locks(server.port()).await;
        for _ in 0..5 {
            assert_eq!(server.command(&["CLIENT", "KILL", "TYPE", "pubsub"]), "1");
            let guard = locks.lock("k").await.unwrap();
            let waiting = tokio::spawn(locks.lock("k").into_future());
            until("queued", async || locks.inspect("k").await.unwrap().waiters.len() == 1).await;
            guard.release().await.unwrap();
            waiting.await.unwrap().unwrap().release().await.unwrap();
            until("subscribed", async || server.command(&["PUBSUB", "CHANNELS"]).contains("stanchion:session:")).await;
        }
    });
}

#[test]
fn scripts_that_the_server_has_forgotten_are_sent_anew() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let locks = locks(server.port()).await;
        for _ in 0..20 {
            let guard = locks.lock("k").await.unwrap();
            assert_eq!(server.command(&["SCRIPT", "FLUSH"]), "OK");
            guard.release().await.unwrap();
        }
    });
}

/// Everything is forgotten: holders are told, and fences go on upwards.
#[test]
fn a_server_that_restarts_empty_tells_holders_and_repeats_no_fence() {
    let mut server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let locks = Locks::builder(&url(server.port())).session_ttl(5 * SECOND).open().await.unwrap();
        for _ in 0..3 {
            let guard = locks.lock("k").await.unwrap();
            let fixed = locks.lock("fixed").ttl(60 * SECOND).await.unwrap();
            server.kill();
            server.restart();
            tokio::time::timeout(10 * SECOND, guard.lost()).await.unwrap();
            tokio::time::timeout(10 * SECOND, fixed.lost()).await.unwrap();
            assert_eq!(fixed.loss(), Some(LossCause::Missing), "it was asked for when the subscription came back");
            until("a session", async || locks.try_lock("any").await.is_ok()).await;
            let next = locks.lock("k").await.unwrap();
            assert!(next.fence() > guard.fence());
            next.release().await.unwrap();
        }
    });
}

/// A link that is dead without a word: holders lose on time, and nothing is stuck when it comes back.
#[test]
fn a_silent_link_loses_on_time_and_heals() {
    let server = RedisServer::start(Kind::Redis7);
    let proxy = Proxy::start(server.port(), 1);
    block_on(async {
        let ttl = SECOND;
        let locks = Locks::builder(&url(proxy.port())).session_ttl(ttl).open().await.unwrap();
        let direct = Locks::builder(&url(server.port())).session_ttl(ttl).open().await.unwrap();
        let guard = locks.lock("k").await.unwrap();
        proxy.faults().silence(true);
        let cut = Instant::now();
        let next = tokio::spawn(direct.lock("k").into_future());
        tokio::time::timeout(10 * SECOND, guard.lost()).await.unwrap();
        let lost = cut.elapsed();
        let fence = guard.fence();
        let next = next.await.unwrap().unwrap();
        assert!(
            lost < ttl && lost < cut.elapsed(),
            "lost after {lost:?}, granted to the next after {:?}",
            cut.elapsed()
        );
        assert!(next.fence() > fence);
        assert!(cut.elapsed() < ttl + SECOND, "{:?}", cut.elapsed());
        next.release().await.unwrap();
        drop(guard);
        proxy.faults().silence(false);
        until("it works again", async || locks.try_lock("k").await.is_ok_and(|guard| guard.is_some())).await;
        until("nothing is left", async || is_free(&direct, "k").await).await;
    });
}

/// A thousand tasks and a server that is away: no storm of connections.
#[test]
fn reconnecting_is_no_storm() {
    let server = RedisServer::start(Kind::Redis7);
    let proxy = Proxy::start(server.port(), 1);
    block_on(async {
        let locks = Locks::open(&url(proxy.port())).await.unwrap();
        proxy.faults().refuse(true);
        proxy.faults().cut();
        let before = proxy.faults().connections();
        let start = Instant::now();
        let tasks: Vec<_> =
            (0..500).map(|task| tokio::spawn(locks.lock(format!("k{task}")).wait(2 * SECOND).into_future())).collect();
        for task in tasks {
            let error = task.await.unwrap().unwrap_err();
            assert!(error.is_transient() && error.to_string().contains("cannot connect"), "{error}");
        }
        let made = proxy.faults().connections() - before;
        assert!(made < 60, "{made} connections in {:?}", start.elapsed());
        proxy.faults().refuse(false);
        until("it works again", async || locks.lock("k0").wait(SECOND).await.is_ok()).await;
    });
}

/// A failover that loses writes, a thousand times: the old primary goes on granting while the new one does. A plain
/// counter repeats; fences do not.
#[test]
fn a_thousand_lossy_failovers_repeat_no_fence() {
    const FAILOVERS: usize = 1_000;
    let servers = [0; 2].map(|_| RedisServer::with(Kind::Redis7, &["--repl-diskless-sync-delay", "0"]));
    block_on(async {
        let stores = servers.each_ref().map(|server| store(server.port()));
        let (mut fences, mut last) = (HashSet::new(), 0);
        let (mut counts, mut repeated) = (HashSet::new(), 0);
        for turn in 0..FAILOVERS {
            let (old, new) = (turn % 2, (turn + 1) % 2);
            servers[new].command(&["REPLICAOF", "127.0.0.1", &servers[old].port().to_string()]);
            let linked = || servers[new].command(&["INFO", "replication"]).contains("master_link_status:up");
            stanchion_testkit::servers::wait("linked", linked);
            // From here on nothing reaches the new one.
            servers[new].command(&["REPLICAOF", "NO", "ONE"]);
            // The first may be one that the new one knows, the second never is.
            for primary in [old, old, new] {
                let actor = stores[primary].actor().await;
                let (token, granted) = actor.takes(&key("k")).await;
                assert!(fences.insert(granted.fence), "failover {turn}: {:?} twice", granted.fence);
                assert!(granted.fence.get() > last, "failover {turn}: {:?} after {last}", granted.fence);
                last = granted.fence.get();
                if primary == new {
                    actor.releases(&key("k"), token).await;
                } else {
                    actor.releases(&key("k"), token).await;
                }
                repeated += usize::from(!counts.insert(servers[primary].command(&["INCR", "control"])));
            }
        }
        assert_eq!(fences.len(), 3 * FAILOVERS);
        assert!(repeated >= FAILOVERS * 9 / 10, "the control repeats: {repeated} of {FAILOVERS}");
    });
}

/// Takes and releases all the time, by several handles, and tells of every grant.
async fn under_load(url: &str, during: impl AsyncFnOnce(&Locks)) -> Duration {
    let (stop, granted) = (Arc::new(AtomicBool::new(false)), Arc::new(std::sync::Mutex::new(Vec::new())));
    let open = async || Locks::builder(url).session_ttl(3 * SECOND).open().await.unwrap();
    let watcher = open().await;
    let mut tasks = Vec::new();
    for _ in 0..4 {
        let (locks, stop, granted) = (open().await, stop.clone(), granted.clone());
        tasks.push(tokio::spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                let Ok(guard) = locks.lock("loaded").wait(20 * SECOND).await else { continue };
                granted.lock().unwrap().push((Instant::now(), guard.fence()));
                tokio::time::sleep(Duration::from_millis(2)).await;
                drop(guard);
            }
        }));
    }
    until("some grants", async || granted.lock().unwrap().len() > 50).await;
    during(&watcher).await;
    let served = Instant::now();
    let count = granted.lock().unwrap().len();
    until("many grants after it", async || granted.lock().unwrap().len() > count + 50).await;
    stop.store(true, Ordering::SeqCst);
    for task in tasks {
        task.await.unwrap();
    }
    let granted = granted.lock().unwrap();
    let fences: HashSet<_> = granted.iter().map(|(_, fence)| *fence).collect();
    assert_eq!(fences.len(), granted.len(), "no fence twice");
    assert!(granted.is_sorted_by_key(|(_, fence)| *fence), "no fence lowered");
    let first_after = granted.iter().map(|(at, _)| *at).find(|at| *at >= served);
    first_after.map_or(Duration::ZERO, |at| at.duration_since(served))
}

#[test]
fn a_killed_primary_is_replaced_by_the_sentinels_under_load() {
    let mut servers = RedisSentinel::start(Kind::Redis7);
    let url = format!("redis+sentinel://{}/main", servers.hosts());
    block_on(async {
        let waited = under_load(&url, async |watcher| {
            let held = watcher.lock("held").await.unwrap();
            let old = servers.primary();
            servers.servers[old].kill();
            until("another primary", async || {
                let now = servers.primary();
                now != old && servers.servers[now].command(&["ROLE"]).starts_with("master")
            })
            .await;
            // Whether it survived or not, the holder and the store agree.
            until("agreed", async || {
                let state = watcher.inspect("held").await.ok();
                let there = state.map(|state| state.holders.iter().any(|hold| hold.fence == held.fence()));
                there == Some(held.is_held()) || held.loss().is_some()
            })
            .await;
        })
        .await;
        assert!(waited < 2 * SECOND, "served again {waited:?} after the new primary");
    });
}

#[test]
fn a_killed_primary_of_a_cluster_is_replaced_under_load() {
    let mut cluster = RedisCluster::start(Kind::Redis7, true);
    let url = format!("redis+cluster://{}", cluster.hosts());
    // Whoever has the slot of the key that all want.
    let slot: u16 = cluster.nodes()[0].command(&["CLUSTER", "KEYSLOT", "stanchion:{:loaded}"]).parse().unwrap();
    let at = usize::from(slot > 5_460) + usize::from(slot > 10_922);
    block_on(async {
        let waited = under_load(&url, async |_| {
            cluster.nodes_mut()[at].kill();
            let replica = &cluster.nodes()[at + 3];
            until("a new primary", async || {
                replica.command(&["ROLE"]).starts_with("master")
                    && replica.command(&["CLUSTER", "INFO"]).contains("cluster_state:ok")
            })
            .await;
        })
        .await;
        assert!(waited < 2 * SECOND, "served again {waited:?} after the new primary");
        // And back without a loss: the slot moves while it is used.
        cluster.nodes_mut()[at].restart();
        under_load(&url, async |_| {
            let old = &cluster.nodes()[at];
            until("a replica that is linked", async || {
                old.command(&["INFO", "replication"]).contains("master_link_status:up")
            })
            .await;
            until("it takes over", async || {
                old.command(&["CLUSTER", "FAILOVER"]);
                old.command(&["ROLE"]).starts_with("master")
            })
            .await;
        })
        .await;
    });
}

/// A slot that is being moved while it is used: `ASK`, `TRYAGAIN`, `MOVED` are followed, and nothing is lost.
#[test]
fn a_slot_moves_between_nodes_under_load() {
    let cluster = RedisCluster::start(Kind::Redis7, false);
    let url = format!("redis+cluster://{}", cluster.hosts());
    let nodes = cluster.nodes();
    let slot = nodes[0].command(&["CLUSTER", "KEYSLOT", "stanchion:{:loaded}"]);
    let number: u16 = slot.parse().unwrap();
    let from = usize::from(number > 5_460) + usize::from(number > 10_922);
    let to = (from + 1) % 3;
    let ids: Vec<_> = nodes.iter().map(|node| node.command(&["CLUSTER", "MYID"])).collect();
    block_on(async {
        under_load(&url, async |_| {
            for (from, to) in [(from, to), (to, from)] {
                nodes[to].command(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &ids[from]]);
                nodes[from].command(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &ids[to]]);
                let port = nodes[to].port().to_string();
                // New keys come up meanwhile: until none is left.
                loop {
                    let keys = nodes[from].command(&["CLUSTER", "GETKEYSINSLOT", &slot, "100"]);
                    let Some(key) = keys.lines().next() else { break };
                    nodes[from].command(&["MIGRATE", "127.0.0.1", &port, key, "0", "5000"]);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
                for node in [to, from, 3 - to - from] {
                    nodes[node].command(&["CLUSTER", "SETSLOT", &slot, "NODE", &ids[to]]);
                }
            }
        })
        .await;
    });
}

/// A forced release reaches its holder although the push got lost and the one who forced was cut off half-way.
#[test]
fn a_forced_release_whose_answer_was_lost_is_told_when_it_is_asked_again() {
    let server = RedisServer::start(Kind::Redis7);
    let proxy = Proxy::start(server.port(), seed("a_forced_release_whose_answer_was_lost"));
    block_on(async {
        let holder = Locks::builder(&url(server.port())).session_ttl(2 * SECOND).open().await.unwrap();
        let operator = Locks::builder(&url(proxy.port()))
            .retry(RetryPolicy { attempts: 60, pause: Duration::from_millis(1), ..RetryPolicy::default() })
            .open()
            .await
            .unwrap();
        proxy.faults().lose_answers(100);
        for turn in 0..20 {
            let guard = holder.lock("k").await.unwrap();
            let mut events = holder.events();
            operator.force_release("k", guard.fence(), format!("turn {turn}")).await.unwrap();
            tokio::time::timeout(20 * SECOND, guard.lost()).await.unwrap();
            assert_eq!(guard.loss(), Some(LossCause::Forced), "turn {turn}");
            let told = events.next().await;
            assert!(
                matches!(&told, Some(Event::Lost { reason: Some(reason), .. }) if *reason == format!("turn {turn}")),
                "{told:?}"
            );
        }
    });
}

/// A dead session's hold is taken over by whoever looks, in every kind of step.
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
        let other = crate::locks(server.port()).await;
        assert_eq!(other.list("").await.unwrap().len(), 0, "after {:?}", start.elapsed());
        drop(guards);
        let (token, store) = (stanchion::TokenId::random().unwrap(), store(server.port()).open());
        assert_eq!(store.poll(&key("k0"), token).await.unwrap().outcome, PollOutcome::Gone);
    });
}

/// Runtimes that can do no I/O, and none at all: the keeper's connection does the work.
#[test]
fn a_runtime_without_io_and_no_runtime_work_too() {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
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
    async fn use_it(url: String) {
        let locks = Locks::open(&url).await.unwrap();
        let guard = locks.lock("k").await.unwrap();
        let waiting = locks.lock("k").wait(SECOND / 10).await;
        assert_eq!(waiting.unwrap_err().kind(), ErrorKind::Timeout);
        guard.release().await.unwrap();
        drop(locks.lock("k").await.unwrap());
        locks.close().await.unwrap();
    }
    let server = RedisServer::start(Kind::Redis7);
    drive(use_it(url(server.port())));
    let without_io = tokio::runtime::Builder::new_current_thread().build().unwrap();
    without_io.block_on(use_it(url(server.port())));
    // A handle that outlives the runtime it was used in.
    let first = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let locks = first.block_on(crate::locks(server.port()));
    let guard = first.block_on(locks.lock("k").into_future()).unwrap();
    drop(first);
    assert!(guard.is_held());
    block_on(async {
        guard.release().await.unwrap();
        assert!(is_free(&locks, "k").await);
    });
}

/// Four processes' worth of waiters on one key: 10,000 grants, nobody is passed.
#[test]
fn ten_thousand_grants_are_in_the_order_of_the_questions() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let mut actors = Vec::new();
        for _ in 0..4 {
            actors.push(environment.actor().await);
        }
        let mut queue = std::collections::VecDeque::new();
        for turn in 0..64 {
            let actor = &actors[turn % 4];
            let request = actor.request(&key("k"));
            actor.ask(&request).await;
            queue.push_back((turn % 4, request.token));
        }
        let mut last = None;
        for turn in 0..10_000 {
            let (who, token) = queue.pop_front().unwrap();
            let granted =
                actors[who].granted(&key("k"), token).await.unwrap_or_else(|| panic!("grant {turn} passed somebody"));
            assert!(Some(granted.fence) > last);
            last = Some(granted.fence);
            assert_eq!(actors[who].releases(&key("k"), token).await, EndOutcome::Released);
            let next = (turn * 7) % 4;
            queue.push_back((next, actors[next].queues(&key("k")).await));
        }
    });
}

/// A session that ended while its request was on its way gets no grant that anybody believes, and leaves none.
#[test]
fn a_grant_to_a_dead_session_is_taken_by_the_next() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let (holder, next) = (environment.actor().await, environment.actor().await);
        let dying = environment.mortal(SECOND / 5).await;
        let (held, _) = holder.takes(&key("k")).await;
        dying.queues(&key("k")).await;
        let waiting = next.queues(&key("k")).await;
        tokio::time::sleep(SECOND / 4).await;
        // The hand-off goes to the dead one: no script sees sessions.
        assert_eq!(holder.releases(&key("k"), held).await, EndOutcome::Released);
        assert!(next.granted(&key("k"), waiting).await.is_some(), "whoever asks next has the dead buried");
        let state = next.sees(&key("k")).await;
        assert_eq!((state.holders.len(), state.waiters.len()), (1, 0));
    });
}

/// Many tasks of one process share requests, also those for the same key: still one at a time.
#[test]
fn steps_that_share_a_request_exclude_each_other() {
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
                        assert!(!inside.swap(true, Ordering::SeqCst), "two at a time");
                        assert!(last.swap(guard.fence().get(), Ordering::SeqCst) < guard.fence().get(), "fences rise");
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
        assert!(stats.contains("cmdstat_mget:"), "requests were shared");
        until("nothing is left", async || locks.list("").await.unwrap().is_empty()).await;
    });
}

/// Shared requests check tokens, windows and what they find as requests of their own do.
#[test]
fn steps_that_share_a_request_change_nothing_that_is_not_theirs() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let actor = Arc::new(environment.actor().await);
        server.command(&["RPUSH", "stanchion:{:foreign}", "hello"]);
        let (token, _) = actor.takes(&key("k")).await;
        let (closed, _) = actor.takes(&key("closed")).await;
        actor.store.release(&key("closed"), closed, Some(60 * SECOND)).await.unwrap();
        let mut tasks = Vec::new();
        for turn in 0..60 {
            let actor = actor.clone();
            tasks.push(tokio::spawn(async move {
                let stranger = stanchion::TokenId::random().unwrap();
                let late = AcquireRequest { not_after: StoreTime::from_micros(1), ..actor.request(&key("late")) };
                let at_once = AcquireRequest { enqueue: false, ..actor.request(&key("k")) };
                let shut = AcquireRequest { enqueue: false, ..actor.request(&key("closed")) };
                match turn % 4 {
                    0 => assert_eq!(actor.releases(&key("k"), stranger).await, EndOutcome::Nothing),
                    1 => assert_eq!(actor.ask(&late).await, AcquireOutcome::Stale),
                    2 => assert!(matches!(actor.ask(&at_once).await, AcquireOutcome::Busy { .. })),
                    _ => assert!(matches!(actor.ask(&shut).await, AcquireOutcome::Busy { check_in: Some(_) })),
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        assert!(actor.granted(&key("k"), token).await.is_some());
        assert_eq!(server.command(&["TYPE", "stanchion:{:foreign}"]), "list");
        assert!(server.command(&["INFO", "commandstats"]).contains("cmdstat_mget:"), "requests were shared");
    });
}

/// A server whose clock was set back behind the newest fence: fences go on upwards, in every way to ask.
#[test]
fn a_clock_that_was_set_back_lowers_no_fence() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let locks = locks(server.port()).await;
        let ahead = stanchion::Clock::system().wall_micros() + 3_600_000_000;
        server.command(&["SET", "stanchion:{:alone}", &format!("0{ahead}")]);
        let mut last = ahead;
        for _ in 0..10 {
            let guard = locks.lock("alone").await.unwrap();
            assert_eq!(guard.fence().get(), last + 1);
            last = guard.fence().get();
            guard.release().await.unwrap();
        }
        for turn in 0..40 {
            server.command(&["SET", &format!("stanchion:{{:shared{turn}}}"), &format!("0{ahead}")]);
        }
        let tasks: Vec<_> =
            (0..40).map(|turn| tokio::spawn(locks.lock(format!("shared{turn}")).into_future())).collect();
        for task in tasks {
            assert_eq!(task.await.unwrap().unwrap().fence().get(), ahead + 1);
        }
        assert!(server.command(&["INFO", "commandstats"]).contains("cmdstat_mget:"), "requests were shared");
    });
}

/// A new primary may have the session and lack a hold: whoever reconnects asks for every hold.
#[test]
fn a_hold_that_is_missing_after_a_reconnection_is_lost() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let locks = Locks::builder(&url(server.port())).session_ttl(600 * SECOND).open().await.unwrap();
        let (missing, there) = (locks.lock("missing").await.unwrap(), locks.lock("there").await.unwrap());
        server.command(&["DEL", "stanchion:{:missing}"]);
        server.command(&["CLIENT", "KILL", "TYPE", "pubsub"]);
        tokio::time::timeout(20 * SECOND, missing.lost()).await.unwrap();
        assert_eq!(missing.loss(), Some(LossCause::Missing));
        assert!(there.is_held());
    });
}

/// A grant that too few replicas have is not believed, and leaves nothing.
#[test]
fn min_replicas_holds_back_grants_that_a_failover_would_lose() {
    let primary = RedisServer::start(Kind::Redis7);
    let replica = RedisServer::with(Kind::Redis7, &["--replicaof", &format!("127.0.0.1 {}", primary.port())]);
    stanchion_testkit::servers::wait("linked", || {
        replica.command(&["INFO", "replication"]).contains("master_link_status:up")
    });
    block_on(async {
        let locks = Locks::open(&format!("{}?min_replicas=1", url(primary.port()))).await.unwrap();
        locks.lock("k").await.unwrap().release().await.unwrap();
        replica.process().unwrap().signal("STOP");
        let error = locks.lock("k").wait(3 * SECOND).await.unwrap_err();
        assert!(error.is_transient() && error.to_string().contains("0 replicas have the grant"), "{error}");
        replica.process().unwrap().signal("CONT");
        until("nothing is left", async || is_free(&locks, "k").await).await;
        locks.lock("k").await.unwrap().release().await.unwrap();
    });
}

/// A server whose certificate nobody vouches for is refused at once, and so is one with another name.
#[test]
fn certificates_are_verified() {
    let folder = tempfile::tempdir().unwrap();
    let (authority, certificate, server_key) = stanchion_testkit::servers::certificates(folder.path());
    let [authority, certificate, server_key] =
        [&authority, &certificate, &server_key].map(|path| path.to_str().unwrap());
    let files = ["--tls-ca-cert-file", authority, "--tls-cert-file", certificate, "--tls-key-file", server_key];
    let server = RedisServer::with(Kind::Redis7, &[&files[..], &["--tls-port", "--tls-auth-clients", "no"]].concat());
    let port = server.port();
    block_on(async {
        let trusted = format!("rediss://localhost:{port}?ca_file={authority}");
        Locks::open(&trusted).await.unwrap().lock("k").await.unwrap().release().await.unwrap();
        let error = Locks::open(&format!("rediss://localhost:{port}")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Misconfigured, "{error}");
        assert!(error.to_string().contains("certificate"), "{error}");
        let another_name = format!("rediss://127.0.0.1:{port}?ca_file={authority}");
        let error = Locks::open(&another_name).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Misconfigured, "{error}");
        let hasty = RetryPolicy { total: SECOND / 2, ..RetryPolicy::default() };
        let error = Locks::builder(&url(port)).retry(hasty).open().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "plain text to a TLS port: {error}");
        let error = Locks::open(&format!("rediss://127.0.0.1:{port}?ca_file=/nowhere")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    });
}

/// A server that was demoted and is cut off knows of no newer beats: it may not declare a session dead.
#[test]
fn a_stale_replica_declares_no_session_dead() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let actor = environment.mortal(SECOND / 5).await;
        actor.takes(&key("k")).await;
        // A replica of nobody: it serves what it had.
        server.command(&["REPLICAOF", "127.0.0.1", "1"]);
        tokio::time::sleep(SECOND / 3).await;
        let error = actor.store.acquire(actor.request(&key("other"))).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        server.command(&["REPLICAOF", "NO", "ONE"]);
        until("told by a primary", async || {
            let asked = actor.store.acquire(actor.request(&key("other"))).await;
            asked.is_ok_and(|reply| reply.outcome == AcquireOutcome::SessionGone)
        })
        .await;
        // What was declared dead is not opened or beaten into life again.
        let beaten = actor.store.beat(actor.session).await.unwrap().outcome;
        assert_eq!(beaten, stanchion::store::BeatOutcome::Gone);
    });
}
