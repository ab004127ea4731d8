//! Manages connections: one for each runtime and server, made when needed and again after a fault.
//!
//! A task drives each connection, and a task belongs to a runtime. A call from the user's runtime uses a connection of
//! that runtime, because a hop to another thread costs as much as the call itself. The keeper has connections of its
//! own, which the user's traffic cannot delay. A call without a runtime, or from a runtime that cannot do I/O, uses the
//! keeper's connections.
//!
//! The client never repeats a request (rule 7 of the store trait). The exception does no harm: a server that answers
//! `MOVED` or `ASK` did nothing, and the request is sent on to the named server.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use redis::aio::MultiplexedConnection;
use redis::{Cmd, Pipeline, RedisError, Value};
use tokio::runtime::{Handle, Id};

use super::batch::Batch;
use super::cluster::{SlotMap, is_recent, redirected, slot_of};
use super::config::{Address, Config, Layout};
use super::error::{Verdict, error, from_answer, while_connecting};
use super::node::{AnswerGuard, CONNECT_TIMEOUT, Link, Node, SUSPECT_AFTER, connect_to_any, in_task, timeout_error};
use super::reply::malformed;
use super::scripts::Script;
use super::sentinel::Group;
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
use crate::store::backoff::within;
use crate::sync::lock;

/// Maximum number of redirections that one request follows.
const MAX_REDIRECTIONS: u32 = 5;

/// Owns all connections of a store, and chooses the server for each request.
#[derive(Debug)]
pub(super) struct ConnectionManager {
    pub(super) config: Config,
    topology: Topology,
    /// One entry for each runtime. There are few, and every call searches them.
    runtimes: Mutex<Vec<(Id, Arc<RuntimeConnections>)>>,
    saw_primary: AtomicBool,
    /// Whether a server did not report whether it is a primary.
    hides_role: AtomicBool,
    pub(super) clock: Clock,
}

/// How the server for a request is found.
#[derive(Debug)]
enum Topology {
    Single(Address),
    Sentinel(Group),
    Cluster(SlotMap),
}

/// The connections of one runtime.
#[derive(Debug)]
pub(super) struct RuntimeConnections {
    pub(super) runtime: Handle,
    pub(super) batch: Batch,
    /// One entry for each server; there are few.
    nodes: Mutex<Vec<Arc<Node>>>,
    /// Finishes when the runtime is gone.
    liveness_task: tokio::task::JoinHandle<()>,
    /// Whether the runtime cannot do I/O.
    pub(super) lacks_io: AtomicBool,
    /// Whether a keeper opened a session in this runtime, which therefore lives as long as that session.
    is_keepers: AtomicBool,
}

/// The connection that carried a request. A later request over it reaches the same server, after the earlier one.
#[derive(Debug)]
pub(super) struct Dispatch {
    node: Arc<Node>,
    link: Link,
}

/// Selects the server that gets a request.
#[derive(Clone, Debug)]
pub(super) enum Target {
    /// The server that has this slot. Without a cluster, one server has all slots.
    Slot(u16),
    /// This server.
    Server(Address),
}

impl ConnectionManager {
    pub(super) fn new(config: Config) -> Self {
        let topology = match &config.layout {
            Layout::Single(address) => Topology::Single(address.clone()),
            Layout::Sentinel { sentinels, service } => {
                Topology::Sentinel(Group::new(sentinels.clone(), service.clone()))
            }
            Layout::Cluster { seeds } => Topology::Cluster(SlotMap::new(seeds.clone())),
        };
        Self {
            config,
            topology,
            runtimes: Mutex::default(),
            saw_primary: AtomicBool::new(false),
            hides_role: AtomicBool::new(false),
            clock: Clock::system(),
        }
    }

    /// Returns the target for a Redis key of this name.
    pub(super) fn target(&self, name: &str) -> Target {
        Target::Slot(if self.is_cluster() { slot_of(name) } else { 0 })
    }

