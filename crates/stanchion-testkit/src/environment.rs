//! What a store under test provides, and the actors that use it.

use std::any::Any;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use stanchion::store::{
    AcquireOutcome, AcquireRequest, DamagedEntry, Demand, EndOutcome, GrantStream, Granted, KeyState, Lifetime,
    Listing, Liveness, OpenOutcome, OpenSession, PollOutcome, Prefixed, Push, Queued, StoreTime,
};
use stanchion::{Builder, Clock, Key, Locks, MAX_NAMESPACE_BYTES, SessionId, Store, TokenId, VirtualClock};

/// How long a condition may take to come true before a test fails.
pub(crate) const GENEROUS: Duration = Duration::from_secs(30);

/// A session that outlives every test.
const LONG: Duration = Duration::from_secs(3_600);

/// How to test a store. A function that makes an [`Environment`] is one too.
pub trait Fixture {
    /// The store under test.
    type Store: Store;

    /// An environment that shares nothing with any other.
    fn fresh(&self) -> Environment<Self::Store>;

    /// The same through `Arc<dyn Store>`.
    fn fresh_erased(&self) -> Environment<Arc<dyn Store>> {
        self.fresh().erase()
    }
}

impl<S: Store, F: Fn() -> Environment<S>> Fixture for F {
    type Store = S;

    fn fresh(&self) -> Environment<S> {
        self()
    }
}

type Open<S> = Box<dyn Fn() -> S + Send + Sync>;

/// Data of their own for one test, and how to open them.
pub struct Environment<S> {
    open: Open<S>,
    time: Option<VirtualClock>,
    kept: Option<Box<dyn Any + Send + Sync>>,
}

impl<S> std::fmt::Debug for Environment<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Environment").field("time", &self.time).finish_non_exhaustive()
    }
}

impl<S: Store> Environment<S> {
    /// `open` gives a handle on the same data each time it is called, as another process would have.
    pub fn new(open: impl Fn() -> S + Send + Sync + 'static) -> Self {
        Self { open: Box::new(open), time: None, kept: None }
    }

    /// The store goes by this clock; without it by the real one.
    #[must_use]
    pub fn with_time(mut self, time: VirtualClock) -> Self {
        self.time = Some(time);
        self
    }

    /// Keeps something alive as long as the environment: a temporary folder, a server.
    #[must_use]
    pub fn keeping(mut self, kept: impl Any + Send + Sync) -> Self {
        self.kept = Some(Box::new(kept));
        self
    }

    /// The same with each handle inside of another store.
    pub fn wrapped<T: Store>(self, wrap: impl Fn(S) -> T + Send + Sync + 'static) -> Environment<T> {
        let open = self.open;
        Environment { open: Box::new(move || wrap(open())), time: self.time, kept: self.kept }
    }

    /// The same through `Arc<dyn Store>`.
    pub fn erase(self) -> Environment<Arc<dyn Store>> {
        self.wrapped(|store| Arc::new(store) as Arc<dyn Store>)
    }

    /// The same with every key under the longest prefix.
    pub fn prefixed(self) -> Environment<Prefixed<S>> {
        self.wrapped(|store| Prefixed::new(store, &"é/".repeat(MAX_NAMESPACE_BYTES / 3)).unwrap())
    }

    /// A handle of the store.
    pub fn open(&self) -> S {
        (self.open)()
    }

    /// Lets this much of the store's time go by.
    pub async fn pass(&self, span: Duration) {
        match &self.time {
            Some(time) => time.advance(span),
            None => tokio::time::sleep(span).await,
        }
    }

    /// A handle of the library on this store.
    pub fn locks(&self) -> Builder {
        self.locks_on(self.open())
    }

    /// A handle of the library on a store that goes by the same clock.
    pub fn locks_on(&self, store: impl Store) -> Builder {
        Locks::builder_with_store(store).clock(self.time.as_ref().map_or_else(Clock::system, VirtualClock::clock))
    }

    /// Somebody with a session that outlives the test.
    pub async fn actor(&self) -> Actor<S> {
        self.mortal(LONG).await
    }

    /// Somebody with a session of this ttl.
    pub async fn mortal(&self, ttl: Duration) -> Actor<S> {
        let store = self.open();
        let session = SessionId::random().unwrap();
        let pushes = store.grants(session);
        let owner = "somebody".to_owned();
        let reply = store.open_session(OpenSession { session, ttl, owner }).await.unwrap();
        assert_eq!(reply.outcome, OpenOutcome::Opened);
        Actor { store, session, ttl, pushes, opened: reply.time }
    }

    /// The actor's process ends without a word.
    pub async fn dies(&self, actor: Actor<S>) {
        let (ttl, session, liveness) = (actor.ttl, actor.session, actor.store.capabilities().liveness);
        drop(actor);
        match liveness {
            // A store that is dropped inside a runtime ends its sessions in the background. A process that dies is faster.
            Liveness::Process => {
                let observer = self.open();
                until("the session is dead", async || !observer.session_lives(session).await.unwrap().outcome).await;
            }
            _ => self.pass(ttl + Duration::from_millis(20)).await,
        }
    }
}

/// Somebody with a handle and a session.
#[derive(Debug)]
pub struct Actor<S> {
    /// The handle.
    pub store: S,
    /// The session.
    pub session: SessionId,
    ttl: Duration,
    pushes: GrantStream,
    opened: StoreTime,
}

