//! Runs the conformance suite on every store in every other configuration. `./test --full` runs this.

#[path = "../suite/environments.rs"]
mod environments;
mod firestore;
mod firestore_fake;
mod memory;
mod postgres;
mod redis;
mod sqlite;
