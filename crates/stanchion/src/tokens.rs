//! Tracks the state of every token of a handle.
//!
//! A token goes from *waiting* to *held*, and from there to *detached* or *cleaning up*; then it is gone. Between *held* and
//! *lingering* it may go to and fro. Each method is one transition under one lock, so no thread sees a token between two states. The table decides nothing else: it sends no request
//! and wakes no call.
//!
//! # Invariants
//! 1. A token is in exactly one state, or gone.
//! 2. A token that left *waiting*, *held* and *lingering* never returns there: the store grants a token once.
//! 3. A detached token stays detached through a cleanup that spares its hold, and a detached token that is being cleaned up for
//!    good is forgotten when the cleanup ends.

use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::clock::BootTime;
use crate::key::Key;
use crate::lease::{Hold, LIFETIME_MARGIN};
use crate::token::{IdMap, TokenId};
use crate::waiter::Waiter;

/// Minimum number of detached tokens at which the store is queried for those it still has.
pub(crate) const QUERY_DETACHED_AT: usize = 1_000;

/// Minimum number of tokens that are detached between two removals of those whose lifetime is over.
const EXPIRE_EVERY: usize = 64;

/// The state of a token.
#[derive(Clone, Debug)]
pub(crate) enum TokenState {
    /// A call waits for the token's grant.
    Waiting(Arc<Waiter>),
    /// A guard has the hold.
    Held(Arc<Hold>),
    /// No guard has the hold, and the next call of this process may get it.
    Lingering(Arc<Hold>),
    /// The hold must stay in the store, and no guard has it.
    Detached(Detached),
    /// The keeper releases the token. With a value the hold must stay in the store until then: it is lost and in its grace, or
    /// detached while a request of the token may still arrive.
    CleaningUp(Option<Detached>),
}

/// A hold that must stay in the store although no guard has it.
#[derive(Clone, Debug)]
pub(crate) struct Detached {
    pub(crate) key: Key,
    /// Time until which the store may have the hold; never over for a hold without a deadline, which another handle may have
    /// adopted.
    pub(crate) until: BootTime,
}

impl Detached {
    fn of(hold: &Hold) -> Self {
        Self { key: hold.key.clone(), until: hold.over_at() }
    }
}

/// The states of all tokens of a handle.
#[derive(Debug)]
pub(crate) struct TokenTable(Mutex<Table>);

#[derive(Debug)]
struct Table {
    states: IdMap<TokenId, TokenState>,
    /// Number of tokens that are being cleaned up.
    cleaning_up: usize,
    /// Number of tokens with a hold that must stay in the store.
    detached: usize,
    /// Number of detached tokens at which those whose lifetime is over are removed.
    expire_at: usize,
    /// Number of detached tokens at which the store is queried for those it still has.
    query_at: usize,
}

