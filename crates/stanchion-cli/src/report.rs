//! Reports about a key, for people: its holders while the tool waits, and outages of the store while the tool holds it.
//!
//! One rule for terminals, logs and cron's mail: a problem is printed unless `--quiet` is given. Progress is printed on a
//! terminal, where somebody waits for it, and with `--verbose`.

use std::time::Duration;

use stanchion::store::{Demand, KeyState, WaiterState};
use stanchion::{BootTime, Clock, Fence, Guard, Key, Locks, LossCause};

use crate::message::quoted_key;
use crate::output::{cell, escape, for_people, limits_differ};
use crate::store::{pause, within};

/// A line for the user about the key.
#[derive(Debug)]
pub(crate) enum Report {
    Progress(String),
    Problem(String),
}

/// Interval between two looks at the key while the tool waits for it.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Time until the next look at a key whose queue this process has not entered yet.
const LOOK_SOON: Duration = Duration::from_millis(50);

/// Maximum time of a look at the key: the wait goes on meanwhile.
const LOOK_WITHIN: Duration = Duration::from_secs(5);

/// Describes a wait, and describes it again after each change.
#[derive(Debug)]
pub(crate) struct WaitReport<'a> {
    locks: &'a Locks,
    key: &'a str,
    /// Label of this process in the queue, or `None` if it does not queue.
    owner: Option<&'a str>,
    demand: Demand,
    /// The time of the next look, or `None` if nobody reads the reports.
    next_look: Option<BootTime>,
    /// The reported state: the fences of the holders, and the number of waiters ahead of this process.
    reported: Option<(Vec<Fence>, Option<usize>)>,
    was_away: bool,
}

impl<'a> WaitReport<'a> {
    /// Reports from `after` on, or never.
    pub(crate) fn new(
        locks: &'a Locks,
        key: &'a str,
        owner: Option<&'a str>,
        demand: Demand,
        after: Option<Duration>,
    ) -> Self {
        let next_look = after.map(|after| Clock::system().now().after(after));
        Self { locks, key, owner, demand, next_look, reported: None, was_away: false }
    }

    /// Reports on another key from now on.
    pub(crate) fn turn_to(&mut self, key: &'a str) {
        (self.key, self.reported) = (key, None);
    }

    /// Returns the next report, once there is something new to report. A dropped future loses none.
    pub(crate) async fn next(&mut self) -> Report {
        let clock = Clock::system();
        loop {
            let Some(next_look) = self.next_look else { std::future::pending().await };
            pause(next_look.since(clock.now())).await;
            let looked = within(LOOK_WITHIN, self.locks.inspect(self.key)).await;
            self.next_look = Some(clock.now().after(LOOK_EVERY));
            let key = quoted_key(self.key);
            match looked {
                Some(Ok(state)) => {
                    self.was_away = false;
                    let is_own = |waiter: &WaiterState| self.owner == Some(&waiter.owner);
                    let own_places = state.waiters.iter().filter(|waiter| is_own(waiter)).count();
                    if self.owner.is_some() && own_places == 0 {
                        // The request is on its way to the queue, or its grant is on the way back.
                        self.next_look = Some(clock.now().after(LOOK_SOON));
                        continue;
                    }
                    let fences = state.holders.iter().map(|holder| holder.fence).collect();
                    // Users may give several processes the same label; then the place is not known.
                    let ahead = state.waiters.iter().position(is_own).filter(|_| own_places == 1);
                    let seen = Some((fences, ahead));
                    if self.reported != seen {
                        self.reported = seen;
                        let place = ahead.map(place).unwrap_or_default();
                        let who = describe(&state, self.demand);
                        return Report::Progress(format!("waiting for key `{key}`: {who}{place}"));
                    }
                }
                _ if self.was_away => {}
                missing => {
                    self.was_away = true;
                    let reason = match missing {
                        Some(Err(fault)) => fault.to_string(),
                        _ => format!("the store does not answer within {}", for_people(LOOK_WITHIN)),
                    };
                    return Report::Progress(format!("waiting for key `{key}`: {reason}"));
                }
            }
        }
    }
}

fn place(ahead: usize) -> String {
    match ahead {
        0 => "; next in line".to_owned(),
        1 => "; 1 waiter ahead".to_owned(),
        more => format!("; {more} waiters ahead"),
    }
}

