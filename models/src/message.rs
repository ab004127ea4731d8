//! Defines the messages between clients and the store.

use crate::config::Lifetime;

/// Identifies a call: 16 times the client's number plus the call's number. A fresh token of the same call is 8 higher.
pub type Token = u8;

/// Result of an operation for a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Outcome {
    Granted { fence: u16, remaining: Option<u8> },
    Queued,
    Gone,
    Stale,
    ForceReleased,
    SessionGone,
}

/// A message in flight. Messages overtake each other and may get lost.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Msg {
    Acquire { token: Token, by: u8, lifetime: Lifetime, not_after: u8, sent_at: u8 },
    Adopt { from: Token, to: Token, by: u8, not_after: u8, sent_at: u8 },
    Poll { token: Token, by: u8, lifetime: Lifetime, sent_at: u8 },
    Release { token: Token, held: bool, is_final: bool },
    Extend { token: Token, by: u8, fence: u16, nth: u8, sent_at: u8 },
    Renew { by: u8, sent_at: u8 },
    Close { by: u8 },
    ForceRelease { fence: u16 },
    Expire { fence: u16 },
    Write { fence: u16 },
    Inspect,
    PollFromOutside,
    Open { by: u8, sent_at: u8 },
    RecordForceRelease { session: u8, token: Token },
    Acquired { token: Token, outcome: Outcome, sent_at: u8 },
    Polled { token: Token, outcome: Outcome, sent_at: u8 },
    Released { token: Token, time: u8, is_final: bool },
    Extended { token: Token, done: bool, nth: u8, sent_at: u8 },
    Renewed { by: u8, sent_at: u8, is_alive: bool, force_released: Vec<Token> },
    Opened { by: u8, sent_at: u8, is_alive: bool },
    PushGranted { token: Token, fence: u16 },
    PushForceReleased { token: Token },
}

impl Msg {
    /// Returns the token in the message.
    pub fn token(&self) -> Token {
        match *self {
            Self::Acquire { token, .. }
            | Self::Poll { token, .. }
            | Self::Release { token, .. }
            | Self::Extend { token, .. }
            | Self::Acquired { token, .. }
            | Self::Polled { token, .. }
            | Self::Released { token, .. }
            | Self::Extended { token, .. }
            | Self::PushGranted { token, .. }
            | Self::PushForceReleased { token }
            | Self::Adopt { to: token, .. } => token,
            _ => u8::MAX,
        }
    }

    /// Returns the client that receives this response or push, or `None` for a request.
    pub fn for_client(&self) -> Option<usize> {
        match self {
            Self::Acquired { token, .. }
            | Self::Polled { token, .. }
            | Self::Released { token, .. }
            | Self::Extended { token, .. }
            | Self::PushGranted { token, .. }
            | Self::PushForceReleased { token } => Some(usize::from(token / 16)),
            Self::Renewed { by, .. } | Self::Opened { by, .. } => Some(usize::from(*by)),
            _ => None,
        }
    }

    /// Returns whether the message is a push, which stays in flight after its delivery and may arrive again.
    pub fn is_push(&self) -> bool {
        matches!(self, Self::PushGranted { .. } | Self::PushForceReleased { .. })
    }
}
