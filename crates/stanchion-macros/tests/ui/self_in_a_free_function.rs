#![allow(dead_code, unused_variables)]
struct Error;

#[stanchion_macros::locked(key = "file:{self.name}", locks = LOCKS)]
async fn in_the_key() -> Result<(), Error> {
    Ok(())
}

#[stanchion_macros::locked(key = "k", locks = self.locks)]
async fn in_the_handle() -> Result<(), Error> {
    Ok(())
}

fn main() {}