    pub(super) fn is_cluster(&self) -> bool {
        self.slots().is_some()
    }

    /// Returns the slot map in a cluster.
    pub(super) fn slots(&self) -> Option<&SlotMap> {
        match &self.topology {
            Topology::Cluster(slots) => Some(slots),
            Topology::Single(_) | Topology::Sentinel(_) => None,
        }
    }

    /// Marks the current runtime as a keeper's: it serves callers without a runtime of their own.
    pub(super) fn mark_keeper_runtime(&self) {
        if let Some(local) = self.local() {
            local.is_keepers.store(true, Ordering::Relaxed);
        }
    }

    /// Runs a script by its hash, or by its text if the server does not have it.
    pub(super) async fn run(self: &Arc<Self>, target: Target, script: &'static Script, command: Cmd) -> Result<Value> {
        self.run_from(self.local().as_deref(), &target, script, &command).await.map(|(answer, _)| answer)
    }

    /// Runs a script over these connections, and also returns the connection that carried the request.
    pub(super) async fn run_from(
        self: &Arc<Self>,
        local: Option<&RuntimeConnections>,
        target: &Target,
        script: &'static Script,
        command: &Cmd,
    ) -> Result<(Value, Dispatch)> {
        let answer = match self.send(local, target, command).await {
            // Rare paths are boxed, so that the future of the usual call stays small.
            Err(Failure { is_unknown_script: true, .. }) => {
                Box::pin(async { self.send(local, target, &script.by_text(command)).await }).await
            }
            other => other,
        };
        answer.map_err(|failure| failure.error)
    }

    /// Sends a plain command.
    pub(super) async fn query(self: &Arc<Self>, target: Target, command: &Cmd) -> Result<Value> {
        let answer = self.send(self.local().as_deref(), &target, command).await;
        answer.map(|(answer, _)| answer).map_err(|failure| failure.error)
    }

    /// Sends a command over the same connection as an earlier request, or not at all.
    pub(super) async fn query_over(&self, dispatch: Dispatch, command: &Cmd) -> Result<Value> {
        let Dispatch { node, mut link } = dispatch;
        let answer_guard = AnswerGuard::new(&node, &link, &self.clock);
        let answer: Result<Value, RedisError> = command.query_async(&mut link.connection).await;
        answer_guard.answered();
        answer.map_err(|fault| self.handle_fault(&node, link.generation, &fault))
    }

    /// Sends over the current runtime's connections (`local`), or over the keeper's if there are none.
    async fn send(
        self: &Arc<Self>,
        local: Option<&RuntimeConnections>,
        target: &Target,
        command: &Cmd,
    ) -> Result<(Value, Dispatch), Failure> {
        if let Some(local) = local {
            return self.send_from(local, target, command).await;
        }
        let (target, command) = (target.clone(), command.clone());
        self.in_keeper_runtime(move |manager, local| async move { manager.send_from(&local, &target, &command).await })
            .await
    }

    /// Sends commands to this server in one piece and returns their answers, each of which may be an error of the
    /// server.
    pub(super) async fn query_all(self: &Arc<Self>, address: &Address, commands: Pipeline) -> Result<Vec<Value>> {
        if let Some(local) = self.local() {
            return self.query_all_from(&local, address, commands).await;
        }
        let address = address.clone();
        self.in_keeper_runtime(
            move |manager, local| async move { manager.query_all_from(&local, &address, commands).await },
        )
        .await
    }

    async fn query_all_from(
        self: &Arc<Self>,
        local: &RuntimeConnections,
        address: &Address,
        mut commands: Pipeline,
    ) -> Result<Vec<Value>> {
        commands.ignore_errors();
        let node = local.node(address);
        let mut link = node.link(self, local).await.inspect_err(|_| self.report_unavailable(address))?;
        let answer_guard = AnswerGuard::new(&node, &link, &self.clock);
        let answers: Result<Value, RedisError> = commands.query_async(&mut link.connection).await;
        answer_guard.answered();
        match answers {
            Ok(Value::Array(answers)) => Ok(answers),
            Ok(_) => Err(malformed()),
            Err(fault) => Err(self.handle_fault(&node, link.generation, &fault)),
        }
    }

