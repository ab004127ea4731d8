//! Defines the messages between clients and the store.

use crate::config::Lifetime;

/// Identifies a request for the key: [`TOKENS_PER_CLIENT`] times the client's number plus a number of the client.
pub type Token = u16;

/// Number of tokens that a client has.
pub const TOKENS_PER_CLIENT: Token = 256;

/// Returns the client of a token.
pub fn client_of(token: Token) -> u8 {
    (token / TOKENS_PER_CLIENT) as u8
}

/// Result of an operation for a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Outcome {
    Granted { fence: u16, remaining: Option<u8> },
    Queued,
    Busy { lingers: bool },
    Gone,
    Stale,
    ForceReleased,
    SessionGone,
}

/// Result of [`Msg::Linger`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum LingerOutcome {
    Lingers { fence: u16, up_to: u16, lineage: u8 },
    Wanted,
    Gone,
}

/// A message in flight. Messages overtake each other and may get lost.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Msg {
    Acquire { token: Token, by: u8, lifetime: Lifetime, not_after: u8, sent_at: u8, enqueue: bool },
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
    Linger { token: Token, sent_at: u8 },
    Lingered { token: Token, sent_at: u8, outcome: LingerOutcome },
    PushRecall { token: Token },
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
            | Self::Linger { token, .. }
            | Self::Lingered { token, .. }
            | Self::PushRecall { token }
            | Self::Adopt { to: token, .. } => token,
            _ => Token::MAX,
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
            | Self::Lingered { token, .. }
            | Self::PushRecall { token }
            | Self::PushForceReleased { token } => Some(usize::from(client_of(*token))),
            Self::Renewed { by, .. } | Self::Opened { by, .. } => Some(usize::from(*by)),
            _ => None,
        }
    }

    /// Returns whether the message is a push, which stays in flight after its delivery and may arrive again.
    pub fn is_push(&self) -> bool {
        matches!(self, Self::PushGranted { .. } | Self::PushForceReleased { .. } | Self::PushRecall { .. })
    }
}
