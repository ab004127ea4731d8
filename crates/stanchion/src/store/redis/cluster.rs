//! Keeps the slot map of a cluster: which server has which slot.

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

/// Name that Redis reports for a node that should have a host name but has none.
const NO_NAME: &str = "?";

/// Time for which a slot map, or a failure to get one, is not queried again.
const FRESHNESS: Duration = Duration::from_millis(100);

/// Returns the slot of a Redis key, which depends on the part in braces.
pub(super) fn slot_of(name: &str) -> u16 {
    let tag = name.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map_or("", |(tag, _)| tag);
    let hashed = if tag.is_empty() { name } else { tag };
    crc16::State::<crc16::XMODEM>::calculate(hashed.as_bytes()) % SLOTS as u16
}

/// The cached slot map, and the servers that are unavailable.
#[derive(Debug)]
pub(super) struct SlotMap {
    state: Mutex<MapState>,
    /// Held by the one task that queries the map. Contains the time and the error of the last failure.
    pub(super) learning: tokio::sync::Mutex<Option<(BootTime, ErrorKind, String)>>,
    /// Held by the one task that looks for unavailable servers.
    pub(super) searching: tokio::sync::Mutex<()>,
    outages: Notify,
    /// Counts recoveries.
    recoveries: watch::Sender<u64>,
}

#[derive(Debug)]
struct MapState {
    seeds: Vec<Address>,
    servers: Vec<Address>,
    /// Replicas, which have the map too.
    replicas: Vec<Address>,
    /// Index into `servers` for each slot.
    slots: Vec<Option<u16>>,
    learned: Option<BootTime>,
    /// The node that sent the map.
    source: Option<Address>,
    /// Nodes that did not help when they were last queried, the latest one at the end. They are queried after all other
    /// nodes, so that a node that left the cluster, or is cut off from it, is not queried forever.
    query_last: Vec<Address>,
    /// Whether something has contradicted the map since.
    stale: bool,
    /// Servers that did not answer when they were last used.
    unavailable: HashSet<Address>,
    /// Whether a server reported that the cluster is down.
    is_down: bool,
}

