//! The key is lost while the command runs: the whole group ends, before another may have the key.
#![allow(clippy::unwrap_used, reason = "test code")]

use crate::common::*;

/// A command that does not end when asked, and whose child does not either.
const STUBBORN: &str =
    "trap '' TERM; (trap '' TERM; echo $$ > $D/ready; while :; do sleep 0.01; done) & while :; do sleep 0.01; done";

#[test]
fn a_hold_that_is_too_long_ends_with_76_and_no_survivor() {
    let world = World::new();
    for command in ["exec sleep 600", "sleep 600; true", "sleep 600 & sleep 600 & wait", STUBBORN] {
        let finished = world.stanchion(["run", "k", "--max-hold", "400ms", "-c", command]).finish();
        finished.code(76).says(&["key `k` was lost while the command ran", "held for longer than max_hold"]);
        world.until_nothing_runs();
        world.until_free("k");
    }
}

#[test]
fn the_command_is_asked_first_and_may_clean_up() {
    let world = World::new();
    let script = format!("trap 'touch $D/cleaned; exit 0' TERM; {FOREVER}");
    let finished = world.stanchion(["run", "k", "--max-hold", "2s", "-c", &script]).finish();
    // A shell says something of its own when its child is ended.
    assert!(finished.stderr.ends_with("held for longer than max_hold; the command was ended\n"), "{finished:?}");
    finished.code(76);
    assert!(world.path("cleaned").exists());
}

#[test]
fn the_command_is_dead_when_the_next_one_starts() {
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
fn a_broken_hold_ends_its_command_at_once() {
    let world = World::new();
    let running = world.stanchion(["run", "k", "--kill-after", "1h", "-c", STUBBORN]).start();
    world.until_file("ready");
    let json = world.stanchion(["inspect", "k", "--json"]).finish().ok();
    let fence = json.split_once(r#""fence":"#).unwrap().1.split(',').next().unwrap();
    let wrong = world.stanchion(["break", "k", "--fence", "1", "--reason", "test"]).finish();
    wrong.code(1).says(&["no hold of key `k` has fence 1", fence, "nothing was changed"]);
    world.stanchion(["break", "k", "--fence", fence, "--reason", "it hangs"]).finish().code(0).silent();
    running.finish().code(76).says(&["key `k` was lost", "released by force (it hangs)"]);
    world.until_nothing_runs();
    world
        .stanchion(["break", "k", "--fence", fence, "--reason", "again"])
        .finish()
        .code(1)
        .says(&["nobody holds it now"]);
    world.assert_free("k");
}
