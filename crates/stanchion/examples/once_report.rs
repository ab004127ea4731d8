//! Makes a report once, although it is due on three machines at the same time.
//!
//! ```sh
//! cargo run -p stanchion --example once_report
//! ```

#![allow(clippy::print_stdout, reason = "an example prints")]

use std::error::Error;
use std::time::Duration;

use stanchion::store::Memory;
use stanchion::{Locks, OnceOutcome};

/// The day of the report. It is the same on every machine, even if their clocks differ.
const DAY: u64 = 20_412;

async fn report(machine: &str, locks: &Locks, day: u64) -> Result<(), Box<dyn Error>> {
    // A machine that finds the report being made waits, so that the report exists when this function returns.
    let request = locks.once("report").slot(day).wait_at_most(Duration::from_secs(60));
    let outcome = request
        .run(async |guard| {
            guard.sleep(Duration::from_millis(50)).await?;
            Ok::<_, stanchion::Error>(format!("made under fence {}", guard.fence()))
        })
        .await?;
    match outcome {
        OnceOutcome::Ran(report) => println!("{machine}: day {day} {report}"),
        OnceOutcome::DoneElsewhere { last, .. } => println!("{machine}: day {day} done by {}", last.owner),
        other => println!("{machine}: day {day} {other:?}"),
    }
    Ok(())
}

pub(crate) async fn run() -> Result<(), Box<dyn Error>> {
    // Handles on clones of the memory store behave like processes that share a server.
    let store = Memory::new();
    let open = async |name| Locks::builder_with_store(store.clone()).owner(name).open().await;
    let (one, two, three) = (open("one").await?, open("two").await?, open("three").await?);

    let at_once = tokio::join!(report("one", &one, DAY), report("two", &two, DAY), report("three", &three, DAY));
    at_once.0?;
    at_once.1?;
    at_once.2?;

    // A run that fails does not count, so the next machine makes the report.
    let fails = async |_: &stanchion::OnceGuard| Err::<(), Box<dyn Error>>("the printer is on fire".into());
    let failed = one.once("report").slot(DAY + 1).run(fails).await.err().ok_or("it did not fail")?;
    println!("one: day {} failed: {failed}", DAY + 1);
    report("two", &two, DAY + 1).await?;

    let last = three.last_run("report").await?.ok_or("the store has no record of a run")?;
    println!("the last run was by {} for day {:?}, and took {} ms", last.owner, last.slot, last.took.as_millis());
    for (key, run) in two.list_runs("").await?.runs {
        println!("{key}: {} s ago, by {}", run.age.as_secs(), run.owner);
    }
    // The next caller makes it again.
    assert!(three.forget_run("report").await?, "the store has no record to forget");
    report("three", &three, DAY + 1).await?;
    for locks in [one, two, three] {
        locks.close().await?;
    }
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    run().await
}
