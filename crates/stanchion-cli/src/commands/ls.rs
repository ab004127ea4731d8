//! `ls`: the keys that are held, waited for or closed.

use stanchion::store::KeyState;

use crate::arguments::Ls;
use crate::exit_code;
use crate::message::Failure;
use crate::output::{KeyRecord, escape, for_people, json_line, print, table};
use crate::store::StoreChoice;

pub(super) fn execute(ls: &Ls, store: &StoreChoice) -> Result<u8, Failure> {
    let keys = store.ask(async |locks| locks.list(&ls.prefix).await)?;
    let text = if ls.json {
        keys.iter().map(|state| json_line(&KeyRecord::from(state))).collect::<Result<String, _>>()?
    } else if keys.is_empty() {
        String::new()
    } else {
        let rows: Vec<_> = keys.iter().flat_map(rows).collect();
        table(&["KEY", "STATE", "FENCE", "FOR", "WAITING", "OWNER", "METADATA"], &rows)
    };
    print(&text)?;
    Ok(exit_code::OK)
}

/// One row per holder; one for a key without any.
fn rows(state: &KeyState) -> Vec<Vec<String>> {
    let key = escape(state.key.name());
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
            escape(&holder.owner),
            holder.metadata.as_deref().map(escape).unwrap_or_default(),
        ]
    };
    state.holders.iter().map(row).collect()
}
