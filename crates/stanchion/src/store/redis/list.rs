//! Lists the keys of the servers, a page at a time, with SCAN, plain reads, and queries of many sessions at once.
//!
//! No script runs on a key, and the only write marks an expired session as expired (`session_remaining.lua`).

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::{Duration, SystemTime};

use futures_util::future::join_all;
use redis::{Pipeline, RedisError, Value};

use super::codec::{Problem, Record, StoredWaiter};
use super::config::Address;
use super::connect::Target;
use super::error::{error, from_answer};
use super::reply::malformed;
use super::sessions::CachedLiveness;
use super::{Inner, MAX_CONCURRENT_REQUESTS};
use crate::error::{Error, ErrorKind, Result};
use crate::key::Key;
use crate::store::{
    Cursor, DamagedEntry, HolderState, KeyState, Listing, MAX_ROWS_PER_PAGE, Reply, StoreTime, WaiterState,
};
use crate::token::SessionId;

/// Maximum number of keys that one SCAN may visit, because SCAN blocks the server for all other clients.
const MAX_SCAN_COUNT: usize = 10_000;

/// Position of a listing: the current server, the SCAN cursor there, and the servers that are done. If a page met too
/// many waiters, the names of the remaining keys are here too, and make up the next page.
#[derive(Debug, Default, PartialEq, Eq)]
struct Place {
    server: String,
    scan: String,
    done: Vec<String>,
    names: Vec<String>,
}

impl Place {
    fn write(&self) -> Cursor {
        let counts = [self.done.len().to_string()];
        let texts = [&self.server, &self.scan].into_iter().chain(&counts).chain(&self.done).chain(&self.names);
        let mut written = String::new();
        for text in texts {
            written.push_str(&format!("{}:{text}", text.len()));
        }
        Cursor::new(written)
    }

    fn read(cursor: &Cursor) -> Option<Self> {
        let (mut rest, mut texts) = (cursor.as_str(), Vec::new());
        while !rest.is_empty() {
            let (length, after) = rest.split_once(':')?;
            let (text, after) = after.split_at_checked(length.parse().ok()?)?;
            texts.push(text.to_owned());
            rest = after;
        }
        let mut texts = texts.into_iter();
        let (server, scan, count) = (texts.next()?, texts.next()?, texts.next()?.parse().ok()?);
        let mut done: Vec<_> = texts.collect();
        let names = (done.len() >= count).then(|| done.split_off(count))?;
        Some(Self { server, scan, done, names })
    }
}

/// A key and its record, before its sessions are queried.
struct Found {
    key: Key,
    record: Record,
    waiters: Vec<StoredWaiter>,
}

impl Inner {
    pub(super) async fn list(&self, prefix: &str, cursor: Option<&Cursor>, limit: usize) -> Result<Reply<Listing>> {
        let place = cursor.map_or_else(|| Some(Place::default()), Place::read);
        let mut place =
            place.ok_or_else(|| error(ErrorKind::InvalidArgument, "the cursor belongs to another store"))?;
        let mut listing = Listing::default();
        let servers = self.manager.servers().await?;
        let named = |address: &&Address| address.to_string() == place.server;
        let Some(server) = servers.iter().find(named).or_else(|| {
            // The listing begins, or another server has replaced this one, which cannot continue the old server's
            // cursor.
            (place.scan, place.names) = ("0".into(), Vec::new());
            servers.iter().find(|address| !place.done.contains(&address.to_string()))
        }) else {
            return Ok(Reply { time: self.time().await?, outcome: listing });
        };
        place.server = server.to_string();
        let names = if place.names.is_empty() {
            let (next, names) = self.scan(server, &place.scan, prefix, limit.clamp(1, MAX_SCAN_COUNT)).await?;
            place.scan = next;
            names
        } else {
            std::mem::take(&mut place.names).into_iter().map(String::into_bytes).collect()
        };
        let time = self.read_page(server, prefix, names, &mut listing, &mut place.names).await?;
        if place.names.is_empty() && place.scan == "0" {
            place.done.push(std::mem::take(&mut place.server));
        }
        let is_last = servers.iter().all(|address| place.done.contains(&address.to_string()));
        listing.next = (!is_last).then(|| place.write());
        Ok(Reply { time, outcome: listing })
    }

