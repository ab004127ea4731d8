//! Grants a key again in this process without a request, after its guard has been released.
//!
//! The first call of a key requests it from the store, and further calls of this process wait here. When the guard is released,
//! the hold goes to the next waiting call, or it *lingers* until the next call comes. [`Store::linger`](crate::Store::linger)
//! marks the hold in the store, reserves fences for local grants and confirms that the hold is live. ADR 27 has the reasons.
//!
//! # Invariants
//! 1. A local grant needs a valid session, a lease, a reserved fence, and no recall. The lease ends `linger` after the last answered
//!    request of [`Store::linger`](crate::Store::linger) was *sent*, so a lost recall delays other processes by at most `linger`.
//! 2. A hold that is being released is not granted again: its entry is removed before the release is sent.
//! 3. After a recall, only the calls that waited before it are granted the key here, for at most `linger`.
//! 4. Each key of the table has a guard, a call that requests it, or a lingering hold with a lease or a request on its way, so
//!    every waiting call gets its turn.
//! 5. Tasks are woken while the table is unlocked, because waking may drop a task, and its guards lock the table. The table is locked
//!    before the token table.

use std::collections::{HashMap, VecDeque};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::clock::BootTime;
use crate::command::{Cleanup, Command};
use crate::error::{Error, ErrorKind, LossCause, Result};
use crate::event::{Event, LingerEnd};
use crate::fence::Fence;
use crate::key::Key;
use crate::lease::Hold;
use crate::lifecycle::Phase;
use crate::on_lost::OnLost;
use crate::shared::Shared;
use crate::store::LingerOutcome;
use crate::token::{SessionId, TokenId};

/// Shortest and longest time for which a hold may linger.
const LINGER_RANGE: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(30);

/// Maximum number of keys whose history is remembered while they have no entry.
const MAX_HISTORIES: usize = 1_024;

/// Maximum number of times that the back-off of a key doubles.
const MAX_DOUBLINGS: u32 = 6;

/// Minimum number of waiting calls at which those that gave up are removed.
const REMOVE_CLOSED_AT: usize = 64;

/// Rejects a time outside of [`LINGER_RANGE`]. Zero means that the hold never lingers.
pub(crate) fn check_linger(linger: Duration) -> Result<()> {
    if linger.is_zero() || LINGER_RANGE.contains(&linger) {
        return Ok(());
    }
    let message = format!("linger is {linger:?}: it must be between 10 ms and 30 s, or zero");
    Err(Error::new(ErrorKind::InvalidArgument, message))
}

/// The keys that calls with `linger` use.
#[derive(Debug, Default)]
pub(crate) struct Lingering {
    /// Whether the table may have an entry. A handle without `linger` never locks the table.
    is_used: AtomicBool,
    table: Mutex<Table>,
}

