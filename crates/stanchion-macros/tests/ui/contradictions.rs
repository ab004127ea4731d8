#![allow(dead_code, unused_variables)]
struct Error;

#[stanchion_macros::locked(key = "k", locks = LOCKS, wait = "5s", try)]
async fn waits_and_does_not() -> Result<(), Error> {
    Ok(())
}

#[stanchion_macros::locked(key = "k", locks = LOCKS, read, write)]
async fn reads_and_writes() -> Result<(), Error> {
    Ok(())
}

#[stanchion_macros::locked(key = "k", locks = LOCKS, ttl = "5s", max_hold = "5s")]
async fn ends_twice() -> Result<(), Error> {
    Ok(())
}

#[stanchion_macros::locked(key = "k", locks = LOCKS, key = "j")]
async fn two_keys() -> Result<(), Error> {
    Ok(())
}

#[stanchion_macros::locked(key = "k", locks = LOCKS, wait)]
async fn no_value() -> Result<(), Error> {
    Ok(())
}

fn main() {}
