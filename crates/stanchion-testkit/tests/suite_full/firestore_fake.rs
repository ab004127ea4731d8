//! Runs the suite on Firestore's fake, for machines without the emulator. The results of the emulator check the fake.

use stanchion::store::{Firestore, Prefixed};
use stanchion_testkit::{Environment, conformance};

use crate::environments::firestore_fake;

conformance!(direct direct, firestore_fake);

fn in_a_prefix() -> Environment<Prefixed<Firestore>> {
    firestore_fake().prefixed()
}
conformance!(dynamic prefixed, in_a_prefix);
