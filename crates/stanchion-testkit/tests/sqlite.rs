//! The embedded store: a folder of its own for each case, a handle of its own for each actor.
#![allow(clippy::expect_used, reason = "a test may panic")]

use stanchion::store::Sqlite;
use stanchion_testkit::{Environment, conformance};

fn embedded() -> Environment<Sqlite> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("store");
    Environment::new(move || Sqlite::open(&path).expect("an embedded store")).keeping(folder)
}

conformance!(sqlite, embedded);
