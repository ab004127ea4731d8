//! Lists the keys of the servers, a page at a time: with SCAN, plain reads, and a look at the sessions in bulk.
//!
//! No script runs on a key, and nothing is written but that a dead session is dead (`session_look.lua`).

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::{Duration, SystemTime};

use futures_util::future::join_all;
use redis::{Pipeline, RedisError, Value};

use super::config::Address;
use super::connect::Target;
use super::error::{error, from_answer};
use super::record::{Problem, Record, Waiter};
use super::reply::malformed;
use super::sessions::Known;
use super::{AT_ONCE, Inner};
use crate::error::{Error, ErrorKind, Result};
use crate::key::Key;
use crate::store::{
    Cursor, DamagedEntry, HolderState, KeyState, Listing, MAX_ROWS_PER_PAGE, Reply, StoreTime, WaiterState,
};
use crate::token::SessionId;

/// Maximum of what one SCAN may be asked to look at: it keeps the server from all others.
const MAX_COUNT: usize = 10_000;

/// Where a listing is: at the server and the SCAN cursor there, behind the servers that are done. A page that met too many
/// waiters leaves the names of keys, which are the next page.
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
            let (length, behind) = rest.split_once(':')?;
            let (text, behind) = behind.split_at_checked(length.parse().ok()?)?;
            texts.push(text.to_owned());
            rest = behind;
        }
        let mut texts = texts.into_iter();
        let (server, scan, count) = (texts.next()?, texts.next()?, texts.next()?.parse().ok()?);
        let mut done: Vec<_> = texts.collect();
        let names = (done.len() >= count).then(|| done.split_off(count))?;
        Some(Self { server, scan, done, names })
    }
}

/// What is read of a key before its sessions are looked at.
struct Found {
    key: Key,
    record: Record,
    waiters: Vec<Waiter>,
}

