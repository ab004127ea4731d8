//! Runs a scheduler on one of three processes.
//!
//! The example starts itself three times over one embedded store. It kills each leader, and shows who leads next. With
//! the URL of a server, the processes can run on three machines.
//!
//! ```sh
//! cargo run -p stanchion --example leader_scheduler
//! ```

#![allow(clippy::print_stdout, reason = "an example prints")]
#![allow(clippy::disallowed_methods, reason = "an example waits on the real clock")]

use std::error::Error;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use stanchion::{Leader, Leadership, Locks};

/// Environment variable that makes this process a candidate, and names it.
const NAME: &str = "CANDIDATE_NAME";
const FOLDER: &str = "CANDIDATE_FOLDER";

async fn open(folder: &Path, owner: &str) -> stanchion::Result<Locks> {
    Locks::builder(&format!("sqlite:{}", folder.join("locks").display())).owner(owner).open().await
}

/// Returns the file of the runs: one line with the term and the candidate for each run.
fn log(folder: &Path) -> PathBuf {
    folder.join("runs")
}

/// Runs the due jobs as long as this process leads, and records the term with each run.
async fn schedule(leadership: &Leadership, name: &str, folder: &Path) -> Result<(), Box<dyn Error>> {
    let mut runs = fs::OpenOptions::new().create(true).append(true).open(log(folder))?;
    loop {
        // One write per line, because the process may be killed at any moment.
        runs.write_all(format!("{} {name}\n", leadership.term()).as_bytes())?;
        // If the term ends, `lead` drops this future here, and the process queues again.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Runs one of the three candidates.
async fn stand(name: &str, folder: &Path) -> Result<(), Box<dyn Error>> {
    let locks = open(folder, name).await?;
    let election = locks.elect("scheduler").metadata(format!("process {}", std::process::id()));
    election.lead(async |leadership| schedule(leadership, name, folder).await).await?
}

struct Candidate {
    name: &'static str,
    process: Child,
}

impl Candidate {
    fn start(name: &'static str, folder: &Path) -> std::io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(std::env::args_os().skip(1)).env(NAME, name).env(FOLDER, folder);
        Ok(Self { name, process: command.spawn()? })
    }

    fn kill(&mut self) -> std::io::Result<()> {
        self.process.kill()?;
        self.process.wait().map(drop)
    }
}

impl Drop for Candidate {
    fn drop(&mut self) {
        let _ = self.kill(); // it may have ended already
    }
}

/// Waits until the leader has run a job.
async fn until_it_ran(leader: &Leader, folder: &Path) {
    let line = format!("{} {}\n", leader.term, leader.owner);
    while !fs::read_to_string(log(folder)).is_ok_and(|runs| runs.contains(&line)) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) async fn run() -> Result<(), Box<dyn Error>> {
    if let (Ok(name), Some(folder)) = (std::env::var(NAME), std::env::var_os(FOLDER)) {
        return stand(&name, Path::new(&folder)).await;
    }
    let folder = tempfile::tempdir()?;
    let mut candidates = Vec::new();
    for name in ["one", "two", "three"] {
        candidates.push(Candidate::start(name, folder.path())?);
    }
    let locks = open(folder.path(), "observer").await?;
    let mut leaders = locks.elect("scheduler").observe();
    while !candidates.is_empty() {
        let Some(leader) = leaders.next().await? else { continue };
        let metadata = leader.metadata.as_deref().unwrap_or("no metadata");
        println!("{} leads in term {}: {metadata}", leader.owner, leader.term.get());
        until_it_ran(&leader, folder.path()).await;
        let place = candidates.iter().position(|candidate| candidate.name == leader.owner);
        let mut candidate = candidates.swap_remove(place.ok_or("the leader is no candidate")?);
        candidate.kill()?;
        println!("{} was killed", candidate.name);
    }
    // The resource of a real scheduler would reject a term that is lower than the highest it has seen.
    let runs = fs::read_to_string(log(folder.path()))?;
    println!("the terms of the runs never fall: {}", runs.lines().is_sorted());
    locks.close().await?;
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    run().await
}
