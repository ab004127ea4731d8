//! `acquire`: obtains a key and returns while it stays held.

use std::time::Duration;

use serde::Serialize;
use stanchion::Clock;

use crate::arguments::Acquire;
use crate::background::{self, Obtained};
use crate::hold::HoldPlan;
use crate::message::{Failure, Verbosity, quoted_key};
use crate::output::{Printed, for_people, json_line, print};
use crate::process::Process;
use crate::store::StoreChoice;
use crate::token::{self, TokenFile};
use crate::{environment, exit_code};

pub(super) fn execute(acquire: Acquire, store: StoreChoice, verbosity: Verbosity) -> Result<u8, Failure> {
    let is_export = acquire.export;
    let done = obtain(acquire, store, verbosity);
    if let Err(failure) = &done
        && is_export
    {
        // `eval` returns this code: a command substitution that fails makes no difference to it.
        print(&format!("(exit {})\n", failure.code))?;
    }
    done.map(|()| exit_code::OK)
}

fn obtain(acquire: Acquire, store: StoreChoice, verbosity: Verbosity) -> Result<(), Failure> {
    let key = store.key(&acquire.key)?;
    let demand = super::demand(acquire.shared, acquire.permits)?;
    let process = match (acquire.pid, acquire.ttl) {
        (Some(id), _) => Some(Process::open(id)?),
        // While it waits, the key is not for a caller that has ended.
        (None, Some(_)) => Process::caller()?,
        (None, None) => Some(Process::caller()?.ok_or_else(no_caller)?),
    };
    let process_id = process.as_ref().map_or_else(std::process::id, Process::id);
    let owner = process.as_ref().map_or_else(|| env!("CARGO_BIN_NAME").to_owned(), Process::name);
    let file = acquire.token_file.as_deref().map(TokenFile::open).transpose()?;
    verbosity.note(format_args!("store: {}", store.shown()));
    let plan = HoldPlan {
        store,
        keys: vec![key],
        demand,
        wait: if acquire.no_wait { Some(Duration::ZERO) } else { acquire.wait },
        ttl: None,
        lifetime: acquire.ttl,
        max_hold: None,
        metadata: acquire.metadata,
        once: None,
        owner: super::label(&owner, process_id),
        describe_wait_after: verbosity.describe_wait_after(),
        loss_ends_command: false,
    };
    let started = Clock::system().now();
    let (obtained, holder) = background::start(&plan, process, verbosity)?;
    let waited = for_people(Clock::system().now().since(started));
    let token = token::text(&obtained.token, &plan.store);
    let printed_token = file.is_none().then_some(token.as_str());
    let text = if acquire.json {
        json_line(&AcquireRecord {
            key: &obtained.key,
            token: printed_token,
            fence: obtained.fence,
            pid: acquire.ttl.is_none().then_some(process_id),
            ttl_ms: acquire.ttl.map(|ttl| ttl.as_millis()),
        })?
    } else if acquire.export {
        exports(&obtained, printed_token)
    } else {
        printed_token.map(|token| format!("{token}\n")).unwrap_or_default() + &format!("{}\n", obtained.fence)
    };
    if let Some(file) = file {
        file.write(&token)?;
    }
    if print(&text)? == Printed::NobodyReads {
        return Err(Failure::new(exit_code::INTERNAL, "nobody read the token, so the key was released"));
    }
    holder.confirm()?;
    let (key, fence) = (quoted_key(&obtained.key), obtained.fence);
    let until = match acquire.ttl {
        Some(ttl) => format!("for {}", for_people(ttl)),
        None => format!("until process {process_id} ends"),
    };
    verbosity.note(format_args!("key `{key}` obtained after {waited}, fence {fence}; held {until}"));
    Ok(())
}

fn no_caller() -> Failure {
    let message = "it cannot be told which process called stanchion: name the process that the key is for (--pid PID), \
                   or give the hold a lifetime (--ttl DUR)";
    Failure::new(exit_code::USAGE, message)
}

/// The object that `--json` prints.
#[derive(Serialize)]
struct AcquireRecord<'a> {
    key: &'a str,
    /// Absent if it is in a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<&'a str>,
    fence: u64,
    pid: Option<u32>,
    ttl_ms: Option<u128>,
}

/// Returns the line for `eval`.
fn exports(obtained: &Obtained, token: Option<&str>) -> String {
    let quoted = |text: &str| format!("'{}'", text.replace('\'', r"'\''"));
    let mut line = format!("export {}={}", environment::KEY, quoted(&obtained.key));
    if let Some(token) = token {
        line += &format!("; export {}={}", environment::TOKEN, quoted(token));
    }
    line + &format!("; export {}={}\n", environment::FENCE, obtained.fence)
}
