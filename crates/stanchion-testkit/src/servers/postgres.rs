//! PostgreSQL, a standby of it, and PgBouncer before it.

use std::net::TcpStream;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::{GENEROUS, Process, certificates, fetched, free_port, in_path, runs, wait};

/// A version of PostgreSQL that the tests run against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Postgres {
    V15,
    V18,
}

impl Postgres {
    /// Where a program of this version is: `postgres`, `initdb`.
    ///
    /// # Panics
    /// When it is not there: the message says how to install it.
    pub fn program(self, name: &str) -> PathBuf {
        let path = match self {
            Self::V15 => PathBuf::from("/usr/lib/postgresql/15/bin").join(name),
            Self::V18 => fetched("postgres-18").join("bin").join(name),
        };
        assert!(path.exists(), "{} is missing: apt-get install -y postgresql", path.display());
        path
    }

    /// Whether the server can load a library.
    fn has_library(self, name: &str) -> bool {
        let folder = self.program("postgres").parent().unwrap().join("../lib");
        folder.join(name).with_extension("so").exists()
    }

    /// Fresh data. Making it takes a second: that is done once, and the rest are copies.
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

/// A folder of the server's user. It is large: it goes with this process, however that ends, because a shell waits for the
/// end of a pipe from here, and removes it then. Before that it kills who works on the data: a query that computes does
/// not see that its server has gone.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    shell: Child,
    /// While it is open the folder stays.
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
        let _reaped = self.shell.wait();
    }
}

/// The server refuses to be root: then it and its tools are the user `postgres`. That user may look into every folder,
/// because the programs and the data can be below one that is closed to others, as the home of root is.
fn words(program: &Path) -> Vec<String> {
    let program = program.to_str().unwrap().to_owned();
    if !is_root() {
        return vec![program];
    }
    let become_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"];
    let look = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"];
    become_user.into_iter().chain(look).map(str::to_owned).chain(std::iter::once(program)).collect()
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").unwrap().uid() == 0
}

fn command(program: &Path) -> Command {
    let words = words(program);
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).current_dir("/");
    command
}

/// Starts a server in a folder.
fn start(program: &Path, arguments: &[String], folder: &Path) -> Process {
    let words = words(program);
    let arguments = [&words[1..], arguments].concat();
    Process::start(Path::new(&words[0]), &arguments, folder)
}

/// Runs a command and gives what it prints.
fn run(command: &mut Command) -> String {
    let done = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap().trim_end().to_owned()
}

/// Gives a file or folder to the server's user.
fn own(path: &Path) {
    if is_root() {
        run(Command::new("chown").arg("postgres:postgres").arg(path));
    }
}

/// Runs SQL as the superuser. The password is for servers that ask for it.
fn psql(host: &str, port: u16, database: &str, sql: &str) -> String {
    let options = ["-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-h", host, "-d", database];
    let mut psql = Command::new(Postgres::V15.program("psql"));
    run(psql.env("PGPASSWORD", PASSWORD).args(options).args(["-p", &port.to_string(), "-c", sql]))
}

/// Of the superuser, where passwords are required.
const PASSWORD: &str = "of-postgres";

