//! Primaries that are replaced, and slots that move, under load.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use stanchion::Locks;
use stanchion_testkit::servers::{Redis as Kind, RedisCluster, RedisSentinel};
use stanchion_testkit::{block_on, until};

use super::SECOND;

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
