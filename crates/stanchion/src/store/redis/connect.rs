//! Connections: one for each runtime and server, made when needed, made anew after a fault.
//!
//! A connection is driven by a task, and a task belongs to a runtime. A step that runs in the user's runtime uses a
//! connection there, because a hop to another thread costs as much as the step; the keeper has its own, which no traffic
//! of the user's delays. Where there is no runtime, or one that cannot do I/O, the keeper's is used.
//!
//! The client never repeats a request (rule 7 of the store trait). What was refused with `MOVED` or `ASK` was not done,
//! and is sent to where it belongs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redis::aio::MultiplexedConnection;
use redis::{Cmd, Pipeline, RedisError, Value};
use tokio::runtime::{Handle, Id};

use super::batch::Batch;
use super::cluster::{SlotMap, is_recent, redirected, slot_of};
use super::config::{Address, Config, Layout};
use super::error::{Verdict, error, from_answer, while_connecting};
use super::node::{CONNECT_WITHIN, Link, Node, SUSPECT_AFTER, Suspicion, connect_to_any, in_task, too_slow, within};
use super::reply::malformed;
use super::scripts::Script;
use super::sentinel::Group;
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};

/// The most redirections that one request follows.
const MOST_REDIRECTIONS: u32 = 5;

/// All connections of a store.
#[derive(Debug)]
pub(super) struct Links {
    pub(super) config: Config,
    topology: Topology,
    /// One for each runtime; few, and looked for with every step.
    locals: Mutex<Vec<(Id, Arc<Local>)>>,
    saw_primary: AtomicBool,
    /// A server did not say whether it is a primary.
    hides_role: AtomicBool,
    pub(super) clock: Clock,
}

/// Which server to ask.
#[derive(Debug)]
enum Topology {
    Single(Address),
    Sentinel(Group),
    Cluster(SlotMap),
}

