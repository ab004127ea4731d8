//! Housekeeping: what sessions leave when they end, and what nobody asks for any more.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use googleapis_tonic_google_firestore_v1::google::firestore::v1::structured_query::field_filter::Operator;

use super::Inner;
use super::connect::{Interest, Lane, lock};
use super::document::{Only, delete, id, query, text_of, timestamp};
use super::record::SessionRecord;
use super::session::may_go;
use super::step::Operation;
use crate::clock::jitter;
use crate::error::Result;
use crate::key::Key;
use crate::token::SessionId;

/// Housekeeping is done with a beat, not more often than this.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// So many sessions, and so many keys, at once: processes that live for a moment leave one each, and sweep nothing.
const SWEPT_AT_ONCE: usize = 300;

/// So many keys are settled with one query, so many of them at once, and so often.
const SETTLED_AT_ONCE: usize = 300;
const AT_ONCE: usize = 16;
const MOST_PASSES: usize = 1_000;

impl Inner {
    /// Settles every key that has something of a session.
    pub(super) async fn settle_keys_of(&self, session: SessionId, wanted: &Interest) -> Result<()> {
        for _ in 0..MOST_PASSES {
            let of_session = vec![(Operator::ArrayContains, id(session))];
            let found = query(self.names.keys(), "sessions", of_session, false, SETTLED_AT_ONCE);
            let (found, _) = self.service.ask(Lane::Steps, self.names.root(), found).await?;
            let is_last = found.len() < SETTLED_AT_ONCE;
            let settled = found.into_iter().map(|document| async move {
                let key = Key::from_encoded(text_of(&document, "key")?)?;
                // It was found by what it said of the session, and is not found again.
                let settle = |step: &mut Operation<'_>| {
                    step.settle_all();
                    step.write_anew();
                };
                self.step(&key, wanted, settle).await
            });
            let mut settled = futures_util::stream::iter(settled).buffer_unordered(AT_ONCE);
            while let Some(done) = settled.next().await {
                done?;
            }
            if is_last {
                break;
            }
        }
        Ok(())
    }

    /// Housekeeping now and then. Nobody waits for it, and what fails is done another time.
    pub(super) fn tidy(self: &Arc<Self>) {
        let now = self.clock.now();
        {
            let mut swept = lock(&self.swept);
            if now.since(*swept) < SWEEP_EVERY {
                return;
            }
            // Processes that began together do not sweep together.
            *swept = now.before(jitter(SWEEP_EVERY / 4));
        }
        if let Ok(runtime) = self.service.runtime() {
            let inner = self.clone();
            runtime.spawn(async move {
                let waits = Arc::new(());
                drop(inner.sweep(&Interest::by(&waits)).await);
            });
        }
    }

    /// Deletes what is over: sessions with all that they left, and keys that time has freed. What fails keeps nothing else.
    async fn sweep(&self, wanted: &Interest) -> Result<()> {
        let (_, now) = self.service.read(Lane::Steps, &[self.names.session(SessionId::random()?)]).await?;
        let over = vec![(Operator::LessThan, timestamp(now))];
        let sessions = query(self.names.sessions(), "swept_after", over.clone(), true, SWEPT_AT_ONCE);
        let (sessions, now) = self.service.ask(Lane::Steps, self.names.root(), sessions).await?;
        for document in sessions {
            drop(self.sweep_session(document, now, wanted).await);
        }
        let keys = query(self.names.keys(), "expire_at", over, true, SWEPT_AT_ONCE);
        let (keys, _) = self.service.ask(Lane::Steps, self.names.root(), keys).await?;
        for document in keys {
            drop(self.sweep_key(&document, wanted).await);
        }
        Ok(())
    }

    async fn sweep_session(&self, document: api::Document, now: u64, wanted: &Interest) -> Result<()> {
        let (record, written) = SessionRecord::read(&document)?;
        let id = document.name.rsplit('/').next().and_then(SessionId::from_hex);
        let (Some(session), true) = (id, may_go(&record, written, now)?) else { return Ok(()) };
        self.settle_keys_of(session, wanted).await?;
        let calls = query(self.names.calls(), "key", Vec::new(), false, 400);
        let (calls, _) = self.service.ask(Lane::Steps, &document.name, calls).await?;
        let mut writes: Vec<_> = calls.into_iter().map(|call| delete(call.name, Only::Always)).collect();
        if writes.len() < 400 {
            writes.push(delete(document.name, Only::IfStill(written)));
        }
        drop(self.service.commit(Lane::Steps, writes).await);
        Ok(())
    }

    async fn sweep_key(&self, document: &api::Document, wanted: &Interest) -> Result<()> {
        let key = Key::from_encoded(text_of(document, "key")?)?;
        self.step(&key, wanted, |_| ()).await.map(drop)
    }
}
