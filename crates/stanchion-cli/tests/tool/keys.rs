//! Tests how keys and commands are named: several keys, namespaces, labels, and the spellings of flock(1).
#![allow(clippy::unwrap_used, reason = "test code")]

use crate::common::*;
use rustix::process::Signal;

#[test]
fn opposite_orders_do_not_deadlock() {
    let world = World::new();
    let inside = "mkdir $D/inside || touch $D/overlap; rmdir $D/inside; echo >> $D/runs";
    let runner = |first: &str, second: &str| {
        let script = format!(
            "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do $S run --key {first} --key {second} -c '{inside}' || exit 9; done"
        );
        let mut command = std::process::Command::new("sh");
        command.args(["-c", &script]);
        world.prepare(&mut command);
        command.env("S", env!("CARGO_BIN_EXE_stanchion"));
        Running::of(command)
    };
    for one in [runner("a", "b"), runner("b", "a"), runner("a", "b")] {
        one.finish().code(0).silent();
    }
    assert_eq!(world.read("runs").lines().count(), 45);
    assert!(!world.path("overlap").exists());
    world.assert_free("a");
    world.assert_free("b");
}

#[test]
fn several_keys_are_lines_for_the_command() {
    let world = World::new();
    let script = r#"printf '%s\n%s' "$STANCHION_KEY" "$STANCHION_FENCE""#;
    let out = world.stanchion(["run", "--key", "b", "--key", "a", "--key", "b", "-c", script]).finish().ok();
    let lines: Vec<_> = out.lines().collect();
    let [first, second, fence_of_b, fence_of_a] = lines[..] else { panic!("{out}") };
    assert_eq!((first, second), ("b", "a"));
    // Key `a` is locked first, and a fence is a time.
    let number = |text: &str| text.parse::<u64>().unwrap();
    assert!(number(fence_of_a) < number(fence_of_b), "{out}");
    let broken = world.stanchion(["run", "--key", "a\nb", "--key", "c", "--", "touch", "started"]).finish();
    broken.code(64).says(&["a key with a line break cannot be one of several keys"]);
}

#[test]
fn loss_of_one_key_ends_the_command() {
    let world = World::new();
    let script = "echo \"$STANCHION_FENCE\" > $D/fences; touch $D/held; exec sleep 600";
    let running = world.stanchion(["run", "--key", "a", "--key", "b", "-c", script]).start();
    world.until_file("held");
    let fence = world.read("fences").lines().nth(1).unwrap().to_owned();
    world.stanchion(["force-release", "b", "--fence", &fence, "--reason", "test"]).finish().code(0);
    running.finish().code(76).says(&["key `b` was lost while the command ran: it was force-released (test)"]);
    world.until_nothing_runs();
    world.assert_free("a");
    world.assert_free("b");
}

#[test]
fn busy_one_of_several_keys_is_named() {
    let world = World::new();
    let holder = world.stanchion(["run", "b", "-c", "touch $D/held; exec sleep 600"]).start();
    world.until_file("held");
    for options in [&["-n"][..], &["-w", "50ms"]] {
        let keys = ["--key", "b", "--key", "a", "--", "touch", "started"];
        let arguments = ["run"].iter().chain(options).chain(&keys);
        world.stanchion(arguments).finish().code(75).says(&["key `b` was not obtained", "held by sh@"]);
        world.until_free("a");
    }
    let mut waiting = world.stanchion(["run", "-v", "--key", "a", "--key", "b", "-c", "exit 4"]).start();
    world.until_waiting("b", 1);
    world.until_holding("a", 1);
    let mut said = String::new();
    until("the description of the wait", || {
        said += &waiting.stderr_so_far();
        said.contains("waiting for key `b`: held by sh@")
    });
    holder.send(Signal::TERM);
    waiting.finish().code(4).reports(&["key `a` obtained after ", "key `b` obtained after "]);
    assert!(!world.path("started").exists());
}

#[test]
fn key_may_begin_with_a_dash() {
    let world = World::new();
    let script = r#"printf %s "$STANCHION_KEY""#;
    for arguments in [["run", "--key", "-k", "-c", script], ["once", "--key=-k", "--every=1h", "-c", script]] {
        assert_eq!(world.stanchion(arguments).finish().ok(), "-k");
    }
    assert_eq!(world.stanchion(["run", "--", "-k", "printf", "%s", "-n"]).finish().ok(), "-n");
}