    /// Runs work in the keeper's runtime, with the connections there.
    async fn in_keeper_runtime<T, E, F>(
        self: &Arc<Self>,
        work: impl FnOnce(Arc<Self>, Arc<RuntimeConnections>) -> F + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<Error> + Send + 'static,
        F: Future<Output = Result<T, E>> + Send,
    {
        let Some(keeper) = self.runtimes().into_iter().find(|local| local.is_keepers.load(Ordering::Relaxed)) else {
            let message = "no runtime can do I/O here; open a handle of the library, which brings one";
            return Err(error(ErrorKind::Unsupported, message).into());
        };
        let manager = self.clone();
        let task = keeper.runtime.spawn(async move {
            let local =
                manager.local().ok_or_else(|| error(ErrorKind::Internal, "the keeper's runtime cannot do I/O"))?;
            work(manager, local).await
        });
        task.await.unwrap_or_else(|_| Err(error(ErrorKind::Unavailable, "the keeper has ended").in_doubt(true).into()))
    }

    /// Returns the connections of the current runtime, unless there is none or it cannot do I/O.
    pub(super) fn local(&self) -> Option<Arc<RuntimeConnections>> {
        let runtime = Handle::try_current().ok()?;
        let id = runtime.id();
        let mut runtimes = lock(&self.runtimes);
        let existing = runtimes.iter().find(|(runtime, _)| *runtime == id).map(|(_, local)| local.clone());
        let local = existing.unwrap_or_else(|| {
            runtimes.retain(|(_, local)| !local.has_ended());
            let local = Arc::new(RuntimeConnections {
                runtime,
                batch: Batch::default(),
                nodes: Mutex::default(),
                liveness_task: tokio::spawn(std::future::pending()),
                lacks_io: AtomicBool::new(false),
                is_keepers: AtomicBool::new(false),
            });
            runtimes.push((id, local.clone()));
            local
        });
        (!local.lacks_io.load(Ordering::Relaxed)).then_some(local)
    }

    async fn send_from(
        self: &Arc<Self>,
        local: &RuntimeConnections,
        target: &Target,
        command: &Cmd,
    ) -> Result<(Value, Dispatch), Failure> {
        let mut address = match target {
            Target::Server(address) => address.clone(),
            Target::Slot(slot) => match self.cached_route(*slot) {
                Some(existing) => existing,
                None => Box::pin(self.route(local, *slot)).await?,
            },
        };
        let mut asking = false;
        for _ in 0..MAX_REDIRECTIONS {
            let node = local.node(&address);
            let mut link = match node.link(self, local).await {
                Ok(link) => link,
                Err(error) => {
                    // Another server may have taken its place.
                    self.report_unavailable(&address);
                    return Err(error.into());
                }
            };
            let answer_guard = AnswerGuard::new(&node, &link, &self.clock);
            let answer: Result<Value, RedisError> = if asking {
                Box::pin(query_after_asking(&mut link.connection, command)).await
            } else {
                command.query_async(&mut link.connection).await
            };
            answer_guard.answered();
            let fault = match answer {
                Ok(value) => return Ok((value, Dispatch { node, link })),
                Err(fault) => fault,
            };
            if let (Topology::Cluster(slots), Some((to, slot))) = (&self.topology, fault.redirect_node()) {
                asking = fault.code() == Some("ASK");
                let to = redirected(to, &address)?;
                if !asking {
                    slots.moved(slot, &to);
                }
                address = to;
                continue;
            }
            if fault.code() == Some("NOSCRIPT") {
                let (error, _) = from_answer(&address, &fault);
                return Err(Failure { error, is_unknown_script: true });
            }
            return Err(self.handle_fault(&node, link.generation, &fault).into());
        }
        Err(error(ErrorKind::Unavailable, "the cluster redirected the request too often").into())
    }

    /// Converts the fault of a request, and updates the state that later requests depend on.
    fn handle_fault(&self, node: &Node, generation: u64, fault: &RedisError) -> Error {
        let (error, verdict) = from_answer(&node.address, fault);
        match verdict {
            Verdict::Refused => {
                if let (Some(slots), Some("CLUSTERDOWN")) = (self.slots(), fault.code()) {
                    slots.mark_cluster_down(&node.address);
                }
            }
            Verdict::NotPrimary | Verdict::Broken => {
                node.discard(generation);
                self.report_unavailable(&node.address);
            }
        }
        error
    }

    /// Returns the cached server for a slot.
    pub(super) fn cached_route(&self, slot: u16) -> Option<Address> {
        match &self.topology {
            Topology::Single(address) => Some(address.clone()),
            Topology::Sentinel(group) => group.primary(),
            Topology::Cluster(slots) => slots.server(slot),
        }
    }

    /// Returns the server for a slot, and finds it if it is not cached.
    async fn route(self: &Arc<Self>, local: &RuntimeConnections, slot: u16) -> Result<Address> {
        if let Some(existing) = self.cached_route(slot) {
            return Ok(existing);
        }
        match &self.topology {
            Topology::Single(address) => Ok(address.clone()),
            Topology::Sentinel(group) => group.find(&self.config, local, &self.clock).await,
            Topology::Cluster(slots) => {
                self.learn_slots(local, slots).await?;
                slots.server(slot).ok_or_else(|| slots.uncovered_slot(slot))
            }
        }
    }

    /// Returns all servers that store locks.
    pub(super) async fn servers(self: &Arc<Self>) -> Result<Vec<Address>> {
        match (&self.topology, self.local()) {
            (Topology::Cluster(slots), Some(local)) => {
                self.learn_slots(&local, slots).await?;
                Ok(slots.servers())
            }
            (Topology::Cluster(slots), None) => Ok(slots.servers()),
            (_, Some(local)) => Ok(vec![self.route(&local, 0).await?]),
            (Topology::Single(address), None) => Ok(vec![address.clone()]),
            (Topology::Sentinel(group), None) => Ok(group.primary().into_iter().collect()),
        }
    }

    /// Notes that this server is unavailable, so that the next request looks for another one.
    pub(super) fn report_unavailable(&self, address: &Address) {
        match &self.topology {
            Topology::Single(_) => {}
            Topology::Sentinel(group) => group.mark_unavailable(address),
            Topology::Cluster(slots) => slots.mark_unavailable(address),
        }
    }

    pub(super) async fn learn_slots(&self, local: &RuntimeConnections, slots: &SlotMap) -> Result<()> {
        let mut failed = slots.learning.lock().await;
        let now = self.clock.now();
        if slots.is_fresh(now) {
            return Ok(());
        }
        if let Some((at, kind, message)) = &*failed
            && is_recent(*at, now)
        {
            return Err(error(*kind, message.clone()));
        }
        let mut last = None;
        for address in slots.nodes_to_query() {
            // Before the query, because the caller may give up while it waits for an unresponsive node.
            slots.query_last(&address);
            match self.query_slots(local, &address).await {
                Ok(answer) if slots.learned(&answer, &address, self.clock.now()) => {
                    *failed = None;
                    return Ok(());
                }
                Ok(_) => {
                    let message = format!("{address} names no servers of a cluster");
                    last = Some(error(ErrorKind::Unavailable, message));
                }
                Err(error) => last = Some(error),
            }
        }
        let last = last.unwrap_or_else(|| error(ErrorKind::Unavailable, "no node of the cluster is known"));
        *failed = Some((self.clock.now(), last.kind(), last.message().to_owned()));
        Err(last.in_doubt(false))
    }

    /// Queries one node for the slot map. A replica has the map too, but only a primary passes the role check of an
    /// ordinary connection. If there is no such connection, this makes one for this query alone.
    async fn query_slots(&self, local: &RuntimeConnections, address: &Address) -> Result<Value> {
        let mut command = redis::cmd("CLUSTER");
        command.arg("SLOTS");
        if let Some(Dispatch { node, mut link }) = local.open_connection(address) {
            // Other callers wait for the map too, so an unresponsive node must not delay them.
            let answer = within(SUSPECT_AFTER, command.query_async(&mut link.connection)).await;
            return answer.unwrap_or_else(|| Err(timeout_error(SUSPECT_AFTER))).map_err(|fault| {
                node.discard(link.generation);
                from_answer(address, &fault).0
            });
        }
        let client = self.config.server(address)?;
        let query = async move {
            let mut connection = connect_to_any(&client).await?;
            command.query_async(&mut connection).await
        };
        let answer = in_task(local, within(CONNECT_TIMEOUT, query)).await?;
        let answer = answer.unwrap_or_else(|| Err(timeout_error(CONNECT_TIMEOUT)));
        answer.map_err(|fault| while_connecting(address, self.config.uses_tls(), &fault))
    }

    /// Checks that a server with this role can store locks; `None` means that the server did not report one.
    pub(super) fn check_role(&self, address: &Address, role: Option<&str>) -> Result<()> {
        match role {
            None => {
                self.hides_role.store(true, Ordering::Relaxed);
                Ok(())
            }
            Some("master") => {
                self.saw_primary.store(true, Ordering::Relaxed);
                Ok(())
            }
            Some("active-replica") => Err(error(
                ErrorKind::Misconfigured,
                format!("{address} is an active replica: two servers would grant the same key; use one primary"),
            )),
            Some("sentinel") => Err(error(
                ErrorKind::Misconfigured,
                format!("{address} is a sentinel; use `redis+sentinel://HOST/SERVICE`"),
            )),
            // At the start this is a mistake in the URL; later it is a failover that DNS does not reflect yet.
            _ if matches!(self.topology, Topology::Single(_)) && !self.saw_primary.load(Ordering::Relaxed) => {
                Err(error(
                    ErrorKind::Misconfigured,
                    format!("{address} is a replica; name its primary, or its sentinels (`redis+sentinel://`)"),
                ))
            }
            _ => Err(error(ErrorKind::Unavailable, format!("{address} is a replica now"))),
        }
    }

    /// Returns whether a server did not report its role.
    pub(super) fn hides_role(&self) -> bool {
        self.hides_role.load(Ordering::Relaxed)
    }

    /// Opens a connection that only listens.
    pub(super) async fn listen(self: &Arc<Self>, channel: &str) -> Result<redis::aio::PubSub> {
        let local = self.local().ok_or_else(|| error(ErrorKind::Internal, "the keeper's runtime cannot do I/O"))?;
        let address = self.route(&local, slot_of(channel)).await?;
        let client = self.config.server(&address)?;
        let connected = async {
            let mut pubsub = client.get_async_pubsub().await?;
            pubsub.subscribe(channel).await?;
            Ok(pubsub)
        };
        let connected = within(CONNECT_TIMEOUT, connected).await;
        let pubsub = connected.unwrap_or_else(|| Err(timeout_error(CONNECT_TIMEOUT))).map_err(|fault| {
            let error = while_connecting(&address, self.config.uses_tls(), &fault);
            // A server that rejects the user or is full is still available.
            if error.kind() == ErrorKind::Unavailable {
                self.report_unavailable(&address);
            }
            error
        })?;
        self.report_reachable(&address);
        Ok(pubsub)
    }

    /// Notes that this server is reachable, so that nobody waits any longer before connecting to it.
    pub(super) fn report_reachable(&self, address: &Address) {
        for local in self.runtimes() {
            if let Some(node) = local.existing_node(address) {
                node.allow_connect_now();
            }
        }
    }

    /// Returns whether this process ever used this server, also from a runtime that has ended, because holds outlive
    /// it.
    pub(super) fn has_used(&self, address: &Address) -> bool {
        lock(&self.runtimes).iter().any(|(_, local)| local.existing_node(address).is_some())
    }

    /// Returns the open connections to this server, from every runtime.
    pub(super) fn open_connections(&self, address: &Address) -> Vec<Dispatch> {
        self.runtimes().iter().filter_map(|local| local.open_connection(address)).collect()
    }

    /// Returns the connections of the runtimes that still exist.
    fn runtimes(&self) -> Vec<Arc<RuntimeConnections>> {
        let runtimes = lock(&self.runtimes);
        runtimes.iter().map(|(_, local)| local).filter(|local| !local.has_ended()).cloned().collect()
    }
}

/// Sends a command for a slot that is being moved to this server. A rejection is returned as for a single command,
/// because the errors of a pipeline carry less detail.
async fn query_after_asking(connection: &mut MultiplexedConnection, command: &Cmd) -> Result<Value, RedisError> {
    let mut both = redis::pipe();
    both.ignore_errors().cmd("ASKING").add_command(command.clone());
    let answers: Value = both.query_async(connection).await?;
    match answers.extract_error()? {
        Value::Array(mut answers) => Ok(answers.pop().unwrap_or(Value::Nil)),
        other => Ok(other),
    }
}

/// The failure of a request.
pub(super) struct Failure {
    error: Error,
    is_unknown_script: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, is_unknown_script: false }
    }
}

