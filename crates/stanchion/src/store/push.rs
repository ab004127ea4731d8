//! Pushes: what a store tells a session without being asked.

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
    ForceReleased(LostToken),
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

/// Maximum number of pushes about single tokens that a stream keeps. Beyond it they are dropped, and one
/// [`Push::RecheckAll`] stands for all that were dropped.
const MOST_WAITING: usize = 4_096;

/// The push stream of a session.
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

/// What waits in a stream.
#[derive(Debug, Default)]
struct Load {
    /// Pushes about single tokens.
    waiting: AtomicUsize,
    /// Some were dropped, and the `RecheckAll` that stands for them is in the stream.
    has_dropped: AtomicBool,
}

/// The sending half of a [`GrantStream`], for store authors. Clones send to the same stream.
///
/// A stream keeps 4,096 pushes about single tokens that nobody has taken yet. When it is full, a store need not care: the
/// sender drops what comes, and the receiver gets one [`Push::RecheckAll`] for it.
#[derive(Clone, Debug)]
pub struct PushSender {
    pushes: mpsc::UnboundedSender<Push>,
    load: Arc<Load>,
}

/// A stream and its sending half.
pub fn push_channel() -> (PushSender, GrantStream) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let load = Arc::new(Load::default());
    (PushSender { pushes: sender, load: load.clone() }, GrantStream { pushes: receiver, load, changes: Vec::new() })
}

impl PushSender {
    /// Sends a push, from any thread, without blocking. Whether somebody still listens does not matter.
    pub fn send(&self, push: Push) {
        let mut push = push;
        if push.is_about_a_token() && self.load.waiting.fetch_add(1, Ordering::SeqCst) >= MOST_WAITING {
            self.load.waiting.fetch_sub(1, Ordering::SeqCst);
            if self.load.has_dropped.swap(true, Ordering::SeqCst) {
                return;
            }
            push = Push::RecheckAll;
        }
        let _nobody_listens = self.pushes.send(push);
    }
}

impl Push {
    /// One of many, and a hint: each has something behind it that finds out the same a little later.
    fn is_about_a_token(&self) -> bool {
        matches!(self, Self::Granted { .. } | Self::ForceReleased(_) | Self::Recheck { .. })
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
            if push.is_about_a_token() {
                self.load.waiting.fetch_sub(1, Ordering::SeqCst);
            } else if push == Push::RecheckAll {
                // What is dropped from here on needs another one.
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
    fn a_full_stream_drops_and_asks_once() {
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
        // The one that was sent for earlier drops is not enough for later ones.
        for _ in 0..2 * KEPT {
            sender.send(Push::Recheck { token });
        }
        let taken = std::iter::from_fn(|| now(&mut stream));
        assert_eq!(taken.filter(|push| *push == Push::RecheckAll).count(), 1);
    }

    /// The push that is there. No runtime, which would count what is taken at once.
    fn now(stream: &mut GrantStream) -> Option<Push> {
        match stream.poll_push(&mut Context::from_waker(std::task::Waker::noop())) {
            Poll::Ready(push) => push,
            Poll::Pending => None,
        }
    }
}
