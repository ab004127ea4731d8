//! Starts PostgreSQL servers, standbys, and PgBouncer in front of them.

use std::net::TcpStream;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::{GENEROUS, Process, certificates, fetched, free_port, in_path, runs, wait};

/// A version of PostgreSQL that the tests use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the versions")]
pub enum Postgres {
    V15,
    V18,
}

impl Postgres {
    /// Returns the path of a program of this version, for example `postgres` or `initdb`.
    ///
    /// # Panics
    /// If the program is missing. The message says how to install it.
    pub fn program(self, name: &str) -> PathBuf {
        let path = match self {
            Self::V15 => PathBuf::from("/usr/lib/postgresql/15/bin").join(name),
            Self::V18 => fetched("postgres-18").join("bin").join(name),
        };
        assert!(path.exists(), "{} is missing: apt-get install -y postgresql", path.display());
        path
    }

    /// Returns whether the server can load a library.
    fn has_library(self, name: &str) -> bool {
        let folder = self.program("postgres").parent().unwrap().join("../lib");
        folder.join(name).with_extension("so").exists()
    }

    /// Creates a fresh data folder. `initdb` takes a second, so it runs once, and every folder is a copy of its result.
    fn fresh_data(self, to: &Path) {
        static TEMPLATES: [OnceLock<Folder>; 2] = [const { OnceLock::new() }; 2];
        let template = TEMPLATES[self as usize].get_or_init(|| {
            let folder = Folder::new("stanchion-template-");
            let options = ["-A", "trust", "-U", "postgres", "--locale=C", "--encoding=UTF8", "--no-sync", "-D"];
            run(command(&self.program("initdb")).args(options).arg(folder.path.join("data")));
            folder
        });
        run(Command::new("cp").arg("-a").arg(template.path.join("data")).arg(to));
    }
}

/// A folder that belongs to the server's user and is removed with this process, even if this process is killed.
///
/// A shell waits until its pipe from this process closes, and then removes the folder. Before that it kills every
/// process that works on the data, because a query that computes does not notice that its server has gone.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    shell: Child,
    /// Input of the shell. The shell removes the folder when it closes.
    leash: Option<ChildStdin>,
}

impl Folder {
    fn new(prefix: &str) -> Self {
        let path = tempfile::Builder::new().prefix(prefix).tempdir().unwrap().keep();
        own(&path);
        let script = "trap '' HUP INT TERM; read -r _; \
                      for process in /proc/[0-9]*; do \
                          [ \"$process/cwd\" -ef \"$1/data\" ] && kill -9 \"${process#/proc/}\"; \
                      done; \
                      for _ in 1 2 3 4 5 6 7 8 9; do rm -rf -- \"$1\" && exit; sleep 1; done";
        let mut shell = Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let leash = shell.stdin.take();
        Self { path, shell, leash }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        self.leash = None;
        let _ = self.shell.wait(); // the shell may have ended already
    }
}

/// Returns the command line that runs a program as a user that the server accepts.
///
/// The server refuses to run as root. If this process is root, the server and its tools run as the user `postgres`.
/// This user may enter every folder, because the programs and the data can be in a folder that is closed to others,
/// like root's home.
fn command_line(program: &Path) -> Vec<String> {
    let program = program.to_str().unwrap().to_owned();
    if !is_root() {
        return vec![program];
    }
    let become_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"];
    let access = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"];
    become_user.into_iter().chain(access).map(str::to_owned).chain(std::iter::once(program)).collect()
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").unwrap().uid() == 0
}

fn command(program: &Path) -> Command {
    let command_line = command_line(program);
    let mut command = Command::new(&command_line[0]);
    command.args(&command_line[1..]).current_dir("/");
    command
}

/// Starts a server with this working folder.
fn start(program: &Path, arguments: &[String], folder: &Path) -> Process {
    let command_line = command_line(program);
    let arguments = [&command_line[1..], arguments].concat();
    Process::start(Path::new(&command_line[0]), &arguments, folder)
}

