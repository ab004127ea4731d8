//! Runs the database thread, which executes all queued requests in one transaction.
//!
//! A caller executes a short request on its own thread if nothing is queued and both the engine and the gate are free: waking
//! another thread twice takes longer than the request. It never waits for them. ADR 6 has the figures.
//!
//! # Invariants
//! 1. Only one thread at a time has the engine. The database thread waits for requests, for the engine, for the gate and for the
//!    disk, and for nothing else.
//! 2. A request is answered, and its pushes are sent, only after the commit of its transaction.
//! 3. A request that fails does not undo other requests of its transaction.
//! 4. If the thread ends for any reason, or the engine panics, every caller gets an error: the reply channels close, and the engine
//!    is gone.
//! 5. Checkpoints, which take milliseconds, and sweeps run on the database thread.

use std::collections::{HashMap, HashSet};
use std::mem;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Poll;
use std::time::Duration;

use rusqlite::Connection;
use rusqlite::config::DbConfig;
use tokio::sync::oneshot;

use super::connect::{Gate, connect};
use super::ended;
use super::error::error;
use super::folder::{Folder, was_deleted};
use super::predecessors::Predecessors;
use super::request::{Answer, Request};
use super::session::{self, OwnSession};
use super::tx::{Effects, Tx, WorkerState};
use super::watch::Watcher;
use crate::clock::{BootTime, Clock, jitter_seed};
use crate::error::{ErrorKind, Result};
use crate::store::{Push, PushSender, RenewOutcome, Reply, StoreTime};
use crate::sync::lock;
use crate::token::SessionId;

/// Maximum number of requests in one transaction.
const MAX_BATCH: usize = 64;
/// Number of write transactions between two sweeps.
const SWEEP_INTERVAL: u32 = 64;

/// Number of pages that the log grows between two checkpoints, roughly: see [`pages`].
const CHECKPOINT_INTERVAL: usize = 8_000;

/// A message to the thread.
#[derive(Debug)]
pub(super) enum Job {
    /// A request, with the channel for its answer.
    Request { request: Request, reply: oneshot::Sender<Result<Reply<Answer>>> },
    /// A watched process has exited.
    ProcessExited(i32),
    /// Callers have executed many requests since the last checkpoint.
    Checkpoint,
    /// The store was dropped: the thread executes the queued requests and ends.
    Stop,
}

/// The data that the thread shares with the handle.
#[derive(Debug, Default)]
pub(super) struct HandleState {
    senders: Mutex<HashMap<SessionId, PushSender>>,
    sessions: Mutex<HashMap<SessionId, Arc<std::os::fd::OwnedFd>>>,
    pub(super) write_transactions: AtomicU64,
}

impl HandleState {
    /// Returns the senders of the sessions' push streams.
    pub(super) fn senders(&self) -> MutexGuard<'_, HashMap<SessionId, PushSender>> {
        lock(&self.senders)
    }

    /// Returns the locked files of the open sessions.
    pub(super) fn sessions(&self) -> MutexGuard<'_, HashMap<SessionId, Arc<std::os::fd::OwnedFd>>> {
        lock(&self.sessions)
    }
}

/// Executes requests.
#[derive(Debug)]
struct Engine {
    db: Connection,
    gate: Gate,
    state: WorkerState,
    clock: Clock,
    shared: Arc<HandleState>,
    /// Number of pages that the log may grow until the next checkpoint.
    checkpoint_in: usize,
}

/// The database thread, before and while it runs.
#[derive(Debug)]
pub(super) struct Worker {
    queue: Receiver<Job>,
    pub(super) access: Arc<Access>,
}

/// The engine, for the database thread and for callers.
#[derive(Debug, Default)]
pub(super) struct Access {
    /// `None` while a request runs, after the thread has ended, and after a panic.
    engine: Mutex<Option<Engine>>,
    crowd: Crowd,
}

