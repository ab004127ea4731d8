//! The database thread: takes steps from a queue, and carries out what has gathered there in one transaction.
//!
//! # Invariants
//! 1. One thread has the connection. It waits for a step, for the gate and for the disk, and for nothing else.
//! 2. A step is answered, and its pushes are sent, only after its transaction is committed.
//! 3. A step that fails takes nothing back of the others in its transaction.
//! 4. However the thread ends, every step that waits gets an answer: its reply channel closes.

use std::collections::{HashMap, HashSet};
use std::mem;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::Connection;
use rusqlite::config::DbConfig;
use tokio::sync::oneshot;

use super::connect::{Gate, connect};
use super::error::error;
use super::folder::{Folder, was_deleted};
use super::predecessors::Predecessors;
use super::session::{self, OwnSession};
use super::steps::{Answer, Operation};
use super::tx::{Effects, Local, Tx};
use super::watch::Watcher;
use crate::clock::{BootTime, Clock, jitter_seed};
use crate::error::{ErrorKind, Result};
use crate::store::{Push, PushSender, RenewOutcome, Reply, StoreTime};
use crate::token::SessionId;

/// The most steps in one transaction.
const BATCH: usize = 64;
/// Write transactions from one sweep to the next.
const SWEEP_EVERY: u32 = 64;

/// What the thread is told.
#[derive(Debug)]
pub(super) enum Job {
    /// A step and where its answer goes.
    Operation { step: Operation, reply: oneshot::Sender<Result<Reply<Answer>>> },
    /// A watched process has ended.
    Died(i32),
    /// The store is dropped: finish what is queued, and end.
    Stop,
}

/// What the thread shares with the handle.
#[derive(Debug, Default)]
pub(super) struct Shared {
    senders: Mutex<HashMap<SessionId, PushSender>>,
    sessions: Mutex<HashMap<SessionId, Arc<std::os::fd::OwnedFd>>>,
    pub(super) write_transactions: AtomicU64,
}

impl Shared {
    pub(super) fn senders(&self) -> MutexGuard<'_, HashMap<SessionId, PushSender>> {
        self.senders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The locked files of the open sessions.
    pub(super) fn sessions(&self) -> MutexGuard<'_, HashMap<SessionId, Arc<std::os::fd::OwnedFd>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread's own.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) db: Connection,
    pub(super) gate: Gate,
    pub(super) local: Local,
    pub(super) clock: Clock,
    pub(super) queue: Receiver<Job>,
    pub(super) shared: Arc<Shared>,
}

/// How the thread waits for the next step: a caller that asks again as soon as it has its answer is awaited awake,
/// because to fall asleep and be woken takes longer than the step. Without such a caller the thread sleeps at once.
#[derive(Debug)]
struct Patience {
    clock: Clock,
    /// Waits to come in which it does not stay awake.
    asleep: u32,
}

impl Patience {
    /// The longest that it stays awake for one step.
    const AWAKE: Duration = Duration::from_micros(50);
    /// A step that comes sooner than this after a sleep might have been awaited awake.
    const SOON: Duration = Duration::from_micros(150);
    /// How many waits it sleeps through after it was awake in vain.
    const SLEEPS: u32 = 32;

    fn new() -> Self {
        let alone = std::thread::available_parallelism().map_or(1, usize::from) == 1;
        // The machine's own clock, also where the store's is virtual: that one stands still.
        Self { clock: Clock::system(), asleep: if alone { u32::MAX } else { Self::SLEEPS } }
    }

    /// The next job; `None` when nobody can send one any more.
    fn next(&mut self, queue: &Receiver<Job>) -> Option<Job> {
        let start = self.clock.now();
        if self.asleep == 0 {
            while self.clock.now().since(start) < Self::AWAKE {
                match queue.try_recv() {
                    Ok(job) => return Some(job),
                    Err(TryRecvError::Disconnected) => return None,
                    Err(TryRecvError::Empty) => std::hint::spin_loop(),
                }
            }
            self.asleep = Self::SLEEPS;
        }
        let job = queue.recv().ok();
        if self.asleep < u32::MAX && self.clock.now().since(start) < Self::SOON {
            self.asleep = self.asleep.saturating_sub(1);
        }
        job
    }
}

struct Asked {
    step: Operation,
    reply: Option<oneshot::Sender<Result<Reply<Answer>>>>,
}

