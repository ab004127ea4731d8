//! The tool on Firestore, in Google's emulator. `./test` runs this where the machine has it.
#![allow(clippy::unwrap_used, reason = "test code")]

use crate::common::*;
use stanchion_testkit::servers::{FirestoreEmulator, firestore_emulator};

struct Emulator {
    url: String,
    running: Option<FirestoreEmulator>,
}

impl crate::on_a_server::Server for Emulator {
    fn url(&self, _password: &str) -> String {
        self.url.clone()
    }
    fn kill(&mut self) {
        self.running = None;
    }
}

fn emulator() -> Emulator {
    let jar = firestore_emulator().expect("this machine has no emulator of Firestore");
    let running = FirestoreEmulator::start(&jar);
    Emulator { url: running.url(), running: Some(running) }
}

on_a_server! { emulator =>
    commands_run_alone_with_rising_fences,
    busy_limits_and_looking,
    command_ends_before_another_gets_the_key,
    killed_wrapper_takes_its_child_along,
}

#[test]
fn what_cannot_be_used_has_its_code() {
    let world = World::new();
    let run = |url: &str| world.stanchion(["run", "-w", "1s", "--store", url, "k", "--", "true"]).finish();
    run("firestore://p?emulator=127.0.0.1:1").code(69).says(&["cannot connect"]);
    run("firestore://p?colour=red").code(64).says(&["the options are `collection` and `emulator`"]);
    run("firestore://").code(64).says(&["firestore://PROJECT"]);
}

#[test]
fn limits_hold_while_the_server_is_away() {
    let world = World::new();
    for away in stanchion_testkit::servers::Away::all() {
        let url = format!("firestore://project?emulator={}", away.address);
        limits_are_kept(away.name, |options| {
            world.stanchion([&["run"], options, &["--store", &url, "k", "--", "true"]].concat())
        });
    }
}