/// Names the holders of the key, or the reason why it is not free.
pub(crate) fn describe(state: &KeyState, demand: Demand) -> String {
    match (state.holders.first(), state.closed_for) {
        (Some(holder), _) => {
            let others = match state.holders.len() {
                1 => String::new(),
                more => format!(" and {} more", more - 1),
            };
            let (owner, age) = (escape(&holder.owner), for_people(holder.age));
            let metadata = holder.metadata.as_deref().map(|text| format!(" ({})", cell(text))).unwrap_or_default();
            let limits = state.capacity().filter(|_| holder.units < holder.capacity && !demand.is_exclusive());
            let limits = limits.filter(|in_use| *in_use != demand.capacity());
            let limits = limits.map(|in_use| format!("; {}", limits_differ(in_use, demand.capacity())));
            let fence = holder.fence.get();
            format!("held by {owner}{metadata}{others} for {age}, fence {fence}{}", limits.unwrap_or_default())
        }
        (None, Some(left)) => format!("it stays closed for another {}", for_people(left)),
        (None, None) => "it was taken, and has become free since".to_owned(),
    }
}

fn are_held(guards: &[Guard]) -> bool {
    guards.iter().all(Guard::is_held)
}

/// Returns the time until the first of the keys is lost unless a renewal makes it longer.
fn remaining(guards: &[Guard]) -> Option<Duration> {
    guards.iter().filter_map(Guard::remaining).min()
}

/// Collects the library's events about a hold, to report an outage and to explain a loss.
#[derive(Debug)]
pub(crate) struct HoldReport {
    holds: Vec<(Key, Fence)>,
    /// The command is ended when a key is lost.
    loss_ends_command: bool,
    /// Reason that the user of a forced release gave.
    reason: Option<String>,
    warning: Option<String>,
    fault: Option<String>,
    session_ended: bool,
    is_outage_reported: bool,
    /// Time left to the holder when the outage was reported, until the store answers again. `None` also in a store whose
    /// sessions need no renewal: there the end of an outage cannot be seen here.
    left_at_outage: Option<Duration>,
}

impl HoldReport {
    pub(crate) fn new(holds: Vec<(Key, Fence)>, loss_ends_command: bool) -> Self {
        Self {
            holds,
            loss_ends_command,
            reason: None,
            warning: None,
            fault: None,
            session_ended: false,
            is_outage_reported: false,
            left_at_outage: None,
        }
    }

    /// Takes note of an event; returns a report if the user should know now.
    pub(crate) fn note(&mut self, event: stanchion::Event, guards: &[Guard]) -> Option<Report> {
        self.collect(event.clone());
        match event {
            stanchion::Event::Warning { message, .. } => Some(Report::Progress(message)),
            // Renewals begin to fail. Faults of single keys are about other requests.
            stanchion::Event::Error { key: None, message, .. } if !self.is_outage_reported && are_held(guards) => {
                let left = remaining(guards);
                (self.is_outage_reported, self.left_at_outage) = (true, left);
                let end = left.map(|left| {
                    let left = for_people(left);
                    let what =
                        if self.loss_ends_command { "the command will be ended" } else { "the key will be lost" };
                    format!("; {what} in {left} unless the store answers before that")
                });
                Some(Report::Problem(format!("{message}{}", end.unwrap_or_default())))
            }
            _ => None,
        }
    }

    /// Takes note of an event.
    pub(crate) fn collect(&mut self, event: stanchion::Event) {
        match event {
            stanchion::Event::Lost { key, fence, cause, reason, .. } if self.holds.contains(&(key.clone(), fence)) => {
                self.session_ended |= cause == LossCause::SessionExpired;
                self.reason = self.reason.take().or(reason);
            }
            stanchion::Event::Warning { message, .. } => self.warning = Some(message),
            // After the end of the session, faults are about opening another one.
            stanchion::Event::Error { key: None, message, .. } if !self.session_ended => self.fault = Some(message),
            _ => {}
        }
    }

    /// Waits until the store answers again after an outage that was reported; forever if there was none.
    pub(crate) async fn end_of_outage(&mut self, guards: &[Guard]) -> Report {
        loop {
            let Some(left) = self.left_at_outage else { std::future::pending().await };
            pause(Duration::from_millis(200)).await;
            // Only a renewal makes it longer.
            if are_held(guards) && remaining(guards).is_some_and(|now| now > left) {
                (self.is_outage_reported, self.left_at_outage) = (false, None);
                let are_held = match guards {
                    [guard] => format!("key `{}` is still held", quoted_key(guard.key().name())),
                    _ => "all keys are still held".to_owned(),
                };
                return Report::Problem(format!("the store answers again; {are_held}"));
            }
        }
    }

    /// Explains the loss: the reason of a forced release or, if the session ended, the last fault or warning of the store.
    pub(crate) fn explanation(self) -> Option<String> {
        self.reason.or_else(|| self.fault.or(self.warning).filter(|_| self.session_ended))
    }
}