impl Lingering {
    pub(crate) fn is_used(&self) -> bool {
        self.is_used.load(Ordering::Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct Table {
    keys: HashMap<Key, LocalKey>,
    /// The histories of keys without an entry.
    histories: HashMap<Key, History>,
}

/// A key that a call of this process requests from the store, uses, or has kept.
#[derive(Debug)]
struct LocalKey {
    /// The hold of this process. `None` while a call requests the key.
    hold: Option<LocalHold>,
    /// The calls that wait for their turn in this process, in the order of their arrival.
    waiting: VecDeque<Waiting>,
    /// Number of waiting calls at which those that gave up are removed.
    remove_closed_at: usize,
    history: History,
}

#[derive(Debug)]
struct Waiting {
    turn: oneshot::Sender<Turn>,
    usage: Usage,
}

/// How a call uses the key.
#[derive(Clone, Debug)]
pub(crate) struct Usage {
    /// Time for which the hold may linger.
    pub(crate) linger: Duration,
    pub(crate) heartbeat_within: Option<Duration>,
    pub(crate) on_lost: Option<OnLost>,
}

/// A hold of this process that may be granted again.
#[derive(Debug)]
struct LocalHold {
    /// The hold of the last guard.
    hold: Arc<Hold>,
    /// The last fence that was used, or that must not be used.
    used: Fence,
    in_use: bool,
    linger: Duration,
    /// The highest fence that the store has reserved for local grants.
    up_to: Fence,
    /// Number of fences that were left when the store last answered.
    reserved: u64,
    lease_until: BootTime,
    /// Whether a request to linger is on its way.
    is_asking: bool,
    recalled_at: Option<BootTime>,
    /// Whether a call used the hold since the store last answered.
    was_used: bool,
    /// Time since when the store may have been replaced by an older copy. Answers to earlier requests count for nothing.
    doubtful_since: Option<BootTime>,
    /// Number of local grants.
    grants: u64,
}

/// The past use of a key in this process. It decides whether the key lingers.
#[derive(Clone, Copy, Debug)]
struct History {
    returned_at: Option<BootTime>,
    /// Time until which calls request the key as they would without `linger`.
    off_until: BootTime,
    /// Number of consecutive recalls of a hold that nobody used while it lingered.
    unused: u32,
}

impl Default for History {
    fn default() -> Self {
        Self { returned_at: None, off_until: BootTime::from_nanos(0), unused: 0 }
    }
}

impl History {
    /// Notes a recall. A hold that lingers without being used costs others a round trip and helps nobody, so the key does not linger
    /// for a time that doubles with each such recall.
    fn recalled(&mut self, now: BootTime, was_used: bool, linger: Duration) {
        if was_used {
            self.unused = 0;
        } else {
            self.unused = (self.unused + 1).min(MAX_DOUBLINGS);
            self.off_until = now.after(linger * 2_u32.pow(self.unused));
        }
    }
}

/// The next step of a call that waited for its turn.
#[derive(Debug)]
pub(crate) enum Turn {
    /// The key was granted.
    Granted(Arc<Hold>),
    /// The call requests the key from the store for this process.
    Request,
    /// The call requests the key for itself, as it would without `linger`.
    Plain,
}

/// The first step of a call with `linger`.
pub(crate) enum Entered<'a> {
    /// The key was granted.
    Granted(Arc<Hold>),
    /// The call requests the key from the store for this process.
    Request(Requester<'a>),
    /// The call waits for its turn. With the number of calls of this process before it.
    Wait(TurnWait<'a>, u32),
    /// The call requests the key for itself, as it would without `linger`.
    Plain,
    /// The call does not wait, and another call of this process holds the key.
    Busy,
}

/// Work that is left to do when the table is unlocked (invariant 5).
#[derive(Default)]
#[must_use]
struct After {
    cleanup: Option<Cleanup>,
    /// The hold for which the keeper sends a request to linger.
    ask: Option<Arc<Hold>>,
    event: Option<Event>,
    lost: Option<Arc<Hold>>,
    turn: Option<(oneshot::Sender<Turn>, Turn)>,
    plain: VecDeque<Waiting>,
}

impl After {
    fn finish(mut self, shared: &Shared, key: &Key) {
        loop {
            if let Some(event) = self.event.take() {
                shared.observer.publish(|| event);
            }
            if let Some(hold) = self.lost.take() {
                shared.lose(&hold, LossCause::Missing, None);
            }
            if let Some(cleanup) = self.cleanup.take() {
                shared.clean_up(cleanup);
            }
            if let Some(hold) = self.ask.take() {
                shared.command(Command::Linger(hold));
            }
            for waiting in self.plain.drain(..) {
                let _ = waiting.turn.send(Turn::Plain); // a call that gave up needs no turn
            }
            let Some((waiting, turn)) = self.turn.take() else { return };
            let Err(turn) = waiting.send(turn) else { return };
            self = take_turn_back(shared, key, turn);
        }
    }
}

/// Changes the table, and does the work that this leaves.
fn change<T>(shared: &Shared, key: &Key, change: impl FnOnce(&mut Table, BootTime, &mut After) -> T) -> T {
    let mut after = After::default();
    let mut table = shared.lingering.lock();
    let result = change(&mut table, shared.clock.now(), &mut after);
    drop(table);
    after.finish(shared, key);
    result
}

/// Takes back the turn of a call that gave up, and gives it to the next one.
fn take_turn_back(shared: &Shared, key: &Key, turn: Turn) -> After {
    let mut after = After::default();
    let mut table = shared.lingering.lock();
    let now = shared.clock.now();
    match turn {
        Turn::Granted(hold) => {
            hold.begin_release();
            if !table.take_back(shared, &hold, now, &mut after) {
                after.cleanup = Some(Cleanup::of_hold(&hold, None));
            }
        }
        Turn::Request => table.pass_on(key, now, &mut after),
        Turn::Plain => {}
    }
    after
}

/// Enters a call that wants a key. `waits` says whether the call waits for a key that is in use.
pub(crate) fn enter<'a>(shared: &'a Shared, key: &'a Key, usage: &Usage, waits: bool) -> Entered<'a> {
    shared.lingering.is_used.store(true, Ordering::Release);
    change(shared, key, |table, now, after| table.enter(shared, key, usage, waits, now, after))
}

/// Takes back a hold whose guard is being released. Returns whether the hold stays in this process. Otherwise the guard releases it
/// in the store. `report` is called before another call gets the hold.
pub(crate) fn give_back(shared: &Shared, hold: &Arc<Hold>, report: impl FnOnce()) -> bool {
    let mut after = After::default();
    let mut table = shared.lingering.lock();
    let stays = table.take_back(shared, hold, shared.clock.now(), &mut after);
    drop(table);
    if stays {
        report();
    }
    after.finish(shared, &hold.key);
    stays
}

/// Removes a hold that its guard detaches or releases in the store: it is not granted again.
pub(crate) fn remove(shared: &Shared, hold: &Hold) {
    if !shared.lingering.is_used() {
        return;
    }
    change(shared, &hold.key, |table, now, after| {
        if table.local(&hold.key, hold.token).is_some() {
            table.end(&hold.key, LingerEnd::Released, now, after);
        }
    });
}

/// Marks a hold as lost, and removes it. Returns whether this call marked it, and the hold of another guard that the process has
/// granted since under the same token: that hold is lost too.
pub(crate) fn mark_lost(shared: &Shared, hold: &Arc<Hold>, cause: LossCause) -> (bool, Option<Arc<Hold>>) {
    if !shared.lingering.is_used() {
        return (hold.mark_lost(cause), None);
    }
    // Under the table's lock, so that no call is granted the hold after it was marked.
    change(shared, &hold.key, |table, now, after| {
        let is_first = hold.mark_lost(cause);
        let Some(local) = table.local(&hold.key, hold.token) else { return (is_first, None) };
        let current = (local.in_use && !Arc::ptr_eq(&local.hold, hold)).then(|| local.hold.clone());
        table.end(&hold.key, LingerEnd::Lost, now, after);
        (is_first, current)
    })
}

/// Handles the message that another request waits for the key of a hold.
pub(crate) fn recalled(shared: &Shared, hold: &Hold) {
    change(shared, &hold.key, |table, now, after| table.recalled(shared, hold, now, after));
}

/// Releases a lingering hold that the store has ended or may have granted again.
pub(crate) fn forget(shared: &Shared, hold: &Hold) {
    change(shared, &hold.key, |table, now, after| {
        if table.local(&hold.key, hold.token).is_some_and(|local| !local.in_use) {
            table.release(&hold.key, LingerEnd::Lost, now, after);
        }
    });
}

/// Compares a grant of the store with the hold of another token that this process has of the key. The store granted both, so the
/// older one is lost, whichever message came first.
pub(crate) fn superseded(shared: &Shared, granted: &Arc<Hold>) {
    change(shared, &granted.key, |table, now, after| {
        let other = table.keys.get(&granted.key).and_then(|entry| entry.hold.as_ref());
        let Some(other) = other.filter(|other| other.hold.token != granted.token) else { return };
        if other.hold.granted > granted.granted {
            after.lost = Some(granted.clone());
        } else if other.in_use {
            after.lost = Some(other.hold.clone());
            table.end(&granted.key, LingerEnd::Lost, now, after);
        } else {
            table.release(&granted.key, LingerEnd::Lost, now, after);
        }
    });
}

/// Releases the lingering hold of a key. Returns whether there was one.
pub(crate) async fn release_unused(shared: &Shared, key: &Key) -> Result<bool> {
    let released = change(shared, key, |table, now, after| {
        let local = table.keys.get(key)?.hold.as_ref().filter(|local| !local.in_use)?;
        let token = local.hold.token;
        table.release(key, LingerEnd::Released, now, after);
        Some(token)
    });
    let Some(token) = released else { return Ok(false) };
    // The keeper releases the token too, also if this future is dropped. This request is for the answer.
    let step = shared.step(|| shared.store.release(key, token, None)).await;
    step.result.map(|_| true).map_err(|error| error.with_key(key))
}

/// Returns the keys whose hold lingers.
pub(crate) fn unused_keys(shared: &Shared) -> Vec<Key> {
    let table = shared.lingering.lock();
    let unused = |entry: &LocalKey| entry.hold.as_ref().is_some_and(|local| !local.in_use);
    table.keys.iter().filter(|(_, entry)| unused(entry)).map(|(key, _)| key.clone()).collect()
}

/// Gives up what lingers, because the handle drains. Holds in use are released with their guards.
pub(crate) fn drain(shared: &Shared) {
    for (key, hold) in holds(shared) {
        change(shared, &key, |table, now, after| {
            let Some(local) = table.local(&key, hold.token) else { return };
            local.recalled_at.get_or_insert(now);
            if !local.in_use {
                table.release(&key, LingerEnd::Released, now, after);
            }
        });
    }
}

/// Removes the holds of a session that is over, or of all sessions.
pub(crate) fn end_of_session(shared: &Shared, session: Option<SessionId>) {
    for (key, hold) in holds(shared) {
        if session.is_none_or(|session| session == hold.session.id) {
            change(shared, &key, |table, now, after| {
                if table.local(&key, hold.token).is_some() {
                    table.end(&key, LingerEnd::Lost, now, after);
                }
            });
        }
    }
}

/// Returns all holds of the table for a request to linger, because the store may have been replaced by an older copy. Until the
/// answer they are not granted.
pub(crate) fn ask_for_all(shared: &Shared) -> Vec<Arc<Hold>> {
    let mut table = shared.lingering.lock();
    let now = shared.clock.now();
    let locals = table.keys.values_mut().filter_map(|entry| entry.hold.as_mut());
    let doubt = |local: &mut LocalHold| {
        local.doubtful_since = Some(now);
        // No local grant before the answer.
        local.lease_until = BootTime::from_nanos(0);
        local.ask()
    };
    locals.map(doubt).collect()
}

fn holds(shared: &Shared) -> Vec<(Key, Arc<Hold>)> {
    if !shared.lingering.is_used() {
        return Vec::new();
    }
    let table = shared.lingering.lock();
    let holds = table.keys.iter().filter_map(|(key, entry)| Some((key.clone(), entry.hold.as_ref()?.hold.clone())));
    holds.collect()
}

/// Handles the answer to a request to linger that was sent at `sent_at`. `None` means that there was no answer. Returns the end of
/// the lease, if the hold lingers on.
pub(crate) fn answered(
    shared: &Shared,
    hold: &Hold,
    sent_at: BootTime,
    answer: Option<LingerOutcome>,
) -> Option<BootTime> {
    change(shared, &hold.key, |table, now, after| {
        let key = &hold.key;
        let local = table.local(key, hold.token)?;
        if local.doubtful_since.is_some_and(|since| sent_at < since) {
            // The request of that time is on its way.
            return None;
        }
        local.is_asking = false;
        match answer {
            Some(LingerOutcome::Lingers { fence, up_to }) if fence == hold.granted => {
                local.up_to = local.up_to.max(up_to);
                // An older copy may lack grants that were made since its last write, under fences below its clock.
                if local.doubtful_since.take().is_some() {
                    local.used = local.used.max(Fence::new(up_to.get().saturating_sub(1)));
                }
                local.reserved = local.left();
                local.lease_until = local.lease_until.max(sent_at.after(local.linger));
                local.was_used = local.in_use && local.grants > 0;
            }
            Some(LingerOutcome::Wanted) => table.recalled(shared, hold, now, after),
            // Another copy of the store granted the token again, maybe after others, or the store has nothing of it.
            Some(LingerOutcome::Lingers { .. } | LingerOutcome::Gone) => {
                if local.in_use && !local.hold.is_releasing() {
                    after.lost = Some(local.hold.clone());
                    table.end(key, LingerEnd::Lost, now, after);
                } else {
                    table.release(key, LingerEnd::Lost, now, after);
                }
            }
            None => {}
        }
        let local = table.local(key, hold.token)?;
        let lease_until = local.lease_until;
        if !local.in_use {
            table.decide(shared, key, true, now, after);
        }
        Some(lease_until)
    })
}

/// Releases a lingering hold whose lease is over.
pub(crate) fn lease_ended(shared: &Shared, hold: &Hold) {
    change(shared, &hold.key, |table, now, after| {
        if let Some(local) = table.local(&hold.key, hold.token)
            && !local.in_use
            && !local.is_asking
            && now >= local.lease_until
        {
            table.release(&hold.key, LingerEnd::Unused, now, after);
        }
    });
}

impl Table {
    /// Returns the hold of a token.
    fn local(&mut self, key: &Key, token: TokenId) -> Option<&mut LocalHold> {
        self.keys.get_mut(key)?.hold.as_mut().filter(|local| local.hold.token == token)
    }

    fn enter<'a>(
        &mut self,
        shared: &'a Shared,
        key: &'a Key,
        usage: &Usage,
        waits: bool,
        now: BootTime,
        after: &mut After,
    ) -> Entered<'a> {
        let Some(entry) = self.keys.get_mut(key) else {
            let history = self.histories.get(key).copied().unwrap_or_default();
            // Without messages nobody could recall the hold.
            if now < history.off_until || !shared.capabilities.push {
                return Entered::Plain;
            }
            self.histories.remove(key);
            let entry = LocalKey { hold: None, waiting: VecDeque::new(), remove_closed_at: REMOVE_CLOSED_AT, history };
            self.keys.insert(key.clone(), entry);
            return Entered::Request(Requester::new(shared, key));
        };
        let Some(local) = &mut entry.hold else {
            return if waits { entry.wait(shared, key, usage) } else { Entered::Plain };
        };
        if local.in_use && !waits {
            return Entered::Busy;
        }
        if local.recalled_at.is_some() || !local.hold.session.is_valid(now) {
            return Entered::Plain;
        }
        if !local.in_use && local.may_grant(now) {
            return local.grant(shared, now, usage).map_or(Entered::Plain, Entered::Granted);
        }
        if !local.may_grant(now) && !local.is_asking {
            after.ask = Some(local.ask());
        }
        entry.wait(shared, key, usage)
    }

    /// Takes back the hold of a guard. Returns whether it stays in this process.
    fn take_back(&mut self, shared: &Shared, hold: &Arc<Hold>, now: BootTime, after: &mut After) -> bool {
        let key = &hold.key;
        let Some(entry) = self.keys.get_mut(key) else { return false };
        let Some(local) = entry.hold.as_mut().filter(|local| Arc::ptr_eq(&local.hold, hold)) else { return false };
        if hold.ended(now).is_some() {
            self.end(key, LingerEnd::Lost, now, after);
            return false;
        }
        let is_wanted = entry.waiting.iter().any(|waiting| !waiting.turn.is_closed());
        // A key that this process uses once costs the same as without `linger`.
        let is_used_again = entry.history.returned_at.is_some_and(|at| now.since(at) < local.linger);
        entry.history.returned_at = Some(now);
        let (stays, end) = match local.recalled_at {
            Some(_) => (is_wanted && local.may_grant(now), LingerEnd::Recalled),
            None => (is_wanted || is_used_again, LingerEnd::Unused),
        };
        if !stays || !shared.tokens.linger(hold) {
            self.end(key, end, now, after);
            return false;
        }
        local.in_use = false;
        self.decide(shared, key, false, now, after);
        true
    }

    fn recalled(&mut self, shared: &Shared, hold: &Hold, now: BootTime, after: &mut After) {
        let Some(entry) = self.keys.get_mut(&hold.key) else { return };
        let Some(local) = entry.hold.as_mut().filter(|local| local.hold.token == hold.token) else { return };
        if local.recalled_at.is_none() {
            local.recalled_at = Some(now);
            entry.history.recalled(now, local.was_used, local.linger);
        }
        if !local.in_use {
            self.decide(shared, &hold.key, false, now, after);
        }
    }

    /// Decides what happens to a hold that nobody uses: the next waiting call gets it, it lingers, or it is released.
    /// `is_answered` says whether a request to linger has just ended.
    fn decide(&mut self, shared: &Shared, key: &Key, is_answered: bool, now: BootTime, after: &mut After) {
        let Some(entry) = self.keys.get_mut(key) else { return };
        let Some(local) = &mut entry.hold else { return };
        while local.may_grant(now)
            && let Some(waiting) = entry.waiting.pop_front()
        {
            if waiting.turn.is_closed() {
                continue;
            }
            match local.grant(shared, now, &waiting.usage) {
                Some(hold) => {
                    if local.is_low(now) && !local.is_asking {
                        after.ask = Some(local.ask());
                    }
                    after.turn = Some((waiting.turn, Turn::Granted(hold)));
                    return;
                }
                // The session is over or the handle drains: the call finds that out by itself.
                None => after.plain.push_back(waiting),
            }
        }
        let may_grant = local.may_grant(now);
        if local.recalled_at.is_some() {
            self.release(key, LingerEnd::Recalled, now, after);
        } else if !may_grant && is_answered {
            self.release(key, LingerEnd::Unused, now, after);
        } else if (!may_grant || local.is_low(now)) && !local.is_asking {
            after.ask = Some(local.ask());
        }
    }

    /// Ends the hold of a key and releases it in the store.
    fn release(&mut self, key: &Key, end: LingerEnd, now: BootTime, after: &mut After) {
        if let Some(local) = self.keys.get(key).and_then(|entry| entry.hold.as_ref()) {
            after.cleanup = Some(Cleanup::of_hold(&local.hold, None));
        }
        self.end(key, end, now, after);
    }

    /// Ends the hold of a key: it is not granted here again.
    fn end(&mut self, key: &Key, end: LingerEnd, now: BootTime, after: &mut After) {
        if let Some(local) = self.keys.get_mut(key).and_then(|entry| entry.hold.take())
            && local.has_lingered()
        {
            after.event = Some(Event::LingerEnded { key: key.clone(), grants: local.grants, end });
        }
        self.pass_on(key, now, after);
    }

    /// Lets the next waiting call request a key for which this process has neither a hold nor a request.
    fn pass_on(&mut self, key: &Key, now: BootTime, after: &mut After) {
        let Some(entry) = self.keys.get_mut(key) else { return };
        // While the key does not linger, every call requests it for itself.
        if now >= entry.history.off_until {
            while let Some(waiting) = entry.waiting.pop_front() {
                if !waiting.turn.is_closed() {
                    after.turn = Some((waiting.turn, Turn::Request));
                    return;
                }
            }
        }
        self.leave(key, now, after);
    }

    /// Removes the entry of a key. Its waiting calls request the key for themselves.
    fn leave(&mut self, key: &Key, now: BootTime, after: &mut After) {
        let Some(LocalKey { waiting, history, .. }) = self.keys.remove(key) else { return };
        after.plain.extend(waiting);
        if self.histories.len() >= MAX_HISTORIES {
            let is_recent = |at: BootTime| now.since(at) < *LINGER_RANGE.end();
            self.histories.retain(|_, history| history.off_until > now || history.returned_at.is_some_and(is_recent));
            if self.histories.len() >= MAX_HISTORIES {
                self.histories.clear();
            }
        }
        self.histories.insert(key.clone(), history);
    }
}

impl LocalKey {
    /// Lets a call wait for its turn.
    fn wait<'a>(&mut self, shared: &'a Shared, key: &'a Key, usage: &Usage) -> Entered<'a> {
        if self.waiting.len() >= self.remove_closed_at {
            self.waiting.retain(|waiting| !waiting.turn.is_closed());
            self.remove_closed_at = REMOVE_CLOSED_AT.max(self.waiting.len() * 2);
        }
        let ahead = u32::try_from(self.waiting.len()).unwrap_or(u32::MAX);
        let (turn, receiver) = oneshot::channel();
        self.waiting.push_back(Waiting { turn, usage: usage.clone() });
        Entered::Wait(TurnWait { shared, key, turn: receiver }, ahead)
    }
}

impl LocalHold {
    /// Returns whether the hold may be granted here (invariants 1 and 3).
    fn may_grant(&self, now: BootTime) -> bool {
        let is_in_time = self.recalled_at.is_none_or(|at| now < at.after(self.linger));
        now < self.lease_until && self.left() > 0 && self.hold.session.is_valid(now) && is_in_time
    }

    /// Returns the number of reserved fences that are left.
    fn left(&self) -> u64 {
        self.up_to.get().saturating_sub(self.used.get())
    }

    /// Returns whether less than half of the lease or of the reserved fences is left.
    fn is_low(&self, now: BootTime) -> bool {
        self.lease_until.since(now) < self.linger / 2 || self.left() < self.reserved / 2
    }

    fn has_lingered(&self) -> bool {
        self.reserved > 0
    }

    /// Notes that a request to linger is sent, and returns the hold for it.
    fn ask(&mut self) -> Arc<Hold> {
        self.is_asking = true;
        self.hold.clone()
    }

    /// Grants the hold to a call of this process, under the next fence. Returns `None` if the session is over or the handle drains.
    fn grant(&mut self, shared: &Shared, now: BootTime, usage: &Usage) -> Option<Arc<Hold>> {
        let fence = Fence::new(self.used.get() + 1);
        let hold = Arc::new(self.hold.granted_again(now, fence, usage.heartbeat_within, usage.on_lost.clone()));
        let is_valid = || hold.ended(now).is_none() && !shared.lifecycle.has_reached(Phase::Draining);
        shared.tokens.grant_again(&hold, is_valid).then(|| {
            (self.in_use, self.was_used, self.linger) = (true, true, usage.linger);
            (self.used, self.grants) = (fence, self.grants + 1);
            self.hold = hold.clone();
            hold
        })
    }
}

/// The role of the one call that requests a key from the store for this process. A drop passes it on to the next waiting call.
pub(crate) struct Requester<'a> {
    shared: &'a Shared,
    key: &'a Key,
    is_over: bool,
}

impl<'a> Requester<'a> {
    fn new(shared: &'a Shared, key: &'a Key) -> Self {
        Self { shared, key, is_over: false }
    }

