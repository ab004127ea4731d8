//! Runs the suite on the memory store with the real clock, and inside every store that wraps another store.

use stanchion::store::{Faulty, Memory, Observed, Prefixed};
use stanchion_testkit::{Environment, Fixture, conformance};

use crate::environments::MemoryFixture;

fn real_time() -> Environment<Memory> {
    let store = Memory::new();
    Environment::new(move || store.clone())
}
conformance!(dynamic in_real_time, real_time);

fn in_a_prefix() -> Environment<Prefixed<Memory>> {
    MemoryFixture.fresh().prefixed()
}
conformance!(dynamic prefixed, in_a_prefix);

fn in_an_observer() -> Environment<Observed<Memory>> {
    MemoryFixture.fresh().wrapped(|store| Observed::new(store, |_| {}))
}
conformance!(dynamic observed, in_an_observer);

fn without_faults() -> Environment<Faulty<Memory>> {
    MemoryFixture.fresh().wrapped(Faulty::new)
}
conformance!(dynamic faulty, without_faults);
