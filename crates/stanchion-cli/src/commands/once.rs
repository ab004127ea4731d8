//! `once`: runs a command at most once per period, for cron on many machines.

use std::time::Duration;

use stanchion::store::Demand;

use crate::arguments::Once;
use crate::execution::{self, Busy, Plan};
use crate::hold::{HoldPlan, Schedule};
use crate::message::{Failure, Verbosity};
use crate::store::StoreChoice;

pub(super) fn execute(once: Once, store: StoreChoice, verbosity: Verbosity) -> Result<u8, Failure> {
    let key = super::single_key(&once.child, &store)?;
    let child = super::child_plan(&once.child, &store)?;
    execution::execute(Plan {
        hold: HoldPlan {
            wait: Some(Duration::ZERO),
            once: Some(Schedule { every: once.every, slot: once.slot }),
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
