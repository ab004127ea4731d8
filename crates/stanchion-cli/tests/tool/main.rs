//! The tool as its users meet it: real processes, real terminals, the embedded store.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "test code")]

mod acquire;
mod acquire_death;
mod acquire_token;
mod away;
mod bad_input;
mod common;
mod death;
mod help;
mod listing;
mod loss;
mod once;
mod run;
mod secrets;
mod signals;
mod terminal;
