//! Wraps a store and reports each operation to a function, for measuring and for tests that count operations.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::*;
use crate::clock::{BootTime, Clock};
use crate::error::{Error, ErrorKind};

/// The report of one finished operation.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct OperationDone<'a> {
    /// The operation.
    pub operation: Operation,
    /// The key of the operation, if it has one.
    pub key: Option<&'a Key>,
    /// Time from the request to the reply.
    pub took: Duration,
    /// The kind of the error, if the operation failed.
    pub error: Option<ErrorKind>,
}

/// Wraps a store and calls a function after each operation. An operation whose future is dropped is not reported.
///
/// ```
/// use std::sync::atomic::{AtomicU32, Ordering};
/// use stanchion::{Locks, store::{Memory, Observed}};
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// static OPERATIONS: AtomicU32 = AtomicU32::new(0);
/// let store = Observed::new(Memory::new(), |done| {
///     println!("{:?} took {:?}", done.operation, done.took);
///     OPERATIONS.fetch_add(1, Ordering::Relaxed);
/// });
/// Locks::with_store(store).await?.lock("job").await?.release().await?;
/// assert!(OPERATIONS.load(Ordering::Relaxed) >= 3, "open_session, acquire, release");
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
#[derive(Clone)]
pub struct Observed<S> {
    inner: S,
    clock: Clock,
    report: Arc<dyn Fn(&OperationDone<'_>) + Send + Sync>,
}

impl<S: Store> Observed<S> {
    /// Wraps a store. After each operation, `report` runs on the caller's task or thread, so it must not block.
    pub fn new(store: S, report: impl Fn(&OperationDone<'_>) + Send + Sync + 'static) -> Self {
        Self { inner: store, clock: Clock::system(), report: Arc::new(report) }
    }

    fn done(&self, operation: Operation, key: Option<&Key>, start: BootTime, error: Option<&Error>) {
        let took = self.clock.now().since(start);
        (self.report)(&OperationDone { operation, key, took, error: error.map(Error::kind) });
    }
}

impl<S: fmt::Debug> fmt::Debug for Observed<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Observed").field(&self.inner).finish()
    }
}

macro_rules! observe {
    ($self:ident, $operation:ident, $key:expr, $call:expr) => {{
        let start = $self.clock.now();
        let key: Option<Key> = $key;
        let reply = $call.await;
        $self.done(Operation::$operation, key.as_ref(), start, reply.as_ref().err());
        reply
    }};
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<S: Store> Store for Observed<S> {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn open_session(&self, request: OpenSession) -> Result<Reply<OpenOutcome>> {
        observe!(self, OpenSession, None, self.inner.open_session(request))
    }

    async fn renew_session(&self, session: SessionId) -> Result<Reply<RenewOutcome>> {
        observe!(self, RenewSession, None, self.inner.renew_session(session))
    }

    async fn close_session(&self, session: SessionId) -> Result<Reply<()>> {
        observe!(self, CloseSession, None, self.inner.close_session(session))
    }

    async fn session_lives(&self, session: SessionId) -> Result<Reply<bool>> {
        observe!(self, SessionLives, None, self.inner.session_lives(session))
    }

    async fn acquire(&self, request: AcquireRequest) -> Result<Reply<AcquireOutcome>> {
        observe!(self, Acquire, Some(request.key.clone()), self.inner.acquire(request))
    }

    async fn poll(&self, key: &Key, tokens: &[TokenId]) -> Result<Reply<Vec<PollOutcome>>> {
        observe!(self, Poll, Some(key.clone()), self.inner.poll(key, tokens))
    }

    async fn abandon(&self, key: &Key, token: TokenId) -> Result<Reply<EndOutcome>> {
        observe!(self, Abandon, Some(key.clone()), self.inner.abandon(key, token))
    }

    async fn release(&self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<Reply<EndOutcome>> {
        observe!(self, Release, Some(key.clone()), self.inner.release(key, token, cooldown))
    }

    async fn extend(&self, key: &Key, token: TokenId, ttl: Duration) -> Result<Reply<ExtendOutcome>> {
        observe!(self, Extend, Some(key.clone()), self.inner.extend(key, token, ttl))
    }

    async fn linger(&self, key: &Key, token: TokenId) -> Result<Reply<LingerOutcome>> {
        observe!(self, Linger, Some(key.clone()), self.inner.linger(key, token))
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Reply<AdoptOutcome>> {
        observe!(self, Adopt, Some(request.key.clone()), self.inner.adopt(request))
    }

    async fn force_release(&self, request: ForceReleaseRequest) -> Result<Reply<ForceReleaseOutcome>> {
        observe!(self, ForceRelease, Some(request.key.clone()), self.inner.force_release(request))
    }

    async fn inspect(&self, key: &Key) -> Result<Reply<KeyState>> {
        observe!(self, Inspect, Some(key.clone()), self.inner.inspect(key))
    }

    async fn list(&self, prefix: &str, cursor: Option<&Cursor>, limit: usize) -> Result<Reply<Listing>> {
        observe!(self, List, None, self.inner.list(prefix, cursor, limit))
    }

    fn grants(&self, session: SessionId) -> GrantStream {
        self.inner.grants(session)
    }
}