impl Worker {
    /// Opens the store in this folder, for a thread that is still to be started, and tells where that takes its jobs from.
    pub(super) fn open(folder: Folder, clock: Clock, boot_id: &str) -> Result<(Self, Sender<Job>)> {
        let connected = connect(&folder, &clock, boot_id)?;
        let (jobs, queue) = mpsc::channel();
        let local = Local {
            folder,
            files: connected.files,
            missing: None,
            touch_at: BootTime::from_nanos(0),
            own: HashMap::new(),
            ended: HashSet::new(),
            predecessors: Predecessors::new(),
            watcher: Watcher::new(jobs.clone())?,
            outlet: session::sending_socket(),
            // Short-lived handles sweep too, now and then.
            sweep_in: u32::try_from(jitter_seed() % 64).unwrap_or(0),
        };
        Ok((Self { db: connected.db, gate: connected.gate, local, clock, queue, shared: Arc::default() }, jobs))
    }

    /// Serves until it is told to stop.
    pub(super) fn run(mut self) {
        let mut patience = Patience::new();
        while let Some(first) = patience.next(&self.queue) {
            let mut batch = vec![first];
            while batch.len() < BATCH {
                match self.queue.try_recv() {
                    Ok(job) => batch.push(job),
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
                }
            }
            if !self.serve(batch) {
                break;
            }
        }
        self.close();
    }

    /// Carries out a batch. `false` if the thread is to end.
    fn serve(&mut self, batch: Vec<Job>) -> bool {
        let mut go_on = true;
        let mut asked = Vec::with_capacity(batch.len());
        for job in batch {
            match job {
                Job::Operation { step, reply } => asked.push(Asked { step, reply: Some(reply) }),
                Job::Died(pid) => asked.push(Asked { step: Operation::Died(pid), reply: None }),
                Job::Stop => go_on = false,
            }
        }
        for token in self.local.watcher.take_granted() {
            self.local.predecessors.forget(&mut self.local.watcher, token);
        }
        // Nobody waits for the answer: not having asked is as good.
        asked.retain(|asked| {
            !matches!(&asked.step, Operation::Acquire(_)) || !asked.reply.as_ref().is_some_and(|r| r.is_closed())
        });
        if asked.iter().any(|asked| matches!(asked.step, Operation::RenewSession(_))) {
            self.local.look_used(self.clock.now());
            self.local.are_files_in_place();
        }
        if let Some(path) = &self.local.missing {
            let why = was_deleted(path);
            self.serve_without_files(asked, &why);
            return go_on;
        }
        if asked.iter().any(|asked| asked.step.is_reading()) {
            asked = self.read(asked);
        }
        if !asked.is_empty() {
            self.write(asked);
        }
        go_on
    }

    /// Ends the sessions of this handle, because what is in its files counts for nobody any more, and answers accordingly.
    fn serve_without_files(&mut self, asked: Vec<Asked>, why: &str) {
        for (session, _) in mem::take(&mut self.local.own) {
            if let Some(sender) = self.shared.senders().remove(&session) {
                sender.send(Push::Warning(why.to_owned()));
            }
            self.local.predecessors.forget_session(&mut self.local.watcher, session);
            self.local.watcher.remove_socket(session);
            self.shared.sessions().remove(&session);
            session::remove_files(&self.local.folder, session);
        }
        let time = StoreTime::from_micros(self.clock.now().as_nanos() / 1_000);
        for asked in asked {
            let outcome = match &asked.step {
                Operation::RenewSession(_) => Ok(Answer::Renewed(RenewOutcome::Gone)),
                Operation::Lives(_) => Ok(Answer::Lives(false)),
                Operation::Close(_) => Ok(Answer::Done),
                _ => Err(error(ErrorKind::Unavailable, format!("{why}; open the store again"))),
            };
            answer(asked, outcome.map(|outcome| Reply { time, outcome }));
        }
    }

    /// Answers the reading steps that have nothing to settle; gives the others back.
    fn read(&mut self, asked: Vec<Asked>) -> Vec<Asked> {
        // One snapshot for all: without it each statement takes SQLite's locks anew. It is as right, but slower.
        let begun = self.db.prepare_cached("BEGIN").and_then(|mut statement| statement.execute([]));
        let mut rest = Vec::new();
        for asked in asked {
            if !asked.step.is_reading() {
                rest.push(asked);
                continue;
            }
            let mut tx = Tx::new(&self.db, &mut self.local);
            tx.set_time(&self.clock);
            let time = tx.time();
            match tx.read(&asked.step) {
                Ok(Some(outcome)) => answer(asked, Ok(Reply { time, outcome })),
                Ok(None) => rest.push(asked),
                Err(cause) => answer(asked, Err(cause)),
            }
        }
        // What another has begun is not for this to commit.
        if begun.is_ok() {
            let ended = self.db.prepare_cached("COMMIT").and_then(|mut statement| statement.execute([]));
            if ended.is_err() && !self.db.is_autocommit() {
                let _nothing_was_changed = self.db.execute_batch("ROLLBACK");
            }
        }
        rest
    }

