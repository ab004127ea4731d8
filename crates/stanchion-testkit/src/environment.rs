//! Defines how a test reaches the store under test, and the clients that use the store.

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

/// Time after which a condition that has not come true fails the test.
pub(crate) const GENEROUS: Duration = Duration::from_secs(120);

/// Session ttl that is longer than every test.
const LONG: Duration = Duration::from_secs(3_600);

/// Makes environments for the tests of a store. A function that returns an [`Environment`] is a fixture, too.
pub trait Fixture {
    /// The store under test.
    type Store: Store;

    /// Returns an environment that shares no data with any other one.
    fn fresh(&self) -> Environment<Self::Store>;

    /// Returns a fresh environment whose handles are `Arc<dyn Store>`.
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

/// Data for one test, and a function that opens handles on the data.
pub struct Environment<S> {
    open: Open<S>,
    time: Option<VirtualClock>,
    resource: Option<Box<dyn Any + Send + Sync>>,
}

impl<S> std::fmt::Debug for Environment<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Environment").field("time", &self.time).finish_non_exhaustive()
    }
}

impl<S: Store> Environment<S> {
    /// Creates an environment. Each call of `open` returns a handle on the same data, like the handle of another
    /// process.
    pub fn new(open: impl Fn() -> S + Send + Sync + 'static) -> Self {
        Self { open: Box::new(open), time: None, resource: None }
    }

    /// Sets the clock of the store. Without it the store uses the real clock.
    #[must_use]
    pub fn with_time(mut self, time: VirtualClock) -> Self {
        self.time = Some(time);
        self
    }

    /// Keeps a resource alive as long as the environment, for example a temporary folder or a server.
    #[must_use]
    pub fn keeping(mut self, resource: impl Any + Send + Sync) -> Self {
        self.resource = Some(Box::new(resource));
        self
    }

    /// Returns this environment with each handle wrapped in another store.
    pub fn wrapped<T: Store>(self, wrap: impl Fn(S) -> T + Send + Sync + 'static) -> Environment<T> {
        let open = self.open;
        Environment { open: Box::new(move || wrap(open())), time: self.time, resource: self.resource }
    }

    /// Returns this environment with handles that are `Arc<dyn Store>`.
    pub fn erase(self) -> Environment<Arc<dyn Store>> {
        self.wrapped(|store| Arc::new(store) as Arc<dyn Store>)
    }

    /// Returns this environment with every key under the longest possible prefix.
    pub fn prefixed(self) -> Environment<Prefixed<S>> {
        self.wrapped(|store| Prefixed::new(store, &"é/".repeat(MAX_NAMESPACE_BYTES / 3)).unwrap())
    }

    /// Opens a handle of the store.
    pub fn open(&self) -> S {
        (self.open)()
    }

    /// Lets `span` pass on the store's clock: moves a virtual clock on, or sleeps.
    pub async fn advance(&self, span: Duration) {
        match &self.time {
            Some(time) => time.advance(span),
            None => tokio::time::sleep(span).await,
        }
    }

    /// Returns a builder for a [`Locks`] handle on this store.
    pub fn locks(&self) -> Builder {
        self.locks_on(self.open())
    }

    /// Returns a builder for a [`Locks`] handle on another store that uses the same clock.
    pub fn locks_on(&self, store: impl Store) -> Builder {
        Locks::builder_with_store(store).clock(self.time.as_ref().map_or_else(Clock::system, VirtualClock::clock))
    }

    /// Opens a handle and a session that outlives the test.
    pub async fn client(&self) -> Client<S> {
        self.client_with_ttl(LONG).await
    }

    /// Opens a handle and a session with this ttl.
    pub async fn client_with_ttl(&self, ttl: Duration) -> Client<S> {
        let store = self.open();
        let session = SessionId::random().unwrap();
        let pushes = store.grants(session);
        let owner = "somebody".to_owned();
        let reply = store.open_session(OpenSession { session, ttl, owner }).await.unwrap();
        assert_eq!(reply.outcome, OpenOutcome::Opened);
        Client { store, session, ttl, pushes, opened: reply.time }
    }

    /// Ends a client like a crashed process, without closing its session, and waits until the session has expired.
    pub async fn kill(&self, client: Client<S>) {
        let (ttl, session, liveness) = (client.ttl, client.session, client.store.capabilities().liveness);
        drop(client);
        match liveness {
            // A store that is dropped inside a runtime ends its sessions in the background, later than a dying process
            // does.
            Liveness::Process => {
                let observer = self.open();
                until("the session has expired", async || !observer.session_lives(session).await.unwrap().outcome)
                    .await;
            }
            _ => self.advance(ttl + Duration::from_millis(20)).await,
        }
    }
}

/// A user of the store under test: a handle with one open session.
#[derive(Debug)]
pub struct Client<S> {
    /// Handle of the store.
    pub store: S,
    /// Session that all requests of this client belong to.
    pub session: SessionId,
    ttl: Duration,
    pushes: GrantStream,
    opened: StoreTime,
}

impl<S: Store> Client<S> {
    /// Returns a request for a mutex with a fresh token, bound to the session, that is queued if the key is locked.
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

