//! `acquire`, `extend` and `release`: a key that is held across the lines of a script.
#![allow(clippy::unwrap_used, reason = "test code")]

use crate::common::*;
use rustix::process::Signal;

/// The shells of scripts. The second is `sh` on Debian.
const SHELLS: [&str; 2] = ["bash", "dash"];

fn holder(world: &World, key: &str) -> serde_json::Value {
    let json = world.stanchion(["inspect", key, "--json"]).finish().ok();
    let state: serde_json::Value = serde_json::from_str(&json).unwrap();
    state["holders"][0].clone()
}

#[test]
fn script_holds_key_across_lines() {
    for shell in SHELLS {
        let world = World::new();
        let script = r#"set -e
            eval "$($S acquire k --export)"
            test "$STANCHION_KEY" = k
            if $S run k -qn -- true; then exit 9; fi
            $S inspect k --json > $D/held
            $S release
            $S run k -n -- true
            echo "$STANCHION_FENCE""#;
        let fence = world.script(shell, script).finish().ok();
        let held: serde_json::Value = serde_json::from_str(&world.read("held")).unwrap();
        let holder = &held["holders"][0];
        assert_eq!(holder["fence"].to_string(), fence.trim());
        assert!(holder["owner"].as_str().unwrap().starts_with(&format!("{shell}@")), "{held}");
        assert!(holder["session_bound"] == true && holder["remaining_ms"].is_null(), "{held}");
        world.until_nothing_runs();
    }
}

#[test]
fn export_quotes_any_key() {
    let world = World::new();
    let key = "it's \"a\" $HOME `x`\n*";
    let script = r#"eval "$($S acquire "$K" --export)" && $S release && printf %s "$STANCHION_KEY""#;
    for shell in SHELLS {
        assert_eq!(world.script(shell, script).env("K", key).finish().ok(), key);
    }
}

#[test]
fn subshells_hold_for_their_shell() {
    for shell in SHELLS {
        let world = World::new();
        // Each of these calls is made by a copy of the shell that ends with it.
        let script = r#"f() { $S acquire a; }
            one=$(f); two=$($S acquire b || exit 1); three=$($S acquire c | cat); ($S acquire d > /dev/null; true)
            for key in a b c d; do $S run $key -qn -- true && exit 9; done
            echo $$"#;
        let pid = world.script(shell, script).finish().ok();
        for key in ["a", "b", "c", "d"] {
            world.until_free(key);
        }
        world.until_nothing_runs();
        // `--pid` names a subshell.
        let script = r#"($S acquire a --pid $(exec sh -c 'echo $PPID') > /dev/null)
            $S run a -w 20 -- true"#;
        world.script(shell, script).finish().code(0);
        assert!(pid.trim().parse::<u32>().is_ok());
    }
}

#[test]
fn taken_key_is_reported_as_by_run() {
    let world = World::new();
    let holding = world.stanchion(["run", "k", "--", "sh", "-c", "touch $D/held; exec sleep 600"]).start();
    world.until_file("held");
    world.stanchion(["acquire", "k", "-n"]).finish().code(75).says(&["key `k` was not obtained: held by sh@"]);
    let limited = world.stanchion(["acquire", "k", "--ttl", "1h", "-w", "50ms"]).finish().code(75);
    limited.says(&["not obtained within 50ms"]);
    let script = r#"eval "$($S acquire k -nq --export)"; echo "$? ${STANCHION_TOKEN-unset}""#;
    assert_eq!(world.script("sh", script).finish().ok(), "75 unset\n");
    let mut waiting = world.stanchion(["acquire", "k", "-v", "--pid", &std::process::id().to_string()]).start();
    world.until_waiting("k", 1);
    let mut text = String::new();
    until("a report of the wait", || {
        text += &waiting.stderr_so_far();
        text.contains("waiting for key `k`: held by sh@")
    });
    waiting.send(Signal::INT);
    assert_eq!(waiting.finish().signal, Some(2));
    world.until_waiting("k", 0);
    holding.send(Signal::TERM);
    holding.finish().code(143);
    world.until_nothing_runs();
}

