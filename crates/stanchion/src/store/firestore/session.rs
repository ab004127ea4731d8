//! Sessions: a document each, which its process writes with every beat.
//!
//! A session ends its ttl after the last write. A beat is one commit, so nobody looks at the clock before it is done; it
//! says instead by when it must have been done ([`SessionRecord::ends`]), and if it came later, the session is dead by its
//! own document. So who found it dead is right for good, and needs no transaction to say so.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use prost::Message as _;
use prost_types::Timestamp;

use super::connect::{Interest, Lane, Refused, Service, lock};
use super::document::{Names, Only, bytes, fields, micros, put, timestamp};
use super::error::malformed;
use super::keys::{busy, rounds};
use super::record::{SessionRecord, token_of};
use super::step::Life;
use crate::clock::{BootTime, Clock};
use crate::error::Result;
use crate::key::Key;
use crate::store::{LostToken, OpenOutcome, OpenSession, RenewOutcome, Reply, StoreTime};
use crate::token::SessionId;

/// What another process's session was found to be is taken for true for so long.
const KNOWN_FOR: Duration = Duration::from_secs(1);

/// The most sessions of others that are remembered.
const MOST_KNOWN: usize = 10_000;

/// A session's document stays for at least so long after its end: a late question to open it is refused.
const KEPT_AFTER: u64 = 60_000_000;

/// The sessions of this handle, and what is known of others.
#[derive(Debug)]
pub(super) struct Sessions {
    own: Mutex<HashMap<SessionId, Own>>,
    known: Mutex<HashMap<SessionId, (BootTime, Life)>>,
    clock: Clock,
}

/// A session that this handle opened, as its document was when this handle wrote it last.
#[derive(Clone, Debug)]
struct Own {
    record: SessionRecord,
    written: Option<Timestamp>,
    ends: u64,
    /// Counted from before the last write was asked for.
    lives_until: BootTime,
}

impl Sessions {
    pub(super) fn new(clock: Clock) -> Self {
        Self { own: Mutex::default(), known: Mutex::default(), clock }
    }

    /// Who it is, if it is a session of this handle that lives for certain.
    pub(super) fn owner_if_alive(&self, session: SessionId) -> Option<String> {
        let own = lock(&self.own);
        let own = own.get(&session).filter(|own| own.ends != 0 && own.lives_until > self.clock.now())?;
        Some(own.record.owner.clone())
    }

    /// This handle closed it, or found it dead.
    pub(super) fn is_closed(&self, session: SessionId) -> bool {
        let own = lock(&self.own).get(&session).map(|own| own.ends);
        own.unwrap_or_else(|| lock(&self.known).get(&session).map_or(u64::MAX, |(_, life)| life.ends)) == 0
    }

    /// When a session of this handle ends by the service's clock, unless it is beaten.
    pub(super) fn ends(&self, session: SessionId) -> u64 {
        lock(&self.own).get(&session).map_or(0, |own| own.ends)
    }

    /// The ttl of a session of this handle, in µs.
    pub(super) fn ttl(&self, session: SessionId) -> u64 {
        lock(&self.own).get(&session).map_or(0, |own| own.record.ttl)
    }

    /// What is known of sessions without asking.
    pub(super) fn known(&self) -> HashMap<SessionId, Life> {
        let now = self.clock.now();
        let known = lock(&self.known);
        let fresh = known.iter().filter(|(_, (at, life))| life.ends == 0 || now.since(*at) < KNOWN_FOR);
        let mut lives: HashMap<_, _> = fresh.map(|(session, (_, life))| (*session, life.clone())).collect();
        for (session, own) in lock(&self.own).iter() {
            let life = Life { ends: own.ends, owner: own.record.owner.as_str().into(), document: None };
            lives.insert(*session, life);
        }
        lives
    }