/// The connections of one runtime.
#[derive(Debug)]
pub(super) struct Local {
    pub(super) runtime: Handle,
    pub(super) batch: Batch,
    /// One for each server; few.
    nodes: Mutex<Vec<Arc<Node>>>,
    /// Finished when the runtime is gone.
    sign_of_life: tokio::task::JoinHandle<()>,
    /// The runtime cannot do I/O.
    pub(super) is_unusable: AtomicBool,
    /// A session was opened in it: it is there as long as that.
    is_home: AtomicBool,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The connection that an answer came over: what is asked there next reaches the same server, and after it.
#[derive(Debug)]
pub(super) struct Way {
    node: Arc<Node>,
    link: Link,
}

/// Where a request is to go.
#[derive(Clone, Debug)]
pub(super) enum Target {
    /// To the server that has this slot. Where there is no cluster, one has them all.
    Slot(u16),
    /// To this server.
    Server(Address),
}

impl Links {
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
            locals: Mutex::default(),
            saw_primary: AtomicBool::new(false),
            hides_role: AtomicBool::new(false),
            clock: Clock::system(),
        }
    }

    /// Where a key of this name is.
    pub(super) fn target(&self, name: &str) -> Target {
        Target::Slot(if self.is_cluster() { slot_of(name) } else { 0 })
    }

    pub(super) fn is_cluster(&self) -> bool {
        self.slots().is_some()
    }

    /// The map of slots, in a cluster.
    pub(super) fn slots(&self) -> Option<&SlotMap> {
        match &self.topology {
            Topology::Cluster(slots) => Some(slots),
            Topology::Single(_) | Topology::Sentinel(_) => None,
        }
    }

    /// The current runtime is a keeper's: it does the work of those who have none.
    pub(super) fn settle_here(&self) {
        if let Some(local) = self.local() {
            local.is_home.store(true, Ordering::Relaxed);
        }
    }

    /// Runs a script: by its hash, and by its text if the server does not know it.
    pub(super) async fn run(self: &Arc<Self>, target: Target, script: &'static Script, command: Cmd) -> Result<Value> {
        self.run_from(self.local().as_deref(), &target, script, &command).await.map(|(answer, _)| answer)
    }

    /// The same from the runtime that this runs in, with the connections there; tells the way that it went.
    pub(super) async fn run_from(
        self: &Arc<Self>,
        local: Option<&Local>,
        target: &Target,
        script: &'static Script,
        command: &Cmd,
    ) -> Result<(Value, Way)> {
        let answer = match self.send(local, target, command).await {
            // Boxed, as all is here that is rare: what is done for each step stays small.
            Err(Failure { is_unknown_script: true, .. }) => {
                Box::pin(async { self.send(local, target, &script.by_text(command)).await }).await
            }
            other => other,
        };
        answer.map_err(|failure| failure.error)
    }

    /// Sends a command that is no script.
    pub(super) async fn ask(self: &Arc<Self>, target: Target, command: &Cmd) -> Result<Value> {
        let answer = self.send(self.local().as_deref(), &target, command).await;
        answer.map(|(answer, _)| answer).map_err(|failure| failure.error)
    }

    /// Sends a command over the very connection that an answer came over, or not at all.
    pub(super) async fn ask_there(&self, way: Way, command: &Cmd) -> Result<Value> {
        let Way { node, mut link } = way;
        let suspicion = Suspicion::new(&node, &link, &self.clock);
        let answer: Result<Value, RedisError> = command.query_async(&mut link.connection).await;
        suspicion.answered();
        answer.map_err(|fault| self.fault(&node, link.generation, &fault))
    }

    /// `local`: the connections of the runtime that this runs in; none: those of the keeper are used.
    async fn send(
        self: &Arc<Self>,
        local: Option<&Local>,
        target: &Target,
        command: &Cmd,
    ) -> Result<(Value, Way), Failure> {
        if let Some(local) = local {
            return self.send_from(local, target, command).await;
        }
        let (target, command) = (target.clone(), command.clone());
        self.at_home(move |links, local| async move { links.send_from(&local, &target, &command).await }).await
    }

    /// Sends commands to this server in one piece and returns their answers, of which each may be an error of the server.
    pub(super) async fn ask_all(self: &Arc<Self>, address: &Address, commands: Pipeline) -> Result<Vec<Value>> {
        if let Some(local) = self.local() {
            return self.ask_all_from(&local, address, commands).await;
        }
        let address = address.clone();
        self.at_home(move |links, local| async move { links.ask_all_from(&local, &address, commands).await }).await
    }

    async fn ask_all_from(
        self: &Arc<Self>,
        local: &Local,
        address: &Address,
        mut commands: Pipeline,
    ) -> Result<Vec<Value>> {
        commands.ignore_errors();
        let node = local.node(address);
        let mut link = node.link(self, local).await.inspect_err(|_| self.forget(address))?;
        let suspicion = Suspicion::new(&node, &link, &self.clock);
        let answers: Result<Value, RedisError> = commands.query_async(&mut link.connection).await;
        suspicion.answered();
        match answers {
            Ok(Value::Array(answers)) => Ok(answers),
            Ok(_) => Err(malformed()),
            Err(fault) => Err(self.fault(&node, link.generation, &fault)),
        }
    }

    /// Does this in the keeper's runtime, with the connections there.
    async fn at_home<T, E, F>(
        self: &Arc<Self>,
        work: impl FnOnce(Arc<Self>, Arc<Local>) -> F + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<Error> + Send + 'static,
        F: Future<Output = Result<T, E>> + Send,
    {
        let Some(home) = self.locals().into_iter().find(|local| local.is_home.load(Ordering::Relaxed)) else {
            let message = "no runtime to do I/O in; open a handle of the library, which brings one";
            return Err(error(ErrorKind::Unsupported, message).into());
        };
        let links = self.clone();
        let task = home.runtime.spawn(async move {
            let local =
                links.local().ok_or_else(|| error(ErrorKind::Internal, "the keeper's runtime cannot do I/O"))?;
            work(links, local).await
        });
        task.await.unwrap_or_else(|_| Err(error(ErrorKind::Unavailable, "the keeper has ended").in_doubt(true).into()))
    }

    /// The connections of the runtime that this runs in, if it can have some.
    pub(super) fn local(&self) -> Option<Arc<Local>> {
        let runtime = Handle::try_current().ok()?;
        let id = runtime.id();
        let mut locals = lock(&self.locals);
        let known = locals.iter().find(|(runtime, _)| *runtime == id).map(|(_, local)| local.clone());
        let local = known.unwrap_or_else(|| {
            locals.retain(|(_, local)| !local.has_ended());
            let local = Arc::new(Local {
                runtime,
                batch: Batch::default(),
                nodes: Mutex::default(),
                sign_of_life: tokio::spawn(std::future::pending()),
                is_unusable: AtomicBool::new(false),
                is_home: AtomicBool::new(false),
            });
            locals.push((id, local.clone()));
            local
        });
        (!local.is_unusable.load(Ordering::Relaxed)).then_some(local)
    }

    async fn send_from(
        self: &Arc<Self>,
        local: &Local,
        target: &Target,
        command: &Cmd,
    ) -> Result<(Value, Way), Failure> {
        let mut address = match target {
            Target::Server(address) => address.clone(),
            Target::Slot(slot) => match self.known_route(*slot) {
                Some(known) => known,
                None => Box::pin(self.route(local, *slot)).await?,
            },
        };
        let mut asking = false;
        for _ in 0..MOST_REDIRECTIONS {
            let node = local.node(&address);
            let mut link = match node.link(self, local).await {
                Ok(link) => link,
                Err(error) => {
                    // Perhaps another server has taken its place.
                    self.forget(&address);
                    return Err(error.into());
                }
            };
            let suspicion = Suspicion::new(&node, &link, &self.clock);
            let answer: Result<Value, RedisError> = if asking {
                Box::pin(query_asking(&mut link.connection, command)).await
            } else {
                command.query_async(&mut link.connection).await
            };
            suspicion.answered();
            let fault = match answer {
                Ok(value) => return Ok((value, Way { node, link })),
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
            return Err(self.fault(&node, link.generation, &fault).into());
        }
        Err(error(ErrorKind::Unavailable, "the cluster sends the request from node to node").into())
    }

    /// The error of a request that failed, and what follows from it for those that come next.
    fn fault(&self, node: &Node, generation: u64, fault: &RedisError) -> Error {
        let (error, verdict) = from_answer(&node.address, fault);
        match verdict {
            Verdict::Refused => {
                if let (Some(slots), Some("CLUSTERDOWN")) = (self.slots(), fault.code()) {
                    slots.down(&node.address);
                }
            }
            Verdict::NotHere | Verdict::Broken => {
                node.lost(generation);
                self.forget(&node.address);
            }
        }
        error
    }

    /// The server for a slot, if it is known.
    pub(super) fn known_route(&self, slot: u16) -> Option<Address> {
        match &self.topology {
            Topology::Single(address) => Some(address.clone()),
            Topology::Sentinel(group) => group.primary(),
            Topology::Cluster(slots) => slots.server(slot),
        }
    }

    /// The server for a slot.
    async fn route(self: &Arc<Self>, local: &Local, slot: u16) -> Result<Address> {
        if let Some(known) = self.known_route(slot) {
            return Ok(known);
        }
        match &self.topology {
            Topology::Single(address) => Ok(address.clone()),
            Topology::Sentinel(group) => group.find(&self.config, local, &self.clock).await,
            Topology::Cluster(slots) => {
                self.learn_slots(local, slots).await?;
                slots.server(slot).ok_or_else(|| slots.misses(slot))
            }
        }
    }

    /// All servers that keep locks.
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

    /// Another server may do now what this one did.
    pub(super) fn forget(&self, address: &Address) {
        match &self.topology {
            Topology::Single(_) => {}
            Topology::Sentinel(group) => group.lost(address),
            Topology::Cluster(slots) => slots.lost(address),
        }
    }

    pub(super) async fn learn_slots(&self, local: &Local, slots: &SlotMap) -> Result<()> {
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
        for address in slots.known() {
            // Before it is asked: whoever waits for a silent one may give up first.
            slots.ask_last(&address);
            match self.ask_for_slots(local, &address).await {
                Ok(answer) if slots.learned(&answer, &address, self.clock.now()) => {
                    *failed = None;
                    return Ok(());
                }
                Ok(_) => {
                    let message = format!("{address} knows no servers of a cluster");
                    last = Some(error(ErrorKind::Unavailable, message));
                }
                Err(error) => last = Some(error),
            }
        }
        let last = last.unwrap_or_else(|| error(ErrorKind::Unavailable, "no node of the cluster is known"));
        *failed = Some((self.clock.now(), last.kind(), last.message().to_owned()));
        Err(last.in_doubt(false))
    }

    /// The answer of one node to the question for the map. A replica knows it too, and only who keeps locks is asked for
    /// its role: where there is no connection of that kind, one is made that serves for nothing else.
    async fn ask_for_slots(&self, local: &Local, address: &Address) -> Result<Value> {
        let mut command = redis::cmd("CLUSTER");
        command.arg("SLOTS");
        if let Some(Way { node, mut link }) = local.way_to(address) {
            // Others wait for the map too: a silent node must not keep them.
            let answer = within(SUSPECT_AFTER, command.query_async(&mut link.connection)).await;
            return answer.unwrap_or_else(|| Err(too_slow(SUSPECT_AFTER))).map_err(|fault| {
                node.lost(link.generation);
                from_answer(address, &fault).0
            });
        }
        let client = self.config.server(address)?;
        let asked = async move {
            let mut connection = connect_to_any(&client).await?;
            command.query_async(&mut connection).await
        };
        let answer = in_task(local, within(CONNECT_WITHIN, asked)).await?;
        let answer = answer.unwrap_or_else(|| Err(too_slow(CONNECT_WITHIN)));
        answer.map_err(|fault| while_connecting(address, &fault))
    }

    /// Whether locks can be kept in a server that says this of its role, or nothing.
    pub(super) fn accepts(&self, address: &Address, role: Option<&str>) -> Result<()> {
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
            // At first that is a mistake; later it is a failover that has not reached the name yet.
            _ if matches!(self.topology, Topology::Single(_)) && !self.saw_primary.load(Ordering::Relaxed) => {
                Err(error(
                    ErrorKind::Misconfigured,
                    format!("{address} is a replica; name its primary, or its sentinels (`redis+sentinel://`)"),
                ))
            }
            _ => Err(error(ErrorKind::Unavailable, format!("{address} is a replica now"))),
        }
    }

    /// Whether a server did not say what it is.
    pub(super) fn hides_role(&self) -> bool {
        self.hides_role.load(Ordering::Relaxed)
    }

    /// A connection that does nothing but listen.
    pub(super) async fn listen(self: &Arc<Self>, channel: &str) -> Result<redis::aio::PubSub> {
        let local = self.local().ok_or_else(|| error(ErrorKind::Internal, "the keeper's runtime cannot do I/O"))?;
        let address = self.route(&local, slot_of(channel)).await?;
        let client = self.config.server(&address)?;
        let connected = async {
            let mut pubsub = client.get_async_pubsub().await?;
            pubsub.subscribe(channel).await?;
            Ok(pubsub)
        };
        let connected = within(CONNECT_WITHIN, connected).await;
        let pubsub = connected.unwrap_or_else(|| Err(too_slow(CONNECT_WITHIN))).map_err(|fault| {
            let error = while_connecting(&address, &fault);
            // One that refuses the user, or is full, is there.
            if error.kind() == ErrorKind::Unavailable {
                self.forget(&address);
            }
            error
        })?;
        self.reached(&address);
        Ok(pubsub)
    }

    /// This server is there: whoever wants to connect to it need not wait any longer.
    pub(super) fn reached(&self, address: &Address) {
        for local in self.locals() {
            if let Some(node) = local.known_node(address) {
                node.hurry();
            }
        }
    }

    /// Whether something of this process went to this server, also from a runtime that has ended: holds outlive it.
    pub(super) fn uses(&self, address: &Address) -> bool {
        lock(&self.locals).iter().any(|(_, local)| local.known_node(address).is_some())
    }

    /// The connections to this server that there are, from every runtime.
    pub(super) fn ways_to(&self, address: &Address) -> Vec<Way> {
        self.locals().iter().filter_map(|local| local.way_to(address)).collect()
    }

    /// Those whose runtime lives.
    fn locals(&self) -> Vec<Arc<Local>> {
        let locals = lock(&self.locals);
        locals.iter().map(|(_, local)| local).filter(|local| !local.has_ended()).cloned().collect()
    }
}