    /// Carries out steps in one write transaction.
    fn write(&mut self, asked: Vec<Asked>) {
        match self.transact(&asked) {
            Ok((answers, effects)) => {
                self.follow_up(effects);
                for (asked, result) in asked.into_iter().zip(answers) {
                    match &asked.step {
                        Operation::Died(pid) => self.recheck_dependents(*pid),
                        Operation::Open(request) if !self.local.own.contains_key(&request.session) => {
                            self.shared.senders().remove(&request.session);
                        }
                        _ => {}
                    }
                    answer(asked, result);
                }
            }
            Err(_) if let Some(path) = &self.local.missing => {
                let why = was_deleted(path);
                self.serve_without_files(asked, &why);
            }
            // Steps can be repeated: each by itself, so that each has its own answer.
            Err(_) if asked.len() > 1 => asked.into_iter().for_each(|asked| self.write(vec![asked])),
            Err(cause) => {
                if let Some(asked) = asked.into_iter().next() {
                    answer(asked, Err(cause));
                }
            }
        }
    }

    fn transact(&mut self, asked: &[Asked]) -> Result<(Vec<Result<Reply<Answer>>>, Effects)> {
        let entered = self.gate.enter(&self.local.folder)?;
        if !self.local.are_files_in_place() {
            // The caller sees that, and answers.
            return Err(error(ErrorKind::Unavailable, "a file of the store is missing"));
        }
        let mut tx = Tx::new(&self.db, &mut self.local);
        tx.execute("BEGIN IMMEDIATE", [])?;
        self.shared.write_transactions.fetch_add(1, Ordering::Relaxed);
        let is_sweep = tx.local.sweep_in == 0;
        tx.local.sweep_in = if is_sweep { SWEEP_EVERY } else { tx.local.sweep_in - 1 };
        let answers = carry_out(&mut tx, &self.clock, asked, is_sweep).and_then(|answers| {
            tx.execute("COMMIT", []).map_err(|cause| cause.in_doubt(true))?;
            Ok(answers)
        });
        // Whatever failed: no transaction may stay open, or the next COMMIT would commit it.
        let answers = match answers {
            Ok(answers) => answers,
            Err(cause) => {
                undo(&self.db, tx);
                return Err(cause);
            }
        };
        let effects = mem::take(&mut tx.effects);
        drop(entered);
        Ok((answers, effects))
    }

    /// What follows from committed steps.
    fn follow_up(&mut self, effects: Effects) {
        for (session, own) in effects.opened {
            let sender = self.shared.senders().get(&session).cloned();
            if let (true, Some(sender)) = (self.local.folder.is_cleaned(), &sender) {
                sender.send(Push::Warning(format!(
                    "{} is in a folder in which the system deletes old files, and locks with them; use another folder",
                    self.local.folder.database.display()
                )));
            }
            if let Some(socket) = &own.socket {
                self.local.watcher.add_socket(session, socket.clone(), sender);
            }
            self.shared.sessions().insert(session, own.lock.clone());
            self.local.own.insert(session, own);
        }
        for (session, push) in effects.pushes {
            self.send(session, push);
        }
        for session in effects.ended {
            if self.local.own.remove(&session).is_some() {
                self.local.predecessors.forget_session(&mut self.local.watcher, session);
                self.local.watcher.remove_socket(session);
                self.local.ended.insert(session);
            }
            self.shared.sessions().remove(&session);
            self.shared.senders().remove(&session);
            session::remove_files(&self.local.folder, session);
        }
    }

    fn recheck_dependents(&mut self, pid: i32) {
        for (session, token) in self.local.predecessors.died(pid) {
            self.send(session, Push::Recheck { token });
        }
    }

    fn send(&mut self, session: SessionId, push: Push) {
        if self.local.own.contains_key(&session) {
            if let Push::Granted { token, .. } = &push {
                self.local.predecessors.forget(&mut self.local.watcher, *token);
            }
            if let Some(sender) = self.shared.senders().get(&session) {
                sender.send(push);
            }
        } else if let Some(outlet) = &self.local.outlet {
            session::send(&self.local.folder, outlet, session, &push);
        }
    }

