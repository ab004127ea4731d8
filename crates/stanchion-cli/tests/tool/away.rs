//! Limits while the store is away.

use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use crate::common::*;

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn limits_hold_while_the_folder_is_blocked() {
    let world = World::new();
    world.stanchion(["run", "k", "--", "true"]).finish().code(0);
    // As by a process that was stopped while it wrote.
    let gate = std::fs::File::open(world.path("state/stanchion/gate")).unwrap();
    flock(&gate, FlockOperation::LockExclusive).unwrap();
    limits_are_kept("a blocked folder", |options| world.stanchion([&["run"], options, &["k", "--", "true"]].concat()));
    // A longer wait outlives it.
    let waiting = world.stanchion(["run", "-w", "30s", "k", "--", "true"]).start();
    std::thread::sleep(SECOND);
    flock(&gate, FlockOperation::Unlock).unwrap();
    waiting.finish().code(0);
}

#[test]
fn full_disk_keeps_the_limits() {
    let world = World::new();
    let tool = env!("CARGO_BIN_EXE_stanchion");
    // A file system of its own, in a namespace of its own.
    let on_a_full_disk = |options: &[&str]| {
        let script = format!(
            "mount -t tmpfs -o size=600k tmpfs $D/disk || exit 99; chmod 700 $D/disk; \
             {tool} run --store sqlite:$D/disk/locks k -- true || exit 98; \
             dd if=/dev/zero of=$D/disk/filler bs=4k 2>/dev/null; dd if=/dev/zero bs=1 of=$D/disk/more 2>/dev/null; \
             start=$(date +%s%3N); {tool} run {} --store sqlite:$D/disk/locks k -- true; code=$?; \
             echo $(($(date +%s%3N) - start)); exit $code",
            options.join(" ")
        );
        world.unshared(&script)
    };
    std::fs::create_dir(world.path("disk")).unwrap();
    if on_a_full_disk(&["-n"]).finish().code == Some(99) {
        return eprintln!("NOT TESTED: a full disk: this system lets nobody mount a file system of their own");
    }
    limits_are_kept("a full disk", on_a_full_disk);
}
