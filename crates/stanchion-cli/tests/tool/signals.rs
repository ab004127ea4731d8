//! Signals: passed on to the command, and no process left behind, whenever they come.
#![allow(clippy::unwrap_used, reason = "test code")]

use crate::common::*;
use rustix::process::Signal;

#[test]
fn signals_reach_the_whole_group() {
    let world = World::new();
    for (signal, name) in [
        (Signal::INT, "INT"),
        (Signal::TERM, "TERM"),
        (Signal::HUP, "HUP"),
        (Signal::QUIT, "QUIT"),
        (Signal::USR1, "USR1"),
        (Signal::USR2, "USR2"),
    ] {
        // The shell runs its own trap when the one in the foreground has ended.
        let script = format!(
            "trap 'exit 9' {name}; touch $D/ready-a-{name}
             sh -c \"trap 'touch $D/grandchild-{name}; exit' {name}; touch $D/ready-b-{name}
                    {FOREVER}\"; exit 1"
        );
        let running = world.stanchion(["run", "k", "-c", &script]).start();
        world.until_file(&format!("ready-a-{name}"));
        world.until_file(&format!("ready-b-{name}"));
        running.send(signal);
        running.finish().code(9);
        assert!(world.path(&format!("grandchild-{name}")).exists());
        world.until_nothing_runs();
    }
}

#[test]
fn death_by_signal_gives_128_plus_number() {
    let world = World::new();
    let running = world.stanchion(["run", "k", "--", "sh", "-c", "echo $$ > pid; exec sleep 600"]).start();
    pid_in(&world, "pid");
    running.send(Signal::TERM);
    running.finish().code(143).silent();
}

#[test]
fn the_second_request_to_end_kills() {
    let world = World::new();
    let script = "trap '' TERM INT; touch $D/ready; while :; do sleep 0.01; done";
    let running = world.stanchion(["run", "k", "-c", script]).start();
    world.until_file("ready");
    running.send(Signal::TERM);
    let pid = running.pid();
    until("the first one was taken", || pending(pid) == 0);
    running.send(Signal::INT);
    running.finish().code(137);
    world.until_nothing_runs();
}

fn pending(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("ShdPnd:")).unwrap_or("0");
    u64::from_str_radix(line.trim(), 16).unwrap_or(0)
}

#[test]
fn ignored_signals_stay_ignored() {
    let world = World::new();
    let script =
        "grep SigIgn /proc/self/status > $D/ignored; touch $D/ready; while [ ! -e $D/go ]; do sleep 0.01; done";
    let options = ["--ignore-signal=HUP", "--ignore-signal=CHLD"];
    let running = world.through(&options, ["run", "k", "--", "sh", "-c", script]).start();
    world.until_file("ready");
    running.send(Signal::HUP);
    std::fs::write(world.path("go"), "").unwrap();
    running.finish().code(0);
    let mask = world.read("ignored");
    let mask = u64::from_str_radix(mask.trim().rsplit('\t').next().unwrap(), 16).unwrap();
    let bit = |signal: Signal| mask >> (signal.as_raw() - 1) & 1;
    assert_eq!((bit(Signal::HUP), bit(Signal::PIPE), bit(Signal::INT)), (1, 0, 0), "{mask:x}");
}

#[test]
fn blocked_signals_stay_blocked() {
    let world = World::new();
    let options = ["--block-signal=USR1"];
    let mask = world.through(&options, ["run", "k", "--", "grep", "SigBlk", "/proc/self/status"]).finish().ok();
    let mask = u64::from_str_radix(mask.trim().rsplit('\t').next().unwrap(), 16).unwrap();
    assert_eq!(mask, 1 << (Signal::USR1.as_raw() - 1));
}

#[test]
fn signal_ends_the_wait_and_the_queue_entry() {
    let world = World::new();
    let holder = world.stanchion(["run", "k", "--", "sh", "-c", "touch $D/held; exec sleep 600"]).start();
    world.until_file("held");
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129), (Signal::USR1, 138)] {
        let waiter = world.stanchion(["run", "k", "--", "touch", "started"]).start();
        world.until_waiting("k", 1);
        waiter.send(signal);
        let finished = waiter.finish().silent();
        // A shell that runs a script goes on after 130: a Ctrl-C has to be died of.
        let expected = if signal == Signal::INT { (None, Some(2)) } else { (Some(code), None) };
        assert_eq!((finished.code, finished.signal), expected);
        world.until_waiting("k", 0);
    }
    holder.send(Signal::TERM);
    holder.finish().code(143);
    world.assert_free("k");
    assert!(!world.path("started").exists());
}

#[test]
fn stop_without_a_shell_is_ignored() {
    let world = World::new();
    let script = format!("trap 'touch $D/continued; exit 5' CONT; touch $D/ready; {FOREVER}");
    // A session of its own, as a service has: nobody is there to say `fg`.
    let running = world.through(&["setsid"], ["run", "k", "-c", &script]).start();
    world.until_file("ready");
    running.send(Signal::TSTP);
    world.until_file("continued");
    running.finish().code(5);
}

/// As in a container that was entered from outside: the leaders of the group and of the session have no number there.
#[test]
fn stop_in_a_container_is_ignored() {
    let world = World::new();
    let script = format!(
        "$S run k -c 'trap \"exit 5\" CONT; : > $D/ready; {FOREVER}' &
         while [ ! -e $D/ready ]; do sleep 0.01; done; kill -TSTP $!; wait $!"
    );
    let contained = |command: &[&str]| {
        let mut unshare = std::process::Command::new("unshare");
        unshare.args(["--map-root-user", "--pid", "--mount-proc", "--fork", "--kill-child"]).args(command);
        world.prepare(&mut unshare);
        unshare.env("S", env!("CARGO_BIN_EXE_stanchion"));
        Running::of(unshare).finish()
    };
    if contained(&["true"]).code != Some(0) {
        // As in most containers. There the other tests are this test.
        return eprintln!("not tested: this system does not let a user have process ids of their own");
    }
    contained(&["env", "--default-signal", "sh", "-c", &script]).code(5).silent();
}