    async fn scan(&self, server: &Address, cursor: &str, prefix: &str, count: usize) -> Result<(String, Vec<Vec<u8>>)> {
        let mut command = redis::cmd("SCAN");
        command.arg(cursor).arg("MATCH").arg(self.names.pattern(prefix)).arg("COUNT").arg(count);
        let page = self.manager.query(Target::Server(server.clone()), &command).await.map_err(|fault| {
            let wanted = match fault.kind() {
                ErrorKind::Unauthorized => "listing keys needs the right to SCAN: ACL SETUSER … +scan",
                ErrorKind::Unsupported => "listing keys needs SCAN, which the server does not offer",
                _ => return fault,
            };
            let (kind, message) = (fault.kind(), format!("{wanted} ({})", fault.message()));
            fault.restate(kind, message)
        })?;
        redis::from_redis_value(page).map_err(|_| malformed())
    }

    /// Reads the keys with these names. Names that are too much for one page go to `remaining`.
    async fn read_page(
        &self,
        server: &Address,
        prefix: &str,
        names: Vec<Vec<u8>>,
        listing: &mut Listing,
        remaining: &mut Vec<String>,
    ) -> Result<StoreTime> {
        let mut keys: BTreeMap<String, Key> = BTreeMap::new();
        for name in names {
            match self.key_named(&name) {
                Ok(Some((name, key))) if key.as_encoded().starts_with(prefix) => drop(keys.insert(name, key)),
                Ok(_) => {}
                Err(entry) => listing.damaged.push(entry),
            }
        }
        let mut reads = Pipeline::with_capacity(keys.len() + 1);
        reads.cmd("TIME");
        for name in keys.keys() {
            reads.cmd("GET").arg(name);
        }
        let mut answers = self.manager.query_all(server, reads).await?.into_iter();
        let (seconds, micros): (u64, u64) = self.answer(server, answers.next())?;
        let now = StoreTime::from_micros(seconds.saturating_mul(1_000_000).saturating_add(micros));
        let mut found = Vec::new();
        for ((name, key), answer) in keys.into_iter().zip(answers) {
            let record: Result<Option<Vec<u8>>> = self.answer(server, Some(answer));
            match record.map(|record| record.as_deref().map(Record::read)) {
                Ok(None) => {}
                Ok(Some(Ok(record))) => found.push((name, Found { key, record, waiters: Vec::new() })),
                Ok(Some(Err(problem))) => listing.damaged.push(DamagedEntry::new(key.as_encoded(), problem)),
                Err(fault) => self.read_single(&key, fault, listing).await?,
            }
        }
        self.read_queues(server, &mut found, listing, remaining).await?;
        let found: Vec<Found> = found.into_iter().map(|(_, found)| found).collect();
        self.show(found, now, listing).await?;
        Ok(now)
    }

    /// Returns the key of a name that SCAN found; `None` if the name belongs to something else.
    fn key_named(&self, name: &[u8]) -> std::result::Result<Option<(String, Key)>, DamagedEntry> {
        let text = String::from_utf8_lossy(name);
        let problem = |text: &str| DamagedEntry::new(text, "its name is not the name of a key");
        match self.names.key_of(&text) {
            None => Ok(None),
            // A different name that decodes to the same key is not where the library looks for the record.
            Some(Ok(key)) if self.names.lock(&key).record().as_bytes() == name => Ok(Some((text.into_owned(), key))),
            Some(_) => Err(problem(&text)),
        }
    }

