//! Tests `wait`: it waits for a free key, and takes nothing.
#![allow(clippy::unwrap_used, reason = "test code")]

use crate::common::*;
use rustix::process::Signal;

#[test]
fn wait_for_a_free_key_creates_nothing() {
    let world = World::new();
    for options in [&[][..], &["-n"], &["-w", "1h"]] {
        world.stanchion([&["wait", "k"], options].concat()).finish().code(0).silent();
    }
    assert_eq!(std::fs::read_dir(world.path("state")).unwrap().count(), 0);
    let absent = format!("sqlite:{}", world.path("absent").display());
    world.stanchion(["wait", "k", "--store", &absent]).finish().code(78).says(&["no store in `"]);
    world.stanchion(["wait", ""]).finish().code(64).says(&["a key may not be empty"]);
}

#[test]
fn wait_ends_when_the_key_is_free() {
    let world = World::new();
    let holder = world.stanchion(["run", "k", "-c", "touch $D/held; exec sleep 600"]).start();
    world.until_file("held");
    let state = || world.stanchion(["inspect", "k", "--json"]).finish().ok();
    let fence = |json: &str| json.split_once(r#""last_fence":"#).unwrap().1.split(',').next().unwrap().to_owned();
    let before = fence(&state());
    let mut waiting = world.stanchion(["wait", "k", "-v"]).start();
    let mut said = String::new();
    until("the description of the wait", || {
        said += &waiting.stderr_so_far();
        said.contains("waiting for key `k`: held by sh@")
    });
    assert!(state().contains(r#""waiters":[]"#) && fence(&state()) == before && !waiting.has_ended());
    holder.send(Signal::TERM);
    holder.finish().code(143);
    waiting.finish().code(0);
}

#[test]
fn wait_for_a_busy_key_gives_75() {
    let world = World::new();
    let holder = world.stanchion(["run", "k", "-c", "touch $D/held; exec sleep 600"]).start();
    world.until_file("held");
    world.stanchion(["wait", "k", "-n"]).finish().code(75).says(&["key `k` was not free: held by sh@"]);
    world.stanchion(["wait", "k", "-w", "50ms"]).finish().code(75).says(&["key `k` was not free within 50ms: held"]);
    world.stanchion(["wait", "k", "-n", "-q", "-E", "3"]).finish().code(3).silent();
    world.stanchion(["run", "closed", "--cooldown", "1h", "true"]).finish().code(0).silent();
    world.stanchion(["wait", "closed", "-n"]).finish().code(75).says(&["it stays closed for another 59m"]);
    drop(holder);
}
