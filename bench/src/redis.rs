//! Redis: acquire + release beside the bare client and beside `rslock`, in one run on one server.

use std::future::Future;
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client};
use stanchion::Locks;
use stanchion_testkit::servers::{Redis, RedisServer};

const PAIRS: u32 = 60_000;
const ROUNDS: usize = 5;

/// Uncontended acquire + release, one task and fifty.
pub(crate) async fn pairs() {
    if std::env::var("ONLY_OURS").is_ok() {
        let server = RedisServer::start(Redis::Redis7);
        let locks = Locks::open(&format!("redis://127.0.0.1:{}", server.port())).await.unwrap();
        for _ in 0..8 { println!("{}", rate(50, |task| ours(locks.clone(), task, PAIRS / 50)).await); }
        return;
    }
    let server = RedisServer::start(Redis::Redis7);
    let url = format!("redis://127.0.0.1:{}", server.port());
    let locks = Locks::open(&url).await.unwrap();
    let client = Client::open(redis::IntoConnectionInfo::into_connection_info(url.as_str()).unwrap().set_tcp_settings(
        redis::io::tcp::TcpSettings::default().set_nodelay(true),
    ))
    .unwrap();
    let options = AsyncConnectionConfig::new().set_response_timeout(None).set_pipeline_buffer_size(1_024);
    let raw = client.get_multiplexed_async_connection_with_config(&options).await.unwrap();
    let rslock = rslock::LockManager::new(vec![url.as_str()]);
    for tasks in [1, 50] {
        let mut rates: [Vec<f64>; 3] = Default::default();
        for _ in 0..ROUNDS {
            rates[0].push(rate(tasks, |task| bare(raw.clone(), task, PAIRS / tasks)).await);
            rates[1].push(rate(tasks, |task| ours(locks.clone(), task, PAIRS / tasks)).await);
            rates[2].push(rate(tasks, |task| theirs(rslock.clone(), task, PAIRS / tasks)).await);
        }
        let [bare, ours, theirs] = rates.map(median);
        println!(
            "redis      {tasks} task(s): {ours:.0} acquire + release a second; bare client {bare:.0} (ratio {:.2}), rslock \
             {theirs:.0} (ratio {:.2}); medians of {ROUNDS}",
            ours / bare,
            ours / theirs
        );
    }
    let before = calls(&server);
    locks.lock("counted").await.unwrap().release().await.unwrap();
    println!("redis      one acquire + release: {:?} scripts called", calls(&server) - before);
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

async fn rate<F>(tasks: u32, work: impl Fn(u32) -> F) -> f64
where
    F: Future<Output = ()> + Send + 'static,
{
    let start = Instant::now();
    let work: Vec<_> = (0..tasks).map(|task| tokio::spawn(work(task))).collect();
    for task in work {
        task.await.unwrap();
    }
    f64::from(PAIRS) / start.elapsed().as_secs_f64()
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

async fn theirs(manager: rslock::LockManager, task: u32, pairs: u32) {
    let key = format!("rslock{task}");
    for _ in 0..pairs {
        let lock = manager.lock(key.as_bytes(), Duration::from_secs(10)).await.unwrap();
        manager.unlock(&lock).await;
    }
}
