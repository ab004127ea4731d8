//! Clusters whose nodes know little: fresh, reset, cut off, replicas, silent.

use std::net::TcpListener;
use std::time::Instant;

use stanchion::store::{AcquireOutcome, EndOutcome, Redis};
use stanchion::{ErrorKind, Locks, Store};
use stanchion_testkit::servers::{Redis as Kind, RedisCluster, RedisServer};
use stanchion_testkit::{Environment, block_on, until};

use super::SECOND;

/// A key that this node of a cluster serves.
fn key_at(node: &RedisServer) -> String {
    let is_there = |name: &String| !node.command(&["GET", &format!("stanchion:{{:{name}}}")]).starts_with("MOVED");
    (0..1_000).map(|turn| format!("k{turn}")).find(is_there).unwrap()
}

/// Takes and releases it, as often as it takes until that works.
async fn works(locks: &Locks, key: &str) {
    until("it works", async || match locks.lock(key).wait(SECOND).await {
        Ok(guard) => guard.release().await.is_ok(),
        Err(_) => false,
    })
    .await;
}

/// The first replica takes the place of its primary, and all nodes know.
async fn replaced(cluster: &RedisCluster) {
    let (replica, primary) = (&cluster.nodes()[3], &cluster.nodes()[0]);
    until("a replica that takes over", async || {
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
fn a_seed_that_belongs_to_no_cluster_is_passed_over() {
    let cluster = RedisCluster::start(Kind::Redis7, false);
    let stranger = RedisCluster::stranger(Kind::Redis7);
    block_on(async {
        let url = format!("redis+cluster://127.0.0.1:{},{}", stranger.port(), cluster.hosts());
        let locks = Locks::open(&url).await.unwrap();
        locks.lock("k").await.unwrap().release().await.unwrap();
        // Alone it is no cluster, and that is told.
        let error = Locks::open(&format!("redis+cluster://127.0.0.1:{}", stranger.port())).await.unwrap_err();
        assert!(error.is_transient() && error.to_string().contains("knows no servers of a cluster"), "{error}");
    });
}

#[test]
fn a_node_that_was_taken_out_of_the_cluster_is_passed_over() {
    let cluster = RedisCluster::start(Kind::Redis7, true);
    block_on(async {
        let url = format!("redis+cluster://{}", cluster.hosts());
        let locks = Locks::builder(&url).session_ttl(60 * SECOND).open().await.unwrap();
        let key = key_at(&cluster.nodes()[0]);
        locks.lock(&key).await.unwrap().release().await.unwrap();
        replaced(&cluster).await;
        assert_eq!(cluster.nodes()[0].command(&["CLUSTER", "RESET", "HARD"]), "OK");
        works(&locks, &key).await;
    });
}

/// A primary that lost the others, and was replaced, goes on telling the map that it knew.
#[test]
fn a_node_that_is_cut_off_from_the_cluster_is_passed_over() {
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
        // Whom it has forgotten it does not listen to.
        for id in &ids[1..] {
            assert_eq!(nodes[0].command(&["CLUSTER", "FORGET", id]), "OK");
        }
        until("it is cut off", async || nodes[0].command(&["CLUSTER", "INFO"]).contains("cluster_state:fail")).await;
        assert_eq!(nodes[3].command(&["CLUSTER", "FAILOVER", "TAKEOVER"]), "OK");
        until("it is replaced", async || {
            let nodes = nodes[1].command(&["CLUSTER", "NODES"]);
            nodes.lines().any(|line| line.starts_with(&ids[3]) && line.ends_with("0-5460"))
        })
        .await;
        assert!(nodes[0].command(&["CLUSTER", "SLOTS"]).contains("5460"), "it tells what it knew");
        for key in &keys {
            works(&locks, key).await;
        }
        // Another process begins with it.
        let locks = Locks::builder(&url).session_ttl(60 * SECOND).open().await.unwrap();
        for key in &keys {
            works(&locks, key).await;
        }
    });
}

#[test]
fn a_replica_is_enough_to_find_the_cluster() {
    let cluster = RedisCluster::start(Kind::Redis7, true);
    block_on(async {
        let locks = Locks::open(&format!("redis+cluster://127.0.0.1:{}", cluster.nodes()[4].port())).await.unwrap();
        for turn in 0..20 {
            locks.lock(format!("k{turn}")).await.unwrap().release().await.unwrap();
        }
    });
}

#[test]
fn a_seed_that_is_silent_is_passed_over() {
    let cluster = RedisCluster::start(Kind::Redis7, false);
    // The kernel takes connections, and nobody answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    block_on(async {
        let silent = silent.local_addr().unwrap().port();
        let url = format!("redis+cluster://127.0.0.1:{silent},{}", cluster.hosts());
        for attempt in [2 * SECOND, SECOND / 2] {
            let retry = stanchion::RetryPolicy { attempt, ..Default::default() };
            let locks = Locks::builder(&url).retry(retry).open().await.unwrap();
            locks.lock("k").await.unwrap().release().await.unwrap();
        }
    });
}

