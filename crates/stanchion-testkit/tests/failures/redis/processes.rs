//! Kills and stops processes that hold keys in Redis.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout, reason = "test code")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use stanchion::{Fence, Locks};
use stanchion_testkit::block_on;
use stanchion_testkit::servers::{Redis as Kind, RedisServer};

/// Key, URL and session ttl in milliseconds of a child process that holds a lock.
const CHILD: &str = "STANCHION_TEST_HOLDER";

const AT_ONCE: usize = 20;
const ROUNDS: usize = 10;

/// Runs in the child processes; it is not a test of its own.
#[test]
fn holder() {
    let Ok(order) = std::env::var(CHILD) else { return };
    let [key, url, ttl]: [&str; 3] = order.split(' ').collect::<Vec<_>>().try_into().unwrap();
    block_on(async {
        let ttl = Duration::from_millis(ttl.parse().unwrap());
        let locks = Locks::builder(url).session_ttl(ttl).open().await.unwrap();
        let guard = locks.lock(key).await.unwrap();
        println!("held {}", guard.fence().get());
        // The parent asks whether the child considers its guard valid. The child ends with its parent's pipe.
        for line in std::io::stdin().lines() {
            if line.unwrap() == "still?" {
                println!("believes {}", guard.is_held());
            }
        }
    });
}

struct Holder {
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
    fence: Fence,
}

impl Holder {
    fn start(key: &str, url: &str, ttl: Duration) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["redis::processes::holder", "--exact", "--nocapture"])
            .env(CHILD, format!("{key} {url} {}", ttl.as_millis()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let questions = child.stdin.take().unwrap();
        let mut holder =
            Self { questions, answers: BufReader::new(child.stdout.take().unwrap()), child, fence: Fence::new(0) };
        holder.fence = Fence::new(holder.answer("held ").parse().unwrap());
        holder
    }

    fn answer(&mut self, begins: &str) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.answers.read_line(&mut line).unwrap(), 0, "the child has ended");
            // The child's test harness prints lines of its own, and may share a line.
            if let Some((_, answer)) = line.trim_end().split_once(begins) {
                return answer.to_owned();
            }
        }
    }

    fn signal(&self, name: &str) {
        assert!(
            Command::new("kill").args([format!("-{name}"), self.child.id().to_string()]).status().unwrap().success()
        );
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Kills 200 holders, each with a waiter, which is served as soon as the session has expired.
#[test]
#[ignore = "long"]
fn waiters_are_served_soon_after_kills() {
    let ttl = Duration::from_secs(2);
    let server = RedisServer::start(Kind::Redis7);
    let url = format!("redis://127.0.0.1:{}", server.port());
    block_on(async {
        let locks = Locks::open(&url).await.unwrap();
        let mut waits = Vec::new();
        for round in 0..ROUNDS {
            let holders: Vec<_> = (0..AT_ONCE).map(|at| Holder::start(&format!("{round}-{at}"), &url, ttl)).collect();
            let waiting: Vec<_> = (0..AT_ONCE)
                .map(|at| {
                    let locks = locks.clone();
                    tokio::spawn(async move {
                        let guard = locks.lock(format!("{round}-{at}")).await.unwrap();
                        (Instant::now(), guard.fence())
                    })
                })
                .collect();
            for at in 0..AT_ONCE {
                let key = format!("{round}-{at}");
                stanchion_testkit::until("queued", async || locks.inspect(&key).await.unwrap().waiters.len() == 1)
                    .await;
            }
            let mut killed = Vec::new();
            for holder in holders {
                killed.push((Instant::now(), holder.fence));
                drop(holder);
            }
            for (waiting, (killed, fence)) in waiting.into_iter().zip(killed) {
                let (served, next) = waiting.await.unwrap();
                assert!(next > fence);
                waits.push(served - killed);
            }
        }
        waits.sort_unstable();
        let p99 = waits[waits.len() * 99 / 100];
        println!("{} kills: p50 {:?}, p99 {p99:?}, longest {:?}", waits.len(), waits[waits.len() / 2], waits.last());
        assert_eq!(waits.len(), 200);
        assert!(p99 <= ttl + Duration::from_millis(500), "{waits:?}");
    });
}

/// A resource that remembers the highest fence it has seen.
#[derive(Default)]
struct Resource {
    highest: Option<Fence>,
    accepted_without_a_check: usize,
}

impl Resource {
    fn write(&mut self, fence: Fence) -> bool {
        self.accepted_without_a_check += 1;
        let is_new = self.highest <= Some(fence);
        self.highest = self.highest.max(Some(fence));
        is_new
    }
}

/// Stops 200 holders for three session lifetimes. Then they write, and the checking resource rejects each of them.
#[test]
#[ignore = "long"]
fn old_fence_is_rejected_after_a_stop() {
    let ttl = Duration::from_millis(500);
    let server = RedisServer::start(Kind::Redis7);
    let url = format!("redis://127.0.0.1:{}", server.port());
    block_on(async {
        let locks = Locks::open(&url).await.unwrap();
        let (mut refused, mut unchecked) = (0, 0);
        for round in 0..ROUNDS {
            let mut holders: Vec<_> =
                (0..AT_ONCE).map(|at| Holder::start(&format!("{round}-{at}"), &url, ttl)).collect();
            for holder in &holders {
                holder.signal("STOP");
            }
            let mut resources = Vec::new();
            for (at, holder) in holders.iter().enumerate() {
                let mut resource = Resource::default();
                assert!(resource.write(holder.fence));
                let guard = locks.lock(format!("{round}-{at}")).await.unwrap();
                assert!(resource.write(guard.fence()), "the next holder has a higher fence");
                resources.push(resource);
            }
            tokio::time::sleep(ttl * 3).await;
            for (holder, resource) in holders.iter_mut().zip(&mut resources) {
                holder.signal("CONT");
                refused += usize::from(!resource.write(holder.fence));
                unchecked += resource.accepted_without_a_check - 2;
                writeln!(holder.questions, "still?").unwrap();
                assert_eq!(holder.answer("believes "), "false", "the child knows of its loss too");
            }
        }
        assert_eq!((refused, unchecked), (200, 200));
    });
}
