//! Opens, renews, reads and closes sessions. Each session is one document, which its process writes at each renewal.
//!
//! A session expires one ttl after its last write. A renewal is one commit and the client learns its time only
//! afterwards. The renewal therefore contains the time by which it must be committed ([`SessionRecord::expires_at`]).
//! If the commit was later, the document itself says that the session has expired. A client that once reads a session
//! as expired can rely on it forever, and needs no transaction to record it.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use prost::Message as _;
use prost_types::Timestamp;

use super::connect::{CallerWatch, CommitError, Lane, Service};
use super::document::{Names, WriteIf, bytes, fields, micros, put, timestamp};
use super::error::malformed;
use super::keys::{attempts, contended};
use super::record::{SessionRecord, token_of};
use super::update::SessionState;
use crate::clock::{BootTime, Clock};
use crate::error::Result;
use crate::key::Key;
use crate::store::{LostToken, OpenOutcome, OpenSession, RenewOutcome, Reply, StoreTime};
use crate::sync::lock;
use crate::token::SessionId;

/// Time for which the cached state of another process's session is valid.
const CACHE_TTL: Duration = Duration::from_secs(1);

/// Maximum number of cached sessions of other processes.
const MAX_CACHED_SESSIONS: usize = 10_000;

/// Minimum time in µs for which a document outlives its session, so that a late request to open the session is
/// rejected.
const RETENTION_AFTER_EXPIRY: u64 = 60_000_000;

/// Caches the sessions of this handle and the sessions that it has read.
#[derive(Debug)]
pub(super) struct SessionCache {
    own: Mutex<HashMap<SessionId, OwnSession>>,
    others: Mutex<HashMap<SessionId, (BootTime, SessionState)>>,
    clock: Clock,
}

/// A session of this handle, with its document as this handle wrote it last.
#[derive(Clone, Debug)]
struct OwnSession {
    record: SessionRecord,
    written: Option<Timestamp>,
    expires_at: u64,
    /// Local time until which the session is valid, measured from before the last write was sent.
    valid_until: BootTime,
}

impl SessionCache {
    pub(super) fn new(clock: Clock) -> Self {
        Self { own: Mutex::default(), others: Mutex::default(), clock }
    }

    /// Returns the owner of a session of this handle that is certainly valid.
    pub(super) fn owner_if_valid(&self, session: SessionId) -> Option<String> {
        let own = lock(&self.own);
        let own = own.get(&session).filter(|own| own.expires_at != 0 && own.valid_until > self.clock.now())?;
        Some(own.record.owner.clone())
    }

    /// Returns whether this handle has closed the session or found it expired.
    pub(super) fn is_closed(&self, session: SessionId) -> bool {
        let own = lock(&self.own).get(&session).map(|own| own.expires_at);
        own.unwrap_or_else(|| lock(&self.others).get(&session).map_or(u64::MAX, |(_, state)| state.expires_at)) == 0
    }

    /// Returns when a session of this handle expires by the service's clock, in µs, unless it is renewed.
    pub(super) fn expires_at(&self, session: SessionId) -> u64 {
        lock(&self.own).get(&session).map_or(0, |own| own.expires_at)
    }

    /// Returns the ttl of a session of this handle, in µs.
    pub(super) fn ttl(&self, session: SessionId) -> u64 {
        lock(&self.own).get(&session).map_or(0, |own| own.record.ttl)
    }

    /// Returns all cached session states that are still valid.
    pub(super) fn snapshot(&self) -> HashMap<SessionId, SessionState> {
        let now = self.clock.now();
        let others = lock(&self.others);
        let valid = others.iter().filter(|(_, (at, state))| state.expires_at == 0 || now.since(*at) < CACHE_TTL);
        let mut session_states: HashMap<_, _> = valid.map(|(session, (_, state))| (*session, state.clone())).collect();
        for (session, own) in lock(&self.own).iter() {
            let state =
                SessionState { expires_at: own.expires_at, owner: own.record.owner.as_str().into(), document: None };
            session_states.insert(*session, state);
        }
        session_states
    }

