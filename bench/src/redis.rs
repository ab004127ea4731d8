//! Measures Redis: acquire + release of stanchion, of the bare client and of `rslock`, in one run on one server.

use std::future::Future;
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client};
use stanchion::Locks;
use stanchion_testkit::servers::{Redis, RedisServer};

/// Number of tasks, and number of pairs of each task in a turn. Turns are short and many, because the machine's speed
/// varies.
const PAIRS: [(u32, u32); 2] = [(1, 2_000), (50, 600)];
const ROUNDS: usize = 25;

/// Measures uncontended acquire + release with one and with fifty tasks.
pub(crate) async fn pairs() {
    let server = RedisServer::start(Redis::Redis7);
    let url = format!("redis://127.0.0.1:{}", server.port());
    let locks = Locks::open(&url).await.unwrap();
    let client = Client::open(
        redis::IntoConnectionInfo::into_connection_info(url.as_str())
            .unwrap()
            .set_tcp_settings(redis::io::tcp::TcpSettings::default().set_nodelay(true)),
    )
    .unwrap();
    let options = AsyncConnectionConfig::new().set_response_timeout(None).set_pipeline_buffer_size(1_024);
    let raw = client.get_multiplexed_async_connection_with_config(&options).await.unwrap();
    let rslock = rslock::LockManager::new(vec![url.as_str()]);
    for (tasks, pairs) in PAIRS {
        let names = ["bare client", "bare client, our scripts", "ours", "rslock"];
        let mut rates: [Vec<f64>; 4] = Default::default();
        let mut spent = [Spent::default(); 4];
        for round in 0..ROUNDS {
            for turn in 0..names.len() {
                // Reverse the order in every other round, so that no client always runs after the same one.
                let client_index = if round % 2 == 0 { turn } else { names.len() - 1 - turn };
                let before = Spent::so_far(&server);
                let rate = match client_index {
                    0 => rate(tasks, pairs, |task| bare(raw.clone(), task, pairs)).await,
                    1 => rate(tasks, pairs, |task| bare_scripts(raw.clone(), task, pairs)).await,
                    2 => rate(tasks, pairs, |task| ours(locks.clone(), task, pairs)).await,
                    _ => rate(tasks, pairs, |task| theirs(rslock.clone(), task, pairs)).await,
                };
                rates[client_index].push(rate);
                spent[client_index].add(before, Spent::so_far(&server));
            }
        }
        let rates = rates.map(median);
        for ((name, rate), spent) in names.iter().zip(rates).zip(spent) {
            let each = |ticks: u64| ticks as f64 * 10_000.0 / (f64::from(tasks * pairs) * ROUNDS as f64);
            println!(
                "redis      {tasks} task(s), {name}: {rate:.0} acquire + release a second, {:.2} of the bare client; {:.1} \
                 µs here and {:.1} µs in the server for each; median of {ROUNDS}",
                rate / rates[0],
                each(spent.here),
                each(spent.server)
            );
        }
    }
    let before = calls(&server);
    locks.lock("counted").await.unwrap().release().await.unwrap();
    println!("redis      one acquire + release: {:?} scripts called", calls(&server) - before);
}

/// Processor time in hundredths of a second.
#[derive(Clone, Copy, Default)]
struct Spent {
    here: u64,
    server: u64,
}

impl Spent {
    fn so_far(server: &RedisServer) -> Self {
        let of = |pid: &str| -> u64 {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            stat.rsplit_once(')')
                .unwrap()
                .1
                .split_whitespace()
                .skip(11)
                .take(2)
                .map(|ticks| ticks.parse::<u64>().unwrap())
                .sum()
        };
        Self { here: of("self"), server: of(&server.process().unwrap().pid().to_string()) }
    }

