//! `schema`: prints or applies the schema of a PostgreSQL store.

use crate::exit_code;
use crate::message::{Failure, Verbosity};
use crate::output::print;
use crate::store::StoreChoice;

pub(super) fn execute(apply: bool, store: &StoreChoice, verbosity: Verbosity) -> Result<u8, Failure> {
    let database = store.database()?;
    if apply {
        for warning in store.run(async || database.apply_schema().await)? {
            verbosity.problem(warning);
        }
        verbosity.note("the schema is there");
    } else {
        print(&database.schema_sql())?;
    }
    Ok(exit_code::OK)
}
