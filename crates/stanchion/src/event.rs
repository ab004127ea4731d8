//! Events: what happened, for whoever listens.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::mpsc;

use crate::error::{ErrorKind, LossCause};
use crate::fence::Fence;
use crate::key::Key;
use crate::telemetry::Telemetry;
use crate::token::SessionId;

/// Something that happened to the locks of one handle.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A hold was granted.
    Acquired {
        /// The key.
        key: Key,
        /// The fence of the hold.
        fence: Fence,
        /// The time from the call to the grant.
        waited: Duration,
    },
    /// A call has to wait.
    Contended {
        /// The key.
        key: Key,
        /// How many wait before it.
        ahead: u32,
    },
    /// A call has to wait, or is refused, while the holders share the key with another limit than the call says. The smaller
    /// limit holds until the holders of the other are gone.
    LimitsDiffer {
        /// The key.
        key: Key,
        /// The smallest limit of the holders. Readers count as [`Demand::MAX`](crate::store::Demand::MAX).
        in_use: u32,
        /// The limit of the call.
        asked: u32,
    },
    /// A hold's deadline was set anew.
    Extended {
        /// The key.
        key: Key,
        /// The fence of the hold.
        fence: Fence,
        /// What is left of its lifetime.
        ttl: Duration,
    },
    /// A hold was released by its guard.
    Released {
        /// The key.
        key: Key,
        /// The fence of the hold.
        fence: Fence,
        /// The time from the grant to the release.
        held: Duration,
    },
    /// A hold was lost.
    Lost {
        /// The key.
        key: Key,
        /// The fence of the hold.
        fence: Fence,
        /// Why.
        cause: LossCause,
        /// What the one who forced it said, if somebody did.
        reason: Option<String>,
    },
    /// A hold of somebody was released by force through this handle.
    ForceReleased {
        /// The key.
        key: Key,
        /// The fence of the hold that ended.
        fence: Fence,
        /// The reason that was given.
        reason: String,
    },
    /// The session is over; its holds are lost and another session is being opened.
    SessionLost {
        /// The session.
        session: SessionId,
    },
    /// Something failed in the background, or will be tried again.
    Error {
        /// The kind of the error.
        kind: ErrorKind,
        /// The key it was about.
        key: Option<Key>,
        /// The error's text.
        message: String,
    },
    /// The store may lose locks as it is set up, or cannot do all it could. See also
    /// [`Locks::warnings`](crate::Locks::warnings).
    Warning {
        /// What, and how to mend it.
        message: String,
    },
    /// The handle takes no new holds.
    Draining {
        /// The reason that was given.
        reason: String,
    },
    /// The listener was too slow: this many events are missing here.
    Missed {
        /// How many.
        count: u64,
    },
}

/// The events of one handle, from the moment of [`Locks::events`](crate::Locks::events) on.
///
/// A listener that falls behind by more than 1,024 events is told how many it missed.
#[derive(Debug)]
pub struct EventStream {
    events: mpsc::Receiver<Event>,
    missed: Arc<AtomicU64>,
}

impl EventStream {
    /// The next event; `None` when the handle is gone.
    ///
    /// # Cancel safety
    /// A dropped future loses no event.
    pub async fn next(&mut self) -> Option<Event> {
        std::future::poll_fn(|context| self.poll_event(context)).await
    }

    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        let missed = self.missed.swap(0, Ordering::Relaxed);
        if missed > 0 {
            return Poll::Ready(Some(Event::Missed { count: missed }));
        }
        self.events.poll_recv(context)
    }
}

impl futures_core::Stream for EventStream {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        self.poll_event(context)
    }
}

/// The one observer: everything that is told to the outside goes through it.
#[derive(Debug, Default)]
pub(crate) struct Observer {
    listeners: Mutex<Arc<Vec<Listener>>>,
    count: AtomicUsize,
    /// None: nobody collects.
    telemetry: Option<Telemetry>,
    /// The different warnings so far, for callers that do not listen to events.
    warnings: Mutex<Vec<String>>,
}

/// Maximum number of different warnings that are remembered.
const MAX_WARNINGS: usize = 32;

#[derive(Clone, Debug)]
struct Listener {
    events: mpsc::Sender<Event>,
    missed: Arc<AtomicU64>,
}

impl Observer {
    pub(crate) fn new(telemetry: Telemetry) -> Self {
        Self { telemetry: Some(telemetry), ..Self::default() }
    }

    pub(crate) fn telemetry(&self) -> Telemetry {
        self.telemetry.unwrap_or_default()
    }

    pub(crate) fn listen(&self) -> EventStream {
        let (sender, events) = mpsc::channel(1_024);
        let missed = Arc::new(AtomicU64::new(0));
        let listener = Listener { events: sender, missed: missed.clone() };
        self.change(|listeners| listeners.push(listener));
        EventStream { events, missed }
    }

    /// Tells an event, which is made only if somebody listens.
    pub(crate) fn tell(&self, event: impl FnOnce() -> Event) {
        let is_heard = self.count.load(Ordering::Acquire) != 0;
        let collector = self.telemetry.filter(|telemetry| telemetry.is_on());
        if !is_heard && collector.is_none() {
            return;
        }
        let event = event();
        if let Some(collector) = collector {
            collector.tell(&event);
        }
        if !is_heard {
            return;
        }
        // Sending wakes tasks, and that may drop one that has something to tell: no lock is held meanwhile.
        let listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut closed = false;
        for listener in listeners.iter() {
            match listener.events.try_send(event.clone()) {
                Ok(()) => {}
                Err(mpsc::error::TrySendError::Full(_)) => {
                    listener.missed.fetch_add(1, Ordering::Relaxed);
                }
                Err(mpsc::error::TrySendError::Closed(_)) => closed = true,
            }
        }
        if closed {
            self.change(|listeners| listeners.retain(|listener| !listener.events.is_closed()));
        }
    }

    /// Reports a warning of the store, and remembers it.
    pub(crate) fn warn(&self, message: String) {
        let mut warnings = self.warnings.lock().unwrap_or_else(PoisonError::into_inner);
        if !warnings.contains(&message) && warnings.len() < MAX_WARNINGS {
            warnings.push(message.clone());
        }
        drop(warnings);
        self.tell(|| Event::Warning { message });
    }

    /// Returns the warnings so far.
    pub(crate) fn warnings(&self) -> Vec<String> {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Listener>)) {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        change(Arc::make_mut(&mut listeners));
        self.count.store(listeners.len(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    fn draining(reason: &str) -> Event {
        Event::Draining { reason: reason.into() }
    }

    #[test]
    fn a_slow_listener_is_told_how_much_it_missed() {
        let observer = Observer::default();
        let mut stream = observer.listen();
        for _ in 0..1_030 {
            observer.tell(|| draining("x"));
        }
        let mut context = Context::from_waker(Waker::noop());
        assert_eq!(stream.poll_event(&mut context), Poll::Ready(Some(Event::Missed { count: 6 })));
        assert_eq!(stream.poll_event(&mut context), Poll::Ready(Some(draining("x"))));
    }

    #[test]
    fn no_event_is_made_when_nobody_listens() {
        let observer = Observer::default();
        observer.tell(|| unreachable!("nobody listens"));
        let stream = observer.listen();
        drop(stream);
        observer.tell(|| draining("the one that notices the end"));
        observer.tell(|| unreachable!("nobody listens any more"));
    }
}