/// Asks a server for something in a slot that is being moved to it. What it refuses is told as it is of a single command:
/// the errors of a pipeline are less than that.
async fn query_asking(connection: &mut MultiplexedConnection, command: &Cmd) -> Result<Value, RedisError> {
    let mut both = redis::pipe();
    both.ignore_errors().cmd("ASKING").add_command(command.clone());
    let answers: Value = both.query_async(connection).await?;
    match answers.extract_error()? {
        Value::Array(mut answers) => Ok(answers.pop().unwrap_or(Value::Nil)),
        other => Ok(other),
    }
}

/// A request that failed.
pub(super) struct Failure {
    error: Error,
    is_unknown_script: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, is_unknown_script: false }
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        self.sign_of_life.abort();
    }
}

impl Local {
    fn has_ended(&self) -> bool {
        self.sign_of_life.is_finished()
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

    /// The connection to this server that there is.
    fn way_to(&self, address: &Address) -> Option<Way> {
        let node = self.known_node(address)?;
        let link = node.up()?;
        Some(Way { node, link })
    }

    /// What there is of this server.
    fn known_node(&self, address: &Address) -> Option<Arc<Node>> {
        lock(&self.nodes).iter().find(|node| node.address == *address).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_a_cluster_a_key_is_asked_for_where_its_slot_is() {
        // A redirection would hide a wrong slot, and cost a round trip with each step.
        let target = |url, name| Links::new(Config::from_url(url).unwrap()).target(name);
        for name in ["stanchion:{:a}", "stanchion:{:b}:queue", "stanchion:session:{0}"] {
            assert!(matches!(target("redis+cluster://one,two", name), Target::Slot(slot) if slot == slot_of(name)));
        }
        assert!(matches!(target("redis://one", "stanchion:{:a}"), Target::Slot(0)));
    }

    /// Its connections ended with it: looked at, they would tell that the servers are lost.
    #[test]
    fn a_runtime_that_has_ended_is_not_looked_at() {
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let links = Links::new(Config::from_url("redis+cluster://one").unwrap());
        let (first, second) = (runtime(), runtime());
        let ids = [&first, &second].map(|runtime| runtime.block_on(async { links.local().unwrap().runtime.id() }));
        let living = || -> Vec<_> { links.locals().iter().map(|local| local.runtime.id()).collect() };
        assert_eq!(living(), ids);
        let server = super::super::config::address("one", 1).unwrap();
        lock(&links.locals)[0].1.node(&server);
        drop(first);
        assert_eq!(living(), ids[1..]);
        assert!(links.uses(&server), "holds outlive it");
    }
}
