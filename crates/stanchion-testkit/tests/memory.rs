//! The memory store, on a virtual clock and on the real one.

use stanchion::VirtualClock;
use stanchion::store::Memory;
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
