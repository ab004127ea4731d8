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
    one_command_at_a_time_with_rising_fences,
    busy_limits_and_looking,
    a_command_ends_when_its_server_stays_away_and_before_another_may_have_the_key,
    after_the_wrapper_is_killed_its_child_dies_and_the_key_is_free_again,
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
