//! The steps that only look. They run without the gate and without a write transaction.
//!
//! Each tells `None` if it has met something that has to be settled first; it has noted then what that is, and is
//! repeated in a write transaction after that was settled.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use rusqlite::Row;

use super::error::NAME;
use super::rows::{KeyRow, WaiterRow};
use super::steps::{Answer, Operation};
use super::tx::{Tx, session_of, token_of, until};
use crate::error::{Error, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::store::{KeyState, LostToken, PollOutcome, Queued, RenewOutcome};
use crate::token::{SessionId, TokenId};

/// How soon a waiter asks again if nobody can tell it of the end of the process that it depends on.
const UNWATCHED: Duration = Duration::from_millis(50);
/// Waiters near the front are told when time alone may change something; those behind them hear of it by a push.
const NEAR_THE_FRONT: u32 = 16;
/// So many holders are probed for every waiter that asks, more of them only for the head of the queue.
const FEW_HOLDERS: i64 = 4;
/// Up to this number of tokens are looked up one by one, more of them in one pass over the queue.
const FEW_TOKENS: usize = 8;

/// A place in a queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// The number of waiters before it.
    pub(super) ahead: u32,
    /// The session of the waiter.
    pub(super) session: SessionId,
    /// The session of the waiter before it.
    pub(super) before: Option<SessionId>,
}

impl Tx<'_> {
    /// Answers a reading step, or tells `None`: something is to be settled first.
    pub(super) fn read(&mut self, step: &Operation) -> Result<Option<Answer>> {
        match step {
            Operation::RenewSession(session) => Ok(self.renew_session(*session)?.map(Answer::Renewed)),
            Operation::Lives(session) => Ok(Some(Answer::Lives(self.is_open(*session)?))),
            Operation::Poll { key, tokens } => Ok(self.poll(key, tokens)?.map(Answer::Poll)),
            Operation::Inspect(key) => Ok(self.inspect(key)?.map(Answer::Inspect)),
            Operation::List { prefix, cursor, limit } => {
                Ok(Some(Answer::List(self.list(prefix, cursor.as_ref(), *limit)?)))
            }
            _ => Ok(None),
        }
    }

    /// The answer to a waiter, and its watch on the processes that it depends on.
    pub(super) fn queued(&mut self, row: &KeyRow, token: TokenId, place: Place) -> Result<Queued> {
        let Place { ahead, session, before } = place;
        let mut check_in = if ahead < NEAR_THE_FRONT { self.check_in(row) } else { None };
        if self.is_own(session) {
            let depends_on = match before {
                Some(before) => vec![before],
                None => self.holding_sessions(row)?,
            };
            let processes = self.processes(&depends_on)?;
            let local = &mut *self.local;
            if !local.predecessors.watch(&mut local.watcher, session, token, &processes) {
                check_in = Some(check_in.map_or(UNWATCHED, |span| span.min(UNWATCHED)));
            }
        }
        Ok(Queued { ahead, check_in, in_use: row.in_use() })
    }

    /// When time alone may change something: a deadline, the end of a cooldown.
    pub(super) fn check_in(&self, row: &KeyRow) -> Option<Duration> {
        let ends = row.next_deadline().into_iter().chain(row.closed_until.filter(|_| row.is_closed(self.now)));
        ends.min().map(|end| until(self.now, end))
    }

    /// Waiters whose process is dead are gone.
    pub(super) fn reap_dead_waiters(&mut self, row: &mut KeyRow) -> Result<()> {
        for session in self.waiting_sessions(row)? {
            self.is_alive(session)?;
        }
        self.reap_found(row)
    }

    fn waiting_sessions(&self, row: &KeyRow) -> Result<Vec<SessionId>> {
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
        if !self.is_settled(&row) {
            return Ok(None);
        }
        let places = self.places(&row, tokens)?;
        let mut all_alive = true;
        for place in places.values() {
            all_alive &= self.is_alive(place.session)?;
            if let Some(before) = place.before {
                all_alive &= self.is_alive(before)?;
            }
        }
        let has_head = places.values().any(|place| place.before.is_none());
        if has_head || !places.is_empty() && row.holders <= FEW_HOLDERS {
            all_alive &= !self.probe_holders(&row)?;
        }
        let mut outcomes = Vec::with_capacity(tokens.len());
        for token in tokens {
            if let Some(place) = places.get(token) {
                // A watch is set only where nothing has to be settled first.
                if all_alive {
                    outcomes.push(PollOutcome::Queued(self.queued(&row, *token, *place)?));
                }
                continue;
            }
            let hold = self.find_hold(&row, *token)?;
            if let Some(hold) = hold.filter(|hold| hold.session_bound) {
                all_alive &= self.is_alive(hold.session)?;
            }
            self.forget_waiter(*token);
            outcomes.push(hold.map_or(PollOutcome::Gone, |hold| PollOutcome::Granted(hold.granted(self.now))));
        }
        if all_alive && !places.is_empty() && self.next_fence(&row).is_none() {
            return Err(Fence::used_up().with_store(NAME));
        }
        Ok(all_alive.then_some(outcomes))
    }

    /// The places that tokens have in the queue of a key. A token that does not wait has none.
    fn places(&self, row: &KeyRow, tokens: &[TokenId]) -> Result<HashMap<TokenId, Place>> {
        let mut places = HashMap::new();
        if tokens.len() <= FEW_TOKENS {
            for token in tokens {
                if let Some(waiter) = self.find_waiter(row, *token)? {
                    places.insert(*token, self.place_of(row, &waiter)?);
                }
            }
            return Ok(places);
        }
        // One pass over the queue: a look for each token would count those before it again and again.
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

    /// The place of one waiter.
    pub(super) fn place_of(&self, row: &KeyRow, waiter: &WaiterRow) -> Result<Place> {
        let sql = "SELECT count(*) FROM waiters INDEXED BY waiters_by_key WHERE key_id = ?1 AND seq < ?2";
        let ahead: i64 = self.first(sql, [row.id, waiter.seq], |found| found.get(0))?.unwrap_or(0);
        let before = if ahead > 0 { self.session_before(row.id, waiter.seq)? } else { None };
        Ok(Place { ahead: u32::try_from(ahead).unwrap_or(u32::MAX), session: waiter.session, before })
    }

    fn inspect(&mut self, key: &Key) -> Result<Option<KeyState>> {
        match self.find_key(key)? {
            Some(row) => self.state_of(row),
            None => Ok(Some(KeyState {
                key: key.clone(),
                holders: Vec::new(),
                waiters: Vec::new(),
                last_fence: None,
                closed_for: None,
            })),
        }
    }

    /// Whether time has changed nothing; notes the key otherwise.
    fn is_settled(&mut self, row: &KeyRow) -> bool {
        let is_open_late = row.closed_until.is_some() && !row.is_closed(self.now) && row.waiting > 0;
        let is_settled = !row.is_due(self.now) && !is_open_late;
        if !is_settled {
            self.unsettled.push(row.id);
        }
        is_settled
    }

    fn state_of(&mut self, row: KeyRow) -> Result<Option<KeyState>> {
        let mut all_alive = !self.probe_holders(&row)?;
        if row.waiting > 0 {
            for session in self.waiting_sessions(&row)? {
                all_alive &= self.is_alive(session)?;
            }
        }
        if !self.is_settled(&row) || !all_alive {
            return Ok(None);
        }
        self.read_state(&row).map(Some).map_err(|problem| problem.into_error(self))
    }
}
