//! Writes to PostgreSQL as the holder of a lock, or not at all: the fence check and the write are one transaction.
//!
//! ```sh
//! stanchion schema --apply --store postgres://localhost/app
//! cargo run --example postgres_fence --features postgres -- postgres://localhost/app
//! ```

#![allow(clippy::print_stdout, reason = "an example prints")]

use std::error::Error;

use stanchion::store::Postgres;
use stanchion::{ErrorKind, Fence, Key, Locks};
use tokio_postgres::{Client, NoTls};

/// Table of the daily payouts. The process with the lock makes each of them once.
const TABLE: &str = "CREATE TABLE IF NOT EXISTS payouts (day date PRIMARY KEY, cents bigint NOT NULL)";

async fn pay_out(
    store: &Postgres,
    database: &mut Client,
    key: &Key,
    fence: Fence,
    cents: i64,
) -> Result<(), Box<dyn Error>> {
    let transaction = database.transaction().await?;
    // From this check until the commit, nobody else can get the key.
    store.check_fence(&transaction, key, fence).await?;
    transaction.execute("INSERT INTO payouts VALUES (current_date, $1) ON CONFLICT DO NOTHING", &[&cents]).await?;
    transaction.commit().await?;
    Ok(())
}

/// Pays out once, and shows that a late process writes nothing.
pub(crate) async fn run(url: &str) -> Result<(), Box<dyn Error>> {
    let store = Postgres::from_url(url)?;
    let locks = Locks::with_store(store.clone()).await?;
    let (mut database, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    database.batch_execute(TABLE).await?;

    let guard = locks.lock("payout").await?;
    let (key, fence) = (guard.key().clone(), guard.fence());
    pay_out(&store, &mut database, &key, fence, 4200).await?;
    println!("paid out under fence {fence}");
    guard.release().await?;

    // This stands for a process that slept too long and wakes up now.
    let late = pay_out(&store, &mut database, &key, fence, 9900).await;
    let error = late.err().and_then(|error| error.downcast::<stanchion::Error>().ok());
    let error = error.ok_or("the late payout was not rejected")?;
    assert!(matches!(error.kind(), ErrorKind::Lost(_)), "{error}");
    println!("rejected the late payout: {error}");
    locks.close().await?;
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let url = std::env::args().nth(1).ok_or("name a database: postgres://localhost/app")?;
    run(&url).await
}
