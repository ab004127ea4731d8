//! Tests that every example runs, ends by itself, and prints the output that it is meant to show.
//!
//! The examples are compiled into this test, which runs each in a child process of itself. Therefore the test never runs an
//! outdated build, and an example that starts itself as a child process works, too.
#![cfg(feature = "sqlite")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests wait on the real clock, and may panic")]
#![allow(clippy::print_stdout, reason = "a failed test shows the output of the example")]
#![allow(dead_code, reason = "the main functions of the examples are for a shell")]

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

#[path = "../examples/graceful_shutdown.rs"]
mod graceful_shutdown;
#[path = "../examples/leader_scheduler.rs"]
mod leader_scheduler;
#[path = "../examples/on_lost.rs"]
mod on_lost;
#[path = "../examples/once_report.rs"]
mod once_report;
#[path = "../examples/readers_writers.rs"]
mod readers_writers;
#[path = "../examples/transfer.rs"]
mod transfer;

/// Environment variable that tells a child process which example to run.
const EXAMPLE: &str = "STANCHION_EXAMPLE";

/// Not a test: runs an example in a child process.
#[test]
fn example() {
    let Ok(name) = std::env::var(EXAMPLE) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        match name.as_str() {
            "graceful_shutdown" => graceful_shutdown::run().await.unwrap(),
            "leader_scheduler" => leader_scheduler::run().await.unwrap(),
            "on_lost" => on_lost::run().await.unwrap(),
            "once_report" => once_report::run().await.unwrap(),
            "readers_writers" => readers_writers::run().await.unwrap(),
            "transfer" => transfer::run().await.unwrap(),
            unknown => panic!("unknown example {unknown}"),
        }
    });
}

/// Runs an example and returns the lines that it prints.
fn output_of(name: &str) -> Vec<String> {
    let mut process = Command::new(std::env::current_exe().unwrap());
    process.args(["--exact", "example", "--nocapture", "--quiet"]).env(EXAMPLE, name);
    // The child has its own process group, so that the test can kill all of it if it does not end.
    let mut process = process.process_group(0).stdout(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    // The output fits into the pipe, so the child never blocks.
    let ended = loop {
        if let Some(ended) = process.try_wait().unwrap() {
            break Some(ended);
        }
        if start.elapsed() > Duration::from_secs(120) {
            kill_process_group(Pid::from_child(&process), Signal::KILL).unwrap();
            break None;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let mut out = String::new();
    process.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    println!("{out}");
    assert!(ended.is_some_and(|ended| ended.success()), "{name} ended with {ended:?}");
    out.lines().map(str::to_owned).collect()
}

/// Returns the index of the only line with this beginning.
#[track_caller]
fn index_of(lines: &[String], beginning: &str) -> usize {
    let found: Vec<_> = lines.iter().enumerate().filter(|(_, line)| line.starts_with(beginning)).collect();
    assert_eq!(found.len(), 1, "{} lines begin with {beginning:?}: {lines:#?}", found.len());
    found[0].0
}

#[test]
fn scheduler_leaders_have_rising_terms() {
    // The candidates run in the test harness too, and a late one prints its heading among the lines of the example.
    let is_ours =
        |line: &String| [" leads in term ", " was killed", "the terms of"].iter().any(|part| line.contains(part));
    let lines: Vec<_> = output_of("leader_scheduler").into_iter().filter(is_ours).collect();
    let mut led = Vec::new();
    let mut last_term = 0;
    for (at, line) in lines.iter().enumerate() {
        let Some((name, rest)) = line.split_once(" leads in term ") else { continue };
        let (term, metadata) = rest.split_once(": ").unwrap();
        let term: u64 = term.parse().unwrap();
        assert!(term > last_term && metadata.starts_with("process "), "{lines:#?}");
        last_term = term;
        assert_eq!(lines[at + 1], format!("{name} was killed"));
        led.push(name);
    }
    led.sort_unstable();
    assert_eq!(led, ["one", "three", "two"], "each led once: {lines:#?}");
    index_of(&lines, "the terms of the runs never fall: true");
}

#[test]
fn long_job_ends_cleanly_on_sigterm() {
    let lines = output_of("graceful_shutdown");
    index_of(&lines, "batch 1 is imported under fence ");
    let stopped = index_of(&lines, "stopped after batch ");
    assert!(lines[stopped].contains("SIGTERM"), "{lines:#?}");
    let done = lines[stopped].split(' ').nth(3).unwrap().trim_end_matches(':').to_owned();
    assert!(index_of(&lines, &format!("saved the state after batch {done}")) < stopped);
    let rejected = index_of(&lines, "no new locks: ");
    assert!(rejected > stopped && lines[rejected].contains("SIGTERM"), "{lines:#?}");
}

#[test]
fn report_runs_once_a_day_until_success() {
    let lines = output_of("once_report");
    let of_day = |day: &str, what: &str| lines.iter().filter(|line| line.contains(day) && line.contains(what)).count();
    assert_eq!((of_day("day 20412", "made under fence"), of_day("day 20412", "done by")), (1, 2), "{lines:#?}");
    let made = lines.iter().find(|line| line.contains("day 20412 made under")).unwrap();
    let by = made.split_once(':').unwrap().0;
    assert_eq!(of_day("day 20412", &format!("done by {by}")), 2, "{lines:#?}");
    assert!(
        index_of(&lines, "one: day 20413 failed: the printer is on fire")
            < index_of(&lines, "two: day 20413 made under")
    );
    index_of(&lines, "the last run was by two for day Some(20413)");
}

#[test]
fn transfers_keep_money_and_check_fences() {
    let lines = output_of("transfer");
    index_of(&lines, "alice has 9400 cents, bob has 10600, together 20000");
    let rejected = index_of(&lines, "rejected: alice has seen fence ");
    assert!(lines[rejected].ends_with(": 00000000000000000000 is too old"), "{lines:#?}");
}

#[test]
fn loss_is_reported_in_every_way() {
    let lines = output_of("on_lost");
    let forced = "it was force-released";
    index_of(&lines, &format!("the guard is lost: {forced}"));
    index_of(&lines, "its token is cancelled: true");
    assert!(lines[index_of(&lines, "its check fails: key `ledger` in memory: ")].ends_with(forced));
    index_of(&lines, "its release returns AlreadyLost");
    let hook = &lines[index_of(&lines, "the hook got ledger with Fence(")];
    assert!(hook.ends_with(forced), "{hook}");
    assert!(index_of(&lines, "the body works") < index_of(&lines, "the call fails: key `report` in memory: "));
    assert!(!lines.iter().any(|line| line.contains("never gets here")), "{lines:#?}");
    index_of(&lines, "the process whose work cannot be stopped ends by signal Some(6)");
    assert!(lines[index_of(&lines, "its last line: stanchion: key `ledger` was lost")].contains(forced), "{lines:#?}");
}

#[test]
fn readers_share_and_never_pass_a_writer() {
    let lines = output_of("readers_writers");
    assert!(index_of(&lines, "the first reader has the key") < index_of(&lines, "the second reader has the key"));
    let writer = index_of(&lines, "the writer has the key");
    assert!(index_of(&lines, "the writer and two readers wait") < writer);
    index_of(&lines, "while the writer holds the key, holders: 1");
    for reader in ["the third reader has the key", "the fourth reader has the key"] {
        assert!(index_of(&lines, reader) > writer, "{lines:#?}");
    }
    index_of(&lines, "after the writer, readers at the same time: 2");
}
