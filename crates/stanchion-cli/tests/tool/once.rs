//! `once`: at most one run per period.
#![allow(clippy::unwrap_used, reason = "test code")]

use crate::common::*;
use rustix::process::Signal;

#[test]
fn once_runs_per_period_in_silence() {
    let world = World::new();
    let run = || world.stanchion(["once", "k", "--every", "1h", "-c", "echo x >> runs; sleep 0.01"]).finish();
    for _ in 0..3 {
        run().code(0).silent();
    }
    assert_eq!(world.read("runs"), "x\n");
    let skipped = world.stanchion(["once", "k", "--every", "1h", "-v", "--", "true"]).finish();
    skipped.code(0).reports(&["key `k` was done by sh@", " ago, and not again for another 53m"]);
    world.stanchion(["once", "k", "--every", "1h", "-E", "7", "--", "true"]).finish().code(7).silent();
}

#[test]
fn period_counts_from_the_start() {
    let world = World::new();
    // It takes longer than its period: the next one may run at once.
    world.stanchion(["once", "k", "--every", "100ms", "--", "sleep", "0.2"]).finish().code(0).silent();
    world.stanchion(["once", "k", "--every", "100ms", "-E", "7", "--", "true"]).finish().code(0).silent();
    // And a short one opens after the rest of it.
    until("the next period", || {
        world.stanchion(["once", "k", "--every", "100ms", "-E", "7", "--", "true"]).finish().code == Some(0)
    });
}

#[test]
fn failed_run_frees_the_key() {
    let world = World::new();
    world.stanchion(["once", "k", "--every", "1h", "--", "sh", "-c", "exit 3"]).finish().code(3).silent();
    world.stanchion(["once", "k", "--every", "1h", "-c", "kill -TERM $$"]).finish().code(143).silent();
    world.stanchion(["once", "k", "--every", "1h", "--", "no-such"]).finish().code(127).says(&["not found"]);
    world.stanchion(["once", "k", "--every", "1h", "-E", "7", "--", "true"]).finish().code(0).silent();
    world.stanchion(["once", "k", "--every", "1h", "-E", "7", "--", "true"]).finish().code(7).silent();
}

#[test]
fn it_does_not_wait_for_one_that_runs() {
    let world = World::new();
    let running = world.stanchion(["once", "k", "--every", "1h", "-c", "touch $D/ready; exec sleep 600"]).start();
    world.until_file("ready");
    world.stanchion(["once", "k", "--every", "1h", "--", "touch", "second"]).finish().code(0).silent();
    let noted = world.stanchion(["once", "k", "--every", "1h", "-v", "--", "touch", "second"]).finish();
    noted.code(0).reports(&["held by sh@"]);
    running.send(Signal::TERM);
    running.finish().code(143);
    assert!(!world.path("second").exists());
}

#[test]
fn of_many_at_the_same_time_one_runs() {
    let world = World::new();
    let all: Vec<_> =
        (0..20).map(|_| world.stanchion(["once", "k", "--every", "1h", "-c", "echo x >> runs"]).start()).collect();
    for one in all {
        one.finish().code(0).silent();
    }
    assert_eq!(world.read("runs"), "x\n");
}

#[test]
fn slot_runs_once_despite_other_clocks() {
    let world = World::new();
    let run = |slot: &str| world.stanchion(["once", "k", "--slot", slot, "-E", "7", "-c", "echo x >> runs"]).finish();
    run("20260102").code(0).silent();
    run("20260102").code(7).silent();
    run("20260101").code(7).silent();
    run("20260103").code(0).silent();
    assert_eq!(world.read("runs"), "x\nx\n");
    world.stanchion(["once", "k", "--", "true"]).finish().code(64).says(&["--every"]);
}

#[test]
fn forced_and_forgotten_runs_run_again() {
    let world = World::new();
    let once = |more: &[&str]| {
        world.stanchion([&["once", "k", "--every", "1h"], more, &["-E", "7", "-c", "echo x >> runs"]].concat()).finish()
    };
    once(&[]).code(0).silent();
    once(&[]).code(7).silent();
    once(&["--force"]).code(0).silent();
    once(&[]).code(7).silent();
    assert_eq!(world.read("runs"), "x\nx\n");
    // Forced or not, it never runs beside another.
    let running =
        world.stanchion(["once", "k", "--every", "1h", "--force", "-c", "touch ready; exec sleep 600"]).start();
    world.until_file("ready");
    once(&["--force"]).code(7).silent();
    running.send(Signal::TERM);
    running.finish().code(143);
    world.stanchion(["once", "k", "--forget"]).finish().code(0).silent();
    assert!(!world.stanchion(["inspect", "k"]).finish().ok().contains("last run"));
    once(&[]).code(0).silent();
    assert_eq!(world.read("runs"), "x\nx\nx\n");
    let other = world.stanchion(["once", "other", "--forget", "-v"]).finish();
    other.code(0).says(&["no run of key `other` is recorded"]);
}

