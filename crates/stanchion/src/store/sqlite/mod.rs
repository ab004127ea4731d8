//! The embedded store: a folder with an SQLite database, for the processes of one user on one machine.
//!
//! A caller sends a request to the database thread and awaits the answer, so that SQLite never runs on the caller's
//! thread. Two things rely on file locks of the kernel: a session stays open as long as a process holds the lock of its
//! file, and writers queue at the lock of the gate.
//!
//! ```text
//! FOLDER/            mode 0700, owned by one user, on a local disk
//!   locks.db         keys, holds, queues, sessions (with -wal and -shm)
//!   gate             the file whose lock queues the writers
//!   sessions/ID.lock locked by the session's process as long as the process lives
//!   sessions/ID.sock receives the session's pushes
//! ```

mod codec;
mod config;
mod connect;
mod error;
mod folder;
mod inspect;
mod parents;
mod predecessors;
mod read;
mod reaper;
mod reconcile;
mod request;
mod rows;
mod session;
mod tx;
mod watch;
mod worker;
mod write;

use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::oneshot;

use self::folder::Folder;
use self::request::{Answer, Request};
use self::worker::{Access, HandleState, Job, Worker};
use super::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, Capabilities, Cursor, EndOutcome, ExtendOutcome,
    ForceReleaseOutcome, ForceReleaseRequest, GrantStream, KeyState, LingerOutcome, Listing, Liveness, OpenOutcome,
    OpenSession, PollOutcome, RenewOutcome, Reply, Store, push_channel,
};
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
use crate::key::Key;
use crate::sync::lock;
use crate::thread::Ending;
use crate::token::{SessionId, TokenId};

/// Keeps locks in a folder of this machine, for the processes of one user. Needs no server.
///
/// When a process exits or is killed, its holds are free at once. A stopped process keeps its holds. Dropping the store
/// closes its sessions and waits for that at most one second, as [`Locks`](crate::Locks) does.
///
/// ```
/// use stanchion::store::{Sqlite, Store};
///
/// # let parent = tempfile::tempdir().unwrap();
/// let store = Sqlite::open(parent.path().join("locks"))?;
/// assert!(store.capabilities().fair);
/// # Ok::<(), stanchion::Error>(())
/// ```
#[derive(Debug)]
pub struct Sqlite {
    jobs: Sender<Job>,
    access: Arc<Access>,
    shared: Arc<HandleState>,
    folder: PathBuf,
    thread: Mutex<Option<Ending>>,
}

/// Maximum time that a drop waits until the thread has closed the sessions.
const DROP_TIMEOUT: Duration = Duration::from_secs(1);

