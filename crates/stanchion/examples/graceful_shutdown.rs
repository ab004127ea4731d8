//! Ends a long job in good order when its process is told to end.
//!
//! SIGTERM drains every handle of the process. The job notices that at its next heartbeat, saves its state and releases
//! the lock.
//!
//! ```sh
//! cargo run -p stanchion --example graceful_shutdown
//! ```

#![allow(clippy::print_stdout, reason = "an example prints")]

use std::error::Error;
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use stanchion::{ErrorKind, Locks};

/// Drains this process at the first SIGTERM or SIGINT, and ends it at the second.
fn drain_on_signals() -> std::io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let mut signals = signals.forever();
        if let Some(signal) = signals.next() {
            stanchion::drain(if signal == SIGTERM { "SIGTERM" } else { "SIGINT" });
        }
        if let Some(signal) = signals.next() {
            std::process::exit(128 + signal);
        }
    })?;
    Ok(())
}

/// Imports batch after batch. Returns the number of batches and the reason why it stopped.
async fn import(locks: &Locks) -> Result<(u32, stanchion::Error), Box<dyn Error>> {
    // If the job hangs, the key is free half a minute after its last heartbeat, although the process lives.
    let guard = locks.lock("import").heartbeat_within(Duration::from_secs(30)).await?;
    let mut done = 0;
    let why = loop {
        // A real job writes one batch here, together with the fence. A hot loop may call `guard.heartbeat()?` for each row.
        done += 1;
        println!("batch {done} is imported under fence {}", guard.fence());
        if done == 3 {
            // This stands for somebody who deploys a new version.
            kill_process(getpid(), Signal::TERM)?;
        }
        if let Err(why) = guard.sleep(Duration::from_millis(20)).await {
            break why;
        }
    };
    // Draining does not release the lock, so the job has time to finish.
    if guard.is_held() {
        println!("saved the state after batch {done}");
    }
    guard.release().await?;
    Ok((done, why))
}

pub(crate) async fn run() -> Result<(), Box<dyn Error>> {
    drain_on_signals()?;
    let locks = Locks::open("memory:").await?;
    let (done, why) = import(&locks).await?;
    assert_eq!(why.kind(), ErrorKind::Draining);
    println!("stopped after batch {done}: {why}");
    let rejected = locks.lock("import").await.err().ok_or("a draining handle granted a lock")?;
    println!("no new locks: {rejected}");
    locks.close().await?;
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    run().await
}
