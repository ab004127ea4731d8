//! Checks the servers for settings that lose locks, when the first session is opened.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{OptionFuture, join_all, join4};
use tokio::task::JoinSet;

use super::Inner;
use super::connect::Target;
use super::error::error;
use crate::error::{Error, ErrorKind, Result};
use crate::store::Push;
use crate::store::backoff::within;
use crate::token::SessionId;

/// A setting that only KeyDB has.
const ACTIVE_REPLICA: &str = "active-replica";

const SETTINGS: [&str; 7] =
    ["maxmemory", "maxmemory-policy", "appendonly", "appendfsync", "save", "min-replicas-to-write", ACTIVE_REPLICA];

/// Time that the other servers of a cluster have to answer, once the session's own server has answered.
const OTHERS_TIMEOUT: Duration = Duration::from_secs(1);

impl Inner {
    /// Rejects servers that are certain to lose locks, and reports settings that may lose some to the session.
    pub(super) async fn check(self: &Arc<Self>, session: SessionId) -> Result<()> {
        let mut is_checked = self.is_checked.lock().await;
        if *is_checked {
            return Ok(());
        }
        let own = self.manager.target(&self.names.session(session));
        let mut warnings = match &own {
            Target::Slot(slot) if self.manager.is_cluster() => self.check_all(*slot).await?,
            _ => self.check_one(&own).await?,
        };
        if self.manager.hides_role() {
            warnings.push(
                "the server does not report whether it is a primary (ROLE is rejected): a replica is noticed only when \
                 it rejects a write"
                    .into(),
            );
        }
        if let Some(address) = self.manager.config.sends_password_to(&self.manager.servers().await?) {
            warnings.push(format!("the password goes to {address} unencrypted: use `rediss` in the URL"));
        }
        for warning in warnings {
            if let Some(pushes) = self.sessions.pushes_without_listener(session) {
                pushes.send(Push::Warning(warning));
            }
        }
        *is_checked = true;
        Ok(())
    }

    /// Checks the servers of a cluster, and returns the warnings. The server with this slot must answer; another one
    /// may be unavailable, because the rest can be used without it.
    async fn check_all(self: &Arc<Self>, slot: u16) -> Result<Vec<String>> {
        let mut unchecked = self.manager.servers().await?;
        let Some(own) = self.manager.cached_route(slot) else { return self.check_one(&Target::Slot(slot)).await };
        unchecked.retain(|server| *server != own);
        let mut checks = JoinSet::new();
        for server in unchecked.iter().cloned() {
            let inner = self.clone();
            checks.spawn(async move {
                let found = inner.check_one(&Target::Server(server.clone())).await;
                (server, found)
            });
        }
        let warnings = self.check_one(&Target::Server(own.clone())).await?;
        let mut checked = vec![(own, warnings)];
        let others = async {
            while let Some(Ok((server, found))) = checks.join_next().await {
                match found {
                    Ok(warnings) => {
                        unchecked.retain(|other| *other != server);
                        checked.push((server, warnings));
                    }
                    Err(fault) if fault.is_transient() => {}
                    Err(fault) => return Err(fault),
                }
            }
            Ok(())
        };
        within(OTHERS_TIMEOUT, others).await.unwrap_or(Ok(()))?;
        // A warning that applies to several servers is reported for the first one.
        let mut seen = HashSet::new();
        let mut reported = Vec::new();
        for (server, warnings) in &checked {
            let new = warnings.iter().filter(|warning| seen.insert(warning.as_str()));
            reported.extend(new.map(|warning| format!("{server}: {warning}")));
        }
        reported.extend(unchecked.iter().map(|server| format!("{server}: its settings were not checked")));
        Ok(reported)
    }

    /// Checks one server, and returns the warnings. All queries are sent at once, because a distant server has to
    /// answer within one attempt.
    async fn check_one(&self, target: &Target) -> Result<Vec<String>> {
        let settings = SETTINGS.map(|name| {
            let mut command = redis::cmd("CONFIG");
            command.arg("GET").arg(name);
            command
        });
        let mut about_replicas = redis::cmd("INFO");
        about_replicas.arg("replication");
        let mut listing = redis::cmd("SCAN");
        listing.arg("0").arg("COUNT").arg(1);
        let mut waiting = redis::cmd("WAIT");
        waiting.arg(0).arg(0);
        let query = |command| self.manager.query(target.clone(), command);
        let (settings, about_replicas, listing, waiting) = join4(
            join_all(settings.iter().map(query)),
            query(&about_replicas),
            query(&listing),
            OptionFuture::from((self.min_replicas > 0).then(|| query(&waiting))),
        )
        .await;
        // Without `WAIT` the outcome of every grant would be unknown.
        waiting.transpose()?;
        let mut values = HashMap::new();
        let mut is_incomplete = false;
        for (name, answer) in SETTINGS.into_iter().zip(settings) {
            match answer {
                Ok(answer) => {
                    let answer: HashMap<String, String> = redis::from_redis_value(answer).unwrap_or_default();
                    is_incomplete |= name != ACTIVE_REPLICA && !answer.contains_key(name);
                    values.extend(answer);
                }
                // The user has few rights, or the service hides its settings.
                Err(fault) if !fault.is_transient() => is_incomplete |= name != ACTIVE_REPLICA,
                Err(fault) => return Err(fault),
            }
        }
        let replicas = match about_replicas {
            Ok(answer) => {
                let text: String = redis::from_redis_value(answer).unwrap_or_default();
                text.lines().find_map(|line| line.strip_prefix("connected_slaves:")?.trim().parse().ok()).unwrap_or(0)
            }
            Err(fault) if !fault.is_transient() => {
                is_incomplete = true;
                0
            }
            Err(fault) => return Err(fault),
        };
        let mut found = findings(&values, replicas, is_incomplete);
        match (&mut found, listing) {
            (Ok(found), Err(fault)) if !fault.is_transient() => {
                found.push(format!("keys cannot be listed (SCAN): {}", fault.message()));
            }
            (Ok(_), Err(fault)) => return Err(fault),
            _ => {}
        }
        match target {
            Target::Server(server) => {
                found.map_err(|fault| error(fault.kind(), format!("{server}: {}", fault.message())))
            }
            Target::Slot(_) => found,
        }
    }
}

