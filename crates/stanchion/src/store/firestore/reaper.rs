//! Deletes the documents of expired sessions and of keys that nobody uses any more.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use googleapis_tonic_google_firestore_v1::google::firestore::v1::structured_query::field_filter::Operator;

use super::Inner;
use super::connect::{CallerWatch, Lane};
use super::document::{WriteIf, delete, id, query, text_of, timestamp};
use super::record::SessionRecord;
use super::session::is_reapable;
use super::update::KeyUpdate;
use crate::clock::jitter;
use crate::error::Result;
use crate::key::Key;
use crate::sync::lock;
use crate::token::SessionId;

/// Minimum interval between runs of the reaper, which renewals start.
const REAP_INTERVAL: Duration = Duration::from_secs(60);

/// Maximum number of sessions, and of keys, per run. A run must keep up with short-lived processes, because each of
/// them leaves one session and runs no reaper.
const MAX_REAPED: usize = 300;

/// Maximum number of keys that one query returns.
const KEYS_PER_QUERY: usize = 300;

/// Maximum number of keys that are reconciled at the same time.
const MAX_CONCURRENT_KEYS: usize = 16;

/// Maximum number of queries for the keys of one session.
const MAX_QUERIES: usize = 1_000;

/// Maximum number of notifications that one commit deletes.
const MAX_DELETED_NOTIFICATIONS: usize = 400;

impl Inner {
    /// Reconciles every key that refers to a session.
    pub(super) async fn reconcile_keys_of(&self, session: SessionId, caller: &CallerWatch) -> Result<()> {
        for _ in 0..MAX_QUERIES {
            let of_session = vec![(Operator::ArrayContains, id(session))];
            let found = query(self.names.keys(), "sessions", of_session, false, KEYS_PER_QUERY);
            let (found, _) = self.service.run_query(Lane::Keys, self.names.root(), found).await?;
            let is_last = found.len() < KEYS_PER_QUERY;
            let reconciled = found.into_iter().map(|document| async move {
                let key = Key::from_encoded(text_of(&document, "key")?)?;
                // Write the document even if its record is unchanged, so that its list of sessions is updated and the
                // query does not find it again.
                let reconcile = |update: &mut KeyUpdate<'_>| {
                    update.drop_expired_waiters();
                    update.always_write();
                };
                self.update(&key, caller, reconcile).await
            });
            let mut reconciled = futures_util::stream::iter(reconciled).buffer_unordered(MAX_CONCURRENT_KEYS);
            while let Some(done) = reconciled.next().await {
                done?;
            }
            if is_last {
                break;
            }
        }
        Ok(())
    }

    /// Starts the reaper in the background if it is due. A later run repeats any part that fails.
    pub(super) fn reap_if_due(self: &Arc<Self>) {
        let now = self.clock.now();
        {
            let mut last_reaped = lock(&self.last_reaped);
            if now.since(*last_reaped) < REAP_INTERVAL {
                return;
            }
            // Vary the interval, so that processes that started together do not reap together.
            *last_reaped = now.before(jitter(REAP_INTERVAL / 4));
        }
        if let Ok(runtime) = self.service.runtime() {
            let inner = self.clone();
            runtime.spawn(async move {
                let caller_token = Arc::new(());
                drop(inner.reap(&CallerWatch::of(&caller_token)).await);
            });
        }
    }

    /// Deletes expired sessions with their documents, and keys that time has freed. A failure on one of them does not
    /// stop the others.
    async fn reap(&self, caller: &CallerWatch) -> Result<()> {
        let (_, now) = self.service.read(Lane::Keys, &[self.names.session(SessionId::random()?)]).await?;
        let over = vec![(Operator::LessThan, timestamp(now))];
        let sessions = query(self.names.sessions(), "swept_after", over.clone(), true, MAX_REAPED);
        let (sessions, now) = self.service.run_query(Lane::Keys, self.names.root(), sessions).await?;
        for document in sessions {
            drop(self.reap_session(document, now, caller).await);
        }
        let keys = query(self.names.keys(), "expire_at", over, true, MAX_REAPED);
        let (keys, _) = self.service.run_query(Lane::Keys, self.names.root(), keys).await?;
        for document in keys {
            drop(self.reap_key(&document, caller).await);
        }
        Ok(())
    }

    async fn reap_session(&self, document: api::Document, now: u64, caller: &CallerWatch) -> Result<()> {
        let (record, written) = SessionRecord::read(&document)?;
        let id = document.name.rsplit('/').next().and_then(SessionId::from_hex);
        let (Some(session), true) = (id, is_reapable(&record, written, now)?) else { return Ok(()) };
        self.reconcile_keys_of(session, caller).await?;
        let notifications = query(self.names.notifications(), "key", Vec::new(), false, MAX_DELETED_NOTIFICATIONS);
        let (notifications, _) = self.service.run_query(Lane::Keys, &document.name, notifications).await?;
        let mut writes: Vec<_> =
            notifications.into_iter().map(|document| delete(document.name, WriteIf::Always)).collect();
        if writes.len() < MAX_DELETED_NOTIFICATIONS {
            writes.push(delete(document.name, WriteIf::Unchanged(written)));
        }
        drop(self.service.commit(Lane::Keys, writes).await);
        Ok(())
    }

    async fn reap_key(&self, document: &api::Document, caller: &CallerWatch) -> Result<()> {
        let key = Key::from_encoded(text_of(document, "key")?)?;
        self.update(&key, caller, |_| ()).await.map(drop)
    }
}
