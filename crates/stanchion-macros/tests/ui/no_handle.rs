#![allow(dead_code, unused_variables)]
struct Error;

#[stanchion_macros::locked(key = "k")]
async fn work() -> Result<(), Error> {
    Ok(())
}

fn main() {}