/// Runs a command and returns its output.
fn run(command: &mut Command) -> String {
    let done = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap().trim_end().to_owned()
}

/// Makes the server's user the owner of a file or folder.
fn own(path: &Path) {
    if is_root() {
        run(Command::new("chown").arg("postgres:postgres").arg(path));
    }
}

/// Runs SQL as the superuser, with the password for servers that require it.
fn psql(host: &str, port: u16, database: &str, sql: &str) -> String {
    let options = ["-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-h", host, "-d", database];
    let mut psql = Command::new(Postgres::V15.program("psql"));
    run(psql.env("PGPASSWORD", PASSWORD).args(options).args(["-p", &port.to_string(), "-c", sql]))
}

/// Password of the superuser, on servers that require passwords.
const PASSWORD: &str = "of-postgres";

/// A PostgreSQL server.
#[derive(Debug)]
pub struct PostgresServer {
    kind: Postgres,
    port: u16,
    settings: Vec<String>,
    with_passwords: bool,
    process: Option<Process>,
    folder: Folder,
}

impl PostgresServer {
    /// Starts a server that accepts every user without a password and does not sync its files.
    pub fn start(kind: Postgres) -> Self {
        Self::with(kind, &[])
    }

    /// Starts it with more settings.
    ///
    /// # Panics
    /// If it does not start.
    pub fn with(kind: Postgres, settings: &[(&str, &str)]) -> Self {
        let mut server = Self::stopped(kind, settings);
        kind.fresh_data(&server.data_folder());
        server.restart();
        server
    }

    /// Starts a server that requires a password over TCP.
    ///
    /// # Panics
    /// If it does not start.
    pub fn with_passwords(kind: Postgres, settings: &[(&str, &str)]) -> Self {
        let mut server = Self::stopped(kind, settings);
        server.with_passwords = true;
        kind.fresh_data(&server.data_folder());
        server.admit("host all all 127.0.0.1/32 scram-sha-256\nhost replication all 127.0.0.1/32 scram-sha-256");
        server.restart();
        server.psql(&format!("ALTER ROLE postgres PASSWORD '{PASSWORD}'"));
        server
    }

    /// Starts a server that accepts TCP connections only with TLS. Its certificate is for the name `localhost`.
    ///
    /// # Panics
    /// If it does not start.
    pub fn with_tls(kind: Postgres) -> Self {
        let mut server = Self::stopped(kind, &[]);
        let (_, certificate, key) = certificates(server.folder());
        own(&key);
        for (name, file) in [("ssl_cert_file", &certificate), ("ssl_key_file", &key)] {
            server.settings.push(format!("{name}={}", file.display()));
        }
        server.settings.push("ssl=on".to_owned());
        kind.fresh_data(&server.data_folder());
        server.admit("hostssl all all 127.0.0.1/32 trust");
        server.restart();
        server
    }

    /// Starts a standby that follows a primary and answers reads, and waits until it streams.
    ///
    /// # Panics
    /// If it does not start.
    pub fn standby_of(primary: &Self) -> Self {
        let mut server = Self::stopped(primary.kind, &[]);
        server.settings.clone_from(&primary.settings);
        server.with_passwords = primary.with_passwords;
        let (socket, port) = (primary.socket_folder().to_str().unwrap(), primary.port.to_string());
        let mut copy = command(&primary.kind.program("pg_basebackup"));
        copy.args(["-X", "stream", "-c", "fast", "--no-sync", "-U", "postgres", "-h", socket, "-p", &port, "-D"]);
        run(copy.arg(server.data_folder()));
        server.settings.push(format!("primary_conninfo=host={socket} port={port} user=postgres"));
        std::fs::write(server.data_folder().join("standby.signal"), "").unwrap();
        server.restart();
        wait("the standby to stream", || server.psql("SELECT status FROM pg_stat_wal_receiver") == "streaming");
        server
    }

