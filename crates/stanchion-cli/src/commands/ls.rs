//! `ls`: lists the keys that are held, waited for or closed, or the runs that `once` recorded.

use stanchion::store::{DamagedEntry, Demand, HolderState, KeyState, Listing};
use stanchion::{Key, Locks, RunRecord};

use crate::arguments::Ls;
use crate::exit_code;
use crate::message::{Failure, Verbosity};
use crate::output::{
    KeyRecord, Printed, RunLine, RunOfKey, cell, escape, for_people, json_line, print, shortened, table, terminal_width,
};
use crate::store::StoreChoice;

/// Maximum number of damaged entries that are named one by one.
const MAX_NAMED: usize = 20;

/// Minimum width of the column of keys at a terminal, which is otherwise a third of the terminal.
const MIN_KEY_WIDTH: usize = 20;

pub(super) fn execute(ls: &Ls, store: &StoreChoice, verbosity: Verbosity) -> Result<u8, Failure> {
    let listed = if ls.runs { list_runs(ls, store)? } else { list_keys(ls, store)? };
    if listed.text.is_empty() && listed.damaged.is_empty() && listed.fault.is_none() {
        let nothing = if ls.runs { "no runs are recorded" } else { "no keys in use" };
        verbosity.progress(format_args!("{nothing} (store: {})", store.shown()));
    }
    let printed = print(&listed.text)?;
    tell_damaged(&listed.damaged, verbosity);
    match listed.fault {
        Some(fault) => {
            let fault = Failure::from(fault);
            let is_empty = listed.text.is_empty() && listed.damaged.is_empty();
            let partial = if is_empty { "" } else { "the listing is not complete: " };
            Err(Failure::new(fault.code, format!("{partial}{}", fault.message)))
        }
        None if listed.damaged.is_empty() || printed == Printed::NobodyReads => Ok(exit_code::OK),
        None => Ok(exit_code::DAMAGED),
    }
}

/// The text to print, with the entries that cannot be read, and the fault before which the listing ended.
struct Listed {
    text: String,
    damaged: Vec<DamagedEntry>,
    fault: Option<stanchion::Error>,
}

fn list_keys(ls: &Ls, store: &StoreChoice) -> Result<Listed, Failure> {
    let (Listing { keys, damaged, .. }, fault) = store.ask(async |locks| Ok(list(locks, &ls.prefix).await))?;
    let text = if ls.json {
        keys.iter().map(|state| json_line(&KeyRecord::from(state))).collect::<Result<_, _>>()?
    } else {
        let rows: Vec<_> = keys.iter().flat_map(rows).collect();
        table_unless_empty(&["KEY", "STATE", "MODE", "FOR", "WAITING", "OWNER", "METADATA", "FENCE"], &rows)
    };
    Ok(Listed { text, damaged, fault })
}

fn list_runs(ls: &Ls, store: &StoreChoice) -> Result<Listed, Failure> {
    let listing = store.ask(async |locks| locks.list_runs(&ls.prefix).await)?;
    let text = if ls.json {
        let lines =
            listing.runs.iter().map(|(key, run)| json_line(&RunOfKey { key: key.name(), run: RunLine::from(run) }));
        lines.collect::<Result<_, _>>()?
    } else {
        let rows: Vec<_> = listing.runs.iter().map(row_of_run).collect();
        table_unless_empty(&["KEY", "LAST RUN", "AGO", "TOOK", "NEXT IN", "SLOT", "OWNER", "FENCE"], &rows)
    };
    Ok(Listed { text, damaged: listing.damaged, fault: None })
}

fn table_unless_empty(head: &[&str], rows: &[Vec<String>]) -> String {
    if rows.is_empty() { String::new() } else { table(head, rows) }
}

fn row_of_run((key, run): &(Key, RunRecord)) -> Vec<String> {
    vec![
        key_cell(key.name()),
        if run.succeeded { "succeeded" } else { "failed" }.into(),
        for_people(run.age),
        for_people(run.took),
        run.closed_still_for().map(for_people).unwrap_or_default(),
        run.slot.map(|slot| slot.to_string()).unwrap_or_default(),
        cell(&run.owner),
        run.fence.get().to_string(),
    ]
}

/// Returns all keys, or the keys before a fault: in an incident some are better than none.
async fn list(locks: &Locks, prefix: &str) -> (Listing, Option<stanchion::Error>) {
    let mut pages: Vec<Listing> = Vec::new();
    loop {
        let cursor = pages.last().and_then(|page| page.next.as_ref());
        match locks.list_page(prefix, cursor).await {
            Ok(page) => {
                let is_last = page.next.is_none();
                pages.push(page);
                if is_last {
                    return (Listing::merge(pages), None);
                }
            }
            Err(fault) => return (Listing::merge(pages), Some(fault)),
        }
    }
}

/// Names entries that cannot be read, on stderr.
pub(super) fn tell_damaged(damaged: &[DamagedEntry], verbosity: Verbosity) {
    for entry in damaged.iter().take(MAX_NAMED) {
        // A key as the user knows it, or the whole name.
        let key = stanchion::Key::from_encoded(&entry.name);
        let name = key.as_ref().map_or(&*entry.name, |key| key.name());
        verbosity.problem(format_args!("damaged entry `{}`: {}", cell(name), escape(&entry.problem)));
    }
    if let Some(more) = damaged.len().checked_sub(MAX_NAMED).filter(|more| *more > 0) {
        verbosity.problem(format_args!("{more} more damaged entries"));
    }
}

/// Returns a key, shortened if it is for a terminal. A program in a pipe gets the whole key.
fn key_cell(name: &str) -> String {
    match terminal_width() {
        Some(width) => shortened(name, (width / 3).max(MIN_KEY_WIDTH)),
        None => escape(name),
    }
}

/// One row per holder; one for a key without any.
fn rows(state: &KeyState) -> Vec<Vec<String>> {
    let key = key_cell(state.key.name());
    let waiting = state.waiters.len().to_string();
    if state.holders.is_empty() {
        let (word, span) = match state.closed_for {
            Some(left) => ("closed", for_people(left)),
            None => ("free", String::new()),
        };
        let fence = state.last_fence.map(|fence| fence.get().to_string()).unwrap_or_default();
        let nothing = String::new;
        return vec![vec![key, word.into(), nothing(), span, waiting, nothing(), nothing(), fence]];
    }
    let row = |(number, holder): (usize, &HolderState)| {
        vec![
            key.clone(),
            if holder.lingers { "lingers" } else { "held" }.into(),
            mode(holder, state),
            for_people(holder.age),
            // The waiters wait for the key, not for this holder.
            if number == 0 { waiting.clone() } else { String::new() },
            cell(&holder.owner),
            holder.metadata.as_deref().map(cell).unwrap_or_default(),
            holder.fence.get().to_string(),
        ]
    };
    state.holders.iter().enumerate().map(row).collect()
}

/// Returns how a holder shares the key: `alone`, `shared`, or the permits in use and their limit, `2/3`.
fn mode(holder: &HolderState, state: &KeyState) -> String {
    match holder.capacity {
        capacity if capacity == holder.units => "alone".into(),
        Demand::MAX => "shared".into(),
        capacity => {
            let used: u64 = state.holders.iter().map(|holder| u64::from(holder.units)).sum();
            format!("{used}/{}", state.capacity().unwrap_or(capacity))
        }
    }
}
