//! Tests `elect`: one leader at a time, and again after a loss.
#![allow(clippy::unwrap_used, reason = "test code")]

use crate::common::*;
use rustix::process::Signal;

#[test]
fn killed_leader_is_followed() {
    let world = World::new();
    let mut candidates: Vec<_> = (0..3).map(|_| world.candidate(&[])).collect();
    for round in 1..=2 {
        world.until_terms(round);
        world.until_waiting("k", 3 - round);
        let (_, leader) = world.terms()[round - 1];
        let at = candidates.iter().position(|candidate| candidate.pid() == leader).unwrap();
        candidates.remove(at).send(Signal::KILL);
    }
    world.until_terms(3);
    candidates[0].send(Signal::TERM);
    candidates.remove(0).finish().code(143).silent();
    world.until_nothing_runs();
    world.assert_free("k");
    assert!(world.terms().is_sorted_by(|a, b| a.0 < b.0), "{:?}", world.terms());
    assert_eq!(world.read("overlap"), "");
}

#[test]
fn lost_leader_queues_again() {
    let world = World::new();
    let first = world.candidate(&["--ready-file", "first"]);
    world.until_terms(1);
    world.until_file("first");
    let second = world.candidate(&["--ready-file", "second"]);
    world.until_waiting("k", 1);
    assert!(!world.path("second").exists());
    let fence = world.terms()[0].0.to_string();
    assert_eq!(world.read("first"), format!("{fence}\n"));
    world.stanchion(["force-release", "k", "--fence", &fence, "--reason", "it hangs"]).finish().code(0);
    world.until_terms(2);
    world.until_file("second");
    world.until_waiting("k", 1);
    assert!(!world.path("first").exists());
    // A drain: the next one leads.
    second.send(Signal::TERM);
    second.finish().code(143).silent();
    assert!(!world.path("second").exists());
    world.until_terms(3);
    world.until_file("first");
    first.send(Signal::TERM);
    let lost =
        "key `k` was lost while the command ran: it was force-released (it hangs); the command was ended; waiting";
    first.finish().code(143).says(&[lost]);
    assert!(!world.path("first").exists());
    let terms = world.terms();
    assert!(terms.len() == 3 && terms[0].1 == terms[2].1 && terms[0].1 != terms[1].1, "{terms:?}");
    // A forced release frees the key at once, so the commands may overlap here.
    assert!(terms.is_sorted_by(|a, b| a.0 < b.0), "{terms:?}");
    world.assert_free("k");
}

#[test]
fn max_hold_steps_down_and_runs_again() {
    let world = World::new();
    let script = "echo $STANCHION_FENCE >> $D/fences; test $(wc -l < $D/fences) = 3 && exit 5; exec sleep 600";
    let finished = world.stanchion(["elect", "k", "--max-hold", "200ms", "-c", script]).finish().code(5);
    assert_eq!(finished.stderr.matches("the command was ended; waiting for the key again").count(), 2, "{finished:?}");
    world.assert_free("k");
}

#[test]
fn ready_file_goes_before_the_command() {
    let world = World::new();
    let script = format!(
        "trap 'test -e $D/ready || touch $D/gone; exit 0' TERM; test -e $D/again && exit 4; touch $D/again
        {FOREVER}"
    );
    let arguments = ["elect", "k", "--ready-file", "ready", "--max-hold", "2s", "-c", &script];
    world.stanchion(arguments).finish().code(4).says(&["the command was ended; waiting for the key again"]);
    assert!(world.path("gone").exists() && !world.path("ready").exists());
}

#[test]
fn stale_ready_file_is_removed_at_start() {
    let world = World::new();
    let holder = world.stanchion(["run", "k", "-c", "touch $D/held; exec sleep 600"]).start();
    world.until_file("held");
    std::fs::write(world.path("ready"), "1796072003635760\n").unwrap();
    let candidate = world.stanchion(["elect", "k", "--ready-file", "ready", "-c", "exec sleep 600"]).start();
    world.until_waiting("k", 1);
    assert!(!world.path("ready").exists());
    holder.send(Signal::TERM);
    world.until_file("ready");
    candidate.send(Signal::TERM);
    candidate.finish().code(143).silent();
    assert!(!world.path("ready").exists());
}

/// TERM at a random moment of many short terms: it ends the candidate, and never a term begins after it.
#[test]
fn random_signal_ends_an_election() {
    let world = World::new();
    let mut random = Random(11);
    for round in 0..40 {
        let running = world.stanchion(["elect", "k", "--max-hold", "20ms", "-q", "--", "sleep", "600"]).start();
        let offset = random.below(250_000);
        std::thread::sleep(std::time::Duration::from_micros(offset));
        running.send(Signal::TERM);
        let finished = running.finish();
        // The signal ends the wait or the command, or comes while the command is being ended, or before it is handled.
        let is_ended = matches!(finished.code, Some(143 | 76)) || finished.signal == Some(15);
        assert!(is_ended, "round {round}, {offset} µs: {finished:?}");
        world.until_nothing_runs();
    }
    world.until_free("k");
}

#[test]
fn bad_elections_are_usage_errors() {
    let world = World::new();
    std::fs::write(world.path("notes"), "not a number\n").unwrap();
    std::fs::write(world.path("number"), "7\n").unwrap();
    std::os::unix::fs::symlink(world.path("number"), world.path("link")).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(world.path("pipe")).status().unwrap().success());
    let other = "there is something that stanchion did not write";
    let table: [(&[&str], &str); 7] = [
        (&["--ready-file", "notes"], other),
        (&["--ready-file", "link"], other),
        (&["--ready-file", "pipe"], other),
        (&["--ready-file", "no/such/file"], "`no/such/file` cannot be the readiness file: No such file"),
        (&["--ready-file", "state"], "`state` cannot be the readiness file: "),
        (&["--on-lost", "ignore"], "`--on-lost ignore` would leave two leaders"),
        (&["--on-lost", "x"], "[possible values: term, kill, ignore]"),
    ];
    for (options, text) in table {
        let arguments = ["elect", "k"].iter().chain(options).chain(&["--", "touch", "started"]);
        world.stanchion(arguments).finish().code(64).says(&[text]);
    }
    let two = world.stanchion(["elect", "--key", "a", "--key", "b", "--", "touch", "started"]).finish();
    two.code(64).says(&["give one key: only `run` takes several"]);
    assert!(!world.path("started").exists() && !world.path("state/stanchion").exists());
    for kept in ["notes", "number", "link", "pipe"] {
        assert!(world.path(kept).exists(), "{kept}");
    }
}