    /// Sends a request and returns the outcome.
    pub async fn acquire(&self, request: &AcquireRequest) -> AcquireOutcome {
        self.store.acquire(request.clone()).await.unwrap().outcome
    }

    /// Requests a mutex and fails the test if the key is locked.
    pub async fn lock(&self, key: &Key) -> (TokenId, Granted) {
        let request = self.request(key);
        (request.token, self.expect_grant(&request).await)
    }

    /// Sends a request and fails the test if it is not granted.
    pub async fn expect_grant(&self, request: &AcquireRequest) -> Granted {
        match self.acquire(request).await {
            AcquireOutcome::Granted(granted) => granted,
            other => panic!("not granted: {other:?}"),
        }
    }

    /// Requests a mutex and fails the test if the request is not queued. Returns its token.
    pub async fn enqueue(&self, key: &Key) -> TokenId {
        let request = self.request(key);
        self.expect_queued(&request).await;
        request.token
    }

    /// Sends a request and fails the test if it is not queued.
    pub async fn expect_queued(&self, request: &AcquireRequest) -> Queued {
        match self.acquire(request).await {
            AcquireOutcome::Queued(queued) => queued,
            other => panic!("not queued: {other:?}"),
        }
    }

    /// Polls one token.
    pub async fn poll(&self, key: &Key, token: TokenId) -> PollOutcome {
        self.store.poll(key, &[token]).await.unwrap().outcome[0]
    }

    /// Polls one token and returns its grant, if it has one.
    pub async fn current_grant(&self, key: &Key, token: TokenId) -> Option<Granted> {
        match self.poll(key, token).await {
            PollOutcome::Granted(granted) => Some(granted),
            _ => None,
        }
    }

    /// Releases a token without a cooldown.
    pub async fn release(&self, key: &Key, token: TokenId) -> EndOutcome {
        self.store.release(key, token, None).await.unwrap().outcome
    }

    /// Returns the state of a key.
    pub async fn inspect(&self, key: &Key) -> KeyState {
        self.store.inspect(key).await.unwrap().outcome
    }

    /// Lists the keys with this prefix, over all pages.
    pub async fn list(&self, prefix: &str) -> Vec<KeyState> {
        list_all(&self.store, prefix).await
    }

    /// Returns whether the key has a holder.
    pub async fn is_locked(&self, key: &Key) -> bool {
        !self.inspect(key).await.holders.is_empty()
    }

    /// Waits for the next push, skipping warnings, and fails the test if none arrives.
    pub async fn next_push(&mut self) -> Push {
        loop {
            let push = tokio::time::timeout(GENEROUS, self.pushes.next()).await;
            match push.expect("a push arrives").expect("the stream is open") {
                Push::Warning(_) => {}
                push => return push,
            }
        }
    }

    /// Waits for the next grant that is pushed, skipping all other pushes.
    pub async fn next_grant(&mut self) -> (TokenId, stanchion::Fence) {
        loop {
            if let Push::Granted { token, fence, .. } = self.next_push().await {
                return (token, fence);
            }
        }
    }
}

/// Returns the key with this name and no namespace.
pub(crate) fn key(name: &str) -> Key {
    Key::new("", name).unwrap()
}

/// Lists the keys with this prefix in order, in pages of about 50 keys.
pub async fn list_all<S: Store + ?Sized>(store: &S, prefix: &str) -> Vec<KeyState> {
    let (pages, damaged) = read_pages(store, prefix, 50).await;
    assert_eq!(damaged, []);
    Listing::merge(pages).keys
}

/// Lists the keys with this prefix in pages of about `limit` keys. Returns the pages and their damaged entries.
pub async fn read_pages<S: Store + ?Sized>(store: &S, prefix: &str, limit: usize) -> (Vec<Listing>, Vec<DamagedEntry>) {
    let mut pages: Vec<Listing> = Vec::new();
    loop {
        let cursor = pages.last().and_then(|page| page.next.as_ref());
        let page = store.list(prefix, cursor, limit).await.unwrap().outcome;
        let is_last = page.next.is_none();
        assert!(is_last || page.next.as_ref() != cursor, "the cursor did not move on");
        pages.push(page);
        if is_last {
            break;
        }
    }
    let damaged = pages.iter().flat_map(|page| page.damaged.clone()).collect();
    (pages, damaged)
}

/// Waits until a condition is true. Fails the test with `what`, a description of the condition, after 30 seconds.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < GENEROUS, "timed out while waiting until {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Runs a case in its own runtime.
pub fn block_on<T>(case: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(case)
}

/// Returns and prints the seed of a randomised test. `STANCHION_TEST_SEED` sets the seed, to replay a run.
pub fn seed(test: &str) -> u64 {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let seed = match std::env::var("STANCHION_TEST_SEED") {
        Ok(seed) => seed.parse().expect("STANCHION_TEST_SEED must be a number"),
        Err(_) => Clock::system().wall_micros() + COUNT.fetch_add(1, Ordering::Relaxed),
    };
    println!("seed {seed}; replay with STANCHION_TEST_SEED={seed} cargo test -p stanchion-testkit {test}");
    seed
}

/// Pseudorandom numbers that depend only on the seed.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns a number below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }
}
