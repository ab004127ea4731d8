//! Tests that spans, log events and metrics have exactly the names in `docs/reference/telemetry.md`.
#![cfg(all(feature = "tracing", feature = "metrics"))]
#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests wait on the real clock, and may panic")]

#[path = "library/support.rs"]
mod support;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use metrics_util::debugging::DebuggingRecorder;
use stanchion::store::{Fault, Faulty, Memory, Operation};
use stanchion::{KeyRedaction, Locks, RetryPolicy};
use support::until;
use tracing::field::{Field, Visit};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};

/// Recorded log events and spans: the name and all fields as one text.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<(String, String)>>>);

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0 += &format!("{field}={value:?} ");
    }
}

impl<S: tracing::Subscriber> Layer<S> for Log {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().unwrap().push((event.metadata().name().to_owned(), text.0));
    }

    fn on_record(&self, _: &tracing::Id, values: &tracing::span::Record<'_>, _: Context<'_, S>) {
        let mut text = Text(String::new());
        values.record(&mut text);
        self.0.lock().unwrap().push(("stanchion.acquire".to_owned(), text.0));
    }

    fn on_new_span(&self, span: &tracing::span::Attributes<'_>, _: &tracing::Id, _: Context<'_, S>) {
        let mut text = Text(String::new());
        span.record(&mut text);
        self.0.lock().unwrap().push((span.metadata().name().to_owned(), text.0));
    }
}

/// Causes each log event and metric at least once.
async fn cause_all_events(redaction: KeyRedaction) {
    let store = Faulty::new(Memory::new());
    let faults = store.faults();
    let retry = RetryPolicy { attempts: 1, ..RetryPolicy::default() };
    let builder = Locks::builder_with_store(store.clone()).retry(retry).redact_keys(redaction);
    let locks = builder.session_ttl(Duration::from_millis(500)).open().await.unwrap();
    let guard = locks.lock("secret-name").ttl(Duration::from_secs(60)).await.unwrap();
    guard.extend(Duration::from_secs(90)).await.unwrap();
    let waiting = tokio::spawn(locks.lock("secret-name").into_future());
    until("the call waits", async || locks.inspect("secret-name").await.unwrap().waiters.len() == 1).await;
    guard.release().await.unwrap();
    let guard = waiting.await.unwrap().unwrap();
    locks.force_release("secret-name", guard.fence(), "because").await.unwrap();
    guard.lost().await;
    // A background release fails once.
    faults.next(Operation::Release, Fault::Fail(stanchion::ErrorKind::Unavailable));
    drop(locks.lock("secret-name").await.unwrap());
    until("the key is free", async || !locks.is_locked("secret-name").await.unwrap()).await;
    // A request with another limit than the holders.
    let two = locks.semaphore("secret-name", 3).permits(2).await.unwrap();
    assert!(locks.semaphore("secret-name", 5).permits(2).try_acquire().await.unwrap().is_none());
    two.release().await.unwrap();
    // A key lingers, and is given up.
    until("the key lingers", async || {
        drop(locks.lock("secret-name").linger(std::time::Duration::from_secs(30)).await.unwrap());
        locks.inspect("secret-name").await.unwrap().holders.first().is_some_and(|holder| holder.lingers)
    })
    .await;
    assert!(locks.release_lingering("secret-name").await.unwrap());
    // The session ends, and its hold with it.
    let session = locks.session().unwrap();
    let guard = locks.lock("secret-name").await.unwrap();
    stanchion::Store::close_session(&store, session).await.unwrap();
    guard.lost().await;
    until("the handle has a new session", async || locks.session().is_some_and(|now| now != session)).await;
    locks.drain("because");
    locks.close().await.unwrap();
}

/// Returns the names in the first column of the table under a heading.
fn documented(heading: &str) -> BTreeSet<String> {
    let docs = include_str!("../../../docs/reference/telemetry.md");
    let section = docs.split("\n## ").find(|section| section.starts_with(heading)).unwrap();
    let names = section.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    names.map(str::to_owned).collect()
}

/// There is only one test, because recorder and subscriber are global to the process.
#[test]
fn telemetry_matches_docs_and_redacts_keys() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    recorder.install().unwrap();
    let log = Log::default();
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(log.clone())).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for redaction in [KeyRedaction::None, KeyRedaction::Hashed, KeyRedaction::Omitted] {
        runtime.block_on(cause_all_events(redaction));
        let recorded = std::mem::take(&mut *log.0.lock().unwrap());
        let ours: Vec<_> = recorded.iter().filter(|(name, _)| name.starts_with("stanchion.")).collect();
        let all: String = ours.iter().map(|(_, fields)| fields.as_str()).collect();
        assert_eq!(all.contains("secret-name"), redaction == KeyRedaction::None, "{redaction:?}: {all}");
        let names: BTreeSet<_> =
            ours.iter().map(|(name, _)| name.clone()).filter(|name| name != "stanchion.acquire").collect();
        let mut expected = documented("Log events");
        // The memory store has no warnings.
        assert!(expected.remove("stanchion.warning"));
        assert_eq!(names, expected);
        assert!(ours.iter().any(|(name, _)| name == "stanchion.acquire"));
        let lost = ours.iter().find(|(name, _)| name == "stanchion.lost").unwrap();
        assert!(lost.1.contains("cause=\"force_released\"") && lost.1.contains("because"), "{}", lost.1);
        if redaction == KeyRedaction::Hashed {
            let hash =
                |fields: &str| fields.split("key=\"").nth(1).and_then(|rest| rest.split('"').next()).map(str::to_owned);
            let hashes: BTreeSet<_> = ours.iter().filter_map(|(_, fields)| hash(fields)).collect();
            assert_eq!(hashes.len(), 1, "one key has several hashes: {hashes:?}");
            assert!(hashes.iter().all(|hash| hash.len() == 24 && hash.bytes().all(|byte| byte.is_ascii_hexdigit())));
        }
    }
    let mut expected = documented("Metrics");
    assert!(expected.remove("stanchion_warnings_total"));
    let recorded: BTreeSet<_> =
        snapshotter.snapshot().into_vec().into_iter().map(|(key, ..)| key.key().name().to_owned()).collect();
    assert_eq!(recorded, expected);
}
