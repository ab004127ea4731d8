//! The key is lost while the command runs: the whole group ends, before another may have the key.
#![allow(clippy::unwrap_used, reason = "test code")]

use crate::common::*;
use rustix::process::Signal;

/// A command that does not end when asked, and whose child does not either.
const STUBBORN: &str =
    "trap '' TERM; (trap '' TERM; echo $$ > $D/ready; while :; do sleep 0.01; done) & while :; do sleep 0.01; done";

#[test]
fn max_hold_ends_the_command_with_76() {
    let world = World::new();
    for command in ["exec sleep 600", "sleep 600; true", "sleep 600 & sleep 600 & wait", STUBBORN] {
        let finished = world.stanchion(["run", "k", "--max-hold", "400ms", "-c", command]).finish();
        finished.code(76).says(&["key `k` was lost while the command ran", "held for longer than max_hold"]);
        world.until_nothing_runs();
        world.until_free("k");
    }
}

#[test]
fn command_may_clean_up_after_term() {
    let world = World::new();
    let script = format!("trap 'touch $D/cleaned; exit 0' TERM; {FOREVER}");
    let finished = world.stanchion(["run", "k", "--max-hold", "2s", "-c", &script]).finish();
    // A shell says something of its own when its child is ended.
    assert!(finished.stderr.ends_with("held for longer than max_hold; the command was ended\n"), "{finished:?}");
    finished.code(76);
    assert!(world.path("cleaned").exists());
}

#[test]
fn next_command_starts_after_the_death() {
    let world = World::new();
    // It writes for as long as it lives.
    let script = "trap '' TERM; touch $D/ready; while :; do touch $D/alive; done";
    let first = world.stanchion(["run", "k", "--max-hold", "1s", "--kill-after", "1h", "-c", script]).start();
    world.until_file("ready");
    let look = "rm -f $D/alive; sleep 0.3; test ! -e $D/alive";
    let second = world.stanchion(["run", "k", "-c", look]).start();
    first.finish().code(76).says(&["was lost"]);
    second.finish().code(0).silent();
}

