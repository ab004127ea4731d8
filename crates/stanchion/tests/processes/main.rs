//! The embedded store between processes. The other processes are this test binary again.
#![cfg(all(feature = "sqlite", target_os = "linux"))]

mod embedded;
#[path = "../library/sqlite_support.rs"]
mod sqlite_support;
mod steps;
