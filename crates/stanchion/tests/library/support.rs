//! Provides helpers that several test modules share.

use std::time::{Duration, Instant};

/// Time after which a condition that has not come true fails the test.
const GENEROUS: Duration = Duration::from_secs(120);

/// Waits until a condition is true. Fails the test with `what`, a description of the condition, after 30 seconds.
pub(crate) async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < GENEROUS, "timed out while waiting until {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
