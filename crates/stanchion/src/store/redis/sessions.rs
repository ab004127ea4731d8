//! What this process knows of sessions: its own, what they hold, and how long others live at least.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::AbortHandle;

use super::LEAST_MEMORY;
use crate::clock::BootTime;
use crate::key::Key;
use crate::store::PushSender;
use crate::token::{IdMap, SessionId, TokenId};

/// The record of a key lives for a day after it was last written. What is held for longer is touched this often.
const TOUCH_EVERY: Duration = Duration::from_secs(6 * 60 * 60);
const SWEEP_EVERY: Duration = Duration::from_secs(60 * 60);

/// So many records are touched with one beat, or more where beats are rare: what is due is to be touched within an hour.
const TOUCHES_PER_BEAT: usize = 200;

#[derive(Debug, Default)]
pub(super) struct Sessions {
    own: Mutex<IdMap<SessionId, Own>>,
    /// Sessions of others, and until when they live at least.
    others: Mutex<IdMap<SessionId, BootTime>>,
}

/// A session of this process.
#[derive(Debug)]
struct Own {
    ttl: Duration,
    owner: Arc<str>,
    /// The store keeps it until then at least, beaten or not.
    alive_until: BootTime,
    has_ended: bool,
    pushes: Option<PushSender>,
    listener: Option<AbortHandle>,
    held: IdMap<TokenId, Held>,
    /// What its last beat told as taken by force.
    told: Vec<TokenId>,
    swept: BootTime,
    to_touch: Vec<TokenId>,
    /// So many of these with each beat.
    share: usize,
    beaten: BootTime,
}

#[derive(Debug)]
struct Held {
    key: Key,
    touched: BootTime,
}