    /// Promotes a standby, and waits until it is a primary.
    ///
    /// # Panics
    /// If the standby does not become a primary.
    pub fn promote(&self) {
        assert_eq!(self.psql("SELECT pg_promote()"), "t");
        assert_eq!(self.psql("SELECT pg_is_in_recovery()"), "f");
    }

    /// Returns a server that has no data yet and does not run.
    fn stopped(kind: Postgres, settings: &[(&str, &str)]) -> Self {
        let statistics = if kind.has_library("pg_stat_statements") { "pg_stat_statements" } else { "" };
        let defaults = [("fsync", "off"), ("max_connections", "200"), ("shared_preload_libraries", statistics)];
        let settings = defaults.iter().chain(settings).map(|(name, value)| format!("{name}={value}")).collect();
        let folder = Folder::new("stanchion-postgres-");
        Self { kind, port: free_port(), settings, with_passwords: false, process: None, folder }
    }

    /// Writes the access rules for TCP. The socket accepts every user.
    fn admit(&self, tcp: &str) {
        let text = format!("local all all trust\nlocal replication all trust\n{tcp}\n");
        std::fs::write(self.data_folder().join("pg_hba.conf"), text).unwrap();
    }

    /// Starts a killed or stopped server again, on the same port and with the same data.
    ///
    /// # Panics
    /// If it does not start.
    pub fn restart(&mut self) {
        self.kill();
        let socket = self.socket_folder().to_str().unwrap();
        let fixed =
            ["-D", self.data_folder().to_str().unwrap(), "-p", &self.port.to_string(), "-k", socket].map(str::to_owned);
        let listen = "listen_addresses=127.0.0.1".to_owned();
        let settings = self.settings.iter().chain(std::iter::once(&listen));
        let settings = settings.flat_map(|setting| ["-c".to_owned(), setting.clone()]);
        let program = self.kind.program("postgres");
        let process = start(&program, &fixed.into_iter().chain(settings).collect::<Vec<_>>(), self.folder());
        // `pg_ctl` waits for the same word in this file.
        let file = self.data_folder().join("postmaster.pid");
        process.wait_until_ready(&program, self.folder(), || {
            std::fs::read_to_string(&file).is_ok_and(|text| text.trim_end().ends_with("ready"))
        });
        self.process = Some(process);
    }

    /// Kills the server and all its processes, because a process that computes would not notice that the first one has
    /// gone.
    ///
    /// # Panics
    /// If they do not end.
    pub fn kill(&mut self) {
        assert!(self.end(), "the server did not end");
        // The process id in this file may belong to another process by now, and no process of this server is left.
        let _ = std::fs::remove_file(self.data_folder().join("postmaster.pid")); // missing if the server never started
    }

