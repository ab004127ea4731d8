//! Firestore's fake. A machine without the emulator tests the store like this; the fake is tested by the emulator's results.

use stanchion::store::{Firestore, Prefixed};
use stanchion_testkit::{Environment, conformance};

use crate::environments::firestore_fake;

conformance!(direct direct, firestore_fake);

fn in_a_prefix() -> Environment<Prefixed<Firestore>> {
    firestore_fake().prefixed()
}
conformance!(dynamic prefixed, in_a_prefix);
