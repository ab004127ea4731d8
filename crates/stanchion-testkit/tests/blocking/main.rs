//! Tests the blocking API: on every store, and the parts that do not depend on the store.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[macro_use]
mod cases;
mod servers;

use stanchion::blocking::Locks;
use stanchion::store::{Memory, Sqlite};
use stanchion::{Event, Locks as AsyncLocks};
use stanchion_testkit::servers::FirestoreFake;

blocking_cases!(memory, {
    let store = Memory::new();
    move || Locks::with_store(store.clone()).unwrap()
});

blocking_cases!(sqlite, {
    let folder = tempfile::tempdir().unwrap();
    move || Locks::with_store(Sqlite::open(folder.path().join("store")).unwrap()).unwrap()
});

blocking_cases!(firestore_fake, {
    // The fake creates a new database for each call of `url` and lives as long as this closure.
    let fake = FirestoreFake::start();
    let url = fake.url();
    move || {
        let _ = &fake; // moves the fake into the closure, which keeps it alive
        Locks::open(&url).unwrap()
    }
});

#[test]
fn events_end_with_the_handle() {
    let locks = Locks::open("memory:").unwrap();
    let events = locks.events();
    let listener = std::thread::spawn(move || events.collect::<Vec<_>>());
    let fence = locks.lock("k").run(|guard| guard.fence()).unwrap();
    drop(locks);
    let events = listener.join().unwrap();
    let acquired = events.iter().position(|event| matches!(event, Event::Acquired { fence: f, .. } if *f == fence));
    let released = events.iter().position(|event| matches!(event, Event::Released { fence: f, .. } if *f == fence));
    assert!(acquired.is_some() && acquired < released, "{events:?}");
}

#[test]
fn handle_converts_to_async() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let asynchronous = runtime.block_on(AsyncLocks::builder("memory:").namespace("n").open()).unwrap();
    let blocking = Locks::from(asynchronous.clone());
    assert_eq!(blocking.session(), asynchronous.session());
    let guard = blocking.lock("k").acquire().unwrap().into_async();
    assert!(runtime.block_on(blocking.as_async().is_locked("k")).unwrap());
    runtime.block_on(guard.release()).unwrap();
    assert!(!blocking.is_locked("k").unwrap());
}

#[test]
fn panic_in_the_body_releases() {
    let locks = Locks::open("memory:").unwrap();
    let ended = std::thread::spawn({
        let locks = locks.clone();
        move || locks.lock("k").run(|_| std::panic::resume_unwind(Box::new("on purpose")))
    });
    assert!(ended.join().is_err());
    assert!(locks.lock("k").acquire().unwrap().is_held());
}
