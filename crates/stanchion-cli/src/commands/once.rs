//! `once`: runs a command at most once per period, for cron on many machines.

use std::time::Duration;

use stanchion::Key;
use stanchion::store::Demand;

use crate::arguments::Once;
use crate::execution::{self, Busy, Plan};
use crate::exit_code;
use crate::hold::{HoldPlan, Schedule};
use crate::message::{Failure, Verbosity, quoted_key};
use crate::store::StoreChoice;

pub(super) fn execute(once: Once, store: StoreChoice, verbosity: Verbosity) -> Result<u8, Failure> {
    let key = super::single_key(&once.child, &store)?;
    if once.forget {
        return forget(&key, &store, verbosity);
    }
    let child = super::child_plan(&once.child, &store)?;
    execution::execute(Plan {
        hold: HoldPlan {
            wait: Some(Duration::ZERO),
            once: Some(Schedule { every: once.every, slot: once.slot, is_forced: once.force }),
            ..super::hold_plan(once.child, vec![key], Demand::MUTEX, &child, store, verbosity)
        },
        child,
        cooldown: None,
        // Cron mails all output, and the user asked for skipped runs.
        busy: Busy { exit_code: once.busy_exit_code, is_a_problem: false },
        runs_again: false,
        verbosity,
    })
}

/// Deletes the record of the last run. Without a record there is nothing to do, which is no error.
fn forget(key: &Key, store: &StoreChoice, verbosity: Verbosity) -> Result<u8, Failure> {
    let was_there = store.ask(async |locks| locks.forget_run(key.name()).await)?;
    let key = quoted_key(key.name());
    verbosity.progress(match was_there {
        true => format!("the last run of key `{key}` is forgotten: the next `once` runs its command"),
        false => format!("no run of key `{key}` is recorded"),
    });
    Ok(exit_code::OK)
}
