//! Defines the records of keys and sessions that the documents contain.
//!
//! # Written before the commit, completed after it
//! A client does not know when its write will be committed. New data in a record is therefore completed with the
//! document's `update_time`, which the service sets:
//! - a hold without a fence was granted by the commit that wrote it: its fence and its start are the commit time;
//! - an entry with `not_after` was made by the commit that wrote it. If the commit was later than `not_after`, the
//!   entry never existed;
//! - a hold whose `lingers` is 0 was marked by the commit that wrote it: its holder may use the fences up to the commit
//!   time.
//!
//! [`KeyRecord::apply_commit_time`] completes a record as soon as it is read, before any other code sees it.

use googleapis_tonic_google_firestore_v1::google::firestore::v1::Document;
use prost::Message as _;
use prost_types::Timestamp;

use super::document::{bytes_of, micros_of};
use super::error::{error, malformed};
use crate::error::{ErrorKind, Result};
use crate::fence::Fence;
use crate::store::{Demand, Granted, Lifetime, StoreTime};
use crate::token::{SessionId, TokenId};

/// Version of the records that this program writes and reads.
const VERSION: u32 = 1;

/// Contents of the field `record` of a key's document. Times are in µs of the service's clock, and 0 means none.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct KeyRecord {
    #[prost(uint32, tag = "1")]
    pub(super) version: u32,
    /// Changes with each write, because a write without a change would leave `update_time` as it was.
    #[prost(uint64, tag = "2")]
    pub(super) revision: u64,
    #[prost(uint64, tag = "3")]
    pub(super) last_fence: u64,
    #[prost(uint64, tag = "4")]
    pub(super) closed_until: u64,
    #[prost(message, repeated, tag = "5")]
    pub(super) holds: Vec<StoredHold>,
    /// The head of the queue. Later waiters are in the pages.
    #[prost(message, repeated, tag = "6")]
    pub(super) front: Vec<StoredEntry>,
    /// Pages with the rest of the queue, in order.
    #[prost(message, repeated, tag = "7")]
    pub(super) pages: Vec<PageRef>,
    /// Tokens that were force-released and that their holders have not released yet.
    #[prost(message, repeated, tag = "8")]
    pub(super) force_released: Vec<StoredForceRelease>,
}

/// Refers to a queue page and to the revision of the key's record that wrote the page last.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct PageRef {
    #[prost(uint64, tag = "1")]
    pub(super) number: u64,
    #[prost(uint64, tag = "2")]
    pub(super) revision: u64,
}

/// A part of the queue in its own document.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct StoredPage {
    #[prost(message, repeated, tag = "1")]
    pub(super) waiters: Vec<StoredEntry>,
    /// Revision of the key's record that wrote this page.
    #[prost(uint64, tag = "2")]
    pub(super) revision: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct StoredHold {
    #[prost(message, required, tag = "1")]
    pub(super) entry: StoredEntry,
    /// Fence of the hold; 0 means the commit time.
    #[prost(uint64, tag = "4")]
    pub(super) fence: u64,
    #[prost(uint64, optional, tag = "6")]
    pub(super) deadline: Option<u64>,
    /// The token has a notification document, because it was granted from the queue or has waiters.
    #[prost(bool, tag = "14")]
    pub(super) has_notification: bool,
    /// The hold was granted from the queue, and its notification says so.
    #[prost(bool, tag = "17")]
    pub(super) granted_from_queue: bool,
    /// Holder before the commit that wrote this hold, if that commit was an adoption.
    #[prost(message, optional, tag = "15")]
    pub(super) previous: Option<PreviousHolder>,
    /// Newest fence that the holder may use, if the hold lingers; 0 means the commit time.
    ///
    /// A program older than this field drops it when it writes the record. Nobody recalls the hold then, and a waiter
    /// waits for the holder's next `linger`, which finds the waiter. The next fence is higher all the same, because
    /// the service's time is. Only a hold that lingered must not be adopted by the older program, which leaves the hold
    /// its fence although the holder used higher ones.
    #[prost(uint64, optional, tag = "18")]
    pub(super) lingers: Option<u64>,
}

/// Holder that keeps a hold if the adoption's commit comes too late.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct PreviousHolder {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) token: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) session: Vec<u8>,
    #[prost(string, tag = "3")]
    pub(super) owner: String,
    #[prost(uint64, tag = "4")]
    pub(super) not_after: u64,
    /// Fence and mark of the hold, if it lingered; the adopter has a higher fence. Otherwise the fence is 0.
    #[prost(uint64, tag = "5")]
    pub(super) fence: u64,
    #[prost(uint64, optional, tag = "6")]
    pub(super) lingers: Option<u64>,
}

