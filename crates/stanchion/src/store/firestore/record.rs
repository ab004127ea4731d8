//! What the store keeps of a key and of a session, in documents.
//!
//! # Written now, true from the commit on
//! Whoever writes a document does not know when it will be committed. So what is new in it is judged by the document's own
//! `update_time`, which the service sets:
//! - a hold without a fence got it with the commit that wrote it: its fence and its beginning are that time;
//! - an entry with `not_after` was made by the commit that wrote it. If that was later, the entry never was.
//!
//! [`KeyRecord::settle_commit`] makes that explicit when a document is read, before anybody looks at it.

use googleapis_tonic_google_firestore_v1::google::firestore::v1::Document;
use prost::Message as _;
use prost_types::Timestamp;

use super::document::{bytes_of, micros_of};
use super::error::{error, malformed};
use crate::error::{ErrorKind, Result};
use crate::fence::Fence;
use crate::store::{Demand, Granted, Lifetime, StoreTime};
use crate::token::{SessionId, TokenId};

/// The version of the records that this program writes and reads.
const VERSION: u32 = 1;

/// What a key's document holds in the field `record`. Times are in µs of the service's clock; 0 is none.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct KeyRecord {
    #[prost(uint32, tag = "1")]
    pub(super) version: u32,
    /// Changes with each write: a write that changes nothing would leave `update_time` as it was.
    #[prost(uint64, tag = "2")]
    pub(super) revision: u64,
    #[prost(uint64, tag = "3")]
    pub(super) last_fence: u64,
    #[prost(uint64, tag = "4")]
    pub(super) closed_until: u64,
    #[prost(message, repeated, tag = "5")]
    pub(super) holds: Vec<Hold>,
    /// The queue from its head on, as far as it is here.
    #[prost(message, repeated, tag = "6")]
    pub(super) front: Vec<Entry>,
    /// The pages that the rest of the queue is on, in order.
    #[prost(message, repeated, tag = "7")]
    pub(super) pages: Vec<PageName>,
    /// Tokens that were released by force and have not been ended.
    #[prost(message, repeated, tag = "8")]
    pub(super) forced: Vec<Forced>,
}

/// Which page, and the revision of the key's record that it was last written with.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct PageName {
    #[prost(uint64, tag = "1")]
    pub(super) number: u64,
    #[prost(uint64, tag = "2")]
    pub(super) revision: u64,
}

/// A page of a queue, in a document of its own.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Page {
    #[prost(message, repeated, tag = "1")]
    pub(super) waiters: Vec<Entry>,
    /// The revision of the key's record that it was written with.
    #[prost(uint64, tag = "2")]
    pub(super) revision: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Hold {
    #[prost(message, required, tag = "1")]
    pub(super) entry: Entry,
    /// 0: the time of the commit.
    #[prost(uint64, tag = "4")]
    pub(super) fence: u64,
    #[prost(uint64, optional, tag = "6")]
    pub(super) deadline: Option<u64>,
    /// There is a document that calls it: it was granted to one who waited, or others wait for it.
    #[prost(bool, tag = "14")]
    pub(super) called: bool,
    /// It was granted to one who waited, and is called by that.
    #[prost(bool, tag = "17")]
    pub(super) was_handed_over: bool,
    /// Whose it was until the commit that wrote this, if that was an adoption.
    #[prost(message, optional, tag = "15")]
    pub(super) former: Option<Former>,
}

/// What an adoption that came too late did not change.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Former {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) token: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) session: Vec<u8>,
    #[prost(string, tag = "3")]
    pub(super) owner: String,
    #[prost(uint64, tag = "4")]
    pub(super) not_after: u64,
}

/// What an acquire entered: it waits, or it holds.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Entry {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) token: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) session: Vec<u8>,
    #[prost(bool, tag = "3")]
    pub(super) session_bound: bool,
    /// Since when it waits, or holds. Of a hold 0: since the commit.
    #[prost(uint64, tag = "5")]
    pub(super) at: u64,
    /// How long it holds, from the grant on.
    #[prost(uint64, optional, tag = "7")]
    pub(super) length: Option<u64>,
    #[prost(uint32, tag = "8")]
    pub(super) units: u32,
    #[prost(uint32, tag = "9")]
    pub(super) capacity: u32,
    #[prost(string, tag = "10")]
    pub(super) owner: String,
    #[prost(string, optional, tag = "11")]
    pub(super) metadata: Option<String>,
    #[prost(string, optional, tag = "12")]
    pub(super) trace: Option<String>,
    /// It was entered by the commit that wrote this, if that was not later.
    #[prost(uint64, tag = "13")]
    pub(super) not_after: u64,
    /// Its session lives until then at least, unless it is closed, and then it ends this.
    #[prost(uint64, tag = "16")]
    pub(super) session_lives: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Forced {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) token: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) session: Vec<u8>,
}

