//! Shows readers that share a key, and a writer that holds it alone.
//!
//! All of them wait in one queue. A reader that arrives after a writer waits for it, so a stream of readers cannot keep
//! a writer waiting.
//!
//! ```sh
//! cargo run -p stanchion --example readers_writers
//! ```

#![allow(clippy::print_stdout, reason = "an example prints")]

use std::error::Error;
use std::future::IntoFuture;

use stanchion::{Event, EventStream, Guard, LockRequest, Locks};
use tokio::task::JoinHandle;

/// Awaits a request in a task of its own, and prints a line when it is granted.
fn spawn_request(name: &'static str, request: LockRequest) -> JoinHandle<stanchion::Result<Guard>> {
    tokio::spawn(async move {
        let guard = request.into_future().await?;
        println!("{name} has the key");
        Ok(guard)
    })
}

/// Waits until one more request waits in the queue.
async fn until_queued(events: &mut EventStream) -> Result<(), Box<dyn Error>> {
    loop {
        if let Event::Contended { .. } = events.next().await.ok_or("the handle is gone")? {
            return Ok(());
        }
    }
}

pub(crate) async fn run() -> Result<(), Box<dyn Error>> {
    let locks = Locks::open("memory:").await?;
    let first = locks.read("catalogue").await?;
    println!("the first reader has the key");
    let second = locks.read("catalogue").await?;
    println!("the second reader has the key");

    let mut events = locks.events();
    let writer = spawn_request("the writer", locks.write("catalogue"));
    until_queued(&mut events).await?;
    let third = spawn_request("the third reader", locks.read("catalogue"));
    let fourth = spawn_request("the fourth reader", locks.read("catalogue"));
    until_queued(&mut events).await?;
    until_queued(&mut events).await?;
    println!("the writer and two readers wait");

    first.release().await?;
    second.release().await?;
    let writer = writer.await??;
    println!("while the writer holds the key, holders: {}", locks.inspect("catalogue").await?.holders.len());
    writer.release().await?;
    let (_third, _fourth) = (third.await??, fourth.await??);
    println!("after the writer, readers at the same time: {}", locks.inspect("catalogue").await?.holders.len());
    locks.close().await?;
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    run().await
}
