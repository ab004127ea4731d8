//! The embedded store between processes: hand-off, kill, stop, and what a child inherits.
//!
//! The other processes are this test binary again: [`child`] does what its environment says, and is told to go on by
//! lines on its standard input.
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

/// What every process of these tests does: prints `ready`, then `granted FENCE NANOSECONDS` for each grant.
#[test]
#[allow(clippy::zombie_processes, reason = "the heir is to outlive its parent; the test ends it")]
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
            // Takes its turn, holds until told, releases.
            "hold" => {
                let request = handle.request(&job);
                let token = request.token;
                handle.ask(request).await;
                say("ready");
                let grant = handle.granted(&job, token).await;
                say(&format!("granted {} {}", grant.fence, clock.now().as_nanos()));
                lines.next();
                let now = clock.now().as_nanos();
                assert_eq!(handle.release(&job, token).await, EndOutcome::Released);
                say(&format!("released {now}"));
            }
            // Holds, gives a copy of the session to a child of its own, and waits to be killed.
            "bequeath" => {
                handle.hold(&job).await;
                let copy = handle.store.session_descriptor(handle.session).unwrap();
                rustix::io::fcntl_setfd(&copy, rustix::io::FdFlags::empty()).unwrap();
                let mut heir = Command::new("sleep");
                heir.arg("600").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
                let heir = heir.spawn().unwrap();
                drop(copy);
                say(&format!("granted {} 0", heir.id()));
                lines.next();
            }
            // As many turns as it is told, each a read and a write of a counter in a file that only the lock protects.
            "count" => {
                let turns: u32 = std::env::var("STANCHION_TEST_TURNS").unwrap().parse().unwrap();
                let counter = Path::new(&folder).join("counter");
                say("ready");
                lines.next();
                for _ in 0..turns {
                    let request = AcquireRequest { ..handle.request(&job) };
                    let token = request.token;
                    handle.ask(request).await;
                    let grant = handle.granted(&job, token).await;
                    let text = std::fs::read_to_string(&counter).unwrap_or_else(|_| "0 0".into());
                    let (count, fence) = text.split_once(' ').unwrap();
                    assert!(fence.parse::<Fence>().unwrap() < grant.fence, "fences increase over all processes");
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

/// Another process, killed and waited for when the test ends.
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

    /// Waits for a line that begins so; tells the rest of it.
    fn wait(&mut self, begin: &str) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.output.read_line(&mut line).unwrap() > 0, "it ended before it said `{begin}`");
            if let Some(rest) = line.trim().strip_prefix(&format!("> {begin}")) {
                return rest.trim().to_owned();
            }
        }
    }

    /// Waits for its grant; tells when it was, in nanoseconds since boot.
    fn granted_at(&mut self) -> u64 {
        self.wait("granted").split(' ').nth(1).unwrap().parse().unwrap()
    }

    fn tell(&mut self) {
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
        let _has_ended = self.child.kill();
        let _was_waited_for = self.child.wait();
    }
}

/// The child of a child, by its number: killed when the test ends, however that is.
struct Heir(i32);

impl Drop for Heir {
    fn drop(&mut self) {
        if let Some(pid) = Pid::from_raw(self.0) {
            let _has_ended = kill_process(pid, Signal::KILL);
        }
    }
}

fn median(mut spans: Vec<u64>) -> u64 {
    spans.sort_unstable();
    spans[spans.len() / 2]
}

#[tokio::test]
async fn a_release_hands_off_to_another_process_at_once() {
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
        queue[n - 1].tell();
        let released: u64 = queue[n - 1].wait("released").parse().unwrap();
        spans.push(queue[n].granted_at() - released);
    }
    println!("hand-off between processes: median {} µs of {:?} ns", median(spans.clone()) / 1_000, spans);
    assert!(median(spans) < 20_000_000, "a push, not a poll");
}

#[tokio::test]
async fn the_next_process_has_the_key_soon_after_each_kill() {
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
    // The holder dies, again and again; in between a waiter in the middle does.
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
    assert!(slow <= 1, "each within 50 ms, but for what a busy machine does: {spans:?}");
}

#[tokio::test]
async fn a_dead_holder_is_seen_by_the_next_question_and_by_inspect() {
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
    assert_eq!(files, 2, "the dead leave no files");
}

#[tokio::test]
async fn a_stopped_process_keeps_what_it_holds() {
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
    other.tell();
    handle.granted(&job, waiting).await;
}

#[tokio::test]
async fn a_hold_lives_as_long_as_a_child_that_inherited_its_session() {
    let (_temp, folder) = folder();
    let mut handle = Handle::open(&folder).await;
    let job = key("job");
    let mut other = Other::start("bequeath", &folder);
    let heir = Heir(other.wait("granted").split(' ').next().unwrap().parse().unwrap());
    let (waiting, place) = handle.queue(&job).await;
    assert_eq!(place.check_in, None, "the process is watched");
    other.kill();
    assert_eq!(handle.push().await, Push::Recheck { token: waiting }, "its end is noticed");
    // The process is gone, its lock is not: only asking tells.
    until("the waiter is told to ask by itself", async || {
        matches!(handle.poll(&job, waiting).await,
            PollOutcome::Queued(place) if place.check_in == Some(Duration::from_millis(50)))
    })
    .await;
    drop(heir);
    handle.granted(&job, waiting).await;
}

#[tokio::test]
async fn a_descriptor_of_a_session_is_closed_on_exec() {
    let (_temp, folder) = folder();
    let handle = Handle::open(&folder).await;
    let copy = handle.store.session_descriptor(handle.session).unwrap();
    assert!(rustix::io::fcntl_getfd(copy.as_fd()).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
}

#[tokio::test]
async fn many_processes_count_without_losing_a_turn() {
    let (_temp, folder) = folder();
    let (processes, turns) = (8, 100);
    let mut others: Vec<Other> = (0..processes).map(|_| Other::start_with("count", &folder, turns)).collect();
    others.iter_mut().for_each(|other| drop(other.wait("ready")));
    others.iter_mut().for_each(Other::tell);
    others.iter_mut().for_each(|other| drop(other.wait("done")));
    let text = std::fs::read_to_string(folder.join("counter")).unwrap();
    assert_eq!(text.split_once(' ').unwrap().0, (processes * turns).to_string());
}

#[tokio::test]
async fn a_busy_folder_with_deaths_in_it_goes_on() {
    let (_temp, folder) = folder();
    let handle = Handle::open(&folder).await;
    let mut others: Vec<Other> = (0..6).map(|_| Other::start_with("count", &folder, 100_000)).collect();
    others.iter_mut().for_each(|other| drop(other.wait("ready")));
    others.iter_mut().for_each(Other::tell);
    let counted = || std::fs::read_to_string(folder.join("counter")).ok()?.split_once(' ')?.0.parse::<u32>().ok();
    while let Some(mut other) = others.pop() {
        let goal = counted().unwrap_or(0) + 50;
        until("the others go on", async || counted().is_some_and(|count| count >= goal)).await;
        other.kill();
    }
    let clock = Clock::system();
    let start = clock.now();
    handle.hold(&key("job")).await;
    assert!(clock.now().since(start) < LIMIT);
}
