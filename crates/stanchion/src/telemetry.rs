//! Emits spans, log events and metrics for the [`Event`](crate::Event)s of a handle. `docs/reference/telemetry.md` lists the
//! names, which are a contract.
//!
//! Without the features `tracing` and `metrics`, this module does nothing.

use std::future::Future;
#[cfg(feature = "metrics")]
use std::sync::Arc;

use crate::event::Event;
use crate::key::Key;
#[cfg(feature = "metrics")]
use crate::store::{Observed, Operation, OperationDone, Store};

/// How spans and log events show keys: see [`Builder::redact_keys`](crate::Builder::redact_keys). Metrics never contain
/// keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyRedaction {
    /// Shows the key, with control characters escaped.
    #[default]
    None,
    /// Shows the first 24 hexadecimal digits of the SHA-256 of the namespace and the name.
    ///
    /// The same key has the same text everywhere. The hash does not protect a name that can be guessed.
    Hashed,
    /// Leaves the key out.
    Omitted,
}

/// The settings with which one handle records events.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Telemetry {
    #[cfg_attr(not(any(feature = "tracing", feature = "metrics")), allow(dead_code, reason = "read by features"))]
    pub(crate) store: &'static str,
    #[cfg_attr(not(feature = "tracing"), allow(dead_code, reason = "read by a feature"))]
    pub(crate) keys: KeyRedaction,
}

impl Telemetry {
    /// Returns whether events may be collected. Without the features, the compiler knows that they are not.
    pub(crate) fn is_on(self) -> bool {
        #[cfg(feature = "tracing")]
        if tracing::level_filters::LevelFilter::current() != tracing::level_filters::LevelFilter::OFF {
            return true;
        }
        cfg!(feature = "metrics")
    }