/// What is known of a session without asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    Alive(BootTime),
    Dead,
    Unknown,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sessions {
    /// The channel of a session that is to be opened.
    pub(super) fn announce(&self, session: SessionId, pushes: PushSender) {
        let mut own = lock(&self.own);
        own.entry(session).or_insert_with(Own::new).pushes = Some(pushes);
    }

    /// Whether a listener is to be started, and for whom.
    pub(super) fn wants_listener(&self, session: SessionId) -> Option<PushSender> {
        let own = lock(&self.own);
        let own = own.get(&session).filter(|own| own.listener.is_none())?;
        own.pushes.clone()
    }

    pub(super) fn listens(&self, session: SessionId, listener: AbortHandle) {
        match lock(&self.own).get_mut(&session) {
            Some(own) => own.listener = Some(listener),
            None => listener.abort(),
        }
    }

    /// It was opened, asked for at `asked`.
    pub(super) fn opened(&self, session: SessionId, asked: BootTime, ttl: Duration, owner: Arc<str>) {
        let mut own = lock(&self.own);
        // One that could not be closed is forgotten now: nobody tries any more.
        own.retain(|_, own| !own.has_ended || asked < own.alive_until.after(LEAST_MEMORY));
        let own = own.entry(session).or_insert_with(Own::new);
        own.ttl = ttl;
        own.owner = owner;
        // Asked again it is not renewed: the first time counts.
        if own.alive_until == BootTime::from_nanos(0) {
            own.alive_until = asked.after(ttl);
            (own.swept, own.beaten) = (asked, asked);
        }
    }

    /// Its beat was answered, asked for at `asked`, and told these tokens as taken by force.
    pub(super) fn beaten(&self, session: SessionId, asked: BootTime, told: Vec<TokenId>) {
        if let Some(own) = lock(&self.own).get_mut(&session) {
            own.alive_until = own.alive_until.max(asked.after(own.ttl));
            own.told = told;
        }
    }

    /// The session whose last beat told this token as taken by force.
    pub(super) fn told(&self, token: TokenId) -> Option<SessionId> {
        let own = lock(&self.own);
        own.iter().find(|(_, own)| own.told.contains(&token)).map(|(session, _)| *session)
    }

    /// What it holds or waits for.
    pub(super) fn held(&self, session: SessionId) -> Vec<(TokenId, Key)> {
        let own = lock(&self.own);
        let Some(own) = own.get(&session) else { return Vec::new() };
        own.held.iter().map(|(token, held)| (*token, held.key.clone())).collect()
    }

    /// These are over.
    pub(super) fn ended_of(&self, session: SessionId, tokens: impl Iterator<Item = TokenId>) {
        if let Some(own) = lock(&self.own).get_mut(&session) {
            tokens.for_each(|token| drop(own.held.remove(&token)));
        }
    }

    /// It has ended, and nothing of it is left.
    pub(super) fn ended(&self, session: SessionId) {
        lock(&self.own).remove(&session);
    }

    /// It is dead by the store's word.
    pub(super) fn died(&self, session: SessionId) {
        if let Some(own) = lock(&self.own).get_mut(&session) {
            own.has_ended = true;
            // Nobody is to be told anything any more.
            own.pushes = None;
            if let Some(listener) = own.listener.take() {
                listener.abort();
            }
        }
        lock(&self.others).remove(&session);
    }

    /// It lives for so long at least, asked at `asked`.
    pub(super) fn seen(&self, session: SessionId, asked: BootTime, left: Duration) {
        let until = asked.after(left);
        if let Some(own) = lock(&self.own).get_mut(&session) {
            own.alive_until = own.alive_until.max(until);
            return;
        }
        let mut others = lock(&self.others);
        if others.len() >= 10_000 {
            others.retain(|_, until| *until > asked);
        }
        others.insert(session, until);
    }

    pub(super) fn known(&self, session: SessionId, now: BootTime) -> Known {
        if let Some(own) = lock(&self.own).get(&session) {
            return match own.alive_until {
                _ if own.has_ended => Known::Dead,
                until if until > now => Known::Alive(until),
                _ => Known::Unknown,
            };
        }
        match lock(&self.others).get(&session) {
            Some(until) if *until > now => Known::Alive(*until),
            _ => Known::Unknown,
        }
    }

    /// Its ttl and who it is; nothing of a session that was opened elsewhere.
    pub(super) fn introduced(&self, session: SessionId) -> (Duration, Arc<str>) {
        lock(&self.own).get(&session).map_or_else(Default::default, |own| (own.ttl, own.owner.clone()))
    }

    pub(super) fn holds(&self, session: SessionId, token: TokenId, key: &Key, now: BootTime) {
        if let Some(own) = lock(&self.own).get_mut(&session) {
            own.held.entry(token).or_insert_with(|| Held { key: key.clone(), touched: now });
        }
    }

    /// The session of a token that this process holds.
    pub(super) fn holder(&self, token: TokenId) -> Option<SessionId> {
        let own = lock(&self.own);
        own.iter().find(|(_, own)| own.held.contains_key(&token)).map(|(session, _)| *session)
    }

    /// A token is being ended. Gives its session if that may be dead.
    pub(super) fn lets_go(&self, token: TokenId, now: BootTime) -> Option<SessionId> {
        let mut own = lock(&self.own);
        let (session, own) = own.iter_mut().find(|(_, own)| own.held.contains_key(&token))?;
        own.held.remove(&token);
        (own.has_ended || own.alive_until <= now).then_some(*session)
    }

    /// The records that are to be touched with this beat.
    pub(super) fn due(&self, session: SessionId, now: BootTime) -> Vec<(TokenId, Key)> {
        let mut own = lock(&self.own);
        let Some(own) = own.get_mut(&session) else { return Vec::new() };
        let interval = now.since(own.beaten);
        own.beaten = now;
        if own.to_touch.is_empty() && now.since(own.swept) >= SWEEP_EVERY {
            own.swept = now;
            let due = own.held.iter().filter(|(_, held)| now.since(held.touched) >= TOUCH_EVERY);
            own.to_touch = due.map(|(token, _)| *token).collect();
            let part = interval.as_secs_f64() / SWEEP_EVERY.as_secs_f64();
            own.share = TOUCHES_PER_BEAT.max((own.to_touch.len() as f64 * part).ceil() as usize);
        }
        let rest = own.to_touch.len().saturating_sub(own.share);
        let mut due = Vec::new();
        for token in own.to_touch.split_off(rest) {
            if let Some(held) = own.held.get_mut(&token) {
                held.touched = now;
                due.push((token, held.key.clone()));
            }
        }
        due
    }
}

