//! A store that fails on purpose: for tests of what depends on a store.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;

use super::*;
use crate::clock::{Clock, VirtualClock};
use crate::error::{Error, ErrorKind};

/// One of the steps of a [`Store`].
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
    Adopt,
    ForceRelease,
    Inspect,
    List,
}

impl Operation {
    /// Every step.
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
        Self::Adopt,
        Self::ForceRelease,
        Self::Inspect,
        Self::List,
    ];

    /// Its name, in lower case with underscores: as logs and metrics have it.
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
            Self::Adopt => "adopt",
            Self::ForceRelease => "force_release",
            Self::Inspect => "inspect",
            Self::List => "list",
        }
    }
}

/// What goes wrong with a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// The request is lost; the caller sees a network timeout.
    LoseRequest,
    /// The step is done and its answer is lost; the caller sees a network timeout.
    LoseReply,
    /// The step is done this much later.
    Delay(Duration),
    /// The step is done at once and its answer comes this much later.
    DelayReply(Duration),
    /// The step is done twice.
    Repeat,
    /// The caller sees a network timeout; the step is done when [`Faults::deliver`] is called.
    Hold,
    /// The step is done, and once more when [`Faults::deliver`] is called. No transport may do this to an `acquire` that
    /// it has answered: see rule 7 of [`store`](crate::store).
    RepeatLater,
    /// The step is not done; the caller sees this error.
    Fail(ErrorKind),
    /// The step panics, as a defect of a store would.
    Panic,
}

/// Wraps a store and makes its steps fail as [`Faults`] says.
///
/// ```
/// use stanchion::{Locks, store::{Fault, Faulty, Memory, Operation}};
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let store = Faulty::new(Memory::new());
/// let faults = store.faults();
/// let locks = Locks::with_store(store).await?;
/// faults.next(Operation::Acquire, Fault::LoseReply);
/// // The answer was lost, the library asks again with the same token, and gets the same grant.
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
    /// A store that fails only when told to. Delays are on the machine's clock.
    pub fn new(store: S) -> Self {
        Self::with_delays(store, None)
    }

    /// The same with delays on this virtual clock.
    pub fn with_clock(store: S, time: &VirtualClock) -> Self {
        Self::with_delays(store, Some(time.clock()))
    }

    fn with_delays(store: S, clock: Option<Clock>) -> Self {
        let plan = Plan { clock, script: Mutex::default(), lose_pushes: Arc::default() };
        Self { inner: Arc::new(store), faults: Faults(Arc::new(plan)) }
    }

    /// The handle that says what fails.
    pub fn faults(&self) -> Faults {
        self.faults.clone()
    }
}

/// Says what fails in a [`Faulty`] store. Clones share it.
#[derive(Clone, Debug)]
pub struct Faults(Arc<Plan>);

#[derive(Debug)]
struct Plan {
    /// `None`: the machine's, which nobody drives here.
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
    done: HashMap<Operation, u64>,
    fired: HashMap<(Operation, Fault), u64>,
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Script").field("once", &self.once).field("always", &self.always).finish_non_exhaustive()
    }
}

