//! `release`: ends a hold by its token.

use serde::Serialize;
use stanchion::Released;

use crate::arguments::Release;
use crate::exit_code;
use crate::message::{Failure, Verbosity, quoted_key};
use crate::output::{json_line, print};
use crate::store::StoreChoice;
use crate::token::GivenToken;

pub(super) fn execute(release: &Release, store: &StoreChoice, verbosity: Verbosity) -> Result<u8, Failure> {
    let given = GivenToken::find(&release.hold)?;
    let outcome = store.ask(async |locks| locks.release(&given.token, release.cooldown).await)?;
    let released = outcome == Released::Now;
    let name = given.token.key().name();
    let key = quoted_key(name);
    if released {
        verbosity.note(format_args!("key `{key}` released"));
    } else {
        given.check_store(store)?;
        verbosity.problem(format_args!("the token did not hold key `{key}` any more: it was released or lost before"));
    }
    if release.json {
        print(&json_line(&ReleaseRecord { key: name, released })?)?;
    }
    Ok(exit_code::OK)
}

/// The object that `--json` prints.
#[derive(Serialize)]
struct ReleaseRecord<'a> {
    key: &'a str,
    released: bool,
}
