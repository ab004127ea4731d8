//! A terminal for the tests: a pseudo terminal with a program in it, and its screen.
#![allow(dead_code, clippy::unwrap_used, reason = "test code; each file uses its part of it")]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};

use crate::common::*;
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

/// A terminal with a program in it.
pub(crate) struct Screen {
    keyboard: File,
    pub(crate) shown: Arc<Mutex<String>>,
    child: Child,
}

impl Screen {
    /// Starts a program in a session of its own with a new terminal.
    pub(crate) fn new(world: &World, program: &[&str]) -> Self {
        let keyboard = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&keyboard).unwrap();
        unlockpt(&keyboard).unwrap();
        let name = ptsname(&keyboard, Vec::new()).unwrap();
        let terminal: OwnedFd =
            rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let mut command = Command::new("env");
        command.args(["--default-signal", "setsid", "-c"]).args(program);
        world.prepare(&mut command);
        command.env("S", env!("CARGO_BIN_EXE_stanchion")).env("PS1", "$ ").env("TERM", "dumb").env("HISTFILE", "");
        command.stdin(terminal.try_clone().unwrap()).stdout(terminal.try_clone().unwrap()).stderr(terminal);
        let child = command.spawn().unwrap();
        let keyboard = File::from(keyboard);
        let shown = Arc::new(Mutex::new(String::new()));
        let (mut screen, text) = (keyboard.try_clone().unwrap(), shown.clone());
        std::thread::spawn(move || {
            let mut bytes = [0; 1024];
            while let Ok(count @ 1..) = screen.read(&mut bytes) {
                text.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..count]));
            }
        });
        Self { keyboard, shown, child }
    }

    /// An interactive shell.
    pub(crate) fn shell(world: &World) -> Self {
        let mut screen = Self::new(world, &["bash", "--norc", "--noprofile", "-i"]);
        screen.shows("$ ");
        screen.types("bind 'set enable-bracketed-paste off'; echo shell $((40 + 2))\n");
        screen.shows("shell 42");
        screen
    }

    pub(crate) fn types(&mut self, text: &str) {
        self.keyboard.write_all(text.as_bytes()).unwrap();
    }

    /// Waits for the text, and forgets what was shown up to its end.
    #[track_caller]
    pub(crate) fn shows(&self, text: &str) {
        let end = now().after(LIMIT);
        loop {
            let mut shown = self.shown.lock().unwrap();
            if let Some(at) = shown.find(text) {
                shown.drain(..at + text.len());
                return;
            }
            assert!(now() < end, "no `{text}` in:\n{shown}");
            drop(shown);
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }

    /// Waits until the text is on the screen, which the program draws as a whole.
    #[track_caller]
    pub(crate) fn draws(&self, text: &str) {
        let end = now().after(LIMIT);
        while !self.is_drawn(text) {
            assert!(now() < end, "no `{text}` in:\n{}", self.drawn().join("\n"));
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    pub(crate) fn is_drawn(&self, text: &str) -> bool {
        self.drawn().iter().any(|line| line.contains(text))
    }

    /// Returns the lines of the screen, as a terminal shows them.
    pub(crate) fn drawn(&self) -> Vec<String> {
        drawn(&self.shown.lock().unwrap())
    }

    #[track_caller]
    pub(crate) fn exit(&mut self) -> std::process::ExitStatus {
        until("the end of the program at the terminal", || self.child.try_wait().unwrap().is_some());
        self.child.wait().unwrap()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}

/// Draws the output of a program, as a terminal does: moves of the cursor, and erasing. Other sequences change no text.
fn drawn(output: &str) -> Vec<String> {
    let mut lines: Vec<Vec<char>> = vec![Vec::new()];
    let (mut row, mut column) = (0, 0);
    let mut rest = output.chars();
    while let Some(c) = rest.next() {
        match c {
            '\r' => column = 0,
            '\n' => row += 1,
            '\x1b' if rest.as_str().starts_with('[') => {
                let end = rest.as_str().find(|c: char| c.is_ascii_alphabetic()).unwrap_or(rest.as_str().len() - 1);
                let sequence = rest.as_str()[1..=end].to_owned();
                rest = rest.as_str()[end + 1..].chars();
                let numbers: Vec<usize> =
                    sequence.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect();
                let number = |at: usize| numbers.get(at).copied().unwrap_or(1).saturating_sub(1);
                match sequence.chars().last() {
                    Some('H') => (row, column) = (number(0), number(1)),
                    Some('J') => lines.iter_mut().for_each(Vec::clear),
                    Some('h' | 'l') if sequence.contains("1049") => lines.iter_mut().for_each(Vec::clear),
                    _ => {}
                }
            }
            '\x1b' => drop(rest.next()),
            c => {
                while lines.len() <= row {
                    lines.push(Vec::new());
                }
                while lines[row].len() <= column {
                    lines[row].push(' ');
                }
                lines[row][column] = c;
                column += 1;
            }
        }
    }
    lines.into_iter().map(|line| line.into_iter().collect::<String>().trim_end().to_owned()).collect()
}
