//! Uses servers that lose data or lag behind: restarts, replicas, clocks.

use std::collections::HashSet;

use stanchion::store::{AcquireOutcome, Redis};
use stanchion::{ErrorKind, Locks, LossCause, Store};
use stanchion_testkit::proxy::Proxy;
use stanchion_testkit::servers::{Redis as Kind, RedisCluster, RedisServer};
use stanchion_testkit::{Environment, block_on, until};

use super::{SECOND, is_free, key, locks, store, url};

/// The server loses everything: holders are notified, and fences continue to rise.
#[test]
fn empty_restart_notifies_and_repeats_no_fence() {
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
            assert_eq!(fixed.loss(), Some(LossCause::Missing), "the keeper checked it when the subscription recovered");
            until("the session is open", async || locks.try_lock("any").await.is_ok()).await;
            let next = locks.lock("k").await.unwrap();
            assert!(next.fence() > guard.fence());
            next.release().await.unwrap();
        }
    });
}

/// Fails over a thousand times and loses writes, while the old primary continues to grant together with the new one. A
/// plain counter repeats; fences do not.
#[test]
#[ignore = "long"]
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
            // From here on no write reaches the new primary.
            servers[new].command(&["REPLICAOF", "NO", "ONE"]);
            // The new primary may have the first grant, but never the second one.
            for primary in [old, old, new] {
                let actor = stores[primary].client().await;
                let (token, granted) = actor.lock(&key("k")).await;
                assert!(fences.insert(granted.fence), "failover {turn}: {:?} twice", granted.fence);
                assert!(granted.fence.get() > last, "failover {turn}: {:?} after {last}", granted.fence);
                last = granted.fence.get();
                actor.release(&key("k"), token).await;
                repeated += usize::from(!counts.insert(servers[primary].command(&["INCR", "control"])));
            }
        }
        assert_eq!(fences.len(), 3 * FAILOVERS);
        assert!(repeated >= FAILOVERS * 9 / 10, "the control repeats: {repeated} of {FAILOVERS}");
    });
}

/// A new primary may have the session and lack a hold, so the keeper checks every hold when it reconnects.
#[test]
fn missing_hold_is_a_loss() {
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

/// A server of a cluster to which no session listens restarts empty. This is noticed, and the forgotten holds are
/// reported as lost.
#[test]
fn hold_forgotten_by_another_node_is_lost() {
    let mut cluster = RedisCluster::start(Kind::Redis7, false);
    block_on(async {
        let url = format!("redis+cluster://{}", cluster.hosts());
        let locks = Locks::builder(&url).session_ttl(20 * SECOND).open().await.unwrap();
        let listens = |at: &usize| cluster.nodes()[*at].command(&["PUBSUB", "CHANNELS"]).contains("session");
        let at = (0..3).find(|at| !listens(at)).unwrap();
        let names: Vec<_> = (0..100).map(|turn| format!("k{turn}")).collect();
        let is_there = |name: &&String| {
            let record = format!("stanchion:{{:{name}}}");
            !cluster.nodes()[at].command(&["GET", &record]).starts_with("MOVED")
        };
        let guard = locks.lock(names.iter().find(is_there).unwrap().as_str()).await.unwrap();
        let elsewhere = locks.lock(names.iter().find(|name| !is_there(name)).unwrap().as_str()).await.unwrap();
        cluster.nodes_mut()[at].kill();
        cluster.nodes_mut()[at].restart();
        tokio::time::timeout(30 * SECOND, guard.lost()).await.unwrap();
        assert_eq!(guard.loss(), Some(LossCause::Missing));
        assert!(elsewhere.is_held());
    });
}

/// A grant that too few replicas have does not count, and leaves nothing.
#[test]
fn min_replicas_rejects_unreplicated_grants() {
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

/// The name leads to another server between a grant and the check of its replicas. The other server has replicas, and
/// nothing of the grant.
#[test]
fn min_replicas_checks_the_granting_server() {
    let (first, other) = (RedisServer::start(Kind::Redis7), RedisServer::start(Kind::Redis7));
    let replica = RedisServer::with(Kind::Redis7, &["--replicaof", &format!("127.0.0.1 {}", other.port())]);
    stanchion_testkit::servers::wait("linked", || {
        replica.command(&["INFO", "replication"]).contains("master_link_status:up")
    });
    let proxy = Proxy::start(first.port(), 1);
    let url = format!("{}?min_replicas=1", url(proxy.port()));
    block_on(async {
        let environment = Environment::new(move || Redis::from_url(&url).unwrap());
        let (actor, observer) = (environment.client().await, store(first.port()).client().await);
        let error = actor.store.acquire(actor.request(&key("before"))).await.unwrap_err();
        assert_eq!((error.kind(), error.is_in_doubt()), (ErrorKind::Unavailable, true), "{error}");
        assert!(error.to_string().contains("0 replicas have the grant"), "{error}");
        proxy.faults().hold_answers(true);
        let asking = tokio::spawn({
            let (store, request) = (actor.store.clone(), actor.request(&key("k")));
            async move { store.acquire(request).await }
        });
        until("granted", async || observer.is_locked(&key("k")).await).await;
        // A request that stays unanswered for long makes its connection suspect, so the next request uses another one.
        let (before, other_key) = (proxy.faults().connections(), key("other"));
        let unanswered = tokio::time::timeout(SECOND * 6 / 5, actor.store.inspect(&other_key)).await;
        assert!(unanswered.is_err());
        proxy.faults().lead_to(other.port());
        let next = tokio::spawn({
            let store = actor.store.clone();
            async move { store.inspect(&other_key).await }
        });
        until("another connection", async || proxy.faults().connections() > before).await;
        proxy.faults().hold_answers(false);
        let error = asking.await.unwrap().unwrap_err();
        assert_eq!((error.kind(), error.is_in_doubt()), (ErrorKind::Unavailable, true), "{error}");
        next.await.unwrap().unwrap();
        assert!(observer.is_locked(&key("k")).await, "the grant stays in spite of the error");
    });
}

/// A request that is repeated over another connection finds the grant there: the replicas must have it all the same.
#[test]
#[ignore = "long"]
fn min_replicas_applies_to_repeated_requests() {
    for kind in [Kind::Redis7, Kind::Redis8, Kind::Valkey9] {
        let primary = RedisServer::start(kind);
        let replica = RedisServer::with(kind, &["--replicaof", "127.0.0.1", &primary.port().to_string()]);
        stanchion_testkit::servers::wait("linked", || {
            replica.command(&["INFO", "replication"]).contains("master_link_status:up")
        });
        let url = format!("{}?min_replicas=1", url(primary.port()));
        block_on(async {
            let environment = Environment::new(move || Redis::from_url(&url).unwrap());
            let actor = environment.client().await;
            replica.process().unwrap().signal("STOP");
            let request = actor.request(&key("k"));
            for _ in 0..2 {
                let error = actor.store.acquire(request.clone()).await.unwrap_err();
                assert!(error.to_string().contains("0 replicas have the grant"), "{kind:?}: {error}");
                primary.command(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
                // The first request notices that the connection is gone.
                until("connected again", async || actor.store.inspect(&key("other")).await.is_ok()).await;
            }
            replica.process().unwrap().signal("CONT");
            until("the replicas have it", async || actor.store.acquire(request.clone()).await.is_ok()).await;
        });
    }
}

/// A server that was demoted and isolated lacks newer renewals, so it must not mark a session as expired.
#[test]
fn stale_replica_expires_no_session() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let environment = store(server.port());
        let actor = environment.client_with_ttl(SECOND).await;
        actor.lock(&key("k")).await;
        // A replica without a primary still serves its data.
        server.command(&["REPLICAOF", "127.0.0.1", "1"]);
        // By the server's clock the session has expired then.
        tokio::time::sleep(SECOND + SECOND / 4).await;
        let error = actor.store.acquire(actor.request(&key("other"))).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        server.command(&["REPLICAOF", "NO", "ONE"]);
        until("a primary reports it", async || {
            let reply = actor.store.acquire(actor.request(&key("other"))).await;
            reply.is_ok_and(|reply| reply.outcome == AcquireOutcome::SessionGone)
        })
        .await;
        // An expired session cannot become alive again, neither by opening nor by renewing it.
        let renewed = actor.store.renew_session(actor.session).await.unwrap().outcome;
        assert_eq!(renewed, stanchion::store::RenewOutcome::Gone);
    });
}

