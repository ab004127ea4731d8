//! The requests to the database thread, and their answers.

use std::time::Duration;

use crate::key::Key;
use crate::store::{
    AcquireOutcome, AcquireRequest, AdoptOutcome, AdoptRequest, Cursor, EndOutcome, ExtendOutcome, ForceReleaseOutcome,
    ForceReleaseRequest, KeyState, LingerOutcome, Listing, OpenOutcome, OpenSession, PollOutcome, RenewOutcome,
};
use crate::token::{SessionId, TokenId};

/// A request to the database thread.
#[derive(Clone, Debug)]
pub(super) enum Request {
    Open(OpenSession),
    RenewSession(SessionId),
    Close(SessionId),
    SessionLives(SessionId),
    Acquire(AcquireRequest),
    Poll {
        key: Key,
        tokens: Vec<TokenId>,
    },
    Release {
        key: Key,
        token: TokenId,
        cooldown: Option<Duration>,
    },
    Extend {
        key: Key,
        token: TokenId,
        ttl: Duration,
    },
    Linger {
        key: Key,
        token: TokenId,
    },
    Adopt(AdoptRequest),
    ForceRelease(ForceReleaseRequest),
    Inspect(Key),
    List {
        prefix: String,
        cursor: Option<Cursor>,
        limit: usize,
    },
    /// A watched process has exited.
    ProcessExited(i32),
}

/// The answer to a [`Request`], in the variant that belongs to it.
#[derive(Debug)]
pub(super) enum Answer {
    Open(OpenOutcome),
    RenewSession(RenewOutcome),
    Done,
    SessionLives(bool),
    Acquire(AcquireOutcome),
    Poll(Vec<PollOutcome>),
    Release(EndOutcome),
    Extend(ExtendOutcome),
    Linger(LingerOutcome),
    Adopt(AdoptOutcome),
    ForceRelease(ForceReleaseOutcome),
    Inspect(KeyState),
    List(Listing),
}

impl Request {
    /// Returns whether the request only reads, unless a key must be reconciled.
    pub(super) fn is_reading(&self) -> bool {
        matches!(
            self,
            Self::RenewSession(_) | Self::SessionLives(_) | Self::Poll { .. } | Self::Inspect(_) | Self::List { .. }
        )
    }

    /// Returns whether the caller's thread may execute the request: it takes some ten microseconds, and waits for nothing but
    /// the gate.
    pub(super) fn is_short(&self) -> bool {
        matches!(self, Self::Acquire(_) | Self::Release { .. } | Self::Extend { .. } | Self::Linger { .. })
    }

    /// Returns the key of the request, if it has one.
    pub(super) fn key(&self) -> Option<&Key> {
        match self {
            Self::Acquire(request) => Some(&request.key),
            Self::Adopt(request) => Some(&request.key),
            Self::ForceRelease(request) => Some(&request.key),
            Self::Poll { key, .. }
            | Self::Release { key, .. }
            | Self::Extend { key, .. }
            | Self::Linger { key, .. }
            | Self::Inspect(key) => Some(key),
            Self::Open(_)
            | Self::RenewSession(_)
            | Self::Close(_)
            | Self::SessionLives(_)
            | Self::List { .. }
            | Self::ProcessExited(_) => None,
        }
    }
}
