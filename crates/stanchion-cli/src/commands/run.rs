//! `run`: runs a command while holding a key.

use std::time::Duration;

use crate::arguments::Run;
use crate::execution::{self, Busy, Plan};
use crate::hold::HoldPlan;
use crate::message::{Failure, Verbosity};
use crate::store::StoreChoice;

pub(super) fn execute(run: Run, store: StoreChoice, verbosity: Verbosity) -> Result<u8, Failure> {
    super::check_key(&run.key)?;
    let child = super::child_plan(&run.child, &store)?;
    let demand = super::demand(run.shared, run.permits)?;
    execution::execute(Plan {
        hold: HoldPlan {
            store,
            key: run.key,
            demand,
            wait: if run.no_wait { Some(Duration::ZERO) } else { run.wait },
            ttl: run.child.ttl,
            lifetime: None,
            max_hold: run.child.max_hold,
            metadata: run.child.metadata,
            once: None,
            owner: super::owner(&child.command),
            describe_wait_after: verbosity.describe_wait_after(),
        },
        child,
        cooldown: run.cooldown,
        busy: Busy { exit_code: run.busy_exit_code, is_a_problem: true },
        verbosity,
    })
}
