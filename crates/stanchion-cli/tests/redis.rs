//! The tool on a Redis server: the same as on one machine, with another URL.
#![allow(clippy::unwrap_used, reason = "test code")]

mod common;
use common::*;
use rustix::process::Signal;
use stanchion_testkit::servers::{Redis, RedisServer};

/// A world whose store is a server with a password.
fn world(server: &RedisServer) -> World {
    let world = World::new();
    std::fs::write(world.path("url"), format!("redis://:hunter2@127.0.0.1:{}\n", server.port())).unwrap();
    world
}

fn server() -> RedisServer {
    RedisServer::with(Redis::Redis7, &["--requirepass", "hunter2"])
}

fn run(world: &World, more: &[&str]) -> Invocation {
    let url = world.path("url");
    let store = ["--store-file", url.to_str().unwrap()];
    let (command, rest) = more.split_first().unwrap();
    world.stanchion([&[*command], &store[..], rest].concat())
}

#[test]
fn one_command_at_a_time_with_rising_fences() {
    let (server, count) = (server(), 20);
    let world = world(&server);
    let script = "test ! -e $D/inside && touch $D/inside && echo $STANCHION_FENCE >> $D/fences && rm $D/inside";
    let all: Vec<_> = (0..count).map(|_| run(&world, &["run", "k", "-c", script]).start()).collect();
    for one in all {
        one.finish().code(0).silent();
    }
    let fences: Vec<u64> = world.read("fences").lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(fences.len(), count);
    assert!(fences.is_sorted(), "{fences:?}");
    let listed = run(&world, &["ls", "--json"]).finish().ok();
    assert!(!listed.contains(r#""key""#), "nothing is left: {listed}");
}

#[test]
fn busy_limits_and_looking() {
    let server = server();
    let world = world(&server);
    let holder = run(&world, &["run", "k", "--", "sh", "-c", "touch $D/held; exec sleep 600"]).start();
    world.until_file("held");
    run(&world, &["run", "-n", "k", "--", "true"]).finish().code(75);
    run(&world, &["run", "-w", "100ms", "k", "--", "true"]).finish().code(75);
    let json = run(&world, &["inspect", "k", "--json"]).finish().ok();
    assert!(json.contains(r#""fence":"#), "{json}");
    assert!(run(&world, &["ls"]).finish().ok().contains('k'));
    holder.send(Signal::TERM);
    holder.finish().code(143);
    run(&world, &["run", "-n", "k", "--", "true"]).finish().code(0);
}

#[test]
fn the_password_reaches_neither_the_child_nor_a_message() {
    let server = server();
    let world = world(&server);
    let child = run(&world, &["run", "k", "--", "sh", "-c", "env; tr '\\0' ' ' < /proc/$PPID/cmdline"]).finish().ok();
    assert!(child.contains("STANCHION_FENCE=") && !child.contains("hunter2"), "{child}");
    let url = format!("redis://:hunter2@127.0.0.1:{}", server.port());
    let refused = world.stanchion(["run", "--store", &url, "k", "--", "true"]).finish();
    assert!(!refused.stderr.contains("hunter2"), "{refused:?}");
    refused.code(64).says(&["a password in an argument can be read"]);
    std::fs::write(world.path("url"), format!("redis://:wrong-one@127.0.0.1:{}", server.port())).unwrap();
    let wrong = run(&world, &["run", "k", "--", "true"]).finish();
    assert!(!wrong.stderr.contains("wrong-one") && !wrong.stderr.contains("panicked"), "{wrong:?}");
    wrong.code(77);
}

#[test]
fn a_server_that_is_away_is_code_69_and_one_that_would_lose_locks_78() {
    let world = World::new();
    let gone = world.stanchion(["run", "-w", "1s", "--store", "redis://127.0.0.1:1", "k", "--", "true"]).finish();
    gone.code(69).says(&["cannot connect to 127.0.0.1:1"]);
    let server = RedisServer::with(Redis::Redis7, &["--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lru"]);
    let url = format!("redis://127.0.0.1:{}", server.port());
    let refused = world.stanchion(["run", "--store", &url, "k", "--", "true"]).finish();
    refused.code(78).says(&["set `maxmemory-policy noeviction`"]);
}

#[test]
fn a_command_ends_when_its_server_stays_away_and_before_another_may_have_the_key() {
    let mut server = server();
    let world = world(&server);
    let running = run(&world, &["run", "--ttl", "2s", "k", "-c", "touch $D/held; exec sleep 600"]).start();
    world.until_file("held");
    server.kill();
    running.finish().code(76).says(&["key `k` was lost while the command ran"]);
    world.until_nothing_runs();
}

#[test]
fn after_the_wrapper_is_killed_its_child_dies_and_the_key_is_free_again() {
    let server = server();
    let world = world(&server);
    let script = "echo $$ > pid; exec sleep 600";
    let running = run(&world, &["run", "--ttl", "1s", "k", "-c", script]).start();
    let child = pid_in(&world, "pid");
    running.send(Signal::KILL);
    until("the child is dead", || !is_alive(child));
    run(&world, &["run", "-w", "10s", "k", "--", "true"]).finish().code(0);
}