/// One PostgreSQL server.
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
    /// Starts a server that lets everyone in and does not sync its files.
    pub fn start(kind: Postgres) -> Self {
        Self::with(kind, &[])
    }

    /// The same with more settings.
    ///
    /// # Panics
    /// When it does not start.
    pub fn with(kind: Postgres, settings: &[(&str, &str)]) -> Self {
        let mut server = Self::stopped(kind, settings);
        kind.fresh_data(&server.data_folder());
        server.restart();
        server
    }

    /// The same, and who comes over TCP needs a password.
    ///
    /// # Panics
    /// When it does not start.
    pub fn with_passwords(kind: Postgres, settings: &[(&str, &str)]) -> Self {
        let mut server = Self::stopped(kind, settings);
        server.with_passwords = true;
        kind.fresh_data(&server.data_folder());
        server.admit("host all all 127.0.0.1/32 scram-sha-256\nhost replication all 127.0.0.1/32 scram-sha-256");
        server.restart();
        server.psql(&format!("ALTER ROLE postgres PASSWORD '{PASSWORD}'"));
        server
    }

    /// Starts a server that lets everyone in, over TCP only with TLS. Its certificate is for `localhost` by that name.
    ///
    /// # Panics
    /// When it does not start.
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

    /// Starts a server that follows another one and answers reads, and waits until it streams.
    ///
    /// # Panics
    /// When it does not start.
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
        wait("a standby that streams", || server.psql("SELECT status FROM pg_stat_wal_receiver") == "streaming");
        server
    }

    /// Makes a standby a primary, and waits until it is one.
    ///
    /// # Panics
    /// When it does not become one.
    pub fn promote(&self) {
        assert_eq!(self.psql("SELECT pg_promote()"), "t");
        assert_eq!(self.psql("SELECT pg_is_in_recovery()"), "f");
    }

    /// Without data yet.
    fn stopped(kind: Postgres, settings: &[(&str, &str)]) -> Self {
        let statistics = if kind.has_library("pg_stat_statements") { "pg_stat_statements" } else { "" };
        let defaults = [("fsync", "off"), ("max_connections", "200"), ("shared_preload_libraries", statistics)];
        let settings = defaults.iter().chain(settings).map(|(name, value)| format!("{name}={value}")).collect();
        let folder = Folder::new("stanchion-postgres-");
        Self { kind, port: free_port(), settings, with_passwords: false, process: None, folder }
    }

    /// Says who may connect over TCP, and how. Through the socket everyone may.
    fn admit(&self, tcp: &str) {
        let text = format!("local all all trust\nlocal replication all trust\n{tcp}\n");
        std::fs::write(self.data_folder().join("pg_hba.conf"), text).unwrap();
    }

    /// Starts it again, on the same port and with the same data, after it was killed or stopped.
    ///
    /// # Panics
    /// When it does not start.
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
        // The server says there what `pg_ctl` waits for.
        let file = self.data_folder().join("postmaster.pid");
        process.serves(&program, self.folder(), || {
            std::fs::read_to_string(&file).is_ok_and(|text| text.trim_end().ends_with("ready"))
        });
        self.process = Some(process);
    }

    /// Kills it, and all its processes: those that compute would not see at once that the first one has gone.
    ///
    /// # Panics
    /// When they do not end.
    pub fn kill(&mut self) {
        assert!(self.end(), "the server does not end");
        // It names a process that could be another one by now. None of its own is left, so nothing is lost.
        let _never_started = std::fs::remove_file(self.data_folder().join("postmaster.pid"));
    }

    /// Ends all its processes. Whether they have gone.
    fn end(&mut self) -> bool {
        self.process = None;
        let start = Instant::now();
        loop {
            let left = self.processes();
            if left.is_empty() || start.elapsed() > GENEROUS {
                return left.is_empty();
            }
            for pid in left {
                let _already_gone = Command::new("kill").args(["-9", &pid.to_string()]).stderr(Stdio::null()).status();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Stops it in good order: transactions are rolled back, clients are told.
    ///
    /// # Panics
    /// When it does not end.
    pub fn stop_fast(&mut self) {
        if let Some(process) = &self.process {
            process.signal("INT");
            wait("a server that stops", || !runs(process.pid()));
        }
        self.process = None;
    }

    /// The first process, while it runs.
    pub fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }

    /// The ids of all its processes: those that work in its data folder.
    ///
    /// # Panics
    /// When `/proc` cannot be read.
    pub fn processes(&self) -> Vec<i32> {
        let Ok(data) = self.data_folder().canonicalize() else { return Vec::new() };
        let all =
            std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        all.filter(|pid| std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|folder| folder == data)).collect()
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where clients connect to, as superuser.
    pub fn url(&self) -> String {
        let password = if self.with_passwords { format!(":{PASSWORD}") } else { String::new() };
        format!("postgres://postgres{password}@127.0.0.1:{}/postgres", self.port)
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder.path
    }

    /// Its data.
    pub fn data_folder(&self) -> PathBuf {
        self.folder().join("data")
    }

    /// Where its Unix socket is.
    pub fn socket_folder(&self) -> &Path {
        self.folder()
    }

    /// The authority that signed the certificate of a server with TLS.
    pub fn ca_file(&self) -> PathBuf {
        self.folder().join("ca.pem")
    }

    /// Runs SQL as superuser and gives what it prints: a line for each row, `|` between columns.
    ///
    /// # Panics
    /// With the server's message when it refuses.
    pub fn psql(&self, sql: &str) -> String {
        self.psql_in("postgres", sql)
    }

    /// The same in another database.
    ///
    /// # Panics
    /// With the server's message when it refuses.
    pub fn psql_in(&self, database: &str, sql: &str) -> String {
        psql(self.socket_folder().to_str().unwrap(), self.port, database, sql)
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        // Its folder goes next: nobody may write there any more. No panic here: there can be one already.
        self.end();
    }
}

/// A pooler before a server. A connection to the server is a client's for one transaction only.
#[derive(Debug)]
pub struct PgBouncer {
    port: u16,
    process: Option<Process>,
    folder: Folder,
}

impl PgBouncer {
    /// Starts it.
    pub fn start(server: &PostgresServer) -> Self {
        Self::with(server, &[])
    }

    /// The same with more settings.
    ///
    /// # Panics
    /// When it does not start.
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

    /// Starts it again, on the same port, after it was killed.
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart(&mut self) {
        self.process = None;
        let program = in_path("pgbouncer");
        let program = program.unwrap_or_else(|| panic!("pgbouncer is missing: apt-get install -y pgbouncer"));
        let process = start(&program, &["pgbouncer.ini".to_owned()], &self.folder.path);
        process.serves(&program, &self.folder.path, || TcpStream::connect(("127.0.0.1", self.port)).is_ok());
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

    /// Where clients connect to, as superuser.
    pub fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// Runs SQL through it, as superuser. The database `pgbouncer` is its console: `SHOW POOLS`.
    ///
    /// # Panics
    /// With the server's message when it refuses.
    pub fn psql_in(&self, database: &str, sql: &str) -> String {
        psql("127.0.0.1", self.port, database, sql)
    }
}
