//! Measures the processor time of idle handles. The test is alone in its binary, because it measures its whole process.
#![cfg(target_os = "linux")]
#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "a test waits on the real clock, and may panic")]

use std::time::Duration;

use stanchion::{Event, Locks};

/// Returns the processor time that this process has used, in hundredths of a second.
fn ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[tokio::test]
async fn holders_and_waiters_sleep() {
    #[cfg_attr(not(feature = "sqlite"), allow(unused_mut, reason = "with the sqlite feature the test adds a handle"))]
    let mut handles = vec![Locks::open("memory:").await.unwrap()];
    #[cfg(feature = "sqlite")]
    let folder = tempfile::tempdir().unwrap();
    #[cfg(feature = "sqlite")]
    handles
        .push(Locks::with_store(stanchion::store::Sqlite::open(folder.path().join("store")).unwrap()).await.unwrap());
    let mut guards = Vec::new();
    for locks in &handles {
        let mut events = locks.events();
        guards.push(locks.lock("k").ttl(Duration::from_secs(60)).await.unwrap());
        guards.push(locks.lock("other").await.unwrap());
        tokio::spawn(locks.lock("k").wait(Duration::from_secs(60)).into_future());
        while !matches!(events.next().await, Some(Event::Contended { .. })) {}
    }
    let before = ticks();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let used = ticks() - before;
    // A spinning thread would use 300 hundredths.
    assert!(used < 60, "idle handles used {used} hundredths of a second in three seconds");
    assert!(guards.iter().all(stanchion::Guard::is_held));
}
