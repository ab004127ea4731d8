//! Lists keys in order, one page per query. It writes nothing and skips expired holds and waiters.

use std::collections::HashSet;
use std::sync::Arc;

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use googleapis_tonic_google_firestore_v1::google::firestore::v1::structured_query::field_filter::Operator;

use super::connect::Lane;
use super::document::{query, text, text_of};
use super::record::{KeyRecord, session_of};
use super::update::{KeyUpdate, LoadedKey, SessionState};
use super::{Inner, reply};
use crate::error::{Error, ErrorKind, Result};
use crate::key::Key;
use crate::store::{Cursor, DamagedEntry, Listing, MAX_ROWS_PER_PAGE, Reply};
use crate::token::SessionId;

/// Maximum number of documents that one query reads.
const MAX_DOCUMENTS: usize = 300;

/// Approximate number of waiters in a queue page.
const WAITERS_PER_PAGE: usize = 200;

impl Inner {
    pub(super) async fn list(&self, prefix: &str, cursor: Option<&Cursor>, limit: usize) -> Result<Reply<Listing>> {
        let condition = match cursor.map(Cursor::as_str).filter(|after| *after >= prefix) {
            Some(after) => (Operator::GreaterThan, text(after)),
            None => (Operator::GreaterThanOrEqual, text(prefix)),
        };
        let limit = limit.clamp(1, MAX_DOCUMENTS);
        let page = query(self.names.keys(), "key", vec![condition], true, limit);
        let (documents, now) = self.service.run_query(Lane::Keys, self.names.root(), page).await?;
        self.observe_time(now);
        let mut listing = Listing::default();
        let (mut found, mut rows, mut last) = (Vec::new(), 0, None);
        let mut is_last = documents.len() < limit;
        for document in &documents {
            // The query returns only documents with a text in this field.
            let name = text_of(document, "key")?;
            if !name.starts_with(prefix) {
                is_last = true;
                break;
            }
            match self.read_listed(document, name, &mut rows, last.is_none()).await? {
                Ok(Some(loaded)) => found.push(loaded),
                Ok(None) => {
                    is_last = false;
                    break;
                }
                Err(problem) => listing.damaged.push(DamagedEntry::new(name, problem)),
            }
            last = Some(name);
        }
        listing.next = last.filter(|_| !is_last).map(Cursor::new);
        self.describe(found, now, &mut listing).await?;
        Ok(reply(now, listing))
    }

    /// Reads a listed key with its queue. Returns `None` if the page has no room for it, and a description if the key
    /// is damaged.
    async fn read_listed(
        &self,
        document: &api::Document,
        name: &str,
        rows: &mut usize,
        is_first: bool,
    ) -> Result<std::result::Result<Option<(Key, LoadedKey)>, String>> {
        let read = Key::from_encoded(name).and_then(|key| Ok((key, KeyRecord::read(document)?.0)));
        let (key, record) = match read {
            Ok(read) => read,
            Err(problem) => return Ok(Err(problem.message().to_owned())),
        };
        if document.name != self.names.key(&key) {
            return Ok(Err("the document's name does not match its key".into()));
        }
        *rows += record.holds.len() + record.front.len() + record.pages.len() * WAITERS_PER_PAGE;
        if *rows > MAX_ROWS_PER_PAGE && !is_first {
            return Ok(Ok(None));
        }
        let loaded = match self.load_pages(document).await {
            // The key is being changed, so read it again.
            Ok(None) => self.load(&key).await.map(|(loaded, _)| loaded),
            loaded => loaded.map(|loaded| loaded.map(|(loaded, _)| loaded).unwrap_or_default()),
        };
        match loaded {
            Ok(loaded) => Ok(Ok(Some((key, loaded)))),
            Err(fault) if is_damage(&fault) => Ok(Err(fault.message().to_owned())),
            Err(fault) => Err(fault),
        }
    }

    /// Adds the keys to the listing, without expired holds and waiters.
    async fn describe(&self, found: Vec<(Key, LoadedKey)>, now: u64, listing: &mut Listing) -> Result<()> {
        let (mut session_states, mut now) = (self.sessions.snapshot(), now);
        let mut unreadable = HashSet::new();
        loop {
            let (mut keys, mut damaged, mut unread) = (Vec::new(), Vec::new(), HashSet::new());
            for (key, loaded) in &found {
                let mut update = KeyUpdate::new(key, &self.names, loaded, &session_states, now);
                update.expire_holds();
                update.drop_expired_waiters();
                unread.extend(update.unread_sessions());
                if update.sessions().any(|session| session_of(session).is_ok_and(|it| unreadable.contains(&it))) {
                    let problem = "the session of a holder or waiter cannot be read";
                    damaged.push(DamagedEntry::new(key.as_encoded(), problem));
                } else if !update.is_idle() {
                    keys.push(update.state());
                }
            }
            if unread.is_empty() {
                listing.keys = keys;
                listing.damaged.append(&mut damaged);
                return Ok(());
            }
            let unread: Vec<SessionId> = unread.into_iter().collect();
            let (read, later) = match self.sessions.read(&self.service, &self.names, &unread).await {
                Err(fault) if is_damage(&fault) => self.read_each(&unread, &mut unreadable, now).await?,
                read => read?,
            };
            session_states.extend(read);
            now = now.max(later);
        }
    }

    /// Reads sessions one by one, because at least one of them is unreadable.
    async fn read_each(
        &self,
        sessions: &[SessionId],
        unreadable: &mut HashSet<SessionId>,
        now: u64,
    ) -> Result<(Vec<(SessionId, SessionState)>, u64)> {
        let (mut session_states, mut now) = (Vec::new(), now);
        for session in sessions {
            match self.sessions.read(&self.service, &self.names, std::slice::from_ref(session)).await {
                Ok((read, later)) => {
                    session_states.extend(read);
                    now = now.max(later);
                }
                Err(fault) if is_damage(&fault) => {
                    unreadable.insert(*session);
                    // Treat it as alive, so that its keys are reported as damaged.
                    session_states
                        .push((*session, SessionState { expires_at: u64::MAX, owner: Arc::default(), document: None }));
                }
                Err(fault) => return Err(fault),
            }
        }
        Ok((session_states, now))
    }
}

/// Returns whether the data caused the error, and not the service.
fn is_damage(fault: &Error) -> bool {
    matches!(fault.kind(), ErrorKind::Internal | ErrorKind::Misconfigured)
}
