//! Looks once, before a database is used, whether it can be, whether it would lose locks, and whether others could run code in
//! its schema.

use std::sync::atomic::Ordering;

use super::connect::SEES_WHAT_IS_NEW;
use super::error::{OTHER_ISOLATION, error, malformed};
use super::rows::column;
use super::{FOREIGN, Inner};
use crate::error::{ErrorKind, Result};
use crate::store::Push;
use crate::token::SessionId;

/// The version of the schema that this program speaks.
const VERSION: i32 = 6;

/// The oldest server, as the server counts.
const OLDEST_SERVER: i32 = 150_000;

impl Inner {
    /// Looks once whether the database can be used, and whether it would lose locks.
    pub(super) async fn check(&self, session: SessionId) -> Result<()> {
        let mut is_checked = self.is_checked.lock().await;
        if *is_checked {
            return Ok(());
        }
        let warnings = self.check_server().await?;
        // Before anything of the schema is called.
        self.check_schema().await?;
        let schema = &self.pool.config.schema;
        let statement = format!("SELECT version, id FROM {schema}.version()");
        let meta = match self.pool.ask_for_session(&statement, &[]).await {
            Err(fault) if fault.kind() == ErrorKind::Misconfigured && self.creates_schema.load(Ordering::Relaxed) => {
                self.pool.run_script(&self.schema_sql()).await?;
                self.check_schema().await?;
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
        for warning in warnings {
            self.streams.tell(session, Push::Warning(warning));
        }
        *is_checked = true;
        Ok(())
    }

    /// Applies the schema to a database that a handle could be opened on, and returns what it would be warned of.
    pub(super) async fn apply(&self) -> Result<Vec<String>> {
        let warnings = self.check_server().await?;
        self.pool.run_script(&self.schema_sql()).await?;
        // The rights that the database gives to what is new there may be too many.
        self.check_schema().await?;
        Ok(warnings)
    }

    /// Refuses a server that cannot keep locks. Returns warnings of settings that may lose some.
    async fn check_server(&self) -> Result<Vec<String>> {
        let settings = "SELECT pg_catalog.current_setting('server_version_num')::pg_catalog.int4 AS version, \
                        pg_catalog.current_setting('server_version') AS release, \
                        pg_catalog.current_setting('server_encoding') AS encoding, \
                        pg_catalog.current_setting('fsync') AS fsync, \
                        pg_catalog.current_setting('full_page_writes') AS pages, \
                        pg_catalog.current_setting('synchronous_commit') AS commit";
        let settings = self.pool.ask_for_session(settings, &[]).await?;
        let settings = settings.first().ok_or_else(malformed)?;
        let setting = |name| column::<String>(settings, name);
        if column::<i32>(settings, "version")? < OLDEST_SERVER {
            let message = format!("the server is PostgreSQL {}: version 15 or later is needed", setting("release")?);
            return Err(error(ErrorKind::Misconfigured, message));
        }
        if setting("encoding")? != "UTF8" {
            let message =
                "the database is not in UTF-8: names of keys would not be kept; create it with ENCODING 'UTF8'";
            return Err(error(ErrorKind::Misconfigured, message));
        }
        let mut warnings = Vec::new();
        for (name, what) in [("fsync", "fsync"), ("pages", "full_page_writes"), ("commit", "synchronous_commit")] {
            if setting(name)? == "off" {
                warnings.push(format!("{what} is off: a crash of the server may lose grants that were answered"));
            }
        }
        Ok(warnings)
    }

    /// Refuses a schema that others than its owner could run code in. It may be missing.
    async fn check_schema(&self) -> Result<()> {
        let schema = &self.pool.config.schema;
        if self.creates_schema.load(Ordering::Relaxed) {
            let owner = format!(
                "SELECT pg_catalog.pg_get_userbyid(nspowner)::text AS owner FROM pg_catalog.pg_namespace \
                 WHERE oid = pg_catalog.to_regnamespace('{schema}') \
                 AND pg_catalog.pg_get_userbyid(nspowner) <> current_user"
            );
            if let Some(row) = self.pool.ask_for_session(&owner, &[]).await?.first() {
                let owner: &str = column(row, "owner")?;
                let message =
                    format!("the schema belongs to {owner}, and `create_schema` uses only one of this role's own");
                return Err(error(ErrorKind::Misconfigured, message));
            }
        }
        let statement = format!("SELECT wrong FROM ({}) AS foreign_parts LIMIT 3", FOREIGN.replace("@schema@", schema));
        let rows = self.pool.ask_for_session(&statement, &[]).await?;
        let wrong = rows.iter().map(|row| column::<&str>(row, "wrong")).collect::<Result<Vec<_>>>()?;
        if wrong.is_empty() {
            return Ok(());
        }
        let message = format!("another role could run code in the schema: {}", wrong.join("; "));
        Err(error(ErrorKind::Misconfigured, message))
    }
}
