//! One file per command: each turns parsed arguments into a plan, carries it out, and returns the exit code.

mod acquire;
mod completions;
mod extend;
mod force_release;
mod inspect;
mod ls;
mod man;
mod once;
mod release;
mod run;
mod schema;
mod watch;

use std::ffi::OsStr;
use std::path::Path;

use stanchion::Key;
use stanchion::store::{Demand, redacted};

use crate::arguments::{Arguments, Child, Command};
use crate::child::ChildPlan;
use crate::message::{Failure, Verbosity};
use crate::store::StoreChoice;
use crate::{exit_code, store};

/// Carries out the command of the arguments.
pub(crate) fn execute(arguments: Arguments, verbosity: Verbosity) -> Result<u8, Failure> {
    let common = &arguments.common;
    match arguments.command {
        Command::Run(run) => run::execute(run, store::resolve(common)?, verbosity),
        Command::Once(once) => once::execute(once, store::resolve(common)?, verbosity),
        Command::Acquire(acquire) => acquire::execute(acquire, store::resolve(common)?, verbosity),
        Command::Extend(extend) => extend::execute(&extend, &store::resolve(common)?, verbosity),
        Command::Release(release) => release::execute(&release, &store::resolve(common)?, verbosity),
        Command::Ls(ls) => ls::execute(&ls, &store::resolve(common)?, verbosity),
        Command::Inspect(inspect) => inspect::execute(&inspect, &store::resolve(common)?),
        Command::Watch(watch) => watch::execute(&watch, &store::resolve(common)?, verbosity),
        Command::ForceRelease(hold) => force_release::execute(&hold, &store::resolve(common)?, verbosity),
        Command::Schema { apply } => schema::execute(apply, &store::resolve(common)?, verbosity),
        Command::Completions { shell } => completions::execute(shell),
        Command::Man { folder } => man::execute(folder.as_deref()),
    }
}

/// Returns an error for an invalid key, before anything is opened.
fn check_key(key: &str) -> Result<(), Failure> {
    Key::new("", key).map(|_| ()).map_err(Failure::from)
}

/// Returns the plan of the command, or an error if it cannot be executed.
fn child_plan(child: &Child, store: &StoreChoice) -> Result<ChildPlan, Failure> {
    let command = match &child.shell {
        Some(text) => vec!["sh".into(), "-c".into(), text.clone()],
        None => child.command.clone(),
    };
    let Some(program) = command.first().filter(|program| !program.is_empty()) else {
        return Err(Failure::new(
            exit_code::USAGE,
            "the command is empty: give a program and its arguments after `--`",
        ));
    };
    crate::child::check_program(program)?;
    Ok(ChildPlan { command, kill_after: child.kill_after, store: store.for_children().cloned() })
}

/// Returns the share of the key that these options ask for.
fn demand(shared: bool, permits: Option<u32>) -> Result<Demand, Failure> {
    match (shared, permits) {
        (true, _) => Ok(Demand::READ),
        (false, Some(permits)) => Ok(Demand::new(1, permits)?),
        (false, None) => Ok(Demand::MUTEX),
    }
}

/// Returns the label of this process that others see: the name of its command, the machine and the process id. The arguments
/// are not in it, because they may be secret.
fn owner(command: &[std::ffi::OsString]) -> String {
    let program = command.first().map(|program| program.to_string_lossy()).unwrap_or_default();
    // A URL in the place of the command must not get into the store.
    let program = redacted(&program);
    let program = Path::new(&*program).file_name().map(OsStr::to_string_lossy).unwrap_or_default();
    label(&program, std::process::id())
}

/// Returns the label of a process.
fn label(program: &str, id: u32) -> String {
    let program: String = program.chars().take(30).collect();
    let host = rustix::system::uname().nodename().to_string_lossy().chars().take(60).collect::<String>();
    let label = format!("{program}@{host}/{id}");
    // At most 128 bytes: the characters may have up to four each.
    if label.len() <= 128 { label } else { format!("{}/{id}", env!("CARGO_BIN_NAME")) }
}
