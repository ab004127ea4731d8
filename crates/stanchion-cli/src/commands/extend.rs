//! `extend`: sets the time left of a hold with a lifetime of its own.

use serde::Serialize;
use stanchion::ErrorKind;

use crate::arguments::Extend;
use crate::exit_code;
use crate::message::{Failure, Verbosity, quoted_key};
use crate::output::{for_people, json_line, print};
use crate::store::StoreChoice;
use crate::token::GivenToken;

pub(super) fn execute(extend: &Extend, store: &StoreChoice, verbosity: Verbosity) -> Result<u8, Failure> {
    let given = GivenToken::find(&extend.hold)?;
    let name = given.token.key().name();
    let key = quoted_key(name);
    // The kinds are looked at here: a failure has only the text for people.
    let outcome = store.ask(async |locks| match locks.extend(&given.token, extend.ttl).await {
        Err(error) if matches!(error.kind(), ErrorKind::Lost(_) | ErrorKind::InvalidArgument) => Ok(Err(error.kind())),
        other => other.map(Ok),
    })?;
    match outcome {
        Ok(()) => {}
        Err(ErrorKind::Lost(_)) => {
            given.check_store(store)?;
            let message =
                format!("the token does not hold key `{key}` any more: it was released, lost, or its time was over");
            return Err(Failure::new(exit_code::LOST, message));
        }
        Err(_) => {
            let message = format!(
                "key `{key}` is held as long as its process lives: only a hold of `acquire --ttl` has a time to extend"
            );
            return Err(Failure::new(exit_code::USAGE, message));
        }
    }
    verbosity.note(format_args!("key `{key}` is held for {} from now", for_people(extend.ttl)));
    if extend.json {
        print(&json_line(&ExtendRecord { key: name, ttl_ms: extend.ttl.as_millis() })?)?;
    }
    Ok(exit_code::OK)
}

/// The object that `--json` prints.
#[derive(Serialize)]
struct ExtendRecord<'a> {
    key: &'a str,
    ttl_ms: u128,
}