#[test]
fn waiting_acquire_gets_its_turn() {
    let world = World::new();
    let script = r#"eval "$($S acquire k --export)"; touch $D/held
        while [ ! -e $D/go ]; do sleep 0.01; done; $S release; while [ ! -e $D/end ]; do sleep 0.01; done"#;
    let first = world.script("sh", script).start();
    world.until_file("held");
    let second = world.stanchion(["acquire", "k", "--ttl", "1h"]).start();
    world.until_waiting("k", 1);
    std::fs::write(world.path("go"), "").unwrap();
    let fence = second.finish().ok().lines().nth(1).unwrap().to_owned();
    assert_eq!(holder(&world, "k")["fence"].to_string(), fence);
    std::fs::write(world.path("end"), "").unwrap();
    first.finish().code(0);
    world.until_nothing_runs();
}

#[test]
fn permits_and_readers_are_shared() {
    let world = World::new();
    let me = std::process::id().to_string();
    let acquire = |key: &str, option: &[&str]| {
        world.stanchion(["acquire", key, "-qn", "--pid", &me].iter().chain(option)).finish().code
    };
    let codes = [(); 3].map(|()| acquire("p", &["--permits", "2"]));
    assert_eq!(codes, [Some(0), Some(0), Some(75)]);
    let codes = [acquire("r", &["--shared"]), acquire("r", &["--shared"]), acquire("r", &[])];
    assert_eq!(codes, [Some(0), Some(0), Some(75)]);
}

#[test]
fn lifetime_needs_no_process() {
    let world = World::new();
    let text = world.stanchion(["acquire", "k", "--ttl", "1h", "--metadata", "nightly"]).finish().ok();
    world.until_nothing_runs();
    let held = holder(&world, "k");
    assert!(held["session_bound"] == false && held["metadata"] == "nightly", "{held}");
    assert!(held["remaining_ms"].as_u64().unwrap() > 50 * 60 * 1000, "{held}");
    let token = text.lines().next().unwrap();
    world.stanchion(["release", token, "--cooldown", "1h"]).finish().code(0).silent();
    world.stanchion(["run", "k", "-n", "--", "true"]).finish().code(75).says(&["it stays closed"]);
}

#[test]
fn lifetime_frees_the_key_when_over() {
    let world = World::new();
    let text = world.stanchion(["acquire", "k", "--ttl", "100ms"]).finish().ok();
    world.stanchion(["run", "k", "-w", "20", "--", "true"]).finish().code(0);
    let token = text.lines().next().unwrap();
    let late = world.stanchion(["extend", token, "--ttl", "1h"]).finish().code(76);
    late.says(&["the token does not hold key `k` any more"]);
    world.stanchion(["release", token]).finish().code(0).says(&["the token did not hold key `k` any more"]);
    world.assert_free("k");
}

#[test]
fn extend_counts_from_now() {
    let world = World::new();
    let token = world.stanchion(["acquire", "k", "--ttl", "1h"]).finish().ok().lines().next().unwrap().to_owned();
    for (ttl, minutes) in [("10m", 10), ("3h", 180)] {
        let json = world.stanchion(["extend", "--ttl", ttl, "--json"]).env("STANCHION_TOKEN", &token).finish().ok();
        assert_eq!(json, format!("{{\"key\":\"k\",\"ttl_ms\":{}}}\n", minutes * 60_000));
        let left = holder(&world, "k")["remaining_ms"].as_u64().unwrap() / 60_000;
        // A percent is for clocks that differ, and the grace comes after that.
        assert!((minutes - 1..=minutes + 3).contains(&left), "{ttl}: {left} minutes");
    }
    let verbose = world.stanchion(["extend", &token, "--ttl", "1h", "-v"]).finish().code(0);
    verbose.says(&["key `k` is held for 1h from now"]);
    let me = std::process::id().to_string();
    let token = world.stanchion(["acquire", "b", "--pid", &me]).finish().ok().lines().next().unwrap().to_owned();
    let refused = world.stanchion(["extend", &token, "--ttl", "1h"]).finish().code(64);
    refused.says(&["key `b` is held as long as its process lives", "acquire --ttl"]);
    assert!(holder(&world, "b")["remaining_ms"].is_null());
}

