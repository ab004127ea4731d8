//! Tests of failures: answers lost, connections cut, servers killed, frozen, promoted, full. Also the cost of steps. Real servers,
//! but for Firestore's fake.

mod away;
mod ends;
mod firestore;
mod postgres;
mod redis;