    /// Reads sessions and the service's time in µs.
    pub(super) async fn read(
        &self,
        service: &Service,
        names: &Names,
        sessions: &[SessionId],
    ) -> Result<(Vec<(SessionId, SessionState)>, u64)> {
        let sent_at = self.clock.now();
        let documents: Vec<_> = sessions.iter().map(|session| names.session(*session)).collect();
        let (documents, now) = service.read(Lane::Keys, &documents).await?;
        let mut read = Vec::new();
        let mut others = lock(&self.others);
        if others.len() + documents.len() > MAX_CACHED_SESSIONS {
            others.clear();
        }
        for (session, document) in sessions.iter().zip(documents) {
            let mut state = SessionState { expires_at: 0, owner: "".into(), document: None };
            // Do not cache a missing session, because it may still be opened.
            if let Some(document) = document {
                let (record, written) = SessionRecord::read(&document)?;
                (state.expires_at, state.owner) = (record.expires_at(micros(written)?), record.owner.as_str().into());
                if state.expires_at <= now {
                    // An expired session stays expired.
                    state.expires_at = 0;
                }
                others.insert(*session, (sent_at, state.clone()));
                if state.expires_at != 0 {
                    state.document = Some((record, written));
                }
            }
            read.push((*session, state));
        }
        Ok((read, now))
    }

    pub(super) async fn open(
        &self,
        service: &Service,
        names: &Names,
        request: OpenSession,
    ) -> Result<Reply<OpenOutcome>> {
        let OpenSession { session, ttl, owner } = request;
        let sent_at = self.clock.now();
        let ttl = u64::try_from(ttl.as_micros()).unwrap_or(u64::MAX);
        let record = SessionRecord::new(ttl, owner);
        // The expiry is unknown until the commit is done. The reaper reads the record before it deletes the document.
        let write = document(names, session, &record, 0, WriteIf::Missing);
        match service.commit(Lane::Sessions, vec![write]).await {
            Ok(done) => {
                self.cache_own(session, record, done.written.first().copied().flatten(), sent_at)?;
                Ok(reply(done.time, OpenOutcome::Opened))
            }
            Err(CommitError::Fault(fault)) => Err(fault),
            Err(CommitError::Contended) => Err(contended()),
            Err(CommitError::Changed) => {
                let (documents, now) = service.read(Lane::Sessions, &[names.session(session)]).await?;
                let Some(document) = documents.into_iter().next().flatten() else { return Err(contended()) };
                let (record, written) = SessionRecord::read(&document)?;
                if record.expires_at(micros(written)?) <= now {
                    return Ok(reply(now, OpenOutcome::Gone));
                }
                // Measure the remaining time from before this read, because the session's time began with its first
                // write.
                let left = record.expires_at(micros(written)?) - now;
                self.cache_own(session, record, Some(written), sent_at)?;
                if let Some(own) = lock(&self.own).get_mut(&session) {
                    own.valid_until = sent_at.after(Duration::from_micros(left));
                }
                Ok(reply(now, OpenOutcome::Opened))
            }
        }
    }

    /// Renews a session, in one commit unless another client has written the document.
    pub(super) async fn renew_session(
        &self,
        service: &Service,
        names: &Names,
        session: SessionId,
        caller: &CallerWatch,
    ) -> Result<Reply<RenewOutcome>> {
        let own = lock(&self.own).get(&session).cloned();
        let mut cached = own.and_then(|own| Some((own.record, own.written?)));
        for attempt in attempts() {
            attempt.pause().await;
            caller.check()?;
            let sent_at = self.clock.now();
            let (mut record, written) = match cached.take() {
                Some(cached) => cached,
                None => {
                    let (documents, now) = service.read(Lane::Sessions, &[names.session(session)]).await?;
                    let read = documents.first().and_then(Option::as_ref).map(SessionRecord::read).transpose()?;
                    match read {
                        Some((record, written)) if record.expires_at(micros(written)?) > now => (record, written),
                        _ => return Ok(self.mark_gone(session, now)),
                    }
                }
            };
            let expires_at = record.expires_at(micros(written)?);
            if expires_at == 0 {
                // Only the service can tell the time.
                let (_, now) = service.read(Lane::Sessions, &[names.session(session)]).await?;
                return Ok(self.mark_gone(session, now));
            }
            (record.renewed_before, record.fixed_expiry) = (expires_at, 0);
            let write =
                document(names, session, &record, expires_at.saturating_add(record.ttl), WriteIf::Unchanged(written));
            match service.commit(Lane::Sessions, vec![write]).await {
                Ok(done) if done.time > expires_at => return Ok(self.mark_gone(session, done.time)),
                Ok(done) => {
                    let lost = record.lost.iter().map(|lost| {
                        let (key, token) = (Key::from_encoded(&lost.key)?, token_of(&lost.token)?);
                        Ok(LostToken { key, token, reason: lost.reason.clone() })
                    });
                    let lost = lost.collect::<Result<_>>()?;
                    self.cache_own(session, record, done.written.first().copied().flatten(), sent_at)?;
                    return Ok(reply(done.time, RenewOutcome::Alive { lost }));
                }
                Err(CommitError::Changed | CommitError::Contended) => {}
                Err(CommitError::Fault(fault)) => {
                    // The renewal may have been written, so the next one must read the document.
                    if let Some(own) = lock(&self.own).get_mut(&session).filter(|_| fault.is_in_doubt()) {
                        own.written = None;
                    }
                    return Err(fault);
                }
            }
        }
        Err(contended())
    }

