//! The library's surface, on the stores that need no server.

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