impl Inner {
    pub(super) async fn list(&self, prefix: &str, cursor: Option<&Cursor>, limit: usize) -> Result<Reply<Listing>> {
        let place = cursor.map_or_else(|| Some(Place::default()), Place::read);
        let mut place = place.ok_or_else(|| error(ErrorKind::InvalidArgument, "the cursor is of another store"))?;
        let mut listing = Listing::default();
        let servers = self.links.servers().await?;
        let named = |address: &&Address| address.to_string() == place.server;
        let Some(server) = servers.iter().find(named).or_else(|| {
            // The listing begins, or another server has taken the place of this one: its cursors are not the other's.
            (place.scan, place.names) = ("0".into(), Vec::new());
            servers.iter().find(|address| !place.done.contains(&address.to_string()))
        }) else {
            return Ok(Reply { time: self.time().await?, outcome: listing });
        };
        place.server = server.to_string();
        let names = if place.names.is_empty() {
            let (next, names) = self.scan(server, &place.scan, prefix, limit.clamp(1, MAX_COUNT)).await?;
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
        let page = self.links.ask(Target::Server(server.clone()), &command).await.map_err(|fault| {
            let wanted = match fault.kind() {
                ErrorKind::Unauthorized => "a listing needs the right to SCAN: ACL SETUSER … +scan",
                ErrorKind::Unsupported => "a listing needs SCAN, which the server does not offer",
                _ => return fault,
            };
            let (kind, message) = (fault.kind(), format!("{wanted} ({})", fault.message()));
            fault.restate(kind, message)
        })?;
        redis::from_redis_value(page).map_err(|_| malformed())
    }

    /// Reads the keys of these names. What would be too much for one page is left.
    async fn read_page(
        &self,
        server: &Address,
        prefix: &str,
        names: Vec<Vec<u8>>,
        listing: &mut Listing,
        left: &mut Vec<String>,
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
        let mut answers = self.links.ask_all(server, reads).await?.into_iter();
        let (seconds, micros): (u64, u64) = self.answer(server, answers.next())?;
        let now = StoreTime::from_micros(seconds.saturating_mul(1_000_000).saturating_add(micros));
        let mut found = Vec::new();
        for ((name, key), answer) in keys.into_iter().zip(answers) {
            let record: Result<Option<Vec<u8>>> = self.answer(server, Some(answer));
            match record.map(|record| record.as_deref().map(Record::read)) {
                Ok(None) => {}
                Ok(Some(Ok(record))) => found.push((name, Found { key, record, waiters: Vec::new() })),
                Ok(Some(Err(problem))) => listing.damaged.push(DamagedEntry::new(key.as_encoded(), problem)),
                Err(fault) => self.read_alone(&key, fault, listing).await?,
            }
        }
        self.read_queues(server, &mut found, listing, left).await?;
        let found: Vec<Found> = found.into_iter().map(|(_, found)| found).collect();
        self.show(found, now, listing).await?;
        Ok(now)
    }

    /// The key of a name that SCAN found; nothing for the name of something else.
    fn key_named(&self, name: &[u8]) -> std::result::Result<Option<(String, Key)>, DamagedEntry> {
        let text = String::from_utf8_lossy(name);
        let problem = |text: &str| DamagedEntry::new(text, "its name is not that of a key");
        match self.names.key_of(&text) {
            None => Ok(None),
            // Another name that reads like this key is not where the library looks for it.
            Some(Ok(key)) if self.names.lock(&key).record().as_bytes() == name => Ok(Some((text.into_owned(), key))),
            Some(_) => Err(problem(&text)),
        }
    }

    /// Reads the waiters of the keys that have some, in order, until that is too much for one page.
    async fn read_queues(
        &self,
        server: &Address,
        found: &mut Vec<(String, Found)>,
        listing: &mut Listing,
        left: &mut Vec<String>,
    ) -> Result<()> {
        let mut counts = Pipeline::new();
        let is_queued = |found: &&(String, Found)| found.1.record.queued;
        for (_, found) in found.iter().filter(is_queued) {
            counts.cmd("ZCARD").arg(self.names.lock(&found.key).all()[1]);
        }
        if counts.is_empty() {
            return Ok(());
        }
        let mut counts = self.links.ask_all(server, counts).await?.into_iter();
        let (mut rows, mut fits) = (0, 0);
        for (_, found) in found.iter() {
            if found.record.queued {
                // What cannot be counted is named below.
                rows += self.answer::<usize>(server, counts.next()).unwrap_or(0);
            }
            rows += found.record.holds.len();
            if rows > MAX_ROWS_PER_PAGE && fits > 0 {
                break;
            }
            fits += 1;
        }
        left.extend(found.split_off(fits).into_iter().map(|(name, _)| name));
        let mut reads = Pipeline::new();
        for (_, found) in found.iter().filter(is_queued) {
            let names = self.names.lock(&found.key);
            let [_, queue, waiting] = names.all();
            reads.cmd("ZRANGE").arg(queue).arg(0).arg(-1).cmd("HGETALL").arg(waiting);
        }
        if reads.is_empty() {
            return Ok(());
        }
        let mut answers = self.links.ask_all(server, reads).await?.into_iter();
        let mut damaged = HashSet::new();
        for (name, found) in found.iter_mut().filter(|found| found.1.record.queued) {
            let tokens: Result<Vec<Vec<u8>>> = self.answer(server, answers.next());
            let asked: Result<HashMap<Vec<u8>, Vec<u8>>> = self.answer(server, answers.next());
            // What a waiter asks for may be gone by now, or evicted.
            let read = |tokens: Vec<Vec<u8>>, asked: HashMap<Vec<u8>, Vec<u8>>| {
                tokens.iter().filter_map(|token| asked.get(token)).map(|asked| Waiter::read(asked)).collect()
            };
            match tokens.and_then(|tokens| Ok(read(tokens, asked?))) {
                Ok(Ok(waiters)) => {
                    found.waiters = waiters;
                    continue;
                }
                Ok(Err(problem)) => {
                    let problem: Problem = problem;
                    listing.damaged.push(DamagedEntry::new(found.key.as_encoded(), format!("its queue: {problem}")));
                }
                Err(fault) => self.read_alone(&found.key, fault, listing).await?,
            }
            damaged.insert(name.clone());
        }
        found.retain(|(name, _)| !damaged.contains(name));
        Ok(())
    }

    /// The server refused to read this key. In a cluster it may be on its way to another node, where a step finds it.
    async fn read_alone(&self, key: &Key, fault: Error, listing: &mut Listing) -> Result<()> {
        let mut fault = fault;
        if self.links.is_cluster() && is_damage(&fault) {
            match Box::pin(self.settled(key, &self.names.lock(key))).await {
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

    /// Lists what is neither over nor of a dead session.
    async fn show(&self, found: Vec<Found>, now: StoreTime, listing: &mut Listing) -> Result<()> {
        let mut sessions = BTreeSet::new();
        for found in &found {
            sessions.extend(found.record.holds.iter().filter(|hold| hold.ends_with_session).map(|hold| hold.session));
            sessions.extend(found.waiters.iter().map(|waiter| waiter.session));
        }
        let (dead, unreadable) = self.dead_among(&sessions.into_iter().collect::<Vec<_>>()).await?;
        for Found { key, record, waiters } in found {
            let lives = |session: &SessionId| !dead.contains(session);
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

    /// Those of the sessions that are dead, and those whose record cannot be read.
    async fn dead_among(&self, sessions: &[SessionId]) -> Result<(HashSet<SessionId>, HashSet<SessionId>)> {
        let (mut dead, mut unknown) = (HashSet::new(), Vec::new());
        let now = self.clock.now();
        for session in sessions {
            match self.sessions.known(*session, now) {
                Known::Alive(_) => {}
                Known::Dead => drop(dead.insert(*session)),
                Known::Unknown => unknown.push(*session),
            }
        }
        // In a cluster each is elsewhere.
        let together = if self.links.is_cluster() { 1 } else { 100 };
        for together in [together, 1] {
            let mut failed = Vec::new();
            for some in unknown.chunks(together * AT_ONCE) {
                let looks = some.chunks(together).map(async |some| (some, self.look_at(some).await));
                for (some, look) in join_all(looks).await {
                    match look {
                        Ok((found, _)) => dead.extend(found),
                        // One of them cannot be read: each is asked for alone.
                        Err(fault) if is_damage(&fault) => failed.extend_from_slice(some),
                        Err(fault) => return Err(fault),
                    }
                }
            }
            unknown = failed;
        }
        Ok((dead, unknown.into_iter().collect()))
    }

    /// An answer of a pipeline to this server.
    fn answer<T: redis::FromRedisValue>(&self, server: &Address, answer: Option<Value>) -> Result<T> {
        match answer {
            Some(Value::ServerError(fault)) => Err(from_answer(server, &RedisError::from(fault)).0),
            Some(value) => redis::from_redis_value(value).map_err(|_| malformed()),
            None => Err(malformed()),
        }
    }

    /// What is wrong with the record of a key that a step could not read.
    pub(super) async fn problem_of(&self, key: &Key) -> Option<Problem> {
        let name = self.names.lock(key);
        let mut read = redis::cmd("GET");
        read.arg(name.record());
        let record = self.links.ask(self.links.target(name.record()), &read).await.ok()?;
        let record: Option<Vec<u8>> = redis::from_redis_value(record).ok()?;
        record.and_then(|record| Record::read(&record).err())
    }
}

/// A fault that is one of the data and not of the server.
pub(super) fn is_damage(fault: &Error) -> bool {
    matches!(fault.kind(), ErrorKind::Internal | ErrorKind::Misconfigured)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_back_as_it_was_written() {
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
