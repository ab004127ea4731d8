//! `run`: runs a command while holding one or several keys.

use crate::arguments::Run;
use crate::execution::{self, Busy, Plan};
use crate::hold::HoldPlan;
use crate::message::{Failure, Verbosity};
use crate::store::StoreChoice;

pub(super) fn execute(run: Run, store: StoreChoice, verbosity: Verbosity) -> Result<u8, Failure> {
    let keys = super::keys(&run.child, &store)?;
    let child = super::child_plan(&run.child, &store)?;
    let demand = super::demand(run.shared, run.permits)?;
    let wait = run.limit.span();
    execution::execute(Plan {
        hold: HoldPlan { wait, ..super::hold_plan(run.child, keys, demand, &child, store, verbosity) },
        child,
        cooldown: run.cooldown,
        busy: Busy { exit_code: run.limit.busy_exit_code, is_a_problem: true },
        runs_again: false,
        verbosity,
    })
}
