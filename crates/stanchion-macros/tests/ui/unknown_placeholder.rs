#![allow(dead_code, unused_variables)]
struct Error;

#[stanchion_macros::locked(key = "file:{ide}", locks = LOCKS)]
async fn work(id: u64, (left, _): (u8, u8)) -> Result<(), Error> {
    Ok(())
}

#[stanchion_macros::locked(key = "file:{id}", locks = LOCKS)]
async fn nothing() -> Result<(), Error> {
    Ok(())
}

fn main() {}
