//! PostgreSQL: acquire + release beside a raw UPSERT + DELETE loop, and hand-off, in one run on one server.

use std::time::{Duration, Instant};

use stanchion::Locks;
use stanchion::store::Postgres;
use stanchion_testkit::servers::{Postgres as Kind, PostgresServer};
use tokio_postgres::{Client, NoTls};

const TASKS: usize = 50;
const ROUNDS: usize = 3;

pub(crate) async fn all() {
    // The last stands for a disk on which a commit takes its time.
    let slow: &[_] = &[("fsync", "on"), ("commit_delay", "2000"), ("commit_siblings", "0")];
    let disks = [
        ("fsync off", &[("fsync", "off")][..], 200),
        ("fsync on", &[("fsync", "on")], 100),
        ("commits of 2 ms", slow, 20),
    ];
    for (disk, settings, pairs) in disks {
        let server = PostgresServer::with(Kind::V15, settings);
        server.psql(&Postgres::from_url(&server.url()).unwrap().schema_sql());
        server.psql("CREATE TABLE raw (key text PRIMARY KEY, token text NOT NULL, expires timestamptz NOT NULL)");
        compare(&server, disk, pairs).await;
        handoff(&server, disk).await;
    }
}

async fn compare(server: &PostgresServer, disk: &str, pairs: usize) {
    let mut clients = Vec::new();
    for _ in 0..TASKS {
        let (client, connection) = tokio_postgres::connect(&server.url(), NoTls).await.unwrap();
        tokio::spawn(connection);
        clients.push(std::sync::Arc::new(client));
    }
    for pool in [16, TASKS] {
        let locks = Locks::open(&format!("{}?pool={pool}", server.url())).await.unwrap();
        let mut rates: [Vec<f64>; 2] = Default::default();
        // The first round makes connections and plans.
        for round in 0..=ROUNDS {
            let raw = rate(pairs, |task| raw(clients[task].clone(), task, pairs)).await;
            let ours = rate(pairs, |task| ours(locks.clone(), task, pairs)).await;
            if round > 0 {
                rates[0].push(raw);
                rates[1].push(ours);
            }
        }
        let [raw, ours] = rates.map(|mut rates| {
            rates.sort_by(f64::total_cmp);
            rates[rates.len() / 2]
        });
        println!(
            "postgres   {disk}, {TASKS} tasks, {pool} connections: {ours:.0} acquire + release a second; raw UPSERT + \
             DELETE on {TASKS} connections {raw:.0} (ratio {:.2})",
            ours / raw
        );
        locks.close().await.unwrap();
    }
}

async fn rate<F: Future<Output = ()> + Send + 'static>(pairs: usize, work: impl Fn(usize) -> F) -> f64 {
    let start = Instant::now();
    let work: Vec<_> = (0..TASKS).map(|task| tokio::spawn(work(task))).collect();
    for task in work {
        task.await.unwrap();
    }
    (TASKS * pairs) as f64 / start.elapsed().as_secs_f64()
}

async fn ours(locks: Locks, task: usize, pairs: usize) {
    for _ in 0..pairs {
        locks.lock(format!("k{task}")).await.unwrap().release().await.unwrap();
    }
}

async fn raw(client: std::sync::Arc<Client>, task: usize, pairs: usize) {
    let upsert = "INSERT INTO raw VALUES ($1, $2, clock_timestamp() + '10 s') ON CONFLICT (key) DO UPDATE \
                  SET token = $2, expires = clock_timestamp() + '10 s' WHERE raw.expires < clock_timestamp() RETURNING token";
    let upsert = client.prepare(upsert).await.unwrap();
    let delete = client.prepare("DELETE FROM raw WHERE key = $1 AND token = $2").await.unwrap();
    let (key, token) = (format!("raw{task}"), "0123456789abcdef0123456789abcdef");
    for _ in 0..pairs {
        assert_eq!(client.query(&upsert, &[&key, &token]).await.unwrap().len(), 1);
        assert_eq!(client.execute(&delete, &[&key, &token]).await.unwrap(), 1);
    }
}

/// From the release of one handle to the grant of the other.
async fn handoff(server: &PostgresServer, disk: &str) {
    let (client, connection) = tokio_postgres::connect(&server.url(), NoTls).await.unwrap();
    tokio::spawn(connection);
    let commit = client
        .prepare("INSERT INTO raw VALUES ('commit', $1, now()) ON CONFLICT (key) DO UPDATE SET token = $1")
        .await
        .unwrap();
    let mut commits = Vec::new();
    for turn in 0..300 {
        let start = Instant::now();
        client.execute(&commit, &[&turn.to_string()]).await.unwrap();
        commits.push(start.elapsed());
    }
    crate::print_spans(&format!("commit     postgres, {disk}, one raw upsert"), commits);
    let (one, other) = (Locks::open(&server.url()).await.unwrap(), Locks::open(&server.url()).await.unwrap());
    let mut spans = Vec::new();
    for turn in 0..300 {
        let (holder, waiter) = if turn % 2 == 0 { (&one, &other) } else { (&other, &one) };
        let held = holder.lock("handoff").await.unwrap();
        let waiting = {
            let waiter = waiter.clone();
            tokio::spawn(async move {
                let guard = waiter.lock("handoff").await.unwrap();
                (Instant::now(), guard)
            })
        };
        while holder.inspect("handoff").await.unwrap().waiters.is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let start = Instant::now();
        held.release().await.unwrap();
        let (got, guard) = waiting.await.unwrap();
        spans.push(got - start);
        guard.release().await.unwrap();
    }
    crate::print_spans(&format!("handoff    postgres, {disk}, two handles"), spans);
}