impl Own {
    fn new() -> Self {
        Self {
            ttl: Duration::ZERO,
            owner: Arc::default(),
            alive_until: BootTime::from_nanos(0),
            has_ended: false,
            pushes: None,
            listener: None,
            held: IdMap::default(),
            told: Vec::new(),
            swept: BootTime::from_nanos(0),
            to_touch: Vec::new(),
            share: 0,
            beaten: BootTime::from_nanos(0),
        }
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        if let Some(listener) = &self.listener {
            listener.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_for_long_is_touched_now_and_then_a_few_at_a_time() {
        let sessions = Sessions::default();
        let session = SessionId::random().unwrap();
        let start = BootTime::from_nanos(1);
        sessions.opened(session, start, Duration::from_secs(10), "me".into());
        let key = Key::new("", "k").unwrap();
        for _ in 0..500 {
            sessions.holds(session, TokenId::random().unwrap(), &key, start);
        }
        let gone = TokenId::random().unwrap();
        sessions.holds(session, gone, &key, start);
        let later = start.after(TOUCH_EVERY + SWEEP_EVERY);
        for before in [TOUCH_EVERY / 2, SWEEP_EVERY + Duration::from_secs(1), Duration::from_secs(2)] {
            assert!(sessions.due(session, later.before(before)).is_empty());
        }
        assert_eq!(sessions.lets_go(gone, start), None);
        let counts: Vec<_> = (0..4).map(|_| sessions.due(session, later).len()).collect();
        assert_eq!(counts, [200, 200, 100, 0]);
        assert!(sessions.due(session, later.after(SWEEP_EVERY)).is_empty());
    }

    #[test]
    fn what_is_held_for_long_is_touched_in_time_however_rare_beats_are() {
        // A record lives for a day, or for twice the session's ttl.
        for (ttl, holds) in [(10, 20_000), (60 * 60, 50_000), (12 * 60 * 60, 20_000), (3 * 24 * 60 * 60, 5_000)] {
            let life = Duration::from_secs(ttl * 2).max(Duration::from_secs(24 * 60 * 60));
            let interval = Duration::from_secs(ttl) / 5;
            let sessions = Sessions::default();
            let session = SessionId::random().unwrap();
            let mut now = BootTime::from_nanos(1);
            sessions.opened(session, now, Duration::from_secs(ttl), Arc::default());
            let key = Key::new("", "k").unwrap();
            let mut touched = std::collections::HashMap::new();
            for _ in 0..holds {
                let token = TokenId::random().unwrap();
                sessions.holds(session, token, &key, now);
                touched.insert(token, now);
            }
            let end = now.after(life * 2);
            while now < end {
                now = now.after(interval);
                for (token, _) in sessions.due(session, now) {
                    touched.insert(token, now);
                }
            }
            let oldest = touched.values().min().map(|touched| now.since(*touched)).unwrap();
            assert!(oldest < life - life / 4, "ttl {ttl} s, {holds} holds: {oldest:?} of {life:?}");
        }
    }

    #[test]
    fn a_session_that_ended_is_forgotten_although_it_was_not_closed() {
        let sessions = Sessions::default();
        let (old, new) = (SessionId::random().unwrap(), SessionId::random().unwrap());
        let start = BootTime::from_nanos(1);
        let ttl = Duration::from_secs(10);
        sessions.announce(old, crate::store::push_channel().0);
        sessions.opened(old, start, ttl, Arc::default());
        sessions.holds(old, TokenId::random().unwrap(), &Key::new("", "k").unwrap(), start);
        sessions.died(old);
        assert!(sessions.wants_listener(old).is_none());
        sessions.opened(new, start.after(ttl), ttl, Arc::default());
        assert_eq!(sessions.held(old).len(), 1, "it may be closed yet");
        sessions.opened(new, start.after(ttl + LEAST_MEMORY), ttl, Arc::default());
        assert_eq!((sessions.held(old).len(), lock(&sessions.own).len()), (0, 1));
    }

    #[test]
    fn a_session_that_is_asked_for_again_counts_from_the_first_time() {
        let sessions = Sessions::default();
        let session = SessionId::random().unwrap();
        let at = |seconds| BootTime::from_nanos(1).after(Duration::from_secs(seconds));
        sessions.opened(session, at(0), Duration::from_secs(10), Arc::default());
        sessions.opened(session, at(5), Duration::from_secs(10), Arc::default());
        assert_eq!(sessions.known(session, at(9)), Known::Alive(at(10)));
        assert_eq!(sessions.known(session, at(10)), Known::Unknown);
        sessions.beaten(session, at(6), Vec::new());
        assert_eq!(sessions.known(session, at(10)), Known::Alive(at(16)));
        sessions.died(session);
        assert_eq!(sessions.known(session, at(10)), Known::Dead);
    }
}
