//! `run`: one at a time, with the command's own exit code, streams and environment.
#![allow(clippy::unwrap_used, reason = "test code")]

use crate::common::*;
use rustix::process::Signal;

#[test]
fn command_keeps_code_streams_and_arguments() {
    let world = World::new();
    let script = r#"cat; printf '%s|' "$@"; echo err >&2; exit 42"#;
    let finished =
        world.stanchion(["run", "k", "--", "sh", "-c", script, "x", "-n", "a b", "--json", ""]).input(b"in\n").finish();
    assert_eq!((finished.stdout.as_str(), finished.stderr.as_str()), ("in\n-n|a b|--json||", "err\n"));
    finished.code(42);
    world.stanchion(["run", "k", "--", "true"]).finish().code(0).silent();
    world.stanchion(["run", "k", "-c", "exit $((1 + 2))"]).finish().code(3).silent();
}

#[test]
fn exit_codes_are_as_documented() {
    let world = World::new();
    std::fs::write(world.path("plain"), "echo not a program").unwrap();
    let table: [(&[&str], i32, &[&str]); 8] = [
        (&["run", "k", "--", "no-such-command"], 127, &["`no-such-command`: command not found"]),
        (&["run", "k", "--", "./no/such/file"], 127, &["`./no/such/file`: command not found"]),
        (&["run", "k", "--", "./plain"], 126, &["`./plain` may not be executed", "chmod +x"]),
        (&["run", "k", "--", "/"], 126, &["`/` may not be executed"]),
        (&["run", "k", "--", ""], 64, &["the command is empty"]),
        (&["run", "k"], 64, &["the key comes first, and then the command to run"]),
        (&["run", "--key", "k"], 64, &["the command to run is missing"]),
        (&["run", "k", "-c", "true", "--", "true"], 64, &["cannot be used with"]),
    ];
    for (arguments, code, texts) in table {
        world.stanchion(arguments).finish().code(code).says(texts);
    }
    for (signal, code) in [("KILL", 137), ("TERM", 143), ("SEGV", 139), ("INT", 130)] {
        world.stanchion(["run", "k", "-c", &format!("kill -{signal} $$")]).finish().code(code).silent();
    }
    world.assert_free("k");
    world.until_nothing_runs();
}

#[test]
fn second_run_starts_as_the_first_ends() {
    let world = World::new();
    let script = "touch $D/first; while [ ! -e $D/go ]; do sleep 0.01; done; date +%s%N > $D/end";
    let first = world.stanchion(["run", "nightly", "--", "sh", "-c", script]).start();
    world.until_file("first");
    let second = world.stanchion(["run", "nightly", "--", "sh", "-c", "date +%s%N > $D/start"]).start();
    world.until_waiting("nightly", 1);
    assert!(!world.path("start").exists());
    std::fs::write(world.path("go"), "").unwrap();
    first.finish().code(0).silent();
    second.finish().code(0).silent();
    let nanos = |name: &str| world.read(name).trim().parse::<i64>().unwrap();
    let gap = nanos("start") - nanos("end");
    // Two processes start in it, on a machine that does other things too.
    assert!((0..500_000_000).contains(&gap), "{gap} ns between the end of the first and the start of the second");
    world.assert_free("nightly");
}

#[test]
fn concurrent_runs_lose_no_count() {
    let world = World::new();
    std::fs::write(world.path("counter"), "0").unwrap();
    let script = "n=$(cat counter); echo $STANCHION_FENCE >> fences; echo $((n + 1)) > counter";
    let all: Vec<_> = (0..30).map(|_| world.stanchion(["run", "k", "-c", script]).start()).collect();
    for one in all {
        one.finish().code(0).silent();
    }
    assert_eq!(world.read("counter").trim(), "30");
    let fences: Vec<u64> = world.read("fences").lines().map(|line| line.parse().unwrap()).collect();
    assert!(fences.len() == 30 && fences.is_sorted_by(|a, b| a < b), "{fences:?}");
}

fn hold(world: &World, options: &[&str]) -> Running {
    let script = ["--", "sh", "-c", "touch $D/held; exec sleep 600"];
    let arguments = ["run", "k"].iter().chain(options).chain(&script);
    let holder = world.stanchion(arguments).start();
    world.until_file("held");
    std::fs::remove_file(world.path("held")).unwrap();
    holder
}

#[test]
fn busy_key_gives_75_and_names_the_holder() {
    let world = World::new();
    let holder = hold(&world, &[]);
    let who = format!("held by sh@{}/{}", rustix::system::uname().nodename().to_string_lossy(), holder.pid());
    for options in [&["-n"][..], &["--no-wait"], &["-w", "0"], &["-w", "0.05"], &["--wait", "50ms"]] {
        let arguments = ["run", "k"].iter().chain(options).chain(&["--", "touch", "started"]);
        world.stanchion(arguments).finish().code(75).says(&["key `k` was not obtained", &who, "fence "]);
    }
    world.stanchion(["run", "k", "-n", "-E", "0", "--", "true"]).finish().code(0).says(&["was not obtained"]);
    world.stanchion(["run", "k", "-n", "-q", "-E", "9", "--", "true"]).finish().code(9).silent();
    world.stanchion(["run", "other", "-n", "--", "true"]).finish().code(0).silent();
    assert!(!world.path("started").exists());
    world.until_waiting("k", 0);
    holder.send(Signal::TERM);
    holder.finish().code(143).silent();
    world.assert_free("k");
}

