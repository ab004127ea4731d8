//! Runs the suite on the embedded store as a concrete type, and inside another store.
#![allow(clippy::expect_used, reason = "a test may panic")]

use stanchion::store::{Prefixed, Sqlite};
use stanchion_testkit::cases::cancellation;
use stanchion_testkit::{Environment, block_on, conformance, until};

use crate::environments::sqlite;

conformance!(direct direct, sqlite);

fn in_a_prefix() -> Environment<Prefixed<Sqlite>> {
    sqlite().prefixed()
}
conformance!(dynamic prefixed, in_a_prefix);

/// Sessions of the embedded store are files, so the test counts files.
#[test]
fn dropped_calls_leave_no_session() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("store");
    let sessions = path.join("sessions");
    let environment = Environment::new(move || Sqlite::open(&path).expect("an embedded store"));
    let left = || std::fs::read_dir(&sessions).expect("the folder of sessions").count();
    block_on(async {
        cancellation::dropped_calls_leave_nothing(&environment).await;
        until("no session file is left", async || left() == 0).await;
    });
}