/// Returns the product and the version in an answer to `INFO server`. A compatible product reports the version of Redis
/// that it resembles too.
pub(super) fn product(about_server: &str) -> Option<String> {
    let version = |field: &str| about_server.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    [("Valkey", "valkey_version"), ("Dragonfly", "dragonfly_version"), ("Redis", "redis_version")]
        .iter()
        .find_map(|(name, field)| Some(format!("{name} {}", version(field)?.trim())))
}

/// Returns a warning for each setting that may lose locks, or an error for a setting that certainly will.
fn findings(settings: &HashMap<String, String>, replicas: u32, is_incomplete: bool) -> Result<Vec<String>, Error> {
    let get = |name: &str| settings.get(name).map(String::as_str);
    let mut warnings = Vec::new();
    // The server may have no primary yet, so its role does not reveal this.
    if get(ACTIVE_REPLICA) == Some("yes") {
        let message = "the server accepts writes while it is a replica (active-replica yes): two servers would grant \
                       the same key; set `active-replica no` and use one primary";
        return Err(error(ErrorKind::Misconfigured, message));
    }
    if let (Some(limit), Some(policy)) = (get("maxmemory"), get("maxmemory-policy"))
        && policy != "noeviction"
    {
        if limit != "0" {
            return Err(error(
                ErrorKind::Misconfigured,
                format!(
                    "the server evicts keys when its memory is full (maxmemory-policy {policy}), and locks with them: \
                     set `maxmemory-policy noeviction`"
                ),
            ));
        }
        warnings.push(format!(
            "maxmemory-policy is {policy}: with a maxmemory the server would evict locks; set `noeviction`"
        ));
    }
    match (get("appendonly"), get("appendfsync"), get("save")) {
        (Some("no"), _, Some("")) => {
            warnings
                .push("the server stores nothing on disk: a restart forgets every lock; set `appendonly yes`".into());
        }
        (Some("no"), _, Some(_)) => {
            warnings.push(
                "the server saves snapshots only: a restart forgets the newest locks; set `appendonly yes`".into(),
            );
        }
        (Some("yes"), Some(fsync), _) if fsync != "always" => {
            warnings.push(format!("appendfsync is {fsync}: a power failure forgets the newest locks"));
        }
        _ => {}
    }
    if replicas > 0 && get("min-replicas-to-write") == Some("0") {
        warnings.push(
            "the server has replicas and accepts writes without them: a failover may lose the newest locks, and \
             an isolated primary continues to grant; set `min-replicas-to-write 1` and a short `min-replicas-max-lag`"
                .into(),
        );
    }
    if is_incomplete {
        warnings.push("the server's settings cannot be read: whether they lose locks was not checked".into());
    }
    Ok(warnings)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(settings: &[(&str, &str)], replicas: u32) -> Result<Vec<String>, Error> {
        let settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        findings(&settings, replicas, false)
    }

    #[test]
    fn product_comes_before_its_model() {
        let redis = "# Server\r\nredis_version:7.2.4\r\nredis_mode:standalone\r\n";
        assert_eq!(product(redis).unwrap(), "Redis 7.2.4");
        assert_eq!(product("redis_version:7.2.4\r\nvalkey_version:8.0.1\r\n").unwrap(), "Valkey 8.0.1");
        assert_eq!(product("# Server\r\n"), None);
    }

    #[test]
    fn lossy_settings_are_rejected_or_warned_about() {
        let safe =
            [("maxmemory", "0"), ("maxmemory-policy", "noeviction"), ("appendonly", "yes"), ("appendfsync", "always")];
        assert!(check(&safe, 0).unwrap().is_empty());
        for policy in ["allkeys-lru", "volatile-lru", "volatile-ttl", "allkeys-random"] {
            let error = check(&[("maxmemory", "100"), ("maxmemory-policy", policy)], 0).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Misconfigured);
            assert!(error.to_string().contains("set `maxmemory-policy noeviction`"), "{error}");
            assert_eq!(check(&[("maxmemory", "0"), ("maxmemory-policy", policy)], 0).unwrap().len(), 1);
        }
        assert!(check(&[("active-replica", "no")], 0).unwrap().is_empty());
        let error = check(&[("active-replica", "yes")], 0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Misconfigured);
        assert!(error.to_string().contains("set `active-replica no`"), "{error}");
        assert!(check(&[("appendonly", "no"), ("save", "")], 0).unwrap()[0].contains("every lock"));
        assert!(check(&[("appendonly", "no"), ("save", "60 1")], 0).unwrap()[0].contains("newest locks"));
        assert!(check(&[("appendonly", "yes"), ("appendfsync", "everysec")], 0).unwrap()[0].contains("power failure"));
        assert_eq!(check(&[("min-replicas-to-write", "0")], 1).unwrap().len(), 1);
        assert!(check(&[("min-replicas-to-write", "1")], 1).unwrap().is_empty());
        assert_eq!(findings(&HashMap::new(), 0, true).unwrap().len(), 1);
    }
}
