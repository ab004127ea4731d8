//! The wrapper is killed: everything that it started dies, and the key is never free before.
#![allow(clippy::unwrap_used, reason = "test code")]

use crate::common::*;
use rustix::process::Signal;

#[test]
fn killed_wrapper_frees_key_last() {
    let world = World::new();
    for round in 0..20 {
        let script = "echo $$ > $D/child; sleep 600 & echo $! > $D/grandchild; wait";
        let running = world.stanchion(["run", "k", "--", "sh", "-c", script]).start();
        let (child, grandchild) = (pid_in(&world, "child"), pid_in(&world, "grandchild"));
        let guardian = guardian_of(running.pid()).unwrap();
        // It starts the moment the key is free, and sees who lives then.
        let script = format!("for p in {child} {grandchild}; do grep -s '^State:.[^ZX]' /proc/$p/status; done; true");
        let next = world.stanchion(["run", "k", "--", "sh", "-c", &script]).start();
        world.until_waiting("k", 1);
        running.send(Signal::KILL);
        assert_eq!(next.finish().code(0).stdout, "", "round {round}: the key was free while the command lived");
        until("the end of all three", || [child, grandchild, guardian].iter().all(|pid| !is_alive(*pid)));
        for name in ["child", "grandchild"] {
            std::fs::remove_file(world.path(name)).unwrap();
        }
    }
    world.until_free("k");
}

#[test]
fn random_kill_leaves_nothing() {
    let world = World::new();
    let mut random = Random(7);
    for _ in 0..60 {
        let script = "sleep 600 & (sleep 600; true) & exec sleep 600";
        let running = world.stanchion(["run", "k", "--", "sh", "-c", script]).start();
        // Over the whole start, from the first instruction to a running command.
        std::thread::sleep(std::time::Duration::from_micros(random.below(15_000)));
        running.send(Signal::KILL);
        assert_eq!(running.finish().signal, Some(9));
        world.until_nothing_runs();
    }
    world.stanchion(["run", "k", "-w", "20", "--", "true"]).finish().code(0).silent();
    world.until_free("k");
}

#[test]
fn escaped_process_keeps_the_key() {
    let world = World::new();
    let script = "setsid sh -c 'echo $$ > $D/daemon; exec sleep 600' & wait";
    let running = world.stanchion(["run", "k", "--", "sh", "-c", script]).start();
    let daemon = pid_in(&world, "daemon");
    running.send(Signal::KILL);
    assert_eq!(running.finish().signal, Some(9));
    until("the rest", || world.processes() == [daemon]);
    world.stanchion(["run", "k", "-n", "--", "true"]).finish().code(75).says(&["held by sh@"]);
    kill(daemon, Signal::KILL);
    world.stanchion(["run", "k", "-w", "20", "--", "true"]).finish().code(0).silent();
}

#[test]
fn guardian_is_alone_and_ends() {
    let world = World::new();
    let running = world.stanchion(["run", "k", "--", "sh", "-c", "echo $$ > $D/child; read x"]).input(b"").start();
    // The input ends at once.
    let wrapper = running.pid();
    running.finish().code(1).silent();
    until("no guardian", || guardian_of(wrapper).is_none());

    // The caller has a lock of its own, or a pipe.
    let script = "exec 7> $D/lock 444> $D/other; exec $S run k -- sh -c 'echo $$ > $D/child2; exec sleep 600'";
    let mut command = std::process::Command::new("bash");
    command.args(["-c", script]);
    world.prepare(&mut command);
    command.env("S", env!("CARGO_BIN_EXE_stanchion"));
    let running = Running::of(command);
    let child = pid_in(&world, "child2");
    let guardian = guardian_of(running.pid()).unwrap();
    let has_lock =
        |pid: i32| std::fs::read_link(format!("/proc/{pid}/fd/7")).is_ok_and(|path| path == world.path("lock"));
    assert!(has_lock(child), "the command has what its caller gave it");
    let group = |pid| stat(pid).unwrap().2;
    until("a session of its own", || group(guardian) == guardian);
    assert_eq!(group(child), child);
    let descriptors = std::fs::read_dir(format!("/proc/{guardian}/fd")).unwrap();
    let links: Vec<_> = descriptors.map(|fd| std::fs::read_link(fd.unwrap().path()).unwrap_or_default()).collect();
    let is_harmless = |link: &std::path::PathBuf| {
        let text = link.to_string_lossy();
        text.starts_with("pipe:") || text == "/dev/null"
    };
    let state = world.path("state");
    assert!(links.iter().all(|link| !link.starts_with(&state)), "{links:?}");
    assert!(links.len() <= 4 && links.iter().all(is_harmless), "{links:?}");
    assert!(std::fs::read(format!("/proc/{guardian}/environ")).unwrap().is_empty());
    // It does not let itself be talked into leaving.
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        kill(guardian, signal);
    }
    running.send(Signal::KILL);
    until("the end of both", || !is_alive(child) && !is_alive(guardian));
}
