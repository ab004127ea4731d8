//! Runs the tool on Firestore in Google's emulator. `./test` runs these tests if the machine has an emulator.
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
    let jar = firestore_emulator().expect("this machine has no Firestore emulator");
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
fn unusable_urls_have_their_exit_codes() {
    let world = World::new();
    let run = |url: &str| world.stanchion(["run", "-w", "1s", "--store", url, "k", "--", "true"]).finish();
    run("firestore://p?emulator=127.0.0.1:1").code(69).says(&["cannot connect"]);
    run("firestore://p?colour=red").code(64).says(&["the options are `collection` and `emulator`"]);
    run("firestore://").code(64).says(&["firestore://PROJECT"]);
}

#[test]
fn limits_apply_while_server_is_unavailable() {
    let world = World::new();
    for server in stanchion_testkit::servers::Away::all() {
        let url = format!("firestore://project?emulator={}", server.address);
        limits_are_kept(server.name, |options| {
            world.stanchion([&["run"], options, &["--store", &url, "k", "--", "true"]].concat())
        });
    }
}