/// Decides whether callers execute their requests themselves.
///
/// Requests of several callers are cheaper together, in one transaction of the thread. A single caller is faster alone. Callers
/// of one executor thread never meet while each executes its request at once, so now and then a caller lets the others go first,
/// and looks whether there are any.
#[derive(Debug, Default)]
pub(super) struct Crowd {
    /// Number of callers that wait for an answer or are about to send a request.
    callers: AtomicU32,
    /// Number of jobs that the thread has not served yet.
    queued: AtomicUsize,
    /// Number of requests until a caller lets the others go first.
    look_in: AtomicU32,
    /// Number of requests that go to the thread before callers try on their own again.
    left: AtomicU32,
}

impl Crowd {
    /// Interval between two looks for other callers, in requests.
    const LOOK_EVERY: u32 = 16;
    /// Number of requests that go to the thread after several callers were seen.
    const LASTS: u32 = 1_024;

    fn enter(&self) -> Caller<'_> {
        self.callers.fetch_add(1, Ordering::Relaxed);
        Caller(self)
    }

    fn saw_several(&self) {
        self.left.store(Self::LASTS, Ordering::Relaxed);
    }
}

/// A caller with a request.
#[derive(Debug)]
pub(super) struct Caller<'a>(&'a Crowd);

impl Caller<'_> {
    /// Returns whether the caller may try to execute its request itself.
    pub(super) async fn is_alone(&self) -> bool {
        let Self(crowd) = self;
        if crowd.left.load(Ordering::Relaxed) > 0 {
            crowd.left.fetch_sub(1, Ordering::Relaxed);
            return false;
        }
        if crowd.look_in.fetch_sub(1, Ordering::Relaxed) % Crowd::LOOK_EVERY == 0 {
            let_others_go_first().await;
            if crowd.callers.load(Ordering::Relaxed) > 1 {
                crowd.saw_several();
                return false;
            }
        }
        crowd.queued.load(Ordering::Acquire) == 0
    }
}

