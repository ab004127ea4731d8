//! Inspects one key after reconciling it: expired holds and sessions are gone, and free capacity is granted.

use std::time::{Duration, SystemTime};

use super::error::error;
use super::reply::{Answer, read_texts};
use super::scripts::{self, LockNames};
use super::{Inner, MAX_REAP_ROUNDS};
use crate::error::{ErrorKind, Result};
use crate::fence::Fence;
use crate::key::Key;
use crate::store::{HolderState, KeyState, Reply, StoreTime, WaiterState};

impl Inner {
    /// Returns the state of a key after reaping the leftovers of expired sessions.
    pub(super) async fn reconciled_state(&self, key: &Key, names: &LockNames) -> Result<Reply<KeyState>> {
        for _ in 0..MAX_REAP_ROUNDS {
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
            if !self.reap_expired(key, &sessions).await? {
                return Ok(Reply { time: answer.time, outcome: state_of(key, &answer)? });
            }
        }
        Err(error(ErrorKind::Unavailable, "too many expired sessions on this key; try again"))
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
            lingers: !hold.text(9)?.is_empty(),
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
