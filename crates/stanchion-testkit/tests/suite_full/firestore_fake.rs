//! Runs the whole suite on the Firestore fake. This tests the store on machines without the emulator, and the same
//! suite on the emulator tests the fake.

use stanchion::store::{Firestore, Prefixed};
use stanchion_testkit::{Environment, conformance};

use crate::environments::firestore_fake;

conformance!(direct direct, firestore_fake);

fn prefixed_environment() -> Environment<Prefixed<Firestore>> {
    firestore_fake().prefixed()
}
conformance!(dynamic prefixed, prefixed_environment);