/// The server's clock was set back behind the last fence: fences continue to rise, for every kind of request.
#[test]
fn setting_the_clock_back_lowers_no_fence() {
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
        assert!(server.command(&["INFO", "commandstats"]).contains("cmdstat_mget:"), "calls were batched");
    });
}

/// A new primary may lack a release: the hold is back, and its session is alive. A waiter makes its holder release it.
#[test]
fn waiter_repeats_a_forgotten_release() {
    let server = RedisServer::start(Kind::Redis7);
    block_on(async {
        let (first, other) = (locks(server.port()).await, locks(server.port()).await);
        let guard = first.lock("k").await.unwrap();
        let record = server.command(&["GET", "stanchion:{:k}"]);
        guard.release().await.unwrap();
        server.command(&["SET", "stanchion:{:k}", &record]);
        assert!(other.try_lock("k").await.unwrap().is_none());
        drop(other.lock("k").wait(20 * SECOND).await.unwrap());
        // A real or detached hold stays.
        let held = first.lock("held").await.unwrap();
        let detached = first.lock("detached").await.unwrap().detach();
        for key in ["held", "detached"] {
            let error = other.lock(key).wait(4 * SECOND).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
        }
        held.check().unwrap();
        drop(first.adopt(detached).await.unwrap());
    });
}

/// The new primary may also lack the release of the next waiter. The head of the queue then belongs to nobody, and
/// never polls.
#[test]
fn waiter_repeats_several_forgotten_releases() {
    let server = RedisServer::start(Kind::Redis7);
    let names = ["", ":queue", ":waiting"].map(|end| (format!("stanchion:{{:k}}{end}"), format!("copy:{{:k}}{end}")));
    block_on(async {
        let (first, other) = (locks(server.port()).await, locks(server.port()).await);
        let guard = first.lock("k").await.unwrap();
        let waiting: Vec<_> = (0..2).map(|_| tokio::spawn(first.lock("k").into_future())).collect();
        until("queued", async || first.inspect("k").await.unwrap().waiters.len() == 2).await;
        for (name, kept) in &names {
            assert_eq!(server.command(&["COPY", name, kept]), "1");
        }
        guard.release().await.unwrap();
        for waiting in waiting {
            waiting.await.unwrap().unwrap().release().await.unwrap();
        }
        for (name, kept) in &names {
            assert_eq!(server.command(&["RENAME", kept, name]), "OK");
        }
        drop(other.lock("k").wait(60 * SECOND).await.unwrap());
        until("nothing is left", async || is_free(&other, "k").await).await;
    });
}