#[test]
fn force_release_kills_the_command() {
    let world = World::new();
    let running = world.stanchion(["run", "k", "--kill-after", "1h", "-c", STUBBORN]).start();
    world.until_file("ready");
    let json = world.stanchion(["inspect", "k", "--json"]).finish().ok();
    let fence = json.split_once(r#""fence":"#).unwrap().1.split(',').next().unwrap();
    let wrong = world.stanchion(["force-release", "k", "--fence", "1", "--reason", "test"]).finish();
    wrong.code(1).says(&["no hold of key `k` has fence 1", fence, "nothing was changed"]);
    world.stanchion(["force-release", "k", "--fence", fence, "--reason", "it hangs"]).finish().code(0).silent();
    running.finish().code(76).says(&["key `k` was lost", "force-released (it hangs)"]);
    world.until_nothing_runs();
    world
        .stanchion(["force-release", "k", "--fence", fence, "--reason", "again"])
        .finish()
        .code(1)
        .says(&["nobody holds it now"]);
    world.assert_free("k");
}

#[test]
fn on_lost_kill_sends_no_term() {
    let world = World::new();
    let script = format!("trap 'touch $D/asked; exit 0' TERM; {FOREVER}");
    let arguments = ["run", "k", "--max-hold", "400ms", "--on-lost", "kill", "-c", &script];
    let finished = world.stanchion(arguments).finish();
    assert!(!world.path("asked").exists());
    finished.code(76).says(&["held for longer than max_hold; the command was ended"]);
}

#[test]
fn on_lost_ignore_lets_the_command_run() {
    let world = World::new();
    let script = "touch $D/held; while [ ! -e $D/go ]; do sleep 0.01; done; exit 5";
    let arguments = ["run", "k", "--max-hold", "200ms", "--on-lost", "ignore", "-c", script];
    let first = world.stanchion(arguments).start();
    world.until_file("held");
    world.stanchion(["run", "k", "-w", "20", "--", "touch", "go"]).finish().code(0).silent();
    first.finish().code(76).reports(&[
        "the command runs on without it (--on-lost ignore), and another may run beside it",
        "; the command ran on, and exited with 5; another may have run beside it",
    ]);
}

const CANNOT_BE_ENDED: &str = "the command cannot be ended, because it runs as another user";

#[test]
fn foreign_command_is_reported() {
    let Some(world) = world_of_nobody() else { return };
    let script = "echo $$ > /proc/self/fd/3; exec sleep 600";
    let command = format!("exec ./become --reuid=0 sh -c '{script}' 3> state/pid");
    let arguments = ["./stanchion", "run", "k", "--max-hold", "1s", "--kill-after", "0", "-c", &command];
    let mut running = Running::of(as_nobody(&world, &arguments));
    let pid = pid_in(&world, "state/pid");
    let mut said = String::new();
    until("the report", || {
        said += &running.stderr_so_far();
        said.contains(CANNOT_BE_ENDED)
    });
    assert!(said.contains("another command may run beside it"), "{said}");
    // It does not say that the command was ended, and does not end before the command.
    assert!(is_alive(pid) && !running.has_ended(), "{said}");
    kill(pid, Signal::KILL);
    let finished = running.finish().code(76);
    assert!(finished.stderr.contains("ran on") && !finished.stderr.contains("was ended"), "{finished:?}");
}

#[test]
fn process_of_another_user_is_reported() {
    let Some(world) = world_of_nobody() else { return };
    let script = "echo $$ > /proc/self/fd/3; exec sleep 600";
    let command = format!("./become --reuid=0 sh -c '{script}' 3> state/pid; true");
    let arguments = ["./stanchion", "run", "k", "--max-hold", "1s", "--kill-after", "0", "-c", &command];
    let running = Running::of(as_nobody(&world, &arguments));
    let pid = pid_in(&world, "state/pid");
    let finished = running.finish().code(77);
    assert!(
        finished.stderr.contains("could not be ended and run on; another command may run beside them"),
        "{finished:?}"
    );
    assert!(is_alive(pid), "{finished:?}");
    kill(pid, Signal::KILL);
}

#[test]
fn signals_to_another_user_are_reported() {
    let Some(world) = world_of_nobody() else { return };
    let script = "echo $$ > /proc/self/fd/3; exec sleep 600";
    let command = format!("exec ./become --reuid=0 sh -c '{script}' 3> state/pid");
    let mut running = Running::of(as_nobody(&world, &["./stanchion", "run", "k", "-c", &command]));
    let pid = pid_in(&world, "state/pid");
    running.send(Signal::TERM);
    let mut said = String::new();
    until("the report", || {
        said += &running.stderr_so_far();
        said.contains("signals cannot be passed on to the command, because it runs as another user")
    });
    kill(pid, Signal::KILL);
    running.finish().code(137);
}

#[test]
fn deleted_files_explain_the_loss() {
    for name in ["", "locks.db", "locks.db-wal", "locks.db-shm", "gate", "sessions"] {
        let world = World::new();
        let running = world.stanchion(["run", "k", "-c", "touch $D/ready; exec sleep 600"]).start();
        world.until_file("ready");
        let path = world.path("state/stanchion").join(name);
        let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        removed.unwrap();
        let finished = running.finish().code(76);
        finished.says(&["key `k` was lost while the command ran", "was deleted or replaced while it was in use"]);
        world.until_nothing_runs();
        world.stanchion(["run", "k", "--", "true"]).finish().code(0).silent();
    }
}

/// Only the database is gone: the next one does not start beside a command that has not heard of it yet.
#[test]
fn new_database_waits_for_the_old_command() {
    let world = World::new();
    let script = "echo $$ > $D/pid; touch $D/ready; exec sleep 600";
    let running = world.stanchion(["run", "k", "-c", script]).start();
    world.until_file("ready");
    std::fs::remove_file(world.path("state/stanchion/locks.db")).unwrap();
    let look = "kill -0 $(cat $D/pid) 2> /dev/null && exit 9; exit 0";
    world.stanchion(["run", "k", "-w", "20", "-c", look]).finish().code(0);
    running.finish().code(76);
}
