//! Tests failures of stores: lost replies, cut connections, and servers that are killed, frozen, promoted or full.
//!
//! The tests also count the requests that each operation costs. They use real servers, except for Firestore's fake.

mod away;
mod ends;
mod firestore;
mod postgres;
mod redis;
