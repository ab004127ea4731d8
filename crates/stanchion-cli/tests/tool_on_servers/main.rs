//! The tool on stores that need a server.

#[path = "../tool/common.rs"]
mod common;
#[macro_use]
mod on_a_server;
mod firestore;
mod postgres;
mod redis;