    /// Kills all its processes. Returns whether they have gone.
    fn end(&mut self) -> bool {
        self.process = None;
        let start = Instant::now();
        loop {
            let left = self.processes();
            if left.is_empty() || start.elapsed() > GENEROUS {
                return left.is_empty();
            }
            for pid in left {
                // The process may have ended already.
                let _ = Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Stops the server cleanly: it rolls transactions back and notifies clients.
    ///
    /// # Panics
    /// If the server does not end.
    pub fn stop_fast(&mut self) {
        if let Some(process) = &self.process {
            process.signal("INT");
            wait("the server to stop", || !runs(process.pid()));
        }
        self.process = None;
    }

    /// Returns its first process, while it runs.
    pub fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }

    /// Returns the ids of all its processes, which are the processes with its data folder as their working folder.
    ///
    /// # Panics
    /// If `/proc` cannot be read.
    pub fn processes(&self) -> Vec<i32> {
        let Ok(data) = self.data_folder().canonicalize() else { return Vec::new() };
        let all =
            std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        all.filter(|pid| std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|folder| folder == data)).collect()
    }

    /// Returns its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the URL for clients, as superuser.
    pub fn url(&self) -> String {
        let password = if self.with_passwords { format!(":{PASSWORD}") } else { String::new() };
        format!("postgres://postgres{password}@127.0.0.1:{}/postgres", self.port)
    }

    /// Returns its folder.
    pub fn folder(&self) -> &Path {
        &self.folder.path
    }

    /// Returns its data folder.
    pub fn data_folder(&self) -> PathBuf {
        self.folder().join("data")
    }

    /// Returns the folder of its Unix socket.
    pub fn socket_folder(&self) -> &Path {
        self.folder()
    }

    /// Returns the certificate of the authority that signed the certificate of a server with TLS.
    pub fn ca_file(&self) -> PathBuf {
        self.folder().join("ca.pem")
    }

    /// Runs SQL as superuser and returns the output: a line for each row, with `|` between columns.
    ///
    /// # Panics
    /// With the server's message if the SQL fails.
    pub fn psql(&self, sql: &str) -> String {
        self.psql_in("postgres", sql)
    }

    /// Runs SQL as superuser in another database, like [`psql`](Self::psql).
    ///
    /// # Panics
    /// With the server's message if the SQL fails.
    pub fn psql_in(&self, database: &str, sql: &str) -> String {
        psql(self.socket_folder().to_str().unwrap(), self.port, database, sql)
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        // No process may write to the folder when it is removed. A failure is ignored, because a second panic would
        // abort.
        self.end();
    }
}

/// A pooler in front of a server. It gives a connection to a client for one transaction at a time.
#[derive(Debug)]
pub struct PgBouncer {
    port: u16,
    process: Option<Process>,
    folder: Folder,
}

impl PgBouncer {
    /// Starts a pooler.
    pub fn start(server: &PostgresServer) -> Self {
        Self::with(server, &[])
    }

    /// Starts it with more settings.
    ///
    /// # Panics
    /// If it does not start.
    pub fn with(server: &PostgresServer, settings: &[(&str, &str)]) -> Self {
        let folder = Folder::new("stanchion-pgbouncer-");
        let port = free_port();
        let users = folder.path.join("users");
        std::fs::write(&users, "\"postgres\" \"\"\n").unwrap();
        let socket = server.socket_folder().display();
        let mut text = format!(
            "[databases]\n* = host={socket} port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             unix_socket_dir =\nauth_type = trust\nauth_file = {}\nadmin_users = postgres\npool_mode = transaction\n",
            server.port(),
            users.display()
        );
        for (name, value) in settings {
            text += &format!("{name} = {value}\n");
        }
        std::fs::write(folder.path.join("pgbouncer.ini"), text).unwrap();
        let mut pooler = Self { port, process: None, folder };
        pooler.restart();
        pooler
    }

    /// Starts a killed pooler again, on the same port.
    ///
    /// # Panics
    /// If it does not start.
    pub fn restart(&mut self) {
        self.process = None;
        let program = in_path("pgbouncer");
        let program = program.unwrap_or_else(|| panic!("pgbouncer is missing: apt-get install -y pgbouncer"));
        let process = start(&program, &["pgbouncer.ini".to_owned()], &self.folder.path);
        process.wait_until_ready(&program, &self.folder.path, || TcpStream::connect(("127.0.0.1", self.port)).is_ok());
        self.process = Some(process);
    }

    /// Kills the pooler.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Returns its process, while it runs.
    pub fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }

    /// Returns its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the URL for clients, as superuser.
    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// Runs SQL through the pooler as superuser. The database `pgbouncer` is its console, for commands like `SHOW
    /// POOLS`.
    ///
    /// # Panics
    /// With the server's message if the SQL fails.
    pub fn psql_in(&self, database: &str, sql: &str) -> String {
        psql("127.0.0.1", self.port, database, sql)
    }
}
