//! The memory store, on a virtual clock and on the real one, and inside of every store that is around another.

use stanchion::VirtualClock;
use stanchion::store::{Faulty, Memory, Observed, Prefixed};
use stanchion_testkit::{Environment, Fixture, conformance};

/// On a virtual clock.
struct MemoryFixture;

impl Fixture for MemoryFixture {
    type Store = Memory;

    fn fresh(&self) -> Environment<Memory> {
        let time = VirtualClock::new();
        let store = Memory::with_clock(time.clock());
        Environment::new(move || store.clone()).with_time(time)
    }
}

fn real_time() -> Environment<Memory> {
    let store = Memory::new();
    Environment::new(move || store.clone())
}

conformance!(memory, MemoryFixture);
conformance!(memory_in_real_time, real_time);

fn prefixed() -> Environment<Prefixed<Memory>> {
    MemoryFixture.fresh().prefixed()
}
conformance!(memory_prefixed, prefixed);

fn observed() -> Environment<Observed<Memory>> {
    MemoryFixture.fresh().wrapped(|store| Observed::new(store, |_| {}))
}
conformance!(memory_observed, observed);

fn without_faults() -> Environment<Faulty<Memory>> {
    MemoryFixture.fresh().wrapped(Faulty::new)
}
conformance!(memory_without_faults, without_faults);
