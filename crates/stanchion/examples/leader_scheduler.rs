//! A scheduler that runs on one of three processes. The example starts itself three times over one embedded store, kills
//! whichever leads, and shows who leads next. With a server's URL the processes may be on three machines.
//!
//! ```sh
//! cargo run -p stanchion --example leader_scheduler
//! ```

#![allow(clippy::print_stdout, reason = "it shows what happens")]
#![allow(clippy::disallowed_methods, reason = "it waits as programs do that use the library")]

use std::error::Error;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use stanchion::{Leader, Leadership, Locks};

/// Says that this process is a candidate, and which.
const NAME: &str = "CANDIDATE_NAME";
const FOLDER: &str = "CANDIDATE_FOLDER";

async fn open(folder: &Path, owner: &str) -> stanchion::Result<Locks> {
    Locks::builder(&format!("sqlite:{}", folder.join("locks").display())).owner(owner).open().await
}

/// What was run, and in which term: a line each.
fn log(folder: &Path) -> PathBuf {
    folder.join("runs")
}

/// Runs what is due, as long as it leads: the term goes with everything that it does.
async fn schedule(leadership: &Leadership, name: &str, folder: &Path) -> Result<(), Box<dyn Error>> {
    let mut runs = fs::OpenOptions::new().create(true).append(true).open(log(folder))?;
    loop {
        // In one piece, since it may be killed at any moment.
        runs.write_all(format!("{} {name}\n", leadership.term()).as_bytes())?;
        // If the term ends meanwhile this future is dropped here, and the process stands in line again.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// One of the three.
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
        let _ended_already = self.kill();
    }
}

/// Waits until the leader has run what is due.
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
    let mut observation = locks.elect("scheduler").observe();
    while !candidates.is_empty() {
        let Some(leader) = observation.next().await? else { continue };
        let says = leader.metadata.as_deref().unwrap_or("nothing");
        println!("{} leads in term {} and says: {says}", leader.owner, leader.term.get());
        until_it_ran(&leader, folder.path()).await;
        let place = candidates.iter().position(|candidate| candidate.name == leader.owner);
        let mut candidate = candidates.swap_remove(place.ok_or("somebody else leads")?);
        candidate.kill()?;
        println!("{} was killed", candidate.name);
    }
    // The resource of a real scheduler would refuse a term that is lower than the highest it has seen.
    let runs = fs::read_to_string(log(folder.path()))?;
    println!("the runs are in the order of their terms: {}", runs.lines().is_sorted());
    locks.close().await?;
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    run().await
}
