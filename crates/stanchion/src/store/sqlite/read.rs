//! Answers the requests that only read, without the gate and without a write transaction.
//!
//! If a request meets a key that must be reconciled first, it records that key and returns `None`. The worker then
//! reconciles the key in a write transaction and repeats the request there.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use rusqlite::Row;

use super::error::NAME;
use super::request::{Answer, Request};
use super::rows::{KeyRow, WaiterRow};
use super::tx::{Tx, session_of, token_of, until};
use crate::error::{Error, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::store::{LostToken, PollOutcome, Push, Queued, RenewOutcome};
use crate::token::{SessionId, TokenId};

/// Poll delay of a waiter if this process cannot watch a process on which the waiter depends.
const UNWATCHED_POLL_DELAY: Duration = Duration::from_millis(50);
/// Number of waiters at the front of a queue that get the time of the next deadline or end of a cooldown. Waiters
/// behind them are notified by a push.
const FRONT_WAITERS: u32 = 16;
/// Maximum number of holders of a key for which the poll of any waiter probes the holders' sessions. With more holders
/// only the poll of the head does so.
const MAX_HOLDERS_PROBED: i64 = 4;
/// Maximum number of tokens that a poll finds with one query each. More tokens are found in one pass over the queue.
const MAX_TOKEN_QUERIES: usize = 8;

/// A place in a queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Number of waiters before this one.
    pub(super) ahead: u32,
    /// The session of the waiter.
    pub(super) session: SessionId,
    /// The session of the waiter directly before this one.
    pub(super) before: Option<SessionId>,
}

