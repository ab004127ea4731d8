//! Shows the effects of a lost lock: the signal, a hook, the end of the body, and, for work that cannot be
//! stopped, the end of the process.
//!
//! ```sh
//! cargo run -p stanchion --example on_lost
//! ```

#![allow(clippy::print_stdout, reason = "an example prints")]

use std::error::Error;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use stanchion::store::Memory;
use stanchion::{Locks, OnLost};
use tokio::sync::mpsc;

/// Environment variable that makes this process the one whose work cannot be stopped.
const STUBBORN: &str = "STUBBORN";

/// Force-releases the lock, like an operator who believes that its holder is dead.
async fn force_release(store: &Memory, key: &str) -> stanchion::Result<()> {
    let operator = Locks::with_store(store.clone()).await?;
    for holder in operator.inspect(key).await?.holders {
        operator.force_release(key, holder.fence, "its holder seems dead").await?;
    }
    operator.close().await
}

async fn show_signals() -> Result<(), Box<dyn Error>> {
    let store = Memory::new();
    let (losses, mut reported) = mpsc::unbounded_channel();
    let hook = OnLost::hook(move |loss| {
        let _ = losses.send(format!("{} with {:?}: {}", loss.key, loss.fence, loss.cause)); // nobody may listen any more
    });
    let locks = Locks::builder_with_store(store.clone()).on_lost(hook).open().await?;

    // The signal is for code that waits. The token is for code that knows nothing of guards.
    let guard = locks.lock("ledger").await?;
    let token = guard.cancel_token();
    force_release(&store, "ledger").await?;
    println!("the guard is lost: {}", guard.lost().await);
    println!("its token is cancelled: {}", token.is_cancelled());
    println!("its check fails: {}", guard.check().err().ok_or("it did not fail")?);
    println!("its release returns {:?}", guard.release().await?);
    println!("the hook got {}", reported.recv().await.ok_or("the hook was not called")?);

    // A body is dropped at its next await.
    let body = async |_: &stanchion::Guard| {
        println!("the body works");
        let _ = force_release(&store, "report").await; // the next await may drop this body before it returns
        std::future::pending::<()>().await;
        println!("the body never gets here");
    };
    println!("the call fails: {}", locks.lock("report").run(body).await.err().ok_or("it did not fail")?);
    locks.close().await?;
    Ok(())
}

/// Does work that cannot be stopped. The process aborts before another one can get the key.
async fn show_abort() -> Result<(), Box<dyn Error>> {
    let store = Memory::new();
    let locks = Locks::with_store(store.clone()).await?;
    let policy = OnLost::abort_after(Duration::from_millis(20));
    let _guard = locks.lock("ledger").on_lost(policy).await?;
    force_release(&store, "ledger").await?;
    // This stands for a call that never returns.
    loop {
        std::thread::park();
    }
}

pub(crate) async fn run() -> Result<(), Box<dyn Error>> {
    if std::env::var_os(STUBBORN).is_some() {
        return show_abort().await;
    }
    show_signals().await?;
    let mut stubborn = Command::new(std::env::current_exe()?);
    stubborn.args(std::env::args_os().skip(1)).env(STUBBORN, "").stdin(Stdio::null());
    let ended = stubborn.output()?;
    println!("the process whose work cannot be stopped ends by signal {:?}", ended.status.signal());
    let stderr = String::from_utf8_lossy(&ended.stderr);
    println!("its last line: {}", stderr.lines().find(|line| line.contains("aborting")).unwrap_or_default());
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    run().await
}