    #[cfg_attr(
        not(any(feature = "tracing", feature = "metrics")),
        allow(unused_variables, reason = "used by features")
    )]
    pub(crate) fn record(self, event: &Event) {
        #[cfg(feature = "tracing")]
        self.log(event);
        #[cfg(feature = "metrics")]
        self.count(event);
    }

    /// Runs a call that requests a key inside a span.
    #[cfg_attr(not(feature = "tracing"), allow(unused_variables, reason = "used by a feature"))]
    pub(crate) fn acquiring<F: Future>(self, key: &Key, call: F) -> impl Future<Output = F::Output> {
        #[cfg(feature = "tracing")]
        let call = {
            use tracing::Instrument as _;
            let span = tracing::debug_span!("stanchion.acquire", key = tracing::field::Empty, store = self.store);
            // Every call passes here, so the key's text is made only if somebody collects the span.
            if !span.is_disabled()
                && let Some(key) = self.shown(key)
            {
                span.record("key", key);
            }
            call.instrument(span)
        };
        call
    }

    #[cfg(feature = "tracing")]
    fn shown(self, key: &Key) -> Option<String> {
        match self.keys {
            KeyRedaction::None => Some(key.to_string()),
            KeyRedaction::Omitted => None,
            KeyRedaction::Hashed => {
                use sha2::Digest as _;
                use std::fmt::Write as _;
                let hash = sha2::Sha256::digest(key.as_encoded().as_bytes());
                Some(hash.iter().take(12).fold(String::new(), |mut text, byte| {
                    let _ = write!(text, "{byte:02x}"); // writing to a string cannot fail
                    text
                }))
            }
        }
    }

    #[cfg(feature = "tracing")]
    fn log(self, event: &Event) {
        use tracing::{debug, info, warn};
        let store = self.store;
        match event {
            Event::Acquired { key, fence, waited, is_local } => {
                debug!(name: "stanchion.acquired", store, key = self.shown(key), fence = fence.get(), wait_seconds = waited.as_secs_f64(), local = is_local, "acquired");
            }
            Event::LingerEnded { key, grants, end } => {
                debug!(name: "stanchion.linger_ended", store, key = self.shown(key), grants, end = end.name(), "the key lingers no more");
            }
            Event::Contended { key, ahead } => {
                debug!(name: "stanchion.contended", store, key = self.shown(key), ahead, "waiting");
            }
            Event::LimitsDiffer { key, in_use, asked } => {
                warn!(name: "stanchion.limits_differ", store, key = self.shown(key), in_use, asked, "the holders use another limit; the smaller one applies until the holders with the other one are gone");
            }
            Event::Extended { key, fence, ttl } => {
                debug!(name: "stanchion.extended", store, key = self.shown(key), fence = fence.get(), ttl_seconds = ttl.as_secs_f64(), "extended");
            }
            Event::Released { key, fence, held } => {
                debug!(name: "stanchion.released", store, key = self.shown(key), fence = fence.get(), hold_seconds = held.as_secs_f64(), "released");
            }
            Event::Lost { key, fence, cause, reason } => {
                warn!(name: "stanchion.lost", store, key = self.shown(key), fence = fence.get(), cause = cause.name(), reason, "lost");
            }
            Event::ForceReleased { key, fence, reason } => {
                info!(name: "stanchion.force_released", store, key = self.shown(key), fence = fence.get(), reason, "force-released");
            }
            Event::SessionLost { .. } => warn!(name: "stanchion.session_lost", store, "the session was lost"),
            // The message of an error contains its key.
            Event::Error { kind, key, message } if self.keys == KeyRedaction::None => {
                warn!(name: "stanchion.error", store, kind = kind.name(), key = key.as_ref().map(|key| self.shown(key)), message, "a request failed");
            }
            Event::Error { kind, key, .. } => {
                warn!(name: "stanchion.error", store, kind = kind.name(), key = key.as_ref().map(|key| self.shown(key)), "a request failed");
            }
            Event::Warning { message } => {
                warn!(name: "stanchion.warning", store, message, "the store reported a problem")
            }
            Event::Draining { reason } => info!(name: "stanchion.draining", store, reason, "draining"),
            Event::Missed { .. } => {}
        }
    }

    #[cfg(feature = "metrics")]
    fn count(self, event: &Event) {
        use metrics::{counter, histogram};
        let store = self.store;
        match event {
            Event::Acquired { waited, is_local, .. } => {
                let from = if *is_local { "process" } else { "store" };
                counter!("stanchion_acquired_total", "store" => store, "from" => from).increment(1);
                histogram!("stanchion_acquire_wait_seconds", "store" => store).record(waited.as_secs_f64());
            }
            Event::Contended { ahead, .. } => {
                counter!("stanchion_contended_total", "store" => store).increment(1);
                histogram!("stanchion_queue_ahead", "store" => store).record(f64::from(*ahead));
            }
            Event::LimitsDiffer { .. } => counter!("stanchion_limits_differ_total", "store" => store).increment(1),
            Event::Extended { .. } => counter!("stanchion_extended_total", "store" => store).increment(1),
            Event::Released { held, .. } => {
                counter!("stanchion_released_total", "store" => store).increment(1);
                histogram!("stanchion_hold_seconds", "store" => store).record(held.as_secs_f64());
            }
            Event::Lost { cause, .. } => {
                counter!("stanchion_lost_total", "store" => store, "cause" => cause.name()).increment(1);
            }
            Event::LingerEnded { end, .. } => {
                counter!("stanchion_linger_ended_total", "store" => store, "end" => end.name()).increment(1);
            }
            Event::ForceReleased { .. } => counter!("stanchion_force_released_total", "store" => store).increment(1),
            Event::SessionLost { .. } => counter!("stanchion_session_lost_total", "store" => store).increment(1),
            Event::Error { kind, .. } => {
                counter!("stanchion_errors_total", "store" => store, "kind" => kind.name()).increment(1);
            }
            Event::Warning { .. } => counter!("stanchion_warnings_total", "store" => store).increment(1),
            Event::Draining { .. } | Event::Missed { .. } => {}
        }
    }
}

/// Wraps a store so that the time and the result of each operation are measured.
#[cfg(feature = "metrics")]
pub(crate) fn measured(store: Arc<dyn Store>) -> Arc<dyn Store> {
    let name = store.capabilities().name;
    Arc::new(Observed::new(store, move |done: &OperationDone<'_>| {
        use metrics::{counter, histogram};
        let operation = done.operation.name();
        histogram!("stanchion_operation_seconds", "store" => name, "operation" => operation)
            .record(done.took.as_secs_f64());
        if let Some(kind) = done.error {
            counter!("stanchion_operation_errors_total", "store" => name, "operation" => operation, "kind" => kind.name())
                .increment(1);
        }
        if done.operation == Operation::RenewSession {
            let outcome = if done.error.is_some() { "failed" } else { "answered" };
            counter!("stanchion_renewals_total", "store" => name, "outcome" => outcome).increment(1);
        }
    }))
}
