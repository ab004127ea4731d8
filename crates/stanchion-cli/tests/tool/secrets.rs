//! The store's URL: not in messages, not in the command's environment, and no password in an argument.
#![allow(clippy::unwrap_used, reason = "test code")]

use crate::common::*;

const SECRET: &str = "s3ntinel";

fn tell_nothing(finished: &Finished) {
    assert!(!finished.stdout.contains(SECRET) && !finished.stderr.contains(SECRET), "{finished:?}");
}

#[test]
fn a_password_in_an_argument_is_refused_with_the_alternatives() {
    let world = World::new();
    for url in ["redis://u:s3ntinel@h", "postgres://h/db?user=u&password=s3ntinel", "redis://:s3ntinel@h:1/0"] {
        let finished = world.stanchion(["--store", url, "ls"]).finish();
        tell_nothing(&finished);
        finished.code(64).says(&["STANCHION_STORE", "--store-file"]);
    }
}

#[test]
fn a_url_is_in_no_message() {
    let world = World::new();
    std::fs::write(world.path("url"), "frob://u:s3ntinel@h:1/0\n").unwrap();
    let url = "frob://u:s3ntinel@h:1/0";
    for invocation in [
        world.stanchion(["run", "k", "-v", "--", "true"]).env("STANCHION_STORE", url),
        world.stanchion(["ls"]).env("STANCHION_STORE", url),
        world.stanchion(["run", "k", "--store-file", "url", "--", "true"]),
        world.stanchion(["ls"]).env("STANCHION_STORE_FILE", "url"),
        world.stanchion(["run", "k", url, "--", "true"]),
        world.stanchion(["run", "k", "--stroe=frob://u:s3ntinel@h:1/0", "--", "true"]),
        world.stanchion([url]),
        world.stanchion(["ls", "--json", url, "extra"]),
        world.stanchion(["run", "k", "-w", url, "--", "true"]),
    ] {
        let finished = invocation.finish();
        tell_nothing(&finished);
        finished.code(64).says(&[]);
    }
}

#[test]
fn the_command_learns_the_key_and_the_fence_and_nothing_of_the_store() {
    let world = World::new();
    let store = format!("sqlite:{}", world.path("elsewhere").display());
    std::fs::write(world.path("url"), &store).unwrap();
    let text = world
        .stanchion(["run", "caf\u{e9} 1", "--", "env"])
        .env("STANCHION_STORE", &store)
        .env("STANCHION_STORE_FILE", world.path("url"))
        .env("STANCHION_OTHER", "kept")
        .finish()
        .ok();
    let ours: Vec<_> = text.lines().filter(|line| line.starts_with("STANCHION_") && !line.contains("_TEST=")).collect();
    assert_eq!(ours.len(), 3, "{ours:?}");
    assert!(ours.contains(&"STANCHION_KEY=caf\u{e9} 1") && ours.contains(&"STANCHION_OTHER=kept"), "{ours:?}");
    let fence = ours.iter().find_map(|line| line.strip_prefix("STANCHION_FENCE=")).unwrap();
    assert!(!fence.starts_with('0') && fence.parse::<u64>().unwrap() < 1 << 53, "{fence}");
    assert!(world.path("elsewhere").exists());
}

#[test]
fn the_store_of_the_options_goes_before_that_of_the_environment() {
    let world = World::new();
    let (here, there) =
        (format!("sqlite:{}", world.path("here").display()), format!("sqlite:{}", world.path("there").display()));
    std::fs::write(world.path("url"), format!("{here}\nmore\n")).unwrap();
    world
        .stanchion(["run", "k", "--store", &here, "--", "true"])
        .env("STANCHION_STORE", &there)
        .finish()
        .code(0)
        .silent();
    world
        .stanchion(["run", "k", "--store-file", "url", "--", "true"])
        .env("STANCHION_STORE", &there)
        .finish()
        .code(0)
        .silent();
    assert!(world.path("here").exists() && !world.path("there").exists());
    let missing = world.stanchion(["ls", "--store-file", "nowhere"]).finish();
    missing.code(78).says(&["cannot read `nowhere` (of --store-file)"]);
}

#[test]
fn the_command_gets_the_lock_descriptor_and_no_other_of_ours() {
    let world = World::new();
    let text = world.stanchion(["run", "k", "--", "ls", "-l", "/proc/self/fd"]).finish().ok();
    let state = world.path("state").display().to_string();
    let ours: Vec<_> = text.lines().filter(|line| line.contains(&state)).collect();
    assert!(matches!(ours.as_slice(), [one] if one.contains("/sessions/") && one.contains(" 200 -> ")), "{text}");
    assert!(!text.contains("socket:") && !text.contains("eventfd") && !text.contains("eventpoll"), "{text}");
}
