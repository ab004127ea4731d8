//! Redis, its relatives, and how they work together.

use std::io::BufReader;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use super::{GENEROUS, Process, fetched, free_port, free_port_from, in_path, wait};

/// A kind of Redis server that the tests run against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Redis {
    Redis6,
    Redis7,
    Redis8,
    Valkey8,
    Valkey9,
}

impl Redis {
    /// Where the program is.
    ///
    /// # Panics
    /// When it is not there: the message says how to install it.
    pub fn program(self) -> PathBuf {
        let (name, wheel) = match self {
            Self::Redis6 => ("redis-6", true),
            Self::Redis7 => ("redis-server", false),
            Self::Redis8 => ("redis-8", true),
            Self::Valkey8 => ("valkey-8", true),
            Self::Valkey9 => ("valkey-9", true),
        };
        if wheel {
            fetched(name)
        } else {
            in_path(name).unwrap_or_else(|| panic!("{name} is missing: apt-get install -y redis-server"))
        }
    }
}

/// One Redis server.
#[derive(Debug)]
pub struct RedisServer {
    program: PathBuf,
    arguments: Vec<String>,
    port: u16,
    process: Option<Process>,
    folder: tempfile::TempDir,
    also_kept: Option<tempfile::TempDir>,
}

impl RedisServer {
    /// Starts a server that keeps nothing on disk.
    pub fn start(kind: Redis) -> Self {
        Self::with(kind, &[])
    }

    /// The same with more arguments.
    ///
    /// # Panics
    /// When it does not start.
    pub fn with(kind: Redis, more: &[&str]) -> Self {
        Self::on(kind, free_port(), more)
    }

    fn on(kind: Redis, port: u16, more: &[&str]) -> Self {
        let mut server = Self::stopped(kind, port, more);
        server.restart();
        server
    }

    fn stopped(kind: Redis, port: u16, more: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("stanchion-redis-").tempdir().unwrap();
        let given = |name: &str| more.contains(&name);
        let mut arguments = vec!["--port".to_owned(), if given("--tls-port") { 0 } else { port }.to_string()];
        if given("--tls-port") {
            arguments.extend(["--tls-port".to_owned(), port.to_string()]);
        }
        let fixed = ["--bind", "127.0.0.1", "--dir", folder.path().to_str().unwrap(), "--unixsocket", "redis.sock"];
        arguments.extend(fixed.map(str::to_owned));
        if !given("--save") {
            arguments.extend(["--save".to_owned(), String::new()]);
        }
        arguments
            .extend(more.iter().filter(|argument| **argument != "--tls-port").map(|argument| (*argument).to_owned()));
        Self { program: kind.program(), arguments, port, process: None, folder, also_kept: None }
    }

    /// Starts it again, on the same port and in the same folder, after it was killed.
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart(&mut self) {
        self.process = None;
        let process = Process::start(&self.program, &self.arguments, self.folder.path());
        // The socket comes after the port.
        process.serves(&self.program, self.folder.path(), || {
            TcpStream::connect(("127.0.0.1", self.port)).is_ok()
                && std::os::unix::net::UnixStream::connect(self.socket()).is_ok()
        });
        self.process = Some(process);
    }

    /// Kills it.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// The process, while it runs.
    pub fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Its Unix socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("redis.sock")
    }

    /// Runs a command, given in words, and gives its answer as text.
    ///
    /// # Panics
    /// When the server does not answer.
    pub fn command(&self, words: &[&str]) -> String {
        self.try_command(words).unwrap()
    }

    /// The same for a server that may close the connection, as one does that changes its role.
    ///
    /// # Errors
    /// When the server does not answer.
    pub fn try_command(&self, words: &[&str]) -> std::io::Result<String> {
        use std::io::Write as _;
        let mut stream = std::os::unix::net::UnixStream::connect(self.socket())?;
        stream.set_read_timeout(Some(GENEROUS))?;
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request += &format!("${}\r\n{word}\r\n", word.len());
        }
        stream.write_all(request.as_bytes())?;
        let mut reader = BufReader::new(stream);
        let mut answer = String::new();
        read_answer(&mut reader, &mut answer)?;
        Ok(answer)
    }
}

