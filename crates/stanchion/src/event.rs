//! Defines [`Event`], delivers events to listeners and hands them to telemetry.

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

/// Something that happened to the locks of one handle. [`Locks::events`](crate::Locks::events) returns a stream of
/// them.
///
/// Fields may be added: match with `..`.
///
/// ```
/// use stanchion::Event;
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// # let locks = stanchion::Locks::open("memory:").await?;
/// let mut events = locks.events();
/// let guard = locks.lock("report").await?;
/// match events.next().await {
///     Some(Event::Acquired { key, fence, .. }) => println!("{key} is held under fence {fence}"),
///     Some(Event::Lost { key, cause, .. }) => println!("{key} was lost: {cause}"),
///     _ => {}
/// }
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A lock was granted.
    #[non_exhaustive]
    Acquired {
        /// The key.
        key: Key,
        /// The fence of the hold.
        fence: Fence,
        /// Time from the call to the grant.
        waited: Duration,
    },
    /// A call started to wait for a key.
    #[non_exhaustive]
    Contended {
        /// The key.
        key: Key,
        /// Number of waiters before this call in the queue.
        ahead: u32,
    },
    /// A call waits or was rejected, and the holders use another limit of the key than the call.
    ///
    /// The smaller limit applies until the holders with the other one are gone.
    #[non_exhaustive]
    LimitsDiffer {
        /// The key.
        key: Key,
        /// The smallest limit among the holders. Readers count as [`Demand::MAX`](crate::store::Demand::MAX).
        in_use: u32,
        /// The limit of the call.
        asked: u32,
    },
    /// A guard changed its deadline with [`Guard::extend`](crate::Guard::extend).
    #[non_exhaustive]
    Extended {
        /// The key.
        key: Key,
        /// The fence of the hold.
        fence: Fence,
        /// The remaining time that the guard set.
        ttl: Duration,
    },
    /// A guard released its lock.
    #[non_exhaustive]
    Released {
        /// The key.
        key: Key,
        /// The fence of the hold.
        fence: Fence,
        /// Time from the grant to the release.
        held: Duration,
    },
    /// A lock was lost.
    #[non_exhaustive]
    Lost {
        /// The key.
        key: Key,
        /// The fence of the hold.
        fence: Fence,
        /// The cause of the loss.
        cause: LossCause,
        /// The reason that was given to a force-release.
        reason: Option<String>,
    },
    /// This handle force-released a hold.
    #[non_exhaustive]
    ForceReleased {
        /// The key.
        key: Key,
        /// The fence of the hold that ended.
        fence: Fence,
        /// The reason that was given.
        reason: String,
    },
    /// The session ended. Its holds are lost, and the keeper opens another session.
    #[non_exhaustive]
    SessionLost {
        /// The session that ended.
        session: SessionId,
    },
    /// A request failed in the background, or will be retried.
    #[non_exhaustive]
    Error {
        /// The kind of the error.
        kind: ErrorKind,
        /// The key of the request.
        key: Option<Key>,
        /// The text of the error.
        message: String,
    },
    /// The store may lose locks as it is configured, or works with reduced features.
    ///
    /// [`Locks::warnings`](crate::Locks::warnings) returns all warnings so far.
    #[non_exhaustive]
    Warning {
        /// The problem and how to solve it.
        message: String,
    },
    /// The handle started to drain, and takes no new holds.
    #[non_exhaustive]
    Draining {
        /// The reason that was given.
        reason: String,
    },
    /// The listener was too slow, and events were dropped here.
    #[non_exhaustive]
    Missed {
        /// Number of dropped events.
        count: u64,
    },
}

/// A stream of one handle's events, from the call of [`Locks::events`](crate::Locks::events) on.
///
/// It buffers up to 1,024 events. If the listener falls further behind, [`Event::Missed`] says how many were dropped.
/// It also implements `Stream`; blocking code uses [`blocking::Locks::events`](crate::blocking::Locks::events).
///
/// ```
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// # let locks = stanchion::Locks::open("memory:").await?;
/// let mut events = locks.events();
/// let log = tokio::spawn(async move {
///     while let Some(event) = events.next().await {
///         eprintln!("{event:?}");
///     }
/// });
/// # drop(locks);
/// # log.await.unwrap();
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
#[derive(Debug)]
pub struct EventStream {
    events: mpsc::Receiver<Event>,
    missed: Arc<AtomicU64>,
}

impl EventStream {
    /// Waits for the next event. Returns `None` when the handle is gone.
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

/// The only way out for events: delivers each one to the listeners and to telemetry.
#[derive(Debug, Default)]
pub(crate) struct Observer {
    listeners: Mutex<Arc<Vec<Listener>>>,
    count: AtomicUsize,
    /// `None` if the events are not collected.
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

    /// Publishes an event. The closure that makes it runs only if somebody listens.
    pub(crate) fn tell(&self, event: impl FnOnce() -> Event) {
        let is_heard = self.count.load(Ordering::Acquire) != 0;
        let collector = self.telemetry.filter(|telemetry| telemetry.is_on());
        if !is_heard && collector.is_none() {
            return;
        }
        let event = event();
        if let Some(collector) = collector {
            collector.record(&event);
        }
        if !is_heard {
            return;
        }
        // Sending wakes tasks, and a waker may drop a task that publishes an event itself: so the list is not locked
        // here.
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
    fn slow_listener_gets_the_missed_count() {
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
    fn unobserved_events_are_not_made() {
        let observer = Observer::default();
        observer.tell(|| unreachable!("nobody listens"));
        let stream = observer.listen();
        drop(stream);
        observer.tell(|| draining("this send finds the closed listener"));
        observer.tell(|| unreachable!("nobody listens any more"));
    }
}