/// A small generator, so that a seed replays a run. The quality of its numbers does not matter.
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
    /// The next time this step is asked for, this happens. Several are used up in order.
    pub fn next(&self, step: Operation, fault: Fault) {
        self.script().once.entry(step).or_default().push_back(fault);
    }

    /// Whenever this step is asked for, this happens, until [`clear`](Faults::clear).
    pub fn always(&self, step: Operation, fault: Fault) {
        self.script().always.insert(step, fault);
    }

    /// Of 1,000 steps about `per_mille` meet one of these faults. The seed replays the choice.
    pub fn randomly(&self, seed: u64, per_mille: u32, faults: &[Fault]) {
        self.script().random = Some(Random { state: seed, per_mille, faults: faults.to_vec() });
    }

    /// Loses every push while set.
    pub fn lose_pushes(&self, lose: bool) {
        self.0.lose_pushes.store(lose, Ordering::SeqCst);
    }

    /// From now on nothing fails. What is held stays held.
    pub fn clear(&self) {
        let mut script = self.script();
        script.once.clear();
        script.always.clear();
        script.random = None;
        self.0.lose_pushes.store(false, Ordering::SeqCst);
    }

    /// Delivers what was held back, in the order in which it was asked for. Tells how many.
    pub async fn deliver(&self) -> usize {
        let held = std::mem::take(&mut self.script().held);
        let count = held.len();
        for step in held {
            step.await;
        }
        count
    }

    /// How many steps are held back.
    pub fn held(&self) -> usize {
        self.script().held.len()
    }

    /// How often this step was asked for.
    pub fn count(&self, step: Operation) -> u64 {
        self.script().done.get(&step).copied().unwrap_or(0)
    }

    /// How often each fault happened.
    pub fn fired(&self) -> HashMap<(Operation, Fault), u64> {
        self.script().fired.clone()
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.0.script.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn choose(&self, step: Operation) -> Option<Fault> {
        let mut script = self.script();
        *script.done.entry(step).or_default() += 1;
        let once = script.once.get_mut(&step).and_then(VecDeque::pop_front);
        let fault = once.or_else(|| script.always.get(&step).copied()).or_else(|| {
            let random = script.random.as_mut()?;
            if random.number() % 1_000 >= u64::from(random.per_mille) || random.faults.is_empty() {
                return None;
            }
            let at = random.number() % random.faults.len() as u64;
            random.faults.get(usize::try_from(at).unwrap_or(0)).copied()
        })?;
        *script.fired.entry((step, fault)).or_default() += 1;
        Some(fault)
    }

    /// Does a step with the fault that is due. `again` makes the step's future.
    async fn meet<T, F, A>(&self, step: Operation, again: A) -> Result<T>
    where
        A: Fn() -> F + Send + Sync,
        F: Future<Output = Result<T>> + Send + 'static,
        T: Send,
    {
        let timed_out = || Error::new(ErrorKind::NetworkTimeout, "no answer came (a fault of the test)");
        match self.choose(step) {
            None => again().await,
            Some(Fault::LoseRequest) => Err(timed_out()),
            Some(Fault::LoseReply) => again().await.and_then(|_| Err(timed_out())),
            Some(Fault::Delay(span)) => {
                self.sleep(span).await;
                again().await
            }
            Some(Fault::DelayReply(span)) => {
                let reply = again().await;
                self.sleep(span).await;
                reply
            }
            Some(Fault::Repeat) => {
                let first = again().await;
                let _the_first_counts = again().await;
                first
            }
            Some(Fault::Hold) => {
                self.hold(again());
                Err(timed_out())
            }
            Some(Fault::RepeatLater) => {
                self.hold(again());
                again().await
            }
            #[allow(clippy::panic, reason = "what was asked for")]
            Some(Fault::Panic) => panic!("a fault of the test"),
            Some(Fault::Fail(kind)) => Err(Error::new(kind, "a fault of the test").in_doubt(false)),
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
        let _the_time_is_over = woken.await;
    }

    fn hold<T>(&self, step: impl Future<Output = Result<T>> + Send + 'static) {
        self.script().held.push(Box::pin(async move {
            let _nobody_waits_for_it = step.await;
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
        let again = || {
            let (inner, request) = (self.inner.clone(), request.clone());
            async move { inner.open_session(request).await }
        };
        self.faults.meet(Operation::OpenSession, again).await
    }

    async fn renew_session(&self, session: SessionId) -> Result<Reply<RenewOutcome>> {
        let again = || {
            let inner = self.inner.clone();
            async move { inner.renew_session(session).await }
        };
        self.faults.meet(Operation::RenewSession, again).await
    }

    async fn close_session(&self, session: SessionId) -> Result<Reply<()>> {
        let again = || {
            let inner = self.inner.clone();
            async move { inner.close_session(session).await }
        };
        self.faults.meet(Operation::CloseSession, again).await
    }

    async fn session_lives(&self, session: SessionId) -> Result<Reply<bool>> {
        let again = || {
            let inner = self.inner.clone();
            async move { inner.session_lives(session).await }
        };
        self.faults.meet(Operation::SessionLives, again).await
    }

    async fn acquire(&self, request: AcquireRequest) -> Result<Reply<AcquireOutcome>> {
        let again = || {
            let (inner, request) = (self.inner.clone(), request.clone());
            async move { inner.acquire(request).await }
        };
        self.faults.meet(Operation::Acquire, again).await
    }

    async fn poll(&self, key: &Key, tokens: &[TokenId]) -> Result<Reply<Vec<PollOutcome>>> {
        let again = || {
            let (inner, key, tokens) = (self.inner.clone(), key.clone(), tokens.to_vec());
            async move { inner.poll(&key, &tokens).await }
        };
        self.faults.meet(Operation::Poll, again).await
    }

    async fn abandon(&self, key: &Key, token: TokenId) -> Result<Reply<EndOutcome>> {
        let again = || {
            let (inner, key) = (self.inner.clone(), key.clone());
            async move { inner.abandon(&key, token).await }
        };
        self.faults.meet(Operation::Abandon, again).await
    }

    async fn release(&self, key: &Key, token: TokenId, cooldown: Option<Duration>) -> Result<Reply<EndOutcome>> {
        let again = || {
            let (inner, key) = (self.inner.clone(), key.clone());
            async move { inner.release(&key, token, cooldown).await }
        };
        self.faults.meet(Operation::Release, again).await
    }

    async fn extend(&self, key: &Key, token: TokenId, ttl: Duration) -> Result<Reply<ExtendOutcome>> {
        let again = || {
            let (inner, key) = (self.inner.clone(), key.clone());
            async move { inner.extend(&key, token, ttl).await }
        };
        self.faults.meet(Operation::Extend, again).await
    }

    async fn adopt(&self, request: AdoptRequest) -> Result<Reply<AdoptOutcome>> {
        let again = || {
            let (inner, request) = (self.inner.clone(), request.clone());
            async move { inner.adopt(request).await }
        };
        self.faults.meet(Operation::Adopt, again).await
    }

    async fn force_release(&self, request: ForceReleaseRequest) -> Result<Reply<ForceReleaseOutcome>> {
        let again = || {
            let (inner, request) = (self.inner.clone(), request.clone());
            async move { inner.force_release(request).await }
        };
        self.faults.meet(Operation::ForceRelease, again).await
    }

    async fn inspect(&self, key: &Key) -> Result<Reply<KeyState>> {
        let again = || {
            let (inner, key) = (self.inner.clone(), key.clone());
            async move { inner.inspect(&key).await }
        };
        self.faults.meet(Operation::Inspect, again).await
    }

    async fn list(&self, prefix: &str, cursor: Option<&Cursor>, limit: usize) -> Result<Reply<Listing>> {
        let again = || {
            let (inner, prefix, cursor) = (self.inner.clone(), prefix.to_owned(), cursor.cloned());
            async move { inner.list(&prefix, cursor.as_ref(), limit).await }
        };
        self.faults.meet(Operation::List, again).await
    }

    fn grants(&self, session: SessionId) -> GrantStream {
        let lose = self.faults.0.lose_pushes.clone();
        self.inner.grants(session).filter_map(move |push| (!lose.load(Ordering::SeqCst)).then_some(push))
    }
}
