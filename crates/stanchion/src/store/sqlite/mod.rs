//! The embedded store: a folder with an SQLite database, for the processes of one machine and one user.
//!
//! A caller sends a step to the database thread and awaits its answer; SQLite never runs on the caller's thread. What
//! the kernel keeps, the kernel decides: a session lives as long as its process holds the lock of its file, and writers
//! queue at the lock of the gate.
//!
//! ```text
//! FOLDER/            0700, of one user, on a local disk
//!   locks.db         keys, holds, queues, sessions (with -wal and -shm)
//!   gate             the lock at which writers queue
//!   sessions/ID.lock locked by the session's process while it lives
//!   sessions/ID.sock where its pushes arrive
//! ```

mod config;
mod connect;
mod error;
mod folder;
mod list;
mod message;
mod parents;
mod predecessors;
mod read;
mod rows;
mod session;
mod settle;
mod steps;
mod tx;
mod watch;
mod worker;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::oneshot;

use self::folder::Folder;
use self::steps::{Answer, Operation};
use self::worker::{Job, Shared, Worker};
use super::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, Capabilities, Cursor, EndOutcome, ExtendOutcome,
    ForceReleaseOutcome, ForceReleaseRequest, GrantStream, KeyState, Listing, Liveness, OpenOutcome, OpenSession,
    PollOutcome, RenewOutcome, Reply, Store, push_channel,
};
use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
use crate::key::Key;
use crate::thread::Ending;
use crate::token::{SessionId, TokenId};

/// Locks in a folder of this machine, shared by the processes of one user. Needs no server.
///
/// A process that ends, however it ends, frees what it held at once; one that is stopped keeps it. Dropping the store
/// closes the sessions that it has opened, and waits for that, a second at most, as [`Locks`](crate::Locks) does.
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
    shared: Arc<Shared>,
    folder: PathBuf,
    thread: Mutex<Option<Ending>>,
}

/// How long a drop waits for its sessions to be closed.
const DROP_WITHIN: Duration = Duration::from_secs(1);

impl Sqlite {
    /// Opens the store in this folder. Makes the folder, for its owner alone, if it is not there.
    ///
    /// Works on files, so it may block for a moment.
    ///
    /// # Errors
    /// [`ErrorKind::Misconfigured`] if locks would not be safe there, or if the database there is damaged, another
    /// program's, or a newer stanchion's; [`ErrorKind::Unauthorized`] without the right to use it;
    /// [`ErrorKind::Unavailable`] if the system cannot serve it now. Nothing that is found there is overwritten.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        Self::open_here(folder.as_ref(), Clock::system(), connect::boot_id()?)
    }

    /// Opens the store that a URL names: `sqlite:FOLDER`, `sqlite:///ABSOLUTE/FOLDER`, or `sqlite:` for the
    /// [default folder](Self::default_folder). `%XX` stands for a byte of the path.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if the URL is not of this form or has options, and those of [`Sqlite::open`].
    pub fn from_url(url: &str) -> Result<Self> {
        Self::open(config::folder_of_url(url)?)
    }

    /// Opens the store that a URL names, as [`from_url`](Self::from_url) does, without blocking the caller's thread.
    ///
    /// # Errors
    /// Those of [`Sqlite::from_url`].
    ///
    /// # Cancel safety
    /// A dropped future leaves nothing behind but, until the file system has answered, a thread.
    pub async fn connect(url: &str) -> Result<Self> {
        let (tell, opened) = oneshot::channel();
        let tell = |outcome| drop(tell.send(outcome));
        let thread = Self::start(config::folder_of_url(url)?, Clock::system(), connect::boot_id()?, tell)?;
        opened.await.map_err(|_| ended())?.map(|store| store.with_thread(thread))
    }

    /// The user's own folder: `stanchion` in `XDG_STATE_HOME`, or in `~/.local/state` where that is not set.
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

    /// The folder of this store.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A copy of the descriptor that keeps a session of this handle alive, closed on exec. As long as any process has
    /// a copy the session lives: a child that inherits one keeps its parent's locks, as with `flock(1)`.
    ///
    /// `None` if the session is not open here, or the process has no descriptor left.
    pub fn session_descriptor(&self, session: SessionId) -> Option<OwnedFd> {
        self.shared.sessions().get(&session)?.try_clone().ok()
    }

    /// Opens the store on this clock and as if in this boot of the machine. For tests.
    ///
    /// # Errors
    /// Those of [`Sqlite::open`].
    #[doc(hidden)]
    pub fn open_with(folder: impl AsRef<Path>, clock: Clock, boot_id: &str) -> Result<Self> {
        Self::open_here(folder.as_ref(), clock, boot_id.to_owned())
    }

    /// How many write transactions this handle has begun. For tests.
    #[doc(hidden)]
    pub fn write_transactions(&self) -> u64 {
        self.shared.write_transactions.load(Ordering::Relaxed)
    }

    fn open_here(path: &Path, clock: Clock, boot_id: String) -> Result<Self> {
        let (tell, opened) = mpsc::channel();
        let thread = Self::start(path.to_owned(), clock, boot_id, move |outcome| drop(tell.send(outcome)))?;
        opened.recv().map_err(|_| ended())?.map(|store| store.with_thread(thread))
    }

    /// Starts the thread, which opens the database and tells the outcome. If nobody takes that, the thread ends.
    fn start(
        path: PathBuf,
        clock: Clock,
        boot_id: String,
        tell: impl FnOnce(Result<Self>) + Send + 'static,
    ) -> Result<Ending> {
        let run = move || match Self::prepare(&path, clock, &boot_id) {
            Ok((store, worker)) => {
                tell(Ok(store));
                worker.run();
            }
            Err(fault) => tell(Err(fault)),
        };
        crate::thread::spawn("stanchion-sqlite", run).map_err(|cause| {
            error::error(ErrorKind::Unavailable, "the system has no thread for the store").with_source(cause)
        })
    }

    fn prepare(path: &Path, clock: Clock, boot_id: &str) -> Result<(Self, Worker)> {
        let folder = Folder::prepare(path)?;
        let place = folder.database.parent().unwrap_or(path).to_owned();
        let (worker, jobs) = Worker::open(folder, clock, boot_id)?;
        let shared = worker.shared.clone();
        Ok((Self { jobs, shared, folder: place, thread: Mutex::default() }, worker))
    }

    fn with_thread(self, thread: Ending) -> Self {
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        self
    }

    async fn ask(&self, step: Operation) -> Result<Reply<Answer>> {
        let (reply, answer) = oneshot::channel();
        self.jobs.send(Job::Operation { step, reply }).map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }
}

