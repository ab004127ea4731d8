#![allow(dead_code, unused_variables)]
struct Error;

#[stanchion_macros::locked(key = "k", locks = LOCKS, retries = 5)]
async fn work() -> Result<(), Error> {
    Ok(())
}

fn main() {}
