//! Checks a database once, before its first use: whether it can store locks, whether its settings may lose some, and
//! whether another role could run code in the schema.

use std::sync::atomic::Ordering;

use super::connect::SEES_COMMITS;
use super::error::{OTHER_ISOLATION, error, malformed};
use super::rows::column;
use super::{FOREIGN, Inner};
use crate::error::{ErrorKind, Result};
use crate::store::Push;
use crate::token::SessionId;

/// The version of the schema that this program uses.
const VERSION: i32 = 7;

/// The oldest supported version of the server, as `server_version_num` counts.
const MIN_SERVER_VERSION: i32 = 150_000;

impl Inner {
    /// Checks the database, once for each store. Creates a missing schema if the store may, and reports warnings to the
    /// session.
    pub(super) async fn check(&self, session: SessionId) -> Result<()> {
        let mut is_checked = self.is_checked.lock().await;
        if *is_checked {
            return Ok(());
        }
        let warnings = self.check_server().await?;
        // This comes before any call of the schema's functions, which could run another role's code.
        self.check_schema().await?;
        let schema = &self.pool.config.schema;
        let statement = format!("SELECT version, id FROM {schema}.version()");
        let meta = match self.pool.query_session(&statement, &[]).await {
            Err(fault) if fault.kind() == ErrorKind::Misconfigured && self.creates_schema.load(Ordering::Relaxed) => {
                self.pool.run_script(&self.schema_sql()).await?;
                self.check_schema().await?;
                self.pool.query_session(&statement, &[]).await?
            }
            answer => answer?,
        };
        let meta = meta.first().ok_or_else(malformed)?;
        let version: i32 = column(meta, "version")?;
        if version != VERSION {
            let remedy = if version > VERSION { "update this program" } else { "run `stanchion schema --apply`" };
            let message = format!("the schema is of version {version}, and this program uses {VERSION}: {remedy}");
            return Err(error(ErrorKind::Misconfigured, message));
        }
        if self.pool.uses_users_pool() {
            let statement = format!("SELECT id, {SEES_COMMITS} AS sees FROM {schema}.version()");
            let theirs = self.pool.query(&statement, &[]).await?;
            let theirs = theirs.first().ok_or_else(malformed)?;
            // The store does not change settings of the user's connections.
            if !column::<bool>(theirs, "sees")? {
                return Err(error(ErrorKind::Misconfigured, OTHER_ISOLATION));
            }
            if column::<&str>(theirs, "id")? != column::<&str>(meta, "id")? {
                let message = "the connections of the pool lead to another database than the URL";
                return Err(error(ErrorKind::Misconfigured, message));
            }
        }
        for warning in warnings {
            self.streams.tell(session, Push::Warning(warning));
        }
        *is_checked = true;
        Ok(())
    }

    /// Applies the schema to a database that can store locks, and returns warnings about its settings.
    pub(super) async fn apply(&self) -> Result<Vec<String>> {
        let warnings = self.check_server().await?;
        self.pool.run_script(&self.schema_sql()).await?;
        // The database's default privileges may give others too many rights on the new schema.
        self.check_schema().await?;
        Ok(warnings)
    }

    /// Returns the product and the version of the server.
    pub(super) async fn server(&self) -> Result<String> {
        let statement = "SELECT pg_catalog.current_setting('server_version') AS release";
        let rows = self.pool.query_session(statement, &[]).await?;
        Ok(format!("PostgreSQL {}", column::<&str>(rows.first().ok_or_else(malformed)?, "release")?))
    }

    /// Rejects a server that cannot store locks, and returns warnings about settings that may lose some.
    async fn check_server(&self) -> Result<Vec<String>> {
        let settings = "SELECT pg_catalog.current_setting('server_version_num')::pg_catalog.int4 AS version, \
                        pg_catalog.current_setting('server_version') AS release, \
                        pg_catalog.current_setting('server_encoding') AS encoding, \
                        pg_catalog.current_setting('fsync') AS fsync, \
                        pg_catalog.current_setting('full_page_writes') AS pages, \
                        pg_catalog.current_setting('synchronous_commit') AS commit";
        let settings = self.pool.query_session(settings, &[]).await?;
        let settings = settings.first().ok_or_else(malformed)?;
        let setting = |name| column::<String>(settings, name);
        if column::<i32>(settings, "version")? < MIN_SERVER_VERSION {
            let message =
                format!("the server is PostgreSQL {}, but version 15 or later is needed", setting("release")?);
            return Err(error(ErrorKind::Misconfigured, message));
        }
        if setting("encoding")? != "UTF8" {
            let message = "the database is not in UTF-8, so it cannot store every key; create it with ENCODING 'UTF8'";
            return Err(error(ErrorKind::Misconfigured, message));
        }
        let mut warnings = Vec::new();
        for (name, option) in [("fsync", "fsync"), ("pages", "full_page_writes"), ("commit", "synchronous_commit")] {
            if setting(name)? == "off" {
                warnings.push(format!("{option} is off: a crash of the server may lose grants that were answered"));
            }
        }
        Ok(warnings)
    }

    /// Rejects a schema in which a role other than its owner could run code. A missing schema passes.
    async fn check_schema(&self) -> Result<()> {
        let schema = &self.pool.config.schema;
        if self.creates_schema.load(Ordering::Relaxed) {
            let owner = format!(
                "SELECT pg_catalog.pg_get_userbyid(nspowner)::text AS owner FROM pg_catalog.pg_namespace \
                 WHERE oid = pg_catalog.to_regnamespace('{schema}') \
                 AND pg_catalog.pg_get_userbyid(nspowner) <> current_user"
            );
            if let Some(row) = self.pool.query_session(&owner, &[]).await?.first() {
                let owner: &str = column(row, "owner")?;
                let message = format!("the schema belongs to {owner}, but `create_schema` needs a schema of this role");
                return Err(error(ErrorKind::Misconfigured, message));
            }
        }
        let statement = format!("SELECT wrong FROM ({}) AS foreign_parts LIMIT 3", FOREIGN.replace("@schema@", schema));
        let rows = self.pool.query_session(&statement, &[]).await?;
        let wrong = rows.iter().map(|row| column::<&str>(row, "wrong")).collect::<Result<Vec<_>>>()?;
        if wrong.is_empty() {
            return Ok(());
        }
        let message = format!("another role could run code in the schema: {}", wrong.join("; "));
        Err(error(ErrorKind::Misconfigured, message))
    }
}