impl Drop for Caller<'_> {
    fn drop(&mut self) {
        self.0.callers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Lets the executor run its other tasks once.
async fn let_others_go_first() {
    let mut has_yielded = false;
    std::future::poll_fn(|context| {
        if has_yielded {
            return Poll::Ready(());
        }
        has_yielded = true;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Waits for the next job, and spins first if a job is likely to arrive soon.
///
/// If a caller sends its next request as soon as it has an answer, spinning is faster, because sleeping and waking
/// takes longer than the request itself. Without such a caller the thread sleeps at once.
#[derive(Debug)]
struct SpinWait {
    clock: Clock,
    /// Number of short sleeps until the thread spins again.
    sleeps_left: u32,
}

impl SpinWait {
    /// Maximum time that the thread spins for one job.
    const SPIN_TIME: Duration = Duration::from_micros(50);
    /// Length of a sleep up to which spinning might have been faster.
    const SHORT_SLEEP: Duration = Duration::from_micros(150);
    /// Number of short sleeps before the thread spins again, after it spun in vain.
    const SLEEPS: u32 = 32;

    fn new() -> Self {
        let has_one_core = std::thread::available_parallelism().map_or(1, usize::from) == 1;
        // Use the system clock even if the store's clock is virtual, because a virtual clock does not advance by
        // itself.
        Self { clock: Clock::system(), sleeps_left: if has_one_core { u32::MAX } else { Self::SLEEPS } }
    }

    /// Returns the next job, or `None` when all senders are gone.
    fn next(&mut self, queue: &Receiver<Job>) -> Option<Job> {
        let start = self.clock.now();
        if self.sleeps_left == 0 {
            while self.clock.now().since(start) < Self::SPIN_TIME {
                match queue.try_recv() {
                    Ok(job) => return Some(job),
                    Err(TryRecvError::Disconnected) => return None,
                    Err(TryRecvError::Empty) => std::hint::spin_loop(),
                }
            }
            self.sleeps_left = Self::SLEEPS;
        }
        let job = queue.recv().ok();
        if self.sleeps_left < u32::MAX && self.clock.now().since(start) < Self::SHORT_SLEEP {
            self.sleeps_left = self.sleeps_left.saturating_sub(1);
        }
        job
    }
}

/// A request of a batch, with the channel for its answer if a caller waits for it.
struct QueuedRequest {
    request: Request,
    reply: Option<oneshot::Sender<Result<Reply<Answer>>>>,
}

impl Worker {
    /// Opens the store in this folder, and returns the worker for a new thread and the sender of its jobs.
    pub(super) fn open(folder: Folder, clock: Clock, boot_id: &str) -> Result<(Self, Sender<Job>, Arc<HandleState>)> {
        let opened = connect(&folder, &clock, boot_id)?;
        let (jobs, queue) = mpsc::channel();
        let state = WorkerState {
            folder,
            files: opened.files,
            missing: None,
            touch_at: BootTime::from_nanos(0),
            own: HashMap::new(),
            ended: HashSet::new(),
            predecessors: Predecessors::new(),
            watcher: Watcher::new(jobs.clone())?,
            push_socket: session::sending_socket(),
            // Begin at a random number, so that short-lived handles sweep sometimes too.
            sweep_in: u32::try_from(jitter_seed() % 64).unwrap_or(0),
        };
        let shared: Arc<HandleState> = Arc::default();
        let engine = Engine {
            db: opened.db,
            gate: opened.gate,
            state,
            clock,
            shared: shared.clone(),
            checkpoint_in: CHECKPOINT_INTERVAL,
        };
        let access = Access { engine: Mutex::new(Some(engine)), crowd: Crowd::default() };
        Ok((Self { queue, access: Arc::new(access) }, jobs, shared))
    }

    /// Executes jobs until a [`Job::Stop`] arrives.
    pub(super) fn run(self) {
        let mut wait = SpinWait::new();
        while let Some(first) = wait.next(&self.queue) {
            let mut batch = vec![first];
            while batch.len() < MAX_BATCH {
                match self.queue.try_recv() {
                    Ok(job) => batch.push(job),
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
                }
            }
            let requests = batch.iter().filter(|job| matches!(job, Job::Request { .. })).count();
            if requests > 1 {
                self.access.crowd.saw_several();
            }
            let mut engine = lock(&self.access.engine);
            // Taken out, so that it is gone after a panic.
            let Some(mut taken) = engine.take() else { break };
            let keeps_running = taken.serve(batch);
            if taken.checkpoint_in == 0 {
                taken.checkpoint();
            }
            *engine = Some(taken);
            drop(engine);
            self.access.crowd.queued.fetch_sub(requests, Ordering::AcqRel);
            if !keeps_running {
                break;
            }
        }
        if let Some(engine) = lock(&self.access.engine).take() {
            engine.close();
        }
    }
}

impl Access {
    /// Enters a caller, which stays until the value is dropped.
    pub(super) fn enter(&self) -> Caller<'_> {
        self.crowd.enter()
    }

    /// Queues a request for the thread, and returns the channel for its answer. Returns `None` if the thread has ended.
    pub(super) fn queue(
        &self,
        jobs: &Sender<Job>,
        request: Request,
    ) -> Option<oneshot::Receiver<Result<Reply<Answer>>>> {
        let (reply, answer) = oneshot::channel();
        self.crowd.queued.fetch_add(1, Ordering::AcqRel);
        jobs.send(Job::Request { request, reply }).ok().map(|()| answer)
    }

    /// Executes a request on the caller's thread, if the engine and the gate are free. Gives the request back otherwise.
    pub(super) fn try_execute(
        &self,
        jobs: &Sender<Job>,
        request: Request,
    ) -> ControlFlow<Result<Reply<Answer>>, Request> {
        let Ok(mut engine) = self.engine.try_lock() else { return ControlFlow::Continue(request) };
        // Taken out, so that it is gone after a panic.
        let Some(mut taken) = engine.take() else { return ControlFlow::Continue(request) };
        // A sweep takes longer.
        let is_free = taken.state.sweep_in > 0 && taken.gate.try_enter().map(mem::forget).is_some();
        if !is_free {
            *engine = Some(taken);
            return ControlFlow::Continue(request);
        }
        let (reply, mut answer) = oneshot::channel();
        let served = catch_unwind(AssertUnwindSafe(|| {
            taken.serve(vec![Job::Request { request, reply }]);
            taken
        }));
        if let Ok(mut taken) = served {
            // The transaction has left the gate, unless it never entered.
            taken.gate.leave();
            if taken.checkpoint_in == 0 {
                taken.checkpoint_in = CHECKPOINT_INTERVAL;
                let _ = jobs.send(Job::Checkpoint); // an error: the thread has ended
            }
            *engine = Some(taken);
        }
        ControlFlow::Break(answer.try_recv().unwrap_or_else(|_| Err(ended())))
    }
}

impl Engine {
    /// Executes a batch of jobs. Returns `false` if the thread must end.
    fn serve(&mut self, jobs: Vec<Job>) -> bool {
        let mut keep_running = true;
        let mut batch = Vec::with_capacity(jobs.len());
        for job in jobs {
            match job {
                Job::Request { request, reply } => batch.push(QueuedRequest { request, reply: Some(reply) }),
                Job::ProcessExited(pid) => {
                    batch.push(QueuedRequest { request: Request::ProcessExited(pid), reply: None })
                }
                Job::Checkpoint => self.checkpoint(),
                Job::Stop => keep_running = false,
            }
        }
        for token in self.state.watcher.take_granted() {
            self.state.predecessors.forget(&mut self.state.watcher, token);
        }
        // Skip an acquire whose caller dropped its future. To the caller this is as if the request was never sent.
        batch.retain(|queued| {
            !matches!(&queued.request, Request::Acquire(_)) || !queued.reply.as_ref().is_some_and(|r| r.is_closed())
        });
        if batch.iter().any(|queued| matches!(queued.request, Request::RenewSession(_))) {
            self.state.touch_files_if_due(self.clock.now());
            self.state.are_files_in_place();
        }
        if let Some(path) = &self.state.missing {
            let why = was_deleted(path);
            self.serve_without_files(batch, &why);
            return keep_running;
        }
        if batch.iter().any(|queued| queued.request.is_reading()) {
            batch = self.read(batch);
        }
        if !batch.is_empty() {
            self.write(batch);
        }
        keep_running
    }

    /// Ends the sessions of this handle after a file of the store was deleted or replaced, and answers all requests
    /// accordingly. Other processes do not see the files of this handle any more.
    fn serve_without_files(&mut self, batch: Vec<QueuedRequest>, why: &str) {
        for (session, _) in mem::take(&mut self.state.own) {
            if let Some(sender) = self.shared.senders().remove(&session) {
                sender.send(Push::Warning(why.to_owned()));
            }
            self.state.predecessors.forget_session(&mut self.state.watcher, session);
            self.state.watcher.remove_socket(session);
            self.shared.sessions().remove(&session);
            session::remove_files(&self.state.folder, session);
        }
        let time = StoreTime::from_micros(self.clock.now().as_nanos() / 1_000);
        for queued in batch {
            let outcome = match &queued.request {
                Request::RenewSession(_) => Ok(Answer::RenewSession(RenewOutcome::Gone)),
                Request::SessionLives(_) => Ok(Answer::SessionLives(false)),
                Request::Close(_) => Ok(Answer::Done),
                _ => Err(error(ErrorKind::Unavailable, format!("{why}; open the store again"))),
            };
            answer(queued, outcome.map(|outcome| Reply { time, outcome }));
        }
    }

    /// Answers the reading requests that need no reconciling, and returns the other requests.
    fn read(&mut self, batch: Vec<QueuedRequest>) -> Vec<QueuedRequest> {
        // Use one snapshot for all requests. Without it each statement takes SQLite's locks again, which is slower.
        let begun = self.db.prepare_cached("BEGIN").and_then(|mut statement| statement.execute([]));
        let (mut rest, mut recalls) = (Vec::new(), Vec::new());
        for queued in batch {
            if !queued.request.is_reading() {
                rest.push(queued);
                continue;
            }
            let mut tx = Tx::new(&self.db, &mut self.state);
            tx.set_time(&self.clock);
            let time = tx.time();
            match tx.read(&queued.request) {
                Ok(Some(outcome)) => {
                    // The other pushes of a read are warnings of an expired session. The write that reaps the session
                    // sends them once.
                    let pushes = tx.effects.pushes.into_iter();
                    recalls.extend(pushes.filter(|(_, push)| matches!(push, Push::Recall { .. })));
                    answer(queued, Ok(Reply { time, outcome }));
                }
                Ok(None) => rest.push(queued),
                Err(cause) => answer(queued, Err(cause)),
            }
        }
        // Commit only if this function began the transaction. A transaction that was already open stays open.
        if begun.is_ok() {
            let ended = self.db.prepare_cached("COMMIT").and_then(|mut statement| statement.execute([]));
            if ended.is_err() && !self.db.is_autocommit() {
                let _ = self.db.execute_batch("ROLLBACK"); // the transaction changed nothing
            }
        }
        for (session, push) in recalls {
            self.send(session, push);
        }
        rest
    }

    /// Executes requests in one write transaction.
    fn write(&mut self, batch: Vec<QueuedRequest>) {
        match self.transact(&batch) {
            Ok((answers, effects)) => {
                self.apply_effects(effects);
                for (queued, result) in batch.into_iter().zip(answers) {
                    match &queued.request {
                        Request::ProcessExited(pid) => self.recheck_dependents(*pid),
                        Request::Open(request) if !self.state.own.contains_key(&request.session) => {
                            self.shared.senders().remove(&request.session);
                        }
                        _ => {}
                    }
                    answer(queued, result);
                }
            }
            Err(_) if let Some(path) = &self.state.missing => {
                let why = was_deleted(path);
                self.serve_without_files(batch, &why);
            }
            // Requests can be repeated. Execute each in its own transaction, so that each gets its own answer.
            Err(_) if batch.len() > 1 => batch.into_iter().for_each(|queued| self.write(vec![queued])),
            Err(cause) => {
                if let Some(queued) = batch.into_iter().next() {
                    answer(queued, Err(cause));
                }
            }
        }
    }

    fn transact(&mut self, batch: &[QueuedRequest]) -> Result<(Vec<Result<Reply<Answer>>>, Effects)> {
        let entered = self.gate.enter(&self.state.folder)?;
        if !self.state.are_files_in_place() {
            // The caller finds the missing file, and answers the requests.
            return Err(error(ErrorKind::Unavailable, "a file of the store is missing"));
        }
        let mut tx = Tx::new(&self.db, &mut self.state);
        tx.execute("BEGIN IMMEDIATE", [])?;
        self.shared.write_transactions.fetch_add(1, Ordering::Relaxed);
        let is_sweep = tx.state.sweep_in == 0;
        tx.state.sweep_in = if is_sweep { SWEEP_INTERVAL } else { tx.state.sweep_in - 1 };
        self.checkpoint_in = self.checkpoint_in.saturating_sub(pages(batch.len()));
        let answers = execute(&mut tx, &self.clock, batch, is_sweep).and_then(|answers| {
            tx.execute("COMMIT", []).map_err(|cause| cause.in_doubt(true))?;
            Ok(answers)
        });
        // After any error the transaction must not stay open, because the next COMMIT would commit it.
        let answers = match answers {
            Ok(answers) => answers,
            Err(cause) => {
                roll_back(&self.db, tx);
                return Err(cause);
            }
        };
        let effects = mem::take(&mut tx.effects);
        drop(entered);
        Ok((answers, effects))
    }

    /// Performs the actions that follow a commit.
    fn apply_effects(&mut self, effects: Effects) {
        for (session, own) in effects.opened {
            let sender = self.shared.senders().get(&session).cloned();
            if let (true, Some(sender)) = (self.state.folder.is_cleaned(), &sender) {
                sender.send(Push::Warning(format!(
                    "{} is in a folder in which the system deletes old files, which would lose locks; \
                     use another folder",
                    self.state.folder.database.display()
                )));
            }
            if let Some(socket) = &own.socket {
                self.state.watcher.add_socket(session, socket.clone(), sender);
            }
            self.shared.sessions().insert(session, own.lock.clone());
            self.state.own.insert(session, own);
        }
        for (session, push) in effects.pushes {
            self.send(session, push);
        }
        for session in effects.ended {
            if self.state.own.remove(&session).is_some() {
                self.state.predecessors.forget_session(&mut self.state.watcher, session);
                self.state.watcher.remove_socket(session);
                self.state.ended.insert(session);
            }
            self.shared.sessions().remove(&session);
            self.shared.senders().remove(&session);
            session::remove_files(&self.state.folder, session);
        }
    }

    /// Notifies the waiters that depend on an exited process.
    fn recheck_dependents(&mut self, pid: i32) {
        for (session, token) in self.state.predecessors.process_exited(pid) {
            self.send(session, Push::Recheck { token });
        }
    }

    /// Sends a push to a session of this or another handle.
    fn send(&mut self, session: SessionId, push: Push) {
        if self.state.own.contains_key(&session) {
            if let Push::Granted { token, .. } = &push {
                self.state.predecessors.forget(&mut self.state.watcher, *token);
            }
            if let Some(sender) = self.shared.senders().get(&session) {
                sender.send(push);
            }
        } else if let Some(push_socket) = &self.state.push_socket {
            session::send(&self.state.folder, push_socket, session, &push);
        }
    }

    /// Writes the log back into the database, as far as no reader needs it.
    fn checkpoint(&mut self) {
        self.checkpoint_in = CHECKPOINT_INTERVAL;
        // If it fails, the log grows until the next one.
        let _ = self.db.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
    }

    /// Closes the sessions that are still open and the database, and ignores errors.
    fn close(mut self) {
        let open: Vec<SessionId> = self.state.own.keys().copied().collect();
        if !open.is_empty() {
            self.write(
                open.into_iter()
                    .map(|session| QueuedRequest { request: Request::Close(session), reply: None })
                    .collect(),
            );
        }
        let left: Vec<(SessionId, OwnSession)> = self.state.own.drain().collect();
        for (session, _) in left {
            session::remove_files(&self.state.folder, session);
        }
        // The gate ensures that no process opens the database while its last user closes it.
        let entered = self.gate.enter(&self.state.folder);
        if !self.state.are_files_in_place() {
            // Otherwise SQLite would write its log, which other processes do not have, into a database that they use.
            let _ = self.db.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true);
        }
        drop(self.db);
        drop(entered);
    }
}

/// Executes the requests of a transaction, and a sweep after them if one is due. The outer error concerns the whole
/// transaction.
fn execute(
    tx: &mut Tx<'_>,
    clock: &Clock,
    batch: &[QueuedRequest],
    is_sweep: bool,
) -> Result<Vec<Result<Reply<Answer>>>> {
    let mut answers = Vec::with_capacity(batch.len());
    for QueuedRequest { request, .. } in batch {
        tx.set_time(clock);
        // A single request needs no savepoint, because its transaction fails with it.
        let outcome = if batch.len() == 1 { Ok(tx.run(request)?) } else { in_savepoint(tx, |tx| tx.run(request))? };
        let time = tx.time();
        answers.push(outcome.map(|outcome| Reply { time, outcome }));
    }
    if is_sweep {
        tx.set_time(clock);
        // A failed sweep is undone and retried later. A part of it must not stay: deleting a key without raising the
        // floor would let its fences repeat.
        let _ = in_savepoint(tx, |tx| tx.sweep_keys())?;
    }
    Ok(answers)
}

/// Executes a part of a transaction in a savepoint, and undoes only that part if it fails. The outer error concerns the
/// whole transaction.
fn in_savepoint<T>(tx: &mut Tx<'_>, part: impl FnOnce(&mut Tx<'_>) -> Result<T>) -> Result<Result<T>> {
    let before = (tx.effects.pushes.len(), tx.effects.opened.len(), tx.effects.ended.len());
    tx.execute("SAVEPOINT part", [])?;
    let outcome = part(tx);
    if outcome.is_err() {
        // SQLite may have rolled back the whole transaction, for example because the disk is full.
        if tx.db.is_autocommit() {
            return outcome.map(Ok);
        }
        tx.execute("ROLLBACK TO part", [])?;
        tx.effects.pushes.truncate(before.0);
        tx.effects.ended.truncate(before.2);
        for (session, _) in tx.effects.opened.split_off(before.1) {
            session::remove_files(&tx.state.folder, session);
        }
        (tx.expired, tx.unreconciled, tx.vacated) = (Vec::new(), Vec::new(), Vec::new());
    }
    tx.execute("RELEASE part", [])?;
    Ok(outcome)
}

/// Rolls back a transaction, and removes the session files that it created.
fn roll_back(db: &Connection, tx: Tx<'_>) {
    if !db.is_autocommit() {
        let _ = db.execute_batch("ROLLBACK"); // if this fails, closing the connection rolls back
    }
    for (session, _) in &tx.effects.opened {
        session::remove_files(&tx.state.folder, *session);
    }
}

/// Returns about how many pages a transaction writes: the requests of one transaction share pages.
fn pages(requests: usize) -> usize {
    4 + requests / 2
}

/// Sends the answer to the caller, if one waits for it.
fn answer(queued: QueuedRequest, result: Result<Reply<Answer>>) {
    let result = match queued.request.key() {
        Some(key) => result.map_err(|error| error.with_key(key)),
        None => result,
    };
    if let Some(reply) = queued.reply {
        let _ = reply.send(result); // an error: the caller dropped its future
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use rusqlite::hooks::{AuthAction, AuthContext, Authorization, TransactionOperation};

    use super::*;
    use crate::clock::VirtualClock;
    use crate::key::Key;
    use crate::store::{AcquireOutcome, AcquireRequest, Demand, Lifetime, OpenSession};
    use crate::token::TokenId;

    /// A worker without a thread, with an open session.
    struct TestWorker {
        inner: Engine,
        session: SessionId,
        _temp: tempfile::TempDir,
    }

    impl TestWorker {
        fn new(clock: Clock) -> Self {
            let temp = tempfile::tempdir().unwrap();
            let folder = Folder::prepare(&temp.path().join("locks")).unwrap();
            let (worker, ..) = Worker::open(folder, clock, "boot").unwrap();
            let mut inner = lock(&worker.access.engine).take().unwrap();
            inner.state.sweep_in = SWEEP_INTERVAL;
            let session = SessionId::random().unwrap();
            let mut worker = Self { inner, session, _temp: temp };
            let open = OpenSession { session, ttl: Duration::from_secs(10), owner: "test".into() };
            worker.run([Request::Open(open)])[0].as_ref().unwrap();
            worker
        }

        /// Executes requests as one batch.
        fn run(&mut self, requests: impl IntoIterator<Item = Request>) -> Vec<Result<Answer>> {
            let (mut jobs, mut answers) = (Vec::new(), Vec::new());
            for request in requests {
                let (reply, answer) = oneshot::channel();
                jobs.push(Job::Request { request, reply });
                answers.push(answer);
            }
            assert!(self.inner.serve(jobs));
            answers.iter_mut().map(|answer| answer.try_recv().unwrap().map(|reply| reply.outcome)).collect()
        }

        fn acquire(&self, name: &str, token: TokenId) -> Request {
            Request::Acquire(AcquireRequest {
                key: key(name),
                token,
                session: self.session,
                demand: Demand::MUTEX,
                lifetime: Lifetime::Session { max_hold: None },
                enqueue: false,
                not_after: StoreTime::from_micros(u64::MAX),
                metadata: None,
                trace: None,
            })
        }

        /// Makes SQLite reject the actions for which `picks` returns `true`.
        fn reject(&mut self, mut picks: impl FnMut(&AuthAction<'_>) -> bool + Send + 'static) {
            let hook = move |context: AuthContext<'_>| {
                if picks(&context.action) { Authorization::Deny } else { Authorization::Allow }
            };
            #[allow(clippy::let_unit_value, reason = "older versions of rusqlite return nothing")]
            let _ = self.inner.db.authorizer(Some(hook));
        }

        fn number(&self, sql: &str) -> i64 {
            self.inner.db.query_row(sql, [], |row| row.get(0)).unwrap()
        }
    }

    fn key(name: &str) -> Key {
        Key::new("", name).unwrap()
    }

    fn token() -> TokenId {
        TokenId::random().unwrap()
    }

    #[test]
    fn failed_sweep_keeps_fences() {
        let time = VirtualClock::new();
        let mut worker = TestWorker::new(time.clock());
        let held = token();
        let acquire = worker.acquire("idle", held);
        let end = Request::Release { key: key("idle"), token: held, cooldown: None };
        assert!(worker.run([acquire, end]).iter().all(Result::is_ok));
        let fence = worker.number("SELECT fence FROM keys");
        time.advance(Duration::from_secs(2 * 3600));
        // The sweep has already deleted the key when it updates the floor.
        worker.reject(|action| matches!(action, AuthAction::Update { table_name: "meta", .. }));
        worker.inner.state.sweep_in = 0;
        let acquire = worker.acquire("busy", token());
        worker.run([acquire])[0].as_ref().expect("a failed sweep does not fail the request");
        assert_eq!(worker.number("SELECT count(*) FROM keys"), 2);
        worker.reject(|_| false);
        worker.inner.state.sweep_in = 0;
        let acquire = worker.acquire("other", token());
        worker.run([acquire])[0].as_ref().unwrap();
        assert_eq!(worker.number("SELECT count(*) FROM keys"), 2, "the sweep deleted the idle key");
        assert!(worker.number("SELECT fence_floor FROM meta") >= fence);
    }

    #[test]
    fn failed_batch_is_repeated() {
        for rejected in [TransactionOperation::Begin, TransactionOperation::Release] {
            let mut worker = TestWorker::new(Clock::system());
            worker.reject(
                move |action| matches!(action, AuthAction::Savepoint { operation, .. } if *operation == rejected),
            );
            let requests = [worker.acquire("a", token()), worker.acquire("b", token())];
            for answer in worker.run(requests) {
                assert!(matches!(answer, Ok(Answer::Acquire(AcquireOutcome::Granted(_)))), "{rejected:?}: {answer:?}");
            }
            assert!(worker.inner.db.is_autocommit(), "no transaction is left open");
        }
    }

    #[test]
    fn each_statement_is_prepared_once() {
        let mut worker = TestWorker::new(Clock::system());
        // SQLite calls the hook whenever it parses a statement. Setting the hook makes it parse all statements again.
        let is_parsed = Arc::new(AtomicBool::new(false));
        let seen = is_parsed.clone();
        worker.reject(move |_| {
            seen.store(true, Ordering::Relaxed);
            false
        });
        for name in ["a", "b", "c"] {
            is_parsed.store(false, Ordering::Relaxed);
            let held = token();
            let list = || Request::List { prefix: String::new(), cursor: None, limit: 100 };
            let poll = Request::Poll { key: key(name), tokens: vec![held] };
            let end = Request::Release { key: key(name), token: held, cooldown: None };
            for request in [worker.acquire(name, held), list(), poll, Request::Inspect(key(name)), end, list()] {
                worker.run([request])[0].as_ref().unwrap();
            }
        }
        assert!(!is_parsed.load(Ordering::Relaxed));
    }

    #[test]
    fn reading_commits_no_open_transaction() {
        let mut worker = TestWorker::new(Clock::system());
        worker.inner.db.execute_batch("BEGIN; UPDATE meta SET fence_floor = 7").unwrap();
        worker.run([Request::Inspect(key("a"))])[0].as_ref().unwrap();
        assert!(!worker.inner.db.is_autocommit());
        worker.inner.db.execute_batch("ROLLBACK").unwrap();
        assert_eq!(worker.number("SELECT fence_floor FROM meta"), 0);
    }
}
