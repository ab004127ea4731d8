//! Replaces primaries and moves slots under load.

use std::collections::HashSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use stanchion::{Clock, Fence, Locks};
use stanchion_testkit::servers::{Redis as Kind, RedisCluster, RedisSentinel, RedisServer};
use stanchion_testkit::{block_on, until};

use super::SECOND;

/// The tasks that lock and release all the time, and their grants.
struct Load {
    granted: Arc<Mutex<Vec<(Instant, Fence)>>>,
}

impl Load {
    fn count(&self) -> usize {
        self.granted.lock().unwrap().len()
    }

    /// Returns the time from this moment to the next grant.
    async fn served_after(&self, moment: Instant) -> Duration {
        let first = || self.granted.lock().unwrap().iter().map(|(at, _)| *at).find(|at| *at >= moment);
        until("served again", async || first().is_some()).await;
        first().unwrap().duration_since(moment)
    }
}

/// Locks and releases all the time, with several handles. No fence is granted twice, and each fence is the time of its
/// grant, so it is not lower than an earlier one. Two primaries may exist for a moment. The order in which their
/// clients see their grants means nothing then, but all fences come from the clock of this machine.
async fn under_load(url: &str, during: impl AsyncFnOnce(&Load, &Locks)) {
    let stop = Arc::new(AtomicBool::new(false));
    let load = Load { granted: Arc::default() };
    // The sessions outlive a failover: the hold of an expired one becomes free only after its grace.
    let open = async || Locks::builder(url).session_ttl(6 * SECOND).open().await.unwrap();
    let watcher = open().await;
    let mut tasks = Vec::new();
    for _ in 0..4 {
        let (locks, stop, granted, clock) = (open().await, stop.clone(), load.granted.clone(), Clock::system());
        tasks.push(tokio::spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                let sent_at = clock.wall_micros();
                let Ok(guard) = locks.lock("loaded").wait(20 * SECOND).await else { continue };
                let fence = guard.fence().get();
                assert!((sent_at..=clock.wall_micros()).contains(&fence), "{fence} is not a time since {sent_at}");
                granted.lock().unwrap().push((Instant::now(), guard.fence()));
                tokio::time::sleep(Duration::from_millis(2)).await;
                drop(guard);
            }
        }));
    }
    until("some grants", async || load.count() > 50).await;
    during(&load, &watcher).await;
    let count = load.count();
    until("many grants after it", async || load.count() > count + 50).await;
    stop.store(true, Ordering::SeqCst);
    for task in tasks {
        task.await.unwrap();
    }
    let granted = load.granted.lock().unwrap();
    let fences: HashSet<_> = granted.iter().map(|(_, fence)| *fence).collect();
    assert_eq!(fences.len(), granted.len(), "a fence was granted twice");
}

/// Returns the number of failovers, which `STANCHION_FAILOVERS` overrides.
fn turns() -> usize {
    std::env::var("STANCHION_FAILOVERS").map_or(4, |turns| turns.parse().expect("STANCHION_FAILOVERS is a number"))
}

/// Maximum time from the first write to a new primary until a caller is served again. It takes a tenth of it if nothing
/// else runs.
const SERVED_WITHIN: Duration = Duration::from_secs(5);