#[test]
fn second_release_is_an_answer() {
    let world = World::new();
    let release = |token: &str, option: &[&str]| {
        world.stanchion(["release"].iter().chain(option)).env("STANCHION_TOKEN", token).finish().code(0)
    };
    for ttl in [&["--ttl", "1h"][..], &["--pid", &std::process::id().to_string()]] {
        let acquire = || {
            let text = world.stanchion(["acquire", "k", "-n"].iter().chain(ttl)).finish().ok();
            text.lines().next().unwrap().to_owned()
        };
        let token = acquire();
        release(&token, &["-v"]).says(&["key `k` released"]);
        release(&token, &[]).says(&["the token did not hold key `k` any more"]);
        release(&token, &["-q"]).silent();
        let token = acquire();
        for answer in ["true", "false"] {
            let json = release(&token, &["--json", "-q"]).ok();
            assert_eq!(json, format!("{{\"key\":\"k\",\"released\":{answer}}}\n"));
        }
        // A later holder is not touched.
        let other = acquire();
        release(&token, &[]);
        release(&other, &["-v"]).says(&["key `k` released"]);
    }
    world.until_nothing_runs();
}

#[test]
fn holder_ends_when_its_hold_is_gone() {
    let world = World::new();
    let me = std::process::id().to_string();
    let fence = world.stanchion(["acquire", "k", "--pid", &me]).finish().ok().lines().nth(1).unwrap().to_owned();
    assert_eq!(world.processes().len(), 1);
    world.stanchion(["force-release", "k", "--fence", &fence, "--reason", "test"]).finish().code(0).silent();
    world.until_nothing_runs();
    let token = world.stanchion(["acquire", "k", "--pid", &me]).finish().ok().lines().next().unwrap().to_owned();
    world.stanchion(["release", &token]).finish().code(0).silent();
    world.until_nothing_runs();
}

#[test]
fn holder_uses_the_store_of_its_command() {
    let world = World::new();
    let url = format!("sqlite:{}", world.path("elsewhere").display());
    world.write_store_file("url", &url);
    for (option, name, value) in [
        (&["--store-file", "url"][..], "X", ""),
        (&[], "STANCHION_STORE", url.as_str()),
        (&[], "STANCHION_STORE_FILE", "url"),
        (&["--store", &url], "X", ""),
    ] {
        let tool = |arguments: &[&str]| world.stanchion(option.iter().chain(arguments)).env(name, value);
        let me = std::process::id().to_string();
        let token = tool(&["acquire", "k", "-n", "--pid", &me]).finish().ok().lines().next().unwrap().to_owned();
        world.assert_free("k");
        tool(&["run", "k", "-n", "--", "true"]).finish().code(75);
        let wrong = world.stanchion(["release", &token]).finish().code(64);
        wrong.says(&["the token is of another store", "holds nothing here", "--store"]);
        let wrong = world.stanchion(["extend", &token, "--ttl", "1h"]).finish().code(64);
        wrong.says(&["the token is of another store"]);
        tool(&["release", &token, "-v"]).finish().code(0).reports(&["key `k` released"]);
    }
    world.until_nothing_runs();
}

#[test]
fn unknown_callers_are_refused() {
    let world = World::new();
    // As a service manager starts it: a session of its own, and a parent in another.
    let lonely = world.through(&["setsid"], ["acquire", "k"]).finish().code(64);
    lonely.says(&["which process called stanchion", "--pid PID", "--ttl DUR"]);
    world.through(&["setsid"], ["acquire", "k", "--ttl", "1h"]).finish().code(0);
    let mut ended = std::process::Command::new("true").spawn().unwrap();
    ended.wait().unwrap();
    let missing = world.stanchion(["acquire", "x", "--pid", &ended.id().to_string()]).finish().code(64);
    missing.says(&["there is no process", "--pid"]);
    for pid in ["0", "-1", "x", "99999999999"] {
        world.stanchion(["acquire", "x", "--pid", pid]).finish().code(64).says(&["--pid"]);
    }
    world.assert_free("x");
    world.until_nothing_runs();
}