#[test]
fn command_needs_no_dashes() {
    let world = World::new();
    assert_eq!(
        world.stanchion(["run", "-n", "k", "--ttl", "5s", "printf", "%s|", "-n", "--", "x"]).finish().ok(),
        "-n|--|x|"
    );
    world.stanchion(["once", "k", "--every", "1h", "sh", "-c", "exit 3"]).finish().code(3).silent();
    world.stanchion(["elect", "k", "sh", "-c", "exit 3"]).finish().code(3).silent();
    // An option before the command is not the command's.
    world.stanchion(["run", "k", "-l", "ls"]).finish().code(64).says(&["unexpected argument '-l'"]);
    let several = world.stanchion(["run", "--key", "a", "--key", "b", "touch", "started"]).finish();
    several.code(64).says(&["with --key the command to run comes after `--`"]);
    assert!(!world.path("started").exists());
}

#[test]
fn options_of_flock_are_understood() {
    let world = World::new();
    let holder = world.stanchion(["run", "k", "--exclusive", "-c", "touch $D/held; exec sleep 600"]).start();
    world.until_file("held");
    for options in [&["--nonblock"][..], &["--nb"], &["--timeout", "0.05"], &["--wait", "0.05"]] {
        let arguments = ["run"].iter().chain(options).chain(&["--conflict-exit-code", "9", "k", "true"]);
        world.stanchion(arguments).finish().code(9).says(&["was not obtained"]);
    }
    world.stanchion(["run", "j", "--shared", "--command", "exit 4"]).finish().code(4).silent();
    let help = world.stanchion(["run", "--help"]).finish().ok();
    assert!(!help.contains("--nonblock") && !help.contains("--conflict"), "the aliases are hidden");
    drop(holder);
}

#[test]
fn namespaces_keep_keys_apart() {
    let world = World::new();
    let tool = env!("CARGO_BIN_EXE_stanchion");
    let script =
        format!("{tool} inspect k --json > $D/inner; echo $STANCHION_FENCE > $D/fence; touch $D/held; exec sleep 600");
    let holder = world.stanchion(["run", "k", "--namespace", "billing", "-c", &script]).start();
    world.until_file("held");
    assert!(world.read("inner").contains(r#""fence":"#), "an inner stanchion uses the namespace");
    world.stanchion(["run", "k", "-n", "true"]).finish().code(0).silent();
    world.stanchion(["run", "k", "-n", "--namespace", "billing", "true"]).finish().code(75);
    let inside = |arguments: &[&str]| world.stanchion(arguments).env("STANCHION_NAMESPACE", "billing").finish();
    inside(&["run", "k", "-n", "true"]).code(75);
    inside(&["run", "k", "-n", "--namespace", "", "sh", "-c", "test -z \"$STANCHION_NAMESPACE\""]).code(0);
    for looking in [&["ls"][..], &["inspect", "k"]] {
        assert!(inside(looking).ok().contains("sh@"));
        assert!(!world.stanchion(looking).finish().ok().contains("sh@"));
    }
    let fence = world.read("fence");
    let force = ["force-release", "k", "--fence", fence.trim(), "--reason", "test"];
    world.stanchion(force).finish().code(1);
    world.stanchion([&force[..], &["--namespace", "billing"]].concat()).finish().code(0);
    holder.finish().code(76);
    let long = "n".repeat(129);
    let too_long = world.stanchion(["run", "k", "--namespace", &long, "touch", "started"]).finish();
    too_long.code(64).says(&["namespace"]);
    assert!(!world.path("started").exists());
}

#[test]
fn owner_label_is_shown() {
    let world = World::new();
    let holder = world.stanchion(["run", "k", "--owner", "team red", "-c", "touch $D/held; exec sleep 600"]).start();
    world.until_file("held");
    assert!(world.stanchion(["inspect", "k"]).finish().ok().contains("holder   team red\n"));
    let long = "o".repeat(129);
    for label in ["", &long] {
        let refused = world.stanchion(["run", "k", "--owner", label, "touch", "started"]).finish();
        refused.code(64).says(&["a label has 1 to 128 bytes"]);
    }
    drop(holder);
}