impl<S: Store> Actor<S> {
    /// A request for a mutex by a fresh token, bound to the session, that waits if it has to.
    pub fn request(&self, key: &Key) -> AcquireRequest {
        AcquireRequest {
            key: key.clone(),
            token: TokenId::random().unwrap(),
            session: self.session,
            demand: Demand::MUTEX,
            lifetime: Lifetime::Session { max_hold: None },
            enqueue: true,
            not_after: self.opened.after(LONG),
            metadata: None,
            trace: None,
        }
    }

    /// Asks.
    pub async fn ask(&self, request: &AcquireRequest) -> AcquireOutcome {
        self.store.acquire(request.clone()).await.unwrap().outcome
    }

    /// Asks for a mutex and must get it.
    pub async fn takes(&self, key: &Key) -> (TokenId, Granted) {
        let request = self.request(key);
        (request.token, self.gets(&request).await)
    }

    /// Asks and must get it.
    pub async fn gets(&self, request: &AcquireRequest) -> Granted {
        match self.ask(request).await {
            AcquireOutcome::Granted(granted) => granted,
            other => panic!("not granted: {other:?}"),
        }
    }

    /// Asks for a mutex and must wait.
    pub async fn queues(&self, key: &Key) -> TokenId {
        let request = self.request(key);
        self.waits(&request).await;
        request.token
    }

    /// Asks and must wait.
    pub async fn waits(&self, request: &AcquireRequest) -> Queued {
        match self.ask(request).await {
            AcquireOutcome::Queued(queued) => queued,
            other => panic!("not queued: {other:?}"),
        }
    }

    /// What became of a token.
    pub async fn polls(&self, key: &Key, token: TokenId) -> PollOutcome {
        self.store.poll(key, &[token]).await.unwrap().outcome[0]
    }

    /// The grant that a token has now.
    pub async fn granted(&self, key: &Key, token: TokenId) -> Option<Granted> {
        match self.polls(key, token).await {
            PollOutcome::Granted(granted) => Some(granted),
            _ => None,
        }
    }

    /// Releases without a cooldown.
    pub async fn releases(&self, key: &Key, token: TokenId) -> EndOutcome {
        self.store.release(key, token, None).await.unwrap().outcome
    }

    /// What is known of a key.
    pub async fn sees(&self, key: &Key) -> KeyState {
        self.store.inspect(key).await.unwrap().outcome
    }

    /// All keys that begin so, over all pages.
    pub async fn lists(&self, prefix: &str) -> Vec<KeyState> {
        list_all(&self.store, prefix).await
    }

    /// Whether somebody holds the key.
    pub async fn sees_held(&self, key: &Key) -> bool {
        !self.sees(key).await.holders.is_empty()
    }

    /// The next push that is not for people; fails when none comes.
    pub async fn pushed(&mut self) -> Push {
        loop {
            let push = tokio::time::timeout(GENEROUS, self.pushes.next()).await;
            match push.expect("a push").expect("a stream that goes on") {
                Push::Warning(_) => {}
                push => return push,
            }
        }
    }

    /// The next push that is a grant; hints are passed over.
    pub async fn pushed_grant(&mut self) -> (TokenId, stanchion::Fence) {
        loop {
            if let Push::Granted { token, fence, .. } = self.pushed().await {
                return (token, fence);
            }
        }
    }
}

/// A key of this name.
pub(crate) fn key(name: &str) -> Key {
    Key::new("", name).unwrap()
}

/// All keys of a store that begin so, in order, over pages of about 50.
pub async fn list_all<S: Store + ?Sized>(store: &S, prefix: &str) -> Vec<KeyState> {
    let (pages, damaged) = read_pages(store, prefix, 50).await;
    assert_eq!(damaged, []);
    Listing::merge(pages).keys
}

/// The pages of a listing, of about so many keys each, and the damaged entries on them.
pub async fn read_pages<S: Store + ?Sized>(store: &S, prefix: &str, limit: usize) -> (Vec<Listing>, Vec<DamagedEntry>) {
    let mut pages: Vec<Listing> = Vec::new();
    loop {
        let cursor = pages.last().and_then(|page| page.next.as_ref());
        let page = store.list(prefix, cursor, limit).await.unwrap().outcome;
        let is_last = page.next.is_none();
        assert!(is_last || page.next.as_ref() != cursor, "a page goes on where it began");
        pages.push(page);
        if is_last {
            break;
        }
    }
    let damaged = pages.iter().flat_map(|page| page.damaged.clone()).collect();
    (pages, damaged)
}

/// Waits until something is so, generously.
pub async fn until(what: &str, mut so: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !so().await {
        assert!(start.elapsed() < GENEROUS, "never: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Runs a case in a runtime of its own.
pub fn block_on<T>(case: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(case)
}

/// The seed of a randomised test: printed, and taken from `STANCHION_TEST_SEED` to replay a run.
pub fn seed(test: &str) -> u64 {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let seed = match std::env::var("STANCHION_TEST_SEED") {
        Ok(seed) => seed.parse().expect("STANCHION_TEST_SEED is a number"),
        Err(_) => Clock::system().wall_micros() + COUNT.fetch_add(1, Ordering::Relaxed),
    };
    println!("seed {seed}; replay with STANCHION_TEST_SEED={seed} cargo test -p stanchion-testkit {test}");
    seed
}

/// Numbers that a seed replays.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}
