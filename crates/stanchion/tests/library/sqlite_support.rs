//! Helpers for the tests of the embedded store: short forms of its operations, and waiting for a condition.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use stanchion::store::{
    AcquireOutcome, AcquireRequest, Demand, EndOutcome, GrantStream, Granted, Lifetime, OpenOutcome, OpenSession,
    PollOutcome, Push, Queued, Sqlite, Store, StoreTime,
};
use stanchion::{Clock, Key, SessionId, TokenId};

/// Time after which a test fails because an operation or a condition takes too long.
pub const LIMIT: Duration = Duration::from_secs(30);

pub const SESSION: Lifetime = Lifetime::Session { max_hold: None };

/// A store with an open session and the session's push stream.
pub struct Handle {
    pub store: Sqlite,
    pub session: SessionId,
    pub grants: GrantStream,
}

impl Handle {
    pub async fn open(folder: &Path) -> Self {
        Self::on(Sqlite::open(folder).unwrap()).await
    }

    pub async fn on(store: Sqlite) -> Self {
        let session = SessionId::random().unwrap();
        let grants = store.grants(session);
        let owner = format!("test {}", std::process::id());
        let open = OpenSession { session, ttl: Duration::from_secs(10), owner };
        assert_eq!(store.open_session(open).await.unwrap().outcome, OpenOutcome::Opened);
        Self { store, session, grants }
    }

    pub async fn acquire(&self, request: AcquireRequest) -> AcquireOutcome {
        self.store.acquire(request).await.unwrap().outcome
    }

    pub fn request(&self, key: &Key) -> AcquireRequest {
        AcquireRequest {
            key: key.clone(),
            token: TokenId::random().unwrap(),
            session: self.session,
            demand: Demand::MUTEX,
            lifetime: SESSION,
            enqueue: true,
            not_after: StoreTime::from_micros(u64::MAX),
            metadata: None,
            trace: None,
        }
    }

    /// Acquires the key, which must be free.
    pub async fn hold(&self, key: &Key) -> (TokenId, Granted) {
        let request = self.request(key);
        let token = request.token;
        (token, granted(self.acquire(request).await))
    }

    /// Enters the queue of the key, which must be held.
    pub async fn queue(&self, key: &Key) -> (TokenId, Queued) {
        let request = self.request(key);
        let token = request.token;
        (token, queued(self.acquire(request).await))
    }

    pub async fn poll(&self, key: &Key, token: TokenId) -> PollOutcome {
        self.store.poll(key, &[token]).await.unwrap().outcome[0]
    }

    pub async fn release(&self, key: &Key, token: TokenId) -> EndOutcome {
        self.store.release(key, token, None).await.unwrap().outcome
    }

    /// Returns the next push. Skips the warning that the folder is below `/tmp`.
    pub async fn push(&mut self) -> Push {
        loop {
            match within(self.grants.next()).await.expect("the push stream ended") {
                Push::Warning(message) if message.contains("the system deletes old files") => {}
                push => return push,
            }
        }
    }

    /// Waits for the grant of a token as the library does: polls after each push and after each `check_in`.
    pub async fn granted(&mut self, key: &Key, token: TokenId) -> Granted {
        let clock = Clock::system();
        let end = clock.now().after(LIMIT);
        loop {
            let delay = match self.poll(key, token).await {
                PollOutcome::Granted(granted) => return granted,
                PollOutcome::Queued(queued) => queued.check_in.unwrap_or(LIMIT),
                PollOutcome::Gone => panic!("the token is gone"),
            };
            assert!(clock.now() < end, "not granted in time");
            let _ = tokio::time::timeout(delay, self.grants.next()).await; // both a push and a timeout lead to a poll
        }
    }
}

pub fn key(name: &str) -> Key {
    Key::new("", name).unwrap()
}

pub fn folder() -> (tempfile::TempDir, PathBuf) {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("locks");
    (temp, path)
}

pub fn granted(outcome: AcquireOutcome) -> Granted {
    match outcome {
        AcquireOutcome::Granted(granted) => granted,
        other => panic!("expected a grant: {other:?}"),
    }
}

pub fn queued(outcome: AcquireOutcome) -> Queued {
    match outcome {
        AcquireOutcome::Queued(queued) => queued,
        other => panic!("expected a place in the queue: {other:?}"),
    }
}

pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.expect("the operation took too long")
}

/// Waits until a condition is true.
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let clock = Clock::system();
    let end = clock.now().after(LIMIT);
    while !holds().await {
        assert!(clock.now() < end, "timed out while waiting until {what}");
        tokio::task::yield_now().await;
    }
}