    /// Ends the sessions that are still open, as well as that can be.
    fn close(mut self) {
        let open: Vec<SessionId> = self.local.own.keys().copied().collect();
        if !open.is_empty() {
            self.write(
                open.into_iter().map(|session| Asked { step: Operation::Close(session), reply: None }).collect(),
            );
        }
        let left: Vec<(SessionId, OwnSession)> = self.local.own.drain().collect();
        for (session, _) in left {
            session::remove_files(&self.local.folder, session);
        }
        // Under the gate: nobody opens the database while its last user closes it.
        let entered = self.gate.enter(&self.local.folder);
        if !self.local.are_files_in_place() {
            // SQLite would write its log, which others do not have, into a database that others use.
            let _ = self.db.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true);
        }
        drop(self.db);
        drop(entered);
    }
}

/// Carries out the steps of a transaction, and a sweep after them where one is due. An error is one of them all.
fn carry_out(tx: &mut Tx<'_>, clock: &Clock, asked: &[Asked], is_sweep: bool) -> Result<Vec<Result<Reply<Answer>>>> {
    let mut answers = Vec::with_capacity(asked.len());
    for Asked { step, .. } in asked {
        tx.set_time(clock);
        // One that is alone fails with its transaction.
        let outcome = if asked.len() == 1 { Ok(tx.run(step)?) } else { apart(tx, |tx| tx.run(step))? };
        let time = tx.time();
        answers.push(outcome.map(|outcome| Reply { time, outcome }));
    }
    if is_sweep {
        tx.set_time(clock);
        // It can wait. But none of it may stay: a key that is dropped before the floor is raised would repeat its fences.
        let _can_wait = apart(tx, |tx| tx.sweep_keys())?;
    }
    Ok(answers)
}

/// Does a part of a transaction that is taken back by itself if it fails. The outer error is one of the whole transaction.
fn apart<T>(tx: &mut Tx<'_>, part: impl FnOnce(&mut Tx<'_>) -> Result<T>) -> Result<Result<T>> {
    let before = (tx.effects.pushes.len(), tx.effects.opened.len(), tx.effects.ended.len());
    tx.execute("SAVEPOINT part", [])?;
    let outcome = part(tx);
    if outcome.is_err() {
        // SQLite may have ended the whole transaction, as it does when the disk is full.
        if tx.db.is_autocommit() {
            return outcome.map(Ok);
        }
        tx.execute("ROLLBACK TO part", [])?;
        tx.effects.pushes.truncate(before.0);
        tx.effects.ended.truncate(before.2);
        for (session, _) in tx.effects.opened.split_off(before.1) {
            session::remove_files(&tx.local.folder, session);
        }
        (tx.dead, tx.unsettled, tx.left) = (Vec::new(), Vec::new(), Vec::new());
    }
    tx.execute("RELEASE part", [])?;
    Ok(outcome)
}

/// Takes a transaction back, with the files that it has made.
fn undo(db: &Connection, tx: Tx<'_>) {
    if !db.is_autocommit() {
        let _gone_with_the_connection = db.execute_batch("ROLLBACK");
    }
    for (session, _) in &tx.effects.opened {
        session::remove_files(&tx.local.folder, *session);
    }
}

