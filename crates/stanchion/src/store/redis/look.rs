//! Looking at keys, one or all.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use super::connect::Target;
use super::error::error;
use super::reply::{Answer, malformed, read_texts};
use super::scripts::{self, LockNames};
use super::{Inner, MOST_BURIALS};
use crate::error::{ErrorKind, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::store::{HolderState, KeyState, Reply, StoreTime, WaiterState};

impl Inner {
    /// The state of a key without anything of the dead.
    pub(super) async fn settled(&self, key: &Key, names: &LockNames) -> Result<Reply<KeyState>> {
        for _ in 0..MOST_BURIALS {
            let answer = self.on_key(names, &scripts::INSPECT, &[]).await?;
            let mut sessions = Vec::new();
            for hold in answer.rows(2)? {
                if !hold.text(7)?.is_empty() {
                    sessions.push(hold.session(3)?);
                }
            }
            for waiter in answer.rows(3)? {
                sessions.push(waiter.session(1)?);
            }
            sessions.sort_unstable();
            sessions.dedup();
            if !self.bury_the_dead(key, &sessions).await? {
                return Ok(Reply { time: answer.time, outcome: state_of(key, &answer)? });
            }
        }
        Err(error(ErrorKind::Unavailable, "sessions die faster than they can be buried"))
    }

    /// All keys with a record whose encoded form begins so, in order.
    pub(super) async fn keys(&self, prefix: &str) -> Result<Vec<Key>> {
        let pattern = self.names.pattern(prefix);
        let mut found = BTreeMap::new();
        for server in self.links.servers().await? {
            let mut cursor = "0".to_owned();
            loop {
                let mut command = redis::cmd("SCAN");
                command.arg(&cursor).arg("MATCH").arg(&pattern).arg("COUNT").arg(1_000);
                let page = self.links.ask(Target::Server(server.clone()), &command).await?;
                let (next, names): (String, Vec<String>) = redis::from_redis_value(page).map_err(|_| malformed())?;
                for key in names.iter().filter_map(|name| self.names.key_of(name)) {
                    let key = key?;
                    if key.as_encoded().starts_with(prefix) {
                        found.insert(key.as_encoded().to_owned(), key);
                    }
                }
                if next == "0" {
                    break;
                }
                cursor = next;
            }
        }
        Ok(found.into_values().collect())
    }
}

fn state_of(key: &Key, answer: &Answer) -> Result<KeyState> {
    let age = |since: StoreTime| answer.time.since(since);
    let wall = |time: StoreTime| SystemTime::UNIX_EPOCH + Duration::from_micros(time.as_micros());
    let mut holders = Vec::new();
    for hold in answer.rows(2)? {
        let [owner, metadata, trace] = read_texts(hold.text(6)?)?;
        holders.push(HolderState {
            fence: Fence::new(hold.number(0)?),
            owner: owner.unwrap_or_default(),
            units: hold.number(1)?,
            capacity: hold.number(8)?,
            session_bound: hold.text(2)? == "S",
            age: age(hold.time(4)?),
            since: wall(hold.time(4)?),
            remaining: hold.span(5)?,
            metadata,
            trace,
        });
    }
    let mut waiters = Vec::new();
    for waiter in answer.rows(3)? {
        let [owner, metadata, trace] = read_texts(waiter.text(3)?)?;
        waiters.push(WaiterState {
            owner: owner.unwrap_or_default(),
            units: waiter.number(0)?,
            capacity: waiter.number(4)?,
            age: age(waiter.time(2)?),
            metadata,
            trace,
        });
    }
    Ok(KeyState {
        key: key.clone(),
        holders,
        waiters,
        last_fence: answer.option(0)?.map(Fence::new),
        closed_for: answer.span(1)?,
    })
}
