//! Uses clusters with nodes that know little: fresh, reset, isolated, replicas, unresponsive.

use std::net::TcpListener;
use std::time::Instant;

use stanchion::store::{AcquireOutcome, EndOutcome, Redis};
use stanchion::{ErrorKind, Locks, Store};
use stanchion_testkit::servers::{Redis as Kind, RedisCluster, RedisServer};
use stanchion_testkit::{Environment, block_on, until};

use super::SECOND;

/// Returns a key that this node of a cluster serves.
fn key_at(node: &RedisServer) -> String {
    let is_there = |name: &String| !node.command(&["GET", &format!("stanchion:{{:{name}}}")]).starts_with("MOVED");
    (0..1_000).map(|turn| format!("k{turn}")).find(is_there).unwrap()
}

/// Locks and releases a key, until that works.
async fn until_it_works(locks: &Locks, key: &str) {
    until("the lock works", async || match locks.lock(key).wait(SECOND).await {
        Ok(guard) => guard.release().await.is_ok(),
        Err(_) => false,
    })
    .await;
}

/// Promotes the first replica, and waits until all nodes know of it.
async fn replace_primary(cluster: &RedisCluster) {
    let (replica, primary) = (&cluster.nodes()[3], &cluster.nodes()[0]);
    until("the replica takes over", async || {
        replica.command(&["CLUSTER", "FAILOVER"]);
        replica.command(&["ROLE"]).starts_with("master") && primary.command(&["ROLE"]).starts_with("slave")
    })
    .await;
    let id = replica.command(&["CLUSTER", "MYID"]);
    for node in cluster.nodes() {
        until("the new primary is known", async || {
            let nodes = node.command(&["CLUSTER", "NODES"]);
            nodes.lines().any(|line| line.starts_with(&id) && line.contains("master") && line.ends_with("0-5460"))
        })
        .await;
    }
}

#[test]
fn seed_without_a_cluster_is_skipped() {
    let cluster = RedisCluster::start(Kind::Redis7, false);
    let stranger = RedisCluster::stranger(Kind::Redis7);
    block_on(async {
        let url = format!("redis+cluster://127.0.0.1:{},{}", stranger.port(), cluster.hosts());
        let locks = Locks::open(&url).await.unwrap();
        locks.lock("k").await.unwrap().release().await.unwrap();
        // The seed alone is no cluster, and the error reports that.
        let error = Locks::open(&format!("redis+cluster://127.0.0.1:{}", stranger.port())).await.unwrap_err();
        assert!(error.is_transient() && error.to_string().contains("names no servers of a cluster"), "{error}");
    });
}

#[test]
fn removed_node_is_skipped() {
    let cluster = RedisCluster::start(Kind::Redis7, true);
    block_on(async {
        let url = format!("redis+cluster://{}", cluster.hosts());
        let locks = Locks::builder(&url).session_ttl(60 * SECOND).open().await.unwrap();
        let key = key_at(&cluster.nodes()[0]);
        locks.lock(&key).await.unwrap().release().await.unwrap();
        replace_primary(&cluster).await;
        assert_eq!(cluster.nodes()[0].command(&["CLUSTER", "RESET", "HARD"]), "OK");
        until_it_works(&locks, &key).await;
    });
}

/// A primary that lost the others, and was replaced, still reports its old map.
#[test]
fn isolated_node_is_skipped() {
    let cluster = RedisCluster::start(Kind::Redis7, true);
    let nodes = cluster.nodes();
    let ids: Vec<_> = nodes.iter().map(|node| node.command(&["CLUSTER", "MYID"])).collect();
    block_on(async {
        let url = format!("redis+cluster://{}", cluster.hosts());
        let locks = Locks::builder(&url).session_ttl(60 * SECOND).open().await.unwrap();
        let keys = [0, 1, 2].map(|at| key_at(&nodes[at]));
        for key in &keys {
            locks.lock(key).await.unwrap().release().await.unwrap();
        }
        // A node ignores the nodes that it has forgotten.
        for id in &ids[1..] {
            assert_eq!(nodes[0].command(&["CLUSTER", "FORGET", id]), "OK");
        }
        until("the node is isolated", async || nodes[0].command(&["CLUSTER", "INFO"]).contains("cluster_state:fail"))
            .await;
        assert_eq!(nodes[3].command(&["CLUSTER", "FAILOVER", "TAKEOVER"]), "OK");
        until("the node is replaced", async || {
            let nodes = nodes[1].command(&["CLUSTER", "NODES"]);
            nodes.lines().any(|line| line.starts_with(&ids[3]) && line.ends_with("0-5460"))
        })
        .await;
        assert!(nodes[0].command(&["CLUSTER", "SLOTS"]).contains("5460"), "the node reports its old map");
        for key in &keys {
            until_it_works(&locks, key).await;
        }
        // Another process starts with the isolated node.
        let locks = Locks::builder(&url).session_ttl(60 * SECOND).open().await.unwrap();
        for key in &keys {
            until_it_works(&locks, key).await;
        }
    });
}

