//! What is looked at once, before a database is used: whether it can be, and whether it would lose locks.

use std::sync::atomic::Ordering;

use super::connect::SEES_WHAT_IS_NEW;
use super::error::{OTHER_ISOLATION, error, malformed};
use super::rows::column;
use super::{Inner, SCHEMA};
use crate::error::{ErrorKind, Result};
use crate::store::Push;
use crate::token::SessionId;

/// The version of the schema that this program speaks.
const VERSION: i32 = 5;

impl Inner {
    /// Looks once whether the database can be used, and whether it would lose locks.
    pub(super) async fn check(&self, session: SessionId) -> Result<()> {
        let mut is_checked = self.is_checked.lock().await;
        if *is_checked {
            return Ok(());
        }
        let schema = &self.pool.config.schema;
        let statement = format!("SELECT version, id FROM {schema}.version()");
        let meta = match self.pool.ask_for_session(&statement, &[]).await {
            Err(fault) if fault.kind() == ErrorKind::Misconfigured && self.creates_schema.load(Ordering::Relaxed) => {
                self.pool.run_script(&SCHEMA.replace("@schema@", schema)).await?;
                self.pool.ask_for_session(&statement, &[]).await?
            }
            answer => answer?,
        };
        let meta = meta.first().ok_or_else(malformed)?;
        let version: i32 = column(meta, "version")?;
        if version != VERSION {
            let mend = if version > VERSION { "update this program" } else { "run `stanchion schema --apply`" };
            let message = format!("the schema is of version {version}, this program speaks {VERSION}: {mend}");
            return Err(error(ErrorKind::Misconfigured, message));
        }
        if self.pool.is_of_user() {
            let statement = format!("SELECT id, {SEES_WHAT_IS_NEW} AS sees FROM {schema}.version()");
            let theirs = self.pool.ask(&statement, &[]).await?;
            let theirs = theirs.first().ok_or_else(malformed)?;
            // Theirs are not ours to set.
            if !column::<bool>(theirs, "sees")? {
                return Err(error(ErrorKind::Misconfigured, OTHER_ISOLATION));
            }
            if column::<&str>(theirs, "id")? != column::<&str>(meta, "id")? {
                let message = "the connections of the pool reach another database than the URL does";
                return Err(error(ErrorKind::Misconfigured, message));
            }
        }
        let settings = "SELECT current_setting('server_encoding') AS encoding, current_setting('fsync') AS fsync, \
                        current_setting('full_page_writes') AS pages, current_setting('synchronous_commit') AS commit";
        let settings = self.pool.ask_for_session(settings, &[]).await?;
        let settings = settings.first().ok_or_else(malformed)?;
        let setting = |name| column::<String>(settings, name);
        if setting("encoding")? != "UTF8" {
            let message =
                "the database is not in UTF-8: names of keys would not be kept; create it with ENCODING 'UTF8'";
            return Err(error(ErrorKind::Misconfigured, message));
        }
        for (name, what) in [("fsync", "fsync"), ("pages", "full_page_writes"), ("commit", "synchronous_commit")] {
            if setting(name)? == "off" {
                self.streams.tell(
                    session,
                    Push::Warning(format!("{what} is off: a crash of the server may lose grants that were answered")),
                );
            }
        }
        *is_checked = true;
        Ok(())
    }
}
