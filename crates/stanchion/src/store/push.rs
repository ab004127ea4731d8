//! The push stream of a session, which carries notifications from the store.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};

use tokio::sync::mpsc;

use super::LostToken;
use crate::fence::Fence;
use crate::key::Key;
use crate::token::TokenId;

/// A notification from the store to a session. It is a hint: it may be delayed, duplicated or lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Push {
    /// The store granted a waiting token.
    Granted {
        /// The key.
        key: Key,
        /// The token.
        token: TokenId,
        /// The fence of the hold.
        fence: Fence,
    },
    /// A hold was force-released.
    ForceReleased(LostToken),
    /// Something may have changed for a waiting token, so the session should poll it.
    Recheck {
        /// The token.
        token: TokenId,
    },
    /// Another request waits for a key whose hold lingers: the holder gives it up when it is not in use.
    Recall {
        /// The token of the hold.
        token: TokenId,
    },
    /// Pushes may have been lost, so the session should poll every waiting token.
    RecheckAll,
    /// The store may have lost data in a restart or a failover, so the session should poll every token, held tokens
    /// included.
    VerifyAll,
    /// A warning for people: a setting of the store may lose locks, or waiting is slower than it could be.
    Warning(String),
}

/// Maximum number of pushes about single tokens in a stream. The sender drops further ones, and sends one
/// [`Push::RecheckAll`] instead of all of them.
const MAX_TOKEN_PUSHES: usize = 4_096;

/// The push stream of a session.
///
/// It ends when the store drops all of its senders.
pub struct GrantStream {
    pushes: mpsc::UnboundedReceiver<Push>,
    load: Arc<Load>,
    changes: Vec<Change>,
}

type Change = Box<dyn Fn(Push) -> Option<Push> + Send + Sync>;

impl fmt::Debug for GrantStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrantStream").field("pushes", &self.pushes).finish_non_exhaustive()
    }
}

/// The fill level of a stream.
#[derive(Debug, Default)]
struct Load {
    /// Number of pushes about single tokens in the stream.
    token_pushes: AtomicUsize,
    /// Whether the stream has a `RecheckAll` that replaces dropped pushes.
    has_dropped: AtomicBool,
}

/// The sending half of a [`GrantStream`], for authors of stores. Clones send to the same stream.
///
/// A stream buffers at most 4,096 pushes about single tokens. The store need not handle a full stream: the sender drops
/// further pushes, and sends one [`Push::RecheckAll`] instead of all of them.
#[derive(Clone, Debug)]
pub struct PushSender {
    pushes: mpsc::UnboundedSender<Push>,
    load: Arc<Load>,
}

/// Creates a push stream and its sending half.
pub fn push_channel() -> (PushSender, GrantStream) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let load = Arc::new(Load::default());
    (PushSender { pushes: sender, load: load.clone() }, GrantStream { pushes: receiver, load, changes: Vec::new() })
}

impl PushSender {
    /// Sends a push without blocking, from any thread. Does nothing if the stream was dropped.
    pub fn send(&self, push: Push) {
        let mut push = push;
        if push.is_about_a_token() && self.load.token_pushes.fetch_add(1, Ordering::SeqCst) >= MAX_TOKEN_PUSHES {
            self.load.token_pushes.fetch_sub(1, Ordering::SeqCst);
            if self.load.has_dropped.swap(true, Ordering::SeqCst) {
                return;
            }
            push = Push::RecheckAll;
        }
        let _ = self.pushes.send(push); // an error: the stream was dropped
    }
}

impl Push {
    /// Returns whether the push is about a single token. Such a push may be dropped, because a poll finds the same fact
    /// a little later.
    fn is_about_a_token(&self) -> bool {
        matches!(self, Self::Granted { .. } | Self::ForceReleased(_) | Self::Recheck { .. } | Self::Recall { .. })
    }
}

impl GrantStream {
    /// Returns the next push, or `None` when the stream has ended.
    ///
    /// # Cancel safety
    /// A dropped future loses no push.
    pub async fn next(&mut self) -> Option<Push> {
        std::future::poll_fn(|context| self.poll_push(context)).await
    }

    /// Replaces each push with the result of `change`, or drops it if the result is `None`. For stores that wrap a
    /// store.
    #[must_use]
    pub fn filter_map(mut self, change: impl Fn(Push) -> Option<Push> + Send + Sync + 'static) -> Self {
        self.changes.push(Box::new(change));
        self
    }

    fn poll_push(&mut self, context: &mut Context<'_>) -> Poll<Option<Push>> {
        loop {
            let Some(push) = std::task::ready!(self.pushes.poll_recv(context)) else { return Poll::Ready(None) };
            if push.is_about_a_token() {
                self.load.token_pushes.fetch_sub(1, Ordering::SeqCst);
            } else if push == Push::RecheckAll {
                // Pushes that are dropped from now on need another `RecheckAll`.
                self.load.has_dropped.store(false, Ordering::SeqCst);
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    const KEPT: usize = 4_096;

    #[test]
    fn full_stream_rechecks_once() {
        let (sender, mut stream) = push_channel();
        let token = TokenId::from_bytes([1; 16]);
        sender.send(Push::Warning("first".into()));
        for _ in 0..3 * KEPT {
            sender.send(Push::Recheck { token });
        }
        sender.send(Push::VerifyAll);
        for round in 0..2 {
            let mut counts = [0; 4];
            if round == 1 {
                sender.send(Push::Recheck { token });
            }
            while let Some(push) = now(&mut stream) {
                counts[match push {
                    Push::Warning(_) => 0,
                    Push::Recheck { .. } => 1,
                    Push::RecheckAll => 2,
                    _ => 3,
                }] += 1;
            }
            assert_eq!(counts, if round == 0 { [1, KEPT, 1, 1] } else { [0, 1, 0, 0] });
        }
        // A `RecheckAll` for earlier drops does not cover later drops.
        for _ in 0..2 * KEPT {
            sender.send(Push::Recheck { token });
        }
        let taken = std::iter::from_fn(|| now(&mut stream));
        assert_eq!(taken.filter(|push| *push == Push::RecheckAll).count(), 1);
    }

    /// Returns the push that is ready. Polls without a runtime, because a runtime limits the number of messages taken
    /// at once.
    fn now(stream: &mut GrantStream) -> Option<Push> {
        match stream.poll_push(&mut Context::from_waker(std::task::Waker::noop())) {
            Poll::Ready(push) => push,
            Poll::Pending => None,
        }
    }
}