impl Sqlite {
    /// Opens the store in this folder. Creates the folder, with access for its owner only, if it does not exist.
    ///
    /// This call reads and writes files, so it may block for a moment. It never overwrites a damaged or foreign file.
    ///
    /// # Errors
    /// - [`ErrorKind::Misconfigured`] if locks would not be safe in the folder, or if its database is damaged or
    ///   belongs to another program or to a newer stanchion.
    /// - [`ErrorKind::Unauthorized`] if this process has no right to use the folder.
    /// - [`ErrorKind::Unavailable`] if the system cannot serve the folder now.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        Self::open_here(folder.as_ref(), Clock::system(), connect::boot_id()?)
    }

    /// Opens the store of a URL: `sqlite:FOLDER`, `sqlite:///ABSOLUTE/FOLDER`, or `sqlite:` for the [default
    /// folder](Self::default_folder). `%XX` encodes a byte of the path.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if the URL does not have this form or has options, and the errors of
    /// [`Sqlite::open`].
    pub fn from_url(url: &str) -> Result<Self> {
        Self::open(config::folder_of_url(url)?)
    }

    /// Opens the store of a URL, as [`from_url`](Self::from_url) does, without blocking the caller's thread.
    ///
    /// # Errors
    /// The errors of [`Sqlite::from_url`].
    ///
    /// # Cancel safety
    /// A dropped future leaves only a thread behind, which ends when the file system has answered.
    pub async fn connect(url: &str) -> Result<Self> {
        let (sender, opened) = oneshot::channel();
        let report = |outcome| drop(sender.send(outcome));
        let thread = Self::start(config::folder_of_url(url)?, Clock::system(), connect::boot_id()?, report)?;
        opened.await.map_err(|_| ended())?.map(|store| store.with_thread(thread))
    }

    /// Returns the user's default folder: `stanchion` in `XDG_STATE_HOME`, or in `~/.local/state` if that is not set.
    ///
    /// # Errors
    /// [`ErrorKind::Misconfigured`] if neither `XDG_STATE_HOME` nor `HOME` is an absolute path.
    pub fn default_folder() -> Result<PathBuf> {
        config::default_folder()
    }

    /// Returns the folder that a URL names, without looking at it or creating it.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) if it is not a URL of this store;
    /// [`ErrorKind::Misconfigured`](crate::ErrorKind::Misconfigured) if it names no folder and the user has none.
    pub fn folder_of_url(url: &str) -> Result<PathBuf> {
        config::folder_of_url(url)
    }

    /// Returns the version of SQLite in this build.
    pub fn sqlite_version() -> &'static str {
        rusqlite::version()
    }

    /// Returns the folder of this store.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns a copy of the descriptor that keeps a session of this handle open. The copy is closed on exec.
    ///
    /// The session stays open as long as any process has a copy: a child that inherits a copy keeps its parent's locks,
    /// as with `flock(1)`.
    ///
    /// Returns `None` if this handle did not open the session, or if the process has no descriptor left.
    pub fn session_descriptor(&self, session: SessionId) -> Option<OwnedFd> {
        self.shared.sessions().get(&session)?.try_clone().ok()
    }

    /// Opens the store with another clock and another boot id of the machine. For tests.
    ///
    /// # Errors
    /// The errors of [`Sqlite::open`].
    #[doc(hidden)]
    pub fn open_with(folder: impl AsRef<Path>, clock: Clock, boot_id: &str) -> Result<Self> {
        Self::open_here(folder.as_ref(), clock, boot_id.to_owned())
    }

    /// Returns the number of write transactions that this handle has begun. For tests.
    #[doc(hidden)]
    pub fn write_transactions(&self) -> u64 {
        self.shared.write_transactions.load(Ordering::Relaxed)
    }

    fn open_here(path: &Path, clock: Clock, boot_id: String) -> Result<Self> {
        let (sender, opened) = mpsc::channel();
        let thread = Self::start(path.to_owned(), clock, boot_id, move |outcome| drop(sender.send(outcome)))?;
        opened.recv().map_err(|_| ended())?.map(|store| store.with_thread(thread))
    }

    /// Starts the thread, which opens the database and reports the outcome. The thread ends if the reported store is
    /// dropped.
    fn start(
        path: PathBuf,
        clock: Clock,
        boot_id: String,
        report: impl FnOnce(Result<Self>) + Send + 'static,
    ) -> Result<Ending> {
        let run = move || match Self::prepare(&path, clock, &boot_id) {
            Ok((store, worker)) => {
                report(Ok(store));
                worker.run();
            }
            Err(fault) => report(Err(fault)),
        };
        crate::thread::spawn("stanchion-sqlite", run).map_err(|cause| {
            error::error(ErrorKind::Unavailable, "the system cannot start a thread for the store").with_source(cause)
        })
    }

    fn prepare(path: &Path, clock: Clock, boot_id: &str) -> Result<(Self, Worker)> {
        let folder = Folder::prepare(path)?;
        let resolved = folder.database.parent().unwrap_or(path).to_owned();
        let (worker, jobs, shared) = Worker::open(folder, clock, boot_id)?;
        let access = worker.access.clone();
        Ok((Self { jobs, access, shared, folder: resolved, thread: Mutex::default() }, worker))
    }

    fn with_thread(self, thread: Ending) -> Self {
        *lock(&self.thread) = Some(thread);
        self
    }

    /// Executes a request on this thread if that is possible at once. Otherwise sends it to the database thread, and waits for
    /// its answer.
    async fn send(&self, mut request: Request) -> Result<Reply<Answer>> {
        let caller = self.access.enter();
        if request.is_short() && caller.is_alone().await {
            match self.access.try_execute(&self.jobs, request) {
                ControlFlow::Break(result) => return result,
                ControlFlow::Continue(back) => request = back,
            }
        }
        self.access.queue(&self.jobs, request).ok_or_else(ended)?.await.map_err(|_| ended())?
    }
}

fn ended() -> Error {
    error::error(ErrorKind::Internal, "the thread of the store has stopped").in_doubt(true)
}

impl Drop for Sqlite {
    fn drop(&mut self) {
        let _ = self.jobs.send(Job::Stop); // an error: the thread has stopped already
        // The thread closes the sessions that are still open. If the process exited before that, their files would
        // stay.
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread.filter(|_| !self.shared.sessions().is_empty()) {
            thread.wait(DROP_TIMEOUT);
        }
    }
}