/// Runs a command as the first process of process ids of its own. None where the system does not allow that.
fn first_process(world: &World, command: &[&str]) -> Option<Finished> {
    let contained = |command: &[&str]| {
        let mut unshare = std::process::Command::new("unshare");
        unshare.args(["--map-root-user", "--pid", "--mount-proc", "--fork", "--kill-child"]).args(command);
        world.prepare(&mut unshare);
        unshare.env("S", env!("CARGO_BIN_EXE_stanchion"));
        Running::of(unshare).finish()
    };
    if contained(&["true"]).code != Some(0) {
        // As in most containers.
        eprintln!("NOT TESTED: this system does not let a user have process ids of their own");
        return None;
    }
    Some(contained(command))
}

#[test]
fn first_process_reaps_orphans() {
    let world = World::new();
    // The orphans' parent is the tool. Neither a living nor a dead one is there in the end.
    let script = "for i in 1 2 3 4 5; do (sleep 0.0$i &); done
                  while grep -qs '^Name:.sleep$' /proc/[0-9]*/status; do
                      i=$((i + 1)); test $i -lt 5000 || { cat /proc/[0-9]*/status; exit 9; }
                  done";
    let arguments = [env!("CARGO_BIN_EXE_stanchion"), "run", "k", "-c", script];
    let Some(finished) = first_process(&world, &arguments) else { return };
    finished.code(0).silent();
    // While it waits, too: another process of the container leaves them.
    let script = "trap 'exit 7' USR1; (exec $S run k -c ': > $D/held; sleep 600' &)
                  while [ ! -e $D/held ]; do sleep 0.01; done
                  (trap '' USR1; sleep 0.2; for i in 1 2 3; do (sleep 0.0$i &); done
                   while grep -qs '^Name:.sleep$' /proc/[0-9]*/status; do
                       i=$((i + 1)); test $i -lt 5000 || exit 9
                   done; : > $D/reaped; kill -TERM 1) & exec $S run k -- true";
    let script = script.replace("sleep 600", "tail -f /dev/null");
    let arguments = ["env", "--default-signal", "sh", "-c", &script];
    let Some(finished) = first_process(&world, &arguments) else { return };
    finished.code(143);
    assert!(world.path("reaped").exists());
}

/// To the system, process group 1 is every process. Tried where there are few.
#[test]
fn guardian_refuses_groups_of_all() {
    let world = World::new();
    for number in [r"\1\0\0\0", r"\377\377\377\377", r"\0\0\0\0", r"\376\377\377\377"] {
        let script = format!("tail -f /dev/null & printf '{number}' | $S __guardian; kill -0 $! && exit 5");
        let Some(finished) = first_process(&world, &["sh", "-c", &script]) else { return };
        finished.code(5).silent();
    }
}

#[test]
fn a_stopped_command_can_be_ended() {
    let world = World::new();
    let running = world.stanchion(["run", "k", "-c", "echo $$ > pid; exec sleep 600"]).start();
    let child = pid_in(&world, "pid");
    kill(child, Signal::STOP);
    until("a stopped command", || is_stopped(child));
    // It is the command alone that somebody stopped; the wrapper goes on.
    assert!(!is_stopped(running.pid()));
    running.send(Signal::TERM);
    running.finish().code(143).silent();
}

/// TERM at a random moment of a run, the key being free or held: never a survivor, never a start without the key.
fn signals_at_random_moments(name: &str, command: &[&str]) {
    let world = World::new();
    let mut random = Random(name.len() as u64);
    for round in 0..60 {
        let held = round % 3 == 0;
        let holder = held.then(|| {
            let holder = world.stanchion(["run", "k", "--", "sh", "-c", "touch $D/held; exec sleep 600"]).start();
            world.until_file("held");
            holder
        });
        let arguments = ["run", "k", "--"].iter().chain(command);
        let running = world.stanchion(arguments).start();
        // Over the whole start, from the first instruction to a running command.
        let offset = random.below(12_000);
        std::thread::sleep(std::time::Duration::from_micros(offset));
        running.send(Signal::TERM);
        let finished = running.finish();
        // Before the handlers are in place the signal kills, as it kills any program.
        let ended_by_it = finished.code == Some(143) || finished.signal == Some(15);
        assert!(ended_by_it, "round {round}, {offset} µs: {finished:?}");
        if let Some(holder) = holder {
            assert!(!world.path("started").exists(), "round {round}, {offset} µs: started without the key");
            holder.send(Signal::TERM);
            holder.finish().code(143);
            std::fs::remove_file(world.path("held")).unwrap();
        }
        world.until_nothing_runs();
        let _not_started = std::fs::remove_file(world.path("started"));
    }
    world.until_free("k");
}

#[test]
fn random_signal_leaves_no_command() {
    signals_at_random_moments("direct", &["sh", "-c", "touch $D/started; exec sleep 600"]);
}

#[test]
fn random_signal_leaves_no_shell() {
    signals_at_random_moments("shell", &["sh", "-c", "touch $D/started; sleep 600; true"]);
}

#[test]
fn random_signal_leaves_no_grandchild() {
    signals_at_random_moments("grandchild", &["sh", "-c", "touch $D/started; (sleep 600; true) & sleep 600 & wait"]);
}
