//! Caches the sessions of this process with their tokens, and how long the sessions of other processes live at least.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::task::AbortHandle;

use super::MIN_SESSION_RETENTION;
use crate::clock::BootTime;
use crate::key::Key;
use crate::store::PushSender;
use crate::sync::lock;
use crate::token::{IdMap, SessionId, TokenId};

/// Interval between touches of the record of a long hold. The server deletes a record a day after it was last written.
/// A sweep for records to touch runs once per hour.
const TOUCH_INTERVAL: Duration = Duration::from_secs(6 * 60 * 60);
const SWEEP_INTERVAL: Duration = Duration::from_secs(60 * 60);

/// Number of records that one renewal touches. Sessions that renew rarely touch more, so that a sweep is done within an
/// hour.
const TOUCHES_PER_RENEWAL: usize = 200;

#[derive(Debug, Default)]
pub(super) struct SessionCache {
    own: Mutex<IdMap<SessionId, OwnSession>>,
    /// Sessions of other processes, and the time until which each lives at least.
    others: Mutex<IdMap<SessionId, BootTime>>,
}

/// A session of this process.
#[derive(Debug)]
struct OwnSession {
    ttl: Duration,
    owner: Arc<str>,
    /// Time until which the store keeps the session at least, without another renewal.
    alive_until: BootTime,
    is_expired: bool,
    pushes: Option<PushSender>,
    listener: Option<AbortHandle>,
    /// Whether the listener has a subscription, and messages to it can be published.
    hears_pushes: bool,
    held: IdMap<TokenId, HeldKey>,
    /// Tokens that the last renewal reported as force-released.
    reported_losses: Vec<TokenId>,
    swept_at: BootTime,
    to_touch: Vec<TokenId>,
    /// Number of records in `to_touch` that each renewal touches.
    touches_per_renewal: usize,
    renewed_at: BootTime,
}

#[derive(Debug)]
struct HeldKey {
    key: Key,
    touched: BootTime,
}

/// Liveness of a session as far as it is cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CachedLiveness {
    Alive(BootTime),
    Expired,
    Unknown,
}

impl SessionCache {
    /// Registers the channel for pushes of a session that is about to be opened.
    pub(super) fn register(&self, session: SessionId, pushes: PushSender) {
        let mut own = lock(&self.own);
        own.entry(session).or_insert_with(OwnSession::new).pushes = Some(pushes);
    }

    /// Returns the channel of a session that needs a listener.
    pub(super) fn pushes_without_listener(&self, session: SessionId) -> Option<PushSender> {
        let own = lock(&self.own);
        let own = own.get(&session).filter(|own| own.listener.is_none())?;
        own.pushes.clone()
    }

    pub(super) fn set_listener(&self, session: SessionId, listener: AbortHandle) {
        match lock(&self.own).get_mut(&session) {
            Some(own) => own.listener = Some(listener),
            None => listener.abort(),
        }
    }

    pub(super) fn set_hears_pushes(&self, session: SessionId, hears: bool) {
        if let Some(own) = lock(&self.own).get_mut(&session) {
            own.hears_pushes = hears && !own.is_expired;
        }
    }

    /// Returns whether pushes reach this process. Its sessions have the same server and the same rights.
    pub(super) fn hears_pushes(&self) -> bool {
        lock(&self.own).values().any(|own| own.hears_pushes)
    }

    /// Records that a session is open. The request was sent at `sent_at`.
    pub(super) fn opened(&self, session: SessionId, sent_at: BootTime, ttl: Duration, owner: Arc<str>) {
        let mut own = lock(&self.own);
        // A session that could not be closed is forgotten now, because nobody tries to close it any more.
        own.retain(|_, own| !own.is_expired || sent_at < own.alive_until.after(MIN_SESSION_RETENTION));
        let own = own.entry(session).or_insert_with(OwnSession::new);
        own.ttl = ttl;
        own.owner = owner;
        // Opening a session again does not renew it: the first request counts.
        if own.alive_until == BootTime::from_nanos(0) {
            own.alive_until = sent_at.after(ttl);
            (own.swept_at, own.renewed_at) = (sent_at, sent_at);
        }
    }

    /// Records a renewal that was sent at `sent_at`, and the tokens that it reported as force-released.
    pub(super) fn renewed(&self, session: SessionId, sent_at: BootTime, reported_losses: Vec<TokenId>) {
        if let Some(own) = lock(&self.own).get_mut(&session) {
            own.alive_until = own.alive_until.max(sent_at.after(own.ttl));
            own.reported_losses = reported_losses;
        }
    }

    /// Returns the session whose last renewal reported this token as force-released.
    pub(super) fn session_that_reported(&self, token: TokenId) -> Option<SessionId> {
        let own = lock(&self.own);
        own.iter().find(|(_, own)| own.reported_losses.contains(&token)).map(|(session, _)| *session)
    }