    /// Enters the hold that the store has granted.
    pub(crate) fn granted(mut self, hold: &Arc<Hold>, linger: Duration) {
        self.is_over = true;
        change(self.shared, self.key, |table, now, after| {
            let Some(entry) = table.keys.get_mut(self.key) else { return };
            // A hold is marked as lost before the table is locked to remove it.
            if hold.ended(now).is_some() {
                return table.pass_on(self.key, now, after);
            }
            let is_draining = self.shared.lifecycle.has_reached(Phase::Draining);
            let local = entry.hold.insert(LocalHold {
                hold: hold.clone(),
                used: hold.fence,
                in_use: true,
                linger,
                up_to: hold.fence,
                reserved: 0,
                lease_until: BootTime::from_nanos(0),
                is_asking: false,
                recalled_at: is_draining.then_some(now),
                was_used: false,
                doubtful_since: None,
                grants: 0,
            });
            if !entry.waiting.is_empty() {
                after.ask = Some(local.ask());
            }
        });
    }

    /// Ends the role after the request failed: the waiting calls request the key for themselves, so that they fail within their own
    /// time limits.
    pub(crate) fn failed(mut self) {
        self.is_over = true;
        change(self.shared, self.key, |table, now, after| table.leave(self.key, now, after));
    }
}

impl Drop for Requester<'_> {
    fn drop(&mut self) {
        // In a forked child another thread may hold the table's lock for ever.
        if !self.is_over && self.shared.is_own_process() {
            change(self.shared, self.key, |table, now, after| table.pass_on(self.key, now, after));
        }
    }
}

