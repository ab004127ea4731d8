//! Tests the public API of the library on the stores that need no server.
#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "tests wait on the real clock, and may panic"
)]

mod detached;
mod handle;
mod limits;
mod locked;
mod losses;
mod primitives;
mod runtimes;
#[cfg(feature = "sqlite")]
mod sqlite_steps;
#[cfg(feature = "sqlite")]
mod sqlite_support;
mod support;
mod tower;
mod waiting;
