//! Wraps a store and injects faults, for tests of code that uses a store.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;

use super::*;
use crate::clock::{Clock, VirtualClock};
use crate::error::{Error, ErrorKind};
use crate::sync::lock;

/// The name of an operation of a [`Store`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
#[allow(missing_docs, reason = "each is the store's method of that name")]
pub enum Operation {
    OpenSession,
    RenewSession,
    CloseSession,
    SessionLives,
    Acquire,
    Poll,
    Abandon,
    Release,
    Extend,
    Linger,
    Adopt,
    ForceRelease,
    Inspect,
    List,
}

impl Operation {
    /// Every operation.
    pub const ALL: &[Self] = &[
        Self::OpenSession,
        Self::RenewSession,
        Self::CloseSession,
        Self::SessionLives,
        Self::Acquire,
        Self::Poll,
        Self::Abandon,
        Self::Release,
        Self::Extend,
        Self::Linger,
        Self::Adopt,
        Self::ForceRelease,
        Self::Inspect,
        Self::List,
    ];

    /// Returns the name of the operation in lower case with underscores, as in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::OpenSession => "open_session",
            Self::RenewSession => "renew_session",
            Self::CloseSession => "close_session",
            Self::SessionLives => "session_lives",
            Self::Acquire => "acquire",
            Self::Poll => "poll",
            Self::Abandon => "abandon",
            Self::Release => "release",
            Self::Extend => "extend",
            Self::Linger => "linger",
            Self::Adopt => "adopt",
            Self::ForceRelease => "force_release",
            Self::Inspect => "inspect",
            Self::List => "list",
        }
    }
}

/// A fault of one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// The store never gets the request, and the caller gets a network timeout.
    LoseRequest,
    /// The store executes the operation, but the caller gets a network timeout instead of the reply.
    LoseReply,
    /// The store executes the operation this much later.
    Delay(Duration),
    /// The store executes the operation at once, and the caller gets the reply this much later.
    DelayReply(Duration),
    /// The store executes the operation twice.
    Repeat,
    /// The caller gets a network timeout, and the store executes the operation when the test calls [`Faults::deliver`].
    Hold,
    /// The store executes the operation at once, and again when the test calls [`Faults::deliver`]. No transport may do
    /// this to an `acquire` whose reply the caller has: see rule 7 of [`store`](crate::store).
    RepeatLater,
    /// The caller gets this error, and the store does not execute the operation.
    Fail(ErrorKind),
    /// The operation panics, as a defective store would.
    Panic,
}

/// Wraps a store and makes its operations fail as [`Faults`] configures.
///
/// ```
/// use stanchion::{Locks, store::{Fault, Faulty, Memory, Operation}};
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let store = Faulty::new(Memory::new());
/// let faults = store.faults();
/// let locks = Locks::with_store(store).await?;
/// faults.next(Operation::Acquire, Fault::LoseReply);
/// // The reply was lost, so the library retries with the same token and gets the same grant.
/// let guard = locks.lock("job").await?;
/// assert!(guard.is_held());
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct Faulty<S> {
    inner: Arc<S>,
    faults: Faults,
}

impl<S: Store> Faulty<S> {
    /// Wraps a store, which then fails only as [`Faults`] configures. Delays use the system clock.
    pub fn new(store: S) -> Self {
        Self::with_delays(store, None)
    }

    /// Wraps a store as [`new`](Self::new) does, with delays on a virtual clock.
    pub fn with_clock(store: S, time: &VirtualClock) -> Self {
        Self::with_delays(store, Some(time.clock()))
    }

    fn with_delays(store: S, clock: Option<Clock>) -> Self {
        let plan = Plan { clock, script: Mutex::default(), lose_pushes: Arc::default() };
        Self { inner: Arc::new(store), faults: Faults(Arc::new(plan)) }
    }

    /// Returns the handle that configures the faults.
    pub fn faults(&self) -> Faults {
        self.faults.clone()
    }
}

/// Configures the faults of a [`Faulty`] store. Clones share one configuration.
#[derive(Clone, Debug)]
pub struct Faults(Arc<Plan>);

#[derive(Debug)]
struct Plan {
    /// `None` means the system clock, whose timers no keeper thread drives here.
    clock: Option<Clock>,
    script: Mutex<Script>,
    lose_pushes: Arc<AtomicBool>,
}

type Held = Pin<Box<dyn Future<Output = ()> + Send>>;

#[derive(Default)]
struct Script {
    once: HashMap<Operation, VecDeque<Fault>>,
    always: HashMap<Operation, Fault>,
    random: Option<Random>,
    held: Vec<Held>,
    calls: HashMap<Operation, u64>,
    fired: HashMap<(Operation, Fault), u64>,
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Script").field("once", &self.once).field("always", &self.always).finish_non_exhaustive()
    }
}

