//! Tests the embedded store between processes. The tests start this test binary again as the other processes.
#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "tests wait on the real clock, and may panic"
)]
#![cfg(all(feature = "sqlite", target_os = "linux"))]

mod embedded;
#[path = "../library/sqlite_support.rs"]
mod sqlite_support;
mod steps;