impl SlotMap {
    pub(super) fn new(seeds: Vec<Address>) -> Self {
        let state = MapState {
            seeds,
            servers: Vec::new(),
            replicas: Vec::new(),
            slots: vec![None; SLOTS],
            learned: None,
            source: None,
            query_last: Vec::new(),
            stale: true,
            unavailable: HashSet::new(),
            is_down: false,
        };
        Self {
            state: Mutex::new(state),
            learning: tokio::sync::Mutex::default(),
            searching: tokio::sync::Mutex::default(),
            outages: Notify::new(),
            recoveries: watch::Sender::default(),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, MapState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the server of a slot, unless the map is stale.
    pub(super) fn server(&self, slot: u16) -> Option<Address> {
        let state = self.lock();
        if state.stale {
            return None;
        }
        let at = (*state.slots.get(usize::from(slot))?)?;
        state.servers.get(usize::from(at)).cloned()
    }

    pub(super) fn servers(&self) -> Vec<Address> {
        self.lock().servers.clone()
    }

    /// Returns the nodes to query for the map: unavailable ones come late, unhelpful ones last.
    pub(super) fn nodes_to_query(&self) -> Vec<Address> {
        let state = self.lock();
        let mut seen = HashSet::new();
        let all = state.servers.iter().chain(&state.replicas).chain(&state.seeds);
        let mut all: Vec<_> = all.filter(|address| seen.insert(*address)).cloned().collect();
        let turn = |address: &Address| state.query_last.iter().position(|other| other == address);
        all.sort_by_key(|address| (turn(address), state.unavailable.contains(address)));
        all
    }

    /// Moves a node to the end of the order in which nodes are queried.
    pub(super) fn query_last(&self, address: &Address) {
        self.lock().query_last(address);
    }

    /// Returns the error for a slot without a server. The node that sent the map may know too little, so it is queried
    /// last.
    pub(super) fn uncovered_slot(&self, slot: u16) -> Error {
        let mut state = self.lock();
        if let Some(source) = state.source.clone() {
            state.query_last(&source);
        }
        error(ErrorKind::Unavailable, format!("the cluster has no server for slot {slot}"))
    }

    /// Marks a server as unavailable. The map may be out of date.
    pub(super) fn mark_unavailable(&self, address: &Address) {
        let mut state = self.lock();
        state.unavailable.insert(address.clone());
        state.stale = true;
        drop(state);
        self.outages.notify_one();
    }

    /// Marks the cluster as down, because this node reported it. The map may be out of date, and the node may be wrong.
    pub(super) fn mark_cluster_down(&self, by: &Address) {
        let mut state = self.lock();
        state.query_last(by);
        state.is_down = true;
        state.stale = true;
        drop(state);
        self.outages.notify_one();
    }

    /// Waits until something is unavailable.
    pub(super) async fn wait_for_outage(&self) {
        loop {
            let outage = self.outages.notified();
            let is_lost = {
                let state = self.lock();
                state.is_down || !state.unavailable.is_empty()
            };
            if is_lost {
                return;
            }
            outage.await;
        }
    }

    /// Waits for the next outage.
    pub(super) async fn next_outage(&self) {
        self.outages.notified().await;
    }

    /// Returns whether every known server is available, and some slots have no server.
    pub(super) fn lacks_only_slots(&self) -> bool {
        let state = self.lock();
        state.unavailable.is_empty() && state.slots.iter().any(Option::is_none)
    }

    pub(super) fn unavailable_servers(&self) -> Vec<Address> {
        self.lock().unavailable.iter().cloned().collect()
    }

    pub(super) fn is_down(&self) -> bool {
        self.lock().is_down
    }

    /// Marks a server as recovered, or as no longer needed.
    pub(super) fn mark_recovered(&self, address: &Address) {
        self.lock().unavailable.remove(address);
        self.recoveries.send_modify(|count| *count += 1);
    }

    pub(super) fn mark_cluster_recovered(&self) {
        self.lock().is_down = false;
        self.recoveries.send_modify(|count| *count += 1);
    }

    pub(super) fn recoveries(&self) -> watch::Receiver<u64> {
        self.recoveries.subscribe()
    }

    /// Returns whether every slot has a server.
    pub(super) fn is_complete(&self) -> bool {
        self.lock().slots.iter().all(Option::is_some)
    }

    /// Returns whether the map was queried a moment ago. Such a map has to do, so this also makes it count as current.
    pub(super) fn is_fresh(&self, now: BootTime) -> bool {
        let mut state = self.lock();
        let is_fresh = state.learned.is_some_and(|at| is_recent(at, now));
        state.stale &= !is_fresh;
        is_fresh
    }

    /// Records that a slot has moved to another server.
    pub(super) fn moved(&self, slot: u16, to: &Address) {
        let mut state = self.lock();
        let at = state.servers.iter().position(|server| server == to).unwrap_or_else(|| {
            state.servers.push(to.clone());
            state.servers.len() - 1
        });
        if let Some(place) = state.slots.get_mut(usize::from(slot)) {
            *place = u16::try_from(at).ok();
        }
        // Other slots have probably moved too.
        state.stale = true;
    }

    /// Stores the answer of a node to `CLUSTER SLOTS`. Returns whether it contained a map.
    pub(super) fn learned(&self, answer: &Value, from: &Address, now: BootTime) -> bool {
        let mut state = self.lock();
        let (mut servers, mut replicas, mut slots) = (Vec::new(), Vec::new(), vec![None; SLOTS]);
        for range in elements(answer) {
            let [first, last, nodes @ ..] = elements(range) else { continue };
            let (Some(first), Some(last)) = (number(first), number(last)) else { continue };
            let mut nodes = nodes.iter().filter_map(|node| node_address(node, from));
            let Some(primary) = nodes.next() else { continue };
            replicas.extend(nodes);
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
        (state.servers, state.replicas, state.slots) = (servers, replicas, slots);
        (state.learned, state.stale, state.source) = (Some(now), false, Some(from.clone()));
        let MapState { seeds, servers, replicas, query_last, .. } = &mut *state;
        let all = [&*seeds, servers, replicas];
        query_last.retain(|address| address != from && all.iter().any(|some| some.contains(address)));
        true
    }
}

impl MapState {
    fn query_last(&mut self, address: &Address) {
        self.query_last.retain(|other| other != address);
        self.query_last.push(address.clone());
    }
}

/// Returns whether something happened so recently that it is not queried again.
pub(super) fn is_recent(at: BootTime, now: BootTime) -> bool {
    now.since(at) < FRESHNESS
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
        // The node should have a name, but has none: its address is in the metadata next to it.
        Some(NO_NAME) => more.get(1).and_then(|outage| {
            let mut pairs = elements(outage).chunks_exact(2);
            pairs.find(|pair| text(&pair[0]) == Some("ip")).and_then(|pair| text(&pair[1]))
        }),
        host => host,
    };
    match host {
        Some(host) if !host.is_empty() => Some(Address::Tcp { host: host.to_owned(), port }),
        // An empty host means the node that answered.
        _ => Some(from.with_port(&format!(":{port}"))),
    }
}

/// Returns the address in a redirection from this server.
pub(super) fn redirected(to: &str, from: &Address) -> Result<Address> {
    match to.strip_prefix(NO_NAME).unwrap_or(to) {
        // An empty host means the node that answered. If that is wrong, the map is queried next, and corrects it.
        port if port.starts_with(':') => Ok(from.with_port(port)),
        _ => address(to, 0),
    }
}

impl Address {
    /// Returns the same host with this port, given as `:port`.
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
    fn slots_match_the_specification() {
        assert_eq!(slot_of("123456789"), 0x31c3);
        assert_eq!(slot_of("a:{user1000}:queue"), slot_of("user1000"));
        assert_eq!(slot_of("stanchion:{x}y}:queue"), slot_of("x"));
    }

    /// Contains an answer of Redis 7.0.15 with `cluster-preferred-endpoint-type hostname`: only the first node has a
    /// name.
    #[test]
    fn unnamed_nodes_use_the_address_in_metadata() {
        let bulk = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let node = |name: Value, port, outage: &[&str]| {
            let outage = outage.iter().map(|text| bulk(text)).collect();
            Value::Array(vec![name, Value::Int(port), bulk("id"), Value::Array(outage)])
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
            // With `unknown-endpoint` the client must not use the address.
            range(3, &[node(Value::Nil, 5, &["hostname", "five", "ip", "10.0.0.5"])]),
            range(4, &[node(bulk(""), 6, &[])]),
        ]);
        let map = SlotMap::new(vec![address("seed:7", 0).unwrap()]);
        assert!(map.learned(&answer, &address("seed:7", 0).unwrap(), BootTime::from_nanos(1)));
        let all: Vec<_> = map.nodes_to_query().iter().map(ToString::to_string).collect();
        let servers = ["one:1", "10.0.0.2:2", "seed:4", "seed:5", "seed:6"];
        assert_eq!(all, [&servers[..], &["[::3]:3", "seed:7"]].concat());
    }
}
