//! The store's URL: not in messages, not in the command's environment, and no password in an argument.
#![allow(clippy::unwrap_used, reason = "test code")]

use crate::common::*;

const SECRET: &str = "s3ntinel";

fn tell_nothing(finished: &Finished) {
    assert!(!finished.stdout.contains(SECRET) && !finished.stderr.contains(SECRET), "{finished:?}");
}

#[test]
fn password_arguments_are_refused() {
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
    world.write_store_file("url", "frob://u:s3ntinel@h:1/0\n");
    let url = "frob://u:s3ntinel@h:1/0";
    for invocation in [
        world.stanchion(["run", "k", "-v", "--", "true"]).env("STANCHION_STORE", url),
        world.stanchion(["ls"]).env("STANCHION_STORE", url),
        world.stanchion(["run", "k", "--store-file", "url", "--", "true"]),
        world.stanchion(["ls"]).env("STANCHION_STORE_FILE", "url"),
        world.stanchion(["run", "--key", "k", url, "--", "true"]),
        world.stanchion(["run", "k", "--stroe=frob://u:s3ntinel@h:1/0", "--", "true"]),
        world.stanchion([url]),
        world.stanchion(["ls", "--json", url, "extra"]),
        world.stanchion(["run", "k", "-w", url, "--", "true"]),
    ] {
        let finished = invocation.finish();
        tell_nothing(&finished);
        finished.code(64).reports(&[]);
    }
    let as_a_command = world.stanchion(["run", "k", url, "--", "true"]).finish();
    tell_nothing(&as_a_command);
    as_a_command.code(127).says(&["`frob://***@h:1/0`: command not found"]);
}

#[test]
fn command_learns_key_and_fence() {
    let world = World::new();
    let store = format!("sqlite:{}", world.path("elsewhere").display());
    world.write_store_file("url", &store);
    let text = world
        .stanchion(["run", "caf\u{e9} 1", "--", "env"])
        .env("STANCHION_STORE", &store)
        .env("STANCHION_STORE_FILE", world.path("url"))
        .env("STANCHION_OTHER", "kept")
        .finish()
        .ok();
    let ours: Vec<_> = text.lines().filter(|line| line.starts_with("STANCHION_") && !line.contains("_TEST=")).collect();
    assert_eq!(ours.len(), 4, "{ours:?}");
    // A `stanchion` that the command runs uses the same store.
    assert!(ours.contains(&format!("STANCHION_STORE={store}").as_str()), "{ours:?}");
    assert!(ours.contains(&"STANCHION_KEY=caf\u{e9} 1") && ours.contains(&"STANCHION_OTHER=kept"), "{ours:?}");
    let fence = ours.iter().find_map(|line| line.strip_prefix("STANCHION_FENCE=")).unwrap();
    assert!(!fence.starts_with('0') && fence.parse::<u64>().unwrap() < 1 << 53, "{fence}");
    assert!(world.path("elsewhere").exists());
}