/// An acquired token, which waits or holds.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct StoredEntry {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) token: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) session: Vec<u8>,
    #[prost(bool, tag = "3")]
    pub(super) session_bound: bool,
    /// Time since when the token waits or holds; 0 in a hold means the commit time.
    #[prost(uint64, tag = "5")]
    pub(super) since: u64,
    /// Lifetime of the hold in µs, starting at the grant.
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
    /// Latest commit time at which this new entry takes effect. 0 means that it has taken effect.
    #[prost(uint64, tag = "13")]
    pub(super) not_after: u64,
    /// Time until which its session lives at least. If the session is closed earlier, the closing client releases this
    /// token.
    #[prost(uint64, tag = "16")]
    pub(super) session_alive_until: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct StoredForceRelease {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) token: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) session: Vec<u8>,
}

/// Contents of the field `record` of a session's document. Times are in µs.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SessionRecord {
    #[prost(uint32, tag = "1")]
    pub(super) version: u32,
    #[prost(uint64, tag = "2")]
    pub(super) ttl: u64,
    #[prost(string, tag = "3")]
    pub(super) owner: String,
    /// Latest commit time at which this renewal takes effect. 0 means that another kind of write made this record.
    #[prost(uint64, tag = "4")]
    pub(super) renewed_before: u64,
    /// Time of expiry, if another client wrote the document last. 0 means the ttl after the last write.
    #[prost(uint64, tag = "5")]
    pub(super) fixed_expiry: u64,
    #[prost(bool, tag = "6")]
    pub(super) closed: bool,
    /// Holds of this session that were force-released.
    #[prost(message, repeated, tag = "7")]
    pub(super) lost: Vec<StoredLoss>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct StoredLoss {
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
            let message =
                format!("a record has version {newer}, but this program reads version {VERSION}: update this program");
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
        record.apply_commit_time(micros_of(document.update_time)?);
        Ok((record, written))
    }

    /// Completes the new parts of the record with the time of the commit that wrote them.
    pub(super) fn apply_commit_time(&mut self, committed: u64) {
        self.holds.retain_mut(|hold| is_in_time(&mut hold.entry.not_after, committed));
        for hold in &mut self.holds {
            if hold.fence == 0 {
                hold.fence = committed;
                self.last_fence = self.last_fence.max(committed);
            }
            if hold.lingers == Some(0) {
                self.last_fence = self.last_fence.max(committed);
                hold.lingers = Some(self.last_fence);
            }
            if hold.entry.since == 0 {
                hold.entry.since = committed;
                hold.deadline = hold.entry.length.map(|length| committed.saturating_add(length));
            }
            if let Some(previous) = hold.previous.take()
                && committed > previous.not_after
            {
                let entry = &mut hold.entry;
                (entry.token, entry.session, entry.owner) = (previous.token, previous.session, previous.owner);
                hold.entry.session_alive_until = 0;
                if previous.fence != 0 {
                    (hold.fence, hold.lingers) = (previous.fence, previous.lingers);
                }
            }
        }
        self.front.retain_mut(|waiter| is_in_time(&mut waiter.not_after, committed));
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        Self { version: VERSION, ..self.clone() }.encode_to_vec()
    }
}

impl StoredPage {
    pub(super) fn read(document: &Document) -> Result<Self> {
        let mut page = Self::decode(bytes_of(document, "record")?).map_err(|fault| malformed().with_source(fault))?;
        page.apply_commit_time(micros_of(document.update_time)?);
        Ok(page)
    }

    /// Removes new waiters that the commit wrote too late.
    pub(super) fn apply_commit_time(&mut self, committed: u64) {
        self.waiters.retain_mut(|waiter| is_in_time(&mut waiter.not_after, committed));
    }
}

/// Returns whether an entry took effect, and clears its limit so that later commits don't check it again.
fn is_in_time(not_after: &mut u64, committed: u64) -> bool {
    let is_in_time = *not_after == 0 || committed <= *not_after;
    *not_after = 0;
    is_in_time
}

impl StoredHold {
    pub(super) fn granted(&self, now: u64) -> Granted {
        let until = |deadline: u64| StoreTime::from_micros(deadline).since(StoreTime::from_micros(now));
        Granted { fence: Fence::new(self.fence), remaining: self.deadline.map(until) }
    }
}

impl StoredEntry {
    pub(super) fn lifetime(lifetime: Lifetime) -> (bool, Option<u64>) {
        let length = lifetime.length().map(|length| u64::try_from(length.as_micros()).unwrap_or(u64::MAX));
        (matches!(lifetime, Lifetime::Session { .. }), length)
    }

    /// Returns the requested units and capacity. A damaged entry counts as exclusive.
    pub(super) fn demand(&self) -> Demand {
        Demand::new(self.units, self.capacity).unwrap_or(Demand::MUTEX)
    }
}

