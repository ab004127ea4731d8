//! Real servers for tests: started here, on ports and in folders of their own, and ended with the test process, however
//! that ends.

use std::io::{BufRead as _, BufReader};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a server may take until it answers.
const GENEROUS: Duration = Duration::from_secs(30);

/// A port that was free a moment ago.
///
/// # Panics
/// When there is none.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A process that ends with this one, also when this one is killed: a shell waits for the end of a pipe from here, and
/// kills it then.
#[derive(Debug)]
pub struct Process {
    shell: Child,
    /// While it is open the process may run.
    _leash: ChildStdin,
    pid: i32,
}

impl Process {
    /// Starts a program.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(program: &Path, arguments: &[String], folder: &Path) -> Self {
        let script = "\"$@\" >server.log 2>&1 </dev/null & server=$!; echo $server; exec >/dev/null; \
                      read -r _; kill -9 $server; wait";
        let mut shell = Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(program)
            .args(arguments)
            .current_dir(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let leash = shell.stdin.take().unwrap();
        let mut line = String::new();
        BufReader::new(shell.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let pid = line.trim().parse().unwrap();
        Self { shell, _leash: leash, pid }
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends a signal, by name: `KILL`, `STOP`, `CONT`.
    ///
    /// # Panics
    /// When `kill` cannot be run.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.pid.to_string()]).status().unwrap();
        assert!(status.success() || name == "KILL", "kill -{name} {}", self.pid);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _already_gone = Command::new("kill").args(["-9", &self.pid.to_string()]).stderr(Stdio::null()).status();
        let _already_gone = self.shell.kill();
        let _reaped = self.shell.wait();
    }
}

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
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/servers").join(name);
            assert!(path.exists(), "{name} is missing: run `scripts/servers`, which `./test` does too");
            path.canonicalize().unwrap()
        } else {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let found = std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.exists());
            found.unwrap_or_else(|| panic!("{name} is missing: apt-get install -y redis-server"))
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
        let folder = tempfile::Builder::new().prefix("stanchion-redis-").tempdir().unwrap();
        let port = free_port();
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
        arguments.extend(more.iter().filter(|argument| **argument != "--tls-port").map(|argument| (*argument).to_owned()));
        let mut server = Self { program: kind.program(), arguments, port, process: None, folder };
        server.restart();
        server
    }

    /// Starts it again, on the same port and in the same folder, after it was killed.
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart(&mut self) {
        self.process = None;
        let process = Process::start(&self.program, &self.arguments, self.folder.path());
        let start = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            let log = || std::fs::read_to_string(self.folder.path().join("server.log")).unwrap_or_default();
            assert!(start.elapsed() < GENEROUS, "{} does not start: {}", self.program.display(), log());
            std::thread::sleep(Duration::from_millis(5));
        }
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
        use std::io::Write as _;
        let mut stream = std::os::unix::net::UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(GENEROUS)).unwrap();
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request += &format!("${}\r\n{word}\r\n", word.len());
        }
        stream.write_all(request.as_bytes()).unwrap();
        let mut reader = BufReader::new(stream);
        let mut answer = String::new();
        read_answer(&mut reader, &mut answer);
        answer
    }
}

fn read_answer(reader: &mut impl std::io::BufRead, into: &mut String) {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let line = line.trim_end();
    match line.split_at_checked(1) {
        Some(("*", count)) => (0..count.parse::<i64>().unwrap().max(0)).for_each(|_| {
            read_answer(reader, into);
            into.push('\n');
        }),
        Some(("$", "-1")) => {}
        Some(("$", length)) => {
            let mut bytes = vec![0; length.parse::<usize>().unwrap() + 2];
            reader.read_exact(&mut bytes).unwrap();
            into.push_str(&String::from_utf8_lossy(&bytes[..bytes.len() - 2]));
        }
        Some((_, text)) => into.push_str(text),
        None => panic!("the server closed the connection"),
    }
}