#[test]
fn ls_lists_recorded_runs() {
    let world = World::new();
    world.stanchion(["ls", "--runs"]).finish().code(0).silent();
    world.stanchion(["once", "mail", "--slot", "7", "--", "true"]).finish().code(0);
    world.stanchion(["once", "report", "--every", "1h", "--", "true"]).finish().code(0);
    world.stanchion(["once", "report:b", "--every", "1h", "--", "sh", "-c", "exit 3"]).finish().code(3);
    let text = world.stanchion(["ls", "--runs"]).finish().ok();
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[0].starts_with("KEY       LAST RUN   AGO") && lines[0].ends_with("FENCE"), "{text}");
    assert!(lines[1].starts_with("mail      succeeded  ") && lines[1].contains("  7     true@"), "{text}");
    assert!(lines[2].starts_with("report    succeeded  ") && lines[2].contains("53m"), "{text}");
    assert!(lines[3].starts_with("report:b  failed     ") && lines.len() == 4, "{text}");
    assert_eq!(world.stanchion(["ls", "--runs", "report"]).finish().ok().lines().count(), 3);
    let json = world.stanchion(["ls", "--runs", "--json", "mail"]).finish().ok();
    let run: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&run["key"], &run["succeeded"], &run["slot"]), (&"mail".into(), &true.into(), &7.into()));
    assert!(run["fence"].as_u64().unwrap() < 1 << 53 && run["age_ms"].is_u64() && run["closed_for_ms"].is_null());
    let of_inspect = world.stanchion(["inspect", "mail", "--json"]).finish().ok();
    let last: serde_json::Value = serde_json::from_str(&of_inspect).unwrap();
    let names = |value: &serde_json::Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let without_the_key: Vec<_> = names(&run).into_iter().filter(|name| name != "key").collect();
    assert_eq!(without_the_key, names(&last["last_run"]));
    assert_eq!(world.stanchion(["ls"]).finish().ok(), "", "a record is not a key in use");
}

#[test]
fn ls_names_unreadable_records() {
    let world = World::new();
    for key in ["good", "newer"] {
        world.stanchion(["once", key, "--every", "1h", "--", "true"]).finish().code(0);
    }
    let db = rusqlite::Connection::open(world.path("state/stanchion/locks.db")).unwrap();
    let record = "SELECT id FROM keys WHERE name = '6:' || char(1) || 'runs/newer'";
    let changed = db.execute(&format!("UPDATE holds SET metadata = '2 a new format' WHERE key_id = ({record})"), []);
    assert_eq!(changed.unwrap(), 1);
    let listed = world.stanchion(["ls", "--runs"]).finish().code(65);
    assert!(listed.stdout.contains("\ngood  succeeded  ") && listed.stdout.lines().count() == 2, "{listed:?}");
    listed.says(&["damaged entry `newer`: a newer version of stanchion wrote the record", "update this version"]);
    world.stanchion(["once", "newer", "--forget"]).finish().code(78).says(&["update this version"]);
}

#[test]
fn inspect_shows_the_last_run() {
    let world = World::new();
    world.stanchion(["once", "k", "--every", "1h", "--", "sh", "-c", "exit 3"]).finish().code(3);
    let text = world.stanchion(["inspect", "k"]).finish().ok();
    assert!(text.contains("last run failed") && text.contains("by sh@"), "{text}");
    world.stanchion(["once", "k", "--every", "1h", "--", "true"]).finish().code(0);
    let text = world.stanchion(["inspect", "k"]).finish().ok();
    assert!(text.contains("last run succeeded") && text.contains("not again for another 53m"), "{text}");
    let json: serde_json::Value =
        serde_json::from_str(&world.stanchion(["inspect", "k", "--json"]).finish().ok()).unwrap();
    let last = &json["last_run"];
    assert_eq!((last["succeeded"].as_bool(), last["slot"].is_null()), (Some(true), true));
    assert!(last["closed_for_ms"].as_u64().unwrap() > 53 * 60_000 && json["key"] == "k");
    assert!(world.stanchion(["ls"]).finish().ok().is_empty(), "the key itself is free");
}