    /// Returns the tokens with which a session holds keys or waits for them.
    pub(super) fn tokens(&self, session: SessionId) -> Vec<(TokenId, Key)> {
        let own = lock(&self.own);
        let Some(own) = own.get(&session) else { return Vec::new() };
        own.held.iter().map(|(token, held)| (*token, held.key.clone())).collect()
    }

    /// Forgets tokens of a session.
    pub(super) fn forget_tokens(&self, session: SessionId, tokens: impl Iterator<Item = TokenId>) {
        if let Some(own) = lock(&self.own).get_mut(&session) {
            tokens.for_each(|token| drop(own.held.remove(&token)));
        }
    }

    /// Forgets a session of which nothing is left.
    pub(super) fn forget(&self, session: SessionId) {
        lock(&self.own).remove(&session);
    }

    /// Marks a session as expired, which the store has confirmed.
    pub(super) fn mark_expired(&self, session: SessionId) {
        if let Some(own) = lock(&self.own).get_mut(&session) {
            own.is_expired = true;
            // An expired session receives no more pushes.
            own.pushes = None;
            own.hears_pushes = false;
            if let Some(listener) = own.listener.take() {
                listener.abort();
            }
        }
        lock(&self.others).remove(&session);
    }

    /// Records that the store reported, to a request sent at `sent_at`, that a session lives for `left` at least.
    pub(super) fn observed(&self, session: SessionId, sent_at: BootTime, left: Duration) {
        let until = sent_at.after(left);
        if let Some(own) = lock(&self.own).get_mut(&session) {
            own.alive_until = own.alive_until.max(until);
            return;
        }
        let mut others = lock(&self.others);
        if others.len() >= 10_000 {
            others.retain(|_, until| *until > sent_at);
        }
        others.insert(session, until);
    }

    pub(super) fn liveness(&self, session: SessionId, now: BootTime) -> CachedLiveness {
        if let Some(own) = lock(&self.own).get(&session) {
            return match own.alive_until {
                _ if own.is_expired => CachedLiveness::Expired,
                until if until > now => CachedLiveness::Alive(until),
                _ => CachedLiveness::Unknown,
            };
        }
        match lock(&self.others).get(&session) {
            Some(until) if *until > now => CachedLiveness::Alive(*until),
            _ => CachedLiveness::Unknown,
        }
    }

    /// Returns the ttl and the owner of a session; both are empty for a session of another process.
    pub(super) fn ttl_and_owner(&self, session: SessionId) -> (Duration, Arc<str>) {
        lock(&self.own).get(&session).map_or_else(Default::default, |own| (own.ttl, own.owner.clone()))
    }

    pub(super) fn add_token(&self, session: SessionId, token: TokenId, key: &Key, now: BootTime) {
        if let Some(own) = lock(&self.own).get_mut(&session) {
            own.held.entry(token).or_insert_with(|| HeldKey { key: key.clone(), touched: now });
        }
    }

    /// Returns the session of a token of this process.
    pub(super) fn session_of(&self, token: TokenId) -> Option<SessionId> {
        let own = lock(&self.own);
        own.iter().find(|(_, own)| own.held.contains_key(&token)).map(|(session, _)| *session)
    }

    /// Removes a token that is being released. Returns its session if that may have expired.
    pub(super) fn remove_token(&self, token: TokenId, now: BootTime) -> Option<SessionId> {
        let mut own = lock(&self.own);
        let (session, own) = own.iter_mut().find(|(_, own)| own.held.contains_key(&token))?;
        own.held.remove(&token);
        (own.is_expired || own.alive_until <= now).then_some(*session)
    }

