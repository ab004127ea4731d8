//! What happens when a lock is lost under somebody's hands: the signal, a hook, the end of the body, and, for work that does
//! not listen, the end of the process.
//!
//! ```sh
//! cargo run -p stanchion --example on_lost
//! ```

#![allow(clippy::print_stdout, reason = "it shows what happens")]

use std::error::Error;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use stanchion::store::Memory;
use stanchion::{Locks, OnLost};
use tokio::sync::mpsc;

/// Says that this process is the one that does not listen.
const STUBBORN: &str = "STUBBORN";

/// Takes the lock away, as an operator who believes that its holder is dead.
async fn take_away(store: &Memory, key: &str) -> stanchion::Result<()> {
    let operator = Locks::with_store(store.clone()).await?;
    for holder in operator.inspect(key).await?.holders {
        operator.force_release(key, holder.fence, "its holder is dead, I think").await?;
    }
    operator.close().await
}

async fn listens() -> Result<(), Box<dyn Error>> {
    let store = Memory::new();
    let (told, mut hook_was_told) = mpsc::unbounded_channel();
    let hook = OnLost::hook(move |loss| drop(told.send(format!("{} with {:?}: {}", loss.key, loss.fence, loss.cause))));
    let locks = Locks::builder_with_store(store.clone()).on_lost(hook).open().await?;

    // The signal: for code that waits, and for code that knows nothing of guards.
    let guard = locks.lock("ledger").await?;
    let token = guard.cancel_token();
    take_away(&store, "ledger").await?;
    println!("the guard says: {}", guard.lost().await);
    println!("its token is cancelled: {}", token.is_cancelled());
    println!("a check fails: {}", guard.check().err().ok_or("it did not fail")?);
    println!("the release finds: {:?}", guard.release().await?);
    println!("the hook was told of {}", hook_was_told.recv().await.ok_or("no hook")?);

    // A body is dropped at its next await.
    let body = async |_: &stanchion::Guard| {
        println!("the body works");
        let _told = take_away(&store, "report").await;
        std::future::pending::<()>().await;
        println!("the body never comes here");
    };
    println!("the call fails: {}", locks.lock("report").run(body).await.err().ok_or("it did not fail")?);
    locks.close().await?;
    Ok(())
}

/// Work that cannot be stopped: the process ends before somebody else holds the key.
async fn does_not_listen() -> Result<(), Box<dyn Error>> {
    let store = Memory::new();
    let locks = Locks::with_store(store.clone()).await?;
    let policy = OnLost::abort_after(Duration::from_millis(20));
    let _guard = locks.lock("ledger").on_lost(policy).await?;
    take_away(&store, "ledger").await?;
    // A library that does not come back, as it were.
    loop {
        std::thread::park();
    }
}

pub(crate) async fn run() -> Result<(), Box<dyn Error>> {
    if std::env::var_os(STUBBORN).is_some() {
        return does_not_listen().await;
    }
    listens().await?;
    let mut stubborn = Command::new(std::env::current_exe()?);
    stubborn.args(std::env::args_os().skip(1)).env(STUBBORN, "").stdin(Stdio::null());
    let ended = stubborn.output()?;
    println!("a process that does not listen ends by signal {:?}", ended.status.signal());
    let said = String::from_utf8_lossy(&ended.stderr);
    println!("its last words: {}", said.lines().find(|line| line.contains("aborting")).unwrap_or_default());
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    run().await
}
