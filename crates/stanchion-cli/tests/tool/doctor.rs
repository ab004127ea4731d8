//! Tests `doctor` on the embedded store.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::io::{BufRead as _, BufReader};

use crate::common::*;
use rustix::process::Signal;
use serde_json::Value;

const CHECKS: [&str; 8] = ["store", "open", "server", "rights", "clock", "hand-off", "latency", "settings"];

/// A world in which a key has been held once, so that its default store exists.
fn used_world() -> World {
    let world = World::new();
    world.stanchion(["run", "k", "--", "true"]).finish().code(0);
    world
}

fn checks(world: &World, arguments: &[&str]) -> Vec<Value> {
    let out = world.stanchion([&["doctor", "--json"], arguments].concat()).finish();
    out.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn doctor_prints_one_line_per_check() {
    let world = used_world();
    let out = world.stanchion(["doctor"]).finish().code(0);
    assert_eq!(out.stderr, "");
    let words: Vec<Vec<&str>> = out.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words.iter().map(|line| line[1]).collect::<Vec<_>>(), CHECKS, "{out:?}");
    let state = world.path("state/stanchion").display().to_string();
    for part in [
        &format!("sqlite:{state}, the default, because"),
        "ok       server    SQLite 3.",
        "skipped  clock     the embedded store uses this machine's clock",
        "ok       hand-off  pushed to the waiter within ",
        "ok       rights    a key was acquired and released",
    ] {
        assert!(out.stdout.contains(part), "no `{part}` in {out:?}");
    }
    assert_eq!(world.stanchion(["ls"]).finish().ok(), "", "nothing is left");
    world.stanchion(["doctor", "-q"]).finish().code(0).silent();
    let help = world.stanchion(["doctor", "--help"]).finish().ok();
    let lines = checks(&world, &[]);
    assert_eq!(lines.iter().map(|line| line["check"].as_str().unwrap()).collect::<Vec<_>>(), CHECKS);
    for line in lines {
        for name in line.as_object().unwrap().keys().chain([&line["check"].as_str().unwrap().to_owned()]) {
            assert!(help.contains(name.as_str()), "`{name}` is not in the help");
        }
        let has_time = matches!(line["check"].as_str().unwrap(), "open" | "hand-off" | "latency");
        assert_eq!(line["took_us"].is_u64(), has_time, "{line}");
    }
}

#[test]
fn strict_doctor_fails_on_warnings() {
    let world = used_world();
    // A folder in which the system deletes old files.
    let tmp = tempfile::tempdir_in("/tmp").unwrap();
    let store = format!("sqlite:{}", tmp.path().join("locks").display());
    world.stanchion(["run", "k", "--store", &store, "--", "true"]).finish().code(0);
    let out = world.stanchion(["doctor", "--store", &store]).finish().code(0);
    assert!(out.stdout.contains("warning  settings  ") && out.stdout.contains("deletes old files"), "{out:?}");
    world.stanchion(["doctor", "--strict", "--store", &store]).finish().code(78);
}

#[test]
fn doctor_creates_no_store() {
    let world = World::new();
    let out = world.stanchion(["doctor"]).finish().code(0);
    assert!(out.stdout.starts_with("skipped  store ") && out.stdout.contains("does not exist yet"), "{out:?}");
    assert_eq!(out.stdout.lines().count(), CHECKS.len());
    assert!(!world.path("state/stanchion").exists());
    let typo = world.path("typo");
    let out = world.stanchion(["doctor", "--store", &format!("sqlite:{}", typo.display())]).finish().code(78);
    assert!(out.stdout.starts_with("failed   store ") && out.stdout.contains("no store in `"), "{out:?}");
    assert!(!typo.exists());
}

#[test]
fn doctor_says_why_the_store_was_chosen() {
    let world = used_world();
    let store = format!("sqlite:{}", world.path("state/stanchion").display());
    world.write_store_file("file", &store);
    let file = world.path("file");
    let file = file.to_str().unwrap();
    let said = |invocation: Invocation| invocation.finish().code(0).stdout.lines().next().unwrap().to_owned();
    let plain = |arguments: &[&str]| world.stanchion([&["doctor"], arguments].concat());
    let table = [
        (plain(&["--store", &store]), "named by --store"),
        (plain(&["--store-file", file]), "named by --store-file"),
        (plain(&[]).env("STANCHION_STORE", &store), "named by STANCHION_STORE"),
        (plain(&[]).env("STANCHION_STORE_FILE", file), "named by STANCHION_STORE_FILE"),
        (
            plain(&["--store", &store]).env("STANCHION_STORE", "x:").env("STANCHION_STORE_FILE", "y"),
            "named by --store; STANCHION_STORE has no effect; STANCHION_STORE_FILE has no effect",
        ),
    ];
    for (invocation, reason) in table {
        assert_eq!(said(invocation), format!("ok       store     {store}, {reason}"));
    }
    let wrong = world.stanchion(["doctor"]).env("STANCHION_STORE", "nonsense").finish().code(64);
    assert!(wrong.stdout.starts_with("failed   store     STANCHION_STORE holds no URL"), "{wrong:?}");
}

#[test]
fn doctor_shows_no_password() {
    let world = World::new();
    let out = world.stanchion(["doctor"]).env("STANCHION_STORE", "redis://u:s3ntinel@127.0.0.1:1/0").finish().code(69);
    assert!(!out.stdout.contains("s3ntinel") && out.stderr.is_empty(), "{out:?}");
    let lines: Vec<_> = out.stdout.lines().collect();
    assert!(lines[0].starts_with("ok       store     redis://***@127.0.0.1:1/0, named by STANCHION_STORE"), "{out:?}");
    assert!(lines[1].starts_with("failed   open      ") && lines[1].contains("127.0.0.1:1"), "{out:?}");
    assert!(lines[2..].iter().all(|line| line.starts_with("skipped ")) && lines.len() == CHECKS.len(), "{out:?}");
}

#[test]
fn killed_doctor_leaves_nothing() {
    let world = used_world();
    for lines in 1..7 {
        let mut doctor = world.stanchion(["doctor"]).start();
        let mut out = BufReader::new(doctor.stdout()).lines();
        (0..lines).for_each(|_| drop(out.next().unwrap().unwrap()));
        doctor.send(Signal::KILL);
        doctor.finish();
        assert_eq!(world.stanchion(["ls"]).finish().ok(), "", "after {lines} lines");
    }
}