    /// Closes a session. The caller then reconciles the keys of the session.
    pub(super) async fn close(&self, service: &Service, names: &Names, session: SessionId) -> Result<u64> {
        if let Some(own) = lock(&self.own).get_mut(&session) {
            own.expires_at = 0;
        }
        // Write the document even if the session never existed, so that a late request to open it finds it closed.
        let write = document(names, session, &SessionRecord::closed(), 0, WriteIf::Always);
        match service.commit(Lane::Sessions, vec![write]).await {
            Ok(done) => Ok(self.mark_gone(session, done.time).time.as_micros()),
            Err(CommitError::Fault(fault)) => Err(fault),
            Err(CommitError::Changed | CommitError::Contended) => Err(contended()),
        }
    }

    fn mark_gone(&self, session: SessionId, now: u64) -> Reply<RenewOutcome> {
        lock(&self.own).remove(&session);
        let state = SessionState { expires_at: 0, owner: "".into(), document: None };
        lock(&self.others).insert(session, (self.clock.now(), state));
        reply(now, RenewOutcome::Gone)
    }

    fn cache_own(
        &self,
        session: SessionId,
        record: SessionRecord,
        written: Option<Timestamp>,
        sent_at: BootTime,
    ) -> Result<()> {
        let expires_at = record.expires_at(micros(written.ok_or_else(malformed)?)?);
        let valid_until = sent_at.after(Duration::from_micros(record.ttl));
        let own = OwnSession { record, written, expires_at, valid_until };
        // A session that was closed or found expired in the meantime stays so.
        if !self.is_closed(session) {
            lock(&self.own).insert(session, own);
        }
        Ok(())
    }
}

/// Returns the write of a session's document. `swept_after` is when the reaper looks at the document; if that is too
/// early, the record tells it to wait.
pub(super) fn document(
    names: &Names,
    session: SessionId,
    record: &SessionRecord,
    expires_at: u64,
    write_if: WriteIf,
) -> api::Write {
    let reapable_at = expires_at.saturating_add(RETENTION_AFTER_EXPIRY.max(record.ttl.saturating_mul(2)));
    let all = fields([("record", bytes(record.encode_to_vec())), ("swept_after", timestamp(reapable_at))]);
    put(names.session(session), all, write_if)
}

/// Returns whether a session's document can be deleted.
pub(super) fn is_reapable(record: &SessionRecord, written: Timestamp, now: u64) -> Result<bool> {
    let written = micros(written)?;
    let ended = record.expires_at(written).max(written);
    Ok(record.expires_at(written) <= now
        && ended.saturating_add(RETENTION_AFTER_EXPIRY.max(record.ttl.saturating_mul(2))) <= now)
}

fn reply<T>(time: u64, outcome: T) -> Reply<T> {
    Reply { time: StoreTime::from_micros(time), outcome }
}

/// Returns a warning if sessions with this ttl are renewed faster than the service recommends.
pub(super) fn renewal_rate_warning(ttl: Duration) -> Option<String> {
    (ttl < Duration::from_secs(5)).then(|| {
        format!(
            "a session ttl of {ttl:?} makes the store write the session's document more often than once per second, \
             which is the rate that Firestore sustains: use 5s or more"
        )
    })
}