    /// Reads the waiters of the queued keys, in order, until the page is full.
    async fn read_queues(
        &self,
        server: &Address,
        found: &mut Vec<(String, Found)>,
        listing: &mut Listing,
        remaining: &mut Vec<String>,
    ) -> Result<()> {
        let mut counts = Pipeline::new();
        let is_queued = |found: &&(String, Found)| found.1.record.queued;
        for (_, found) in found.iter().filter(is_queued) {
            counts.cmd("ZCARD").arg(self.names.lock(&found.key).all()[1]);
        }
        if counts.is_empty() {
            return Ok(());
        }
        let mut counts = self.manager.query_all(server, counts).await?.into_iter();
        let (mut rows, mut fits) = (0, 0);
        for (_, found) in found.iter() {
            if found.record.queued {
                // A queue that cannot be counted is reported as damaged below.
                rows += self.answer::<usize>(server, counts.next()).unwrap_or(0);
            }
            rows += found.record.holds.len();
            if rows > MAX_ROWS_PER_PAGE && fits > 0 {
                break;
            }
            fits += 1;
        }
        remaining.extend(found.split_off(fits).into_iter().map(|(name, _)| name));
        let mut reads = Pipeline::new();
        for (_, found) in found.iter().filter(is_queued) {
            let names = self.names.lock(&found.key);
            let [_, queue, waiting] = names.all();
            reads.cmd("ZRANGE").arg(queue).arg(0).arg(-1).cmd("HGETALL").arg(waiting);
        }
        if reads.is_empty() {
            return Ok(());
        }
        let mut answers = self.manager.query_all(server, reads).await?.into_iter();
        let mut damaged = HashSet::new();
        for (name, found) in found.iter_mut().filter(|found| found.1.record.queued) {
            let tokens: Result<Vec<Vec<u8>>> = self.answer(server, answers.next());
            let requests: Result<HashMap<Vec<u8>, Vec<u8>>> = self.answer(server, answers.next());
            // The request of a waiter may be gone by now, or the server may have evicted it.
            let read = |tokens: Vec<Vec<u8>>, requests: HashMap<Vec<u8>, Vec<u8>>| {
                tokens
                    .iter()
                    .filter_map(|token| requests.get(token))
                    .map(|requests| StoredWaiter::read(requests))
                    .collect()
            };
            match tokens.and_then(|tokens| Ok(read(tokens, requests?))) {
                Ok(Ok(waiters)) => {
                    found.waiters = waiters;
                    continue;
                }
                Ok(Err(problem)) => {
                    let problem: Problem = problem;
                    listing.damaged.push(DamagedEntry::new(found.key.as_encoded(), format!("its queue: {problem}")));
                }
                Err(fault) => self.read_single(&found.key, fault, listing).await?,
            }
            damaged.insert(name.clone());
        }
        found.retain(|(name, _)| !damaged.contains(name));
        Ok(())
    }

    /// Handles a key that the server refused to read. In a cluster the key may be on its way to another node, where a
    /// script finds it.
    async fn read_single(&self, key: &Key, fault: Error, listing: &mut Listing) -> Result<()> {
        let mut fault = fault;
        if self.manager.is_cluster() && is_damage(&fault) {
            match Box::pin(self.reconciled_state(key, &self.names.lock(key))).await {
                Ok(Reply { outcome, .. }) => {
                    let idle = outcome.holders.is_empty() && outcome.waiters.is_empty() && outcome.closed_for.is_none();
                    listing.keys.extend((!idle).then_some(outcome));
                    return Ok(());
                }
                Err(again) => fault = again,
            }
        }
        if !is_damage(&fault) {
            return Err(fault);
        }
        listing.damaged.push(DamagedEntry::new(key.as_encoded(), fault.message()));
        Ok(())
    }

    /// Lists the holds and waiters, except those of expired sessions and holds past their deadline.
    async fn show(&self, found: Vec<Found>, now: StoreTime, listing: &mut Listing) -> Result<()> {
        let mut sessions = BTreeSet::new();
        for found in &found {
            sessions.extend(found.record.holds.iter().filter(|hold| hold.ends_with_session).map(|hold| hold.session));
            sessions.extend(found.waiters.iter().map(|waiter| waiter.session));
        }
        let (expired, unreadable) = self.expired_or_unreadable(&sessions.into_iter().collect::<Vec<_>>()).await?;
        for Found { key, record, waiters } in found {
            let lives = |session: &SessionId| !expired.contains(session);
            let holds: Vec<_> = record
                .holds
                .into_iter()
                .filter(|hold| hold.deadline.is_none_or(|deadline| deadline > now))
                .filter(|hold| !hold.ends_with_session || lives(&hold.session))
                .collect();
            let waiters: Vec<_> = waiters.into_iter().filter(|waiter| lives(&waiter.session)).collect();
            let bound = holds.iter().filter(|hold| hold.ends_with_session).map(|hold| hold.session);
            if bound.chain(waiters.iter().map(|waiter| waiter.session)).any(|session| unreadable.contains(&session)) {
                let problem = "the session of a holder or of a waiter cannot be read";
                listing.damaged.push(DamagedEntry::new(key.as_encoded(), problem));
                continue;
            }
            let closed_for = record.closed_until.filter(|until| *until > now).map(|until| until.since(now));
            if holds.is_empty() && waiters.is_empty() && closed_for.is_none() {
                continue;
            }
            let holders = holds.into_iter().map(|hold| {
                let [owner, metadata, trace] = hold.texts;
                HolderState {
                    fence: hold.fence,
                    owner: owner.unwrap_or_default(),
                    units: hold.units,
                    capacity: hold.capacity,
                    session_bound: hold.is_session_bound,
                    age: now.since(hold.at),
                    since: SystemTime::UNIX_EPOCH + Duration::from_micros(hold.at.as_micros()),
                    remaining: hold.deadline.map(|deadline| deadline.since(now)),
                    metadata,
                    trace,
                    lingers: hold.lingers,
                }
            });
            let waiters = waiters.into_iter().map(|waiter| {
                let [owner, metadata, trace] = waiter.texts;
                let (owner, age) = (owner.unwrap_or_default(), now.since(waiter.at));
                WaiterState { owner, units: waiter.units, capacity: waiter.capacity, age, metadata, trace }
            });
            let (holders, waiters) = (holders.collect(), waiters.collect());
            listing.keys.push(KeyState { key, holders, waiters, last_fence: record.last, closed_for });
        }
        Ok(())
    }