impl TokenTable {
    pub(crate) fn new() -> Self {
        let (states, cleaning_up, detached) = (IdMap::default(), 0, 0);
        let (expire_at, query_at) = (EXPIRE_EVERY, QUERY_DETACHED_AT);
        Self(Mutex::new(Table { states, cleaning_up, detached, expire_at, query_at }))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a token before its first request is sent.
    pub(crate) fn enter_waiting(&self, token: TokenId, waiter: Arc<Waiter>) {
        self.lock().set(token, TokenState::Waiting(waiter));
    }

    /// Turns a waiting token into a hold, if the hold is still valid.
    ///
    /// The session, the deadline and the handle end first and look into the table then. `is_valid` is called under the table's
    /// lock, so it either sees that end, or the hold is found in the table and lost. A hold that is not valid is not entered:
    /// nobody is told about the loss of a hold that nobody was given.
    pub(crate) fn grant(&self, hold: &Arc<Hold>, is_valid: impl FnOnce() -> bool) -> bool {
        let mut table = self.lock();
        let is_valid = is_valid();
        if is_valid {
            table.set(hold.token, TokenState::Held(hold.clone()));
        }
        is_valid
    }

    /// Turns a held or lingering token into the hold of the next guard in this process, if that hold is valid.
    pub(crate) fn grant_again(&self, hold: &Arc<Hold>, is_valid: impl FnOnce() -> bool) -> bool {
        let mut table = self.lock();
        let is_kept = matches!(table.states.get(&hold.token), Some(TokenState::Held(_) | TokenState::Lingering(_)));
        let is_granted = is_kept && is_valid();
        if is_granted {
            table.set(hold.token, TokenState::Held(hold.clone()));
        }
        is_granted
    }

    /// Lets a hold linger after its guard. Returns `false`, and does nothing, if the hold was lost.
    #[must_use]
    pub(crate) fn linger(&self, hold: &Arc<Hold>) -> bool {
        let mut table = self.lock();
        let is_held = matches!(table.states.get(&hold.token), Some(TokenState::Held(_)));
        if is_held {
            table.set(hold.token, TokenState::Lingering(hold.clone()));
        }
        is_held
    }

    /// Detaches a held token. With `has_late_request` a request of the token may still arrive, and the token is cleaned up
    /// without the hold. Returns whether to query the store for the detached tokens.
    ///
    /// A hold that was lost before is being cleaned up already, or gone: it stays so.
    #[must_use]
    pub(crate) fn detach(&self, hold: &Hold, has_late_request: bool, now: BootTime) -> bool {
        let mut table = self.lock();
        if !matches!(table.states.get(&hold.token), Some(TokenState::Held(_))) {
            return false;
        }
        let detached = Detached::of(hold);
        let state =
            if has_late_request { TokenState::CleaningUp(Some(detached)) } else { TokenState::Detached(detached) };
        table.set(hold.token, state);
        table.limit_detached(now)
    }

    /// Begins the cleanup of a token. Until it ends, pushes for this token are ignored.
    pub(crate) fn begin_cleanup(&self, token: TokenId) {
        let mut table = self.lock();
        let detached = table.detached_hold(token);
        table.set(token, TokenState::CleaningUp(detached));
    }

    /// Begins the cleanup of a lost hold that stays in the store for its grace. Returns whether to query the store for the
    /// detached tokens.
    #[must_use]
    pub(crate) fn begin_grace(&self, hold: &Hold, now: BootTime) -> bool {
        let mut table = self.lock();
        table.set(hold.token, TokenState::CleaningUp(Some(Detached::of(hold))));
        table.limit_detached(now)
    }

    /// Begins the cleanup of a token that is in the store and is neither waiting nor held here. Returns `false`, and does
    /// nothing, if the token is being cleaned up already, or `limit` others are.
    #[must_use]
    pub(crate) fn begin_cleanup_of_unknown(&self, token: TokenId, limit: usize) -> bool {
        let mut table = self.lock();
        let detached = match table.states.get(&token) {
            None => None,
            Some(TokenState::Detached(detached)) => Some(detached.clone()),
            Some(_) => return false,
        };
        if table.cleaning_up >= limit {
            return false;
        }
        table.set(token, TokenState::CleaningUp(detached));
        true
    }

    /// Ends the cleanup of a token: pushes for this token count again. A cleanup that spared the hold leaves the token detached.
    pub(crate) fn end_cleanup(&self, token: TokenId, spared_hold: bool) {
        let mut table = self.lock();
        match table.states.get(&token) {
            Some(TokenState::CleaningUp(Some(detached))) if spared_hold => {
                let state = TokenState::Detached(detached.clone());
                table.set(token, state);
            }
            Some(TokenState::CleaningUp(_)) => table.remove(token),
            Some(TokenState::Detached(_)) if !spared_hold => table.remove(token),
            _ => {}
        }
    }

    /// Forgets a waiting, held or lingering token of which the store has nothing. A token that is being cleaned up stays.
    pub(crate) fn forget(&self, token: TokenId) {
        let mut table = self.lock();
        if let Some(TokenState::Waiting(_) | TokenState::Held(_) | TokenState::Lingering(_)) = table.states.get(&token)
        {
            table.remove(token);
        }
    }

    /// Forgets a detached hold that was adopted, or that the store does not have any more.
    pub(crate) fn forget_detached(&self, token: TokenId) {
        let mut table = self.lock();
        match table.states.get(&token) {
            Some(TokenState::Detached(_)) => table.remove(token),
            Some(TokenState::CleaningUp(Some(_))) => table.set(token, TokenState::CleaningUp(None)),
            _ => {}
        }
    }

    /// Notes that the store may have a detached hold until this time, because a request to extend it is sent.
    pub(crate) fn detached_may_last_until(&self, token: TokenId, until: BootTime) {
        if let Some(TokenState::Detached(detached) | TokenState::CleaningUp(Some(detached))) =
            self.lock().states.get_mut(&token)
        {
            detached.until = detached.until.max(until.after(LIFETIME_MARGIN));
        }
    }

    /// Forgets the detached and the lingering holds when the session is over: nothing is pushed for the tokens of an old session.
    pub(crate) fn end_of_session(&self) {
        let mut table = self.lock();
        table.states.retain(|_, state| !matches!(state, TokenState::Lingering(_)));
        table.retain_detached(|_| false);
    }

    /// Sets the number of detached tokens at which the store is queried next, after it has been queried.
    pub(crate) fn detached_were_queried(&self) {
        let mut table = self.lock();
        table.query_at = QUERY_DETACHED_AT.max(table.detached * 2);
    }

    /// Returns the state of a token, or `None` if it is gone.
    pub(crate) fn get(&self, token: TokenId) -> Option<TokenState> {
        self.lock().states.get(&token).cloned()
    }

    /// Returns the hold of a token, if it is held.
    pub(crate) fn hold(&self, token: TokenId) -> Option<Arc<Hold>> {
        match self.lock().states.get(&token) {
            Some(TokenState::Held(hold)) => Some(hold.clone()),
            _ => None,
        }
    }

    /// Returns the hold of a token that is held or lingers.
    pub(crate) fn held_or_lingering(&self, token: TokenId) -> Option<Arc<Hold>> {
        match self.lock().states.get(&token) {
            Some(TokenState::Held(hold) | TokenState::Lingering(hold)) => Some(hold.clone()),
            _ => None,
        }
    }

    /// Returns the call that waits with a token, if one does.
    pub(crate) fn waiter(&self, token: TokenId) -> Option<Arc<Waiter>> {
        match self.lock().states.get(&token) {
            Some(TokenState::Waiting(waiter)) => Some(waiter.clone()),
            _ => None,
        }
    }

    /// Returns all holds that a guard has.
    pub(crate) fn holds(&self) -> Vec<Arc<Hold>> {
        self.collect(|_, state| match state {
            TokenState::Held(hold) => Some(hold.clone()),
            _ => None,
        })
    }

    /// Returns the tokens of all holds that a guard has.
    pub(crate) fn held(&self) -> Vec<TokenId> {
        self.collect(|token, state| matches!(state, TokenState::Held(_)).then_some(token))
    }

    /// Returns all waiting calls with their tokens.
    pub(crate) fn waiting(&self) -> Vec<(TokenId, Arc<Waiter>)> {
        self.collect(|token, state| match state {
            TokenState::Waiting(waiter) => Some((token, waiter.clone())),
            _ => None,
        })
    }

    /// Returns the tokens with a hold that must stay in the store.
    pub(crate) fn detached(&self) -> Vec<(TokenId, Detached)> {
        self.collect(|token, state| match state {
            TokenState::Detached(detached) | TokenState::CleaningUp(Some(detached)) => Some((token, detached.clone())),
            _ => None,
        })
    }

    #[cfg(test)]
    pub(crate) fn cleaning_up(&self) -> usize {
        self.lock().cleaning_up
    }

    fn collect<T>(&self, mut choose: impl FnMut(TokenId, &TokenState) -> Option<T>) -> Vec<T> {
        self.lock().states.iter().filter_map(|(token, state)| choose(*token, state)).collect()
    }
}

impl Table {
    fn set(&mut self, token: TokenId, state: TokenState) {
        self.count(&state, 1);
        let before = match self.states.entry(token) {
            Entry::Occupied(mut entry) => Some(entry.insert(state)),
            Entry::Vacant(entry) => {
                entry.insert(state);
                None
            }
        };
        if let Some(before) = before {
            self.count(&before, -1);
        }
    }

