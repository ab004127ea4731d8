//! Lists keys by a query, in order, a page at a time. Nothing is written: what is over is left out.

use std::collections::HashSet;
use std::sync::Arc;

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use googleapis_tonic_google_firestore_v1::google::firestore::v1::structured_query::field_filter::Operator;

use super::connect::Lane;
use super::document::{query, text, text_of};
use super::record::{KeyRecord, session_of};
use super::step::{Life, Loaded, Operation};
use super::{Inner, reply};
use crate::error::{Error, ErrorKind, Result};
use crate::key::Key;
use crate::store::{Cursor, DamagedEntry, Listing, MAX_ROWS_PER_PAGE, Reply};
use crate::token::SessionId;

/// Maximum number of documents that one query reads.
const MAX_DOCUMENTS: usize = 300;

/// Number of waiters on a page of a queue, about.
const WAITERS_PER_LEAF: usize = 200;

impl Inner {
    pub(super) async fn list(&self, prefix: &str, cursor: Option<&Cursor>, limit: usize) -> Result<Reply<Listing>> {
        let condition = match cursor.map(Cursor::as_str).filter(|after| *after >= prefix) {
            Some(after) => (Operator::GreaterThan, text(after)),
            None => (Operator::GreaterThanOrEqual, text(prefix)),
        };
        let limit = limit.clamp(1, MAX_DOCUMENTS);
        let page = query(self.names.keys(), "key", vec![condition], true, limit);
        let (documents, now) = self.service.ask(Lane::Steps, self.names.root(), page).await?;
        self.tell(now);
        let mut listing = Listing::default();
        let (mut found, mut rows, mut last) = (Vec::new(), 0, None);
        let mut is_last = documents.len() < limit;
        for document in &documents {
            // The query gives only those that have it, as a text.
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
        self.show(found, now, &mut listing).await?;
        Ok(reply(now, listing))
    }

    /// All of a listed key, or what is wrong with it. None: the page has no room for it.
    async fn read_listed(
        &self,
        document: &api::Document,
        name: &str,
        rows: &mut usize,
        is_first: bool,
    ) -> Result<std::result::Result<Option<(Key, Loaded)>, String>> {
        let read = Key::from_encoded(name).and_then(|key| Ok((key, KeyRecord::read(document)?.0)));
        let (key, record) = match read {
            Ok(read) => read,
            Err(problem) => return Ok(Err(problem.message().to_owned())),
        };
        if document.name != self.names.key(&key) {
            return Ok(Err("its document is not where that of this key is looked for".into()));
        }
        *rows += record.holds.len() + record.front.len() + record.pages.len() * WAITERS_PER_LEAF;
        if *rows > MAX_ROWS_PER_PAGE && !is_first {
            return Ok(Ok(None));
        }
        let loaded = match self.load_rest(document).await {
            // It changes just now.
            Ok(None) => self.load(&key).await.map(|(loaded, _)| loaded),
            loaded => loaded.map(|loaded| loaded.map(|(loaded, _)| loaded).unwrap_or_default()),
        };
        match loaded {
            Ok(loaded) => Ok(Ok(Some((key, loaded)))),
            Err(fault) if is_damage(&fault) => Ok(Err(fault.message().to_owned())),
            Err(fault) => Err(fault),
        }
    }

    /// Lists what is neither over nor of a dead session.
    async fn show(&self, found: Vec<(Key, Loaded)>, now: u64, listing: &mut Listing) -> Result<()> {
        let (mut lives, mut now) = (self.sessions.known(), now);
        let mut unreadable = HashSet::new();
        loop {
            let (mut keys, mut damaged, mut unknown) = (Vec::new(), Vec::new(), HashSet::new());
            for (key, loaded) in &found {
                let mut step = Operation::new(key, &self.names, loaded, &lives, now);
                step.end_what_is_over();
                step.settle_all();
                unknown.extend(step.unknown());
                if step.sessions().any(|session| session_of(session).is_ok_and(|it| unreadable.contains(&it))) {
                    let problem = "the session of a holder or of a waiter cannot be read";
                    damaged.push(DamagedEntry::new(key.as_encoded(), problem));
                } else if !step.is_idle() {
                    keys.push(step.state());
                }
            }
            if unknown.is_empty() {
                listing.keys = keys;
                listing.damaged.append(&mut damaged);
                return Ok(());
            }
            let unknown: Vec<SessionId> = unknown.into_iter().collect();
            let (read, later) = match self.sessions.read(&self.service, &self.names, &unknown).await {
                Err(fault) if is_damage(&fault) => self.read_each(&unknown, &mut unreadable, now).await?,
                read => read?,
            };
            lives.extend(read);
            now = now.max(later);
        }
    }

    /// Reads sessions one by one, because one of them cannot be read.
    async fn read_each(
        &self,
        sessions: &[SessionId],
        unreadable: &mut HashSet<SessionId>,
        now: u64,
    ) -> Result<(Vec<(SessionId, Life)>, u64)> {
        let (mut lives, mut now) = (Vec::new(), now);
        for session in sessions {
            match self.sessions.read(&self.service, &self.names, std::slice::from_ref(session)).await {
                Ok((read, later)) => {
                    lives.extend(read);
                    now = now.max(later);
                }
                Err(fault) if is_damage(&fault) => {
                    unreadable.insert(*session);
                    // As if it lived: the keys that it has are named.
                    lives.push((*session, Life { ends: u64::MAX, owner: Arc::default(), document: None }));
                }
                Err(fault) => return Err(fault),
            }
        }
        Ok((lives, now))
    }
}

/// A fault that is one of the data and not of the service.
fn is_damage(fault: &Error) -> bool {
    matches!(fault.kind(), ErrorKind::Internal | ErrorKind::Misconfigured)
}
