//! Finds the primary of a service through its sentinels.
//!
//! # Which server counts
//! All sentinels are queried, and the report with the newest epoch counts. A sentinel that missed a failover, or that
//! is on the wrong side of a partition, thus does not lead to a replaced server. Nobody waits for an unresponsive
//! sentinel.
//!
//! A sentinel names the new primary only after it has polled it again, up to a second after the new primary began to
//! accept writes. The sentinel that leads the failover reports the chosen replica earlier. The store therefore queries
//! the chosen replica itself, and uses it as soon as it reports that it is the primary.
//! - A replica that somebody else promoted is not used.
//! - The old primary is not used while a replica is chosen to replace it, or while the sentinels agree that it is down.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, FromRedisValue, RedisError};

use super::config::{Address, Config};
use super::connect::RuntimeConnections;
use super::error::{error, while_connecting};
use super::node::{CONNECT_TIMEOUT, connect, in_task, timeout_error};
use crate::clock::{BootTime, Clock};
use crate::error::{Error, ErrorKind, Result};
use crate::store::backoff::within;

/// Time limit for one sentinel, and time that the others get after the first answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
const STRAGGLER_TIMEOUT: Duration = Duration::from_millis(200);

/// Time for which a failed search is not repeated: callers get the same error, so that a thousand tasks make no storm.
const FAILURE_REUSE: Duration = Duration::from_millis(50);

/// The servers of one service, as its sentinels report them.
#[derive(Debug)]
pub(super) struct Group {
    sentinels: Vec<Address>,
    service: String,
    state: Mutex<GroupState>,
    /// Held by the one task that searches.
    searching: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct GroupState {
    primary: Option<Address>,
    /// The previous primary, until there is a new one.
    lost: Option<Address>,
    /// The time and the error of the last search, if it failed.
    last_failure: Option<(BootTime, ErrorKind, String)>,
}

/// The report of one sentinel.
#[derive(Clone, Debug)]
struct SentinelReport {
    primary: Address,
    /// A report with a higher epoch is newer.
    epoch: u64,
    /// Whether the sentinels agree that the primary is down.
    is_down: bool,
    /// The replica that was chosen to replace the primary.
    chosen: Option<Address>,
}

impl Group {
    pub(super) fn new(sentinels: Vec<Address>, service: String) -> Self {
        Self { sentinels, service, state: Mutex::default(), searching: tokio::sync::Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, GroupState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn primary(&self) -> Option<Address> {
        self.lock().primary.clone()
    }

    /// Marks a server as unavailable. If it was the primary, another server may be by now.
    pub(super) fn mark_unavailable(&self, address: &Address) {
        let mut state = self.lock();
        if state.primary.as_ref() == Some(address) {
            state.lost = state.primary.take();
        }
    }

    /// Returns the cached primary, or finds it through the sentinels.
    pub(super) async fn find(&self, config: &Config, local: &RuntimeConnections, clock: &Clock) -> Result<Address> {
        let _one_at_a_time = self.searching.lock().await;
        let lost = {
            let state = self.lock();
            if let Some(primary) = &state.primary {
                return Ok(primary.clone());
            }
            if let Some((at, kind, message)) = &state.last_failure
                && clock.now().since(*at) < FAILURE_REUSE
            {
                return Err(error(*kind, message.clone()));
            }
            state.lost.clone()
        };
        let found = self.query(config, local, lost).await;
        let mut state = self.lock();
        match &found {
            Ok(primary) => *state = GroupState { primary: Some(primary.clone()), ..GroupState::default() },
            Err(fault) => state.last_failure = Some((clock.now(), fault.kind(), fault.message().to_owned())),
        }
        found
    }

    async fn query(&self, config: &Config, local: &RuntimeConnections, lost: Option<Address>) -> Result<Address> {
        let clients = self.sentinels.iter().map(|sentinel| Ok((sentinel.clone(), config.sentinel(sentinel)?)));
        let clients: Vec<_> = clients.collect::<Result<_>>()?;
        let (service, tls) = (self.service.clone(), config.uses_tls());
        let reports = in_task(local, async move {
            let query = |(sentinel, client)| {
                let service = &service;
                async move { query_sentinel(&sentinel, &client, service, tls).await }
            };
            let mut queries: FuturesUnordered<_> = clients.into_iter().map(query).collect();
            let (mut reports, mut fault) = (Vec::new(), None);
            let mut patience = ANSWER_TIMEOUT;
            while let Some(Some(answer)) = within(patience, queries.next()).await {
                match answer {
                    Ok(report) => {
                        reports.push(report);
                        patience = STRAGGLER_TIMEOUT;
                    }
                    // A missing service is a more useful error than one unavailable sentinel.
                    Err(other) if fault.as_ref().is_none_or(|_: &Error| !other.is_transient()) => fault = Some(other),
                    Err(_) => {}
                }
            }
            (reports, fault)
        });
        let (reports, fault) = reports.await?;
        let Some(newest) = newest(&reports, lost.as_ref()) else {
            return Err(fault.unwrap_or_else(|| error(ErrorKind::Unavailable, "no sentinel answered")));
        };
        let Some(lost) = lost.filter(|lost| *lost == newest.primary) else { return Ok(newest.primary.clone()) };
        for chosen in reports.iter().filter_map(|report| report.chosen.as_ref()) {
            if is_primary(config, local, chosen).await {
                return Ok(chosen.clone());
            }
        }
        if reports.iter().any(|report| report.is_down || report.chosen.is_some()) {
            return Err(error(ErrorKind::Unavailable, format!("{lost} is down, and no other server is primary yet")));
        }
        Ok(lost)
    }
}

/// Returns the newest report. A user with few rights gets no epochs. Of equally new reports, a report of another
/// primary than the lost one wins, and then a report that more sentinels agree with.
fn newest<'a>(reports: &'a [SentinelReport], lost: Option<&Address>) -> Option<&'a SentinelReport> {
    let agree = |primary: &Address| reports.iter().filter(|report| report.primary == *primary).count();
    reports.iter().max_by_key(|report| (report.epoch, lost != Some(&report.primary), agree(&report.primary)))
}

/// Queries one sentinel.
async fn query_sentinel(sentinel: &Address, client: &Client, service: &str, tls: bool) -> Result<SentinelReport> {
    let options = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(ANSWER_TIMEOUT))
        .set_response_timeout(Some(ANSWER_TIMEOUT));
    let answer = async {
        let connection = client.get_multiplexed_async_connection_with_config(&options).await?;
        // All at the same time, because a sentinel may be far away, and the name last, so that it is not older than its
        // epoch.
        let (primary, replicas, named) = tokio::join!(
            query::<HashMap<String, String>>(connection.clone(), "MASTER", service),
            query::<Vec<HashMap<String, String>>>(connection.clone(), "REPLICAS", service),
            query::<Option<(String, u16)>>(connection.clone(), "GET-MASTER-ADDR-BY-NAME", service),
        );
        let Some((host, port)) = named? else { return Ok(None) };
        let mut report =
            SentinelReport { primary: Address::Tcp { host, port }, epoch: 0, is_down: false, chosen: None };
        // Without that right, or from a server that only imitates a sentinel, the name has to do.
        report.describe(&primary.unwrap_or_default());
        report.chosen = chosen(&replicas.unwrap_or_default());
        Ok(Some(report))
    };
    let answer = within(ANSWER_TIMEOUT, answer).await.unwrap_or_else(|| Err(timeout_error(ANSWER_TIMEOUT)));
    let report = answer.map_err(|fault: RedisError| while_connecting(sentinel, tls, &fault))?;
    report.ok_or_else(|| error(ErrorKind::Misconfigured, format!("the sentinel {sentinel} has no service `{service}`")))
}

