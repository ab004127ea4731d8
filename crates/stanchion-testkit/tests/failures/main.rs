//! What goes wrong: answers lost, connections cut, servers killed, frozen, promoted, full. And what steps cost. Real servers,
//! but for Firestore's fake.

mod away;
mod ends;
mod firestore;
mod postgres;
mod redis;