fn read_answer(reader: &mut impl std::io::BufRead, into: &mut String) -> std::io::Result<()> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let line = line.trim_end();
    match line.split_at_checked(1) {
        Some(("*", count)) => {
            for _ in 0..count.parse::<i64>().unwrap().max(0) {
                read_answer(reader, into)?;
                into.push('\n');
            }
        }
        Some(("$", "-1")) => {}
        Some(("$", length)) => {
            let mut bytes = vec![0; length.parse::<usize>().unwrap() + 2];
            reader.read_exact(&mut bytes)?;
            into.push_str(&String::from_utf8_lossy(&bytes[..bytes.len() - 2]));
        }
        Some((_, text)) => into.push_str(text),
        None => return Err(std::io::ErrorKind::ConnectionAborted.into()),
    }
    Ok(())
}

/// A cluster of three primaries, with a replica each where that is wanted.
#[derive(Debug)]
pub struct RedisCluster {
    nodes: Vec<RedisServer>,
    with_replicas: bool,
}

impl RedisCluster {
    /// Starts it and waits until every slot is served.
    ///
    /// # Panics
    /// When it does not come up.
    pub fn start(kind: Redis, with_replicas: bool) -> Self {
        let count = if with_replicas { 6 } else { 3 };
        let nodes: Vec<_> = (0..count).map(|_| Self::stranger(kind)).collect();
        for (at, slots) in [(0, "0 5460"), (1, "5461 10922"), (2, "10923 16383")] {
            let (first, last) = slots.split_once(' ').unwrap();
            // Redis 6.2 has no ADDSLOTSRANGE.
            let slots: Vec<String> =
                (first.parse::<u16>().unwrap()..=last.parse().unwrap()).map(|slot| slot.to_string()).collect();
            let words: Vec<&str> =
                ["CLUSTER", "ADDSLOTS"].into_iter().chain(slots.iter().map(String::as_str)).collect();
            assert_eq!(nodes[at].command(&words), "OK");
            assert_eq!(nodes[at].command(&["CLUSTER", "SET-CONFIG-EPOCH", &(at + 1).to_string()]), "OK");
        }
        for node in &nodes[1..] {
            nodes[0].command(&["CLUSTER", "MEET", "127.0.0.1", &node.port().to_string()]);
        }
        let cluster = Self { nodes, with_replicas };
        for node in &cluster.nodes {
            wait("a cluster that knows all its nodes", || {
                let info = node.command(&["CLUSTER", "INFO"]);
                info.contains(&format!("cluster_known_nodes:{count}")) && info.contains("cluster_state:ok")
            });
        }
        if with_replicas {
            for at in 0..3 {
                let primary = cluster.nodes[at].command(&["CLUSTER", "MYID"]);
                let replica = &cluster.nodes[at + 3];
                wait("a primary that is known", || replica.command(&["CLUSTER", "REPLICATE", &primary]) == "OK");
            }
            for replica in &cluster.nodes[3..] {
                wait("a replica that is linked", || {
                    replica.command(&["INFO", "replication"]).contains("master_link_status:up")
                });
            }
            for node in &cluster.nodes {
                wait("a cluster in which every replica is known", || {
                    let nodes = node.command(&["CLUSTER", "NODES"]);
                    nodes.matches("slave").count() == 3
                });
            }
        }
        cluster
    }

    /// Starts a node that knows no others.
    pub fn stranger(kind: Redis) -> RedisServer {
        let options = [
            "--cluster-enabled",
            "yes",
            "--cluster-config-file",
            "nodes.conf",
            "--cluster-node-timeout",
            "1000",
            "--cluster-announce-ip",
            "127.0.0.1",
            "--cluster-replica-validity-factor",
            "0",
            "--repl-diskless-sync-delay",
            "0",
        ];
        loop {
            let port = free_port_from(20_000, 2_700);
            // It listens on a second port too.
            if TcpListener::bind(("127.0.0.1", port + 10_000)).is_ok() {
                return RedisServer::on(kind, port, &options);
            }
        }
    }

    /// The nodes: three primaries, then their replicas, in the same order.
    pub fn nodes(&self) -> &[RedisServer] {
        &self.nodes
    }

    /// The nodes, to be killed and restarted.
    pub fn nodes_mut(&mut self) -> &mut [RedisServer] {
        &mut self.nodes
    }

    /// Whether there are replicas.
    pub fn has_replicas(&self) -> bool {
        self.with_replicas
    }

    /// The hosts of a URL.
    pub fn hosts(&self) -> String {
        let hosts: Vec<_> = self.nodes.iter().take(3).map(|node| format!("127.0.0.1:{}", node.port())).collect();
        hosts.join(",")
    }
}

