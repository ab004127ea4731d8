//! A write that is done as the holder of a lock, or not at all: the check and the write are one transaction.
//!
//! ```sh
//! stanchion schema --apply --store postgres://localhost/app
//! cargo run --example postgres_fence --features postgres -- postgres://localhost/app
//! ```

#![allow(clippy::print_stdout, reason = "it shows what happens")]

use std::error::Error;

use stanchion::store::Postgres;
use stanchion::{ErrorKind, Fence, Key, Locks};
use tokio_postgres::{Client, NoTls};

/// The accounts that are paid out once a day, by whichever process has the lock.
const TABLE: &str = "CREATE TABLE IF NOT EXISTS payouts (day date PRIMARY KEY, cents bigint NOT NULL)";

async fn pay_out(
    store: &Postgres,
    database: &mut Client,
    key: &Key,
    fence: Fence,
    cents: i64,
) -> Result<(), Box<dyn Error>> {
    let transaction = database.transaction().await?;
    // From here to the commit nobody else can get the key.
    store.check_fence(&transaction, key, fence).await?;
    transaction.execute("INSERT INTO payouts VALUES (current_date, $1) ON CONFLICT DO NOTHING", &[&cents]).await?;
    transaction.commit().await?;
    Ok(())
}

/// Pays out once, and shows that whoever comes too late writes nothing.
pub(crate) async fn run(url: &str) -> Result<(), Box<dyn Error>> {
    let store = Postgres::from_url(url)?;
    let locks = Locks::with_store(store.clone()).await?;
    let (mut database, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    database.batch_execute(TABLE).await?;

    let guard = locks.lock("payout").await?;
    let (key, fence) = (guard.key().clone(), guard.fence());
    pay_out(&store, &mut database, &key, fence, 4200).await?;
    println!("paid out with the fence {fence}");
    guard.release().await?;

    // A process that slept too long and woke up now.
    let late = pay_out(&store, &mut database, &key, fence, 9900).await;
    let refused = late.err().and_then(|fault| fault.downcast::<stanchion::Error>().ok()).ok_or("it was not refused")?;
    assert!(matches!(refused.kind(), ErrorKind::Lost(_)), "{refused}");
    println!("refused afterwards: {refused}");
    locks.close().await?;
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let url = std::env::args().nth(1).ok_or("name a database: postgres://localhost/app")?;
    run(&url).await
}
