//! `once`: runs a command at most once per period, for cron on many machines.

use std::time::Duration;

use stanchion::store::Demand;

use crate::arguments::Once;
use crate::execution::{self, Busy, Plan};
use crate::hold::{HoldPlan, Schedule};
use crate::message::{Failure, Verbosity};
use crate::store::StoreChoice;

pub(super) fn execute(once: Once, store: StoreChoice, verbosity: Verbosity) -> Result<u8, Failure> {
    super::check_key(&once.key)?;
    let child = super::child_plan(&once.child, &store)?;
    execution::execute(Plan {
        hold: HoldPlan {
            store,
            key: once.key,
            demand: Demand::MUTEX,
            wait: Some(Duration::ZERO),
            ttl: once.child.ttl,
            lifetime: None,
            max_hold: once.child.max_hold,
            metadata: once.child.metadata,
            once: Some(Schedule { every: once.every, slot: once.slot }),
            owner: super::owner(&child.command),
            describe_wait_after: verbosity.describe_wait_after(),
        },
        child,
        cooldown: None,
        // Cron mails all output, and the user asked for skipped runs.
        busy: Busy { exit_code: once.busy_exit_code, is_a_problem: false },
        verbosity,
    })
}
