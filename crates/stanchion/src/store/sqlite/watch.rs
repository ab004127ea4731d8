//! Runs the watcher thread, which receives pushes from the sessions' sockets and reports the exit of watched processes.
//!
//! # Invariants
//! 1. The thread starts with the first socket or process to watch, and ends when its [`Watcher`] is dropped.
//! 2. Every change of the watched sockets and processes wakes the thread, so that it never sleeps on an old list.
//! 3. The thread reports each watched process once.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::codec;
use super::error::error;
use super::worker::Job;
use crate::error::{ErrorKind, Result};
use crate::store::{Push, PushSender};
use crate::sync::lock;
use crate::token::{SessionId, TokenId};

/// The handle of the watcher thread.
#[derive(Debug)]
pub(super) struct Watcher {
    shared: Arc<WatchList>,
    jobs: Sender<Job>,
    is_running: bool,
}

/// The data that the thread shares with its handle.
#[derive(Debug)]
struct WatchList {
    watched: Mutex<Watched>,
    /// Sends a datagram to `woken`, which ends the thread's sleep.
    waker: UnixDatagram,
    woken: UnixDatagram,
}

/// The watched sockets and processes.
#[derive(Debug, Default)]
struct Watched {
    sockets: HashMap<SessionId, (Arc<UnixDatagram>, Option<PushSender>)>,
    processes: HashMap<i32, Arc<OwnedFd>>,
    /// Tokens whose grant arrived at a socket, so that they no longer wait.
    granted: Vec<TokenId>,
    stop: bool,
}

impl Watcher {
    /// Creates a watcher that reports the exit of processes to `jobs`.
    pub(super) fn new(jobs: Sender<Job>) -> Result<Self> {
        let pair = UnixDatagram::pair().and_then(|(waker, woken)| {
            waker.set_nonblocking(true)?;
            woken.set_nonblocking(true)?;
            Ok((waker, woken))
        });
        let (waker, woken) = pair.map_err(|cause| {
            error(ErrorKind::Unavailable, "the system has no file descriptor left for the store's thread")
                .with_source(cause)
        })?;
        let shared = Arc::new(WatchList { watched: Mutex::default(), waker, woken });
        Ok(Self { shared, jobs, is_running: false })
    }

    /// Forwards the pushes that arrive at the socket of a session.
    pub(super) fn add_socket(&mut self, session: SessionId, socket: Arc<UnixDatagram>, sender: Option<PushSender>) {
        self.lock().sockets.insert(session, (socket, sender));
        self.changed();
    }

    /// Stops forwarding the pushes of a session.
    pub(super) fn remove_socket(&mut self, session: SessionId) {
        if self.lock().sockets.remove(&session).is_some() {
            self.changed();
        }
    }

    /// Watches a process, to report its exit.
    pub(super) fn add_process(&mut self, pid: i32, descriptor: OwnedFd) {
        self.lock().processes.insert(pid, Arc::new(descriptor));
        self.changed();
    }

    /// Stops watching a process.
    pub(super) fn remove_process(&mut self, pid: i32) {
        if self.lock().processes.remove(&pid).is_some() {
            self.changed();
        }
    }

    /// Returns the tokens whose grant arrived at a socket since the last call.
    pub(super) fn take_granted(&self) -> Vec<TokenId> {
        std::mem::take(&mut self.lock().granted)
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        lock(&self.shared.watched)
    }

    /// Starts the thread, or wakes it after a change.
    fn changed(&mut self) {
        if self.is_running {
            wake(&self.shared);
            return;
        }
        let (shared, jobs) = (self.shared.clone(), self.jobs.clone());
        let thread = thread::Builder::new().name("stanchion-sqlite-watch".into()).spawn(move || watch(&shared, &jobs));
        // If the thread cannot start, waiters poll, and the next change tries again.
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

fn wake(shared: &WatchList) {
    let _ = shared.waker.send(&[1]); // an error: the buffer is full, so the thread has a wake-up to receive
}

enum Source {
    Socket(SessionId, Arc<UnixDatagram>),
    Process(i32, Arc<OwnedFd>),
}

/// Runs the thread.
fn watch(shared: &WatchList, jobs: &Sender<Job>) {
    let mut buffer = vec![0; codec::MAX_DATAGRAM + 1];
    loop {
        let sources: Vec<Source> = {
            let watched = lock(&shared.watched);
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

/// Serves these sources until the list of sources changes. Returns `false` if the thread must end.
fn watch_until_change(shared: &WatchList, jobs: &Sender<Job>, sources: Vec<Source>, buffer: &mut [u8]) -> bool {
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
                    if lock(&shared.watched).processes.remove(pid).is_some()
                        && jobs.send(Job::ProcessExited(*pid)).is_err()
                    {
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

/// Forwards all pushes that have arrived at the socket of a session.
fn receive(shared: &WatchList, session: SessionId, socket: &UnixDatagram, buffer: &mut [u8]) {
    // A datagram that fills the whole buffer was truncated. No push is that long, so it does not decode.
    while let Ok(length) = socket.recv(buffer) {
        let Some(push) = codec::decode(&buffer[..length]) else { continue };
        let mut watched = lock(&shared.watched);
        if let Push::Granted { token, .. } = &push {
            watched.granted.push(*token);
        }
        if let Some((_, Some(sender))) = watched.sockets.get(&session) {
            sender.send(push);
        }
    }
}
