//! The tool on stores that need a server.
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "test code")]

#[path = "../tool/common.rs"]
mod common;
#[path = "../tool/screen.rs"]
mod screen;
#[macro_use]
mod on_a_server;
mod firestore;
mod postgres;
mod redis;
mod wrong_servers;