    fn remove(&mut self, token: TokenId) {
        if let Some(before) = self.states.remove(&token) {
            self.count(&before, -1);
            self.shrink();
        }
    }

    fn count(&mut self, state: &TokenState, difference: isize) {
        let (cleaning_up, detached) = match state {
            TokenState::Waiting(_) | TokenState::Held(_) | TokenState::Lingering(_) => (false, false),
            TokenState::Detached(_) => (false, true),
            TokenState::CleaningUp(detached) => (true, detached.is_some()),
        };
        if cleaning_up {
            self.cleaning_up = self.cleaning_up.saturating_add_signed(difference);
        }
        if detached {
            self.detached = self.detached.saturating_add_signed(difference);
        }
    }

    fn detached_hold(&self, token: TokenId) -> Option<Detached> {
        match self.states.get(&token) {
            Some(TokenState::Detached(detached) | TokenState::CleaningUp(Some(detached))) => Some(detached.clone()),
            _ => None,
        }
    }

    /// Removes detached holds whose lifetime is over, now and then. Returns whether there are still so many that the store is to
    /// be queried: this process does not learn which of them another handle has adopted.
    fn limit_detached(&mut self, now: BootTime) -> bool {
        if self.detached >= self.expire_at {
            self.retain_detached(|detached| detached.until > now);
            // Each removal looks at every token, so the next one comes after a share of them was detached.
            self.expire_at = self.detached + EXPIRE_EVERY.max(self.states.len() / 4);
        }
        let is_due = self.detached >= self.query_at;
        if is_due {
            self.query_at = QUERY_DETACHED_AT.max(self.detached * 2);
        }
        is_due
    }

