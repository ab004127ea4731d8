//! Spans, log events and metrics: the same facts as [`Event`](crate::Event)s, for those who collect them. The names are a
//! contract: `docs/telemetry.md` lists them.
//!
//! Without the features `tracing` and `metrics` nothing of this is there.

use std::future::Future;
#[cfg(feature = "metrics")]
use std::sync::Arc;

use crate::event::Event;
use crate::key::Key;
#[cfg(feature = "metrics")]
use crate::store::{Observed, Operation, OperationDone, Store};

/// How keys are shown in spans and log events: see [`Builder::redact_keys`](crate::Builder::redact_keys). Metrics never have
/// them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyRedaction {
    /// As they are, with control characters escaped.
    #[default]
    None,
    /// The first 24 hexadecimal digits of the SHA-256 of the namespace and the name: the same key is the same text everywhere.
    /// A name that can be guessed can be found again by whoever tries.
    Hashed,
    /// Not at all.
    Omitted,
}

/// What an observer needs to tell of events.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Telemetry {
    #[cfg_attr(not(any(feature = "tracing", feature = "metrics")), allow(dead_code, reason = "told by features"))]
    pub(crate) store: &'static str,
    #[cfg_attr(not(feature = "tracing"), allow(dead_code, reason = "told by a feature"))]
    pub(crate) keys: KeyRedaction,
}

impl Telemetry {
    /// Whether somebody may collect. Without the features this is known when it is compiled.
    pub(crate) fn is_on(self) -> bool {
        #[cfg(feature = "tracing")]
        if tracing::level_filters::LevelFilter::current() != tracing::level_filters::LevelFilter::OFF {
            return true;
        }
        cfg!(feature = "metrics")
    }

    #[cfg_attr(
        not(any(feature = "tracing", feature = "metrics")),
        allow(unused_variables, reason = "told by features")
    )]
    pub(crate) fn tell(self, event: &Event) {
        #[cfg(feature = "tracing")]
        self.log(event);
        #[cfg(feature = "metrics")]
        self.count(event);
    }

    /// The span of a call that asks for a key.
    #[cfg_attr(not(feature = "tracing"), allow(unused_variables, reason = "told by a feature"))]
    pub(crate) fn acquiring<F: Future>(self, key: &Key, call: F) -> impl Future<Output = F::Output> {
        #[cfg(feature = "tracing")]
        let call = {
            use tracing::Instrument as _;
            let span = tracing::debug_span!("stanchion.acquire", key = tracing::field::Empty, store = self.store);
            // On the way of every call: no text is made for nobody.
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
                    let _a_string_takes_all = write!(text, "{byte:02x}");
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
            Event::Acquired { key, fence, waited } => {
                debug!(name: "stanchion.acquired", store, key = self.shown(key), fence = fence.get(), wait_seconds = waited.as_secs_f64(), "acquired");
            }
            Event::Contended { key, ahead } => {
                debug!(name: "stanchion.contended", store, key = self.shown(key), ahead, "it has to wait");
            }
            Event::LimitsDiffer { key, in_use, asked } => {
                warn!(name: "stanchion.limits_differ", store, key = self.shown(key), in_use, asked, "the holders have another limit: the smaller one holds until the holders of the other are gone");
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
                info!(name: "stanchion.force_released", store, key = self.shown(key), fence = fence.get(), reason, "released by force");
            }
            Event::SessionLost { .. } => warn!(name: "stanchion.session_lost", store, "the session is over"),
            // The message of an error names its key.
            Event::Error { kind, key, message } if self.keys == KeyRedaction::None => {
                warn!(name: "stanchion.error", store, kind = kind.name(), key = key.as_ref().map(|key| self.shown(key)), message, "failed");
            }
            Event::Error { kind, key, .. } => {
                warn!(name: "stanchion.error", store, kind = kind.name(), key = key.as_ref().map(|key| self.shown(key)), "failed");
            }
            Event::Warning { message } => warn!(name: "stanchion.warning", store, message, "the store may lose locks"),
            Event::Draining { reason } => info!(name: "stanchion.draining", store, reason, "no new holds"),
            Event::Missed { .. } => {}
        }
    }

    #[cfg(feature = "metrics")]
    fn count(self, event: &Event) {
        use metrics::{counter, histogram};
        let store = self.store;
        match event {
            Event::Acquired { waited, .. } => {
                counter!("stanchion_acquired_total", "store" => store).increment(1);
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

/// The same store with its steps measured.
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