/// Sends a request, and returns the outcome from the matching variant of [`Answer`].
macro_rules! send {
    ($store:expr, $request:expr, $answer:pat => $outcome:expr) => {{
        let reply = $store.send($request).await?;
        match reply.outcome {
            $answer => Ok(Reply { time: reply.time, outcome: $outcome }),
            _ => Err(error::error(ErrorKind::Internal, "the thread of the store sent the answer to another request")),
        }
    }};
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Store for Sqlite {
    fn capabilities(&self) -> Capabilities {
        // Pushes are authentic because the sockets are in a folder that other users cannot enter.
        Capabilities::new(error::NAME).with_liveness(Liveness::Process).with_authentic_push()
    }

    async fn open_session(&self, request: OpenSession) -> Result<Reply<OpenOutcome>> {
        send!(self, Request::Open(request), Answer::Open(outcome) => outcome)
    }

    async fn renew_session(&self, session: SessionId) -> Result<Reply<RenewOutcome>> {
        send!(self, Request::RenewSession(session), Answer::RenewSession(outcome) => outcome)
    }

    async fn close_session(&self, session: SessionId) -> Result<Reply<()>> {
        send!(self, Request::Close(session), Answer::Done => ())
    }

    async fn session_lives(&self, session: SessionId) -> Result<Reply<bool>> {
        send!(self, Request::SessionLives(session), Answer::SessionLives(lives) => lives)
    }

    async fn acquire(&self, request: AcquireRequest) -> Result<Reply<AcquireOutcome>> {
        send!(self, Request::Acquire(request), Answer::Acquire(outcome) => outcome)
    }

    async fn poll(&self, key: &Key, tokens: &[TokenId]) -> Result<Reply<Vec<PollOutcome>>> {
        send!(self, Request::Poll { key: key.clone(), tokens: tokens.to_vec() }, Answer::Poll(outcomes) => outcomes)
    }

    async fn abandon(&self, key: &Key, token: TokenId) -> Result<Reply<EndOutcome>> {
        send!(self, Request::Release { key: key.clone(), token, cooldown: None }, Answer::Release(outcome) => outcome)
    }

    async fn release(&self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<Reply<EndOutcome>> {
        send!(self, Request::Release { key: key.clone(), token, cooldown }, Answer::Release(outcome) => outcome)
    }

    async fn extend(&self, key: &Key, token: TokenId, ttl: Duration) -> Result<Reply<ExtendOutcome>> {
        send!(self, Request::Extend { key: key.clone(), token, ttl }, Answer::Extend(outcome) => outcome)
    }

    async fn linger(&self, key: &Key, token: TokenId) -> Result<Reply<LingerOutcome>> {
        send!(self, Request::Linger { key: key.clone(), token }, Answer::Linger(outcome) => outcome)
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Reply<AdoptOutcome>> {
        send!(self, Request::Adopt(request), Answer::Adopt(outcome) => outcome)
    }

    async fn force_release(&self, request: ForceReleaseRequest) -> Result<Reply<ForceReleaseOutcome>> {
        send!(self, Request::ForceRelease(request), Answer::ForceRelease(outcome) => outcome)
    }

    async fn inspect(&self, key: &Key) -> Result<Reply<KeyState>> {
        send!(self, Request::Inspect(key.clone()), Answer::Inspect(outcome) => outcome)
    }

    async fn list(&self, prefix: &str, cursor: Option<&Cursor>, limit: usize) -> Result<Reply<Listing>> {
        let request = Request::List { prefix: prefix.to_owned(), cursor: cursor.cloned(), limit };
        send!(self, request, Answer::List(outcome) => outcome)
    }

    fn grants(&self, session: SessionId) -> GrantStream {
        let (sender, stream) = push_channel();
        self.shared.senders().insert(session, sender);
        stream
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn operations_fail_when_the_thread_has_stopped() {
        let (jobs, queue) = mpsc::channel();
        let (access, shared) = (Arc::default(), Arc::default());
        let store = Sqlite { jobs, access, shared, folder: PathBuf::new(), thread: Mutex::default() };
        let key = Key::new("", "job").unwrap();
        let token = TokenId::from_bytes([1; 16]);
        let operations = tokio::spawn(async move {
            let queued = store.poll(&key, &[token]).await.unwrap_err();
            let rejected = store.poll(&key, &[token]).await.unwrap_err();
            (queued.kind(), rejected.kind())
        });
        tokio::task::yield_now().await;
        // A panic of the thread drops the queue too, with all requests in it.
        drop(queue);
        assert_eq!(operations.await.unwrap(), (ErrorKind::Internal, ErrorKind::Internal));
    }
}
