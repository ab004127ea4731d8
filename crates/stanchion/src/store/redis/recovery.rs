//! Notices when unavailable servers of a cluster recover, and reports it to every session.
//!
//! A session listens at one server of the cluster. If another server fails, no subscription ends: a waiter for a key on
//! the failed server would not hear of the new primary, and a holder would not hear that its hold is missing. With each
//! renewal of its session the keeper therefore probes the servers that this process uses. While one is unavailable, the
//! slot map is queried repeatedly. When the server recovers, or another one has its slots, every session is notified.
//!
//! With one server, or with sentinels, a failure ends the subscription, and subscribing again finds the new primary.

use std::sync::Arc;
use std::time::Duration;

use redis::Value;
use tokio::task::JoinSet;

use super::cluster::SlotMap;
use super::config::Address;
use super::connect::{ConnectionManager, RuntimeConnections, Target};
use super::node::CONNECT_TIMEOUT;
use super::push::{LONGEST_PAUSE, SHORTEST_PAUSE};
use crate::error::Result;
use crate::store::backoff::{Backoff, sleep, within};

/// Longest pause between queries while only slots without a server are missing, because it may take days until somebody
/// assigns them.
const LONGEST_PAUSE_FOR_SLOTS: Duration = Duration::from_secs(3);

/// Time that an unavailable server has to answer before the map is queried again.
const PROBE_TIMEOUT: Duration = Duration::from_millis(200);

impl ConnectionManager {
    /// Calls `notify` each time that something in a cluster recovers. Never returns.
    pub(super) async fn watch_recoveries(self: &Arc<Self>, channel: &str, notify: impl Fn()) {
        let (Some(slots), Some(local)) = (self.slots(), self.local()) else { return std::future::pending().await };
        let mut recoveries = slots.recoveries();
        loop {
            tokio::select! {
                change = recoveries.changed() => if change.is_ok() { notify() },
                () = self.find_unavailable(&local, slots, channel) => {}
            }
        }
    }

    /// Waits for outages and detects recoveries. One task at a time does this, on behalf of all sessions.
    async fn find_unavailable(self: &Arc<Self>, local: &RuntimeConnections, slots: &SlotMap, channel: &str) {
        let _one_at_a_time = slots.searching.lock().await;
        let mut pauses = Backoff::new(SHORTEST_PAUSE, LONGEST_PAUSE);
        let mut pauses_for_slots = Backoff::new(SHORTEST_PAUSE, LONGEST_PAUSE_FOR_SLOTS);
        loop {
            slots.wait_for_outage().await;
            if slots.lacks_only_slots() {
                let pause = pauses_for_slots.next();
                tokio::select! {
                    () = sleep(pause) => {}
                    () = slots.next_outage() => pauses_for_slots.reset(),
                }
            } else {
                pauses.pause().await;
            }
            if self.learn_slots(local, slots).await.is_err() {
                continue;
            }
            for server in slots.unavailable_servers() {
                if !slots.servers().contains(&server) || self.has_recovered(local, &server).await {
                    slots.mark_recovered(&server);
                    self.report_reachable(&server);
                }
            }
            // While the cluster is down, it rejects every command with a key.
            if slots.is_down()
                && slots.is_complete()
                && self.query(self.target(channel), redis::cmd("PTTL").arg(channel)).await.is_ok()
            {
                slots.mark_cluster_recovered();
            }
        }
    }

    async fn has_recovered(self: &Arc<Self>, local: &RuntimeConnections, server: &Address) -> bool {
        local.node(server).allow_connect_now();
        matches!(within(PROBE_TIMEOUT, self.probe(server)).await, Some(Ok(_)))
    }

    /// Sends a command that every usable server allows; `PING` may be rejected.
    async fn probe(self: &Arc<Self>, server: &Address) -> Result<Value> {
        self.query(Target::Server(server.clone()), &redis::cmd("TIME")).await
    }

    /// Probes the servers of the cluster that this process uses. Open connections are probed too, because a new
    /// connection does not reveal that the server restarted without its data. Each failure is recorded where it occurs.
    pub(super) async fn probe_servers(self: &Arc<Self>) {
        let Some(slots) = self.slots() else { return };
        let mut probes = JoinSet::new();
        for server in slots.servers().into_iter().filter(|server| self.has_used(server)) {
            for dispatch in self.open_connections(&server) {
                let manager = self.clone();
                // A missing answer may only mean that this runtime is busy.
                probes.spawn(async move {
                    // Failures are recorded where they occur.
                    let _ = within(CONNECT_TIMEOUT, manager.query_over(dispatch, &redis::cmd("TIME"))).await;
                });
            }
            let manager = self.clone();
            probes.spawn(async move {
                if within(2 * CONNECT_TIMEOUT, manager.probe(&server)).await.is_none() {
                    manager.report_unavailable(&server);
                }
            });
        }
        while probes.join_next().await.is_some() {}
    }
}
