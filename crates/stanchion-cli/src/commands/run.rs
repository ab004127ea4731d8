//! `run`: runs a command while holding one or several keys.

use stanchion::store::Demand;

use crate::arguments::Run;
use crate::execution::{self, Busy, Plan};
use crate::hold::HoldPlan;
use crate::message::{Failure, Verbosity};
use crate::store::StoreChoice;

pub(super) fn execute(run: Run, store: StoreChoice, verbosity: Verbosity) -> Result<u8, Failure> {
    let keys = super::keys(&run.child, &store)?;
    let child = super::child_plan(&run.child, &store)?;
    let demand = match (run.shared, run.exclusive, run.permits) {
        (true, _, _) => Demand::READ,
        (_, true, _) => Demand::WRITE,
        (_, _, Some(permits)) => Demand::new(1, permits)?,
        _ => Demand::MUTEX,
    };
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
