//! The token of `acquire`: how it is given, and where it must not be seen.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};

use crate::common::*;

fn mode(world: &World, name: &str) -> u32 {
    fs::metadata(world.path(name)).unwrap().permissions().mode() & 0o777
}

#[test]
fn output_is_token_and_fence() {
    let world = World::new();
    let text = world.stanchion(["acquire", "a b@c", "--ttl", "1h"]).finish().ok();
    let lines: Vec<_> = text.lines().collect();
    let [token, fence] = lines.as_slice() else { panic!("{text:?}") };
    assert!(fence.parse::<u64>().is_ok());
    assert!(token.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".%@:".contains(&byte)), "{token}");
    world.stanchion(["release", token, "-v"]).finish().code(0).says(&["key `a b@c` released"]);
    let json = world.stanchion(["acquire", "k", "--ttl", "1h", "--json"]).finish().ok();
    let record: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(record["key"] == "k" && record["ttl_ms"] == 3_600_000 && record["pid"].is_null(), "{json}");
    world.stanchion(["release", record["token"].as_str().unwrap()]).finish().code(0).silent();
    let json = world.stanchion(["acquire", "k", "--json"]).finish().ok();
    let record: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(record["pid"] == std::process::id() && record["ttl_ms"].is_null() && record["fence"].is_u64(), "{json}");
}

#[test]
fn token_file_is_for_its_owner_alone() {
    let world = World::new();
    let fence = world.stanchion(["acquire", "k", "--ttl", "1h", "--token-file", "t"]).finish().ok();
    assert!(fence.trim().parse::<u64>().is_ok() && mode(&world, "t") == 0o600, "{fence}");
    let first = world.read("t");
    // A call that fails leaves the file of the other one, and makes none.
    world.stanchion(["acquire", "k", "-n", "--token-file", "t"]).finish().code(75);
    world.stanchion(["acquire", "k", "-n", "--token-file", "u"]).finish().code(75);
    assert!(world.read("t") == first && !world.path("u").exists());
    world.stanchion(["extend", "--ttl", "2h", "--token-file", "t"]).finish().code(0).silent();
    world.stanchion(["release", "-v", "--token-file", "t"]).finish().code(0).says(&["released"]);
    // A file that was open to others.
    fs::write(world.path("t"), "x".repeat(5_000)).unwrap();
    fs::set_permissions(world.path("t"), fs::Permissions::from_mode(0o666)).unwrap();
    let json = world.stanchion(["acquire", "k", "--ttl", "1h", "--token-file", "t", "--json"]).finish().ok();
    assert!(!json.contains("token") && mode(&world, "t") == 0o600 && world.read("t").len() < 200, "{json}");
    world.stanchion(["release", "-v", "--token-file", "t"]).finish().code(0).says(&["released"]);
    let export = world.stanchion(["acquire", "k", "--ttl", "1h", "--token-file", "t", "--export"]).finish().ok();
    assert!(!export.contains("TOKEN") && export.contains("STANCHION_FENCE"), "{export}");
}

#[test]
fn unusable_token_files_are_refused_at_once() {
    let world = World::new();
    let holding = world.stanchion(["run", "k", "--", "sh", "-c", "touch $D/held; exec sleep 600"]).start();
    world.until_file("held");
    fs::create_dir(world.path("folder")).unwrap();
    symlink(world.path("held"), world.path("link")).unwrap();
    // The key is taken: a call that waited for it would not end.
    for path in ["folder", "nowhere/t", "/dev/null", "link", ""] {
        let refused = world.stanchion(["acquire", "k", "--token-file", path]).finish();
        refused.code(64).says(&["--token-file"]);
        world.stanchion(["release", "--token-file", path]).finish().code(64).says(&[]);
    }
    drop(holding);
}

#[test]
fn malformed_tokens_are_in_no_message() {
    let world = World::new();
    let me = std::process::id().to_string();
    let token = world.stanchion(["acquire", "k", "--pid", &me]).finish().ok().lines().next().unwrap().to_owned();
    let secret = &token[..32];
    let holder = world.processes();
    assert_eq!(holder.len(), 1);
    for name in ["cmdline", "environ"] {
        let text = fs::read(format!("/proc/{}/{name}", holder[0])).unwrap();
        assert!(!String::from_utf8_lossy(&text).contains(secret), "{name}");
    }
    fs::write(world.path("t"), &token[1..]).unwrap();
    for command in [&["release"][..], &["extend", "--ttl", "1h"]] {
        let none = world.stanchion(command).finish().code(64);
        none.says(&["no token is given", "STANCHION_TOKEN", "--token-file"]);
        for invocation in [
            world.stanchion(command).env("STANCHION_TOKEN", &token[1..]),
            world.stanchion(command.iter().chain(&["--token-file", "t"])),
            world.stanchion(command.iter().copied().chain([&token[1..]])),
            world.stanchion(command.iter().copied().chain([token.split_once('@').unwrap().0])),
            world.stanchion(command.iter().copied().chain([token.replace("k@", "%@").as_str()])),
        ] {
            let finished = invocation.finish().code(64);
            assert!(!finished.stderr.contains(&secret[1..]), "{finished:?}");
            finished.says(&["holds no token"]);
        }
    }
    world.until_holding("k", 1);
}
