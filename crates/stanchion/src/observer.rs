//! Delivers events to the listeners of a handle and to telemetry, and remembers warnings.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use tokio::sync::mpsc;

use crate::event::Event;
use crate::telemetry::Telemetry;

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
    pub(crate) fn publish(&self, event: impl FnOnce() -> Event) {
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
        self.publish(|| Event::Warning { message });
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
            observer.publish(|| draining("x"));
        }
        let mut context = Context::from_waker(Waker::noop());
        assert_eq!(stream.poll_event(&mut context), Poll::Ready(Some(Event::Missed { count: 6 })));
        assert_eq!(stream.poll_event(&mut context), Poll::Ready(Some(draining("x"))));
    }

    #[test]
    fn unobserved_events_are_not_made() {
        let observer = Observer::default();
        observer.publish(|| unreachable!("nobody listens"));
        let stream = observer.listen();
        drop(stream);
        observer.publish(|| draining("this send finds the closed listener"));
        observer.publish(|| unreachable!("nobody listens any more"));
    }
}
