//! Runs the whole suite on Firestore in Google's emulator. `./test --full` runs it if the machine has an emulator.

mod times;

use stanchion::store::Firestore;
use stanchion_testkit::servers::FirestoreEmulator;
use stanchion_testkit::{Environment, conformance};

/// Returns an environment with a new project in the shared emulator.
fn emulator() -> Environment<Firestore> {
    let emulator = FirestoreEmulator::shared().expect("this machine has no Firestore emulator");
    let url = emulator.url();
    Environment::new(move || Firestore::from_url(&url).unwrap())
}
conformance!(dynamic suite, emulator);
