//! Firestore against the whole suite, in Google's emulator. `./test --full` runs this where the machine has it.

mod times;

use stanchion::store::Firestore;
use stanchion_testkit::servers::FirestoreEmulator;
use stanchion_testkit::{Environment, conformance};

/// Fresh data in an emulator that all cases share: a project of its own.
fn emulator() -> Environment<Firestore> {
    let emulator = FirestoreEmulator::shared().expect("this machine has no emulator of Firestore");
    let url = emulator.url();
    Environment::new(move || Firestore::from_url(&url).unwrap())
}
conformance!(dynamic suite, emulator);
