//! At a terminal: an interactive command works as if the shell had started it itself.
#![allow(clippy::unwrap_used, reason = "test code")]

use crate::common::*;
use crate::screen::Screen;
use rustix::process::Signal;

#[test]
fn waits_are_described_on_a_terminal() {
    let world = World::new();
    let script = "touch $D/held; while test ! -e $D/go; do sleep 0.05; done";
    let holder = world.stanchion(["run", "k", "--metadata", "release 7", "-c", script]).start();
    world.until_file("held");
    let mut screen = Screen::new(&world, &["sh", "-c", "$S run k -- echo done"]);
    let owner = format!("held by sh@{}/{}", rustix::system::uname().nodename().to_string_lossy(), holder.pid());
    screen.shows("waiting for key `k`: ");
    screen.shows(&owner);
    screen.shows("(release 7)");
    screen.shows("; next in line");
    std::fs::write(world.path("go"), "").unwrap();
    screen.shows("done");
    assert_eq!(screen.exit().code(), Some(0));
    let mut empty = Screen::new(&world, &["sh", "-c", "$S ls"]);
    empty.shows("no keys in use (store: sqlite:/");
    assert_eq!(empty.exit().code(), Some(0));
}

#[test]
fn force_release_asks_at_a_terminal() {
    let world = World::new();
    let hold = |name: &str, options: &[&str]| {
        let script = format!("touch $D/{name}; exec sleep 600");
        let running = world.stanchion([&["run"], options, &["-c", &script]].concat()).start();
        world.until_file(name);
        running
    };
    let ask = |options: &str| Screen::new(&world, &["sh", "-c", &format!("$S force-release {options}; echo code $?")]);
    let free = ask("k");
    free.shows("nobody holds key `k`");
    free.shows("code 1");
    let holder = hold("held", &["k", "--metadata", "release 7"]);
    let mut declined = ask("k");
    declined.shows("key `k` is held by sh@");
    declined.shows("(release 7) for ");
    declined.shows("End this hold? A command that runs under it is killed. [y/N]");
    declined.types("\n");
    declined.shows("nothing was changed");
    declined.shows("code 1");
    let mut without_reason = ask("k");
    without_reason.shows("[y/N]");
    without_reason.types("y\n");
    without_reason.shows("Reason");
    without_reason.types(" \n");
    without_reason.shows("nothing was changed");
    assert!(is_alive(holder.pid()));
    let mut confirmed = ask("k");
    confirmed.shows("[y/N]");
    confirmed.types("y\n");
    confirmed.shows("Reason");
    confirmed.types("the host is gone\n");
    confirmed.shows("the hold of key `k` with fence ");
    confirmed.shows("code 0");
    holder.finish().code(76).reports(&["the host is gone"]);
    // Of several holds one is chosen.
    let _first = hold("first", &["s", "-s"]);
    let second = hold("second", &["s", "-s"]);
    let mut chosen = ask("s --reason chosen");
    chosen.shows("key `s` is held by");
    chosen.shows("  2  sh@");
    chosen.shows("Number of the hold to end?");
    chosen.types("2\n");
    chosen.shows("code 0");
    second.finish().code(76).reports(&["chosen"]);
    world.until_holding("s", 1);
}

#[test]
fn ls_shortens_long_keys_on_a_terminal() {
    let world = World::new();
    let key = format!("begin/{}/end", "k".repeat(100));
    world.stanchion(["run", &key, "--cooldown", "1h", "--", "true"]).finish().code(0).silent();
    let screen = Screen::new(&world, &["sh", "-c", "stty cols 90; $S ls; echo done"]);
    screen.shows("KEY ");
    screen.shows("begin/kkkkkkkkk…kkkkkkkkkk/end  closed");
    screen.shows("done");
    assert!(world.stanchion(["ls"]).finish().ok().contains(&key));
}

