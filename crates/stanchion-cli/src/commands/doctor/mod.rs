//! `doctor`: checks whether the store can be reached, used and trusted.

mod checks;
mod report;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use stanchion::store::{Liveness, Operation};
use stanchion::{Clock, Locks};

use self::checks::STEP_WITHIN;
use self::report::{Measured, Report};
use crate::arguments::Doctor;
use crate::message::{Failure, Verbosity};
use crate::output::measured;
use crate::store::{StoreChoice, close, silent, within};
use crate::{environment, exit_code};

/// Maximum time for opening the store.
const OPEN_WITHIN: Duration = Duration::from_secs(5);

/// The ttl of the doctor's session: it is renewed once a second, and ends soon after a kill.
const SESSION_TTL: Duration = Duration::from_secs(5);

/// Difference of two clocks above which the doctor warns.
const MAX_CLOCK_OFFSET: Duration = Duration::from_secs(2);

/// The checks of an open store, in order.
const CHECKS: [&str; 6] = ["server", "rights", "clock", "hand-off", "latency", "settings"];

pub(super) fn execute(
    doctor: &Doctor,
    store: Result<StoreChoice, Failure>,
    verbosity: Verbosity,
) -> Result<u8, Failure> {
    let mut report = Report::new(doctor.json, doctor.strict, verbosity == Verbosity::Quiet);
    match store {
        Ok(store) => examine(&store, &mut report)?,
        Err(failure) => {
            report.failed("store", &failure)?;
            skip_all(&mut report, "no store is chosen")?;
        }
    }
    Ok(report.exit_code())
}

fn examine(store: &StoreChoice, report: &mut Report) -> Result<(), Failure> {
    let choice = format!("{}, {}", store.shown(), reason(store));
    match store.check_exists() {
        Err(_) if store.is_default() && store.has_folder() => {
            report
                .skipped(&["store"], &format!("{choice}: it does not exist yet, the first `stanchion run` makes it"))?;
            skip_all(report, "there is nothing to check yet")
        }
        Err(failure) => {
            report.failed("store", &Failure::new(failure.code, format!("{choice}: {}", failure.message)))?;
            skip_all(report, "there is no store")
        }
        Ok(()) => {
            report.ok("store", &choice)?;
            store.run(async || Ok(examine_reachable(store, report).await))?
        }
    }
}

/// Returns why this store was chosen.
fn reason(store: &StoreChoice) -> String {
    let Some(named_by) = store.named_by() else {
        return "the default, because no option and no variable names a store".to_owned();
    };
    let is_set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let unused = [environment::STORE, environment::STORE_FILE].into_iter().filter(|name| *name != named_by);
    let unused: String = unused.filter(|name| is_set(name)).map(|name| format!("; {name} has no effect")).collect();
    format!("named by {named_by}{unused}")
}

fn skip_all(report: &mut Report, message: &str) -> Result<(), Failure> {
    report.skipped(&["open"], message)?;
    report.skipped(&CHECKS, message)
}

async fn examine_reachable(store: &StoreChoice, report: &mut Report) -> Result<(), Failure> {
    let owner = super::owner(&["doctor".into()]);
    let started = Clock::system().now();
    let opened = store.open(Some(&owner), Some(SESSION_TTL), Some(OPEN_WITHIN)).await;
    let took = Clock::system().now().since(started);
    let opened = match opened {
        Ok(opened) => opened,
        Err(failure) => {
            report.failed(
                "open",
                &Failure::new(failure.code, format!("{} (after {})", failure.message, measured(took))),
            )?;
            match failure.code {
                exit_code::UNAVAILABLE => report.skipped(&CHECKS[..1], "the store is not open")?,
                // A server that is not fit for locks may say what it is.
                _ => examine_server(store, report).await?,
            }
            return report.skipped(&CHECKS[1..], "the store is not open");
        }
    };
    report.ok_with("open", &format!("in {}", measured(took)), Measured::took(took))?;
    examine_server(store, report).await?;
    let examined = examine_open(store, &opened.locks, &owner, report).await;
    close(&opened, report.exit_code() == exit_code::UNAVAILABLE).await;
    examined
}

async fn examine_server(store: &StoreChoice, report: &mut Report) -> Result<(), Failure> {
    let reason = match within(STEP_WITHIN, store.server()).await {
        Some(Ok(Some(server))) => return report.ok("server", &server),
        Some(Ok(None)) => "this store does not report a version".to_owned(),
        Some(Err(error)) => format!("the server does not report its version: {}", Failure::from(error).message),
        None => silent(STEP_WITHIN).message,
    };
    report.skipped(&["server"], &reason)
}

