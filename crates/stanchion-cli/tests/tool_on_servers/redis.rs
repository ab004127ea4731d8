//! The tool on a Redis server.
#![allow(clippy::unwrap_used, reason = "test code")]

use crate::common::*;
use crate::screen::Screen;
use stanchion_testkit::servers::{Redis, RedisServer};

impl crate::on_a_server::Server for RedisServer {
    fn url(&self, password: &str) -> String {
        format!("redis://:{password}@127.0.0.1:{}", self.port())
    }
    fn kill(&mut self) {
        self.kill();
    }
}

on_a_server!(|| RedisServer::with(Redis::Redis7, &["--requirepass", "hunter2"]));

#[test]
fn doctor_names_missing_rights() {
    let server = RedisServer::start(Redis::Redis7);
    let world = World::new();
    let examine = |user: &str, rights: &[&str]| {
        server.command(&[&["ACL", "SETUSER", user, "reset", "on", ">pw", "~*", "&*", "+@all"], rights].concat());
        world.write_store_file("url", &format!("redis://{user}:pw@127.0.0.1:{}", server.port()));
        world.stanchion(["doctor", "--store-file", "url"]).finish()
    };
    // Sessions are allowed, and keys are not.
    let no_keys = examine("sessions", &["resetkeys", "~stanchion:session:*"]).code(77);
    assert!(no_keys.stdout.contains("\nfailed   rights    acquire: "), "{no_keys:?}");
    let deaf = examine("deaf", &["-subscribe"]).code(0);
    assert!(deaf.stdout.contains("\nwarning  hand-off  the waiter found it by polling, after "), "{deaf:?}");
    assert!(deaf.stdout.contains("\nwarning  settings  notifications unavailable"), "{deaf:?}");
    let unnamed = examine("unnamed", &["-info"]).code(0);
    assert!(unnamed.stdout.contains("\nskipped  server    the server does not report its version"), "{unnamed:?}");
}

#[test]
fn top_goes_on_after_an_outage() {
    let server = RedisServer::start(Redis::Redis7);
    let world = World::new();
    let url = format!("redis://127.0.0.1:{}", server.port());
    let holder = world.stanchion(["run", "--store", &url, "k", "-c", "touch $D/held; exec sleep 600"]).start();
    world.until_file("held");
    let mut screen =
        Screen::new(&world, &["sh", "-c", &format!("stty rows 24 cols 120; $S top --store {url}; echo code $?")]);
    screen.draws("keys 1   holds 1");
    let redis = server.process().unwrap();
    redis.signal("STOP");
    screen.draws("the store is away, for ");
    assert!(screen.drawn().iter().any(|line| line.starts_with("k  ")), "the last list stays: {:?}", screen.drawn());
    redis.signal("CONT");
    until("the end of the outage", || !screen.is_drawn("the store is away"));
    holder.send(rustix::process::Signal::TERM);
    screen.draws("keys 0   holds 0");
    screen.types("q");
    screen.draws("code 0");
    screen.exit();
}

#[test]
fn outages_are_reported_while_a_command_runs() {
    let server = RedisServer::start(Redis::Redis7);
    let world = World::new();
    let url = format!("redis://127.0.0.1:{}", server.port());
    let script = "touch $D/held; while test ! -e $D/go; do sleep 0.05; done";
    let mut running = world.stanchion(["run", "--store", &url, "k", "-c", script]).start();
    world.until_file("held");
    let redis = server.process().unwrap();
    redis.signal("STOP");
    let mut said = String::new();
    until("the report of the outage", || {
        said += &running.stderr_so_far();
        said.contains("the command will be ended in ")
    });
    redis.signal("CONT");
    until("the report of its end", || {
        said += &running.stderr_so_far();
        said.contains("the store answers again; key `k` is still held")
    });
    std::fs::write(world.path("go"), "").unwrap();
    running.finish().code(0);
}

