//! A model of stanchion's lock protocol.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

pub mod client;
pub mod config;
pub mod history;
pub mod message;
pub mod model;
pub mod mutant;
pub mod properties;
pub mod run;
pub mod runs;
pub mod settle;
pub mod store;