/// A slot that is being moved: what its next server refuses is told as what any other refuses.
#[test]
fn what_is_refused_after_a_redirection_has_its_kind() {
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
        let actor = Environment::new(move || Redis::from_url(&url).unwrap()).actor().await;
        let expect = async |says: &str| {
            let error = actor.store.acquire(actor.request(&key)).await.unwrap_err();
            assert_eq!((error.kind(), error.is_in_doubt()), (ErrorKind::Unavailable, false), "{error}");
            assert!(error.to_string().contains(says), "{error}");
        };
        // The server has all keys of the lock, or none: with some of them a slot that moves serves nobody.
        let (token, _) = actor.takes(&key).await;
        actor.queues(&key).await;
        assert_eq!(from.command(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &to.command(&["CLUSTER", "MYID"])]), "OK");
        let import = ["CLUSTER", "SETSLOT", &slot, "IMPORTING", &from.command(&["CLUSTER", "MYID"])];
        assert_eq!(to.command(&import), "OK");
        for part in ["", ":queue", ":waiting"] {
            let (name, port) = (format!("stanchion:{{:{name}}}{part}"), to.port().to_string());
            assert_eq!(from.command(&["MIGRATE", "127.0.0.1", &port, &name, "0", "5000"]), "OK");
        }
        // Here the script comes to be known there.
        assert!(matches!(actor.ask(&actor.request(&key)).await, AcquireOutcome::Queued(_)));
        let before = clients();
        to.command(&["CONFIG", "SET", "maxmemory", "1"]);
        expect("out of memory").await;
        to.command(&["CONFIG", "SET", "maxmemory", "0"]);
        to.command(&["CONFIG", "SET", "min-replicas-to-write", "1"]);
        expect("too few replicas").await;
        to.command(&["CONFIG", "SET", "min-replicas-to-write", "0"]);
        // It forgets that the slot comes, and sends everybody back.
        assert_eq!(to.command(&["CLUSTER", "SETSLOT", &slot, "STABLE"]), "OK");
        expect("from node to node").await;
        assert_eq!(to.command(&import), "OK");
        assert_eq!(actor.releases(&key, token).await, EndOutcome::Released);
        assert_eq!(clients(), before, "a connection over which something was refused is good");
    });
}

/// Nodes that are to be called by a name, and have none.
#[test]
fn nodes_without_a_name_are_found() {
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
        // The redirection names nobody either.
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

/// A slot that no node serves, where the others go on: nobody asks for the map all the time.
#[test]
#[ignore = "long"]
fn a_slot_without_a_server_is_not_looked_for_in_haste() {
    let cluster = RedisCluster::start(Kind::Redis7, false);
    let nodes = cluster.nodes();
    for node in nodes {
        assert_eq!(node.command(&["CONFIG", "SET", "cluster-require-full-coverage", "no"]), "OK");
    }
    let questions = || -> u64 {
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
        // Not the slot of the session.
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
        let (before, start) = (questions(), Instant::now());
        tokio::time::sleep(4 * SECOND).await;
        let (asked, seconds) = (questions() - before, start.elapsed().as_secs());
        assert!(asked < 2 * (seconds + 1), "{asked} questions in {seconds} s");
        assert_eq!(owner.unwrap().command(&["CLUSTER", "ADDSLOTS", &slot]), "OK");
        works(&locks, &key).await;
    });
}
