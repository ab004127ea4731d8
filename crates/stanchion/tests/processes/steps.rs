//! Tests the operations of the embedded store between processes: hand-off, kill, stop, and inherited sessions.
//!
//! A test starts this binary again as another process, in which [`child`] runs the task that the environment names.
//! Each line on its standard input makes the task continue.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, reason = "helpers of tests")]

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use crate::sqlite_support::{Handle, LIMIT, folder, key, until};
use rustix::process::{Pid, Signal, kill_process};
use stanchion::store::{AcquireRequest, EndOutcome, PollOutcome, Push, Store};
use stanchion::{Clock, Fence};

/// Runs the task of another process, which prints `ready`, and then `granted FENCE NANOSECONDS` for its grant. Does
/// nothing when it runs as a test.
#[test]
#[allow(clippy::zombie_processes, reason = "the grandchild must outlive its parent, and the test kills it")]
fn child() {
    let Ok(task) = std::env::var("STANCHION_TEST_CHILD") else { return };
    let folder = std::env::var("STANCHION_TEST_FOLDER").unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let mut lines = std::io::stdin().lines();
    runtime.block_on(async {
        let mut handle = Handle::open(Path::new(&folder)).await;
        let clock = Clock::system();
        let job = key("job");
        let say = |line: &str| {
            let mut out = std::io::stdout();
            writeln!(out, "\n> {line}").unwrap();
            out.flush().unwrap();
        };
        match task.as_str() {
            // Waits for the key, holds it until a line arrives, and releases it.
            "hold" => {
                let request = handle.request(&job);
                let token = request.token;
                handle.acquire(request).await;
                say("ready");
                let grant = handle.granted(&job, token).await;
                say(&format!("granted {} {}", grant.fence, clock.now().as_nanos()));
                lines.next();
                let now = clock.now().as_nanos();
                assert_eq!(handle.release(&job, token).await, EndOutcome::Released);
                say(&format!("released {now}"));
            }
            // Holds the key, passes a copy of its session to a child, and waits until it is killed.
            "bequeath" => {
                handle.hold(&job).await;
                let copy = handle.store.session_descriptor(handle.session).unwrap();
                rustix::io::fcntl_setfd(&copy, rustix::io::FdFlags::empty()).unwrap();
                let mut grandchild = Command::new("sleep");
                grandchild.arg("600").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
                let grandchild = grandchild.spawn().unwrap();
                drop(copy);
                say(&format!("granted {} 0", grandchild.id()));
                lines.next();
            }
            // Acquires the key several times, and each time increments a counter in a file that only the lock protects.
            "count" => {
                let turns: u32 = std::env::var("STANCHION_TEST_TURNS").unwrap().parse().unwrap();
                let counter = Path::new(&folder).join("counter");
                say("ready");
                lines.next();
                for _ in 0..turns {
                    let request = AcquireRequest { ..handle.request(&job) };
                    let token = request.token;
                    handle.acquire(request).await;
                    let grant = handle.granted(&job, token).await;
                    let text = std::fs::read_to_string(&counter).unwrap_or_else(|_| "0 0".into());
                    let (count, fence) = text.split_once(' ').unwrap();
                    assert!(fence.parse::<Fence>().unwrap() < grant.fence, "fences increase across all processes");
                    let count = count.parse::<u32>().unwrap() + 1;
                    std::fs::write(&counter, format!("{count} {}", grant.fence)).unwrap();
                    assert_eq!(handle.release(&job, token).await, EndOutcome::Released);
                }
                say("done");
            }
            other => panic!("no such task: {other}"),
        }
    });
}

/// Another process, which is killed when the test ends.
struct Other {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Other {
    fn start(task: &str, folder: &Path) -> Self {
        Self::start_with(task, folder, 0)
    }

    fn start_with(task: &str, folder: &Path, turns: u32) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "steps::child", "--nocapture", "--test-threads=1"])
            .env("STANCHION_TEST_CHILD", task)
            .env("STANCHION_TEST_FOLDER", folder)
            .env("STANCHION_TEST_TURNS", turns.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, input, output }
    }

    /// Waits for a line that begins with `begin`, and returns the rest of the line.
    fn wait(&mut self, begin: &str) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "the process exited before it printed `{begin}`");
            if let Some(rest) = line.trim().strip_prefix(&format!("> {begin}")) {
                return rest.trim().to_owned();
            }
        }
    }

    /// Waits for the grant, and returns its time in nanoseconds since boot.
    fn granted_at(&mut self) -> u64 {
        self.wait("granted").split(' ').nth(1).unwrap().parse().unwrap()
    }

    /// Makes the task continue.
    fn resume(&mut self) {
        writeln!(self.input).unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.child.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill(); // an error: the process has exited already
        let _ = self.child.wait();
    }
}

/// The process id of another process's child, which is killed when the test ends.
struct Grandchild(i32);

impl Drop for Grandchild {
    fn drop(&mut self) {
        if let Some(pid) = Pid::from_raw(self.0) {
            let _ = kill_process(pid, Signal::KILL); // an error: the process has exited already
        }
    }
}

fn median(mut spans: Vec<u64>) -> u64 {
    spans.sort_unstable();
    spans[spans.len() / 2]
}

#[tokio::test]
async fn release_hands_off_to_another_process() {
    let (_temp, folder) = folder();
    let mut queue: Vec<Other> = Vec::new();
    for _ in 0..8 {
        let mut other = Other::start("hold", &folder);
        other.wait("ready");
        queue.push(other);
    }
    queue[0].granted_at();
    let mut spans = Vec::new();
    for n in 1..queue.len() {
        queue[n - 1].resume();
        let released: u64 = queue[n - 1].wait("released").parse().unwrap();
        spans.push(queue[n].granted_at() - released);
    }
    println!("hand-off between processes: median {} µs of {:?} ns", median(spans.clone()) / 1_000, spans);
    assert!(median(spans) < 20_000_000, "the hand-off waited for a poll instead of a push");
}