fn answer(asked: Asked, result: Result<Reply<Answer>>) {
    let result = match asked.step.key() {
        Some(key) => result.map_err(|error| error.with_key(key)),
        None => result,
    };
    if let Some(reply) = asked.reply {
        let _nobody_waits = reply.send(result);
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

    /// A worker without its thread, with a session.
    struct Desk {
        worker: Worker,
        session: SessionId,
        _temp: tempfile::TempDir,
    }

    impl Desk {
        fn new(clock: Clock) -> Self {
            let temp = tempfile::tempdir().unwrap();
            let folder = Folder::prepare(&temp.path().join("locks")).unwrap();
            let (mut worker, _jobs) = Worker::open(folder, clock, "boot").unwrap();
            worker.local.sweep_in = SWEEP_EVERY;
            let session = SessionId::random().unwrap();
            let mut desk = Self { worker, session, _temp: temp };
            let open = OpenSession { session, ttl: Duration::from_secs(10), owner: "test".into() };
            desk.ask([Operation::Open(open)])[0].as_ref().unwrap();
            desk
        }

        /// Has steps carried out as one batch.
        fn ask(&mut self, steps: impl IntoIterator<Item = Operation>) -> Vec<Result<Answer>> {
            let (mut jobs, mut answers) = (Vec::new(), Vec::new());
            for step in steps {
                let (reply, answer) = oneshot::channel();
                jobs.push(Job::Operation { step, reply });
                answers.push(answer);
            }
            assert!(self.worker.serve(jobs));
            answers.iter_mut().map(|answer| answer.try_recv().unwrap().map(|reply| reply.outcome)).collect()
        }

        fn acquire(&self, name: &str, token: TokenId) -> Operation {
            Operation::Acquire(AcquireRequest {
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

        /// SQLite refuses from now on what this picks.
        fn refuse(&mut self, mut picks: impl FnMut(&AuthAction<'_>) -> bool + Send + 'static) {
            let hook = move |context: AuthContext<'_>| {
                if picks(&context.action) { Authorization::Deny } else { Authorization::Allow }
            };
            self.worker.db.authorizer(Some(hook)).unwrap();
        }

        fn number(&self, sql: &str) -> i64 {
            self.worker.db.query_row(sql, [], |row| row.get(0)).unwrap()
        }
    }

    fn key(name: &str) -> Key {
        Key::new("", name).unwrap()
    }

    fn token() -> TokenId {
        TokenId::random().unwrap()
    }

    #[test]
    fn a_sweep_that_fails_forgets_no_key_without_its_fence() {
        let time = VirtualClock::new();
        let mut desk = Desk::new(time.clock());
        let held = token();
        let acquire = desk.acquire("idle", held);
        let end = Operation::End { key: key("idle"), token: held, cooldown: None };
        assert!(desk.ask([acquire, end]).iter().all(Result::is_ok));
        let fence = desk.number("SELECT fence FROM keys");
        time.advance(Duration::from_secs(2 * 3600));
        // It has dropped the key when it is to raise the floor.
        desk.refuse(|action| matches!(action, AuthAction::Update { table_name: "meta", .. }));
        desk.worker.local.sweep_in = 0;
        let acquire = desk.acquire("busy", token());
        desk.ask([acquire])[0].as_ref().expect("the step has nothing to do with it");
        assert_eq!(desk.number("SELECT count(*) FROM keys"), 2);
        desk.refuse(|_| false);
        desk.worker.local.sweep_in = 0;
        let acquire = desk.acquire("other", token());
        desk.ask([acquire])[0].as_ref().unwrap();
        assert_eq!(desk.number("SELECT count(*) FROM keys"), 2, "the idle one went");
        assert!(desk.number("SELECT fence_floor FROM meta") >= fence);
    }

    #[test]
    fn a_batch_that_fails_between_its_steps_is_undone_and_repeated() {
        for refused in [TransactionOperation::Begin, TransactionOperation::Release] {
            let mut desk = Desk::new(Clock::system());
            desk.refuse(
                move |action| matches!(action, AuthAction::Savepoint { operation, .. } if *operation == refused),
            );
            let steps = [desk.acquire("a", token()), desk.acquire("b", token())];
            for answer in desk.ask(steps) {
                assert!(matches!(answer, Ok(Answer::Acquire(AcquireOutcome::Granted(_)))), "{refused:?}: {answer:?}");
            }
            assert!(desk.worker.db.is_autocommit(), "no transaction is left open");
        }
    }

    #[test]
    fn each_statement_is_prepared_once() {
        let mut desk = Desk::new(Clock::system());
        // SQLite asks whenever it parses a statement. To set the hook has it parse all of them again.
        let is_parsed = Arc::new(AtomicBool::new(false));
        let seen = is_parsed.clone();
        desk.refuse(move |_| {
            seen.store(true, Ordering::Relaxed);
            false
        });
        for name in ["a", "b", "c"] {
            is_parsed.store(false, Ordering::Relaxed);
            let held = token();
            let list = || Operation::List { prefix: String::new(), cursor: None, limit: 100 };
            let poll = Operation::Poll { key: key(name), tokens: vec![held] };
            let end = Operation::End { key: key(name), token: held, cooldown: None };
            for step in [desk.acquire(name, held), list(), poll, Operation::Inspect(key(name)), end, list()] {
                desk.ask([step])[0].as_ref().unwrap();
            }
        }
        assert!(!is_parsed.load(Ordering::Relaxed));
    }

    #[test]
    fn looking_commits_nothing_that_was_left_open() {
        let mut desk = Desk::new(Clock::system());
        desk.worker.db.execute_batch("BEGIN; UPDATE meta SET fence_floor = 7").unwrap();
        desk.ask([Operation::Inspect(key("a"))])[0].as_ref().unwrap();
        assert!(!desk.worker.db.is_autocommit());
        desk.worker.db.execute_batch("ROLLBACK").unwrap();
        assert_eq!(desk.number("SELECT fence_floor FROM meta"), 0);
    }
}
