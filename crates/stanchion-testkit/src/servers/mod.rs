//! Real servers for tests: started here, on ports and in folders of their own, and ended with the test process, however
//! that ends.

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

mod away;
mod firestore;
mod firestore_fake;
mod postgres;
mod redis;

pub use away::Away;
pub use firestore::{FirestoreEmulator, firestore_emulator};
pub use firestore_fake::{CommitFault, FirestoreFake};
pub use postgres::{PgBouncer, Postgres, PostgresServer};
pub use redis::{Redis, RedisCluster, RedisSentinel, RedisServer};

/// How long a server may take until it answers.
const GENEROUS: Duration = Duration::from_secs(30);

/// A port that was free a moment ago. Not one that the system gives to connections: another test could get it meanwhile.
///
/// # Panics
/// When there is none.
pub fn free_port() -> u16 {
    free_port_from(10_000, 10_000)
}

/// One of `count` ports from `first` on. Processes begin at different places, so that they do not meet.
fn free_port_from(first: u16, count: u16) -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    for _ in 0..count {
        let place = std::process::id().wrapping_mul(7_919).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = first + (place % u32::from(count)) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no port is free from {first} on");
}

/// The program of that name in the path, or where Debian keeps those of administrators.
fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(std::iter::once(PathBuf::from("/usr/sbin")));
    folders.map(|folder| folder.join(name)).find(|file| file.exists())
}

/// What `scripts/servers` put there.
fn fetched(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/servers").join(name);
    path.canonicalize().unwrap_or_else(|_| panic!("{name} is missing: run `scripts/servers`, as `./test` does"))
}

/// Whether a process runs. One that has ended and that nobody waited for does not.
pub fn runs(pid: i32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // Its name is before, in brackets, and can contain any of this.
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest);
    !state.unwrap_or_default().starts_with(['Z', 'X'])
}

/// A process that ends with this one, also when this one is killed: a shell waits for the end of a pipe from here, and
/// kills it then.
#[derive(Debug)]
pub struct Process {
    shell: Child,
    /// While it is open the process may run.
    leash: Option<ChildStdin>,
    pid: i32,
}

impl Process {
    /// Starts a program.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(program: &Path, arguments: &[String], folder: &Path) -> Self {
        // A Ctrl-C reaches the shell too: it waits for the end of the pipe nevertheless.
        let script = "\"$@\" >server.log 2>&1 </dev/null & server=$!; trap '' HUP INT TERM; echo $server; \
                      exec >/dev/null; read -r _; kill -9 $server 2>/dev/null; wait";
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
        Self { shell, leash: Some(leash), pid }
    }

    /// Waits until it serves. Its log is in this folder.
    fn serves(&self, program: &Path, folder: &Path, is_there: impl Fn() -> bool) {
        let start = Instant::now();
        while !is_there() {
            let log = || std::fs::read_to_string(folder.join("server.log")).unwrap_or_default();
            let may_still = runs(self.pid) && start.elapsed() < GENEROUS;
            assert!(may_still, "{} does not start: {}", program.display(), log());
            std::thread::sleep(Duration::from_millis(5));
        }
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
        // The shell kills the process and waits for it: nobody else could, and a dead one still has its process id.
        self.leash = None;
        let _reaped = self.shell.wait();
    }
}

/// A certificate of an authority of its own, for `localhost` by that name, in files.
///
/// # Panics
/// When `openssl` cannot make it.
pub fn certificates(folder: &Path) -> (PathBuf, PathBuf, PathBuf) {
    let openssl = |arguments: &[&str]| {
        let made = Command::new("openssl").args(arguments).current_dir(folder).output();
        let made = made.unwrap_or_else(|_| panic!("openssl is missing: apt-get install -y openssl"));
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    };
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"];
    let authority = ["req", "-x509", "-subj", "/CN=test authority", "-keyout", "ca.key", "-out", "ca.pem"];
    openssl(&[&authority[..], &key].concat());
    let request = ["req", "-subj", "/CN=localhost", "-keyout", "server.key", "-out", "server.csr"];
    openssl(&[&request[..], &key[..5]].concat());
    std::fs::write(folder.join("names"), "subjectAltName=DNS:localhost").unwrap();
    let sign = ["x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"];
    openssl(&[&sign[..], &["-days", "2", "-extfile", "names", "-out", "server.pem"]].concat());
    (folder.join("ca.pem"), folder.join("server.pem"), folder.join("server.key"))
}

/// Waits until something is so.
///
/// # Panics
/// When it does not come to be.
pub fn wait(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < GENEROUS, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