fn ended() -> Error {
    error::error(ErrorKind::Internal, "the store's thread has ended").in_doubt(true)
}

impl Drop for Sqlite {
    fn drop(&mut self) {
        let _has_ended = self.jobs.send(Job::Stop);
        // The thread closes the sessions that are still open. A process that ended meanwhile would leave their files.
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread.filter(|_| !self.shared.sessions().is_empty()) {
            thread.wait(DROP_WITHIN);
        }
    }
}

/// Asks, and takes the answer that belongs to the step.
macro_rules! ask {
    ($store:expr, $step:expr, $answer:pat => $outcome:expr) => {{
        let reply = $store.ask($step).await?;
        match reply.outcome {
            $answer => Ok(Reply { time: reply.time, outcome: $outcome }),
            _ => Err(error::error(ErrorKind::Internal, "the store's thread gave the answer of another step")),
        }
    }};
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl Store for Sqlite {
    fn capabilities(&self) -> Capabilities {
        // Its sockets are in a folder that nobody else can enter.
        Capabilities::new(error::NAME).with_liveness(Liveness::Process).with_authentic_push()
    }

    async fn open_session(&self, request: OpenSession) -> Result<Reply<OpenOutcome>> {
        ask!(self, Operation::Open(request), Answer::Open(outcome) => outcome)
    }

    async fn renew_session(&self, session: SessionId) -> Result<Reply<RenewOutcome>> {
        ask!(self, Operation::RenewSession(session), Answer::Renewed(outcome) => outcome)
    }

    async fn close_session(&self, session: SessionId) -> Result<Reply<()>> {
        ask!(self, Operation::Close(session), Answer::Done => ())
    }

    async fn session_lives(&self, session: SessionId) -> Result<Reply<bool>> {
        ask!(self, Operation::Lives(session), Answer::Lives(lives) => lives)
    }

    async fn acquire(&self, request: AcquireRequest) -> Result<Reply<AcquireOutcome>> {
        ask!(self, Operation::Acquire(request), Answer::Acquire(outcome) => outcome)
    }

    async fn poll(&self, key: &Key, tokens: &[TokenId]) -> Result<Reply<Vec<PollOutcome>>> {
        ask!(self, Operation::Poll { key: key.clone(), tokens: tokens.to_vec() }, Answer::Poll(outcomes) => outcomes)
    }

    async fn abandon(&self, key: &Key, token: TokenId) -> Result<Reply<EndOutcome>> {
        ask!(self, Operation::End { key: key.clone(), token, cooldown: None }, Answer::End(outcome) => outcome)
    }

    async fn release(&self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<Reply<EndOutcome>> {
        ask!(self, Operation::End { key: key.clone(), token, cooldown }, Answer::End(outcome) => outcome)
    }

    async fn extend(&self, key: &Key, token: TokenId, ttl: Duration) -> Result<Reply<ExtendOutcome>> {
        ask!(self, Operation::Extend { key: key.clone(), token, ttl }, Answer::Extend(outcome) => outcome)
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Reply<AdoptOutcome>> {
        ask!(self, Operation::Adopt(request), Answer::Adopt(outcome) => outcome)
    }

    async fn force_release(&self, request: ForceReleaseRequest) -> Result<Reply<ForceReleaseOutcome>> {
        ask!(self, Operation::ForceRelease(request), Answer::ForceReleased(outcome) => outcome)
    }

    async fn inspect(&self, key: &Key) -> Result<Reply<KeyState>> {
        ask!(self, Operation::Inspect(key.clone()), Answer::Inspect(outcome) => outcome)
    }

    async fn list(&self, prefix: &str, cursor: Option<&Cursor>, limit: usize) -> Result<Reply<Listing>> {
        let step = Operation::List { prefix: prefix.to_owned(), cursor: cursor.cloned(), limit };
        ask!(self, step, Answer::List(outcome) => outcome)
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
    async fn without_its_thread_every_step_fails_and_none_hangs() {
        let (jobs, queue) = mpsc::channel();
        let store = Sqlite { jobs, shared: Arc::default(), folder: PathBuf::new(), thread: Mutex::default() };
        let key = Key::new("", "job").unwrap();
        let token = TokenId::from_bytes([1; 16]);
        let step = tokio::spawn(async move {
            let queued = store.poll(&key, &[token]).await.unwrap_err();
            let refused = store.poll(&key, &[token]).await.unwrap_err();
            (queued.kind(), refused.kind())
        });
        tokio::task::yield_now().await;
        // As when the thread panics: what is queued is dropped with the queue.
        drop(queue);
        assert_eq!(step.await.unwrap(), (ErrorKind::Internal, ErrorKind::Internal));
    }
}
