//! Wraps a store and puts all keys into one of its namespaces, so that tenants cannot see each other's keys.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::*;
use crate::error::{Error, ErrorKind};
use crate::key::{check_namespace, namespace_prefix, normal};

/// Wraps a store and puts every key, including the key's own namespace, into one namespace of that store.
///
/// [`Builder::namespace`](crate::Builder::namespace) does the same for one handle. `Prefixed` is for code that opens
/// its own handles: in any namespace, that code can only see and lock keys under the prefix. Sessions are not
/// separated, because their ids are random.
///
/// In the wrapped store, the key `job` without a namespace becomes the key `:job` of the namespace `prefix`, and the
/// key `job` of the namespace `night` becomes `5:nightjob` ([`Key::as_encoded`]).
///
/// ```
/// use stanchion::{Locks, store::{Memory, Prefixed}};
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let store = Memory::new();
/// let one = Locks::with_store(Prefixed::new(store.clone(), "tenant-1")?).await?;
/// let two = Locks::with_store(Prefixed::new(store.clone(), "tenant-2")?).await?;
/// let guard = one.lock("job").await?;
/// assert!(!two.is_locked("job").await?, "the other tenant has its own key");
/// assert_eq!(two.list("").await?.len(), 0);
///
/// let everything = Locks::builder_with_store(store).namespace("tenant-1").open().await?;
/// assert!(everything.is_locked(":job").await?);
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct Prefixed<S> {
    inner: S,
    prefix: Arc<str>,
}

