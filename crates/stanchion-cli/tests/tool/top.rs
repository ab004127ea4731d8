//! Tests `top` in a terminal.
#![allow(clippy::unwrap_used, reason = "test code")]

use crate::common::*;
use crate::screen::Screen;
use rustix::process::Signal;

/// A terminal in which `top` runs. The shell around it then reports its exit code and whether the terminal is as before.
fn top(world: &World) -> Screen {
    let after = "echo \"code $?\"; stty -a | tr ';' '\\n' | grep -o '[-]*icanon'";
    Screen::new(world, &["sh", "-c", &format!("stty rows 24 cols 120; $S top; {after}")])
}

/// Waits until the shell has the terminal back, as it was.
#[track_caller]
fn gives_the_terminal_back(screen: &mut Screen, code: i32) {
    screen.draws(&format!("code {code}"));
    screen.draws("icanon");
    assert!(!screen.is_drawn("-icanon") && !screen.is_drawn("WAITING"), "{:?}", screen.drawn());
    let shown = screen.shown.lock().unwrap();
    assert!(shown.rfind("\u{1b}[?25h") > shown.rfind("\u{1b}[?25l"), "the cursor is hidden");
    drop(shown);
    screen.exit();
}

fn hold(world: &World, key: &str, metadata: &str) -> Running {
    let script = format!("touch $D/{key}; exec sleep 600");
    let holder = world.stanchion(["run", key, "--metadata", metadata, "-c", &script]).start();
    world.until_file(key);
    holder
}

#[test]
fn top_lists_the_longest_queue_first() {
    let world = World::new();
    let _old = hold(&world, "aged", "x");
    let holder = hold(&world, "busy", "a\u{1b}[2Jb");
    let waiter = world.stanchion(["run", "busy", "--", "true"]).start();
    world.until_waiting("busy", 1);
    let mut screen = top(&world);
    screen.draws("keys 2   holds 2   waiters 1");
    let lines = screen.drawn();
    let row = |key: &str| lines.iter().position(|line| line.starts_with(key)).unwrap();
    assert!(row("busy  ") < row("aged  "), "{lines:?}");
    let busy = &lines[row("busy  ")];
    assert!(busy.contains("held") && busy.contains(&format!("/{}", holder.pid())), "{busy}");
    screen.draws(r"metadata a\u{1b}[2Jb");
    screen.draws("waiter 1  true@");
    // The next look shows the change.
    waiter.send(Signal::TERM);
    screen.draws("keys 2   holds 2   waiters 0");
    screen.types("q");
    gives_the_terminal_back(&mut screen, 0);
}

#[test]
fn top_force_releases_the_selected_hold() {
    let world = World::new();
    let [first, second] = ["first", "second"].map(|key| hold(&world, key, "x"));
    let mut screen = top(&world);
    screen.draws("keys 2   holds 2");
    // The oldest is first, and the arrow selects the other one.
    screen.types("\u{1b}[B");
    screen.draws(" second ─");
    screen.types("f");
    screen.draws("key     second");
    screen.types("\r");
    screen.draws("Why?");
    screen.types("wrong deployX\u{7f}");
    screen.draws("reason  wrong deploy_");
    screen.types("\rn");
    screen.draws("nothing was changed");
    assert!(!screen.is_drawn("End this hold now?"));
    screen.types("fwrong deploy\r");
    screen.draws("End this hold now?");
    screen.types("y");
    screen.draws("the hold of key `second` was ended");
    second.finish().code(76).reports(&["wrong deploy"]);
    screen.draws("keys 1   holds 1");
    assert!(is_alive(first.pid()));
    world.until_holding("first", 1);
    screen.types("q");
    gives_the_terminal_back(&mut screen, 0);
}

#[test]
fn signals_restore_the_terminal() {
    let world = World::new();
    let _holder = hold(&world, "k", "x");
    for (signal, code) in [(Signal::TERM, 143), (Signal::HUP, 129), (Signal::INT, 130), (Signal::QUIT, 131)] {
        let mut screen = top(&world);
        screen.draws("keys 1   holds 1");
        let is_top = |pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.ends_with(b"stanchion\0top\0")
        };
        let pid = world.processes().into_iter().find(is_top).unwrap();
        kill(pid, signal);
        gives_the_terminal_back(&mut screen, code);
    }
    let mut screen = top(&world);
    screen.draws("keys 1   holds 1");
    screen.types("\u{3}");
    gives_the_terminal_back(&mut screen, 0);
}

#[test]
fn stopped_top_gives_the_terminal_back() {
    let world = World::new();
    let _holder = hold(&world, "k", "x");
    let mut screen = Screen::shell(&world);
    screen.types("stty rows 24 cols 120; $S top\n");
    screen.draws("keys 1   holds 1");
    screen.types("\u{1a}");
    screen.shows("\u{1b}[?1049l");
    screen.shows("Stopped");
    screen.types("stty -a | tr ';' '\\n' | grep -o '[-]*icanon'\n");
    screen.shows("\nicanon");
    screen.types("fg\n");
    screen.draws("keys 1   holds 1");
    screen.types("q");
    screen.shows("\u{1b}[?1049l");
    screen.types("echo back $((5 + 5))\n");
    screen.shows("back 10");
}

#[test]
fn top_needs_a_terminal_and_a_store() {
    let world = World::new();
    world.stanchion(["top"]).finish().code(64).says(&["`top` needs a terminal"]);
    let mut screen = top(&world);
    screen.draws("no store in `");
    screen.draws("code 78");
    screen.exit();
    assert!(!world.path("state/stanchion").exists());
}

/// Its terminal is closed, as when a connection to a machine breaks. Prints the signal that `top` died of.
const CLOSED_TERMINAL: &str = r#"
import os, pty
pid, terminal = pty.fork()
if pid == 0:
    os.execvp(os.environ["S"], ["stanchion", "top"])
# The alternate screen: it has taken the terminal over.
shown = b""
while b"\x1b[?1049h" not in shown:
    shown += os.read(terminal, 65536)
os.close(terminal)
print(os.waitpid(pid, 0)[1])
"#;

#[test]
fn top_ends_with_its_terminal() {
    let world = World::new();
    let _holder = hold(&world, "k", "x");
    let mut command = std::process::Command::new("python3");
    command.args(["-c", CLOSED_TERMINAL]);
    world.prepare(&mut command);
    command.env("S", env!("CARGO_BIN_EXE_stanchion")).env("TERM", "xterm");
    let output = command.output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), Signal::HUP.as_raw().to_string(), "{output:?}");
}
