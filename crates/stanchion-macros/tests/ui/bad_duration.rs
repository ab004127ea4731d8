#![allow(dead_code, unused_variables)]
struct Error;

#[stanchion_macros::locked(key = "k", locks = LOCKS, wait = "five minutes")]
async fn words() -> Result<(), Error> {
    Ok(())
}

#[stanchion_macros::locked(key = "k", locks = LOCKS, cooldown = 5)]
async fn number() -> Result<(), Error> {
    Ok(())
}

fn main() {}
