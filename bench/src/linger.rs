//! Measures keys that linger: one hot key in one process, its recall by another handle, and processes that compete for it.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use stanchion::store::{self, Faults, Faulty, Operation};
use stanchion::{LockRequest, Locks};
use stanchion_testkit::servers::{Postgres, PostgresServer, Redis, RedisServer};

use super::{median, print_spans};

/// The variable with the order for a competing process: its URL, the time in milliseconds and the number of turns.
pub(crate) const ORDER: &str = "STANCHION_BENCH_LINGER";

const LINGER: Duration = Duration::from_secs(1);
const TURNS: u32 = 200_000;
const TASKS: u32 = 50;
const RECALLS: usize = 200;
const PROCESSES: usize = 10;

pub(crate) async fn all(folder: &Path) {
    one_store("memory", "memory:").await;
    let sqlite = format!("sqlite:{}", folder.join("linger").display());
    one_store("sqlite", &sqlite).await;
    compete("sqlite", &sqlite, 300).await;
    let redis = RedisServer::start(Redis::Redis7);
    let url = format!("redis://127.0.0.1:{}", redis.port());
    one_store("redis", &url).await;
    compete("redis", &url, 300).await;
    let postgres = PostgresServer::with(Postgres::V15, &[("fsync", "on")]);
    postgres.psql(&store::Postgres::from_url(&postgres.url()).unwrap().schema_sql());
    one_store("postgres", &postgres.url()).await;
    compete("postgres", &postgres.url(), 100).await;
}

fn request(locks: &Locks) -> LockRequest {
    locks.lock("hot").linger(LINGER)
}

fn requests(faults: &Faults) -> u64 {
    let operations = [Operation::Acquire, Operation::Poll, Operation::Release, Operation::Abandon, Operation::Linger];
    operations.iter().map(|operation| faults.count(*operation)).sum()
}

async fn one_store(name: &str, url: &str) {
    let shared = store::open(url).await.unwrap();
    let faulty = Faulty::new(shared.clone());
    let faults = faulty.faults();
    let locks = Locks::with_store(faulty).await.unwrap();
    let other = Locks::with_store(shared).await.unwrap();
    let plain = time(2_000, || async {
        let _ = locks.lock("plain").await.unwrap().release().await.unwrap();
    })
    .await;
    for _ in 0..100 {
        request(&locks).await.unwrap().release().await.unwrap();
    }
    let before = requests(&faults);
    let local = time(TURNS, || async {
        let _ = request(&locks).await.unwrap().release().await.unwrap();
    })
    .await;
    println!(
        "linger     {name}, one task: {local:.0} acquire + release a second, {:.0} times as many as without; {} requests for \
         {TURNS}",
        local / plain,
        requests(&faults) - before
    );
    let before = requests(&faults);
    let start = Instant::now();
    let tasks: Vec<_> = (0..TASKS)
        .map(|_| {
            let locks = locks.clone();
            tokio::spawn(async move {
                for _ in 0..TURNS / TASKS {
                    request(&locks).await.unwrap().release().await.unwrap();
                    tokio::task::yield_now().await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let rate = f64::from(TURNS) / start.elapsed().as_secs_f64();
    println!(
        "linger     {name}, {TASKS} tasks: {rate:.0} hand-overs a second; {} requests for {TURNS}",
        requests(&faults) - before
    );
    recalls(name, &locks, &other).await;
}

/// Measures the time that another handle needs to get a key that lingers unused, beside one round trip.
async fn recalls(name: &str, locks: &Locks, other: &Locks) {
    let (mut recalls, mut round_trips) = (Vec::new(), Vec::new());
    let mut tries = 0;
    while recalls.len() < RECALLS && tries < RECALLS * 20 {
        tries += 1;
        // Use it a few times, so that it lingers and was used since.
        for _ in 0..4 {
            request(locks).await.unwrap().release().await.unwrap();
        }
        let lingers = other.inspect("hot").await.unwrap().holders.first().is_some_and(|holder| holder.lingers);
        let start = Instant::now();
        let guard = other.lock("hot").await.unwrap();
        if lingers {
            recalls.push(start.elapsed());
        }
        guard.release().await.unwrap();
        let start = Instant::now();
        let guard = other.lock("round trip").await.unwrap();
        round_trips.push(start.elapsed());
        guard.release().await.unwrap();
    }
    let (recall, round_trip) = (median(&mut recalls), median(&mut round_trips));
    println!(
        "linger     {name}, recall of an unused key: p50 {recall:?}, {:.1} times an acquire of a free key ({round_trip:?})",
        recall.as_secs_f64() / round_trip.as_secs_f64()
    );
    print_spans(&format!("linger     {name}, recall of an unused key"), recalls);
}

/// Measures ten processes that compete for one key, with and without linger.
async fn compete(name: &str, url: &str, turns: u32) {
    let mut rates = [Vec::new(), Vec::new()];
    for round in 0..6 {
        for turn in 0..2 {
            let lingers = (round + turn) % 2;
            let order = format!("{url} {} {turns}", if lingers == 1 { LINGER.as_millis() } else { 0 });
            let children: Vec<Child> = (0..PROCESSES)
                .map(|_| {
                    Command::new(std::env::current_exe().unwrap())
                        .env(ORDER, &order)
                        .stdin(Stdio::piped())
                        .stdout(Stdio::piped())
                        .spawn()
                        .unwrap()
                })
                .collect();
            let spans = children.into_iter().map(|child| {
                let output = child.wait_with_output().unwrap();
                assert!(output.status.success(), "{output:?}");
                let text = String::from_utf8(output.stdout).unwrap();
                let (began, ended) = text.trim().split_once(' ').unwrap();
                (began.parse::<u64>().unwrap(), ended.parse::<u64>().unwrap())
            });
            let spans: Vec<_> = spans.collect();
            let began = spans.iter().map(|span| span.0).min().unwrap();
            let ended = spans.iter().map(|span| span.1).max().unwrap();
            rates[lingers].push(f64::from(turns) * PROCESSES as f64 / ((ended - began) as f64 / 1e9));
        }
    }
    let [without, with] = rates.map(|mut rates| {
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    });
    println!(
        "linger     {name}, {PROCESSES} processes compete: {with:.0} grants a second, {:.2} of those without linger ({without:.0})",
        with / without
    );
}

/// Competes for the key as another process ordered it.
pub(crate) async fn compete_as_ordered(order: &str) {
    let mut words = order.split(' ');
    let url = words.next().unwrap();
    let [linger, turns] = [(); 2].map(|()| words.next().unwrap().parse::<u64>().unwrap());
    let locks = Locks::open(url).await.unwrap();
    let clock = stanchion::Clock::system();
    let began = clock.now().as_nanos();
    for _ in 0..turns {
        let request = locks.lock("contested").linger(Duration::from_millis(linger));
        request.await.unwrap().release().await.unwrap();
    }
    println!("{began} {}", clock.now().as_nanos());
}

async fn time<F: Future<Output = ()>>(turns: u32, mut turn: impl FnMut() -> F) -> f64 {
    let start = Instant::now();
    for _ in 0..turns {
        turn().await;
    }
    f64::from(turns) / start.elapsed().as_secs_f64()
}