    /// Returns the records to touch with this renewal.
    pub(super) fn records_to_touch(&self, session: SessionId, now: BootTime) -> Vec<(TokenId, Key)> {
        let mut own = lock(&self.own);
        let Some(own) = own.get_mut(&session) else { return Vec::new() };
        let interval = now.since(own.renewed_at);
        own.renewed_at = now;
        if own.to_touch.is_empty() && now.since(own.swept_at) >= SWEEP_INTERVAL {
            own.swept_at = now;
            let due = own.held.iter().filter(|(_, held)| now.since(held.touched) >= TOUCH_INTERVAL);
            own.to_touch = due.map(|(token, _)| *token).collect();
            let part = interval.as_secs_f64() / SWEEP_INTERVAL.as_secs_f64();
            own.touches_per_renewal = TOUCHES_PER_RENEWAL.max((own.to_touch.len() as f64 * part).ceil() as usize);
        }
        let rest = own.to_touch.len().saturating_sub(own.touches_per_renewal);
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

impl OwnSession {
    fn new() -> Self {
        Self {
            ttl: Duration::ZERO,
            owner: Arc::default(),
            alive_until: BootTime::from_nanos(0),
            is_expired: false,
            pushes: None,
            listener: None,
            hears_pushes: false,
            held: IdMap::default(),
            reported_losses: Vec::new(),
            swept_at: BootTime::from_nanos(0),
            to_touch: Vec::new(),
            touches_per_renewal: 0,
            renewed_at: BootTime::from_nanos(0),
        }
    }
}

impl Drop for OwnSession {
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
    fn long_holds_are_touched_in_small_portions() {
        let sessions = SessionCache::default();
        let session = SessionId::random().unwrap();
        let start = BootTime::from_nanos(1);
        sessions.opened(session, start, Duration::from_secs(10), "me".into());
        let key = Key::new("", "k").unwrap();
        for _ in 0..500 {
            sessions.add_token(session, TokenId::random().unwrap(), &key, start);
        }
        let gone = TokenId::random().unwrap();
        sessions.add_token(session, gone, &key, start);
        let later = start.after(TOUCH_INTERVAL + SWEEP_INTERVAL);
        for before in [TOUCH_INTERVAL / 2, SWEEP_INTERVAL + Duration::from_secs(1), Duration::from_secs(2)] {
            assert!(sessions.records_to_touch(session, later.before(before)).is_empty());
        }
        assert_eq!(sessions.remove_token(gone, start), None);
        let counts: Vec<_> = (0..4).map(|_| sessions.records_to_touch(session, later).len()).collect();
        assert_eq!(counts, [200, 200, 100, 0]);
        assert!(sessions.records_to_touch(session, later.after(SWEEP_INTERVAL)).is_empty());
    }

    #[test]
    fn rare_renewals_touch_long_holds_in_time() {
        // A record lives for a day, or for twice the session's ttl.
        for (ttl, holds) in [(10, 20_000), (60 * 60, 50_000), (12 * 60 * 60, 20_000), (3 * 24 * 60 * 60, 5_000)] {
            let record_life = Duration::from_secs(ttl * 2).max(Duration::from_secs(24 * 60 * 60));
            let interval = Duration::from_secs(ttl) / 5;
            let sessions = SessionCache::default();
            let session = SessionId::random().unwrap();
            let mut now = BootTime::from_nanos(1);
            sessions.opened(session, now, Duration::from_secs(ttl), Arc::default());
            let key = Key::new("", "k").unwrap();
            let mut touched = std::collections::HashMap::new();
            for _ in 0..holds {
                let token = TokenId::random().unwrap();
                sessions.add_token(session, token, &key, now);
                touched.insert(token, now);
            }
            let end = now.after(record_life * 2);
            while now < end {
                now = now.after(interval);
                for (token, _) in sessions.records_to_touch(session, now) {
                    touched.insert(token, now);
                }
            }
            let oldest = touched.values().min().map(|touched| now.since(*touched)).unwrap();
            assert!(
                oldest < record_life - record_life / 4,
                "ttl {ttl} s, {holds} holds: {oldest:?} of {record_life:?}"
            );
        }
    }

    #[test]
    fn expired_session_is_forgotten_without_close() {
        let sessions = SessionCache::default();
        let (old, new) = (SessionId::random().unwrap(), SessionId::random().unwrap());
        let start = BootTime::from_nanos(1);
        let ttl = Duration::from_secs(10);
        sessions.register(old, crate::store::push_channel().0);
        sessions.opened(old, start, ttl, Arc::default());
        sessions.add_token(old, TokenId::random().unwrap(), &Key::new("", "k").unwrap(), start);
        sessions.mark_expired(old);
        assert!(sessions.pushes_without_listener(old).is_none());
        sessions.opened(new, start.after(ttl), ttl, Arc::default());
        assert_eq!(sessions.tokens(old).len(), 1, "it may still be closed");
        sessions.opened(new, start.after(ttl + MIN_SESSION_RETENTION), ttl, Arc::default());
        assert_eq!((sessions.tokens(old).len(), lock(&sessions.own).len()), (0, 1));
    }

    #[test]
    fn reopening_does_not_renew_a_session() {
        let sessions = SessionCache::default();
        let session = SessionId::random().unwrap();
        let at = |seconds| BootTime::from_nanos(1).after(Duration::from_secs(seconds));
        sessions.opened(session, at(0), Duration::from_secs(10), Arc::default());
        sessions.opened(session, at(5), Duration::from_secs(10), Arc::default());
        assert_eq!(sessions.liveness(session, at(9)), CachedLiveness::Alive(at(10)));
        assert_eq!(sessions.liveness(session, at(10)), CachedLiveness::Unknown);
        sessions.renewed(session, at(6), Vec::new());
        assert_eq!(sessions.liveness(session, at(10)), CachedLiveness::Alive(at(16)));
        sessions.mark_expired(session);
        assert_eq!(sessions.liveness(session, at(10)), CachedLiveness::Expired);
    }
}
