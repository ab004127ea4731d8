#![allow(dead_code, unused_variables)]
struct Error;

#[stanchion_macros::locked(key = "k", locks = LOCKS)]
async fn number() -> u32 {
    1
}

#[stanchion_macros::locked(key = "k", locks = LOCKS)]
async fn nothing() {}

fn main() {}