impl Tx<'_> {
    /// Answers a reading request, or returns `None` if a key must be reconciled first.
    pub(super) fn read(&mut self, request: &Request) -> Result<Option<Answer>> {
        match request {
            Request::RenewSession(session) => Ok(self.renew_session(*session)?.map(Answer::RenewSession)),
            Request::SessionLives(session) => Ok(Some(Answer::SessionLives(self.is_open(*session)?))),
            Request::Poll { key, tokens } => Ok(self.poll(key, tokens)?.map(Answer::Poll)),
            Request::Inspect(key) => Ok(self.inspect(key)?.map(Answer::Inspect)),
            Request::List { prefix, cursor, limit } => {
                Ok(Some(Answer::List(self.list(prefix, cursor.as_ref(), *limit)?)))
            }
            _ => Ok(None),
        }
    }

    /// Returns the answer for a waiter, and watches the processes on which the waiter depends. If the waiter is the head
    /// of the queue, recalls a hold that lingers.
    pub(super) fn queued(&mut self, row: &KeyRow, token: TokenId, place: Place) -> Result<Queued> {
        let Place { ahead, session, before } = place;
        if ahead == 0
            && let Some(hold) = self.find_lingering_hold(row)?
        {
            self.push(hold.session, Push::Recall { token: hold.token });
        }
        let mut check_in = if ahead < FRONT_WAITERS { self.check_in(row) } else { None };
        if self.is_own(session) {
            let depends_on = match before {
                Some(before) => vec![before],
                None => self.holding_sessions(row)?,
            };
            let processes = self.processes(&depends_on)?;
            let state = &mut *self.state;
            if !state.predecessors.watch(&mut state.watcher, session, token, &processes) {
                check_in = Some(check_in.map_or(UNWATCHED_POLL_DELAY, |span| span.min(UNWATCHED_POLL_DELAY)));
            }
        }
        Ok(Queued { ahead, check_in, in_use: row.in_use() })
    }

    /// Returns the time until the next deadline or the end of a cooldown.
    pub(super) fn check_in(&self, row: &KeyRow) -> Option<Duration> {
        let ends = row.next_deadline().into_iter().chain(row.closed_until.filter(|_| row.is_closed(self.now)));
        ends.min().map(|end| until(self.now, end))
    }

    /// Returns the sessions of the waiters of a key.
    pub(super) fn waiting_sessions(&self, row: &KeyRow) -> Result<Vec<SessionId>> {
        self.all("SELECT DISTINCT session FROM waiters WHERE key_id = ?1", [row.id], |found| session_of(found, 0))
    }

    fn renew_session(&mut self, session: SessionId) -> Result<Option<RenewOutcome>> {
        let known = self.first("SELECT 1 FROM sessions WHERE id = ?1", [session.as_bytes()], |_| Ok(()))?.is_some();
        if !known {
            return Ok(Some(RenewOutcome::Gone));
        }
        if !self.is_alive(session)? {
            return Ok(None);
        }
        let sql = "SELECT name, token, reason FROM forced WHERE session = ?1";
        let read = |row: &Row<'_>| Ok((row.get::<_, String>(0)?, token_of(row, 1)?, row.get(2)?));
        let lost = self
            .all(sql, [session.as_bytes()], read)?
            .into_iter()
            .map(|(name, token, reason)| Ok::<_, Error>(LostToken { key: Key::from_encoded(&name)?, token, reason }));
        Ok(Some(RenewOutcome::Alive { lost: lost.collect::<Result<_>>()? }))
    }

    fn poll(&mut self, key: &Key, tokens: &[TokenId]) -> Result<Option<Vec<PollOutcome>>> {
        let Some(row) = self.find_key(key)? else { return Ok(Some(vec![PollOutcome::Gone; tokens.len()])) };
        if !self.is_reconciled(&row) {
            return Ok(None);
        }
        let places = self.places(&row, tokens)?;
        let mut all_open = true;
        for place in places.values() {
            all_open &= self.is_alive(place.session)?;
            if let Some(before) = place.before {
                all_open &= self.is_alive(before)?;
            }
        }
        let has_head = places.values().any(|place| place.before.is_none());
        if has_head || !places.is_empty() && row.holders <= MAX_HOLDERS_PROBED {
            all_open &= !self.probe_holders(&row)?;
        }
        let mut outcomes = Vec::with_capacity(tokens.len());
        for token in tokens {
            if let Some(place) = places.get(token) {
                // Watch processes only if nothing must be reconciled first, because this poll is repeated otherwise.
                if all_open {
                    outcomes.push(PollOutcome::Queued(self.queued(&row, *token, *place)?));
                }
                continue;
            }
            let hold = self.find_hold(&row, *token)?;
            if let Some(hold) = hold.filter(|hold| hold.session_bound) {
                all_open &= self.is_alive(hold.session)?;
            }
            self.forget_waiter(*token);
            outcomes.push(hold.map_or(PollOutcome::Gone, |hold| PollOutcome::Granted(hold.granted(self.now))));
        }
        if all_open && !places.is_empty() && self.next_fence(&row).is_none() {
            return Err(Fence::used_up().with_store(NAME));
        }
        Ok(all_open.then_some(outcomes))
    }

    /// Returns the places of tokens in the queue of a key. Tokens that do not wait have no entry.
    fn places(&self, row: &KeyRow, tokens: &[TokenId]) -> Result<HashMap<TokenId, Place>> {
        let mut places = HashMap::new();
        if tokens.len() <= MAX_TOKEN_QUERIES {
            for token in tokens {
                if let Some(waiter) = self.find_waiter(row, *token)? {
                    places.insert(*token, self.place_of(row, &waiter)?);
                }
            }
            return Ok(places);
        }
        // Go through the queue once, because a query for each token would count the waiters before it again.
        let wanted: HashSet<TokenId> = tokens.iter().copied().collect();
        let sql = "SELECT token, session FROM waiters INDEXED BY waiters_by_key WHERE key_id = ?1 ORDER BY seq";
        let queue = self.all(sql, [row.id], |found| Ok((token_of(found, 0)?, session_of(found, 1)?)))?;
        let mut before = None;
        for (ahead, (token, session)) in (0..).zip(queue) {
            if wanted.contains(&token) {
                places.insert(token, Place { ahead, session, before });
            }
            before = Some(session);
        }
        Ok(places)
    }

    /// Returns the place of one waiter.
    pub(super) fn place_of(&self, row: &KeyRow, waiter: &WaiterRow) -> Result<Place> {
        let sql = "SELECT count(*) FROM waiters INDEXED BY waiters_by_key WHERE key_id = ?1 AND seq < ?2";
        let ahead: i64 = self.first(sql, [row.id, waiter.seq], |found| found.get(0))?.unwrap_or(0);
        let before = if ahead > 0 { self.session_before(row.id, waiter.seq)? } else { None };
        Ok(Place { ahead: u32::try_from(ahead).unwrap_or(u32::MAX), session: waiter.session, before })
    }

    /// Returns whether no deadline has passed and no cooldown has ended. Otherwise records the key as unreconciled.
    pub(super) fn is_reconciled(&mut self, row: &KeyRow) -> bool {
        let has_ended_cooldown = row.closed_until.is_some() && !row.is_closed(self.now) && row.waiting > 0;
        let is_reconciled = !row.is_due(self.now) && !has_ended_cooldown;
        if !is_reconciled {
            self.unreconciled.push(row.id);
        }
        is_reconciled
    }
}