impl SessionRecord {
    pub(super) fn new(ttl: u64, owner: String) -> Self {
        Self { version: VERSION, ttl, owner, ..Self::default() }
    }

    /// Returns the record that a closed session leaves behind.
    pub(super) fn closed() -> Self {
        Self { version: VERSION, closed: true, ..Self::default() }
    }

    /// Reads a session's document.
    pub(super) fn read(document: &Document) -> Result<(Self, Timestamp)> {
        let record = Self::decode(bytes_of(document, "record")?).map_err(|fault| malformed().with_source(fault))?;
        checked(record.version)?;
        Ok((record, document.update_time.ok_or_else(malformed)?))
    }

    /// Returns when the session expires unless someone writes it again, or 0 if it was closed or its last renewal came
    /// too late.
    pub(super) fn expires_at(&self, written: u64) -> u64 {
        if self.closed || (self.renewed_before != 0 && written > self.renewed_before) {
            0
        } else if self.fixed_expiry != 0 {
            self.fixed_expiry
        } else {
            written.saturating_add(self.ttl)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn late_commit_makes_no_entry() {
        let waiter = |not_after| StoredEntry { token: vec![1; 16], not_after, ..StoredEntry::default() };
        let hold = |not_after| StoredHold {
            entry: StoredEntry { token: vec![1; 16], not_after, length: Some(5), ..StoredEntry::default() },
            ..StoredHold::default()
        };
        for (committed, entries) in [(99, 1), (100, 1), (101, 0)] {
            let mut record = KeyRecord { holds: vec![hold(100)], front: vec![waiter(100)], ..KeyRecord::default() };
            record.apply_commit_time(committed);
            assert_eq!((record.holds.len(), record.front.len()), (entries, entries), "committed at {committed}");
            if let Some(hold) = record.holds.first() {
                assert_eq!((hold.fence, hold.entry.since, hold.deadline), (committed, committed, Some(committed + 5)));
                assert_eq!(record.last_fence, committed);
            }
            // When the record is read again after other writes, the new commit time must change nothing.
            let before = record.clone();
            record.apply_commit_time(1_000);
            assert_eq!(record, before);
        }
    }

    #[test]
    fn late_adoption_changes_nothing() {
        for lingered in [false, true] {
            let (fence, lingers) = if lingered { (3, Some(5)) } else { (0, None) };
            let previous =
                Some(PreviousHolder { token: vec![1; 16], not_after: 100, fence, lingers, ..Default::default() });
            let entry = StoredEntry { token: vec![2; 16], ..StoredEntry::default() };
            let hold = StoredHold { entry, fence: 7, previous, ..StoredHold::default() };
            for (committed, token) in [(100, 2), (101, 1)] {
                let mut record = KeyRecord { holds: vec![hold.clone()], ..KeyRecord::default() };
                record.apply_commit_time(committed);
                let hold = &record.holds[0];
                assert_eq!((hold.entry.token[0], hold.previous.is_none()), (token, true));
                let is_restored = lingered && token == 1;
                assert_eq!((hold.fence, hold.lingers), if is_restored { (3, Some(5)) } else { (7, None) });
            }
        }
    }

    #[test]
    fn marked_hold_raises_the_last_fence_once() {
        let entry = StoredEntry { token: vec![1; 16], since: 7, ..StoredEntry::default() };
        let hold = StoredHold { entry, fence: 7, lingers: Some(0), ..StoredHold::default() };
        // The last fence is ahead of the clock after the clock was set back.
        for (last_fence, up_to) in [(7, 100), (200, 200)] {
            let mut record = KeyRecord { last_fence, holds: vec![hold.clone()], ..KeyRecord::default() };
            for committed in [100, 1_000] {
                record.apply_commit_time(committed);
                assert_eq!((record.last_fence, record.holds[0].lingers), (up_to, Some(up_to)));
                assert_eq!(record.holds[0].fence, 7);
            }
        }
    }

    #[test]
    fn late_renewal_ends_the_session() {
        let renewed = SessionRecord { ttl: 10, renewed_before: 100, ..SessionRecord::default() };
        assert_eq!(renewed.expires_at(100), 110);
        assert_eq!(renewed.expires_at(101), 0);
        assert_eq!(
            SessionRecord { fixed_expiry: 105, ..renewed.clone() }.expires_at(99),
            105,
            "another client's write keeps the expiry"
        );
        assert_eq!(SessionRecord { closed: true, ..renewed }.expires_at(99), 0);
    }

    #[test]
    fn newer_record_version_is_rejected() {
        assert!(checked(VERSION).is_ok());
        assert_eq!(checked(VERSION + 1).unwrap_err().kind(), ErrorKind::Misconfigured);
        assert_eq!(checked(0).unwrap_err().kind(), ErrorKind::Internal);
    }
}
