//! Pushes: what a store tells a session without being asked.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::mpsc;

use super::LostToken;
use crate::fence::Fence;
use crate::key::Key;
use crate::token::TokenId;

/// A message to a session. A hint: it may come late, twice or never.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Push {
    /// A waiting token was granted.
    Granted {
        /// The key.
        key: Key,
        /// The token.
        token: TokenId,
        /// The fence of the hold.
        fence: Fence,
    },
    /// A hold was released by force.
    Forced(LostToken),
    /// Something may have changed for this waiting token: ask.
    Recheck {
        /// The token.
        token: TokenId,
    },
    /// Messages may have been lost: ask for every waiting token.
    RecheckAll,
    /// The store may have forgotten something, by a restart or a failover: ask for every token, the held ones too.
    VerifyAll,
    /// For people: a setting of the store that may lose locks, or that waiting is slower than it could be.
    Warning(String),
}

/// The push stream of a session.
pub struct GrantStream {
    pushes: mpsc::UnboundedReceiver<Push>,
    changes: Vec<Change>,
}

type Change = Box<dyn Fn(Push) -> Option<Push> + Send + Sync>;

impl fmt::Debug for GrantStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrantStream").field("pushes", &self.pushes).finish_non_exhaustive()
    }
}

/// The sending half of a [`GrantStream`], for store authors. Clones send to the same stream.
#[derive(Clone, Debug)]
pub struct PushSender(mpsc::UnboundedSender<Push>);

/// A stream and its sending half.
pub fn push_channel() -> (PushSender, GrantStream) {
    let (sender, receiver) = mpsc::unbounded_channel();
    (PushSender(sender), GrantStream { pushes: receiver, changes: Vec::new() })
}

impl PushSender {
    /// Sends a push, from any thread, without blocking. Whether somebody still listens does not matter.
    pub fn send(&self, push: Push) {
        let _nobody_listens = self.0.send(push);
    }
}

impl GrantStream {
    /// The next push; `None` when the stream has ended.
    ///
    /// # Cancel safety
    /// A dropped future loses no push.
    pub async fn next(&mut self) -> Option<Push> {
        std::future::poll_fn(|context| self.poll_push(context)).await
    }

    /// What `change` makes of each push, for stores around others; `None` drops it.
    #[must_use]
    pub fn filter_map(mut self, change: impl Fn(Push) -> Option<Push> + Send + Sync + 'static) -> Self {
        self.changes.push(Box::new(change));
        self
    }

    fn poll_push(&mut self, context: &mut Context<'_>) -> Poll<Option<Push>> {
        loop {
            let Some(push) = std::task::ready!(self.pushes.poll_recv(context)) else { return Poll::Ready(None) };
            if let Some(push) = self.changes.iter().try_fold(push, |push, change| change(push)) {
                return Poll::Ready(Some(push));
            }
        }
    }
}

impl futures_core::Stream for GrantStream {
    type Item = Push;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Push>> {
        self.poll_push(context)
    }
}
