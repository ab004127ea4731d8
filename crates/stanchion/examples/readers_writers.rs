//! Readers share, a writer is alone, and all stand in one line: a reader that comes after a writer waits for it, so a writer
//! is not kept waiting by readers that keep coming.
//!
//! ```sh
//! cargo run -p stanchion --example readers_writers
//! ```

#![allow(clippy::print_stdout, reason = "it shows what happens")]

use std::error::Error;
use std::future::IntoFuture;

use stanchion::{Event, EventStream, Guard, LockRequest, Locks};
use tokio::task::JoinHandle;

/// Asks in a task of its own, and says when it is its turn.
fn asks(who: &'static str, request: LockRequest) -> JoinHandle<stanchion::Result<Guard>> {
    tokio::spawn(async move {
        let guard = request.into_future().await?;
        println!("{who} is in");
        Ok(guard)
    })
}

/// Waits until one more stands in line.
async fn until_in_line(events: &mut EventStream) -> Result<(), Box<dyn Error>> {
    loop {
        if let Event::Contended { .. } = events.next().await.ok_or("the handle is gone")? {
            return Ok(());
        }
    }
}

pub(crate) async fn run() -> Result<(), Box<dyn Error>> {
    let locks = Locks::open("memory:").await?;
    let first = locks.read("catalogue").await?;
    println!("the first reader is in");
    let second = locks.read("catalogue").await?;
    println!("the second reader is in");

    let mut events = locks.events();
    let writer = asks("the writer", locks.write("catalogue"));
    until_in_line(&mut events).await?;
    let third = asks("the third reader", locks.read("catalogue"));
    let fourth = asks("the fourth reader", locks.read("catalogue"));
    until_in_line(&mut events).await?;
    until_in_line(&mut events).await?;
    println!("the writer and two readers wait");

    first.release().await?;
    second.release().await?;
    let writer = writer.await??;
    println!("beside the writer there are {} holders", locks.inspect("catalogue").await?.holders.len() - 1);
    writer.release().await?;
    let (_third, _fourth) = (third.await??, fourth.await??);
    println!("{} readers are in together", locks.inspect("catalogue").await?.holders.len());
    locks.close().await?;
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    run().await
}