/// Returns the first of these servers to accept a write to this key, and the time. It tries every five milliseconds, on
/// a thread that nothing else delays.
async fn first_writable(servers: &[&RedisServer], key: &'static str) -> (u16, Instant) {
    let servers: Vec<_> = servers.iter().map(|server| (server.port(), server.socket())).collect();
    let takes = move |socket: &Path| -> std::io::Result<bool> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(SECOND))?;
        writeln!(stream, "SET {key} 1\r")?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        Ok(answer.starts_with("+OK"))
    };
    let prober = move || {
        let start = Instant::now();
        loop {
            if let Some((port, _)) = servers.iter().find(|(_, socket)| takes(socket).unwrap_or(false)) {
                return (*port, Instant::now());
            }
            assert!(start.elapsed() < 60 * SECOND, "no new primary accepts writes");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    tokio::task::spawn_blocking(prober).await.unwrap()
}

/// Checks the times from each failover to the next grant.
fn check_times(mut spans: Vec<Duration>) {
    spans.sort_unstable();
    let longest = *spans.last().unwrap();
    println!("{} failovers: median {:?}, longest {longest:?}", spans.len(), spans[spans.len() / 2]);
    assert!(longest < SERVED_WITHIN, "served again {longest:?} after the new primary");
}

async fn is_linked(server: &RedisServer) {
    let info = || server.try_command(&["INFO", "replication"]).unwrap_or_default();
    until("the replica is linked", async || info().contains("master_link_status:up")).await;
}

/// Makes a replaced server a replica of this one, and waits until it has all data.
async fn follows(server: &RedisServer, primary: u16) {
    until("the server follows", async || {
        server.try_command(&["REPLICAOF", "127.0.0.1", &primary.to_string()]).is_ok_and(|answer| answer.contains("OK"))
    })
    .await;
    is_linked(server).await;
}

#[test]
#[ignore = "long"]
fn sentinels_replace_primaries_under_load() {
    let mut servers = RedisSentinel::start(Kind::Redis7);
    let url = format!("redis+sentinel://{}/main", servers.hosts());
    block_on(async {
        under_load(&url, async |load, watcher| {
            let mut spans = Vec::new();
            for turn in 0..turns() {
                let held = watcher.lock("held").await.unwrap();
                until("every server is up", async || servers.is_whole()).await;
                let old = servers.primary();
                let start = Instant::now();
                servers.servers[old].kill();
                let others: Vec<_> = (0..3).filter(|at| *at != old).map(|at| &servers.servers[at]).collect();
                let (port, since) = first_writable(&others, "probe").await;
                let named = async {
                    until("the sentinels name it", async || servers.servers[servers.primary()].port() == port).await;
                    since.elapsed()
                };
                let (waited, named) = tokio::join!(load.served_after(since), named);
                println!("turn {turn}: replaced within {:?}, named {named:?} later, served {waited:?}", since - start);
                spans.push(waited);
                servers.servers[old].restart();
                // The sentinels would do that too, eight seconds later.
                follows(&servers.servers[old], port).await;
                // The holder and the store agree on whether the hold survived.
                until("they agree", async || {
                    let state = watcher.inspect("held").await.ok();
                    let there = state.map(|state| state.holders.iter().any(|hold| hold.fence == held.fence()));
                    there == Some(held.is_held()) || held.loss().is_some()
                })
                .await;
            }
            check_times(spans);
        })
        .await;
    });
}

#[test]
#[ignore = "long"]
fn cluster_replaces_primaries_under_load() {
    let mut cluster = RedisCluster::start(Kind::Redis7, true);
    let url = format!("redis+cluster://{}", cluster.hosts());
    // The node with the slot of the loaded key.
    let slot: u16 = cluster.nodes()[0].command(&["CLUSTER", "KEYSLOT", "stanchion:{:loaded}"]).parse().unwrap();
    let at = usize::from(slot > 5_460) + usize::from(slot > 10_922);
    block_on(async {
        under_load(&url, async |load, _| {
            let mut spans = Vec::new();
            for turn in 0..turns() {
                let (old, new) = if turn % 2 == 0 { (at, at + 3) } else { (at + 3, at) };
                let start = Instant::now();
                // In turn, one primary of a pair is killed, and the other hands over without a loss.
                let dies = turn % 4 < 2;
                if dies {
                    cluster.nodes_mut()[old].kill();
                }
                let replica = &cluster.nodes()[new];
                if !dies {
                    // A failover that gave up is tried again.
                    let mut tried = None;
                    until("the replica takes over", async || {
                        if tried.is_none_or(|tried: Instant| tried.elapsed() > 6 * SECOND) {
                            replica.command(&["CLUSTER", "FAILOVER"]);
                            tried = Some(Instant::now());
                        }
                        replica.command(&["ROLE"]).starts_with("master")
                    })
                    .await;
                }
                let (_, since) = first_writable(&[replica], "probe{:loaded}").await;
                let waited = load.served_after(since).await;
                println!("turn {turn}: dies {dies}, replaced within {:?}, served {waited:?} later", since - start);
                spans.push(waited);
                if dies {
                    cluster.nodes_mut()[old].restart();
                }
                is_linked(&cluster.nodes()[old]).await;
            }
            check_times(spans);
        })
        .await;
    });
}

/// A sentinel that missed a failover names a server that still reports itself as a primary. The store ignores it if
/// other sentinels know better, even when a process starts. Nobody waits for an unresponsive sentinel.
#[test]
fn newest_sentinel_report_wins() {
    let (old, new) = (RedisServer::start(Kind::Redis7), RedisServer::start(Kind::Redis7));
    let outdated = RedisSentinel::alone(Kind::Redis7, old.port(), 1);
    let informed = [(); 2].map(|()| RedisSentinel::alone(Kind::Redis7, new.port(), 2));
    let unresponsive = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let hosts = [outdated.port(), informed[0].port(), informed[1].port(), unresponsive.local_addr().unwrap().port()];
    let hosts = hosts.map(|port| format!("127.0.0.1:{port}")).join(",");
    // With the least rights no epochs are reported, and the majority wins.
    for sentinel in informed.iter().chain([&outdated]) {
        let rights = ["on", "nopass", "-@all", "+auth", "+sentinel|get-master-addr-by-name"];
        assert_eq!(sentinel.command(&[&["ACL", "SETUSER", "few"], &rights[..]].concat()), "OK");
    }
    block_on(async {
        for options in ["", "?sentinel_user=few"] {
            for turn in 0..5 {
                let locks = Locks::open(&format!("redis+sentinel://{hosts}/main{options}")).await.unwrap();
                let guard = locks.lock("k").await.unwrap();
                assert_eq!(old.command(&["DBSIZE"]), "0", "turn {turn} {options}");
                assert_eq!(new.command(&["EXISTS", "stanchion:{:k}"]), "1", "turn {turn} {options}");
                guard.release().await.unwrap();
            }
        }
        let all_clients = informed.iter().map(|sentinel| sentinel.command(&["ACL", "LOG"]));
        assert!(all_clients.collect::<String>().contains("few"), "the user with few rights was used");
    });
}

/// A slot is moved while it is used: the store follows `ASK`, `TRYAGAIN` and `MOVED`, and loses nothing.
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
        under_load(&url, async |load, _| {
            for (from, to) in [(from, to), (to, from)] {
                nodes[to].command(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &ids[from]]);
                nodes[from].command(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &ids[to]]);
                let port = nodes[to].port().to_string();
                // New keys may appear in the meantime, so this continues until none is left.
                loop {
                    let keys = nodes[from].command(&["CLUSTER", "GETKEYSINSLOT", &slot, "100"]);
                    let Some(key) = keys.lines().next() else { break };
                    nodes[from].command(&["MIGRATE", "127.0.0.1", &port, key, "0", "5000"]);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                let count = load.count();
                until("grants in a moving slot", async || load.count() > count + 10).await;
                for node in [to, from, 3 - to - from] {
                    nodes[node].command(&["CLUSTER", "SETSLOT", &slot, "NODE", &ids[to]]);
                }
            }
        })
        .await;
    });
}