#[test]
fn option_overrides_the_environment() {
    let world = World::new();
    let (here, there) =
        (format!("sqlite:{}", world.path("here").display()), format!("sqlite:{}", world.path("there").display()));
    world.write_store_file("url", &format!("{here}\nmore\n"));
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
fn command_inherits_the_lock_descriptor_only() {
    let world = World::new();
    let text = world.stanchion(["run", "k", "--", "ls", "-l", "/proc/self/fd"]).finish().ok();
    let state = world.path("state").display().to_string();
    let ours: Vec<_> = text.lines().filter(|line| line.contains(&state)).collect();
    assert!(matches!(ours.as_slice(), [one] if one.contains("/sessions/") && one.contains(" 873 -> ")), "{text}");
    assert!(!text.contains("socket:") && !text.contains("eventfd") && !text.contains("eventpoll"), "{text}");
}

/// Malformed in every way that a person may write it.
const URLS: [&str; 22] = [
    "redis://u:s3cr3t@h:x/0",
    "redis://u:s3cr3t @h:x",
    "redis://u:s3 cr3t'x@h:x",
    "redis://u:x\"y s3cr3t@h:x",
    "redis://u:a@s3cr3t@h:y",
    "redis://u:a/s3cr3t?x#y@h",
    "redis://u:`s3cr3t`@h:x",
    "redis://u:a\ts3cr3t\n@h:x",
    "redis://:s3cr3t",
    "redis://u:s3cr3t/0",
    "redis:u:s3cr3t@h",
    "redis:/u:s3cr3t@h",
    "redis//u:s3cr3t@h",
    "u:s3cr3t@h:6379",
    "s3cr3t:x@h",
    "postgres://u:s3cr3t@h:x/db",
    "postgres://u:s3 cr3t'@h/db?sslmode=frob",
    "postgres://h/db?password=s3cr3t&x=y",
    "frob://u:s3cr3t@h",
    "sqlite://u:s3cr3t@h/x",
    "sqlite:?u:s3cr3t@h",
    "firestore://u:s3cr3t@h/d",
];

#[test]
fn malformed_urls_are_in_no_message() {
    let world = World::new();
    for (number, url) in URLS.into_iter().enumerate() {
        let file = format!("url{number}");
        world.write_store_file(&file, url);
        // With a value that is wrong: some would be keys, and fine.
        for invocation in [
            world.stanchion(["ls"]).env("STANCHION_STORE", url),
            world.stanchion(["run", "k", "-v", "--", "true"]).env("STANCHION_STORE", url),
            world.stanchion(["schema"]).env("STANCHION_STORE", url),
            world.stanchion(["ls", "--store-file", &file]),
            world.stanchion(["ls", "--store-file", url]),
            world.stanchion(["ls", "--store", url]),
            world.stanchion(["ls", &format!("--stroe={url}")]),
            world.stanchion(["ls", &format!("--stroe {url}")]),
            world.stanchion(["run", "k", url, "--", "true"]),
            world.stanchion(["run", "k", "-w", url, "--", "true"]),
            world.stanchion(["run", "k", "--permits", url, "--", "true"]),
            world.stanchion(["run", "k", "--", url]),
            // A key is shown, unless it is certain to be a URL.
            world.stanchion(["run", if url.contains("://") { url } else { "k" }, "-v", "--", "false"]),
            world.stanchion([
                "force-release",
                if url.contains("://") { url } else { "k" },
                "--fence",
                "1",
                "--reason",
                "x",
            ]),
            world.stanchion(["force-release", "k", "--fence", url, "--reason", "x"]),
            world.stanchion(["completions", url]),
            world.stanchion([url]),
        ] {
            let finished = invocation.finish();
            let text = finished.stderr.replace(&world.path("").display().to_string(), "");
            assert!(!text.contains("cr3t"), "{url:?}: {finished:?}");
            assert!(finished.code != Some(0) && finished.code != Some(101), "{url:?}: {finished:?}");
        }
    }
}

#[test]
fn insecure_store_files_are_refused() {
    use std::os::unix::fs::{PermissionsExt, chown};
    let world = World::new();
    let set_mode = |mode| std::fs::set_permissions(world.path("url"), PermissionsExt::from_mode(mode)).unwrap();
    world.write_store_file("url", "sqlite:");
    for mode in [0o604, 0o606, 0o660, 0o666, 0o602] {
        set_mode(mode);
        for invocation in [
            world.stanchion(["ls", "--store-file", "url"]),
            world.stanchion(["run", "k", "--", "touch", "started"]).env("STANCHION_STORE_FILE", "url"),
        ] {
            invocation.finish().code(78).says(&["`url` (of ", "may hold a password", "chmod 600 url"]);
        }
    }
    set_mode(0o600);
    world.stanchion(["ls", "--store-file", "url"]).finish().code(0);
    if !rustix::process::geteuid().is_root() {
        return eprintln!("NOT TESTED: only root can give a file to another user");
    }
    chown(world.path("url"), Some(64_000), None).unwrap();
    let finished = world.stanchion(["ls", "--store-file", "url"]).finish().code(78);
    finished.says(&["belongs to user 64000"]);
    assert!(!world.path("started").exists());
}