#[test]
fn shared_runs_share_exclusive_runs_do_not() {
    let world = World::new();
    let readers = [hold(&world, &["--shared"]), hold(&world, &["-s"])];
    world.until_holding("k", 2);
    for options in [&["-x"][..], &[]] {
        let arguments = ["run", "k", "-n"].iter().chain(options).chain(&["--", "true"]);
        world.stanchion(arguments).finish().code(75).says(&["and 1 more"]);
    }
    let plain = world.stanchion(["run", "k", "--", "sh", "-c", "touch $D/alone; exec sleep 600"]).start();
    world.until_waiting("k", 1);
    for reader in readers {
        assert!(!world.path("alone").exists());
        reader.send(Signal::TERM);
        reader.finish().code(143);
    }
    world.until_file("alone");
    for options in [&["-x"][..], &["-s"], &[], &["--permits", "3"]] {
        let arguments = ["run", "k", "-n"].iter().chain(options).chain(&["--", "true"]);
        world.stanchion(arguments).finish().code(75).says(&["held by"]);
    }
    plain.send(Signal::TERM);
    plain.finish().code(143);
    world.stanchion(["run", "k", "-n", "-x", "--", "true"]).finish().code(0).silent();
}

#[test]
fn permits_limit_the_holders() {
    let world = World::new();
    let [first, second] = [hold(&world, &["--permits", "2"]), hold(&world, &["--permits", "2"])];
    world.until_holding("k", 2);
    let refused = world.stanchion(["run", "k", "-n", "--permits", "2", "--", "true"]).finish().code(75);
    assert!(refused.says(&["and 1 more"]).stderr.matches("limit").count() == 0);
    let differ = "in use with a limit of 2, this request says a limit of 3";
    world.stanchion(["run", "k", "-n", "--permits", "3", "--", "true"]).finish().code(75).says(&[differ]);
    // During a rolling deploy that raises the limit, new processes wait, and none fails.
    let raised = world.stanchion(["run", "k", "--permits", "3", "--", "true"]).start();
    world.until_waiting("k", 1);
    let inspected = world.stanchion(["inspect", "k"]).finish().code(0).stdout;
    assert!(
        inspected.contains("capacity 2\n") && inspected.contains("differ: a limit of 2, a limit of 3"),
        "{inspected}"
    );
    first.send(Signal::TERM);
    first.finish().code(143);
    raised.finish().code(0).says(&[differ]);
    drop(second);
}

#[test]
fn a_cooldown_keeps_the_key_closed() {
    let world = World::new();
    world.stanchion(["run", "k", "--cooldown", "1h", "--", "true"]).finish().code(0).silent();
    world.stanchion(["run", "k", "-n", "--", "true"]).finish().code(75).says(&["it stays closed for another 59m"]);
}

#[test]
fn background_processes_do_not_keep_the_key() {
    let world = World::new();
    // It has the streams, the group and the lock descriptor of the command.
    let script = "sleep 600 & echo $! > $D/pid";
    world.stanchion(["run", "k", "--", "sh", "-c", script]).finish().code(0).silent();
    assert!(is_alive(pid_in(&world, "pid")));
    world.stanchion(["run", "k", "-n", "--", "true"]).finish().code(0).silent();
}

#[test]
fn quiet_and_verbose_change_the_messages() {
    let world = World::new();
    world.stanchion(["run", "k", "-q", "--", "no-such-command"]).finish().code(127).silent();
    let finished = world.stanchion(["run", "k", "-v", "--", "true"]).finish().code(0);
    // The store warns of its folder, which is below /tmp.
    let lines: Vec<_> = finished.stderr.lines().filter(|line| !line.contains("use another folder")).collect();
    assert!(lines[0].starts_with("stanchion: store: sqlite:/"), "{lines:?}");
    assert!(lines[1].starts_with("stanchion: key `k` obtained after ") && lines[1].contains("fence "), "{lines:?}");
    assert_eq!(lines[2..], ["stanchion: key released"]);
    let holder = hold(&world, &[]);
    let waiter = world.stanchion(["run", "k", "-v", "-w", "2", "--", "true"]).finish().code(75);
    waiter.reports(&["waiting for key `k`: held by sh@", "; next in line\n"]);
    drop(holder);
}

#[test]
fn missing_command_is_found_before_the_wait() {
    let world = World::new();
    let _holder = hold(&world, &[]);
    std::fs::write(world.path("plain"), "no program").unwrap();
    for (program, code) in [("no-such-command", 127), ("./no-such-command", 127), ("./plain", 126), ("/", 126)] {
        world.stanchion(["run", "k", "-w", "1h", "--", program]).finish().code(code);
    }
}

#[test]
fn nested_run_is_reported() {
    let world = World::new();
    let tool = env!("CARGO_BIN_EXE_stanchion");
    let nested = world.stanchion(["run", "k", "--", tool, "run", "k", "-w", "500ms", "--", "true"]).finish();
    nested.code(75).reports(&["this command already runs under key `k`"]);
    let one_of_two = ["run", "--key", "j", "--key", "k", "--", tool, "run", "k", "-w", "500ms", "--", "true"];
    world.stanchion(one_of_two).finish().code(75).reports(&["this command already runs under key `k`"]);
    // Another key is no nesting.
    world.stanchion(["run", "k", "--", tool, "run", "j", "--", "true"]).finish().code(0).silent();
}
