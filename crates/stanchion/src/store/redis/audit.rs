//! Settings of a server that lose locks: looked at when the first session is opened.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{OptionFuture, join_all, join4};
use tokio::task::JoinSet;

use super::Inner;
use super::connect::Target;
use super::error::error;
use super::node::within;
use crate::error::{Error, ErrorKind, Result};
use crate::store::Push;
use crate::token::SessionId;

/// KeyDB alone has it.
const ACTIVE_REPLICA: &str = "active-replica";

const SETTINGS: [&str; 7] =
    ["maxmemory", "maxmemory-policy", "appendonly", "appendfsync", "save", "min-replicas-to-write", ACTIVE_REPLICA];

/// The other servers of a cluster have so long when the session's own has answered.
const OTHERS_WITHIN: Duration = Duration::from_secs(1);

impl Inner {
    /// Refuses servers that are certain to lose locks, and tells the session what may lose some.
    pub(super) async fn audit(self: &Arc<Self>, session: SessionId) -> Result<()> {
        let mut audited = self.audited.lock().await;
        if *audited {
            return Ok(());
        }
        let own = self.links.target(&self.names.session(session));
        let mut warnings = match &own {
            Target::Slot(slot) if self.links.is_cluster() => self.audit_all(*slot).await?,
            _ => self.audit_one(&own).await?,
        };
        if self.links.hides_role() {
            warnings.push(
                "the server does not say whether it is a primary (ROLE is refused): a replica is noticed only when it \
                 refuses a write"
                    .into(),
            );
        }
        if let Some(address) = self.links.config.sends_password_to(&self.links.servers().await?) {
            warnings.push(format!("the password goes to {address} unencrypted: use `rediss` in the URL"));
        }
        for warning in warnings {
            if let Some(pushes) = self.sessions.wants_listener(session) {
                pushes.send(Push::Warning(warning));
            }
        }
        *audited = true;
        Ok(())
    }

    /// What may lose locks at the servers of a cluster. The one that has this slot has to answer; that another one is away
    /// is no reason not to use the rest.
    async fn audit_all(self: &Arc<Self>, slot: u16) -> Result<Vec<String>> {
        let mut unheard = self.links.servers().await?;
        let Some(own) = self.links.known_route(slot) else { return self.audit_one(&Target::Slot(slot)).await };
        unheard.retain(|server| *server != own);
        let mut audits = JoinSet::new();
        for server in unheard.iter().cloned() {
            let inner = self.clone();
            audits.spawn(async move {
                let found = inner.audit_one(&Target::Server(server.clone())).await;
                (server, found)
            });
        }
        let warnings = self.audit_one(&Target::Server(own.clone())).await?;
        let mut heard = vec![(own, warnings)];
        let others = async {
            while let Some(Ok((server, found))) = audits.join_next().await {
                match found {
                    Ok(warnings) => {
                        unheard.retain(|other| *other != server);
                        heard.push((server, warnings));
                    }
                    Err(fault) if fault.is_transient() => {}
                    Err(fault) => return Err(fault),
                }
            }
            Ok(())
        };
        within(OTHERS_WITHIN, others).await.unwrap_or(Ok(()))?;
        // What is true of several is told of the first.
        let mut known = HashSet::new();
        let mut told = Vec::new();
        for (server, warnings) in &heard {
            let new = warnings.iter().filter(|warning| known.insert(warning.as_str()));
            told.extend(new.map(|warning| format!("{server}: {warning}")));
        }
        told.extend(unheard.iter().map(|server| format!("{server}: its settings were not looked at")));
        Ok(told)
    }