async fn query<T: FromRedisValue>(
    mut connection: MultiplexedConnection,
    what: &str,
    service: &str,
) -> Result<T, RedisError> {
    redis::cmd("SENTINEL").arg(what).arg(service).query_async(&mut connection).await
}

fn has_flag(server: &HashMap<String, String>, flag: &str) -> bool {
    server.get("flags").is_some_and(|flags| flags.split(',').any(|one| one == flag))
}

impl SentinelReport {
    fn describe(&mut self, primary: &HashMap<String, String>) {
        self.epoch = primary.get("config-epoch").and_then(|epoch| epoch.parse().ok()).unwrap_or(0);
        self.is_down = has_flag(primary, "o_down");
    }
}

/// Returns the replica that is being promoted. Only the sentinel that leads the failover reports it.
fn chosen(replicas: &[HashMap<String, String>]) -> Option<Address> {
    let chosen = replicas.iter().find(|replica| has_flag(replica, "promoted"))?;
    Some(Address::Tcp { host: chosen.get("ip")?.clone(), port: chosen.get("port")?.parse().ok()? })
}

/// Returns whether the server itself reports that it is a primary.
async fn is_primary(config: &Config, local: &RuntimeConnections, address: &Address) -> bool {
    let Ok(client) = config.server(address) else { return false };
    let role = in_task(local, async move { within(CONNECT_TIMEOUT, connect(&client)).await });
    matches!(role.await, Ok(Some(Ok((_, Some(role))))) if role == "master")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(port: u16, epoch: u64) -> SentinelReport {
        SentinelReport { primary: Address::Tcp { host: "h".into(), port }, epoch, is_down: false, chosen: None }
    }

    #[test]
    fn newest_report_wins() {
        let lost = report(1, 0).primary;
        let port = |reports: &[SentinelReport]| match &newest(reports, Some(&lost)).unwrap().primary {
            Address::Tcp { port, .. } => *port,
            Address::Unix(_) => 0,
        };
        // One sentinel missed the last failover, and names the primary before the lost one.
        assert_eq!(port(&[report(2, 3), report(1, 4), report(1, 4)]), 1);
        // One sentinel missed this failover.
        assert_eq!(port(&[report(1, 4), report(2, 5)]), 2);
        assert_eq!(port(&[report(2, 5), report(1, 4)]), 2);
        // No sentinel reports an epoch.
        assert_eq!(port(&[report(1, 0), report(2, 0), report(1, 0)]), 2);
    }

    #[test]
    fn majority_wins_without_epochs() {
        let reports = [report(1, 0), report(1, 0), report(2, 0)];
        let at = |port| report(port, 0).primary;
        assert_eq!(newest(&reports, None).unwrap().primary, at(1));
        assert_eq!(newest(&reports, Some(&at(1))).unwrap().primary, at(2));
        // A report with an epoch is newer than all reports without one.
        assert_eq!(newest(&[report(1, 0), report(2, 1), report(1, 0)], None).unwrap().primary, at(2));
    }

    #[test]
    fn chosen_replica_is_promoted() {
        let replica = |port: &str, flags: &str| {
            let fields = [("ip", "10.0.0.1"), ("port", port), ("flags", flags)];
            fields.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
        };
        assert_eq!(chosen(&[replica("1", "slave"), replica("2", "s_down,slave")]), None);
        let found = chosen(&[replica("1", "slave"), replica("2", "slave,promoted")]).unwrap();
        assert_eq!(found.to_string(), "10.0.0.1:2");
    }
}
