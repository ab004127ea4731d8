//! Provokes rejections by a server or its settings, and checks the kind of each error.

use std::time::{Duration, Instant};

use stanchion::store::{AcquireOutcome, EndOutcome, Redis};
use stanchion::{Error, ErrorKind, Locks, RetryPolicy, Store};
use stanchion_testkit::proxy::Proxy;
use stanchion_testkit::servers::{Redis as Kind, RedisCluster, RedisSentinel, RedisServer};
use stanchion_testkit::{block_on, until};

use super::{SECOND, key, locks, store, url};

/// Provokes each fault of a real server, and checks the error's kind.
#[test]
fn every_fault_has_its_kind() {
    let mut server = RedisServer::start(Kind::Redis7);
    let other = RedisServer::start(Kind::Redis7);
    let port = server.port();
    block_on(async {
        let environment = store(port);
        let actor = environment.client().await;
        let fault = async |what: &str| -> Error {
            let request = actor.request(&key(what));
            actor.store.acquire(request).await.expect_err(what)
        };
        let expect = async |what: &str, kind: ErrorKind, in_doubt: bool, expected: &str| {
            let error = fault(what).await;
            assert_eq!((error.kind(), error.is_in_doubt()), (kind, in_doubt), "{what}: {error}");
            let text = error.to_string();
            assert!(text.starts_with("redis: 127.0.0.1:") || text.starts_with("redis: cannot connect"), "{text}");
            assert!(text.contains(expected), "{what}: {text}");
            assert_eq!(error.is_transient(), matches!(kind, ErrorKind::Unavailable | ErrorKind::RateLimited));
        };
        // Out of memory: no new hold is granted, and existing ones can be released.
        let (token, _) = actor.lock(&key("held")).await;
        let waiting = actor.enqueue(&key("held")).await;
        server.command(&["CONFIG", "SET", "maxmemory", "1"]);
        expect("OOM", ErrorKind::Unavailable, false, "out of memory").await;
        assert_eq!(actor.release(&key("held"), token).await, EndOutcome::Released);
        assert!(actor.current_grant(&key("held"), waiting).await.is_some(), "the key is handed on");
        assert_eq!(actor.release(&key("held"), waiting).await, EndOutcome::Released);
        actor.store.renew_session(actor.session).await.unwrap();
        server.command(&["CONFIG", "SET", "maxmemory", "0"]);
        // Too few replicas.
        server.command(&["CONFIG", "SET", "min-replicas-to-write", "1"]);
        expect("NOREPLICAS", ErrorKind::Unavailable, false, "too few replicas").await;
        server.command(&["CONFIG", "SET", "min-replicas-to-write", "0"]);
        // A replica: first the server rejects a write, and then it reports its role.
        server.command(&["REPLICAOF", "127.0.0.1", &other.port().to_string()]);
        expect("READONLY", ErrorKind::Unavailable, false, "replica").await;
        expect("a replica", ErrorKind::Unavailable, false, "is a replica now").await;
        server.command(&["REPLICAOF", "NO", "ONE"]);
        until("a primary again", async || actor.store.inspect(&key("k")).await.is_ok()).await;
        // A script that does not end.
        server.command(&["CONFIG", "SET", "lua-time-limit", "1"]);
        let busy = std::thread::scope(|scope| {
            let read = "local t = redis.call('TIME') while true do end";
            let server = &server;
            scope.spawn(move || server.command(&["EVAL", read, "0"]));
            stanchion_testkit::servers::wait("busy", || server.command(&["PING"]).starts_with("BUSY"));
            let error = block_on_thread(|| {
                let actor = store(port);
                async move { actor.open().inspect(&key("k")).await.unwrap_err() }
            });
            server.command(&["SCRIPT", "KILL"]);
            error
        });
        assert_eq!(busy.kind(), ErrorKind::Unavailable, "{busy}");
        assert!(busy.to_string().contains("busy"), "{busy}");
        // A Redis key with our prefix that somebody else wrote.
        server.command(&["SET", "stanchion:{:foreign}", "hello"]);
        expect("foreign", ErrorKind::Misconfigured, false, "written by something else").await;
        server.command(&["DEL", "stanchion:{:foreign}"]);
        server.command(&["RPUSH", "stanchion:{:foreign}", "hello"]);
        expect("foreign", ErrorKind::Misconfigured, false, "written by something else").await;
        // The highest fence.
        server.command(&["SET", "stanchion:{:last}", "09007199254740991"]);
        expect("last", ErrorKind::Misconfigured, false, "highest fence").await;
        // Missing rights.
        server.command(&["ACL", "SETUSER", "default", "-set"]);
        expect("NOPERM in a script", ErrorKind::Unauthorized, false, "lacks a right").await;
        server.command(&["ACL", "SETUSER", "default", "+set", "-evalsha", "-eval"]);
        expect("NOPERM", ErrorKind::Unauthorized, false, "lacks a right").await;
        server.command(&["ACL", "SETUSER", "default", "+@all"]);
        // A password that the next connection needs.
        server.command(&["CONFIG", "SET", "requirepass", "secret"]);
        let error = store(port).open().inspect(&key("k")).await.unwrap_err();
        assert_eq!((error.kind(), error.is_in_doubt()), (ErrorKind::Unauthorized, false), "{error}");
        let wrong = Redis::from_url(&format!("redis://:hunter2@127.0.0.1:{port}")).unwrap();
        let error = wrong.inspect(&key("k")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
        assert!(!format!("{error} {error:?} {wrong:?}").contains("hunter2"));
    });
    // The outcome is unknown if a connection breaks during a request, and known if the server refuses the connection.
    let environment = store(port);
    server.kill();
    server.restart();
    block_on(async {
        let actor = environment.client().await;
        actor.lock(&key("a")).await;
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

/// Runs a future in a thread with a runtime of its own.
fn block_on_thread<T: Send, F: Future<Output = T>>(make: impl FnOnce() -> F + Send) -> T {
    std::thread::scope(|scope| scope.spawn(|| block_on(make())).join().unwrap())
}

#[test]
fn lossy_server_is_rejected_or_warned_about() {
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
fn missing_subscribe_right_causes_a_warning() {
    let server = RedisServer::start(Kind::Redis7);
    let rights = ["ACL", "SETUSER", "quiet", "on", ">pw", "~*", "+@all", "-subscribe"];
    assert_eq!(server.command(&rights), "OK");
    block_on(async {
        let locks = Locks::open(&format!("redis://quiet:pw@127.0.0.1:{}", server.port())).await.unwrap();
        until("the warning arrives", async || {
            locks.warnings().iter().any(|warning| warning.contains("notifications unavailable"))
        })
        .await;
        let guard = locks.lock("k").await.unwrap();
        let waiting = tokio::spawn(locks.lock("k").into_future());
        until("queued", async || locks.inspect("k").await.unwrap().waiters.len() == 1).await;
        let released = Instant::now();
        guard.release().await.unwrap();
        waiting.await.unwrap().unwrap().release().await.unwrap();
        assert!(released.elapsed() < 5 * SECOND, "{:?}", released.elapsed());
    });
}

/// A user who lacks a right in the middle of a script leaves nothing that harms others.
#[test]
fn missing_right_breaks_no_queue() {
    let server = RedisServer::start(Kind::Redis7);
    for (user, right) in [("no-hash", "-hset"), ("no-queue", "-zadd")] {
        assert_eq!(server.command(&["ACL", "SETUSER", user, "on", ">pw", "~*", "&*", "+@all", right]), "OK");
    }
    block_on(async {
        let environment = store(server.port());
        let (holder, first, second) =
            (environment.client().await, environment.client().await, environment.client().await);
        let (mut held, _) = holder.lock(&key("k")).await;
        for user in ["no-hash", "no-queue"] {
            let url = format!("redis://{user}:pw@127.0.0.1:{}", server.port());
            let poor = Redis::from_url(&url).unwrap();
            let request = holder.request(&key("k"));
            let error = poor.acquire(request).await.unwrap_err();
            assert_eq!((error.kind(), error.is_in_doubt()), (ErrorKind::Unauthorized, false), "{error}");
        }
        // Somebody removed a waiter's request by hand, so its place in the queue is left without one.
        server.command(&["ZADD", "stanchion:{:k}:queue", "0", "nobody"]);
        let waiting = [first.enqueue(&key("k")).await, second.enqueue(&key("k")).await];
        for (actor, token) in [(&first, waiting[0]), (&second, waiting[1])] {
            assert_eq!(holder.release(&key("k"), held).await, EndOutcome::Released);
            assert!(actor.current_grant(&key("k"), token).await.is_some(), "in request order");
            held = token;
        }
        assert_eq!(holder.release(&key("k"), held).await, EndOutcome::Released);
        assert_eq!(server.command(&["EXISTS", "stanchion:{:k}:queue"]), "0");
    });
}

/// A rejected subscription is tried rarely, without a search for another primary, and works once the right is granted.
#[test]
fn missing_subscribe_right_makes_no_storm() {
    let servers = RedisSentinel::start(Kind::Redis7);
    let primary = &servers.servers[0];
    let rights = ["ACL", "SETUSER", "quiet", "on", ">pw", "~*", "&*", "+@all", "-subscribe"];
    assert_eq!(primary.command(&rights), "OK");
    // The test's own commands make connections too; the servers make few among themselves.
    let made = || -> u64 {
        let stats = primary.command(&["INFO", "stats"]);
        stats.lines().find_map(|line| line.strip_prefix("total_connections_received:")).unwrap().parse().unwrap()
    };
    let hosts = servers.hosts();
    let (_, sentinel) = hosts.split(',').next().unwrap().split_once(':').unwrap();
    let sentinel = Proxy::start(sentinel.parse().unwrap(), 1);
    block_on(async {
        let url = format!("redis+sentinel://quiet:pw@127.0.0.1:{}/main", sentinel.port());
        let locks = Locks::open(&url).await.unwrap();
        until("the warning arrives", async || {
            locks.warnings().iter().any(|warning| warning.contains("notifications unavailable"))
        })
        .await;
        let (before, start) = (made(), Instant::now());
        let searches = sentinel.faults().connections();
        tokio::time::sleep(4 * SECOND).await;
        let (made, seconds) = (made() - before, start.elapsed().as_secs());
        assert!(made < 3 * (seconds + 1), "{made} connections in {seconds} s");
        assert_eq!(sentinel.faults().connections(), searches, "nobody searches for a primary");
        assert_eq!(primary.command(&["ACL", "SETUSER", "quiet", "+subscribe"]), "OK");
        until("subscribed", async || primary.command(&["PUBSUB", "CHANNELS"]).contains("stanchion:session:")).await;
    });
}

/// A server with an untrusted certificate is rejected at once, and so is one with another name.
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
        assert_eq!(error.kind(), ErrorKind::Unavailable, "plain text meets a TLS port: {error}");
        let error = Locks::open(&format!("rediss://127.0.0.1:{port}?ca_file=/nowhere")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    });
}

/// A server that cannot serve for a while causes an error of the right kind with a known outcome, and recovers without
/// help.
#[test]
fn recovered_server_is_used_without_help() {
    let server = RedisServer::with(
        Kind::Redis7,
        &["--enable-debug-command", "yes", "--enable-protected-configs", "yes", "--maxclients", "20"],
    );
    let port = server.port();
    block_on(async {
        let environment = store(port);
        let actor = environment.client().await;
        let is_rejected = async |kind: ErrorKind, expected: &str| {
            let mut last = String::new();
            until(expected, async || match actor.store.acquire(actor.request(&key(expected))).await {
                Ok(_) => false,
                Err(error) => {
                    last = error.to_string();
                    assert!(!error.is_in_doubt(), "{error}");
                    last.contains(expected) && error.kind() == kind
                }
            })
            .await;
        };
        let recovers = async |what: &str| {
            until(what, async || {
                let reply = actor.store.acquire(actor.request(&key(what))).await;
                reply.is_ok_and(|reply| matches!(reply.outcome, AcquireOutcome::Granted(_)))
            })
            .await;
        };
        // MISCONF: snapshots fail, because their folder is gone.
        let folder = server.folder().join("gone");
        std::fs::create_dir(&folder).unwrap();
        server.command(&["CONFIG", "SET", "dir", folder.to_str().unwrap()]);
        server.command(&["CONFIG", "SET", "save", "3600 100000"]);
        std::fs::remove_dir(&folder).unwrap();
        server.command(&["BGSAVE"]);
        is_rejected(ErrorKind::Misconfigured, "cannot save its data").await;
        server.command(&["CONFIG", "SET", "dir", server.folder().to_str().unwrap()]);
        until("a snapshot", async || {
            server.command(&["BGSAVE"]);
            server.command(&["INFO", "persistence"]).contains("rdb_last_bgsave_status:ok")
        })
        .await;
        recovers("after MISCONF").await;
        // Too many clients: the server rejects new connections.
        let mut crowd = Vec::new();
        for _ in 0..40 {
            crowd.push(std::net::TcpStream::connect(("127.0.0.1", port)).unwrap());
        }
        let newcomer = store(port).open();
        let mut reported = None;
        until("rejected", async || {
            reported = newcomer.inspect(&key("k")).await.err();
            reported.is_some()
        })
        .await;
        let error = reported.unwrap();
        assert_eq!((error.is_transient(), error.is_in_doubt()), (true, false), "{error}");
        assert!(error.to_string().contains("too many clients (maxclients)"), "{error}");
        drop(crowd);
        until("a connection is free", async || newcomer.inspect(&key("k")).await.is_ok()).await;
        // LOADING: each key takes a while.
        server.command(&["DEBUG", "POPULATE", "3000"]);
        server.command(&["CONFIG", "SET", "key-load-delay", "1000"]);
        server.command(&["CONFIG", "SET", "loading-process-events-interval-bytes", "1024"]);
        std::thread::scope(|scope| {
            let reload = scope.spawn(|| server.command(&["DEBUG", "RELOAD"]));
            let loading = block_on_thread(|| {
                let actor = &actor;
                async move {
                    let mut reported = None;
                    until("loading", async || {
                        reported = actor.store.inspect(&key("k")).await.err();
                        reported.is_some()
                    })
                    .await;
                    reported.unwrap()
                }
            });
            assert_eq!((loading.kind(), loading.is_in_doubt()), (ErrorKind::Unavailable, false), "{loading}");
            assert!(loading.to_string().contains("loading its data"), "{loading}");
            assert_eq!(reload.join().unwrap(), "OK");
        });
        server.command(&["CONFIG", "SET", "key-load-delay", "0"]);
        recovers("after LOADING").await;
        // MASTERDOWN: a replica without its primary that rejects every command.
        server.command(&["CONFIG", "SET", "replica-serve-stale-data", "no"]);
        server.command(&["REPLICAOF", "127.0.0.1", "1"]);
        let error = actor.store.acquire(actor.request(&key("k"))).await.unwrap_err();
        println!("without a primary: {error}");
        assert_eq!((error.kind(), error.is_in_doubt()), (ErrorKind::Unavailable, false), "{error}");
        assert!(error.to_string().contains("lost its primary"), "{error}");
        server.command(&["REPLICAOF", "NO", "ONE"]);
        recovers("after MASTERDOWN").await;
    });
}

/// A user without a password still authenticates, and is not the default user.
#[test]
fn user_without_password_authenticates() {
    let server = RedisServer::start(Kind::Redis7);
    let rights = ["ACL", "SETUSER", "alice", "on", "nopass", "~alice:*", "&alice:*", "+@all", "-acl"];
    assert_eq!(server.command(&rights), "OK");
    assert_eq!(server.command(&["ACL", "SETUSER", "bob", "on", ">pw", "~*", "&*", "+@all"]), "OK");
    let port = server.port();
    block_on(async {
        let locks = Locks::open(&format!("redis://alice@127.0.0.1:{port}?prefix=alice")).await.unwrap();
        locks.lock("k").await.unwrap().release().await.unwrap();
        assert!(server.command(&["CLIENT", "LIST"]).contains("user=alice"));
        let error = Locks::open(&format!("redis://alice@127.0.0.1:{port}")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "alice may not use this prefix: {error}");
        for user in ["bob", "nobody"] {
            let error = Locks::open(&format!("redis://{user}@127.0.0.1:{port}")).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unauthorized, "{user}: {error}");
        }
    });
}

/// A database that the server does not have is a mistake in the URL.
#[test]
fn missing_database_is_rejected() {
    let server = RedisServer::start(Kind::Redis7);
    let port = server.port();
    block_on(async {
        Locks::open(&format!("redis://127.0.0.1:{port}/15")).await.unwrap();
        let error = Locks::open(&format!("redis://127.0.0.1:{port}/99")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        assert!(error.to_string().contains("the server has no such database"), "{error}");
        // A user without the right to choose a database gets another error.
        server.command(&["ACL", "SETUSER", "default", "-select"]);
        let error = Locks::open(&format!("redis://127.0.0.1:{port}/15")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
        assert!(error.to_string().contains("lacks a right"), "{error}");
        server.command(&["CONFIG", "SET", "requirepass", "secret"]);
        let error = Locks::open(&format!("redis://127.0.0.1:{port}/15")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unauthorized, "{error}");
        assert!(error.to_string().contains("requires a user or a password"), "{error}");
        // A node of a cluster has one database.
        let node = RedisServer::with(Kind::Redis7, &["--cluster-enabled", "yes"]);
        let error = Locks::open(&format!("redis://127.0.0.1:{}/1", node.port())).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Misconfigured, "{error}");
        assert!(error.to_string().contains("use `redis+cluster://`"), "{error}");
    });
}

/// Opening takes few round trips, so a distant server is reached within one attempt.
#[test]
fn distant_server_can_be_opened() {
    let server = RedisServer::start(Kind::Redis7);
    let proxy = Proxy::start(server.port(), 1);
    proxy.faults().delay_answers(Duration::from_millis(300));
    block_on(async {
        let locks = locks(proxy.port()).await;
        let warnings = locks.warnings();
        assert!(warnings.iter().any(|warning| warning.contains("set `appendonly yes`")), "{warnings:?}");
        locks.lock("k").await.unwrap().release().await.unwrap();
    });
}

/// Each server of a cluster stores locks, so a single server that evicts keys is rejected.
#[test]
fn every_server_is_checked() {
    let cluster = RedisCluster::start(Kind::Redis7, false);
    let url = format!("redis+cluster://{}", cluster.hosts());
    block_on(async {
        for node in cluster.nodes() {
            node.command(&["CONFIG", "SET", "maxmemory", "100mb"]);
            node.command(&["CONFIG", "SET", "maxmemory-policy", "allkeys-lru"]);
            let error = Locks::open(&url).await.map(drop).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Misconfigured, "{error}");
            assert!(error.to_string().contains(&format!("127.0.0.1:{}: the server evicts", node.port())), "{error}");
            node.command(&["CONFIG", "SET", "maxmemory-policy", "noeviction"]);
        }
        let reported = Locks::open(&url).await.unwrap().warnings();
        let about_the_disk = reported.iter().filter(|warning| warning.contains("set `appendonly yes`")).count();
        assert_eq!(about_the_disk, 1, "a common warning is reported once: {reported:?}");
        // A server that cannot be checked causes a warning, and the others are used all the same.
        for node in cluster.nodes() {
            node.command(&["CONFIG", "SET", "cluster-require-full-coverage", "no"]);
        }
        for signal in ["STOP", "KILL"] {
            let last = cluster.nodes().last().unwrap();
            last.process().unwrap().signal(signal);
            let expected = format!("127.0.0.1:{}: its settings were not checked", last.port());
            // One session in three belongs to the unavailable server, and is not served.
            let hasty = RetryPolicy { total: 3 * SECOND, ..RetryPolicy::default() };
            until("the store opens without it", async || {
                let open = || Locks::builder(&url).retry(hasty.clone()).open().into_future();
                let all = futures_util::future::join_all((0..6).map(|_| open())).await;
                for error in all.iter().filter_map(|opened| opened.as_ref().err()) {
                    assert!(error.is_transient(), "{error}");
                }
                let mut opened = all.into_iter().flatten().peekable();
                let is_one = opened.peek().is_some();
                for reported in opened.map(|locks| locks.warnings()) {
                    assert!(reported.iter().any(|warning| warning.contains(&expected)), "{reported:?}");
                }
                is_one
            })
            .await;
        }
    });
}