    /// What may lose locks at this server. All is asked at once: a far one has to answer within the time of an attempt.
    async fn audit_one(&self, target: &Target) -> Result<Vec<String>> {
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
        let ask = |command| self.links.ask(target.clone(), command);
        let (settings, about_replicas, listing, waiting) = join4(
            join_all(settings.iter().map(ask)),
            ask(&about_replicas),
            ask(&listing),
            OptionFuture::from((self.min_replicas > 0).then(|| ask(&waiting))),
        )
        .await;
        // Without it every grant would be in doubt.
        waiting.transpose()?;
        let mut known = HashMap::new();
        let mut unknown = false;
        for (name, answer) in SETTINGS.into_iter().zip(settings) {
            match answer {
                Ok(answer) => {
                    let answer: HashMap<String, String> = redis::from_redis_value(answer).unwrap_or_default();
                    unknown |= name != ACTIVE_REPLICA && !answer.contains_key(name);
                    known.extend(answer);
                }
                // A user with few rights, or a service that hides its settings.
                Err(fault) if !fault.is_transient() => unknown |= name != ACTIVE_REPLICA,
                Err(fault) => return Err(fault),
            }
        }
        let replicas = match about_replicas {
            Ok(answer) => {
                let text: String = redis::from_redis_value(answer).unwrap_or_default();
                text.lines().find_map(|line| line.strip_prefix("connected_slaves:")?.trim().parse().ok()).unwrap_or(0)
            }
            Err(fault) if !fault.is_transient() => {
                unknown = true;
                0
            }
            Err(fault) => return Err(fault),
        };
        let mut found = findings(&known, replicas, unknown);
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

/// What may lose locks; an error for what is certain to.
fn findings(settings: &HashMap<String, String>, replicas: u32, unknown: bool) -> Result<Vec<String>, Error> {
    let get = |name: &str| settings.get(name).map(String::as_str);
    let mut warnings = Vec::new();
    // It may have no primary yet, and then its role does not tell.
    if get(ACTIVE_REPLICA) == Some("yes") {
        let message = "the server takes writes while it is a replica (active-replica yes): two servers would grant the same key; \
                       set `active-replica no` and use one primary";
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
                .push("the server keeps nothing on disk: a restart forgets every lock; set `appendonly yes`".into());
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
            "the server has replicas and takes writes without them: a failover may forget the newest locks, and an \
             isolated primary goes on granting; set `min-replicas-to-write 1` and a short `min-replicas-max-lag`"
                .into(),
        );
    }
    if unknown {
        warnings.push("the server's settings cannot be read: whether it keeps locks was not checked".into());
    }
    Ok(warnings)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn audit(settings: &[(&str, &str)], replicas: u32) -> Result<Vec<String>, Error> {
        let settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        findings(&settings, replicas, false)
    }

    #[test]
    fn what_is_certain_to_lose_locks_is_refused_and_the_rest_is_told() {
        let safe =
            [("maxmemory", "0"), ("maxmemory-policy", "noeviction"), ("appendonly", "yes"), ("appendfsync", "always")];
        assert!(audit(&safe, 0).unwrap().is_empty());
        for policy in ["allkeys-lru", "volatile-lru", "volatile-ttl", "allkeys-random"] {
            let error = audit(&[("maxmemory", "100"), ("maxmemory-policy", policy)], 0).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Misconfigured);
            assert!(error.to_string().contains("set `maxmemory-policy noeviction`"), "{error}");
            assert_eq!(audit(&[("maxmemory", "0"), ("maxmemory-policy", policy)], 0).unwrap().len(), 1);
        }
        assert!(audit(&[("active-replica", "no")], 0).unwrap().is_empty());
        let error = audit(&[("active-replica", "yes")], 0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Misconfigured);
        assert!(error.to_string().contains("set `active-replica no`"), "{error}");
        assert!(audit(&[("appendonly", "no"), ("save", "")], 0).unwrap()[0].contains("every lock"));
        assert!(audit(&[("appendonly", "no"), ("save", "60 1")], 0).unwrap()[0].contains("newest locks"));
        assert!(audit(&[("appendonly", "yes"), ("appendfsync", "everysec")], 0).unwrap()[0].contains("power failure"));
        assert_eq!(audit(&[("min-replicas-to-write", "0")], 1).unwrap().len(), 1);
        assert!(audit(&[("min-replicas-to-write", "1")], 1).unwrap().is_empty());
        assert_eq!(findings(&HashMap::new(), 0, true).unwrap().len(), 1);
    }
}