#[test]
fn replica_seed_finds_the_cluster() {
    let cluster = RedisCluster::start(Kind::Redis7, true);
    block_on(async {
        let locks = Locks::open(&format!("redis+cluster://127.0.0.1:{}", cluster.nodes()[4].port())).await.unwrap();
        for turn in 0..20 {
            locks.lock(format!("k{turn}")).await.unwrap().release().await.unwrap();
        }
    });
}

#[test]
fn unresponsive_seed_is_skipped() {
    let cluster = RedisCluster::start(Kind::Redis7, false);
    // The kernel accepts connections, but no process answers.
    let unresponsive = TcpListener::bind("127.0.0.1:0").unwrap();
    block_on(async {
        let unresponsive = unresponsive.local_addr().unwrap().port();
        let url = format!("redis+cluster://127.0.0.1:{unresponsive},{}", cluster.hosts());
        for attempt in [2 * SECOND, SECOND / 2] {
            let retry = stanchion::RetryPolicy { attempt, ..Default::default() };
            let locks = Locks::builder(&url).retry(retry).open().await.unwrap();
            locks.lock("k").await.unwrap().release().await.unwrap();
        }
    });
}

/// While a slot is being moved, a rejection by its next server is reported as that of any other server.
#[test]
fn redirected_rejection_keeps_its_kind() {
    let cluster = RedisCluster::start(Kind::Redis7, false);
    let [from, to, _] = cluster.nodes() else { panic!("three nodes") };
    let name = key_at(from);
    let (key, slot) = (super::key(&name), from.command(&["CLUSTER", "KEYSLOT", &format!("stanchion:{{:{name}}}")]));
    let clients = || -> Vec<String> {
        let list = to.command(&["CLIENT", "LIST", "TYPE", "normal"]);
        let ours = list.lines().filter(|line| line.contains(" addr=127.0.0.1:"));
        ours.map(|line| line.split(' ').next().unwrap().to_owned()).collect()
    };
    block_on(async {
        let url = format!("redis+cluster://{}", cluster.hosts());
        let actor = Environment::new(move || Redis::from_url(&url).unwrap()).client().await;
        let expect = async |expected: &str| {
            let error = actor.store.acquire(actor.request(&key)).await.unwrap_err();
            assert_eq!((error.kind(), error.is_in_doubt()), (ErrorKind::Unavailable, false), "{error}");
            assert!(error.to_string().contains(expected), "{error}");
        };
        // The next server gets all Redis keys of the lock, because a moving slot with only some of them serves nobody.
        let (token, _) = actor.lock(&key).await;
        actor.enqueue(&key).await;
        assert_eq!(from.command(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &to.command(&["CLUSTER", "MYID"])]), "OK");
        let import = ["CLUSTER", "SETSLOT", &slot, "IMPORTING", &from.command(&["CLUSTER", "MYID"])];
        assert_eq!(to.command(&import), "OK");
        for part in ["", ":queue", ":waiting"] {
            let (name, port) = (format!("stanchion:{{:{name}}}{part}"), to.port().to_string());
            assert_eq!(from.command(&["MIGRATE", "127.0.0.1", &port, &name, "0", "5000"]), "OK");
        }
        // This sends the script to the next server.
        assert!(matches!(actor.acquire(&actor.request(&key)).await, AcquireOutcome::Queued(_)));
        let before = clients();
        to.command(&["CONFIG", "SET", "maxmemory", "1"]);
        expect("out of memory").await;
        to.command(&["CONFIG", "SET", "maxmemory", "0"]);
        to.command(&["CONFIG", "SET", "min-replicas-to-write", "1"]);
        expect("too few replicas").await;
        to.command(&["CONFIG", "SET", "min-replicas-to-write", "0"]);
        // The server forgets that it imports the slot, and redirects every request.
        assert_eq!(to.command(&["CLUSTER", "SETSLOT", &slot, "STABLE"]), "OK");
        expect("redirected the request too often").await;
        assert_eq!(to.command(&import), "OK");
        assert_eq!(actor.release(&key, token).await, EndOutcome::Released);
        assert_eq!(clients(), before, "a rejection does not cost the connection");
    });
}