/// A call that waits for its turn. A turn that comes after the call gave up goes to the next call.
pub(crate) struct TurnWait<'a> {
    shared: &'a Shared,
    key: &'a Key,
    turn: oneshot::Receiver<Turn>,
}

impl<'a> TurnWait<'a> {
    /// Waits for the turn. Dropping the future loses nothing.
    pub(crate) async fn turn(&mut self) -> Turn {
        (&mut self.turn).await.unwrap_or(Turn::Plain)
    }

    /// Takes the role of a call that got [`Turn::Request`].
    pub(crate) fn requester(&self) -> Requester<'a> {
        Requester::new(self.shared, self.key)
    }
}

impl Drop for TurnWait<'_> {
    fn drop(&mut self) {
        self.turn.close();
        if let Ok(turn) = self.turn.try_recv()
            && self.shared.is_own_process()
        {
            take_turn_back(self.shared, self.key, turn).finish(self.shared, self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::VirtualClock;
    use crate::guard::Guard;
    use crate::locks::Locks;
    use crate::store::Memory;

    const LINGER: Duration = Duration::from_secs(10);

    async fn open() -> (VirtualClock, Locks) {
        let time = VirtualClock::new();
        let store = Memory::with_clock(time.clock());
        let locks = Locks::builder_with_store(store).clock(time.clock()).linger(LINGER).open().await.unwrap();
        (time, locks)
    }

    fn key() -> Key {
        Key::new("", "k").unwrap()
    }

    /// Answers a request to linger for the hold of a guard, with fences above its own by these numbers.
    fn answer(locks: &Locks, guard: &Guard, fence: u64, up_to: u64) {
        let shared = &locks.handle.shared;
        let above = |by: u64| Fence::new(guard.hold().granted.get() + by);
        let outcome = LingerOutcome::Lingers { fence: above(fence), up_to: above(up_to) };
        answered(shared, guard.hold(), shared.clock.now(), Some(outcome));
    }

    fn has_entry(locks: &Locks) -> bool {
        locks.handle.shared.lingering.lock().keys.contains_key(&key())
    }

    #[tokio::test]
    async fn answer_with_another_fence_loses_the_hold() {
        let (_time, locks) = open().await;
        let guard = locks.lock("k").await.unwrap();
        answer(&locks, &guard, 0, 10);
        assert!(guard.is_held() && has_entry(&locks));
        answer(&locks, &guard, 1, 20);
        assert_eq!(guard.loss(), Some(LossCause::Missing));
        assert!(!has_entry(&locks));
    }

    #[tokio::test]
    async fn hold_that_ends_on_its_return_leaves_no_entry() {
        let (time, locks) = open().await;
        let guard = locks.lock("k").heartbeat_within(Duration::from_secs(1)).await.unwrap();
        // The guard looked at the clock a moment earlier.
        let hold = guard.hold().clone();
        std::mem::forget(guard);
        time.advance(Duration::from_secs(1));
        assert!(!give_back(&locks.handle.shared, &hold, || unreachable!("the hold has ended")));
        assert!(!has_entry(&locks));
    }

    #[tokio::test]
    async fn older_copy_reserves_only_its_newest_fence() {
        let (_time, locks) = open().await;
        let shared = &locks.handle.shared;
        for (is_doubtful, expected) in [(false, 1), (true, 10)] {
            let guard = locks.lock("k").await.unwrap();
            answer(&locks, &guard, 0, 5);
            shared.lingering.lock().histories.clear();
            if is_doubtful {
                assert_eq!(ask_for_all(shared).len(), 1);
            }
            answer(&locks, &guard, 0, 10);
            {
                let mut table = shared.lingering.lock();
                let local = table.local(&key(), guard.hold().token).unwrap();
                assert!(local.may_grant(shared.clock.now()));
                assert_eq!(local.used.get() + 1 - guard.hold().granted.get(), expected);
            }
            guard.forbid_linger();
            guard.release().await.unwrap();
        }
    }

    #[tokio::test]
    async fn older_of_two_grants_is_lost() {
        let (_time, locks) = open().await;
        let shared = &locks.handle.shared;
        for (fence, newcomer_is_lost) in [(0, true), (u64::MAX, false)] {
            let guard = locks.lock("k").await.unwrap();
            let other = locks.lock("other").await.unwrap();
            let (hold, other) = (guard.hold(), other.hold());
            let newcomer = Arc::new(Hold::new(crate::lease::NewHold {
                key: key(),
                token: other.token,
                fence: Fence::new(fence),
                session: hold.session.clone(),
                session_bound: true,
                since: shared.clock.now(),
                deadline: None,
                heartbeat_within: None,
                unanswered_until: None,
                on_lost: None,
            }));
            superseded(shared, &newcomer);
            assert_eq!(newcomer.ended(shared.clock.now()).is_some(), newcomer_is_lost);
            assert_eq!(guard.is_held(), newcomer_is_lost);
            assert_eq!(has_entry(&locks), newcomer_is_lost);
            guard.forbid_linger();
            let _ = guard.release().await.unwrap();
        }
    }

    #[tokio::test]
    async fn histories_are_limited() {
        let (time, locks) = open().await;
        for number in 0..3 * MAX_HISTORIES {
            locks.lock(format!("k{number}")).await.unwrap().release().await.unwrap();
        }
        let shared = &locks.handle.shared;
        assert!(shared.lingering.lock().histories.len() <= MAX_HISTORIES);
        time.advance(*LINGER_RANGE.end());
        for number in 0..MAX_HISTORIES {
            locks.lock(format!("later{number}")).await.unwrap().release().await.unwrap();
        }
        assert!(shared.lingering.lock().keys.is_empty());
    }
}
