//! The tool as its users meet it: real processes, real terminals, the embedded store.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "test code")]

mod acquire;
mod acquire_death;
mod acquire_token;
mod away;
mod bad_input;
mod bench;
mod common;
mod death;
mod doctor;
mod elect;
mod help;
mod keys;
mod listing;
mod loss;
mod man_pages;
mod once;
mod run;
mod screen;
mod secrets;
mod signals;
mod terminal;
mod top;
mod wait;
mod wrong_inputs;
