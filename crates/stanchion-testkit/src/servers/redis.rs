//! Starts Redis and Valkey servers, clusters of them, and Sentinel groups.

use std::io::BufReader;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use super::{GENEROUS, Process, fetched, free_port, free_port_from, in_path, wait};

/// A kind of Redis server that the tests use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the programs and their versions")]
pub enum Redis {
    Redis6,
    Redis7,
    Redis8,
    Valkey8,
    Valkey9,
}

impl Redis {
    /// Returns the path of the program.
    ///
    /// # Panics
    /// If the program is missing. The message says how to install it.
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

/// A Redis server.
#[derive(Debug)]
pub struct RedisServer {
    program: PathBuf,
    arguments: Vec<String>,
    port: u16,
    process: Option<Process>,
    folder: tempfile::TempDir,
    extra_folder: Option<tempfile::TempDir>,
}

impl RedisServer {
    /// Starts a server that stores nothing on disk.
    pub fn start(kind: Redis) -> Self {
        Self::with(kind, &[])
    }

    /// Starts a server with more arguments.
    ///
    /// # Panics
    /// If a server does not start.
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
        Self { program: kind.program(), arguments, port, process: None, folder, extra_folder: None }
    }

    /// Starts a killed server again, on the same port and in the same folder.
    ///
    /// # Panics
    /// If a server does not start.
    pub fn restart(&mut self) {
        self.process = None;
        let process = Process::start(&self.program, &self.arguments, self.folder.path());
        // The server opens the port before the socket.
        process.wait_until_ready(&self.program, self.folder.path(), || {
            TcpStream::connect(("127.0.0.1", self.port)).is_ok()
                && std::os::unix::net::UnixStream::connect(self.socket()).is_ok()
        });
        self.process = Some(process);
    }

    /// Kills the server.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Returns its process, while the server runs.
    pub fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }

    /// Returns its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns its folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Returns the path of its Unix socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("redis.sock")
    }

    /// Runs a command, given as words, and returns the reply as text.
    ///
    /// # Panics
    /// If the server does not reply.
    pub fn command(&self, words: &[&str]) -> String {
        self.try_command(words).unwrap()
    }

    /// Runs a command on a server that may close the connection, for example because it changes its role.
    ///
    /// # Errors
    /// If the server does not reply.
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
        let mut reply = String::new();
        read_reply(&mut reader, &mut reply)?;
        Ok(reply)
    }
}

fn read_reply(reader: &mut impl std::io::BufRead, into: &mut String) -> std::io::Result<()> {
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let line = line.trim_end();
    match line.split_at_checked(1) {
        Some(("*", count)) => {
            for _ in 0..count.parse::<i64>().unwrap().max(0) {
                read_reply(reader, into)?;
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

/// A cluster of three primaries, each with a replica if requested.
#[derive(Debug)]
pub struct RedisCluster {
    nodes: Vec<RedisServer>,
    with_replicas: bool,
}

impl RedisCluster {
    /// Starts a cluster and waits until every slot is served.
    ///
    /// # Panics
    /// If the cluster does not start.
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
            wait("each node to know all others", || {
                let info = node.command(&["CLUSTER", "INFO"]);
                info.contains(&format!("cluster_known_nodes:{count}")) && info.contains("cluster_state:ok")
            });
        }
        if with_replicas {
            for at in 0..3 {
                let primary = cluster.nodes[at].command(&["CLUSTER", "MYID"]);
                let replica = &cluster.nodes[at + 3];
                wait("the replica to know its primary", || {
                    replica.command(&["CLUSTER", "REPLICATE", &primary]) == "OK"
                });
            }
            for replica in &cluster.nodes[3..] {
                wait("the replica to connect to its primary", || {
                    replica.command(&["INFO", "replication"]).contains("master_link_status:up")
                });
            }
            for node in &cluster.nodes {
                wait("each node to know every replica", || {
                    let nodes = node.command(&["CLUSTER", "NODES"]);
                    nodes.matches("slave").count() == 3
                });
            }
        }
        cluster
    }

    /// Starts a node that knows no other nodes.
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
            // A node also listens on its cluster port, which is 10,000 higher.
            if TcpListener::bind(("127.0.0.1", port + 10_000)).is_ok() {
                return RedisServer::on(kind, port, &options);
            }
        }
    }

    /// Returns the three primaries, then their replicas in the same order.
    pub fn nodes(&self) -> &[RedisServer] {
        &self.nodes
    }

    /// Returns the nodes, to kill and restart them.
    pub fn nodes_mut(&mut self) -> &mut [RedisServer] {
        &mut self.nodes
    }

    /// Returns whether the cluster has replicas.
    pub fn has_replicas(&self) -> bool {
        self.with_replicas
    }

    /// Returns the hosts for a URL.
    pub fn hosts(&self) -> String {
        let hosts: Vec<_> = self.nodes.iter().take(3).map(|node| format!("127.0.0.1:{}", node.port())).collect();
        hosts.join(",")
    }
}

