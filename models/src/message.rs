//! What is on its way between clients and store.

use crate::config::Term;

/// A token: the client times 16, plus the call; a fresh one for the same call is 8 higher.
pub type Token = u8;

/// What a step says of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Outcome {
    Granted { fence: u16, remaining: Option<u8> },
    Queued,
    Gone,
    Stale,
    Forced,
    SessionGone,
}

/// A message on its way. Messages overtake each other and may never arrive.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Msg {
    Acquire { token: Token, by: u8, term: Term, not_after: u8, asked: u8 },
    Adopt { from: Token, to: Token, by: u8, not_after: u8, asked: u8 },
    Poll { token: Token, by: u8, term: Term, asked: u8 },
    End { token: Token, release: bool, sure: bool },
    Extend { token: Token, by: u8, fence: u16, nth: u8, asked: u8 },
    Beat { by: u8, asked: u8 },
    Close { by: u8 },
    Force { fence: u16 },
    Evict { fence: u16 },
    Write { fence: u16 },
    Look,
    Ask,
    Open { by: u8, asked: u8 },
    Record { session: u8, token: Token },
    Acquired { token: Token, outcome: Outcome, asked: u8 },
    Polled { token: Token, outcome: Outcome, asked: u8 },
    Ended { token: Token, time: u8, sure: bool },
    Extended { token: Token, done: bool, nth: u8, asked: u8 },
    Beaten { by: u8, asked: u8, lives: bool, forced: Vec<Token> },
    Opened { by: u8, asked: u8, lives: bool },
    PushGranted { token: Token, fence: u16 },
    PushForced { token: Token },
}

impl Msg {
    /// The token it is about.
    pub fn token(&self) -> Token {
        match *self {
            Self::Acquire { token, .. }
            | Self::Poll { token, .. }
            | Self::End { token, .. }
            | Self::Extend { token, .. }
            | Self::Acquired { token, .. }
            | Self::Polled { token, .. }
            | Self::Ended { token, .. }
            | Self::Extended { token, .. }
            | Self::PushGranted { token, .. }
            | Self::PushForced { token }
            | Self::Adopt { to: token, .. } => token,
            _ => u8::MAX,
        }
    }

    /// The client that an answer or a push is for; nothing for a request.
    pub fn for_client(&self) -> Option<usize> {
        match self {
            Self::Acquired { token, .. }
            | Self::Polled { token, .. }
            | Self::Ended { token, .. }
            | Self::Extended { token, .. }
            | Self::PushGranted { token, .. }
            | Self::PushForced { token } => Some(usize::from(token / 16)),
            Self::Beaten { by, .. } | Self::Opened { by, .. } => Some(usize::from(*by)),
            _ => None,
        }
    }

    /// A push stays where it is when it is delivered: it may come again.
    pub fn is_push(&self) -> bool {
        matches!(self, Self::PushGranted { .. } | Self::PushForced { .. })
    }
}
