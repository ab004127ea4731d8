//! Runs the conformance suite on every store in one configuration. `./test` runs this.

mod environments;

use environments::*;
use stanchion_testkit::conformance;

conformance!(memory, MemoryFixture);
conformance!(dynamic sqlite, sqlite);
conformance!(dynamic redis_7, redis_7);
conformance!(dynamic postgres_15, postgres_15);
conformance!(dynamic firestore_fake, firestore_fake);