    /// Returns the sessions that have expired, and the sessions whose records cannot be read.
    async fn expired_or_unreadable(&self, sessions: &[SessionId]) -> Result<(HashSet<SessionId>, HashSet<SessionId>)> {
        let (mut expired, mut unknown) = (HashSet::new(), Vec::new());
        let now = self.clock.now();
        for session in sessions {
            match self.sessions.liveness(*session, now) {
                CachedLiveness::Alive(_) => {}
                CachedLiveness::Expired => drop(expired.insert(*session)),
                CachedLiveness::Unknown => unknown.push(*session),
            }
        }
        // In a cluster each session is in another slot.
        let per_request = if self.manager.is_cluster() { 1 } else { 100 };
        for per_request in [per_request, 1] {
            let mut failed = Vec::new();
            for some in unknown.chunks(per_request * MAX_CONCURRENT_REQUESTS) {
                let queries = some.chunks(per_request).map(async |some| (some, self.query_sessions(some).await));
                for (some, result) in join_all(queries).await {
                    match result {
                        Ok((found, _)) => expired.extend(found),
                        // One of these sessions cannot be read, so each is queried in a request of its own.
                        Err(fault) if is_damage(&fault) => failed.extend_from_slice(some),
                        Err(fault) => return Err(fault),
                    }
                }
            }
            unknown = failed;
        }
        Ok((expired, unknown.into_iter().collect()))
    }

    /// Reads one answer of a pipeline.
    fn answer<T: redis::FromRedisValue>(&self, server: &Address, answer: Option<Value>) -> Result<T> {
        match answer {
            Some(Value::ServerError(fault)) => Err(from_answer(server, &RedisError::from(fault)).0),
            Some(value) => redis::from_redis_value(value).map_err(|_| malformed()),
            None => Err(malformed()),
        }
    }

    /// Returns the damage of a record that a script could not read.
    pub(super) async fn problem_of(&self, key: &Key) -> Option<Problem> {
        let name = self.names.lock(key);
        let mut read = redis::cmd("GET");
        read.arg(name.record());
        let record = self.manager.query(self.manager.target(name.record()), &read).await.ok()?;
        let record: Option<Vec<u8>> = redis::from_redis_value(record).ok()?;
        record.and_then(|record| Record::read(&record).err())
    }
}

/// Returns whether a fault comes from the data, and not from the server.
pub(super) fn is_damage(fault: &Error) -> bool {
    matches!(fault.kind(), ErrorKind::Internal | ErrorKind::Misconfigured)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listing_cursor_round_trips() {
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        for (done, names) in [(vec![], vec![]), (texts(&["a:1"]), texts(&["x:{1:2}", ""])), (vec![], texts(&["é"]))] {
            let place = Place { server: "[::1]:6379".into(), scan: "17".into(), done, names };
            assert_eq!(Place::read(&place.write()), Some(place));
        }
        for foreign in ["", "k", "1:a", "1:a1:b1:9", "9:a", "1:a1:b1:x"] {
            assert_eq!(Place::read(&Cursor::new(foreign)), None, "{foreign}");
        }
    }
}
