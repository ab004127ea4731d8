//! The embedded store: a folder of its own for each case, a handle of its own for each actor.
#![allow(clippy::expect_used, reason = "a test may panic")]

use stanchion::store::{Prefixed, Sqlite};
use stanchion_testkit::cases::cancellation;
use stanchion_testkit::{Environment, block_on, conformance, until};

fn embedded() -> Environment<Sqlite> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("store");
    Environment::new(move || Sqlite::open(&path).expect("an embedded store")).keeping(folder)
}

conformance!(sqlite, embedded);

fn prefixed() -> Environment<Prefixed<Sqlite>> {
    embedded().prefixed()
}
conformance!(sqlite_prefixed, prefixed);

/// Sessions are files.
#[test]
fn calls_that_are_dropped_leave_no_session() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("store");
    let sessions = path.join("sessions");
    let environment = Environment::new(move || Sqlite::open(&path).expect("an embedded store"));
    let left = || std::fs::read_dir(&sessions).expect("the folder of sessions").count();
    block_on(async {
        cancellation::a_call_that_is_dropped_at_any_await_leaves_nothing(&environment).await;
        until("no file of a session is left", async || left() == 0).await;
    });
}
