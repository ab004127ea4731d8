//! The slots of a cluster: which server has which.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use redis::Value;
use tokio::sync::{Notify, watch};

use super::config::{Address, address};
use super::error::error;
use crate::clock::BootTime;
use crate::error::{Error, ErrorKind, Result};

const SLOTS: usize = 16_384;

/// What a node is called that should be called by a name, and has none.
const NO_NAME: &str = "?";

/// The map is not asked for again within this time.
const FRESH_FOR: Duration = Duration::from_millis(100);

/// The slot of a key: of what is in its braces.
pub(super) fn slot_of(name: &str) -> u16 {
    let tag = name.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map_or("", |(tag, _)| tag);
    let hashed = if tag.is_empty() { name } else { tag };
    crc16::State::<crc16::XMODEM>::calculate(hashed.as_bytes()) % SLOTS as u16
}

/// Which server has which slot, as far as is known.
#[derive(Debug)]
pub(super) struct SlotMap {
    known: Mutex<Known>,
    /// One at a time asks for the map. When that last failed, and how.
    pub(super) learning: tokio::sync::Mutex<Option<(BootTime, ErrorKind, String)>>,
    /// One at a time looks for what is lost.
    pub(super) searching: tokio::sync::Mutex<()>,
    losses: Notify,
    /// Counts how often something was found again.
    recoveries: watch::Sender<u64>,
}

#[derive(Debug)]
struct Known {
    seeds: Vec<Address>,
    servers: Vec<Address>,
    /// Replicas, which know the map too.
    others: Vec<Address>,
    /// The place in `servers` of the server of each slot.
    slots: Vec<Option<u16>>,
    learned: Option<BootTime>,
    /// Who told the map.
    teller: Option<Address>,
    /// Those who were no help when they were last asked, the last one at the end. They are asked after all others: a node
    /// that is not part of the cluster any more, or is cut off from it, must not be asked for ever.
    unhelpful: Vec<Address>,
    /// Something spoke against it since.
    doubtful: bool,
    /// Servers that did not serve when they were last asked.
    lost: HashSet<Address>,
    /// A server said that the cluster is down.
    is_down: bool,
}

