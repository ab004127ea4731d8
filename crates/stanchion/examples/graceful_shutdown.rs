//! A long job that gives signs of life, and ends in good order when its process is told to: SIGTERM drains every handle of the
//! process, the job hears of it at its next heartbeat, keeps what it has done, and releases.
//!
//! ```sh
//! cargo run -p stanchion --example graceful_shutdown
//! ```

#![allow(clippy::print_stdout, reason = "it shows what happens")]

use std::error::Error;
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use stanchion::{ErrorKind, Locks};

/// From now on a request to end drains this process. A second one ends it at once.
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

/// Imports batch after batch. Tells how many it did before it had to stop, and why it did.
async fn import(locks: &Locks) -> Result<(u32, stanchion::Error), Box<dyn Error>> {
    // Should the job hang, the key is free half a minute after its last sign of life, although the process lives.
    let guard = locks.lock("import").heartbeat_within(Duration::from_secs(30)).await?;
    let mut done = 0;
    let why = loop {
        // One batch, with the fence beside what it writes. A hot loop may call `guard.heartbeat()?` for each row.
        done += 1;
        println!("batch {done} is in, under the fence {}", guard.fence());
        if done == 3 {
            // Here somebody deploys a new version.
            kill_process(getpid(), Signal::TERM)?;
        }
        if let Err(why) = guard.sleep(Duration::from_millis(20)).await {
            break why;
        }
    };
    // Draining takes nothing away: the lock is still held, and there is time to finish.
    if guard.is_held() {
        println!("the state after batch {done} is kept");
    }
    guard.release().await?;
    Ok((done, why))
}

pub(crate) async fn run() -> Result<(), Box<dyn Error>> {
    drain_on_signals()?;
    let locks = Locks::open("memory:").await?;
    let (done, why) = import(&locks).await?;
    assert_eq!(why.kind(), ErrorKind::Draining);
    println!("told to end after batch {done}: {why}");
    let refused = locks.lock("import").await.err().ok_or("it was not refused")?;
    println!("nothing new is begun: {refused}");
    locks.close().await?;
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    run().await
}