async fn examine_open(store: &StoreChoice, locks: &Locks, owner: &str, report: &mut Report) -> Result<(), Failure> {
    // One key for all checks: a store may keep the last fence of a key for a while.
    let key = super::own_key("doctor")?;
    let is_embedded = locks.capabilities().liveness == Liveness::Process;
    match checks::rights(locks, &key).await {
        Ok(true) => report.ok("rights", "a key was acquired, renewed and released")?,
        Ok(false) => report.ok("rights", "a key was acquired and released; sessions of this store need no renewal")?,
        Err(failure) => {
            report.failed("rights", &failure)?;
            report.skipped(&["clock", "hand-off", "latency"], "no key can be held")?;
            return examine_settings(locks.warnings(), report);
        }
    }
    if is_embedded {
        report.skipped(&["clock"], "the embedded store uses this machine's clock")?;
    } else {
        match checks::clock_offset(locks, &key).await {
            Ok(offset) => examine_clock(offset, report)?,
            Err(failure) => report.failed("clock", &failure)?,
        }
    }
    let polls = Arc::new(AtomicU64::new(0));
    let counter = polls.clone();
    let count = move |done: &stanchion::store::OperationDone<'_>| {
        if done.operation == Operation::Poll {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    };
    let mut warnings = Vec::new();
    match store.open_observed(owner, OPEN_WITHIN, count).await {
        Ok(waiter) => {
            match checks::hand_off(locks, &waiter, &polls, &key).await {
                Ok(found) => examine_hand_off(found, report)?,
                Err(failure) => report.failed("hand-off", &failure)?,
            }
            warnings = waiter.warnings();
            let _ = within(STEP_WITHIN, waiter.close()).await; // the session then expires by itself
        }
        Err(error) => report.failed("hand-off", &error.into())?,
    }
    match checks::latency(locks, &key).await {
        Ok(step) => {
            let message = format!("{} for an acquire or a release (median)", measured(step));
            report.ok_with("latency", &message, Measured::took(step))?;
        }
        Err(failure) => report.failed("latency", &failure)?,
    }
    warnings.splice(0..0, locks.warnings());
    examine_settings(warnings, report)
}

fn examine_clock(offset: checks::ClockOffset, report: &mut Report) -> Result<(), Failure> {
    let size = Duration::from_micros(offset.micros.unsigned_abs());
    let side = if offset.micros < 0 { "behind" } else { "ahead of" };
    let uncertainty = measured(offset.uncertainty);
    let numbers = Measured::offset(offset.micros);
    if size <= offset.uncertainty {
        return report.ok_with("clock", &format!("the same as this machine's, to {uncertainty}"), numbers);
    }
    let found = format!("the store's is {} {side} this machine's (to {uncertainty})", measured(size));
    if size.saturating_sub(offset.uncertainty) <= MAX_CLOCK_OFFSET {
        return report.ok_with("clock", &found, numbers);
    }
    let advice =
        "locks do not compare clocks, but fences and the times in `ls` follow the store's: synchronise both (NTP)";
    report.warning("clock", &format!("{found}: {advice}"), numbers)
}

fn examine_hand_off(found: checks::HandOff, report: &mut Report) -> Result<(), Failure> {
    let took = measured(found.took);
    if found.is_pushed {
        return report.ok_with("hand-off", &format!("pushed to the waiter within {took}"), Measured::took(found.took));
    }
    let message = format!(
        "the waiter found it by polling, after {took}: notifications do not arrive, and waiting calls get their keys late"
    );
    report.warning("hand-off", &message, Measured::took(found.took))
}

fn examine_settings(warnings: Vec<String>, report: &mut Report) -> Result<(), Failure> {
    if warnings.is_empty() {
        return report.ok("settings", "the store knows of none that may lose locks");
    }
    let mut reported = Vec::new();
    for warning in warnings {
        if !reported.contains(&warning) {
            report.warning("settings", &warning, Measured::default())?;
            reported.push(warning);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_that_differ_by_seconds_are_reported() {
        let code = |millis: i64, uncertainty| {
            let mut strict = Report::new(false, true, true);
            let uncertainty = Duration::from_millis(uncertainty);
            examine_clock(checks::ClockOffset { micros: millis * 1_000, uncertainty }, &mut strict).unwrap();
            strict.exit_code()
        };
        for (millis, uncertainty) in [(0, 0), (1_900, 0), (-1_900, 5), (3_000, 1_500), (-3_000, 4_000)] {
            assert_eq!(code(millis, uncertainty), exit_code::OK, "{millis} to {uncertainty}");
        }
        for (millis, uncertainty) in [(2_100, 5), (-2_100, 5), (i64::MIN / 1_000, 0)] {
            assert_eq!(code(millis, uncertainty), exit_code::MISCONFIGURED, "{millis} to {uncertainty}");
        }
    }
}
