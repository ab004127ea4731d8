//! Tests [`Locks`] on the embedded store between processes: order, kills, stops, blocked executors.
//!
//! A test starts this binary again as a worker process, in which [`worker`] runs the task that the environment names.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests wait on the real clock, and may panic")]

use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use stanchion::store::Sqlite;
use stanchion::{Clock, Event, Locks};

/// Time after which a test fails because a condition takes too long.
const GENEROUS: Duration = Duration::from_secs(120);

/// A worker process that is killed when the test ends.
struct Worker(Child);

impl Worker {
    fn start(task: &str, folder: &Path, variables: &[(&str, String)]) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "embedded::worker", "--nocapture"])
            .env("STANCHION_WORKER", task)
            .env("FOLDER", folder);
        command.envs(variables.iter().map(|(name, value)| (*name, value)));
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    fn succeeds(mut self) {
        assert!(self.0.wait().unwrap().success());
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.0.kill(); // an error: the process has exited already
        let _ = self.0.wait();
    }
}

/// Runs the task of a worker process. Does nothing when it runs as a test.
#[test]
fn worker() {
    let Ok(task) = std::env::var("STANCHION_WORKER") else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let folder = PathBuf::from(std::env::var("FOLDER").unwrap());
    runtime.block_on(async {
        match task.as_str() {
            "increment" => increment(&folder).await,
            "hold" => hold(&folder).await,
            unknown => panic!("no such task: {unknown}"),
        }
    });
}

async fn open(folder: &Path) -> Locks {
    Locks::with_store(Sqlite::open(folder.join("store")).unwrap()).await.unwrap()
}

fn now() -> u64 {
    Clock::system().now().as_nanos()
}

fn append(path: &Path, line: &str) {
    fs::OpenOptions::new().create(true).append(true).open(path).unwrap().write_all(line.as_bytes()).unwrap();
}

/// Increments the number in a file `TIMES` times, each time under the lock.
async fn increment(folder: &Path) {
    let times: u32 = std::env::var("TIMES").unwrap().parse().unwrap();
    let locks = open(folder).await;
    let mut events = locks.events();
    for _ in 0..times {
        let invoked = now();
        let request = locks.lock("counter").into_future();
        tokio::pin!(request);
        let mut queued = None;
        let guard = loop {
            tokio::select! {
                biased;
                event = events.next() => if let Some(Event::Contended { .. }) = event { queued = Some(now()) },
                guard = &mut request => break guard.unwrap(),
            }
        };
        let file = folder.join("counter");
        let number: u64 = fs::read_to_string(&file).unwrap_or_else(|_| "0".into()).parse().unwrap();
        fs::write(&file, (number + 1).to_string()).unwrap();
        let queued = queued.unwrap_or(u64::MAX);
        append(&folder.join("log"), &format!("{} {} {invoked} {queued}\n", number + 1, guard.fence().get()));
        guard.release().await.unwrap();
    }
    locks.close().await.unwrap();
}

/// Waits for the lock, logs the grant, and holds the lock until the process is killed.
async fn hold(folder: &Path) {
    let locks = open(folder).await;
    let _guard = locks.lock("k").await.unwrap();
    append(&folder.join("log"), &format!("{} {}\n", std::process::id(), now()));
    std::future::pending::<()>().await;
}

fn log(folder: &Path) -> Vec<Vec<u64>> {
    let text = fs::read_to_string(folder.join("log")).unwrap_or_default();
    text.lines().map(|line| line.split(' ').map(|number| number.parse().unwrap()).collect()).collect()
}

