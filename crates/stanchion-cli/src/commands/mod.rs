//! One file per command: each turns parsed arguments into a plan, carries it out, and returns the exit code.

mod acquire;
mod bench;
mod completions;
mod doctor;
mod elect;
mod extend;
mod force_release;
mod inspect;
mod ls;
mod man;
mod once;
mod release;
mod run;
mod schema;
mod top;
mod wait;
mod watch;

use std::ffi::OsStr;
use std::path::Path;

use stanchion::store::{Demand, redacted};
use stanchion::{Key, SessionId};

use crate::arguments::{Arguments, Child, Command};
use crate::child::{ChildPlan, OnLost};
use crate::hold::HoldPlan;
use crate::message::{Failure, Verbosity};
use crate::store::StoreChoice;
use crate::{exit_code, store};

/// Carries out the command of the arguments.
pub(crate) fn execute(arguments: Arguments, verbosity: Verbosity) -> Result<u8, Failure> {
    let common = &arguments.common;
    match arguments.command {
        Command::Run(run) => run::execute(run, store::resolve(common)?, verbosity),
        Command::Once(once) => once::execute(once, store::resolve(common)?, verbosity),
        Command::Elect(elect) => elect::execute(elect, store::resolve(common)?, verbosity),
        Command::Wait(wait) => wait::execute(&wait, &store::resolve(common)?, verbosity),
        Command::Acquire(acquire) => acquire::execute(acquire, store::resolve(common)?, verbosity),
        Command::Extend(extend) => extend::execute(&extend, &store::resolve(common)?, verbosity),
        Command::Release(release) => release::execute(&release, &store::resolve(common)?, verbosity),
        Command::Ls(ls) => ls::execute(&ls, &store::resolve(common)?, verbosity),
        Command::Inspect(inspect) => inspect::execute(&inspect, &store::resolve(common)?, verbosity),
        Command::Watch(watch) => watch::execute(&watch, &store::resolve(common)?, verbosity),
        Command::ForceRelease(hold) => force_release::execute(hold, &store::resolve(common)?, verbosity),
        Command::Top(top) => top::execute(&top, &store::resolve(common)?),
        Command::Doctor(doctor) => doctor::execute(&doctor, store::resolve(common), verbosity),
        Command::Bench(bench) => bench::execute(&bench, &store::resolve(common)?, verbosity),
        Command::Schema { apply } => schema::execute(apply, &store::resolve(common)?, verbosity),
        Command::Completions { shell } => completions::execute(shell),
        Command::Man { folder } => man::execute(folder.as_deref()),
    }
}

/// Returns an error for an invalid key, before anything is opened.
fn check_key(key: &str) -> Result<(), Failure> {
    Key::new("", key).map(|_| ()).map_err(Failure::from)
}

/// Returns the keys of the command, each once.
fn keys(child: &Child, store: &StoreChoice) -> Result<Vec<Key>, Failure> {
    let mut keys = Vec::new();
    for name in &child.keys {
        let key = store.key(name)?;
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    if keys.len() > 1 && keys.iter().any(|key| key.name().contains(['\n', '\r'])) {
        // The command gets the keys as lines.
        return Err(Failure::new(exit_code::USAGE, "a key with a line break cannot be one of several keys"));
    }
    Ok(keys)
}

/// Returns the key of a command that takes one.
fn single_key(child: &Child, store: &StoreChoice) -> Result<Key, Failure> {
    let [key]: [Key; 1] = keys(child, store)?
        .try_into()
        .map_err(|_| Failure::new(exit_code::USAGE, "give one key: only `run` takes several"))?;
    Ok(key)
}

/// Returns the plan to hold the keys: with the options of all commands, and without a limit of the wait.
fn hold_plan(
    options: Child,
    keys: Vec<Key>,
    demand: Demand,
    child: &ChildPlan,
    store: StoreChoice,
    verbosity: Verbosity,
) -> HoldPlan {
    HoldPlan {
        store,
        keys,
        demand,
        wait: None,
        ttl: options.ttl,
        lifetime: None,
        max_hold: options.max_hold,
        metadata: options.metadata,
        once: None,
        owner: options.owner.unwrap_or_else(|| owner(&child.command)),
        describe_wait_after: verbosity.describe_wait_after(),
        loss_ends_command: options.on_lost != OnLost::Ignore,
    }
}

/// Returns the plan of the command, or an error if it cannot be executed.
fn child_plan(child: &Child, store: &StoreChoice) -> Result<ChildPlan, Failure> {
    let command = match &child.shell {
        Some(text) => vec!["sh".into(), "-c".into(), text.clone()],
        None => child.command.clone(),
    };
    let Some(program) = command.first().filter(|program| !program.is_empty()) else {
        return Err(Failure::new(exit_code::USAGE, "the command is empty: give a program and its arguments"));
    };
    crate::child::check_program(program)?;
    Ok(ChildPlan {
        command,
        kill_after: child.kill_after,
        on_lost: child.on_lost,
        ready_file: None,
        environment: store.for_children(),
    })
}

/// Returns a key that a command uses for itself. It is new each time, so that no other process uses it.
fn own_key(command: &str) -> Result<String, Failure> {
    Ok(format!("stanchion {command}/{}", SessionId::random()?.to_hex()))
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
