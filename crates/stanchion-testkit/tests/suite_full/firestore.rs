//! Runs the suite on Firestore in Google's emulator. `./test --full` runs this if the machine has the emulator.

mod times;

use stanchion::store::Firestore;
use stanchion_testkit::servers::FirestoreEmulator;
use stanchion_testkit::{Environment, conformance};

/// Returns an environment with its own project in an emulator that all cases share.
fn emulator() -> Environment<Firestore> {
    let emulator = FirestoreEmulator::shared().expect("the Firestore emulator is installed");
    let url = emulator.url();
    Environment::new(move || Firestore::from_url(&url).unwrap())
}
conformance!(dynamic suite, emulator);