fn until(what: &str, mut is_true: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_true() {
        assert!(start.elapsed() < GENEROUS, "timed out while waiting until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn processes_increment_a_counter_in_order() {
    const PROCESSES: u64 = 64;
    const TIMES: u64 = 200;
    let folder = tempfile::tempdir().unwrap();
    let variables = [("TIMES", TIMES.to_string())];
    let workers: Vec<_> = (0..PROCESSES).map(|_| Worker::start("increment", folder.path(), &variables)).collect();
    workers.into_iter().for_each(Worker::succeeds);
    let log = log(folder.path());
    assert_eq!(log.len() as u64, PROCESSES * TIMES);
    let mut last_fence = 0;
    for (expected, entry) in (1..).zip(&log) {
        assert_eq!(entry[0], expected, "no increment was lost, and the log is in order");
        assert!(entry[1] > last_fence, "fences increase in the order of the increments");
        last_fence = entry[1];
    }
    // A request that was queued before another request was sent is granted before that request.
    let mut earliest_queued_later = u64::MAX;
    let mut waited = 0;
    for entry in log.iter().rev() {
        let (invoked, queued) = (entry[2], entry[3]);
        assert!(earliest_queued_later >= invoked, "a later request overtook a queued one");
        earliest_queued_later = earliest_queued_later.min(queued);
        waited += u64::from(queued != u64::MAX);
    }
    assert!(waited > PROCESSES * TIMES / 2, "only {waited} requests had to wait, so this run proves nothing");
}

#[test]
fn killed_holders_hand_off_within_50_ms() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let locks = runtime.block_on(open(folder.path()));
    let mut workers = Vec::new();
    for i in 0..12_usize {
        workers.push(Worker::start("hold", folder.path(), &[]));
        until("the worker holds or waits", || {
            let state = runtime.block_on(locks.inspect("k")).unwrap();
            state.holders.len() + state.waiters.len() == i + 1
        });
    }
    // Killing a waiter in the middle does not affect the others.
    let middle = workers.remove(5);
    middle.signal(rustix::process::Signal::KILL);
    drop(middle);
    assert_eq!(log(folder.path()).len(), 1);
    let mut takeovers = Vec::new();
    while workers.len() > 1 {
        let mut holder = workers.remove(0);
        let granted = log(folder.path()).len();
        let killed = now();
        holder.signal(rustix::process::Signal::KILL);
        until("the next worker has the lock", || log(folder.path()).len() > granted);
        let next = log(folder.path()).pop().unwrap();
        assert_eq!(next[0], u64::from(workers[0].0.id()), "the grant goes to the next in the queue");
        takeovers.push(Duration::from_nanos(next[1] - killed));
        assert_eq!(holder.0.wait().unwrap().signal(), Some(9));
    }
    takeovers.sort();
    println!("takeovers after a kill: {takeovers:?}");
    // Use the median, because a busy machine may delay single hand-offs.
    assert!(takeovers[takeovers.len() / 2] < Duration::from_millis(50), "{takeovers:?}");
}

#[test]
fn stopped_process_keeps_its_lock() {
    let folder = tempfile::tempdir().unwrap();
    let holder = Worker::start("hold", folder.path(), &[]);
    until("the worker holds the lock", || log(folder.path()).len() == 1);
    holder.signal(rustix::process::Signal::STOP);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = Sqlite::open(folder.path().join("store")).unwrap();
        let ttl = Duration::from_millis(200);
        let locks = Locks::builder_with_store(store).session_ttl(ttl).open().await.unwrap();
        // In this time a session that must be renewed would expire three times.
        assert!(locks.lock("k").wait(3 * ttl).await.is_err());
        holder.signal(rustix::process::Signal::CONT);
        assert!(locks.try_lock("k").await.unwrap().is_none());
        drop(holder);
        assert!(locks.lock("k").wait(GENEROUS).await.unwrap().is_held());
    });
}

#[test]
fn blocked_executor_threads_lose_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let ttl = Duration::from_millis(500);
    runtime.block_on(async {
        // The memory store is the harder case, because its sessions must be renewed.
        let memory = stanchion::store::Memory::new();
        let stores = [
            Locks::builder_with_store(Sqlite::open(folder.path().join("store")).unwrap()),
            Locks::builder_with_store(memory),
        ];
        for builder in stores {
            let locks = builder.session_ttl(ttl).open().await.unwrap();
            let mut events = locks.events();
            let guard = tokio::spawn({
                let locks = locks.clone();
                async move { locks.lock("k").await.unwrap() }
            })
            .await
            .unwrap();
            let blockers: Vec<_> = (0..2).map(|_| tokio::spawn(async move { std::thread::sleep(3 * ttl) })).collect();
            std::thread::sleep(3 * ttl);
            assert!(guard.is_held());
            for blocker in blockers {
                blocker.await.unwrap();
            }
            assert!(guard.is_held());
            guard.release().await.unwrap();
            locks.close().await.unwrap();
            drop(locks);
            while let Some(event) = events.next().await {
                assert!(!matches!(event, Event::Lost { .. } | Event::SessionLost { .. }), "{event:?}");
            }
        }
    });
}
