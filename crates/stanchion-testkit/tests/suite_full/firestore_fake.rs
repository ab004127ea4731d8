//! Firestore against the whole suite, in the fake: where a machine has no emulator, the store is tested like this, and the
//! fake is tested by the emulator's results.

use stanchion::store::{Firestore, Prefixed};
use stanchion_testkit::servers::FirestoreFake;
use stanchion_testkit::{Environment, conformance};

fn fake() -> Environment<Firestore> {
    let fake = FirestoreFake::start();
    let url = fake.url();
    Environment::new(move || Firestore::from_url(&url).unwrap()).keeping(fake)
}
conformance!(suite, fake);

fn in_a_prefix() -> Environment<Prefixed<Firestore>> {
    fake().prefixed()
}
conformance!(prefixed, in_a_prefix);