/// The nodes prefer host names, but have none.
#[test]
fn unnamed_nodes_are_found() {
    let cluster = RedisCluster::start(Kind::Redis7, false);
    for node in cluster.nodes() {
        assert_eq!(node.command(&["CONFIG", "SET", "cluster-preferred-endpoint-type", "hostname"]), "OK");
    }
    block_on(async {
        let locks = Locks::open(&format!("redis+cluster://{}", cluster.hosts())).await.unwrap();
        let key = key_at(&cluster.nodes()[1]);
        for node in cluster.nodes() {
            locks.lock(key_at(node)).await.unwrap().release().await.unwrap();
        }
        // The redirection has no name either.
        let slot = cluster.nodes()[0].command(&["CLUSTER", "KEYSLOT", &format!("stanchion:{{:{key}}}")]);
        let id = cluster.nodes()[2].command(&["CLUSTER", "MYID"]);
        for node in cluster.nodes() {
            node.command(&["DEL", &format!("stanchion:{{:{key}}}")]);
            assert_eq!(node.command(&["CLUSTER", "SETSLOT", &slot, "NODE", &id]), "OK");
        }
        let moved = cluster.nodes()[1].command(&["GET", &format!("stanchion:{{:{key}}}")]);
        assert!(moved.starts_with("MOVED") && moved.contains(" ?:"), "{moved}");
        locks.lock(&key).await.unwrap().release().await.unwrap();
    });
}

/// No node serves one slot, while the others work: the map is not queried all the time.
#[test]
#[ignore = "long"]
fn uncovered_slot_is_queried_rarely() {
    let cluster = RedisCluster::start(Kind::Redis7, false);
    let nodes = cluster.nodes();
    for node in nodes {
        assert_eq!(node.command(&["CONFIG", "SET", "cluster-require-full-coverage", "no"]), "OK");
    }
    let queries = || -> u64 {
        let count = |node: &RedisServer| {
            let stats = node.command(&["INFO", "commandstats"]);
            let count = stats.split_once("cmdstat_cluster|slots:calls=")?.1.split(',').next()?;
            count.parse::<u64>().ok()
        };
        nodes.iter().filter_map(count).sum()
    };
    block_on(async {
        let url = format!("redis+cluster://{}", cluster.hosts());
        let locks = Locks::builder(&url).session_ttl(60 * SECOND).open().await.unwrap();
        // A slot other than that of the session.
        let session = nodes.iter().map(|node| node.command(&["PUBSUB", "CHANNELS"])).collect::<String>();
        let slot_of = |name: &str| nodes[0].command(&["CLUSTER", "KEYSLOT", name]);
        let is_another = |key: &String| slot_of(&format!("stanchion:{{:{key}}}")) != slot_of(session.trim());
        let key = (0..).map(|turn| format!("k{turn}")).find(is_another).unwrap();
        let slot = slot_of(&format!("stanchion:{{:{key}}}"));
        let owner = nodes.iter().find(|node| !node.command(&["GET", &format!("x{{:{key}}}")]).starts_with("MOVED"));
        locks.lock(&key).await.unwrap().release().await.unwrap();
        for node in nodes {
            node.command(&["CLUSTER", "DELSLOTS", &slot]);
        }
        let error = locks.lock(&key).wait(3 * SECOND).await.unwrap_err();
        assert!(error.is_transient(), "{error}");
        let (before, start) = (queries(), Instant::now());
        tokio::time::sleep(4 * SECOND).await;
        let (count, seconds) = (queries() - before, start.elapsed().as_secs());
        assert!(count < 2 * (seconds + 1), "{count} queries in {seconds} s");
        assert_eq!(owner.unwrap().command(&["CLUSTER", "ADDSLOTS", &slot]), "OK");
        until_it_works(&locks, &key).await;
    });
}
