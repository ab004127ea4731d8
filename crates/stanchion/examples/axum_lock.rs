//! Charges each invoice once at a time, however many server processes there are.
//!
//! ```sh
//! cargo run --example axum_lock --features tower -- 127.0.0.1:3000 &
//! curl -i -X POST 127.0.0.1:3000/invoices/42/charge & curl -i -X POST 127.0.0.1:3000/invoices/42/charge
//! ```
//!
//! The server charges one of the two requests. The other one gets `409 Conflict` with a `Retry-After` header.
#![allow(clippy::disallowed_methods, clippy::print_stdout, reason = "an example prints, and its work takes its time")]

use std::time::Duration;

use axum::extract::Path;
use axum::routing::post;
use axum::{Extension, Router};
use stanchion::tower::{HeldLock, LockLayer};
use stanchion::{Fence, Locks};

/// Returns the service, with a lock around its route.
pub(crate) fn app(locks: Locks) -> Router {
    // `/invoices/42/charge` locks `invoice:42`.
    let lock = LockLayer::new(locks, |request| {
        let id = request.uri.path().strip_prefix("/invoices/")?.strip_suffix("/charge")?;
        Some(format!("invoice:{id}"))
    });
    Router::new().route("/invoices/{id}/charge", post(charge).layer(lock))
}

async fn charge(
    Path(id): Path<u64>,
    Extension(fence): Extension<Fence>,
    Extension(held): Extension<HeldLock>,
) -> Result<String, String> {
    // This stands for work that takes a while. If the lock is lost during that time, the layer drops this future.
    tokio::time::sleep(Duration::from_millis(500)).await;
    // Send the fence with every side effect: only a fence check stops a process that was paused after this line.
    held.check().map_err(|error| error.to_string())?;
    Ok(format!("invoice {id} is charged under fence {fence}\n"))
}

#[tokio::main(flavor = "current_thread")]
#[allow(dead_code, reason = "the test of this example has its own main function")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().unwrap_or_else(|| "127.0.0.1:3000".to_owned());
    let locks = Locks::open(arguments.next().as_deref().unwrap_or("memory:")).await?;
    let listener = tokio::net::TcpListener::bind(&address).await?;
    println!("serving on {}", listener.local_addr()?);
    axum::serve(listener, app(locks)).await?;
    Ok(())
}