impl SlotMap {
    pub(super) fn new(seeds: Vec<Address>) -> Self {
        let known = Known {
            seeds,
            servers: Vec::new(),
            others: Vec::new(),
            slots: vec![None; SLOTS],
            learned: None,
            teller: None,
            unhelpful: Vec::new(),
            doubtful: true,
            lost: HashSet::new(),
            is_down: false,
        };
        Self {
            known: Mutex::new(known),
            learning: tokio::sync::Mutex::default(),
            searching: tokio::sync::Mutex::default(),
            losses: Notify::new(),
            recoveries: watch::Sender::default(),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The server of a slot, unless the map is in doubt.
    pub(super) fn server(&self, slot: u16) -> Option<Address> {
        let known = self.lock();
        if known.doubtful {
            return None;
        }
        let at = (*known.slots.get(usize::from(slot))?)?;
        known.servers.get(usize::from(at)).cloned()
    }

    pub(super) fn servers(&self) -> Vec<Address> {
        self.lock().servers.clone()
    }

    /// Whom to ask for the map: those that are lost come late, those that were no help last.
    pub(super) fn known(&self) -> Vec<Address> {
        let known = self.lock();
        let mut seen = HashSet::new();
        let all = known.servers.iter().chain(&known.others).chain(&known.seeds);
        let mut all: Vec<_> = all.filter(|address| seen.insert(*address)).cloned().collect();
        let turn = |address: &Address| known.unhelpful.iter().position(|other| other == address);
        all.sort_by_key(|address| (turn(address), known.lost.contains(address)));
        all
    }

    /// This node is asked for the map, or knew nothing that helps: the next time it is asked last.
    pub(super) fn ask_last(&self, address: &Address) {
        self.lock().ask_last(address);
    }

    /// The map says nothing of this slot. Whoever told it may know little.
    pub(super) fn misses(&self, slot: u16) -> Error {
        let mut known = self.lock();
        if let Some(teller) = known.teller.clone() {
            known.ask_last(&teller);
        }
        error(ErrorKind::Unavailable, format!("the cluster has no server for slot {slot}"))
    }

    /// This server does not serve. The map may be out of date.
    pub(super) fn lost(&self, address: &Address) {
        let mut known = self.lock();
        known.lost.insert(address.clone());
        known.doubtful = true;
        drop(known);
        self.losses.notify_one();
    }

    /// No server serves, as this one says. The map may be out of date, and this one may be wrong.
    pub(super) fn down(&self, by: &Address) {
        let mut known = self.lock();
        known.ask_last(by);
        known.is_down = true;
        known.doubtful = true;
        drop(known);
        self.losses.notify_one();
    }

    /// Waits until something is lost.
    pub(super) async fn something_is_lost(&self) {
        loop {
            let told = self.losses.notified();
            let is_lost = {
                let known = self.lock();
                known.is_down || !known.lost.is_empty()
            };
            if is_lost {
                return;
            }
            told.await;
        }
    }

    /// Waits until something more is lost.
    pub(super) async fn next_loss(&self) {
        self.losses.notified().await;
    }

    /// Every server that is known is there, and there are slots that none of them has.
    pub(super) fn lacks_only_slots(&self) -> bool {
        let known = self.lock();
        known.lost.is_empty() && known.slots.iter().any(Option::is_none)
    }

    pub(super) fn lost_servers(&self) -> Vec<Address> {
        self.lock().lost.iter().cloned().collect()
    }

    pub(super) fn is_down(&self) -> bool {
        self.lock().is_down
    }

    /// This server is there again, or is not needed any more.
    pub(super) fn found(&self, address: &Address) {
        self.lock().lost.remove(address);
        self.recoveries.send_modify(|count| *count += 1);
    }

    pub(super) fn is_up_again(&self) {
        self.lock().is_down = false;
        self.recoveries.send_modify(|count| *count += 1);
    }

    pub(super) fn recoveries(&self) -> watch::Receiver<u64> {
        self.recoveries.subscribe()
    }

    /// Whether every slot has a server.
    pub(super) fn is_complete(&self) -> bool {
        self.lock().slots.iter().all(Option::is_some)
    }

    /// Whether it was learned a moment ago: then it has to do.
    pub(super) fn is_fresh(&self, now: BootTime) -> bool {
        let mut known = self.lock();
        let is_fresh = known.learned.is_some_and(|at| is_recent(at, now));
        known.doubtful &= !is_fresh;
        is_fresh
    }

    /// A server said that a slot is elsewhere now.
    pub(super) fn moved(&self, slot: u16, to: &Address) {
        let mut known = self.lock();
        let at = known.servers.iter().position(|server| server == to).unwrap_or_else(|| {
            known.servers.push(to.clone());
            known.servers.len() - 1
        });
        if let Some(place) = known.slots.get_mut(usize::from(slot)) {
            *place = u16::try_from(at).ok();
        }
        // Other slots have probably moved too.
        known.doubtful = true;
    }

    /// The answer to `CLUSTER SLOTS`, from this server. Tells whether it is a map.
    pub(super) fn learned(&self, answer: &Value, from: &Address, now: BootTime) -> bool {
        let mut known = self.lock();
        let (mut servers, mut others, mut slots) = (Vec::new(), Vec::new(), vec![None; SLOTS]);
        for range in elements(answer) {
            let [first, last, nodes @ ..] = elements(range) else { continue };
            let (Some(first), Some(last)) = (number(first), number(last)) else { continue };
            let mut nodes = nodes.iter().filter_map(|node| node_address(node, from));
            let Some(primary) = nodes.next() else { continue };
            others.extend(nodes);
            let at = servers.iter().position(|server| *server == primary).unwrap_or_else(|| {
                servers.push(primary);
                servers.len() - 1
            });
            for slot in slots.iter_mut().take(last + 1).skip(first) {
                *slot = u16::try_from(at).ok();
            }
        }
        if servers.is_empty() {
            return false;
        }
        (known.servers, known.others, known.slots) = (servers, others, slots);
        (known.learned, known.doubtful, known.teller) = (Some(now), false, Some(from.clone()));
        let Known { seeds, servers, others, unhelpful, .. } = &mut *known;
        let all = [&*seeds, servers, others];
        unhelpful.retain(|address| address != from && all.iter().any(|some| some.contains(address)));
        true
    }
}

impl Known {
    fn ask_last(&mut self, address: &Address) {
        self.unhelpful.retain(|other| other != address);
        self.unhelpful.push(address.clone());
    }
}

/// What was found out a moment ago is not asked for again.
pub(super) fn is_recent(at: BootTime, now: BootTime) -> bool {
    now.since(at) < FRESH_FOR
}

fn elements(value: &Value) -> &[Value] {
    match value {
        Value::Array(elements) => elements,
        _ => &[],
    }
}

fn text(value: &Value) -> Option<&str> {
    match value {
        Value::BulkString(bytes) => std::str::from_utf8(bytes).ok(),
        _ => None,
    }
}

fn number(value: &Value) -> Option<usize> {
    match value {
        Value::Int(number) => usize::try_from(*number).ok(),
        _ => None,
    }
}

fn node_address(node: &Value, from: &Address) -> Option<Address> {
    let [host, port, more @ ..] = elements(node) else { return None };
    let port = u16::try_from(number(port)?).ok()?;
    let host = match text(host) {
        // It should have a name, and has none: its address is told beside it.
        Some(NO_NAME) => more.get(1).and_then(|told| {
            let mut pairs = elements(told).chunks_exact(2);
            pairs.find(|pair| text(&pair[0]) == Some("ip")).and_then(|pair| text(&pair[1]))
        }),
        host => host,
    };
    match host {
        Some(host) if !host.is_empty() => Some(Address::Tcp { host: host.to_owned(), port }),
        // No host: the one that answered.
        _ => Some(from.with_port(&format!(":{port}"))),
    }
}

/// The host in a redirection from this server.
pub(super) fn redirected(to: &str, from: &Address) -> Result<Address> {
    match to.strip_prefix(NO_NAME).unwrap_or(to) {
        // No host: the one that answered. Where that is wrong the map, which is asked for next, knows better.
        port if port.starts_with(':') => Ok(from.with_port(port)),
        _ => address(to, 0),
    }
}

impl Address {
    /// The same host with this port, given as `:port`.
    fn with_port(&self, port: &str) -> Self {
        match self {
            Self::Tcp { host, .. } => {
                address(&format!("{}{port}", if host.contains(':') { format!("[{host}]") } else { host.clone() }), 0)
                    .unwrap_or_else(|_| self.clone())
            }
            Self::Unix(_) => self.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_the_specification() {
        assert_eq!(slot_of("123456789"), 0x31c3);
        assert_eq!(slot_of("a:{user1000}:queue"), slot_of("user1000"));
        assert_eq!(slot_of("stanchion:{x}y}:queue"), slot_of("x"));
    }

    /// As Redis 7.0.15 answers with `cluster-preferred-endpoint-type hostname`: the first node has a name, the others none.
    #[test]
    fn a_node_without_a_name_has_the_address_that_is_told_beside_it() {
        let bulk = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let node = |name: Value, port, told: &[&str]| {
            let told = told.iter().map(|text| bulk(text)).collect();
            Value::Array(vec![name, Value::Int(port), bulk("id"), Value::Array(told)])
        };
        let range = |at: i64, nodes: &[Value]| {
            let mut range = vec![Value::Int(at), Value::Int(at)];
            range.extend_from_slice(nodes);
            Value::Array(range)
        };
        let answer = Value::Array(vec![
            range(0, &[node(bulk("one"), 1, &["ip", "10.0.0.1"])]),
            range(1, &[node(bulk("?"), 2, &["ip", "10.0.0.2"]), node(bulk("?"), 3, &["ip", "::3"])]),
            range(2, &[node(bulk("?"), 4, &[])]),
            // `unknown-endpoint`: the address is not to be used.
            range(3, &[node(Value::Nil, 5, &["hostname", "five", "ip", "10.0.0.5"])]),
            range(4, &[node(bulk(""), 6, &[])]),
        ]);
        let map = SlotMap::new(vec![address("seed:7", 0).unwrap()]);
        assert!(map.learned(&answer, &address("seed:7", 0).unwrap(), BootTime::from_nanos(1)));
        let all: Vec<_> = map.known().iter().map(ToString::to_string).collect();
        let servers = ["one:1", "10.0.0.2:2", "seed:4", "seed:5", "seed:6"];
        assert_eq!(all, [&servers[..], &["[::3]:3", "seed:7"]].concat());
    }
}