impl Drop for RuntimeConnections {
    fn drop(&mut self) {
        self.liveness_task.abort();
    }
}

impl RuntimeConnections {
    fn has_ended(&self) -> bool {
        self.liveness_task.is_finished()
    }

    pub(super) fn node(&self, address: &Address) -> Arc<Node> {
        let mut nodes = lock(&self.nodes);
        if let Some(node) = nodes.iter().find(|node| node.address == *address) {
            return node.clone();
        }
        let node = Arc::new(Node::new(address));
        nodes.push(node.clone());
        node
    }

    /// Returns the open connection to this server.
    fn open_connection(&self, address: &Address) -> Option<Dispatch> {
        let node = self.existing_node(address)?;
        let link = node.up()?;
        Some(Dispatch { node, link })
    }

    /// Returns the state of this server if this runtime has used it.
    fn existing_node(&self, address: &Address) -> Option<Arc<Node>> {
        lock(&self.nodes).iter().find(|node| node.address == *address).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_is_the_slot_of_the_key() {
        // A redirection would hide a wrong slot, and cost a round trip with every call.
        let target = |url, name| ConnectionManager::new(Config::from_url(url).unwrap()).target(name);
        for name in ["stanchion:{:a}", "stanchion:{:b}:queue", "stanchion:session:{0}"] {
            assert!(matches!(target("redis+cluster://one,two", name), Target::Slot(slot) if slot == slot_of(name)));
        }
        assert!(matches!(target("redis://one", "stanchion:{:a}"), Target::Slot(0)));
    }

    /// The runtime's connections ended with it. If they were probed, the servers would look unavailable.
    #[test]
    fn ended_runtimes_are_not_probed() {
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let manager = ConnectionManager::new(Config::from_url("redis+cluster://one").unwrap());
        let (first, second) = (runtime(), runtime());
        let ids = [&first, &second].map(|runtime| runtime.block_on(async { manager.local().unwrap().runtime.id() }));
        let living = || -> Vec<_> { manager.runtimes().iter().map(|local| local.runtime.id()).collect() };
        assert_eq!(living(), ids);
        let server = super::super::config::address("one", 1).unwrap();
        lock(&manager.runtimes)[0].1.node(&server);
        drop(first);
        assert_eq!(living(), ids[1..]);
        assert!(manager.has_used(&server), "holds outlive it");
    }
}
