//! The tool as its users meet it: real processes, real terminals, the embedded store.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "test code")]

mod away;
mod bad_input;
mod bench;
mod common;
mod death;
mod doctor;
mod help;
mod listing;
mod loss;
mod once;
mod run;
mod screen;
mod secrets;
mod signals;
mod terminal;
mod top;
