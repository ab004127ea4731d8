//! Bad input and bad surroundings: the documented message and exit code, and nothing left behind.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::os::unix::fs::PermissionsExt;

use crate::common::*;

/// No store was made and no command started.
pub(crate) fn nothing_is_left(world: &World) {
    assert_eq!(std::fs::read_dir(world.path("state")).unwrap().count(), 0);
    assert!(!world.path("started").exists());
    world.until_nothing_runs();
}

#[test]
fn mistyped_folders_are_rejected() {
    let world = World::new();
    let missing = format!("sqlite:{}", world.path("typo/locks").display());
    let absent = format!("sqlite:{}", world.path("absent").display());
    let run = |url: &str| world.stanchion(["run", "k", "--store", url, "--", "touch", "started"]).finish();
    run("sqlite:locks").code(64).says(&["relative folder", "write sqlite:/ABSOLUTE/FOLDER"]);
    run("sqlite:~other/locks").code(64).says(&["relative folder"]);
    run(&missing).code(78).says(&["typo` does not exist: make it first"]);
    for looking in [&["ls"][..], &["inspect", "k"], &["force-release", "k", "--fence", "1", "--reason", "x"]] {
        let arguments = looking.iter().copied().chain(["--store", absent.as_str()]);
        world.stanchion(arguments).finish().code(78).says(&["no store in `", "the first `stanchion run` makes it"]);
        // The user's own store is only empty.
        assert_ne!(world.stanchion(looking).finish().code, Some(78));
    }
    assert!(
        !world.path("started").exists() && !world.path("absent").exists() && !world.path("state/stanchion").exists()
    );
    run("sqlite:~/locks").code(0);
    assert!(world.path("locks").exists());
}

#[test]
fn unwritable_folder_is_not_permitted() {
    let world = World::new();
    let state = world.path("state");
    // The user `nobody` must be able to read it. Another process copies it: a file that this process has open for writing
    // is for a moment also open in a child that another test starts, and cannot be executed then.
    let copied =
        std::process::Command::new("cp").arg(env!("CARGO_BIN_EXE_stanchion")).arg(world.path("stanchion")).status();
    assert!(copied.unwrap().success());
    for path in [world.path("."), state.clone()] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o555)).unwrap();
    }
    // Root may write anywhere, so it is nobody who asks.
    let mut command = std::process::Command::new("setpriv");
    if rustix::process::geteuid().is_root() {
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    }
    command.args(["./stanchion", "run", "k", "--", "touch", "started"]);
    world.prepare(&mut command);
    let out = command.output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(77), "{said}");
    assert!(
        said.starts_with("stanchion: ") && said.contains("no permission to use") && said.lines().count() == 1,
        "{said}"
    );
    nothing_is_left(&world);
    for path in [state, world.path(".")] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    }
}

/// In a file system of its own, small and full.
fn on_a_full_disk(world: &World, script: &str) -> (Option<i32>, String) {
    let script = format!(
        "mount -t tmpfs -o size=400k none $D/state || exit 99
         fill() {{ dd if=/dev/zero of=$D/state/fill bs=1k 2> /dev/null; true; }}
         {script}"
    );
    let mut command = std::process::Command::new("unshare");
    command.args(["-rm", "sh", "-c", &script]);
    world.prepare(&mut command);
    command.env("S", env!("CARGO_BIN_EXE_stanchion"));
    let out = command.output().unwrap();
    (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
}

#[test]
fn full_disk_is_unavailable() {
    let world = World::new();
    if on_a_full_disk(&world, "true").0 != Some(0) {
        // As in most containers. Where the release is tested they are there.
        return eprintln!("not tested: this system does not let a user mount a file system of their own");
    }
    for script in [
        "fill; exec $S run k -- touch $D/started",
        "$S run k -- true || exit 98; fill; exec $S run k -- touch $D/started",
    ] {
        let (code, said) = on_a_full_disk(&world, script);
        assert_eq!(code, Some(69), "{said}");
        let tells = said.contains("is full") || said.contains("cannot serve");
        assert!(said.starts_with("stanchion: ") && tells && said.lines().count() == 1, "{said}");
        nothing_is_left(&world);
    }
    // It works again once there is room.
    let script = "$S run k -- true; fill; $S run k -q -- touch $D/started; rm $D/state/fill; exec $S run k -w 20 -- touch $D/again";
    assert_eq!(on_a_full_disk(&world, script), (Some(0), String::new()));
    assert!(world.path("again").exists() && !world.path("started").exists());
}

/// Descriptors and threads are refused at every point of the start: an error with its cause, no panic, no command beside it.
#[test]
fn low_limits_are_explained() {
    let world = World::new();
    world.stanchion(["run", "k", "--", "true"]).finish().code(0);
    let mut succeeded = 0;
    for limit in (3..72).chain([100, 1_000]) {
        for arguments in [&["run", "k", "-w", "5", "--", "true"][..], &["ls"]] {
            let mut command = std::process::Command::new("prlimit");
            command.arg(format!("--nofile={limit}")).arg(env!("CARGO_BIN_EXE_stanchion")).args(arguments);
            world.prepare(&mut command);
            let finished = Running::of(command).finish();
            // The system itself cannot start a program with fewer.
            let Some(code) = finished.code else { panic!("{limit}: {finished:?}") };
            if finished.stderr.contains("error while loading shared libraries") {
                continue;
            }
            assert!([0, 69, 70, 126, 78].contains(&code), "{limit}: {finished:?}");
            assert!(!finished.stderr.contains("panicked"), "{limit}: {finished:?}");
            assert!(code == 0 || finished.stderr.starts_with("stanchion: "), "{limit}: {finished:?}");
            succeeded += usize::from(code == 0);
        }
    }
    assert!(succeeded > 0);
    world.assert_free("k");
}

#[test]
fn low_thread_limits_are_errors_with_a_cause() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("NOT TESTED: only root can be another user, whose threads are counted");
    }
    let world = World::new();
    let user = 1_000_000_000 + std::process::id();
    std::os::unix::fs::chown(world.path("state"), Some(user), Some(user)).unwrap();
    std::fs::set_permissions(world.path("."), PermissionsExt::from_mode(0o755)).unwrap();
    let copied =
        std::process::Command::new("cp").arg(env!("CARGO_BIN_EXE_stanchion")).arg(world.path("stanchion")).status();
    assert!(copied.unwrap().success());
    let mut codes = Vec::new();
    for limit in (1..16).chain([24, 32, 48]) {
        let mut command = std::process::Command::new("prlimit");
        command.arg(format!("--nproc={limit}")).arg("setpriv");
        command.args([format!("--reuid={user}"), format!("--regid={user}"), "--clear-groups".to_owned()]);
        command.args(["./stanchion", "run", "k", "-w", "5", "--", "true"]);
        world.prepare(&mut command);
        let finished = Running::of(command).finish();
        assert!(!finished.stderr.contains("panicked"), "{limit}: {finished:?}");
        let code = finished.code.unwrap_or_else(|| panic!("{limit}: {finished:?}"));
        assert!([0, 69, 70, 126].contains(&code), "{limit}: {finished:?}");
        codes.push(code);
    }
    assert!(codes.contains(&0) && codes.iter().any(|code| *code != 0), "{codes:?}");
}
