//! A world of its own for each test: a folder, processes in it, and ways to look at them.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    missing_debug_implementations,
    clippy::unwrap_used,
    reason = "test code; each file uses its part of it"
)]

use std::ffi::OsStr;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use stanchion::{BootTime, Clock};
use tempfile::TempDir;

/// Generous: it is waited for conditions, and this long only where a test fails.
pub const LIMIT: Duration = Duration::from_secs(30);

/// Shell text that runs until a signal ends it. It starts no program: a signal that reaches dash between `vfork` and
/// `exec` runs no trap.
pub const FOREVER: &str = "while :; do :; done";

pub fn now() -> BootTime {
    Clock::system().now()
}

/// Waits for a condition.
#[track_caller]
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = now().after(LIMIT);
    while !condition() {
        assert!(now() < end, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A folder with a store in it, and a mark that all processes of this test carry in their environment.
pub struct World {
    folder: TempDir,
    mark: String,
}

impl World {
    pub fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("stanchion-cli-").tempdir().unwrap();
        fs::create_dir(folder.path().join("state")).unwrap();
        let mark = format!("STANCHION_TEST={}", folder.path().display());
        Self { folder, mark }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A file with a store's URL, for its owner alone.
    pub fn write_store_file(&self, name: &str, url: &str) {
        use std::os::unix::fs::OpenOptionsExt as _;
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(self.path(name)).unwrap();
        file.write_all(url.as_bytes()).unwrap();
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    #[track_caller]
    pub fn until_file(&self, name: &str) {
        until(&format!("the file {name}"), || self.path(name).exists());
    }

    /// An invocation of the tool.
    pub fn stanchion<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Invocation {
        self.through(&[], arguments)
    }

    /// The same, started by `env` with these options: how signals are at the start.
    pub fn through<S: AsRef<OsStr>>(&self, options: &[&str], arguments: impl IntoIterator<Item = S>) -> Invocation {
        // Signals as they are for a program that is started in a terminal, however the tests are run.
        let mut command = Command::new("env");
        command.arg("--default-signal").args(options).arg(env!("CARGO_BIN_EXE_stanchion")).args(arguments);
        self.prepare(&mut command);
        Invocation { command, input: None }
    }

    /// A line for the shell, in a mount namespace of its own.
    pub fn unshared(&self, script: &str) -> Invocation {
        let mut command = Command::new("unshare");
        command.args(["-rm", "sh", "-c", script]);
        self.prepare(&mut command);
        Invocation { command, input: None }
    }

    /// A script for a shell, in which `$S` is the tool.
    pub fn script(&self, shell: &str, script: &str) -> Invocation {
        let mut command = Command::new("env");
        command.args(["--default-signal", shell, "-c", script]);
        self.prepare(&mut command);
        command.env("S", env!("CARGO_BIN_EXE_stanchion"));
        Invocation { command, input: None }
    }

    /// Gives a command this world's environment.
    pub fn prepare(&self, command: &mut Command) {
        let path = std::env::var_os("PATH").unwrap_or_default();
        command.env_clear().env("PATH", path).env("HOME", self.folder.path()).env("LC_ALL", "C");
        command.env("XDG_STATE_HOME", self.path("state")).env("D", self.folder.path());
        command.env("STANCHION_TEST", self.folder.path()).current_dir(self.folder.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    }

    /// Processes of this test that live, the test itself apart.
    pub fn processes(&self) -> Vec<i32> {
        let has_mark = |path: String| {
            let environment = fs::read(path).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|entry| entry == self.mark.as_bytes())
        };
        // While a killed process ends, its main thread may have no environment any more although others have.
        let mine = |pid: &i32| {
            has_mark(format!("/proc/{pid}/environ"))
                || threads_of(*pid).into_iter().any(|thread| has_mark(format!("/proc/{pid}/task/{thread}/environ")))
        };
        all_processes().into_iter().filter(mine).filter(|pid| is_alive(*pid)).collect()
    }

    #[track_caller]
    pub fn until_nothing_runs(&self) {
        until("the end of all processes", || self.processes().is_empty());
    }

    /// Nobody holds the key or waits for it.
    #[track_caller]
    pub fn assert_free(&self, key: &str) {
        let json = self.stanchion(["inspect", key, "--json"]).finish().ok();
        assert!(json.contains(r#""holders":[]"#) && json.contains(r#""waiters":[]"#), "{json}");
    }

    #[track_caller]
    pub fn until_free(&self, key: &str) {
        until("a free key", || {
            let json = self.stanchion(["inspect", key, "--json"]).finish().ok();
            json.contains(r#""holders":[]"#) && json.contains(r#""waiters":[]"#)
        });
    }

    /// Waits until that many processes wait for the key.
    #[track_caller]
    pub fn until_waiting(&self, key: &str, count: usize) {
        until("waiters", || {
            let json = self.stanchion(["inspect", key, "--json"]).finish().ok();
            let waiters = json.split_once(r#""waiters":["#).map(|(_, rest)| rest.matches(r#""owner":"#).count());
            waiters == Some(count)
        });
    }
}

impl World {
    /// Waits until that many processes hold the key.
    #[track_caller]
    pub fn until_holding(&self, key: &str, count: usize) {
        until("holders", || {
            let json = self.stanchion(["inspect", key, "--json"]).finish().ok();
            let (holders, _) = json.split_once(r#""waiters":["#).expect("both are there");
            holders.matches(r#""owner":"#).count() == count
        });
    }
}

impl World {
    /// Starts a candidate for the key `k`. Each of its terms is noted, and whether another one's command lives then.
    pub fn candidate(&self, options: &[&str]) -> Running {
        let script = "grep -qs '^State:.[^ZX]' /proc/$(cat $D/leader 2> /dev/null)/status && echo overlap >> $D/overlap
             echo $$ > $D/leader; echo $STANCHION_FENCE $PPID >> $D/terms; exec sleep 600";
        let command = ["-c", script];
        let arguments = ["elect", "k"].iter().chain(options).chain(&command);
        self.stanchion(arguments).start()
    }

    /// Returns the fences of the terms so far and the processes that led.
    pub fn terms(&self) -> Vec<(u64, i32)> {
        let text = self.read("terms");
        let lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')?.split_once(' '));
        lines.map(|(fence, pid)| (fence.parse().unwrap(), pid.parse().unwrap())).collect()
    }

    #[track_caller]
    pub fn until_terms(&self, count: usize) {
        until("the terms", || self.terms().len() == count);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for pid in self.processes() {
            kill(pid, Signal::KILL);
        }
    }
}

/// A world for the user `nobody`, with copies of the tool and of `setpriv`; the latter, named `become`, is root's and setuid.
/// None where that cannot be: only root can make it, and a file system may ignore setuid.
pub fn world_of_nobody() -> Option<World> {
    use std::os::unix::fs::{PermissionsExt as _, chown};
    if !rustix::process::geteuid().is_root() {
        eprintln!("NOT TESTED: only root can make a program that becomes another user");
        return None;
    }
    let world = World::new();
    fs::set_permissions(world.path("."), fs::Permissions::from_mode(0o755)).unwrap();
    chown(world.path("state"), Some(65534), Some(65534)).unwrap();
    // Another process copies them: a file that this process has open for writing is for a moment also open in a child that
    // another test starts, and cannot be executed then.
    for (from, to) in [(env!("CARGO_BIN_EXE_stanchion"), "stanchion"), ("/usr/bin/setpriv", "become")] {
        assert!(Command::new("cp").arg(from).arg(world.path(to)).status().unwrap().success());
    }
    fs::set_permissions(world.path("become"), fs::Permissions::from_mode(0o4755)).unwrap();
    let mut probe = as_nobody(&world, &["./become", "--reuid=0", "id", "-ru"]);
    if probe.output().unwrap().stdout != b"0\n" {
        eprintln!("NOT TESTED: this system does not let a setuid program become root");
        return None;
    }
    Some(world)
}

/// A command that `nobody` runs.
pub fn as_nobody(world: &World, command: &[&str]) -> Command {
    let mut setpriv = Command::new("setpriv");
    setpriv.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).args(command);
    world.prepare(&mut setpriv);
    setpriv
}

pub struct Invocation {
    command: Command,
    input: Option<Vec<u8>>,
}

impl Invocation {
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub fn env_remove(mut self, name: &str) -> Self {
        self.command.env_remove(name);
        self
    }

    pub fn folder(mut self, path: &Path) -> Self {
        self.command.current_dir(path);
        self
    }

    pub fn stdout(mut self, to: impl Into<Stdio>) -> Self {
        self.command.stdout(to);
        self
    }

    pub fn input(mut self, bytes: &[u8]) -> Self {
        self.input = Some(bytes.to_vec());
        self
    }

    pub fn start(mut self) -> Running {
        if self.input.is_some() {
            self.command.stdin(Stdio::piped());
        }
        let mut child = self.command.spawn().unwrap();
        if let Some(bytes) = self.input {
            child.stdin.take().unwrap().write_all(&bytes).unwrap();
        }
        Running { child: Some(child) }
    }

    #[track_caller]
    pub fn finish(self) -> Finished {
        self.start().finish()
    }
}

pub struct Running {
    child: Option<Child>,
}

impl Running {
    pub fn of(mut command: Command) -> Self {
        Self { child: Some(command.spawn().unwrap()) }
    }

    pub fn pid(&self) -> i32 {
        self.child.as_ref().unwrap().id() as i32
    }

    pub fn send(&self, signal: Signal) {
        kill(self.pid(), signal);
    }

    /// Its standard output, to be read while it runs.
    pub fn stdout(&mut self) -> std::process::ChildStdout {
        self.child.as_mut().unwrap().stdout.take().unwrap()
    }

    /// Returns the text written to standard error since the last call.
    pub fn stderr_so_far(&mut self) -> String {
        drain(self.child.as_mut().unwrap().stderr.as_mut().unwrap())
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.as_mut().unwrap().try_wait().unwrap().is_some()
    }

    #[track_caller]
    pub fn finish(mut self) -> Finished {
        // A full pipe would stop the program.
        let mut stdout = Vec::new();
        until("the end of stanchion", || {
            stdout.extend(
                self.child.as_mut().and_then(|child| child.stdout.as_mut()).map(drain_bytes).unwrap_or_default(),
            );
            self.has_ended()
        });
        self.finish_with_output(stdout)
    }

    /// Takes the output of a process that has ended, without waiting for processes that inherited its streams.
    fn finish_with_output(mut self, mut stdout: Vec<u8>) -> Finished {
        use std::os::unix::process::ExitStatusExt as _;
        let mut child = self.child.take().unwrap();
        let status = child.wait().unwrap();
        stdout.extend(child.stdout.take().map(drain_bytes).unwrap_or_default());
        let stdout = String::from_utf8_lossy(&stdout).into_owned();
        let stderr = drain(child.stderr.take().unwrap());
        Finished { code: status.code(), signal: status.signal(), stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ended = child.kill();
            let _ended = child.wait();
        }
    }
}

/// Returns the text that is in the pipe now.
fn drain(pipe: impl std::io::Read + std::os::fd::AsFd) -> String {
    String::from_utf8_lossy(&drain_bytes(pipe)).into_owned()
}

fn drain_bytes(pipe: impl std::io::Read + std::os::fd::AsFd) -> Vec<u8> {
    let flags = rustix::fs::fcntl_getfl(&pipe).unwrap();
    rustix::fs::fcntl_setfl(&pipe, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
    let (mut pipe, mut bytes) = (pipe, Vec::new());
    let _would_block = pipe.read_to_end(&mut bytes);
    bytes
}

#[derive(Debug)]
pub struct Finished {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// It went well and said nothing; gives the data.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!((self.code, self.stderr.as_str()), (Some(0), ""), "{self:?}");
        self.stdout
    }

    #[track_caller]
    pub fn code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        self
    }

    /// One line on stderr, with the tool's name before it, that holds all these texts.
    #[track_caller]
    pub fn says(self, texts: &[&str]) -> Self {
        assert!(self.stderr.starts_with("stanchion: ") && self.stderr.ends_with('\n'), "{self:?}");
        assert_eq!(self.stderr.lines().count(), 1, "{self:?}");
        for text in texts {
            assert!(self.stderr.contains(text), "no `{text}` in {self:?}");
        }
        self
    }

    /// All lines on stderr have the tool's name before them, and together they hold these texts.
    #[track_caller]
    pub fn reports(self, texts: &[&str]) -> Self {
        assert!(self.stderr.lines().all(|line| line.starts_with("stanchion: ")), "{self:?}");
        for text in texts {
            assert!(self.stderr.contains(text), "no `{text}` in {self:?}");
        }
        self
    }

    #[track_caller]
    pub fn silent(self) -> Self {
        assert_eq!((self.stdout.as_str(), self.stderr.as_str()), ("", ""), "{self:?}");
        self
    }
}

pub fn all_processes() -> Vec<i32> {
    fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// State, parent and process group.
pub fn stat(pid: i32) -> Option<(char, i32, i32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

/// Returns whether a process lives: the files and locks of a killed process are closed when its last thread has ended.
pub fn is_alive(pid: i32) -> bool {
    stat(pid).is_some_and(|(state, ..)| !matches!(state, 'Z' | 'X')) || threads_of(pid).len() > 1
}

fn threads_of(pid: i32) -> Vec<i32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    threads.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

pub fn is_stopped(pid: i32) -> bool {
    stat(pid).is_some_and(|(state, ..)| state == 'T')
}

/// The processes that this one has started.
pub fn children_of(pid: i32) -> Vec<i32> {
    all_processes().into_iter().filter(|child| stat(*child).is_some_and(|(_, parent, _)| parent == pid)).collect()
}

/// The guardian that this wrapper has started.
pub fn guardian_of(pid: i32) -> Option<i32> {
    let is_guardian = |child: &i32| {
        let line = fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
        line.windows(10).any(|window| window == b"__guardian")
    };
    children_of(pid).into_iter().find(is_guardian)
}

pub fn kill(pid: i32, signal: Signal) {
    let _gone = kill_process(Pid::from_raw(pid).unwrap(), signal);
}

pub fn kill_group(pid: i32, signal: Signal) {
    let _gone = kill_process_group(Pid::from_raw(pid).unwrap(), signal);
}

/// A pid that a command has written into a file.
#[track_caller]
pub fn pid_in(world: &World, name: &str) -> i32 {
    let mut pid = None;
    until(&format!("a process id in {name}"), || {
        pid = world.read(name).strip_suffix('\n').and_then(|text| text.parse().ok());
        pid.is_some()
    });
    pid.unwrap()
}

/// A small generator, so that the offsets of a failed run can be had again.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// Time by which a limit may be missed on a busy machine. A wrong mechanism takes ten seconds.
const SLACK: Duration = Duration::from_secs(4);

/// Runs the tool with `-n` and with `-w`, and checks the code and the time.
#[track_caller]
pub fn limits_are_kept(what: &str, run: impl Fn(&[&str]) -> Invocation) {
    let second = Duration::from_secs(1);
    for (options, least, limit) in [
        (&["-n"][..], Duration::ZERO, second),
        (&["-w", "100ms"], Duration::ZERO, second),
        (&["-w", "2s"], 2 * second - second / 10, 2 * second),
    ] {
        let start = now();
        let finished = run(options).finish();
        // Where a script prepares the store, it prints the milliseconds of the tool alone.
        let took = finished.stdout.trim().parse().map_or(now().since(start), Duration::from_millis);
        eprintln!("{what} {options:?}: {took:.2?}: {}", finished.stderr.trim());
        finished.code(69).says(&[]);
        assert!(took >= least && took < limit + SLACK, "{what} {options:?}: {took:?}");
    }
}
