#![allow(dead_code, unused_variables)]
struct Error;

#[stanchion_macros::locked(locks = LOCKS, wait = "5s")]
async fn work() -> Result<(), Error> {
    Ok(())
}

fn main() {}