/// A primary, two replicas and three sentinels.
#[derive(Debug)]
pub struct RedisSentinel {
    /// The first one is the primary at the start.
    pub servers: Vec<RedisServer>,
    sentinels: Vec<RedisServer>,
}

impl RedisSentinel {
    /// Starts them and waits until the sentinels know each other and the replicas.
    ///
    /// # Panics
    /// When they do not come up.
    pub fn start(kind: Redis) -> Self {
        let diskless = ["--repl-diskless-sync-delay", "0"];
        let primary = RedisServer::with(kind, &diskless);
        let port = primary.port();
        let replica = || {
            let of = ["--replicaof", "127.0.0.1", &port.to_string()];
            RedisServer::with(kind, &[&diskless[..], &of].concat())
        };
        let servers = vec![replica(), replica()];
        let servers: Vec<_> = std::iter::once(primary).chain(servers).collect();
        wait("replicas that are linked", || {
            servers[1..]
                .iter()
                .all(|replica| replica.command(&["INFO", "replication"]).contains("master_link_status:up"))
        });
        let sentinels: Vec<_> = (0..3).map(|_| Self::sentinel(kind, port, 2, 0)).collect();
        for sentinel in &sentinels {
            wait("sentinels that know all", || {
                let master = sentinel.command(&["SENTINEL", "MASTER", "main"]);
                let field = |name: &str| {
                    let mut lines = master.lines().skip_while(|line| *line != name);
                    lines.nth(1).map(str::to_owned).unwrap_or_default()
                };
                field("num-slaves") == "2" && field("num-other-sentinels") == "2"
            });
        }
        Self { servers, sentinels }
    }

    /// A sentinel that needs no other to agree, and whose word about this primary has this number.
    pub fn alone(kind: Redis, primary: u16, epoch: u64) -> RedisServer {
        Self::sentinel(kind, primary, 1, epoch)
    }

    fn sentinel(kind: Redis, primary: u16, quorum: u32, epoch: u64) -> RedisServer {
        let folder = tempfile::Builder::new().prefix("stanchion-sentinel-").tempdir().unwrap();
        let file = folder.path().join("sentinel.conf");
        // They ask once a second: who is down after no more than that is called down now and then while it lives.
        let text = format!(
            "sentinel monitor main 127.0.0.1 {primary} {quorum}\nsentinel down-after-milliseconds main 1500\n\
             sentinel failover-timeout main 3000\nsentinel parallel-syncs main 2\nsentinel config-epoch main {epoch}\n"
        );
        std::fs::write(&file, text).unwrap();
        let mut server = RedisServer::stopped(kind, free_port(), &[]);
        server.arguments.splice(0..0, [file.to_str().unwrap().to_owned(), "--sentinel".to_owned()]);
        // It has no snapshots.
        let save = server.arguments.iter().position(|argument| argument == "--save").unwrap();
        server.arguments.drain(save..save + 2);
        server.also_kept = Some(folder);
        server.restart();
        server
    }

    /// The hosts of a URL.
    pub fn hosts(&self) -> String {
        let hosts: Vec<_> = self.sentinels.iter().map(|sentinel| format!("127.0.0.1:{}", sentinel.port())).collect();
        hosts.join(",")
    }

    /// Whether the sentinels name the only primary that there is, and every one sees it and two replicas that live.
    pub fn is_whole(&self) -> bool {
        let is_primary =
            |server: &RedisServer| server.try_command(&["ROLE"]).is_ok_and(|role| role.starts_with("master"));
        let primaries: Vec<_> = (0..self.servers.len()).filter(|at| is_primary(&self.servers[*at])).collect();
        self.sentinels.iter().all(|sentinel| {
            let primary = sentinel.command(&["SENTINEL", "MASTER", "main"]);
            // Each says it twice: what it is, and what it says that it is.
            let replicas = sentinel.command(&["SENTINEL", "REPLICAS", "main"]);
            primaries == [self.named_by(sentinel)]
                && primary.lines().filter(|line| *line == "master").count() == 2
                && replicas.lines().filter(|line| *line == "slave").count() == 4
        })
    }

    /// The place in `servers` of the one that the sentinels call the primary.
    ///
    /// # Panics
    /// When they name none of ours.
    pub fn primary(&self) -> usize {
        self.named_by(&self.sentinels[0])
    }

    fn named_by(&self, sentinel: &RedisServer) -> usize {
        let told = sentinel.command(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main"]);
        let port: u16 = told.lines().nth(1).unwrap().parse().unwrap();
        self.servers.iter().position(|server| server.port() == port).unwrap()
    }
}
