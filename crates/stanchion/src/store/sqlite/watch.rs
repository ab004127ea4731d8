//! The watching thread: takes pushes from the sessions' sockets, and notices the end of watched processes.
//!
//! # Invariants
//! 1. The thread is started with the first thing to watch and ends when its [`Watcher`] is dropped.
//! 2. Every change of what is watched is followed by a wake-up: the thread never sleeps on an old list.
//! 3. A watched process is reported once.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::error::error;
use super::message;
use super::worker::Job;
use crate::error::{ErrorKind, Result};
use crate::store::{Push, PushSender};
use crate::token::{SessionId, TokenId};

/// The handle of the thread.
#[derive(Debug)]
pub(super) struct Watcher {
    shared: Arc<Shared>,
    jobs: Sender<Job>,
    is_running: bool,
}

#[derive(Debug)]
struct Shared {
    watched: Mutex<Watched>,
    /// A datagram to `woken` ends the thread's sleep.
    waker: UnixDatagram,
    woken: UnixDatagram,
}

#[derive(Debug, Default)]
struct Watched {
    sockets: HashMap<SessionId, (Arc<UnixDatagram>, Option<PushSender>)>,
    processes: HashMap<i32, Arc<OwnedFd>>,
    /// Tokens whose grant arrived by a socket: their waiting is over.
    granted: Vec<TokenId>,
    stop: bool,
}

impl Watcher {
    /// A watcher that reports the end of processes to `jobs`.
    pub(super) fn new(jobs: Sender<Job>) -> Result<Self> {
        let pair = UnixDatagram::pair().and_then(|(waker, woken)| {
            waker.set_nonblocking(true)?;
            woken.set_nonblocking(true)?;
            Ok((waker, woken))
        });
        let (waker, woken) = pair.map_err(|cause| {
            error(ErrorKind::Unavailable, "the system has no descriptor for the store's thread").with_source(cause)
        })?;
        let shared = Arc::new(Shared { watched: Mutex::default(), waker, woken });
        Ok(Self { shared, jobs, is_running: false })
    }

    /// Passes on what arrives at the socket of a session.
    pub(super) fn add_socket(&mut self, session: SessionId, socket: Arc<UnixDatagram>, sender: Option<PushSender>) {
        self.lock().sockets.insert(session, (socket, sender));
        self.changed();
    }

    /// Closes the socket of a session.
    pub(super) fn remove_socket(&mut self, session: SessionId) {
        if self.lock().sockets.remove(&session).is_some() {
            self.changed();
        }
    }

    /// Reports the end of a process.
    pub(super) fn add_process(&mut self, pid: i32, descriptor: OwnedFd) {
        self.lock().processes.insert(pid, Arc::new(descriptor));
        self.changed();
    }

    /// Reports it no more.
    pub(super) fn remove_process(&mut self, pid: i32) {
        if self.lock().processes.remove(&pid).is_some() {
            self.changed();
        }
    }

    /// Tokens whose grant has arrived by a socket since this was asked.
    pub(super) fn take_granted(&self) -> Vec<TokenId> {
        std::mem::take(&mut self.lock().granted)
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        lock(&self.shared)
    }

    fn changed(&mut self) {
        if self.is_running {
            wake(&self.shared);
            return;
        }
        let (shared, jobs) = (self.shared.clone(), self.jobs.clone());
        let thread = thread::Builder::new().name("stanchion-sqlite-watch".into()).spawn(move || watch(&shared, &jobs));
        // Without the thread nothing is pushed: waiters live by polling, and the next change tries again.
        self.is_running = thread.is_ok();
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        {
            let mut watched = self.lock();
            *watched = Watched { stop: true, ..Watched::default() };
        }
        wake(&self.shared);
    }
}

fn lock(shared: &Shared) -> MutexGuard<'_, Watched> {
    shared.watched.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wake(shared: &Shared) {
    // A full buffer means that a wake-up is under way.
    let _under_way = shared.waker.send(&[1]);
}

enum Source {
    Socket(SessionId, Arc<UnixDatagram>),
    Process(i32, Arc<OwnedFd>),
}

fn watch(shared: &Shared, jobs: &Sender<Job>) {
    let mut buffer = vec![0; message::LONGEST + 1];
    loop {
        let sources: Vec<Source> = {
            let watched = lock(shared);
            if watched.stop {
                return;
            }
            let sockets = watched.sockets.iter().map(|(session, (socket, _))| Source::Socket(*session, socket.clone()));
            let processes = watched.processes.iter().map(|(pid, descriptor)| Source::Process(*pid, descriptor.clone()));
            sockets.chain(processes).collect()
        };
        if !watch_until_change(shared, jobs, sources, &mut buffer) {
            return;
        }
    }
}

/// Serves these sources until the list has changed. `false` if the thread is to end.
fn watch_until_change(shared: &Shared, jobs: &Sender<Job>, sources: Vec<Source>, buffer: &mut [u8]) -> bool {
    let mut descriptors = Vec::with_capacity(sources.len() + 1);
    descriptors.push(PollFd::new(&shared.woken, PollFlags::IN));
    descriptors.extend(sources.iter().map(|source| match source {
        Source::Socket(_, socket) => PollFd::new(socket, PollFlags::IN),
        Source::Process(_, descriptor) => PollFd::new(descriptor, PollFlags::IN),
    }));
    loop {
        match poll(&mut descriptors, None) {
            Ok(_) => {}
            Err(Errno::INTR | Errno::AGAIN | Errno::NOMEM) => continue,
            Err(_) => return false,
        }
        let mut is_changed = false;
        for (descriptor, source) in descriptors[1..].iter().zip(&sources) {
            if descriptor.revents().is_empty() {
                continue;
            }
            match source {
                Source::Socket(session, socket) => receive(shared, *session, socket, buffer),
                Source::Process(pid, _) => {
                    is_changed = true;
                    if lock(shared).processes.remove(pid).is_some() && jobs.send(Job::Died(*pid)).is_err() {
                        return false;
                    }
                }
            }
        }
        if !descriptors[0].revents().is_empty() {
            let mut bytes = [0; 8];
            while shared.woken.recv(&mut bytes).is_ok() {}
            is_changed = true;
        }
        if is_changed {
            return true;
        }
    }
}

fn receive(shared: &Shared, session: SessionId, socket: &UnixDatagram, buffer: &mut [u8]) {
    // What fills the whole buffer is longer than any push, and was cut.
    while let Ok(length) = socket.recv(buffer) {
        let Some(push) = message::decode(&buffer[..length]) else { continue };
        let mut watched = lock(shared);
        if let Push::Granted { token, .. } = &push {
            watched.granted.push(*token);
        }
        if let Some((_, Some(sender))) = watched.sockets.get(&session) {
            sender.send(push);
        }
    }
}
