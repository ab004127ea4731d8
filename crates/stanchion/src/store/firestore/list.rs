//! Listing keys: by a query, in order, and as every other step would see them.

use std::collections::BTreeSet;

use googleapis_tonic_google_firestore_v1::google::firestore::v1 as api;
use googleapis_tonic_google_firestore_v1::google::firestore::v1::structured_query::field_filter::Operator;

use super::connect::{Lane, Wanted};
use super::document::{query, text, text_of};
use super::step::Step;
use super::{Inner, reply};
use crate::error::Result;
use crate::key::Key;
use crate::store::{KeyState, Reply};

impl Inner {
    pub(super) async fn list(
        &self,
        prefix: &str,
        after: Option<&Key>,
        limit: usize,
        wanted: &Wanted,
    ) -> Result<Reply<Vec<KeyState>>> {
        let mut listed = Vec::new();
        let mut after = after.map(|after| after.as_encoded().to_owned());
        loop {
            let mut conditions = vec![(Operator::GreaterThanOrEqual, text(prefix))];
            if let Some(after) = after.as_deref().filter(|after| *after >= prefix) {
                conditions = vec![(Operator::GreaterThan, text(after))];
            }
            let wanted_now = (limit - listed.len()).clamp(1, 300);
            let page = query(self.names.keys(), "key", conditions, true, wanted_now);
            let (documents, now) = self.service.ask(Lane::Steps, self.names.root(), page).await?;
            self.tell(now);
            let is_last = documents.len() < wanted_now;
            let keys = documents.iter().map(|document| Key::from_encoded(text_of(document, "key")?));
            let keys = keys.collect::<Result<Vec<_>>>()?;
            let within = keys.iter().take_while(|key| key.as_encoded().starts_with(prefix)).count();
            let states = self.states(&documents[..within], &keys[..within], now, wanted).await?;
            let room = limit - listed.len();
            listed.extend(states.into_iter().take(room));
            after = keys.last().map(|key| key.as_encoded().to_owned());
            if is_last || within < keys.len() || listed.len() >= limit {
                return Ok(reply(now, listed));
            }
        }
    }

    /// What is known of keys whose documents are at hand. Those that are not idle.
    async fn states(
        &self,
        documents: &[api::Document],
        keys: &[Key],
        now: u64,
        wanted: &Wanted,
    ) -> Result<Vec<KeyState>> {
        let mut loaded = Vec::new();
        for document in documents {
            loaded.push(self.load_rest(document).await?);
        }
        let mut lives = self.sessions.known();
        let mut states = Vec::new();
        let mut now = now;
        loop {
            let mut unknown = BTreeSet::new();
            states.clear();
            for (key, loaded) in keys.iter().zip(&loaded) {
                let Some((loaded, _)) = loaded else {
                    states.push((key, None));
                    continue;
                };
                let mut step = Step::new(key, &self.names, loaded, &lives, now);
                step.settle();
                step.settle_all();
                step.settle();
                unknown.extend(step.unknown());
                let (state, is_idle) = (step.state(), step.is_idle());
                let is_settled = unknown.is_empty() && step.writes()?.0.is_empty();
                states.push((key, is_settled.then_some((state, is_idle))));
            }
            if unknown.is_empty() {
                break;
            }
            let unknown: Vec<_> = unknown.into_iter().collect();
            let (read, later) = self.sessions.read(&self.service, &self.names, &unknown).await?;
            lives.extend(read);
            now = now.max(later);
        }
        let mut seen = Vec::new();
        for (key, state) in states {
            let (state, is_idle) = match state {
                Some(state) => state,
                // Something is over, or changes just now.
                None => {
                    self.step(key, wanted, |step| {
                        step.settle_all();
                        step.settle();
                        (step.state(), step.is_idle())
                    })
                    .await?
                    .outcome
                }
            };
            if !is_idle {
                seen.push(state);
            }
        }
        Ok(seen)
    }
}