impl<S: Store> Prefixed<S> {
    /// Wraps a store and separates its keys from the keys of other prefixes.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`](crate::ErrorKind::InvalidArgument) if the prefix is not a valid namespace: 1 to
    /// 128 bytes, no NUL, and no U+0001 at its beginning.
    pub fn new(store: S, prefix: &str) -> Result<Self> {
        let prefix = normal(prefix);
        if prefix.is_empty() {
            let message = "the prefix is empty: use 1 to 128 bytes, or use the store without a prefix";
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        check_namespace(&prefix)?;
        Ok(Self { inner: store, prefix: prefix.into() })
    }

    fn within(&self, key: &Key) -> Key {
        key.within(&self.prefix)
    }
}

/// Removes the prefix from the key of a lost token.
///
/// Returns `None` if the key does not have the prefix: code that uses the store without the prefix may lock any key.
fn without_prefix(lost: LostToken, prefix: &str) -> Option<LostToken> {
    Some(LostToken { key: lost.key.without(prefix).ok()?, ..lost })
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<S: Store> Store for Prefixed<S> {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn open_session(&self, request: OpenSession) -> Result<Reply<OpenOutcome>> {
        self.inner.open_session(request).await
    }

    async fn renew_session(&self, session: SessionId) -> Result<Reply<RenewOutcome>> {
        let Reply { time, outcome } = self.inner.renew_session(session).await?;
        let outcome = match outcome {
            RenewOutcome::Alive { lost: tokens } => {
                let lost = tokens.into_iter().filter_map(|token| without_prefix(token, &self.prefix));
                RenewOutcome::Alive { lost: lost.collect() }
            }
            RenewOutcome::Gone => RenewOutcome::Gone,
        };
        Ok(Reply { time, outcome })
    }

    async fn close_session(&self, session: SessionId) -> Result<Reply<()>> {
        self.inner.close_session(session).await
    }

    async fn session_lives(&self, session: SessionId) -> Result<Reply<bool>> {
        self.inner.session_lives(session).await
    }

    async fn acquire(&self, mut request: AcquireRequest) -> Result<Reply<AcquireOutcome>> {
        let key = request.key;
        request.key = self.within(&key);
        self.inner.acquire(request).await.map_err(|fault| fault.replace_key(&key))
    }

    async fn poll(&self, key: &Key, tokens: &[TokenId]) -> Result<Reply<Vec<PollOutcome>>> {
        self.inner.poll(&self.within(key), tokens).await.map_err(|fault| fault.replace_key(key))
    }

    async fn abandon(&self, key: &Key, token: TokenId) -> Result<Reply<EndOutcome>> {
        self.inner.abandon(&self.within(key), token).await.map_err(|fault| fault.replace_key(key))
    }

    async fn release(&self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<Reply<EndOutcome>> {
        self.inner.release(&self.within(key), token, cooldown).await.map_err(|fault| fault.replace_key(key))
    }

    async fn extend(&self, key: &Key, token: TokenId, ttl: Duration) -> Result<Reply<ExtendOutcome>> {
        self.inner.extend(&self.within(key), token, ttl).await.map_err(|fault| fault.replace_key(key))
    }

    async fn linger(&self, key: &Key, token: TokenId) -> Result<Reply<LingerOutcome>> {
        self.inner.linger(&self.within(key), token).await.map_err(|fault| fault.replace_key(key))
    }

    async fn adopt(&self, mut request: AdoptRequest) -> Result<Reply<AdoptOutcome>> {
        let key = request.key;
        request.key = self.within(&key);
        self.inner.adopt(request).await.map_err(|fault| fault.replace_key(&key))
    }

    async fn force_release(&self, mut request: ForceReleaseRequest) -> Result<Reply<ForceReleaseOutcome>> {
        let key = request.key;
        request.key = self.within(&key);
        self.inner.force_release(request).await.map_err(|fault| fault.replace_key(&key))
    }

    async fn inspect(&self, key: &Key) -> Result<Reply<KeyState>> {
        let mut reply = self.inner.inspect(&self.within(key)).await.map_err(|fault| fault.replace_key(key))?;
        reply.outcome.key = key.clone();
        Ok(reply)
    }

    async fn list(&self, prefix: &str, cursor: Option<&Cursor>, limit: usize) -> Result<Reply<Listing>> {
        let own = namespace_prefix(&self.prefix);
        let Reply { time, mut outcome } = self.inner.list(&(own.clone() + prefix), cursor, limit).await?;
        let within = |state: KeyState| Some(KeyState { key: state.key.without(&self.prefix).ok()?, ..state });
        outcome.keys = outcome.keys.into_iter().filter_map(within).collect();
        for entry in &mut outcome.damaged {
            entry.name = entry.name.strip_prefix(&own).unwrap_or(&entry.name).to_owned();
        }
        Ok(Reply { time, outcome })
    }

    fn grants(&self, session: SessionId) -> GrantStream {
        let prefix = self.prefix.clone();
        // A session of this store has no key outside of the prefix, so the push is wrong, and the session polls
        // instead.
        self.inner.grants(session).filter_map(move |push| match push {
            Push::Granted { key, token, fence } => {
                let key = key.without(&prefix).ok();
                Some(key.map_or(Push::RecheckAll, |key| Push::Granted { key, token, fence }))
            }
            Push::ForceReleased(token) => {
                Some(without_prefix(token, &prefix).map_or(Push::RecheckAll, Push::ForceReleased))
            }
            other => Some(other),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Locks;

    #[tokio::test]
    async fn list_skips_foreign_keys_in_the_namespace() {
        let store = Memory::new();
        let without_prefix = Locks::builder_with_store(store.clone()).namespace("tenant").open().await.unwrap();
        // The library never creates a prefixed key that begins like these, and the last one has no name.
        let _foreign = without_prefix.lock_all(["#", "$", "a", "1:n"]).await.unwrap();
        let prefixed = Prefixed::new(store, "tenant").unwrap();
        let locks = Locks::with_store(prefixed.clone()).await.unwrap();
        let _own = locks.lock_all(["x", "y"]).await.unwrap();
        for limit in 1..4 {
            let (mut cursor, mut found) = (None, Vec::new());
            loop {
                let page = prefixed.list("", cursor.as_ref(), limit).await.unwrap().outcome;
                assert!(page.len() <= limit && page.damaged.is_empty());
                found.extend(page.keys.iter().map(|state| state.key.name().to_owned()));
                cursor = page.next;
                if cursor.is_none() {
                    break;
                }
            }
            assert_eq!(found, ["x", "y"], "{limit} at a time");
        }
    }
}
