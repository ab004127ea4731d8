//! `force-release`: ends the hold of another process. At a terminal it shows the holds, and asks for what is missing.

use std::io::{BufRead as _, IsTerminal as _, Write as _};

use stanchion::Fence;
use stanchion::store::{ForceReleaseOutcome, HolderState};

use crate::arguments::ForceRelease;
use crate::exit_code;
use crate::message::{Failure, Verbosity, quoted_key};
use crate::output::{cell, escape, for_people};
use crate::store::StoreChoice;

pub(super) fn execute(hold: ForceRelease, store: &StoreChoice, verbosity: Verbosity) -> Result<u8, Failure> {
    super::check_key(&hold.key)?;
    let ForceRelease { key, fence, reason } = hold;
    let chosen = match (fence, reason) {
        (Some(fence), Some(reason)) => Some((fence, reason)),
        (fence, reason) => ask(&key, fence, reason, store)?,
    };
    let Some((fence, reason)) = chosen else { return Ok(exit_code::NOTHING_CHANGED) };
    let outcome =
        store.ask(async |locks| locks.force_release(key.as_str(), Fence::new(fence), reason.as_str()).await)?;
    let key = quoted_key(&key);
    match outcome {
        ForceReleaseOutcome::Released => {
            verbosity.progress(format_args!("the hold of key `{key}` with fence {fence} was ended"));
            Ok(exit_code::OK)
        }
        ForceReleaseOutcome::NoSuchHold { live } => {
            let now = match live.as_slice() {
                [] => "nobody holds it now".to_owned(),
                live => {
                    let fences: Vec<_> = live.iter().map(|fence| fence.get().to_string()).collect();
                    format!("it is held now with fence {}", fences.join(", "))
                }
            };
            verbosity.problem(format_args!("no hold of key `{key}` has fence {fence}; {now}; nothing was changed"));
            Ok(exit_code::NOTHING_CHANGED)
        }
    }
}

/// Shows the holds at a terminal, and asks which one is to end and why. Returns `None` if nothing is to be changed.
fn ask(
    key: &str,
    fence: Option<u64>,
    reason: Option<String>,
    store: &StoreChoice,
) -> Result<Option<(u64, String)>, Failure> {
    if !(std::io::stdin().is_terminal() && std::io::stderr().is_terminal()) {
        let missing = match (fence, &reason) {
            (None, None) => "--fence and --reason are missing",
            (None, Some(_)) => "--fence is missing",
            (Some(_), _) => "--reason is missing",
        };
        let message = format!(
            "{missing}, and there is no terminal to ask at: give --fence F --reason TEXT; \
             `stanchion inspect KEY` shows the fences"
        );
        return Err(Failure::new(exit_code::USAGE, message));
    }
    let holders = store.ask(async |locks| Ok(locks.inspect(key).await?.holders))?;
    let matching = holders.iter().filter(|holder| fence.is_none_or(|fence| holder.fence.get() == fence));
    let holders: Vec<_> = matching.collect();
    let shown = quoted_key(key);
    let fence = match (holders.as_slice(), fence) {
        ([], None) => {
            say(&format!("nobody holds key `{shown}`\n"))?;
            return Ok(None);
        }
        // The release says who holds it now.
        ([], Some(fence)) => Some(fence),
        ([holder], _) => {
            say(&format!("key `{shown}` is held by {}\n", describe(holder)))?;
            let answer = prompt("End this hold? A command that runs under it is killed. [y/N] ")?;
            matches!(answer.to_lowercase().as_str(), "y" | "yes").then(|| holder.fence.get())
        }
        (holders, _) => {
            say(&format!("key `{shown}` is held by\n"))?;
            for (number, holder) in (1..).zip(holders) {
                say(&format!("{number:3}  {}\n", describe(holder)))?;
            }
            let answer = prompt("Number of the hold to end? A command that runs under it is killed. [none] ")?;
            let chosen = answer.parse::<usize>().ok().and_then(|number| holders.get(number.checked_sub(1)?));
            chosen.map(|holder| holder.fence.get())
        }
    };
    let reason = match (fence, reason) {
        (None, _) => None,
        (Some(_), Some(reason)) => Some(reason),
        (Some(_), None) => Some(prompt("Reason (the holder gets to read it): ")?).filter(|reason| !reason.is_empty()),
    };
    let chosen = fence.zip(reason);
    if chosen.is_none() {
        say("nothing was changed\n")?;
    }
    Ok(chosen)
}

fn describe(holder: &HolderState) -> String {
    let metadata = holder.metadata.as_deref().map(|text| format!(" ({})", cell(text))).unwrap_or_default();
    let (owner, age) = (escape(&holder.owner), for_people(holder.age));
    format!("{owner}{metadata} for {age}, fence {}", holder.fence.get())
}

/// Asks a question at the terminal. The end of the input is an empty answer.
fn prompt(question: &str) -> Result<String, Failure> {
    say(question)?;
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).map_err(no_terminal)?;
    Ok(line.trim().to_owned())
}

fn say(text: &str) -> Result<(), Failure> {
    std::io::stderr().lock().write_all(text.as_bytes()).map_err(no_terminal)
}

fn no_terminal(error: std::io::Error) -> Failure {
    Failure::new(exit_code::INTERNAL, format!("the terminal failed: {error}"))
}