    fn add(&mut self, before: Self, after: Self) {
        self.here += after.here - before.here;
        self.server += after.server - before.server;
    }
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

fn calls(server: &RedisServer) -> u64 {
    let stats = server.command(&["INFO", "commandstats"]);
    let line = stats.lines().find_map(|line| line.strip_prefix("cmdstat_evalsha:calls=")).unwrap();
    line.split(',').next().unwrap().parse().unwrap()
}

async fn rate<F>(tasks: u32, pairs: u32, work: impl Fn(u32) -> F) -> f64
where
    F: Future<Output = ()> + Send + 'static,
{
    let start = Instant::now();
    let work: Vec<_> = (0..tasks).map(|task| tokio::spawn(work(task))).collect();
    for task in work {
        task.await.unwrap();
    }
    f64::from(tasks * pairs) / start.elapsed().as_secs_f64()
}

async fn ours(locks: Locks, task: u32, pairs: u32) {
    for _ in 0..pairs {
        locks.lock(format!("k{task}")).await.unwrap().release().await.unwrap();
    }
}

async fn bare(mut connection: MultiplexedConnection, task: u32, pairs: u32) {
    let key = format!("bare{task}");
    let script = redis::Script::new(
        "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0",
    );
    let token = "0123456789abcdef0123456789abcdef";
    for _ in 0..pairs {
        let mut set = redis::cmd("SET");
        set.arg(&key).arg(token).arg("NX").arg("PX").arg(10_000);
        let set: Option<String> = set.query_async(&mut connection).await.unwrap();
        assert!(set.is_some());
        let deleted: u32 = script.key(&key).arg(token).invoke_async(&mut connection).await.unwrap();
        assert_eq!(deleted, 1);
    }
}

/// Runs the scripts of this library on the bare client, to measure the scripts alone.
async fn bare_scripts(mut connection: MultiplexedConnection, task: u32, pairs: u32) {
    macro_rules! script {
        ($name:literal) => {
            concat!(
                include_str!(concat!("../../crates/stanchion/src/store/redis/scripts/", $name, ".fast.lua")),
                include_str!("../../crates/stanchion/src/store/redis/scripts/common.lua"),
                include_str!(concat!("../../crates/stanchion/src/store/redis/scripts/", $name, ".lua")),
            )
        };
    }
    let names = ["", ":queue", ":waiting"].map(|end| format!("bare:{{s{task}}}{end}"));
    let [acquire, end] = [redis::Script::new(script!("acquire")), redis::Script::new(script!("end"))];
    let token = "0123456789abcdef0123456789abcdef";
    let request = format!("99999999999999990{token}{token}S00000000");
    for _ in 0..pairs {
        let fence: String = acquire.key(&names).arg(&request).invoke_async(&mut connection).await.unwrap();
        assert_eq!(fence.len(), 16);
        let time: String = end.key(&names).arg(token).invoke_async(&mut connection).await.unwrap();
        assert!(time > fence);
    }
}

async fn theirs(manager: rslock::LockManager, task: u32, pairs: u32) {
    let key = format!("rslock{task}");
    for _ in 0..pairs {
        let lock = manager.lock(key.as_bytes(), Duration::from_secs(10)).await.unwrap();
        manager.unlock(&lock).await;
    }
}

/// Environment variable of a child of [`handoff`]. Its value is the URL, the number of waiters and the turns of each.
pub(crate) const WAITER: &str = "STANCHION_BENCH_REDIS_WAITER";

/// Measures the time from the release of one waiter until the grant of the next, in ten processes, and one round trip.
pub(crate) async fn handoff() {
    for (waiters, processes, turns) in [(2, 2, 2_000), (50, 10, 80), (1_000, 10, 4)] {
        let server = RedisServer::start(Redis::Redis7);
        let url = format!("redis://127.0.0.1:{}", server.port());
        let locks = Locks::open(&url).await.unwrap();
        let first = locks.lock("handoff").await.unwrap();
        let children: Vec<_> = (0..processes)
            .map(|_| {
                std::process::Command::new(std::env::current_exe().unwrap())
                    .env(WAITER, format!("{url} {} {turns}", waiters / processes))
                    .stdout(std::process::Stdio::piped())
                    .spawn()
                    .unwrap()
            })
            .collect();
        while locks.inspect("handoff").await.unwrap().waiters.len() < waiters {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        server.command(&["CONFIG", "RESETSTAT"]);
        first.release().await.unwrap();
        let (mut spans, mut trips) = (Vec::new(), Vec::new());
        for child in children {
            let output = child.wait_with_output().unwrap();
            for line in String::from_utf8(output.stdout).unwrap().lines() {
                let (what, times) = line.split_once(' ').unwrap();
                let times: Vec<u64> = times.split(' ').map(|time| time.parse().unwrap()).collect();
                match what {
                    "turn" => spans.push((times[0], times[1])),
                    _ => trips.push(Duration::from_nanos(times[0])),
                }
            }
        }
        spans.sort_unstable();
        let grants = spans.len() as u64;
        let took = spans.last().unwrap().1 - spans[0].0;
        let spans: Vec<_> =
            spans.windows(2).map(|two| Duration::from_nanos(two[1].0.saturating_sub(two[0].1))).collect();
        crate::print_spans(&format!("handoff    redis, {waiters} waiters in {processes} processes"), spans);
        crate::print_spans("           one round trip in these processes at the same time", trips);
        let stats = server.command(&["INFO", "commandstats"]);
        let count = |name: &str| -> f64 {
            let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{name}:calls=")));
            line.and_then(|line| line.split(',').next()).map_or(0.0, |calls| calls.parse().unwrap())
        };
        println!(
            "           {:.2} commands on the wire for each grant (including the next request), {:.2} messages, {:.0} \
             grants a second",
            count("evalsha") / grants as f64,
            count("publish") / grants as f64,
            grants as f64 / (took as f64 / 1e9)
        );
    }
}

pub(crate) async fn waiter(order: &str) {
    let [url, waiters, turns]: [&str; 3] = order.split(' ').collect::<Vec<_>>().try_into().unwrap();
    let clock = stanchion::Clock::system();
    let locks = Locks::open(url).await.unwrap();
    let turns: u32 = turns.parse().unwrap();
    let tasks: Vec<_> = (0..waiters.parse::<u32>().unwrap())
        .map(|_| {
            let (locks, clock) = (locks.clone(), clock.clone());
            tokio::spawn(async move {
                let mut report = Vec::new();
                for _ in 0..turns {
                    let guard = locks.lock("handoff").await.unwrap();
                    let acquired_at = clock.now().as_nanos();
                    let released_at = clock.now().as_nanos();
                    guard.release().await.unwrap();
                    report.push(format!(
                        "turn {acquired_at} {released_at}\ntrip {}",
                        clock.now().as_nanos() - released_at
                    ));
                }
                report
            })
        })
        .collect();
    for task in tasks {
        println!("{}", task.await.unwrap().join("\n"));
    }
}

/// Measures the memory of a hundred thousand held locks, and the commands while nothing happens.
pub(crate) async fn held() {
    const HOLDS: usize = 100_000;
    let server = RedisServer::start(Redis::Redis7);
    let locks = Locks::open(&format!("redis://127.0.0.1:{}", server.port())).await.unwrap();
    for i in 0..1_000 {
        locks.lock(format!("warm{i}")).await.unwrap().release().await.unwrap();
    }
    let memory = || -> usize {
        let info = server.command(&["INFO", "memory"]);
        info.lines().find_map(|line| line.strip_prefix("used_memory:")).unwrap().trim().parse().unwrap()
    };
    let (before, there) = (crate::resident_bytes(), memory());
    let mut guards = Vec::with_capacity(HOLDS);
    let start = Instant::now();
    for some in 0..HOLDS / 100 {
        let tasks: Vec<_> =
            (0..100).map(|i| tokio::spawn(locks.lock(format!("held{}", some * 100 + i)).into_future())).collect();
        for task in tasks {
            guards.push(task.await.unwrap().unwrap());
        }
    }
    let each = crate::resident_bytes().saturating_sub(before) / HOLDS;
    println!(
        "held       redis, {HOLDS} locks in {:.1?}: {each} bytes of memory each here, {} in the server",
        start.elapsed(),
        (memory() - there) / HOLDS
    );
    server.command(&["CONFIG", "RESETSTAT"]);
    tokio::time::sleep(Duration::from_secs(20)).await;
    let stats = server.command(&["INFO", "commandstats"]);
    let scripts = stats.lines().find_map(|line| line.strip_prefix("cmdstat_evalsha:calls=")).unwrap_or("0");
    println!("held       redis, {HOLDS} locks: {} commands in 20 s", scripts.split(',').next().unwrap());
    let start = Instant::now();
    locks.close().await.unwrap();
    let left = server.command(&["EVAL", "local n = 0 for _, k in ipairs(redis.call('KEYS', '*{:held*')) do if string.byte(redis.call('GET', k)) ~= 48 then n = n + 1 end end return tostring(n)", "0"]);
    println!("held       redis, {HOLDS} locks: closed in {:.1?}, {left} left", start.elapsed());
}
