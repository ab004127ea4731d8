//! A key of `acquire` is free when its process has ended, and whenever the command or its holder is killed.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::process::{Child, Command, Stdio};

use crate::common::*;
use rustix::process::Signal;

/// A process for which a key is held. It is not one of the world's, and ends with the test.
struct Other(Child);

impl Other {
    fn new() -> Self {
        Self(Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap())
    }

    fn id(&self) -> String {
        self.0.id().to_string()
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.kill();
    }
}

#[test]
fn end_of_the_shell_frees_the_key() {
    let world = World::new();
    for end in ["exit 0", "exit 3", "kill -TERM $$", "kill -KILL $$"] {
        let script = format!("t=$($S acquire k -n) || exit 9; touch $D/held; {end}");
        let finished = world.script("bash", &script).finish();
        assert!(world.path("held").exists() && finished.code != Some(9), "{finished:?}");
        std::fs::remove_file(world.path("held")).unwrap();
        world.stanchion(["run", "k", "-w", "20", "--", "true"]).finish().code(0).silent();
        world.until_nothing_runs();
    }
}

#[test]
fn key_is_held_while_its_process_lives() {
    let world = World::new();
    let mut other = Other::new();
    world.stanchion(["acquire", "k", "--pid", &other.id()]).finish().code(0);
    let next = world.stanchion(["run", "k", "--", "sh", "-c", "echo $STANCHION_FENCE"]).start();
    world.until_waiting("k", 1);
    // Signals that end a group or a service do not end the holder before its process.
    let holder = world.processes().into_iter().find(|pid| *pid != next.pid()).unwrap();
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        kill(holder, signal);
    }
    world.until_waiting("k", 1);
    world.until_holding("k", 1);
    assert!(is_alive(holder));
    other.kill();
    next.finish().code(0);
    world.until_nothing_runs();
}

#[test]
fn killed_holder_frees_the_key() {
    let world = World::new();
    let other = Other::new();
    world.stanchion(["acquire", "k", "--pid", &other.id()]).finish().code(0);
    for pid in world.processes() {
        kill(pid, Signal::KILL);
    }
    world.stanchion(["run", "k", "-w", "20", "--", "true"]).finish().code(0).silent();
}

#[test]
fn killed_caller_ends_the_wait() {
    let world = World::new();
    let holding = world.stanchion(["run", "k", "--", "sh", "-c", "touch $D/held; exec sleep 600"]).start();
    world.until_file("held");
    for option in ["", "--ttl 1h"] {
        let caller = world.script("bash", &format!("$S acquire k {option} > $D/token; true")).start();
        world.until_waiting("k", 1);
        // The command itself lives on for a moment, as an orphan.
        caller.send(Signal::KILL);
        world.until_waiting("k", 0);
    }
    drop(holding);
    world.until_free("k");
    world.until_nothing_runs();
    assert_eq!(world.read("token"), "");
}

#[test]
fn unread_token_frees_the_key() {
    let world = World::new();
    for option in ["--ttl 1h", "--pid $PPID"] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let script = format!("exec $S acquire k {option}");
        world.script("sh", &script).stdout(writer).finish().code(70).says(&["nobody read the token"]);
        world.until_nothing_runs();
        world.assert_free("k");
    }
}

/// The command is killed at random moments, from its first instruction to its end. A key that is held after that has a living
/// holder and a living process, or the caller has its token.
#[test]
fn randomly_killed_command_leaves_nothing() {
    let world = World::new();
    let mut random = Random(11);
    let mut outcomes = [0; 3];
    for round in 0..80 {
        let mut other = Other::new();
        let id = other.id();
        let has_lifetime = round % 2 == 0;
        let option = if has_lifetime { ["--ttl", "1h"] } else { ["--pid", &id] };
        let running = world.stanchion(["acquire", "k", "-n"].iter().chain(&option)).start();
        std::thread::sleep(std::time::Duration::from_micros(random.below(30_000)));
        running.send(Signal::KILL);
        let finished = running.finish();
        let token = finished.stdout.lines().next().map(str::to_owned);
        match (&token, finished.code) {
            (None, _) => {
                outcomes[0] += 1;
                // Its process lives on: the holder ends because the command has.
                world.until_nothing_runs();
            }
            (Some(_), None) => outcomes[1] += 1,
            (Some(token), Some(0)) => {
                outcomes[2] += 1;
                world.stanchion(["release", token, "-v"]).finish().code(0).says(&["key `k` released"]);
            }
            _ => panic!("round {round}: {finished:?}"),
        }
        other.kill();
        world.until_nothing_runs();
        if let Some(token) = token.filter(|_| has_lifetime && finished.code.is_none()) {
            world.stanchion(["release", &token, "-q"]).finish().code(0);
        }
        world.assert_free("k");
    }
    eprintln!("killed before the token came, after, not at all: {outcomes:?}");
    assert!(outcomes[0] > 0);
}

/// The same for the shell that called it.
#[test]
fn randomly_killed_shell_leaves_nothing() {
    let world = World::new();
    let mut random = Random(13);
    for _ in 0..60 {
        let caller = world.script("bash", "t=$($S acquire k -n); echo $t; exec sleep 600").start();
        std::thread::sleep(std::time::Duration::from_micros(random.below(40_000)));
        caller.send(Signal::KILL);
        world.until_nothing_runs();
        world.assert_free("k");
    }
}

#[test]
fn randomly_killed_holder_is_reported() {
    let world = World::new();
    let mut random = Random(17);
    for round in 0..40 {
        let other = Other::new();
        let running = world.stanchion(["acquire", "k", "-n", "--pid", &other.id()]).start();
        std::thread::sleep(std::time::Duration::from_micros(random.below(20_000)));
        for pid in world.processes().into_iter().filter(|pid| *pid != running.pid()) {
            kill(pid, Signal::KILL);
        }
        let finished = running.finish();
        match finished.code {
            Some(0) => {}
            Some(70) => assert!(finished.stderr.contains("was killed"), "round {round}: {finished:?}"),
            _ => panic!("round {round}: {finished:?}"),
        }
        drop(other);
        world.until_nothing_runs();
        world.assert_free("k");
    }
}

#[test]
fn holder_keeps_nothing_of_its_caller() {
    let world = World::new();
    let script = "exec 7> $D/lock 444> $D/other; a=$($S acquire k 2>&1); echo $$; touch $D/ready; exec sleep 600";
    let running = world.script("bash", script).start();
    world.until_file("ready");
    let shell = running.pid();
    let holder = world.processes().into_iter().find(|pid| *pid != shell).unwrap();
    let links = std::fs::read_dir(format!("/proc/{holder}/fd")).unwrap();
    let links: Vec<_> = links
        .map(|fd| std::fs::read_link(fd.unwrap().path()).unwrap_or_default().to_string_lossy().into_owned())
        .collect();
    let state = world.path("state").display().to_string();
    let is_own = |link: &String| {
        let kinds = ["/dev/null", "socket:", "anon_inode:", "/proc/", "/dev/urandom", "/dev/random"];
        link.starts_with(&state) || kinds.iter().any(|kind| link.starts_with(kind))
    };
    assert!(links.iter().all(is_own), "{links:?}");
    for stream in 0..3 {
        let link = std::fs::read_link(format!("/proc/{holder}/fd/{stream}")).unwrap();
        assert_eq!(link.to_str(), Some("/dev/null"));
    }
    assert_eq!(std::fs::read_link(format!("/proc/{holder}/cwd")).unwrap().to_str(), Some("/"));
    assert_eq!(stat(holder).unwrap().2, holder, "a group of its own");
    drop(running);
    world.until_free("k");
}