#[tokio::test]
async fn killed_process_hands_off_quickly() {
    let (_temp, folder) = folder();
    let clock = Clock::system();
    let mut queue: Vec<Other> = Vec::new();
    for _ in 0..11 {
        let mut other = Other::start("hold", &folder);
        other.wait("ready");
        queue.push(other);
    }
    queue[0].granted_at();
    let mut spans = Vec::new();
    // Kill each holder, and once a waiter in the middle.
    for n in 1..queue.len() {
        if n == 4 {
            queue[6].kill();
        }
        if n == 6 {
            continue;
        }
        let before = if n == 7 { 5 } else { n - 1 };
        let killed = clock.now().as_nanos();
        queue[before].kill();
        spans.push(queue[n].granted_at() - killed);
    }
    println!("takeover after kill -9: median {} µs of {:?} ns", median(spans.clone()) / 1_000, spans);
    let slow = spans.iter().filter(|span| **span > 50_000_000).count();
    assert!(slow <= 1, "a busy machine may delay one hand-off beyond 50 ms, but not more: {spans:?}");
}

#[tokio::test]
async fn requests_and_inspect_see_a_killed_holder() {
    let (_temp, folder) = folder();
    let handle = Handle::open(&folder).await;
    let job = key("job");
    for _ in 0..3 {
        let mut other = Other::start("hold", &folder);
        other.granted_at();
        assert_eq!(handle.store.inspect(&job).await.unwrap().outcome.holders.len(), 1);
        other.kill();
        assert!(handle.store.inspect(&job).await.unwrap().outcome.holders.is_empty());
        let mut other = Other::start("hold", &folder);
        other.granted_at();
        other.kill();
        let (token, _) = handle.hold(&job).await;
        handle.release(&job, token).await;
    }
    let files = std::fs::read_dir(folder.join("sessions")).unwrap().count();
    assert_eq!(files, 2, "expired sessions leave no files");
}

#[tokio::test]
async fn stopped_process_keeps_its_hold() {
    let (_temp, folder) = folder();
    let mut handle = Handle::open(&folder).await;
    let job = key("job");
    let mut other = Other::start("hold", &folder);
    other.granted_at();
    other.signal(Signal::STOP);
    let (waiting, _) = handle.queue(&job).await;
    for _ in 0..50 {
        assert!(matches!(handle.poll(&job, waiting).await, PollOutcome::Queued(_)));
    }
    other.signal(Signal::CONT);
    other.resume();
    handle.granted(&job, waiting).await;
}

#[tokio::test]
async fn hold_lasts_while_a_child_has_its_session() {
    let (_temp, folder) = folder();
    let mut handle = Handle::open(&folder).await;
    let job = key("job");
    let mut other = Other::start("bequeath", &folder);
    let grandchild = Grandchild(other.wait("granted").split(' ').next().unwrap().parse().unwrap());
    let (waiting, place) = handle.queue(&job).await;
    assert_eq!(place.check_in, None, "the process is watched");
    other.kill();
    assert_eq!(handle.push().await, Push::Recheck { token: waiting }, "the exit of the process is noticed");
    // The process has exited, but the lock of its session is still held, so only polling finds the end of the session.
    until("the store asks the waiter to poll", async || {
        matches!(handle.poll(&job, waiting).await,
            PollOutcome::Queued(place) if place.check_in == Some(Duration::from_millis(50)))
    })
    .await;
    drop(grandchild);
    handle.granted(&job, waiting).await;
}

#[tokio::test]
async fn session_descriptor_closes_on_exec() {
    let (_temp, folder) = folder();
    let handle = Handle::open(&folder).await;
    let copy = handle.store.session_descriptor(handle.session).unwrap();
    assert!(rustix::io::fcntl_getfd(copy.as_fd()).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
}

#[tokio::test]
async fn many_processes_lose_no_increment() {
    let (_temp, folder) = folder();
    let (processes, turns) = (8, 100);
    let mut others: Vec<Other> = (0..processes).map(|_| Other::start_with("count", &folder, turns)).collect();
    others.iter_mut().for_each(|other| drop(other.wait("ready")));
    others.iter_mut().for_each(Other::resume);
    others.iter_mut().for_each(|other| drop(other.wait("done")));
    let text = std::fs::read_to_string(folder.join("counter")).unwrap();
    assert_eq!(text.split_once(' ').unwrap().0, (processes * turns).to_string());
}

#[tokio::test]
async fn kills_do_not_stop_the_other_processes() {
    let (_temp, folder) = folder();
    let handle = Handle::open(&folder).await;
    let mut others: Vec<Other> = (0..6).map(|_| Other::start_with("count", &folder, 100_000)).collect();
    others.iter_mut().for_each(|other| drop(other.wait("ready")));
    others.iter_mut().for_each(Other::resume);
    let count = || std::fs::read_to_string(folder.join("counter")).ok()?.split_once(' ')?.0.parse::<u32>().ok();
    while let Some(mut other) = others.pop() {
        let goal = count().unwrap_or(0) + 50;
        until("the other processes make progress", async || count().is_some_and(|count| count >= goal)).await;
        other.kill();
    }
    let clock = Clock::system();
    let start = clock.now();
    handle.hold(&key("job")).await;
    assert!(clock.now().since(start) < LIMIT);
}
