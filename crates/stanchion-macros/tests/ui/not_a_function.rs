#![allow(dead_code, unused_variables)]
struct Error;

#[stanchion_macros::locked(key = "k", locks = LOCKS)]
struct Work;

fn main() {}
