//! The tool on a server: the same as on one machine, with another URL. Each store with a server runs all of it.

use rustix::process::Signal;

use crate::common::*;

/// A server that wants the password `hunter2`.
pub(crate) trait Server {
    /// Where it is, with this password.
    fn url(&self, password: &str) -> String;
    fn kill(&mut self);
}

/// A world whose store is this server.
fn world(server: &impl Server) -> World {
    let world = World::new();
    world.write_store_file("url", &format!("{}\n", server.url("hunter2")));
    world
}

fn run(world: &World, more: &[&str]) -> Invocation {
    let url = world.path("url");
    let store = ["--store-file", url.to_str().unwrap()];
    let (command, rest) = more.split_first().unwrap();
    world.stanchion([&[*command], &store[..], rest].concat())
}

pub(crate) fn commands_run_alone_with_rising_fences(server: impl Server) {
    let count = 20;
    let world = world(&server);
    let script = "test ! -e $D/inside && touch $D/inside && echo $STANCHION_FENCE >> $D/fences && rm $D/inside";
    let all: Vec<_> = (0..count).map(|_| run(&world, &["run", "k", "-c", script]).start()).collect();
    for one in all {
        one.finish().code(0).silent();
    }
    let fences: Vec<u64> = world.read("fences").lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(fences.len(), count);
    assert!(fences.is_sorted(), "{fences:?}");
    let listed = run(&world, &["ls", "--json"]).finish().ok();
    assert!(!listed.contains(r#""key""#), "nothing is left: {listed}");
}

pub(crate) fn busy_limits_and_looking(server: impl Server) {
    let world = world(&server);
    let holder = run(&world, &["run", "k", "--", "sh", "-c", "touch $D/held; exec sleep 600"]).start();
    world.until_file("held");
    run(&world, &["run", "-n", "k", "--", "true"]).finish().code(75);
    run(&world, &["run", "-w", "100ms", "k", "--", "true"]).finish().code(75);
    let json = run(&world, &["inspect", "k", "--json"]).finish().ok();
    assert!(json.contains(r#""fence":"#), "{json}");
    assert!(run(&world, &["ls"]).finish().ok().contains('k'));
    holder.send(Signal::TERM);
    holder.finish().code(143);
    run(&world, &["run", "-n", "k", "--", "true"]).finish().code(0);
}

pub(crate) fn passwords_reach_no_child_and_no_message(server: impl Server) {
    let world = world(&server);
    let child = run(&world, &["run", "k", "--", "sh", "-c", "env; tr '\\0' ' ' < /proc/$PPID/cmdline"]).finish().ok();
    assert!(child.contains("STANCHION_FENCE=") && !child.contains("hunter2"), "{child}");
    let refused = world.stanchion(["run", "--store", &server.url("hunter2"), "k", "--", "true"]).finish();
    assert!(!refused.stderr.contains("hunter2"), "{refused:?}");
    refused.code(64).says(&["a password in an argument can be read"]);
    world.write_store_file("url", &server.url("wrong-one"));
    let wrong = run(&world, &["run", "k", "--", "true"]).finish();
    assert!(!wrong.stderr.contains("wrong-one") && !wrong.stderr.contains("panicked"), "{wrong:?}");
    wrong.code(77);
}

pub(crate) fn command_ends_before_another_gets_the_key(mut server: impl Server) {
    let world = world(&server);
    let running = run(&world, &["run", "--ttl", "2s", "k", "-c", "touch $D/held; exec sleep 600"]).start();
    world.until_file("held");
    server.kill();
    running.finish().code(76).reports(&["the command will be ended in ", "key `k` was lost while the command ran"]);
    world.until_nothing_runs();
}

pub(crate) fn killed_wrapper_takes_its_child_along(server: impl Server) {
    let world = world(&server);
    let script = "echo $$ > pid; exec sleep 600";
    let running = run(&world, &["run", "--ttl", "1s", "k", "-c", script]).start();
    let child = pid_in(&world, "pid");
    running.send(Signal::KILL);
    until("the child is dead", || !is_alive(child));
    run(&world, &["run", "-w", "10s", "k", "--", "true"]).finish().code(0);
}

/// Stopped for longer than its ttl, a leader finds its term over: it ends its command and queues again.
pub(crate) fn stopped_leader_queues_again(server: impl Server) {
    let world = world(&server);
    let url = world.path("url");
    let options = ["--ttl", "1s", "--store-file", url.to_str().unwrap()];
    let until_waiting = || {
        until("a waiter", || {
            let json = run(&world, &["inspect", "k", "--json"]).finish().ok();
            json.split_once(r#""waiters":["#).is_some_and(|(_, rest)| rest.contains(r#""owner":"#))
        });
    };
    let first = world.candidate(&options);
    world.until_terms(1);
    let command = pid_in(&world, "leader");
    let second = world.candidate(&options);
    until_waiting();
    first.send(Signal::STOP);
    world.until_terms(2);
    assert!(is_alive(command), "nobody could end it");
    first.send(Signal::CONT);
    until("the end of the old leader's command", || !is_alive(command));
    until_waiting();
    second.send(Signal::TERM);
    second.finish().code(143);
    world.until_terms(3);
    first.send(Signal::TERM);
    first.finish().code(143).reports(&["key `k` was lost while the command ran", "; waiting for the key again"]);
    let terms = world.terms();
    assert!(terms.is_sorted_by(|a, b| a.0 < b.0) && terms[0].1 == terms[2].1, "{terms:?}");
}

pub(crate) fn doctor_examines_the_server(mut server: impl Server) {
    let world = world(&server);
    let examined = run(&world, &["doctor"]).finish().code(0);
    assert!(!examined.stdout.contains("hunter2") && examined.stderr.is_empty(), "{examined:?}");
    let has = |word: &str, check: &str| {
        examined.stdout.lines().any(|line| line.starts_with(&format!("{word:7}  {check:8}  ")))
    };
    for check in ["store", "open", "server", "rights", "clock", "hand-off", "latency"] {
        assert!(has("ok", check), "{check}: {examined:?}");
    }
    for part in ["named by --store-file", "a key was acquired, renewed and released", "pushed to the waiter within"] {
        assert!(examined.stdout.contains(part), "no `{part}` in {examined:?}");
    }
    let listed = run(&world, &["ls", "--json"]).finish().ok();
    assert!(!listed.contains(r#""key""#), "nothing is left: {listed}");
    world.write_store_file("url", &server.url("wrong-one"));
    let refused = run(&world, &["doctor"]).finish().code(77);
    assert!(refused.stdout.contains("\nfailed   open ") && !refused.stdout.contains("wrong-one"), "{refused:?}");
    server.kill();
    let gone = run(&world, &["doctor", "--json"]).finish().code(69);
    assert!(gone.stdout.contains(r#"{"check":"open","outcome":"failed","#), "{gone:?}");
}

pub(crate) fn script_holds_key_until_its_release(server: impl Server) {
    let world = world(&server);
    let me = std::process::id().to_string();
    for lasts in [["--ttl", "1h"], ["--pid", &me]] {
        let acquire = [&["acquire", "k", "-n", "--token-file", "token"], &lasts[..]].concat();
        run(&world, &acquire).finish().ok();
        run(&world, &["run", "-n", "k", "--", "true"]).finish().code(75);
        let extended = run(&world, &["extend", "--ttl", "2h", "--token-file", "token"]).finish();
        extended.code(if lasts[0] == "--ttl" { 0 } else { 64 });
        for answer in ["true", "false"] {
            let json = run(&world, &["release", "--json", "-q", "--token-file", "token"]).finish().ok();
            assert!(json.contains(answer), "{json}");
        }
        run(&world, &["run", "-n", "k", "--", "true"]).finish().code(0).silent();
    }
    let script = r#"eval "$($S acquire k --export)"; $S run k -qn -- true; echo $?"#;
    let busy = world.script("bash", script).env("STANCHION_STORE_FILE", world.path("url")).finish().ok();
    assert_eq!(busy, "75\n");
    world.until_nothing_runs();
    run(&world, &["run", "-n", "k", "--", "true"]).finish().code(0).silent();
}

/// Makes a test of each function above, on the server that `$start` starts.
#[macro_export]
macro_rules! on_a_server {
    ($start:expr) => {
        on_a_server! { $start =>
            commands_run_alone_with_rising_fences,
            busy_limits_and_looking,
            passwords_reach_no_child_and_no_message,
            command_ends_before_another_gets_the_key,
            killed_wrapper_takes_its_child_along,
            stopped_leader_queues_again,
            doctor_examines_the_server,
            script_holds_key_until_its_release,
        }
    };
    ($start:expr => $($case:ident),* $(,)?) => { $(
        #[test]
        fn $case() {
            $crate::on_a_server::$case($start());
        }
    )* };
}