/// A primary, two replicas and three sentinels.
#[derive(Debug)]
pub struct RedisSentinel {
    /// The data servers. The first one is the primary at the start.
    pub servers: Vec<RedisServer>,
    sentinels: Vec<RedisServer>,
}

impl RedisSentinel {
    /// Starts the servers and waits until the sentinels know each other and the replicas.
    ///
    /// # Panics
    /// If the servers do not start.
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
        wait("the replicas to connect to their primary", || {
            servers[1..]
                .iter()
                .all(|replica| replica.command(&["INFO", "replication"]).contains("master_link_status:up"))
        });
        let sentinels: Vec<_> = (0..3).map(|_| Self::sentinel(kind, port, 2, 0)).collect();
        for sentinel in &sentinels {
            wait("each sentinel to know all servers", || {
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

    /// Starts a sentinel that needs no other sentinel to agree, and whose report of this primary has this epoch.
    pub fn alone(kind: Redis, primary: u16, epoch: u64) -> RedisServer {
        Self::sentinel(kind, primary, 1, epoch)
    }

    fn sentinel(kind: Redis, primary: u16, quorum: u32, epoch: u64) -> RedisServer {
        let folder = tempfile::Builder::new().prefix("stanchion-sentinel-").tempdir().unwrap();
        let file = folder.path().join("sentinel.conf");
        // Sentinels ping once per second. With a limit of 1 s they would sometimes declare a live server down.
        let text = format!(
            "sentinel monitor main 127.0.0.1 {primary} {quorum}\nsentinel down-after-milliseconds main 1500\n\
             sentinel failover-timeout main 3000\nsentinel parallel-syncs main 2\nsentinel config-epoch main {epoch}\n"
        );
        std::fs::write(&file, text).unwrap();
        let mut server = RedisServer::stopped(kind, free_port(), &[]);
        server.arguments.splice(0..0, [file.to_str().unwrap().to_owned(), "--sentinel".to_owned()]);
        // A sentinel rejects the option for snapshots.
        let save = server.arguments.iter().position(|argument| argument == "--save").unwrap();
        server.arguments.drain(save..save + 2);
        server.extra_folder = Some(folder);
        server.restart();
        server
    }

    /// Returns the hosts for a URL.
    pub fn hosts(&self) -> String {
        let hosts: Vec<_> = self.sentinels.iter().map(|sentinel| format!("127.0.0.1:{}", sentinel.port())).collect();
        hosts.join(",")
    }

    /// Returns whether every sentinel names the only primary and sees it and two replicas as alive.
    pub fn is_whole(&self) -> bool {
        let is_primary =
            |server: &RedisServer| server.try_command(&["ROLE"]).is_ok_and(|role| role.starts_with("master"));
        let primaries: Vec<_> = (0..self.servers.len()).filter(|at| is_primary(&self.servers[*at])).collect();
        self.sentinels.iter().all(|sentinel| {
            let primary = sentinel.command(&["SENTINEL", "MASTER", "main"]);
            // Each entry has the role twice: as the sentinel sees it, and as the server reports it.
            let replicas = sentinel.command(&["SENTINEL", "REPLICAS", "main"]);
            primaries == [self.named_by(sentinel)]
                && primary.lines().filter(|line| *line == "master").count() == 2
                && replicas.lines().filter(|line| *line == "slave").count() == 4
        })
    }

    /// Returns the index in `servers` of the primary that the sentinels name.
    ///
    /// # Panics
    /// If they name another server.
    pub fn primary(&self) -> usize {
        self.named_by(&self.sentinels[0])
    }

    fn named_by(&self, sentinel: &RedisServer) -> usize {
        let address = sentinel.command(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main"]);
        let port: u16 = address.lines().nth(1).unwrap().parse().unwrap();
        self.servers.iter().position(|server| server.port() == port).unwrap()
    }
}