/// What a session's document holds in the field `record`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SessionRecord {
    #[prost(uint32, tag = "1")]
    pub(super) version: u32,
    #[prost(uint64, tag = "2")]
    pub(super) ttl: u64,
    #[prost(string, tag = "3")]
    pub(super) owner: String,
    /// The beat that wrote this was in time if it was committed before. 0: it was no beat.
    #[prost(uint64, tag = "4")]
    pub(super) beaten_before: u64,
    /// When it ends, where another than the session itself wrote the document. 0: its ttl after the last write.
    #[prost(uint64, tag = "5")]
    pub(super) expires: u64,
    #[prost(bool, tag = "6")]
    pub(super) closed: bool,
    /// What was taken from it by force.
    #[prost(message, repeated, tag = "7")]
    pub(super) lost: Vec<Lost>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Lost {
    #[prost(string, tag = "1")]
    pub(super) key: String,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) token: Vec<u8>,
    #[prost(string, tag = "3")]
    pub(super) reason: String,
}

fn checked(version: u32) -> Result<()> {
    match version {
        VERSION => Ok(()),
        newer if newer > VERSION => {
            let message = format!("a record has version {newer}, this program reads {VERSION}: update this program");
            Err(error(ErrorKind::Misconfigured, message))
        }
        _ => Err(malformed()),
    }
}

pub(super) fn session_of(bytes: &[u8]) -> Result<SessionId> {
    Ok(SessionId::from_bytes(bytes.try_into().map_err(|_| malformed())?))
}

pub(super) fn token_of(bytes: &[u8]) -> Result<TokenId> {
    Ok(TokenId::from_bytes(bytes.try_into().map_err(|_| malformed())?))
}

impl KeyRecord {
    /// Reads a key's document.
    pub(super) fn read(document: &Document) -> Result<(Self, Timestamp)> {
        let mut record = Self::decode(bytes_of(document, "record")?).map_err(|fault| malformed().with_source(fault))?;
        checked(record.version)?;
        let written = document.update_time.ok_or_else(malformed)?;
        record.settle_commit(micros_of(document.update_time)?);
        Ok((record, written))
    }

    /// Makes explicit what the commit decided that wrote this.
    pub(super) fn settle_commit(&mut self, committed: u64) {
        self.holds.retain_mut(|hold| is_in_time(&mut hold.entry.not_after, committed));
        for hold in &mut self.holds {
            if hold.fence == 0 {
                hold.fence = committed;
                self.last_fence = self.last_fence.max(committed);
            }
            if hold.entry.at == 0 {
                hold.entry.at = committed;
                hold.deadline = hold.entry.length.map(|length| committed.saturating_add(length));
            }
            if let Some(former) = hold.former.take()
                && committed > former.not_after
            {
                let entry = &mut hold.entry;
                (entry.token, entry.session, entry.owner) = (former.token, former.session, former.owner);
                hold.entry.session_lives = 0;
            }
        }
        self.front.retain_mut(|waiter| is_in_time(&mut waiter.not_after, committed));
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        Self { version: VERSION, ..self.clone() }.encode_to_vec()
    }
}

impl Page {
    pub(super) fn read(document: &Document) -> Result<Self> {
        let mut page = Self::decode(bytes_of(document, "record")?).map_err(|fault| malformed().with_source(fault))?;
        page.settle_commit(micros_of(document.update_time)?);
        Ok(page)
    }

    /// Makes explicit what the commit decided that wrote this.
    pub(super) fn settle_commit(&mut self, committed: u64) {
        self.waiters.retain_mut(|waiter| is_in_time(&mut waiter.not_after, committed));
    }
}

/// Whether an entry was made in time. From then on it needs no proof.
fn is_in_time(not_after: &mut u64, committed: u64) -> bool {
    let is_in_time = *not_after == 0 || committed <= *not_after;
    *not_after = 0;
    is_in_time
}

