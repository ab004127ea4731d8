#![allow(dead_code, unused_variables)]
struct Error;

#[stanchion_macros::locked(key = "file:{id:?}", locks = LOCKS)]
async fn with_a_format(id: u64) -> Result<(), Error> {
    Ok(())
}

#[stanchion_macros::locked(key = "file:{}", locks = LOCKS)]
async fn empty(id: u64) -> Result<(), Error> {
    Ok(())
}

#[stanchion_macros::locked(key = "file:{id", locks = LOCKS)]
async fn open(id: u64) -> Result<(), Error> {
    Ok(())
}

#[stanchion_macros::locked(key = "file:{id.to_string()}", locks = LOCKS)]
async fn call(id: u64) -> Result<(), Error> {
    Ok(())
}

#[stanchion_macros::locked(key = "", locks = LOCKS)]
async fn no_text() -> Result<(), Error> {
    Ok(())
}

fn main() {}