    /// Reads sessions, and when.
    pub(super) async fn read(
        &self,
        service: &Service,
        names: &Names,
        sessions: &[SessionId],
    ) -> Result<(Vec<(SessionId, Life)>, u64)> {
        let asked = self.clock.now();
        let documents: Vec<_> = sessions.iter().map(|session| names.session(*session)).collect();
        let (documents, now) = service.read(Lane::Steps, &documents).await?;
        let mut read = Vec::new();
        let mut known = lock(&self.known);
        if known.len() + documents.len() > MOST_KNOWN {
            known.clear();
        }
        for (session, document) in sessions.iter().zip(documents) {
            let mut life = Life { ends: 0, owner: "".into(), document: None };
            // What is not there may be opened yet, and is remembered by nobody.
            if let Some(document) = document {
                let (record, written) = SessionRecord::read(&document)?;
                (life.ends, life.owner) = (record.ends(micros(written)?), record.owner.as_str().into());
                if life.ends <= now {
                    // For good.
                    life.ends = 0;
                }
                known.insert(*session, (asked, life.clone()));
                if life.ends != 0 {
                    life.document = Some((record, written));
                }
            }
            read.push((*session, life));
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
        let asked = self.clock.now();
        let ttl = u64::try_from(ttl.as_micros()).unwrap_or(u64::MAX);
        let record = SessionRecord::new(ttl, owner);
        // Its end is not known before it is there; the sweep looks at the document again.
        let write = document(names, session, &record, 0, Only::IfMissing);
        match service.commit(Lane::Session, vec![write]).await {
            Ok(done) => {
                self.keep(session, record, done.written.first().copied().flatten(), asked)?;
                Ok(reply(done.time, OpenOutcome::Opened))
            }
            Err(Refused::Fault(fault)) => Err(fault),
            Err(Refused::Contended) => Err(busy()),
            Err(Refused::Changed) => {
                let (documents, now) = service.read(Lane::Session, &[names.session(session)]).await?;
                let Some(document) = documents.into_iter().next().flatten() else { return Err(busy()) };
                let (record, written) = SessionRecord::read(&document)?;
                if record.ends(micros(written)?) <= now {
                    return Ok(reply(now, OpenOutcome::Gone));
                }
                // Counted from before that very question: its time is the one of its first write.
                let left = record.ends(micros(written)?) - now;
                self.keep(session, record, Some(written), asked)?;
                if let Some(own) = lock(&self.own).get_mut(&session) {
                    own.lives_until = asked.after(Duration::from_micros(left));
                }
                Ok(reply(now, OpenOutcome::Opened))
            }
        }
    }

    /// One commit, as long as nobody else writes the document.
    pub(super) async fn renew_session(
        &self,
        service: &Service,
        names: &Names,
        session: SessionId,
        wanted: &Interest,
    ) -> Result<Reply<RenewOutcome>> {
        let remembered = lock(&self.own).get(&session).cloned();
        let mut at_hand = remembered.and_then(|own| Some((own.record, own.written?)));
        for round in rounds() {
            round.pause().await;
            wanted.check()?;
            let asked = self.clock.now();
            let (mut record, written) = match at_hand.take() {
                Some(at_hand) => at_hand,
                None => {
                    let (documents, now) = service.read(Lane::Session, &[names.session(session)]).await?;
                    let read = documents.first().and_then(Option::as_ref).map(SessionRecord::read).transpose()?;
                    match read {
                        Some((record, written)) if record.ends(micros(written)?) > now => (record, written),
                        _ => return Ok(self.gone(session, now)),
                    }
                }
            };
            let ends = record.ends(micros(written)?);
            if ends == 0 {
                // Only the service tells the time.
                let (_, now) = service.read(Lane::Session, &[names.session(session)]).await?;
                return Ok(self.gone(session, now));
            }
            (record.beaten_before, record.expires) = (ends, 0);
            let write = document(names, session, &record, ends.saturating_add(record.ttl), Only::IfStill(written));
            match service.commit(Lane::Session, vec![write]).await {
                Ok(done) if done.time > ends => return Ok(self.gone(session, done.time)),
                Ok(done) => {
                    let lost = record.lost.iter().map(|lost| {
                        let (key, token) = (Key::from_encoded(&lost.key)?, token_of(&lost.token)?);
                        Ok(LostToken { key, token, reason: lost.reason.clone() })
                    });
                    let lost = lost.collect::<Result<_>>()?;
                    self.keep(session, record, done.written.first().copied().flatten(), asked)?;
                    return Ok(reply(done.time, RenewOutcome::Alive { lost }));
                }
                Err(Refused::Changed | Refused::Contended) => {}
                Err(Refused::Fault(fault)) => {
                    // What it wrote, if it did, is read before the next one.
                    if let Some(own) = lock(&self.own).get_mut(&session).filter(|_| fault.is_in_doubt()) {
                        own.written = None;
                    }
                    return Err(fault);
                }
            }
        }
        Err(busy())
    }

    /// Ends a session. What depends on it is for others to settle.
    pub(super) async fn close(&self, service: &Service, names: &Names, session: SessionId) -> Result<u64> {
        if let Some(own) = lock(&self.own).get_mut(&session) {
            own.ends = 0;
        }
        // Also one that never was: a late question to open it finds it closed.
        let write = document(names, session, &SessionRecord::closed(), 0, Only::Always);
        match service.commit(Lane::Session, vec![write]).await {
            Ok(done) => Ok(self.gone(session, done.time).time.as_micros()),
            Err(Refused::Fault(fault)) => Err(fault),
            Err(Refused::Changed | Refused::Contended) => Err(busy()),
        }
    }

    fn gone(&self, session: SessionId, now: u64) -> Reply<RenewOutcome> {
        lock(&self.own).remove(&session);
        let life = Life { ends: 0, owner: "".into(), document: None };
        lock(&self.known).insert(session, (self.clock.now(), life));
        reply(now, RenewOutcome::Gone)
    }

    fn keep(
        &self,
        session: SessionId,
        record: SessionRecord,
        written: Option<Timestamp>,
        asked: BootTime,
    ) -> Result<()> {
        let ends = record.ends(micros(written.ok_or_else(malformed)?)?);
        let lives_until = asked.after(Duration::from_micros(record.ttl));
        let kept = Own { record, written, ends, lives_until };
        // One that was closed meanwhile, or found dead, stays so.
        if !self.is_closed(session) {
            lock(&self.own).insert(session, kept);
        }
        Ok(())
    }
}

/// A session's document. `swept_after` is for the sweep: who finds it earlier reads the record.
pub(super) fn document(names: &Names, session: SessionId, record: &SessionRecord, ends: u64, only: Only) -> api::Write {
    let kept = ends.saturating_add(KEPT_AFTER.max(record.ttl.saturating_mul(2)));
    let all = fields([("record", bytes(record.encode_to_vec())), ("swept_after", timestamp(kept))]);
    put(names.session(session), all, only)
}

/// When a session's document may go.
pub(super) fn may_go(record: &SessionRecord, written: Timestamp, now: u64) -> Result<bool> {
    let written = micros(written)?;
    let ended = record.ends(written).max(written);
    Ok(record.ends(written) <= now && ended.saturating_add(KEPT_AFTER.max(record.ttl.saturating_mul(2))) <= now)
}

fn reply<T>(time: u64, outcome: T) -> Reply<T> {
    Reply { time: StoreTime::from_micros(time), outcome }
}

/// The pace of beats that the service asks for.
pub(super) fn too_fast(ttl: Duration) -> Option<String> {
    (ttl < Duration::from_secs(5)).then(|| {
        format!(
            "a session ttl of {ttl:?} writes its document more often than once a second, which is what Firestore sustains: \
             5s or more is better"
        )
    })
}
