//! Every example runs, ends by itself and says what it is there to show.
//!
//! The examples are part of this test, which runs them in processes of its own: they are what was built last, and their own
//! children find the way too.
#![cfg(feature = "sqlite")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests wait on the real clock, and may panic")]
#![allow(clippy::print_stdout, reason = "a test that fails shows what the example said")]
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

/// Says which example this process is.
const EXAMPLE: &str = "STANCHION_EXAMPLE";

/// Not a test by itself: what a process that is an example does.
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
            unknown => panic!("there is no example {unknown}"),
        }
    });
}

/// What an example says, line by line.
fn says(name: &str) -> Vec<String> {
    let mut process = Command::new(std::env::current_exe().unwrap());
    process.args(["--exact", "example", "--nocapture", "--quiet"]).env(EXAMPLE, name);
    // A group of its own, so that nothing of it stays when it does not end.
    let mut process = process.process_group(0).stdout(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    // What it says fits into the pipe.
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

/// The place of the only line that begins so.
#[track_caller]
fn place(lines: &[String], beginning: &str) -> usize {
    let found: Vec<_> = lines.iter().enumerate().filter(|(_, line)| line.starts_with(beginning)).collect();
    assert_eq!(found.len(), 1, "{beginning:?} is there {} times: {lines:#?}", found.len());
    found[0].0
}

#[test]
fn the_scheduler_is_led_by_one_after_the_other_in_rising_terms() {
    let lines = says("leader_scheduler");
    let mut led = Vec::new();
    let mut last_term = 0;
    for (at, line) in lines.iter().enumerate() {
        let Some((name, rest)) = line.split_once(" leads in term ") else { continue };
        let (term, says) = rest.split_once(" and says: ").unwrap();
        let term: u64 = term.parse().unwrap();
        assert!(term > last_term && says.starts_with("process "), "{lines:#?}");
        last_term = term;
        assert_eq!(lines[at + 1], format!("{name} was killed"));
        led.push(name);
    }
    led.sort_unstable();
    assert_eq!(led, ["one", "three", "two"], "each led once: {lines:#?}");
    place(&lines, "the runs are in the order of their terms: true");
}

#[test]
fn the_long_job_ends_in_good_order_when_it_is_told_to() {
    let lines = says("graceful_shutdown");
    place(&lines, "batch 1 is in, under the fence ");
    let told = place(&lines, "told to end after batch ");
    assert!(lines[told].contains("SIGTERM"), "{lines:#?}");
    let done = lines[told].split(' ').nth(5).unwrap().trim_end_matches(':').to_owned();
    assert!(place(&lines, &format!("the state after batch {done} is kept")) < told);
    let refused = place(&lines, "nothing new is begun: ");
    assert!(refused > told && lines[refused].contains("SIGTERM"), "{lines:#?}");
}

#[test]
fn the_report_is_made_once_for_each_day_and_again_after_a_failure() {
    let lines = says("once_report");
    let of_day = |day: &str, what: &str| lines.iter().filter(|line| line.contains(day) && line.contains(what)).count();
    assert_eq!((of_day("day 20412", "made under the fence"), of_day("day 20412", "done by")), (1, 2), "{lines:#?}");
    let made = lines.iter().find(|line| line.contains("day 20412 made under")).unwrap();
    let by = made.split_once(':').unwrap().0;
    assert_eq!(of_day("day 20412", &format!("done by {by}")), 2, "{lines:#?}");
    assert!(
        place(&lines, "one: day 20413 failed: the printer is on fire") < place(&lines, "two: day 20413 made under")
    );
    place(&lines, "the last run was by two for day Some(20413)");
}

#[test]
fn transfers_lose_no_money_and_an_old_fence_is_refused() {
    let lines = says("transfer");
    place(&lines, "alice has 9400 cents, bob has 10600, together 20000");
    let refused = place(&lines, "refused: alice has seen the fence ");
    assert!(lines[refused].ends_with(": 00000000000000000000 is too old"), "{lines:#?}");
}

#[test]
fn a_loss_is_told_in_every_way() {
    let lines = says("on_lost");
    let forced = "it was force-released";
    place(&lines, &format!("the guard says: {forced}"));
    place(&lines, "its token is cancelled: true");
    assert!(lines[place(&lines, "a check fails: key `ledger` in memory: ")].ends_with(forced));
    place(&lines, "the release finds: AlreadyLost");
    let hook = &lines[place(&lines, "the hook was told of ledger with Fence(")];
    assert!(hook.ends_with(forced), "{hook}");
    assert!(place(&lines, "the body works") < place(&lines, "the call fails: key `report` in memory: "));
    assert!(!lines.iter().any(|line| line.contains("never comes here")), "{lines:#?}");
    place(&lines, "a process that does not listen ends by signal Some(6)");
    assert!(lines[place(&lines, "its last words: stanchion: key `ledger` was lost")].contains(forced), "{lines:#?}");
}

#[test]
fn readers_share_and_do_not_pass_a_writer_that_waits() {
    let lines = says("readers_writers");
    assert!(place(&lines, "the first reader is in") < place(&lines, "the second reader is in"));
    let writer = place(&lines, "the writer is in");
    assert!(place(&lines, "the writer and two readers wait") < writer);
    place(&lines, "beside the writer there are 0 holders");
    for reader in ["the third reader is in", "the fourth reader is in"] {
        assert!(place(&lines, reader) > writer, "{lines:#?}");
    }
    place(&lines, "2 readers are in together");
}
