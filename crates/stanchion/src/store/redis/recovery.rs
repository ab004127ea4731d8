//! Servers of a cluster that were lost, and how it is noticed that their slots are served again.
//!
//! A session listens at one server. That another one is lost ends no subscription: nobody who waits for a key of that one
//! would hear of the new primary, and no holder of one would hear that it lacks the hold. So the servers that this process
//! uses are looked at with each beat. Where one is lost, the map of slots is asked for again and again, and when its slots
//! have another server, or it is there again, everybody is told.
//!
//! With one server, or with sentinels, the loss of the server ends the subscription, and listening anew is the search.

use std::sync::Arc;
use std::time::Duration;

use redis::Value;
use tokio::task::JoinSet;

use super::cluster::SlotMap;
use super::config::Address;
use super::connect::{Links, Local, Target};
use super::node::{CONNECT_WITHIN, within};
use super::push::{FIRST_PAUSE, LONGEST_PAUSE, sleep};
use crate::clock::jitter;
use crate::error::Result;

/// Where nothing is lost but slots that no server has, it may be days until somebody gives them one.
const LONGEST_PAUSE_FOR_SLOTS: Duration = Duration::from_secs(3);

/// A lost server has so long to answer before the map is asked for again.
const BACK_WITHIN: Duration = Duration::from_millis(200);

impl Links {
    /// Tells each time that what was lost in a cluster is served again. Never returns.
    pub(super) async fn tell_recoveries(self: &Arc<Self>, channel: &str, tell: impl Fn()) {
        let (Some(slots), Some(local)) = (self.slots(), self.local()) else { return std::future::pending().await };
        let mut recoveries = slots.recoveries();
        loop {
            tokio::select! {
                told = recoveries.changed() => if told.is_ok() { tell() },
                () = self.search(&local, slots, channel) => {}
            }
        }
    }

    /// Looks for what is lost. One at a time does that, for everybody who waits to be told.
    async fn search(self: &Arc<Self>, local: &Local, slots: &SlotMap, channel: &str) {
        let _one_at_a_time = slots.searching.lock().await;
        let mut pause = FIRST_PAUSE;
        loop {
            slots.something_is_lost().await;
            if slots.lacks_only_slots() {
                tokio::select! {
                    () = sleep(jitter(pause)) => pause = (pause * 2).min(LONGEST_PAUSE_FOR_SLOTS),
                    () = slots.next_loss() => pause = FIRST_PAUSE,
                }
            } else {
                sleep(jitter(pause.min(LONGEST_PAUSE))).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            if self.learn_slots(local, slots).await.is_err() {
                continue;
            }
            for server in slots.lost_servers() {
                if !slots.servers().contains(&server) || self.is_there(local, &server).await {
                    slots.found(&server);
                    self.reached(&server);
                }
            }
            // Any command with a key is refused while the cluster is down.
            if slots.is_down()
                && slots.is_complete()
                && self.ask(self.target(channel), redis::cmd("PTTL").arg(channel)).await.is_ok()
            {
                slots.is_up_again();
            }
        }
    }

    async fn is_there(self: &Arc<Self>, local: &Local, server: &Address) -> bool {
        local.node(server).hurry();
        matches!(within(BACK_WITHIN, self.probe(server)).await, Some(Ok(_)))
    }

    /// Sends what every server allows that locks can be kept in: `PING` may be refused.
    async fn probe(self: &Arc<Self>, server: &Address) -> Result<Value> {
        self.ask(Target::Server(server.clone()), &redis::cmd("TIME")).await
    }

    /// Looks whether the servers of the cluster that this process uses are there. A connection that broke tells more than a
    /// new one: the server may be back, without what it had. What fails is noted where it fails.
    pub(super) async fn look_at_servers(self: &Arc<Self>) {
        let Some(slots) = self.slots() else { return };
        let mut looks = JoinSet::new();
        for server in slots.servers().into_iter().filter(|server| self.uses(server)) {
            for way in self.ways_to(&server) {
                let links = self.clone();
                // Without an answer it may be the runtime that is busy.
                looks.spawn(async move {
                    let _noted = within(CONNECT_WITHIN, links.ask_there(way, &redis::cmd("TIME"))).await;
                });
            }
            let links = self.clone();
            looks.spawn(async move {
                if within(2 * CONNECT_WITHIN, links.probe(&server)).await.is_none() {
                    links.forget(&server);
                }
            });
        }
        while looks.join_next().await.is_some() {}
    }
}
