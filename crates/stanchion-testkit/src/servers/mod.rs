//! Starts real servers for tests, each on its own port and in its own folder, and ends them with the test process.
//!
//! The servers end even if the test process is killed.

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

/// Time after which a server that does not answer fails the test.
const GENEROUS: Duration = Duration::from_secs(120);

/// Returns a port that was free when it was checked.
///
/// The port is outside the range that the system gives to outgoing connections, so that no other test can get it in
/// between.
///
/// # Panics
/// If no port is free.
pub fn free_port() -> u16 {
    free_port_from(10_000, 10_000)
}

/// Returns a free port of the `count` ports from `first` on. Each process starts at a different port, to avoid
/// conflicts.
fn free_port_from(first: u16, count: u16) -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    for _ in 0..count {
        let place = std::process::id().wrapping_mul(7_919).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = first + (place % u32::from(count)) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("none of the {count} ports from {first} on is free");
}

/// Finds a program in `PATH` or in `/usr/sbin`, which Debian leaves out of the path of normal users.
fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(std::iter::once(PathBuf::from("/usr/sbin")));
    folders.map(|folder| folder.join(name)).find(|file| file.exists())
}

/// Returns the path of a server that `scripts/servers` downloaded.
fn fetched(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/servers").join(name);
    path.canonicalize().unwrap_or_else(|_| panic!("{name} is missing: run `scripts/servers`, as `./test` does"))
}

/// Returns whether a process runs. A zombie does not run.
pub fn runs(pid: i32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // The state follows the process name, which is in brackets and may itself contain a bracket.
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest);
    !state.unwrap_or_default().starts_with(['Z', 'X'])
}

/// A child process that ends with this process, even if this process is killed.
///
/// A shell between them waits until its pipe from this process closes, and then kills the child.
#[derive(Debug)]
pub struct Process {
    shell: Child,
    /// Input of the shell. The shell kills the process when it closes.
    leash: Option<ChildStdin>,
    pid: i32,
}

impl Process {
    /// Starts a program.
    ///
    /// # Panics
    /// If the program cannot be started.
    pub fn start(program: &Path, arguments: &[String], folder: &Path) -> Self {
        // The shell ignores Ctrl-C, so that it still waits until the pipe closes.
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

    /// Waits until `is_ready` returns true. `folder` has the log of the server.
    fn wait_until_ready(&self, program: &Path, folder: &Path, is_ready: impl Fn() -> bool) {
        let start = Instant::now();
        while !is_ready() {
            let log = || std::fs::read_to_string(folder.join("server.log")).unwrap_or_default();
            let may_still_start = runs(self.pid) && start.elapsed() < GENEROUS;
            assert!(may_still_start, "{} did not start: {}", program.display(), log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Returns its process id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Sends a signal by name, for example `KILL`, `STOP` or `CONT`.
    ///
    /// # Panics
    /// If `kill` cannot be run.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.pid.to_string()]).status().unwrap();
        assert!(status.success() || name == "KILL", "kill -{name} {} failed", self.pid);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The shell kills the process and waits for it. Only the parent can do so without hitting a reused process id.
        self.leash = None;
        let _ = self.shell.wait(); // the shell may have ended already
    }
}

/// Creates a certificate for the name `localhost`, signed by a new authority.
///
/// Returns the files of the authority, the certificate and its key.
///
/// # Panics
/// If `openssl` cannot create them.
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

/// Waits until a condition is true.
///
/// # Panics
/// After 30 seconds. The message contains `what`, which names the awaited event.
pub fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < GENEROUS, "timed out while waiting for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
