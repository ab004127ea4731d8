//! Watches the processes on which waiters depend: the process before the waiter in the queue or, for the head, the
//! processes of the holders.
//!
//! When a watched process exits, its dependent waiters poll again. This makes a queue of processes a chain: one
//! neighbour notices each exit, and a hand-off needs no new watch, because the waiter behind the granted one already
//! watches that process.

use std::collections::{HashMap, HashSet};

use super::watch::Watcher;
use crate::token::{SessionId, TokenId};

/// A process that has a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Process {
    /// The process id, which is valid only in its PID namespace.
    pub(super) pid: i32,
    /// The PID namespace.
    pub(super) namespace: String,
}

impl Process {
    /// Returns this process.
    pub(super) fn own() -> Self {
        let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        let pid = i32::try_from(std::process::id()).unwrap_or(0);
        Self { pid, namespace: namespace.to_string_lossy().into_owned() }
    }
}

/// The waiters of this handle and the processes that they watch.
#[derive(Debug)]
pub(super) struct Predecessors {
    own: Process,
    by_pid: HashMap<i32, Watch>,
    by_token: HashMap<TokenId, Vec<i32>>,
}

#[derive(Debug, Default)]
struct Watch {
    waiters: HashMap<TokenId, SessionId>,
    /// Whether the process has exited. If its session is still open then, a child has inherited the session's lock, and
    /// only polling finds out when the session ends.
    is_gone: bool,
}

impl Predecessors {
    /// Creates a list without waiters.
    pub(super) fn new() -> Self {
        Self { own: Process::own(), by_pid: HashMap::new(), by_token: HashMap::new() }
    }

    /// Returns this process.
    pub(super) fn own(&self) -> &Process {
        &self.own
    }

    /// Replaces the processes that a waiter watches. Returns `false` if one of them cannot be watched.
    pub(super) fn watch(
        &mut self,
        watcher: &mut Watcher,
        session: SessionId,
        token: TokenId,
        processes: &[Process],
    ) -> bool {
        let mut all_watched = true;
        let mut pids = Vec::new();
        for process in processes {
            if process == &self.own || pids.contains(&process.pid) {
                continue;
            }
            if process.namespace != self.own.namespace {
                all_watched = false;
                continue;
            }
            let watch = self.by_pid.entry(process.pid).or_default();
            if watch.waiters.is_empty() && !watch.is_gone {
                match open_process(process.pid) {
                    Some(descriptor) => watcher.add_process(process.pid, descriptor),
                    None => watch.is_gone = true,
                }
            }
            watch.waiters.insert(token, session);
            all_watched &= !watch.is_gone;
            pids.push(process.pid);
        }
        let before =
            if pids.is_empty() { self.by_token.remove(&token) } else { self.by_token.insert(token, pids.clone()) };
        for pid in before.unwrap_or_default().into_iter().filter(|pid| !pids.contains(pid)) {
            self.leave(watcher, pid, token);
        }
        all_watched
    }

    /// Ends the watches of a token that no longer waits.
    pub(super) fn forget(&mut self, watcher: &mut Watcher, token: TokenId) {
        if self.by_token.is_empty() {
            return;
        }
        for pid in self.by_token.remove(&token).unwrap_or_default() {
            self.leave(watcher, pid, token);
        }
    }

    /// Ends the watches of all tokens of a session that has ended.
    pub(super) fn forget_session(&mut self, watcher: &mut Watcher, session: SessionId) {
        let waiters = self.by_pid.values().flat_map(|watch| &watch.waiters);
        let tokens: HashSet<TokenId> =
            waiters.filter(|(_, owner)| **owner == session).map(|(token, _)| *token).collect();
        for token in tokens {
            self.forget(watcher, token);
        }
    }

    /// Records the exit of a process, and returns the waiters that depend on it and must poll again.
    pub(super) fn process_exited(&mut self, pid: i32) -> Vec<(SessionId, TokenId)> {
        let Some(watch) = self.by_pid.get_mut(&pid) else { return Vec::new() };
        watch.is_gone = true;
        watch.waiters.iter().map(|(token, session)| (*session, *token)).collect()
    }

    fn leave(&mut self, watcher: &mut Watcher, pid: i32, token: TokenId) {
        if let Some(watch) = self.by_pid.get_mut(&pid) {
            watch.waiters.remove(&token);
            if watch.waiters.is_empty() {
                self.by_pid.remove(&pid);
                watcher.remove_process(pid);
            }
        }
    }
}

#[cfg(target_os = "linux")]
fn open_process(pid: i32) -> Option<std::os::fd::OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid)?;
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok()
}

#[cfg(not(target_os = "linux"))]
fn open_process(_pid: i32) -> Option<std::os::fd::OwnedFd> {
    None
}
