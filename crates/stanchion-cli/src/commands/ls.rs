//! `ls`: lists the keys that are held, waited for or closed.

use stanchion::Locks;
use stanchion::store::{DamagedEntry, KeyState, Listing};

use crate::arguments::Ls;
use crate::exit_code;
use crate::message::{Failure, Verbosity};
use crate::output::{KeyRecord, Printed, cell, escape, for_people, json_line, print, table};
use crate::store::StoreChoice;

/// Maximum number of damaged entries that are named one by one.
const MAX_NAMED: usize = 20;

pub(super) fn execute(ls: &Ls, store: &StoreChoice, verbosity: Verbosity) -> Result<u8, Failure> {
    let (listing, fault) = store.ask(async |locks| Ok(list(locks, &ls.prefix).await))?;
    let text = if ls.json {
        listing.keys.iter().map(|state| json_line(&KeyRecord::from(state))).collect::<Result<String, _>>()?
    } else if listing.keys.is_empty() {
        String::new()
    } else {
        let rows: Vec<_> = listing.keys.iter().flat_map(rows).collect();
        table(&["KEY", "STATE", "FENCE", "FOR", "WAITING", "OWNER", "METADATA"], &rows)
    };
    if listing.is_empty() && fault.is_none() {
        verbosity.progress(format_args!("no keys in use (store: {})", store.shown()));
    }
    let printed = print(&text)?;
    tell_damaged(&listing.damaged, verbosity);
    match fault {
        Some(fault) => {
            let fault = Failure::from(fault);
            let partial = if listing.is_empty() { "" } else { "the listing is not complete: " };
            Err(Failure::new(fault.code, format!("{partial}{}", fault.message)))
        }
        None if listing.damaged.is_empty() || printed == Printed::NobodyReads => Ok(exit_code::OK),
        None => Ok(exit_code::DAMAGED),
    }
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

/// One row per holder; one for a key without any.
fn rows(state: &KeyState) -> Vec<Vec<String>> {
    let key = cell(state.key.name());
    let waiting = state.waiters.len().to_string();
    if state.holders.is_empty() {
        let (word, span) = match state.closed_for {
            Some(left) => ("closed", for_people(left)),
            None => ("free", String::new()),
        };
        let fence = state.last_fence.map(|fence| fence.get().to_string()).unwrap_or_default();
        return vec![vec![key, word.into(), fence, span, waiting]];
    }
    let row = |holder: &stanchion::store::HolderState| {
        vec![
            key.clone(),
            "held".into(),
            holder.fence.get().to_string(),
            for_people(holder.age),
            waiting.clone(),
            cell(&holder.owner),
            holder.metadata.as_deref().map(cell).unwrap_or_default(),
        ]
    };
    state.holders.iter().map(row).collect()
}
