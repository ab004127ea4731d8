//! `elect`: runs a command while this process leads, again after each election.

use stanchion::store::Demand;

use crate::arguments::Elect;
use crate::child::{OnLost, prepare_ready_file};
use crate::execution::{self, Busy, Plan};
use crate::exit_code;
use crate::message::{Failure, Verbosity};
use crate::store::StoreChoice;

pub(super) fn execute(elect: Elect, store: StoreChoice, verbosity: Verbosity) -> Result<u8, Failure> {
    if elect.child.on_lost == OnLost::Ignore {
        let message = "`--on-lost ignore` would leave two leaders: `elect` takes term or kill";
        return Err(Failure::new(exit_code::USAGE, message));
    }
    let key = super::single_key(&elect.child, &store)?;
    let child = super::child_plan(&elect.child, &store)?;
    if let Some(path) = &elect.ready_file {
        prepare_ready_file(path)?;
    }
    execution::execute(Plan {
        hold: super::hold_plan(elect.child, vec![key], Demand::MUTEX, &child, store, verbosity),
        child: crate::child::ChildPlan { ready_file: elect.ready_file, ..child },
        cooldown: None,
        // A candidate waits without a limit.
        busy: Busy { exit_code: exit_code::NOT_OBTAINED, is_a_problem: true },
        runs_again: true,
        verbosity,
    })
}