#[test]
fn interactive_command_reads_the_terminal() {
    let world = World::new();
    let mut screen =
        Screen::new(&world, &["sh", "-c", r#"$S run k -- sh -c 'echo name?; read x; echo "hello $x"; exit 4'"#]);
    screen.shows("name?");
    screen.types("world\n");
    screen.shows("hello world");
    assert_eq!(screen.exit().code(), Some(4));
}

#[test]
fn ctrl_c_reaches_the_command() {
    let world = World::new();
    let script = format!("$S run k -c 'trap \"echo caught; exit 3\" INT; echo ready; {FOREVER}'; echo code $?");
    let mut screen = Screen::shell(&world);
    screen.types(&format!("{script}\n"));
    screen.shows("\nready");
    screen.types("\x03");
    screen.shows("caught");
    screen.shows("code 3");
}

#[test]
fn ctrl_c_ends_the_script() {
    let world = World::new();
    std::fs::write(world.path("script"), "$S run k -- sh -c 'echo ready; exec sleep 600'\necho went on\n").unwrap();
    for shell in ["sh", "bash"] {
        let mut screen = Screen::shell(&world);
        screen.types(&format!("{shell} script\n"));
        screen.shows("\nready");
        screen.types("\x03");
        screen.shows("$ ");
        screen.types("echo code $?\n");
        screen.shows("code 130");
        screen.types("echo still $((1 + 1))\n");
        screen.shows("still 2");
        assert!(!screen.shown.lock().unwrap().contains("went on"));
        world.assert_free("k");
    }
}

#[test]
fn ctrl_c_ends_the_wait() {
    let world = World::new();
    let holder = world.stanchion(["run", "k", "--", "sh", "-c", "touch $D/held; exec sleep 600"]).start();
    world.until_file("held");
    let mut screen = Screen::shell(&world);
    // The shell goes by the signal that it died of: the rest of the script is not run.
    screen.types("sh -c '$S run k -- echo ran; echo went on'\n");
    world.until_waiting("k", 1);
    screen.types("\x03");
    screen.shows("$ ");
    screen.types("echo code $?\n");
    screen.shows("code 130");
    assert!(!screen.shown.lock().unwrap().contains("\nwent on"));
    holder.send(Signal::TERM);
    holder.finish().code(143);
}

#[test]
fn ctrl_z_stops_and_fg_goes_on() {
    let world = World::new();
    let mut screen = Screen::shell(&world);
    for _ in 0..2 {
        screen.types("$S run k -- sh -c 'echo $$ > pid; echo ready; exec cat'; echo code $?\n");
        screen.shows("\nready");
        let child = pid_in(&world, "pid");
        screen.types("\x1a");
        screen.shows("Stopped");
        until("a stopped command", || is_stopped(child));
        screen.types("echo free $((3 + 4))\n");
        screen.shows("free 7");
        screen.types("fg\n");
        until("a running command", || !is_stopped(child));
        screen.types("abc\n");
        screen.shows("abc\r\nabc\r\n");
        // Once more, and to its end.
        screen.types("\x1a");
        screen.shows("Stopped");
        screen.types("fg; echo code $?\n");
        until("a running command", || !is_stopped(child));
        screen.types("def\n");
        screen.shows("def\r\ndef\r\n");
        screen.types("\x04");
        screen.shows("code 0");
        std::fs::remove_file(world.path("pid")).unwrap();
    }
}

#[test]
fn background_job_stops_on_read_until_fg() {
    let world = World::new();
    let mut screen = Screen::shell(&world);
    screen.types("$S run k -c 'echo $$ > pid; read x; echo got:$x' &\n");
    let child = pid_in(&world, "pid");
    let (_, wrapper, _) = stat(child).unwrap();
    until("a stopped job", || is_stopped(child) && is_stopped(wrapper));
    // The shell learns of it in its own time.
    until("a job that is shown as stopped", || {
        screen.types("jobs\n");
        std::thread::sleep(std::time::Duration::from_millis(20));
        screen.shown.lock().unwrap().contains("Stopped")
    });
    screen.types("fg\n");
    until("a running command", || !is_stopped(child));
    screen.types("abc\n");
    screen.shows("got:abc");
    screen.types("echo back $((5 + 5))\n");
    screen.shows("back 10");
}

#[test]
fn background_job_leaves_the_terminal_alone() {
    let world = World::new();
    let mut screen = Screen::shell(&world);
    // No loop of short commands: a key that stops a shell in the middle of a vfork stops only half of it.
    screen.types("mkfifo go; $S run k -c 'echo ready; read x < go; touch done'\n");
    screen.shows("\nready");
    screen.types("\x1a");
    screen.shows("Stopped");
    screen.types("bg\n");
    std::fs::write(world.path("go"), "x\n").unwrap();
    world.until_file("done");
    screen.types("wait; echo back $((5 + 5))\n");
    screen.shows("back 10");
    screen.types("read x; echo got:$x\nabc\n");
    screen.shows("got:abc");
}

#[test]
fn pipeline_reader_has_the_terminal() {
    let world = World::new();
    let mut screen = Screen::shell(&world);
    // The reader behind us, as a pager would.
    screen.types("$S run k -- echo data | sh -c 'read a; echo $a then; read b </dev/tty; echo got:$a:$b'\n");
    screen.shows("data then");
    screen.types("abc\n");
    screen.shows("got:data:abc");
    // The command itself, with its output in a pipe.
    screen.types("$S run k -- sh -c 'echo ask >&2; read b; echo answer $b' | tr a-z A-Z\n");
    screen.shows("\nask");
    screen.types("abc\n");
    screen.shows("ANSWER ABC");
    // The command, with its input in a pipe.
    screen.types("echo one | $S run k -- sh -c 'read a; echo $a two; read b </dev/tty; echo got:$a:$b'\n");
    screen.shows("one two");
    screen.types("abc\n");
    screen.shows("got:one:abc");
    screen.types("echo back $((5 + 5))\n");
    screen.shows("back 10");
}

#[test]
fn killed_command_leaves_a_usable_terminal() {
    let world = World::new();
    let mut screen = Screen::shell(&world);
    screen.types("$S run k -c 'stty raw -echo; echo ready; kill -9 $$'; echo code $?\n");
    screen.shows("code 137");
    screen.types("stty -a | tr ';' '\\n' | grep -o '[-]*icanon'\n");
    screen.shows("\nicanon");
}