/// The outage is longer than the session, and longer than an attempt to open the store.
#[test]
fn leader_leads_again_after_an_outage() {
    let server = RedisServer::start(Redis::Redis7);
    let world = World::new();
    let url = format!("redis://127.0.0.1:{}", server.port());
    let mut leader = world.candidate(&["--ttl", "1s", "--store", &url]);
    world.until_terms(1);
    let redis = server.process().unwrap();
    redis.signal("STOP");
    let mut said = String::new();
    until("an attempt that failed", || {
        said += &leader.stderr_so_far();
        said.contains("trying again until the store answers")
    });
    assert!(said.contains("the command was ended; waiting for the key again"), "{said}");
    redis.signal("CONT");
    world.until_terms(2);
    leader.send(rustix::process::Signal::TERM);
    leader.finish().code(143);
}

#[test]
fn watch_survives_a_restart() {
    use std::io::BufRead as _;
    let mut server = RedisServer::start(Redis::Redis7);
    let world = World::new();
    let url = format!("redis://127.0.0.1:{}", server.port());
    let run = |more: &[&str]| world.stanchion([&["run", "--store", &url], more].concat());
    let holder = run(&["before", "-c", "touch $D/held; exec sleep 600"]).start();
    world.until_file("held");
    let mut watch = world.stanchion(["watch", "--store", &url, "--interval", "10ms", "--json"]).start();
    let mut lines = std::io::BufReader::new(watch.stdout()).lines();
    let mut next = || lines.next().unwrap().unwrap();
    assert!(next().contains(r#""held""#));
    let mut said = String::new();
    let mut until_said = |watch: &mut Running, text: &str| {
        until(text, || {
            said += &watch.stderr_so_far();
            said.contains(text)
        });
    };
    server.kill();
    until_said(&mut watch, "; watching goes on");
    assert!(!watch.has_ended());
    server.restart();
    until_said(&mut watch, "the store answers again");
    // The server has forgotten its holds: that is a change.
    assert!(next().contains(r#""released""#));
    run(&["after", "--cooldown", "1h", "--", "true"]).finish().code(0);
    until("the key after the restart", || next().contains(r#""after""#));
    holder.send(rustix::process::Signal::KILL);
    watch.send(rustix::process::Signal::TERM);
}

#[test]
fn damaged_entries_are_named_by_ls() {
    let server = RedisServer::start(Redis::Redis7);
    let world = World::new();
    let url = format!("redis://127.0.0.1:{}", server.port());
    let holder = world.stanchion(["run", "--store", &url, "good", "-c", "touch $D/held; exec sleep 600"]).start();
    world.until_file("held");
    server.command(&["SET", "stanchion:{:bad\u{1b}}", "rubbish"]);
    server.command(&["LPUSH", "stanchion:{:list}", "x"]);
    let out = world.stanchion(["ls", "--store", &url]).finish();
    assert!(out.stdout.contains("good  held"), "{out:?}");
    let said: Vec<_> = out.stderr.lines().collect();
    assert_eq!(said.len(), 2, "{out:?}");
    assert!(said[0].ends_with(r"damaged entry `bad\u{1b}`: the record was not written by this library"), "{out:?}");
    assert!(said[1].starts_with("stanchion: damaged entry `list`: "), "{out:?}");
    out.code(65);
    let inspected = world.stanchion(["inspect", "--store", &url, "bad\u{1b}"]).finish();
    inspected.code(78).says(&[r"key `bad\u{1b}` in redis: the record was not written by this library"]);
    holder.send(rustix::process::Signal::TERM);
}

#[test]
fn bad_servers_give_69_or_78() {
    let world = World::new();
    let gone = world.stanchion(["run", "-w", "1s", "--store", "redis://127.0.0.1:1", "k", "--", "true"]).finish();
    gone.code(69).says(&["cannot connect to 127.0.0.1:1"]);
    let server = RedisServer::with(Redis::Redis7, &["--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lru"]);
    let url = format!("redis://127.0.0.1:{}", server.port());
    let refused = world.stanchion(["run", "--store", &url, "k", "--", "true"]).finish();
    refused.code(78).says(&["set `maxmemory-policy noeviction`"]);
}

#[test]
fn limits_hold_while_the_server_is_away() {
    let world = World::new();
    for away in stanchion_testkit::servers::Away::all() {
        let url = format!("redis://{}", away.address);
        limits_are_kept(away.name, |options| {
            world.stanchion([&["run"], options, &["--store", &url, "k", "--", "true"]].concat())
        });
    }
}