impl Hold {
    pub(super) fn granted(&self, now: u64) -> Granted {
        let until = |deadline: u64| StoreTime::from_micros(deadline).since(StoreTime::from_micros(now));
        Granted { fence: Fence::new(self.fence), remaining: self.deadline.map(until) }
    }
}

impl Entry {
    pub(super) fn lifetime(lifetime: Lifetime) -> (bool, Option<u64>) {
        let length = lifetime.length().map(|length| u64::try_from(length.as_micros()).unwrap_or(u64::MAX));
        (matches!(lifetime, Lifetime::Session { .. }), length)
    }

    /// A damaged one takes the whole key.
    pub(super) fn demand(&self) -> Demand {
        Demand::new(self.units, self.capacity).unwrap_or(Demand::MUTEX)
    }
}

impl SessionRecord {
    pub(super) fn new(ttl: u64, owner: String) -> Self {
        Self { version: VERSION, ttl, owner, ..Self::default() }
    }

    /// What is left of one that was closed.
    pub(super) fn closed() -> Self {
        Self { version: VERSION, closed: true, ..Self::default() }
    }

    /// Reads a session's document.
    pub(super) fn read(document: &Document) -> Result<(Self, Timestamp)> {
        let record = Self::decode(bytes_of(document, "record")?).map_err(|fault| malformed().with_source(fault))?;
        checked(record.version)?;
        Ok((record, document.update_time.ok_or_else(malformed)?))
    }

    /// When it ends, if nobody writes it any more. A beat that came too late ended it: 0.
    pub(super) fn ends(&self, written: u64) -> u64 {
        if self.closed || (self.beaten_before != 0 && written > self.beaten_before) {
            0
        } else if self.expires != 0 {
            self.expires
        } else {
            written.saturating_add(self.ttl)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_late_commit_made_never_was() {
        let waiter = |not_after| Entry { token: vec![1; 16], not_after, ..Entry::default() };
        let hold = |not_after| Hold {
            entry: Entry { token: vec![1; 16], not_after, length: Some(5), ..Entry::default() },
            ..Hold::default()
        };
        for (committed, entries) in [(99, 1), (100, 1), (101, 0)] {
            let mut record = KeyRecord { holds: vec![hold(100)], front: vec![waiter(100)], ..KeyRecord::default() };
            record.settle_commit(committed);
            assert_eq!((record.holds.len(), record.front.len()), (entries, entries), "committed at {committed}");
            if let Some(hold) = record.holds.first() {
                assert_eq!((hold.fence, hold.entry.at, hold.deadline), (committed, committed, Some(committed + 5)));
                assert_eq!(record.last_fence, committed);
            }
            // Read again after others wrote, nothing is judged anew.
            let before = record.clone();
            record.settle_commit(1_000);
            assert_eq!(record, before);
        }
    }

    #[test]
    fn an_adoption_that_came_too_late_changed_nothing() {
        let former = Some(Former { token: vec![1; 16], session: vec![1; 16], owner: "one".into(), not_after: 100 });
        let entry = Entry { token: vec![2; 16], ..Entry::default() };
        let hold = Hold { entry, fence: 7, former, ..Hold::default() };
        for (committed, token) in [(100, 2), (101, 1)] {
            let mut record = KeyRecord { holds: vec![hold.clone()], ..KeyRecord::default() };
            record.settle_commit(committed);
            assert_eq!((record.holds[0].entry.token[0], record.holds[0].former.is_none()), (token, true));
        }
    }

    #[test]
    fn a_late_beat_ends_its_session_for_good() {
        let beaten = SessionRecord { ttl: 10, beaten_before: 100, ..SessionRecord::default() };
        assert_eq!(beaten.ends(100), 110);
        assert_eq!(beaten.ends(101), 0);
        assert_eq!(SessionRecord { expires: 105, ..beaten.clone() }.ends(99), 105, "written by another meanwhile");
        assert_eq!(SessionRecord { closed: true, ..beaten }.ends(99), 0);
    }

    #[test]
    fn a_record_of_a_newer_program_is_not_touched() {
        assert!(checked(VERSION).is_ok());
        assert_eq!(checked(VERSION + 1).unwrap_err().kind(), ErrorKind::Misconfigured);
        assert_eq!(checked(0).unwrap_err().kind(), ErrorKind::Internal);
    }
}
