//! What several tests share.

use std::time::{Duration, Instant};

/// How long a condition may take to come true before a test fails.
const GENEROUS: Duration = Duration::from_secs(30);

/// Waits until something is so, generously.
pub(crate) async fn until(what: &str, mut so: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !so().await {
        assert!(start.elapsed() < GENEROUS, "never: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
