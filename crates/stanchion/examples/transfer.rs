//! Transfers money between two accounts in both directions at once: a transfer locks both keys or none, cannot
//! deadlock, and has a fence for each account.
//!
//! ```sh
//! cargo run -p stanchion --example transfer
//! ```

#![allow(clippy::print_stdout, reason = "an example prints")]

use std::collections::BTreeMap;
use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};

use stanchion::{Fence, Locks};

/// The protected resource. It keeps the highest fence that it has seen, and rejects lower ones.
#[derive(Clone, Copy)]
struct Account {
    cents: i64,
    fence: Fence,
}

#[derive(Clone)]
struct Bank(Arc<Mutex<BTreeMap<&'static str, Account>>>);

impl Bank {
    fn read(&self, name: &str) -> Option<Account> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied()
    }

    fn write(&self, name: &'static str, cents: i64, fence: Fence) -> Result<(), String> {
        let mut accounts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let account = accounts.entry(name).or_insert(Account { cents: 0, fence });
        if fence < account.fence {
            return Err(format!("{name} has seen fence {}: {fence} is too old", account.fence));
        }
        *account = Account { cents, fence };
        Ok(())
    }
}

/// Moves money. Without the locks, concurrent transfers would overwrite each other's writes.
async fn transfer(
    locks: &Locks,
    bank: &Bank,
    from: &'static str,
    to: &'static str,
    cents: i64,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    // The order of the names does not matter: all callers lock the keys in the same order.
    let guards = locks.lock_all([from, to]).await?;
    let missing = || "there is no such account";
    let (payer, payee) = (bank.read(from).ok_or_else(missing)?, bank.read(to).ok_or_else(missing)?);
    tokio::task::yield_now().await;
    bank.write(from, payer.cents - cents, guards.fence(from).ok_or("not held")?)?;
    bank.write(to, payee.cents + cents, guards.fence(to).ok_or("not held")?)?;
    guards.release().await?;
    Ok(())
}

pub(crate) async fn run() -> Result<(), Box<dyn Error + Send + Sync>> {
    let locks = Locks::open("memory:").await?;
    let bank = Bank(Arc::default());
    for name in ["alice", "bob"] {
        bank.write(name, 10_000, Fence::new(0))?;
    }
    let before = bank.read("alice").map(|account| account.fence);

    let transfers: Vec<_> = (0..40)
        .map(|number| {
            let (locks, bank) = (locks.clone(), bank.clone());
            let (from, to, cents) = if number % 2 == 0 { ("alice", "bob", 100) } else { ("bob", "alice", 70) };
            tokio::spawn(async move { transfer(&locks, &bank, from, to, cents).await })
        })
        .collect();
    for transfer in transfers {
        transfer.await??;
    }

    let (alice, bob) = (bank.read("alice").ok_or("no alice")?, bank.read("bob").ok_or("no bob")?);
    println!("alice has {} cents, bob has {}, together {}", alice.cents, bob.cents, alice.cents + bob.cents);

    // This stands for a process that slept all the time and writes now.
    let rejected = bank.write("alice", 0, before.ok_or("no fence")?).err().ok_or("the old fence was not rejected")?;
    println!("rejected: {rejected}");
    locks.close().await?;
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    run().await
}