/// A small random number generator, so that a seed replays a run. The quality of its numbers does not matter.
struct Random {
    state: u64,
    per_mille: u32,
    faults: Vec<Fault>,
}

impl Random {
    fn number(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

impl Faults {
    /// Injects a fault into the next call of this operation. Several faults are used one call each, in order.
    pub fn next(&self, operation: Operation, fault: Fault) {
        self.script().once.entry(operation).or_default().push_back(fault);
    }

    /// Injects a fault into every call of this operation until [`clear`](Faults::clear).
    pub fn always(&self, operation: Operation, fault: Fault) {
        self.script().always.insert(operation, fault);
    }

    /// Injects one of these faults into about `per_mille` of 1,000 calls. The same seed replays the same choices.
    pub fn randomly(&self, seed: u64, per_mille: u32, faults: &[Fault]) {
        self.script().random = Some(Random { state: seed, per_mille, faults: faults.to_vec() });
    }

    /// Drops every push while `lose` is set.
    pub fn lose_pushes(&self, lose: bool) {
        self.0.lose_pushes.store(lose, Ordering::SeqCst);
    }

    /// Removes all faults. Operations that [`Fault::Hold`] holds back stay held back.
    pub fn clear(&self) {
        let mut script = self.script();
        script.once.clear();
        script.always.clear();
        script.random = None;
        self.0.lose_pushes.store(false, Ordering::SeqCst);
    }

    /// Executes the operations that were held back, in the order of their calls, and returns their number.
    pub async fn deliver(&self) -> usize {
        let held = std::mem::take(&mut self.script().held);
        let count = held.len();
        for operation in held {
            operation.await;
        }
        count
    }

    /// Returns the number of operations that are held back.
    pub fn held(&self) -> usize {
        self.script().held.len()
    }

    /// Returns the number of calls of this operation.
    pub fn count(&self, operation: Operation) -> u64 {
        self.script().calls.get(&operation).copied().unwrap_or(0)
    }

    /// Returns how often each fault happened.
    pub fn fired(&self) -> HashMap<(Operation, Fault), u64> {
        self.script().fired.clone()
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        lock(&self.0.script)
    }

    fn choose(&self, operation: Operation) -> Option<Fault> {
        let mut script = self.script();
        *script.calls.entry(operation).or_default() += 1;
        let once = script.once.get_mut(&operation).and_then(VecDeque::pop_front);
        let fault = once.or_else(|| script.always.get(&operation).copied()).or_else(|| {
            let random = script.random.as_mut()?;
            if random.number() % 1_000 >= u64::from(random.per_mille) || random.faults.is_empty() {
                return None;
            }
            let at = random.number() % random.faults.len() as u64;
            random.faults.get(usize::try_from(at).unwrap_or(0)).copied()
        })?;
        *script.fired.entry((operation, fault)).or_default() += 1;
        Some(fault)
    }

    /// Executes an operation with the fault that is due. Each call of `run` creates a future of the operation.
    async fn execute<T, F, A>(&self, operation: Operation, run: A) -> Result<T>
    where
        A: Fn() -> F + Send + Sync,
        F: Future<Output = Result<T>> + Send + 'static,
        T: Send,
    {
        let timed_out = || Error::new(ErrorKind::NetworkTimeout, "no reply arrived (injected fault)");
        match self.choose(operation) {
            None => run().await,
            Some(Fault::LoseRequest) => Err(timed_out()),
            Some(Fault::LoseReply) => run().await.and_then(|_| Err(timed_out())),
            Some(Fault::Delay(span)) => {
                self.sleep(span).await;
                run().await
            }
            Some(Fault::DelayReply(span)) => {
                let reply = run().await;
                self.sleep(span).await;
                reply
            }
            Some(Fault::Repeat) => {
                let first = run().await;
                let _ = run().await; // the caller gets the first reply
                first
            }
            Some(Fault::Hold) => {
                self.hold(run());
                Err(timed_out())
            }
            Some(Fault::RepeatLater) => {
                self.hold(run());
                run().await
            }
            #[allow(clippy::panic, reason = "the test asked for a panic")]
            Some(Fault::Panic) => panic!("injected fault"),
            Some(Fault::Fail(kind)) => Err(Error::new(kind, "injected fault").in_doubt(false)),
        }
    }

    async fn sleep(&self, span: Duration) {
        if let Some(clock) = &self.0.clock {
            return clock.sleep(span).await;
        }
        let (wake, woken) = tokio::sync::oneshot::channel::<()>();
        std::thread::spawn(move || {
            std::thread::sleep(span);
            drop(wake);
        });
        let _ = woken.await; // an error: the thread drops the sender when the time has passed
    }

    fn hold<T>(&self, operation: impl Future<Output = Result<T>> + Send + 'static) {
        self.script().held.push(Box::pin(async move {
            let _ = operation.await; // its caller already got a timeout or another reply
        }));
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<S: Store> Store for Faulty<S> {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn open_session(&self, request: OpenSession) -> Result<Reply<OpenOutcome>> {
        let run = || {
            let (inner, request) = (self.inner.clone(), request.clone());
            async move { inner.open_session(request).await }
        };
        self.faults.execute(Operation::OpenSession, run).await
    }

    async fn renew_session(&self, session: SessionId) -> Result<Reply<RenewOutcome>> {
        let run = || {
            let inner = self.inner.clone();
            async move { inner.renew_session(session).await }
        };
        self.faults.execute(Operation::RenewSession, run).await
    }

    async fn close_session(&self, session: SessionId) -> Result<Reply<()>> {
        let run = || {
            let inner = self.inner.clone();
            async move { inner.close_session(session).await }
        };
        self.faults.execute(Operation::CloseSession, run).await
    }

    async fn session_lives(&self, session: SessionId) -> Result<Reply<bool>> {
        let run = || {
            let inner = self.inner.clone();
            async move { inner.session_lives(session).await }
        };
        self.faults.execute(Operation::SessionLives, run).await
    }

    async fn acquire(&self, request: AcquireRequest) -> Result<Reply<AcquireOutcome>> {
        let run = || {
            let (inner, request) = (self.inner.clone(), request.clone());
            async move { inner.acquire(request).await }
        };
        self.faults.execute(Operation::Acquire, run).await
    }

    async fn poll(&self, key: &Key, tokens: &[TokenId]) -> Result<Reply<Vec<PollOutcome>>> {
        let run = || {
            let (inner, key, tokens) = (self.inner.clone(), key.clone(), tokens.to_vec());
            async move { inner.poll(&key, &tokens).await }
        };
        self.faults.execute(Operation::Poll, run).await
    }

    async fn abandon(&self, key: &Key, token: TokenId) -> Result<Reply<EndOutcome>> {
        let run = || {
            let (inner, key) = (self.inner.clone(), key.clone());
            async move { inner.abandon(&key, token).await }
        };
        self.faults.execute(Operation::Abandon, run).await
    }

    async fn release(&self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<Reply<EndOutcome>> {
        let run = || {
            let (inner, key) = (self.inner.clone(), key.clone());
            async move { inner.release(&key, token, cooldown).await }
        };
        self.faults.execute(Operation::Release, run).await
    }

    async fn extend(&self, key: &Key, token: TokenId, ttl: Duration) -> Result<Reply<ExtendOutcome>> {
        let run = || {
            let (inner, key) = (self.inner.clone(), key.clone());
            async move { inner.extend(&key, token, ttl).await }
        };
        self.faults.execute(Operation::Extend, run).await
    }

    async fn linger(&self, key: &Key, token: TokenId) -> Result<Reply<LingerOutcome>> {
        let run = || {
            let (inner, key) = (self.inner.clone(), key.clone());
            async move { inner.linger(&key, token).await }
        };
        self.faults.execute(Operation::Linger, run).await
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Reply<AdoptOutcome>> {
        let run = || {
            let (inner, request) = (self.inner.clone(), request.clone());
            async move { inner.adopt(request).await }
        };
        self.faults.execute(Operation::Adopt, run).await
    }

    async fn force_release(&self, request: ForceReleaseRequest) -> Result<Reply<ForceReleaseOutcome>> {
        let run = || {
            let (inner, request) = (self.inner.clone(), request.clone());
            async move { inner.force_release(request).await }
        };
        self.faults.execute(Operation::ForceRelease, run).await
    }

    async fn inspect(&self, key: &Key) -> Result<Reply<KeyState>> {
        let run = || {
            let (inner, key) = (self.inner.clone(), key.clone());
            async move { inner.inspect(&key).await }
        };
        self.faults.execute(Operation::Inspect, run).await
    }

    async fn list(&self, prefix: &str, cursor: Option<&Cursor>, limit: usize) -> Result<Reply<Listing>> {
        let run = || {
            let (inner, prefix, cursor) = (self.inner.clone(), prefix.to_owned(), cursor.cloned());
            async move { inner.list(&prefix, cursor.as_ref(), limit).await }
        };
        self.faults.execute(Operation::List, run).await
    }

    fn grants(&self, session: SessionId) -> GrantStream {
        let lose = self.faults.0.lose_pushes.clone();
        self.inner.grants(session).filter_map(move |push| (!lose.load(Ordering::SeqCst)).then_some(push))
    }
}
