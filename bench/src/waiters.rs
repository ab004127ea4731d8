//! Measures the cost of many waiting calls in one process.
//!
//! The figures are the processor time of the process and of the server while nothing happens, and the time to serve the
//! calls.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use stanchion::store::{Memory, Postgres};
use stanchion::{Locks, store::Sqlite};
use stanchion_testkit::servers::{FirestoreFake, Postgres as PostgresKind, PostgresServer, Redis, RedisServer};

/// Environment variable that makes this process the one with the waiters. Its value is `URL WAITERS KEYS`.
pub(crate) const ORDER: &str = "STANCHION_BENCH_SLEEPERS";

const WAITERS: usize = 1_000;
const SERVED: usize = 300;
/// Time that all calls wait before the measurement starts.
const SETTLED_AFTER: Duration = Duration::from_secs(5);
/// Duration of the measurement.
const MEASURED: Duration = Duration::from_secs(20);

/// Returns the processor time of a process in hundredths of a second.
fn ticks(pid: &str) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
    fields.skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

pub(crate) async fn all(folder: &std::path::Path) {
    let only = std::env::var("WAITERS_ONLY").unwrap_or_default();
    let is_selected = |name: &str| only.is_empty() || only.split(',').any(|selected| selected == name);
    if is_selected("memory") {
        sleep_beside("memory:", &[]).await;
    }
    if is_selected("sqlite") {
        let store = folder.join("waiters");
        sleep_beside(&format!("sqlite:{}", store.display()), &[]).await;
        serve("sqlite", Locks::with_store(Sqlite::open(store).unwrap()).await.unwrap()).await;
    }
    if is_selected("redis") {
        let server = RedisServer::start(Redis::Redis7);
        let url = format!("redis://127.0.0.1:{}", server.port());
        sleep_beside(&url, &[server.process().unwrap().pid()]).await;
        serve("redis", Locks::open(&url).await.unwrap()).await;
    }
    if is_selected("postgres") {
        let server = PostgresServer::with(PostgresKind::V15, &[("fsync", "off")]);
        server.psql(&Postgres::from_url(&server.url()).unwrap().schema_sql());
        sleep_beside(&server.url(), &server.processes()).await;
        serve("postgres", Locks::open(&server.url()).await.unwrap()).await;
    }
    if is_selected("firestore") {
        // It starts a runtime of its own.
        let fake = tokio::task::spawn_blocking(FirestoreFake::start).await.unwrap();
        sleep_beside(&fake.url(), &[]).await;
    }
}

async fn sleep_beside(url: &str, servers: &[i32]) {
    for keys in [1, WAITERS] {
        let holder = if url == "memory:" { None } else { Some(Locks::open(url).await.unwrap()) };
        let mut held = Vec::new();
        if let Some(holder) = &holder {
            for key in 0..keys {
                held.push(holder.lock(format!("k{key}")).await.unwrap());
            }
        }
        let mut child = Command::new(std::env::current_exe().unwrap())
            .env(ORDER, format!("{url} {WAITERS} {keys}"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, mut received) = tokio::sync::mpsc::unbounded_channel();
        std::thread::spawn(move || {
            while let Some(Ok(line)) = lines.next() {
                let _ = sender.send(line); // the measurement may be over
            }
        });
        received.recv().await.unwrap();
        let pids = |pids: &[i32]| pids.iter().map(|pid| ticks(&pid.to_string())).sum::<u64>();
        // PostgreSQL has started a process for each connection since then.
        let family = |servers: &[i32]| {
            let mut all = servers.to_vec();
            for pid in servers {
                let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
                all.extend(children.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
            }
            all.sort_unstable();
            all.dedup();
            all
        };
        let all = family(servers);
        let before = pids(&all);
        let here = received.recv().await.unwrap();
        let server = pids(&all) - before;
        let percent = |ticks: u64| ticks as f64 / MEASURED.as_secs_f64();
        println!(
            "waiters    {}, {WAITERS} on {keys} key(s): {:.2} % of a core in their process, {:.2} % in the server",
            url.split(':').next().unwrap(),
            percent(here.parse().unwrap()),
            percent(server)
        );
        child.kill().unwrap();
        child.wait().unwrap();
        drop(held);
        if let Some(holder) = holder {
            holder.close().await.unwrap();
        }
    }
}

/// Runs the process with the waiters.
pub(crate) async fn sleep(order: &str) {
    let words: Vec<_> = order.split(' ').collect();
    let (url, waiters, keys) = (words[0], words[1].parse::<usize>().unwrap(), words[2].parse::<usize>().unwrap());
    let mut held = Vec::new();
    let locks = if url == "memory:" {
        let store = Memory::new();
        let holder = Locks::with_store(store.clone()).await.unwrap();
        for key in 0..keys {
            held.push(holder.lock(format!("k{key}")).await.unwrap());
        }
        Locks::with_store(store).await.unwrap()
    } else {
        Locks::open(url).await.unwrap()
    };
    for waiter in 0..waiters {
        let locks = locks.clone();
        tokio::spawn(async move {
            let _held = locks.lock(format!("k{}", waiter % keys)).await.unwrap();
            std::future::pending::<()>().await;
        });
    }
    tokio::time::sleep(SETTLED_AFTER).await;
    let before = ticks("self");
    println!("begin");
    std::io::stdout().flush().unwrap();
    tokio::time::sleep(MEASURED).await;
    println!("{}", ticks("self") - before);
    std::io::stdout().flush().unwrap();
    std::future::pending::<()>().await;
}

/// Measures the time from the release of a key until all its waiters have had it, one after the other.
async fn serve(name: &str, locks: Locks) {
    for _ in 0..3 {
        let held = locks.lock("served").await.unwrap();
        let waiting: Vec<_> = (0..SERVED)
            .map(|_| {
                let locks = locks.clone();
                tokio::spawn(async move { locks.lock("served").await.unwrap().release().await.unwrap() })
            })
            .collect();
        while locks.inspect("served").await.unwrap().waiters.len() < SERVED {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let start = Instant::now();
        held.release().await.unwrap();
        for waiter in waiting {
            waiter.await.unwrap();
        }
        let each = start.elapsed() / u32::try_from(SERVED).unwrap();
        println!("waiters    {name}, {SERVED} served one after the other: {each:.2?} each");
    }
    locks.close().await.unwrap();
}