    fn retain_detached(&mut self, mut stays: impl FnMut(&Detached) -> bool) {
        let mut left = 0;
        self.states.retain(|_, state| match state {
            TokenState::Detached(detached) => {
                let stays = stays(detached);
                left += usize::from(stays);
                stays
            }
            TokenState::CleaningUp(slot) => {
                slot.take_if(|detached| !stays(detached));
                left += usize::from(slot.is_some());
                true
            }
            TokenState::Waiting(_) | TokenState::Held(_) | TokenState::Lingering(_) => true,
        });
        self.detached = left;
        self.shrink();
    }

    /// Returns memory to the system after many tokens were in the table at the same time.
    fn shrink(&mut self) {
        if self.states.capacity() > 1_024 && self.states.len() < self.states.capacity() / 8 {
            self.states.shrink_to(self.states.len() * 2);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::fence::Fence;
    use crate::lease::{NewHold, SessionLease};
    use crate::token::SessionId;

    const NOW: BootTime = BootTime::from_nanos(0);
    const HOUR: Duration = Duration::from_secs(3_600);

    fn key() -> Key {
        Key::new("", "k").unwrap()
    }

    /// A hold that ends with its session, or after `ttl`.
    fn hold(token: TokenId, ttl: Option<Duration>) -> Arc<Hold> {
        let session = SessionLease::new(SessionId::from_bytes([1; 16]), HOUR, BootTime::NEVER);
        Arc::new(Hold::new(NewHold {
            key: key(),
            token,
            fence: Fence::new(1),
            session: Arc::new(session),
            session_bound: ttl.is_none(),
            since: NOW,
            deadline: ttl.map(|ttl| (NOW.after(ttl), ttl)),
            heartbeat_within: None,
            unanswered_until: None,
            on_lost: None,
        }))
    }

    fn waiting(table: &TokenTable) -> TokenId {
        let token = TokenId::random().unwrap();
        table.enter_waiting(token, Arc::new(Waiter::new(key(), true)));
        token
    }

    fn held(table: &TokenTable) -> Arc<Hold> {
        let hold = hold(waiting(table), None);
        assert!(table.grant(&hold, || true));
        hold
    }

    fn state(table: &TokenTable, token: TokenId) -> &'static str {
        match table.get(token) {
            None => "gone",
            Some(TokenState::Waiting(_)) => "waiting",
            Some(TokenState::Held(_)) => "held",
            Some(TokenState::Lingering(_)) => "lingering",
            Some(TokenState::Detached(_)) => "detached",
            Some(TokenState::CleaningUp(None)) => "cleaning up",
            Some(TokenState::CleaningUp(Some(_))) => "cleaning up, hold stays",
        }
    }

    #[test]
    fn invalid_grant_leaves_the_token_waiting() {
        let table = TokenTable::new();
        let token = waiting(&table);
        assert!(!table.grant(&hold(token, None), || false));
        assert_eq!(state(&table, token), "waiting");
        assert!(table.holds().is_empty());
        table.begin_cleanup(token);
        assert!(table.waiter(token).is_none(), "a push finds no call to wake");
        table.end_cleanup(token, false);
        assert_eq!(state(&table, token), "gone");
    }

    #[test]
    fn answered_release_forgets_hold() {
        let table = TokenTable::new();
        let hold = held(&table);
        table.forget(hold.token);
        assert_eq!(state(&table, hold.token), "gone");
    }

    #[test]
    fn late_release_answer_keeps_the_cleanup() {
        let table = TokenTable::new();
        let hold = held(&table);
        // The keeper loses the hold while the answer is on its way.
        table.begin_cleanup(hold.token);
        table.forget(hold.token);
        assert_eq!(state(&table, hold.token), "cleaning up");
    }

    #[test]
    fn sparing_cleanup_leaves_the_hold_detached() {
        let table = TokenTable::new();
        let hold = held(&table);
        assert!(!table.detach(&hold, true, NOW));
        assert_eq!(state(&table, hold.token), "cleaning up, hold stays");
        table.end_cleanup(hold.token, true);
        assert_eq!(state(&table, hold.token), "detached");
        table.forget(hold.token);
        assert_eq!(state(&table, hold.token), "detached");
    }

    #[test]
    fn force_release_forgets_a_detached_hold() {
        let table = TokenTable::new();
        let hold = held(&table);
        assert!(!table.detach(&hold, false, NOW));
        assert!(table.begin_cleanup_of_unknown(hold.token, 1));
        assert_eq!(state(&table, hold.token), "cleaning up, hold stays");
        table.end_cleanup(hold.token, false);
        assert_eq!(state(&table, hold.token), "gone");
    }

    #[test]
    fn two_cleanups_of_a_token_end_with_the_second() {
        let table = TokenTable::new();
        let hold = held(&table);
        assert!(!table.detach(&hold, true, NOW));
        // The store reports a forced release, and the cleanup that spares the hold is answered first.
        table.begin_cleanup(hold.token);
        table.end_cleanup(hold.token, true);
        assert_eq!(state(&table, hold.token), "detached");
        table.end_cleanup(hold.token, false);
        assert_eq!(state(&table, hold.token), "gone");
    }

    #[test]
    fn lost_hold_stays_through_its_grace() {
        let table = TokenTable::new();
        let hold = held(&table);
        assert!(!table.begin_grace(&hold, NOW));
        assert_eq!(state(&table, hold.token), "cleaning up, hold stays");
        // The guard is detached after the loss.
        assert!(!table.detach(&hold, false, NOW));
        assert_eq!(state(&table, hold.token), "cleaning up, hold stays");
        // The guard is dropped within the grace.
        table.begin_cleanup(hold.token);
        assert_eq!(state(&table, hold.token), "cleaning up, hold stays");
        table.end_cleanup(hold.token, false);
        assert_eq!(state(&table, hold.token), "gone");
    }

    #[test]
    fn adopted_hold_is_forgotten_while_cleaned_up() {
        let table = TokenTable::new();
        let (one, other) = (held(&table), held(&table));
        assert!(!table.detach(&one, false, NOW) && !table.detach(&other, true, NOW));
        table.forget_detached(one.token);
        table.forget_detached(other.token);
        assert_eq!((state(&table, one.token), state(&table, other.token)), ("gone", "cleaning up"));
        table.end_cleanup(other.token, true);
        assert_eq!(state(&table, other.token), "gone");
    }

    #[test]
    fn end_of_session_forgets_detached_holds_only() {
        let table = TokenTable::new();
        let (detached, late, guarded) = (held(&table), held(&table), held(&table));
        let token = waiting(&table);
        assert!(!table.detach(&detached, false, NOW) && !table.detach(&late, true, NOW));
        table.end_of_session();
        let states = [detached.token, late.token, guarded.token, token].map(|token| state(&table, token));
        assert_eq!(states, ["gone", "cleaning up", "held", "waiting"]);
        assert!(table.detached().is_empty());
    }

    #[test]
    fn push_cleans_up_unknown_tokens_only() {
        let table = TokenTable::new();
        let (token, hold, unknown) = (waiting(&table), held(&table), TokenId::random().unwrap());
        assert!(!table.begin_cleanup_of_unknown(token, 9) && !table.begin_cleanup_of_unknown(hold.token, 9));
        assert!(table.begin_cleanup_of_unknown(unknown, 1));
        assert!(!table.begin_cleanup_of_unknown(unknown, 9), "one cleanup of a token at a time");
        assert!(!table.begin_cleanup_of_unknown(TokenId::random().unwrap(), 1), "the limit");
        table.end_cleanup(unknown, false);
        assert!(table.begin_cleanup_of_unknown(unknown, 1));
    }

    #[test]
    fn detached_holds_are_queried_once() {
        let table = TokenTable::new();
        let detach = || table.detach(&held(&table), false, NOW);
        assert_eq!((0..QUERY_DETACHED_AT).filter(|_| detach()).count(), 1);
        assert_eq!((1..QUERY_DETACHED_AT).filter(|_| detach()).count(), 0);
        for (token, _) in table.detached() {
            table.forget_detached(token);
        }
        table.detached_were_queried();
        assert_eq!((0..QUERY_DETACHED_AT).filter(|_| detach()).count(), 1);
    }

    #[test]
    fn expired_detached_holds_are_forgotten() {
        let table = TokenTable::new();
        let mut now = NOW;
        for _ in 0..10_000 {
            let hold = hold(waiting(&table), Some(Duration::ZERO));
            assert!(table.grant(&hold, || true) && !table.detach(&hold, false, now));
            now = NOW.after(HOUR);
        }
        assert!(table.detached().len() <= EXPIRE_EVERY, "{}", table.detached().len());
    }

    #[test]
    fn released_token_lingers_no_more() {
        let table = TokenTable::new();
        let hold = held(&table);
        assert!(table.linger(&hold) && table.hold(hold.token).is_none());
        assert!(!table.grant_again(&hold, || false), "not valid");
        assert!(table.grant_again(&hold, || true) && table.hold(hold.token).is_some());
        assert!(table.linger(&hold) && !table.linger(&hold));
        table.begin_cleanup(hold.token);
        assert!(!table.grant_again(&hold, || true) && !table.linger(&hold));
        assert_eq!(state(&table, hold.token), "cleaning up");
        let other = held(&table);
        assert!(table.linger(&other));
        table.end_of_session();
        assert_eq!(state(&table, other.token), "gone");
    }

    #[test]
    fn extended_detached_hold_is_remembered() {
        let table = TokenTable::new();
        let detach = |now| {
            let hold = hold(waiting(&table), Some(Duration::ZERO));
            assert!(table.grant(&hold, || true) && !table.detach(&hold, false, now));
            hold.token
        };
        let (extended, other) = (detach(NOW), detach(NOW));
        table.detached_may_last_until(extended, NOW.after(HOUR));
        for _ in 0..EXPIRE_EVERY {
            detach(NOW.after(HOUR));
        }
        assert_eq!((state(&table, extended), state(&table, other)), ("detached", "gone"));
    }

    #[test]
    fn counts_match_the_states_after_any_transition() {
        let table = TokenTable::new();
        let holds: Vec<_> = (0..8).map(|byte| hold(TokenId::from_bytes([byte; 16]), None)).collect();
        let mut random = 1_u64;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % below
        };
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..20_000 {
            let hold = &holds[next(8) as usize];
            match next(14) {
                0 => table.enter_waiting(hold.token, Arc::new(Waiter::new(key(), true))),
                1 => drop(table.grant(hold, || true)),
                2 => drop(table.detach(hold, false, NOW)),
                3 => drop(table.detach(hold, true, NOW)),
                4 => table.begin_cleanup(hold.token),
                5 => drop(table.begin_grace(hold, NOW)),
                6 => drop(table.begin_cleanup_of_unknown(hold.token, 4)),
                7 => table.end_cleanup(hold.token, true),
                8 => table.end_cleanup(hold.token, false),
                9 => table.forget(hold.token),
                10 => table.forget_detached(hold.token),
                11 => drop(table.linger(hold)),
                12 => drop(table.grant_again(hold, || true)),
                _ if next(10) == 0 => table.end_of_session(),
                _ => {}
            }
            let states: Vec<_> = holds.iter().map(|hold| state(&table, hold.token)).collect();
            let count = |names: &[&str]| states.iter().filter(|state| names.contains(state)).count();
            assert_eq!(table.cleaning_up(), count(&["cleaning up", "cleaning up, hold stays"]));
            assert_eq!(table.lock().detached, count(&["detached", "cleaning up, hold stays"]));
            seen.extend(states);
        }
        assert_eq!(seen.len(), 7, "{seen:?}");
    }
}
