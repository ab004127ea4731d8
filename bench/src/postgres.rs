//! Measures PostgreSQL: acquire + release and a raw loop of UPSERT + DELETE, and hand-offs, in one run on one server.

use std::future::poll_fn;
use std::task::{Poll, ready};
use std::time::{Duration, Instant};

use stanchion::Locks;
use stanchion::store::Postgres;
use stanchion_testkit::servers::{Postgres as Kind, PostgresServer};
use tokio::sync::Mutex;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio_postgres::{AsyncMessage, Client, NoTls, Statement};

const TASKS: usize = 50;
const ROUNDS: usize = 3;
const TURNS: usize = 300;
const PAUSE: Duration = Duration::from_millis(1);

pub(crate) async fn all() {
    // The last setting simulates a disk with slow commits.
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
        if std::env::var("PG_HANDOFF_ONLY").is_err() {
            compare(&server, disk, pairs).await;
        }
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
        // The first round only makes connections and plans.
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

/// Measures the time from the release of one handle until the grant of the other one.
///
/// For comparison it also measures a raw commit, and a commit until another connection gets its NOTIFY. Each is
/// measured twice: one after the other, with warm processor caches, and after a pause, with cold ones.
async fn handoff(server: &PostgresServer, disk: &str) {
    let raw = Raw::new(server).await;
    let (one, other) = (Locks::open(&server.url()).await.unwrap(), Locks::open(&server.url()).await.unwrap());
    for (when, pause) in [("one after the other", None), ("after a pause", Some(PAUSE))] {
        let pause = async || {
            if let Some(pause) = pause {
                tokio::time::sleep(pause).await;
            }
        };
        let [mut commits, mut notified, mut answers, mut grants] = [const { Vec::new() }; 4];
        for _ in 0..TURNS {
            pause().await;
            commits.push(raw.commit().await);
        }
        for _ in 0..TURNS {
            pause().await;
            notified.push(raw.notified().await);
        }
        for turn in 0..TURNS {
            let (holder, waiter) = if turn % 2 == 0 { (&one, &other) } else { (&other, &one) };
            let held = holder.lock("handoff").await.unwrap();
            let waiting = {
                let waiter = waiter.clone();
                tokio::spawn(async move {
                    let guard = waiter.lock("handoff").await.unwrap();
                    (Instant::now(), guard)
                })
            };
            while holder.inspect("handoff").await.unwrap().waiters.is_empty() {}
            pause().await;
            let start = Instant::now();
            held.release().await.unwrap();
            answers.push(start.elapsed());
            let (acquired_at, guard) = waiting.await.unwrap();
            grants.push(acquired_at - start);
            guard.release().await.unwrap();
        }
        crate::print_spans(&format!("commit     postgres, {disk}, {when}: a raw upsert"), commits);
        crate::print_spans(
            &format!("notify     postgres, {disk}, {when}: a raw upsert with NOTIFY, until it is received"),
            notified,
        );
        crate::print_spans(
            &format!("release    postgres, {disk}, {when}: while another call waits, until the reply"),
            answers,
        );
        crate::print_spans(&format!("handoff    postgres, {disk}, {when}: two handles"), grants);
    }
}

/// Runs the same kinds of commits without locks, in a table of their own.
struct Raw {
    client: Client,
    commit: Statement,
    notify: Statement,
    notifications: Mutex<UnboundedReceiver<()>>,
    _listener: Client,
}

impl Raw {
    async fn new(server: &PostgresServer) -> Self {
        let (client, connection) = tokio_postgres::connect(&server.url(), NoTls).await.unwrap();
        tokio::spawn(connection);
        let (listener, mut connection) = tokio_postgres::connect(&server.url(), NoTls).await.unwrap();
        let (sender, notifications) = unbounded_channel();
        tokio::spawn(poll_fn(move |context| {
            while let Some(message) = ready!(connection.poll_message(context)) {
                if matches!(message, Ok(AsyncMessage::Notification(_))) {
                    sender.send(()).unwrap();
                }
            }
            Poll::Ready(())
        }));
        listener.batch_execute("LISTEN raw").await.unwrap();
        let upsert =
            "INSERT INTO raw VALUES ('commit', 'token', now()) ON CONFLICT (key) DO UPDATE SET expires = now()";
        let commit = client.prepare(upsert).await.unwrap();
        let notify = format!("WITH upsert AS ({upsert} RETURNING token) SELECT pg_notify('raw', token) FROM upsert");
        let notify = client.prepare(&notify).await.unwrap();
        Self { client, commit, notify, notifications: Mutex::new(notifications), _listener: listener }
    }

    async fn commit(&self) -> Duration {
        let start = Instant::now();
        self.client.execute(&self.commit, &[]).await.unwrap();
        start.elapsed()
    }

    async fn notified(&self) -> Duration {
        let start = Instant::now();
        self.client.query(&self.notify, &[]).await.unwrap();
        self.notifications.lock().await.recv().await.unwrap();
        start.elapsed()
    }
}
