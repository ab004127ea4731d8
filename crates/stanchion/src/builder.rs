//! How to open a handle: its settings, and the store that a URL names.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
use crate::keeper;
use crate::key::{check_namespace, normal};
use crate::lease::Drift;
use crate::locks::{Handle, Locks, MAX_OWNER_BYTES, check_duration};
use crate::on_lost::OnLost;
use crate::retry::RetryPolicy;
use crate::shared::{Config, Shared};
use crate::store::Store;
use crate::telemetry::KeyRedaction;

/// How to open a handle.
#[derive(Debug)]
#[must_use = "a builder does nothing until it is opened"]
pub struct Builder {
    source: Source,
    namespace: String,
    owner: Option<String>,
    session_ttl: Duration,
    drift: Drift,
    retry: RetryPolicy,
    open_within: Option<Duration>,
    clock: Clock,
    on_lost: OnLost,
    key_redaction: KeyRedaction,
}

enum Source {
    Url(String),
    Store(Arc<dyn Store>),
}

impl std::fmt::Debug for Source {
    /// Without the URL, which may hold a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Url(url) => write!(f, "Url({}:…)", shown_scheme(url).unwrap_or_default()),
            Self::Store(store) => write!(f, "Store({})", store.capabilities().name),
        }
    }
}

impl Builder {
    pub(crate) fn for_url(url: &str) -> Self {
        Self::new(Source::Url(url.to_owned()))
    }

    pub(crate) fn for_store(store: Arc<dyn Store>) -> Self {
        Self::new(Source::Store(store))
    }

    fn new(source: Source) -> Self {
        Self {
            source,
            namespace: String::new(),
            owner: None,
            session_ttl: Duration::from_secs(10),
            drift: Drift::default(),
            retry: RetryPolicy::default(),
            open_within: None,
            clock: Clock::system(),
            on_lost: OnLost::default(),
            key_redaction: KeyRedaction::default(),
        }
    }

    /// Keeps the keys of this handle apart from those of other namespaces. Default: none. At most 128 bytes.
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.namespace = normal(namespace).into_owned();
        self
    }

    /// Who this is, for people who inspect keys. Default: program, host and process. At most 128 bytes.
    pub fn owner(mut self, owner: &str) -> Self {
        self.owner = Some(owner.to_owned());
        self
    }

    /// How long the session lives without a beat; it beats five times in that time. Default: 10 s. A dead process's
    /// holds are free after this time (at once, in stores where sessions live with the process).
    pub fn session_ttl(mut self, ttl: Duration) -> Self {
        self.session_ttl = ttl;
        self
    }

    /// How far clocks may drift. Default: 1 % and 2 ms.
    pub fn drift(mut self, drift: Drift) -> Self {
        self.drift = drift;
        self
    }

    /// How steps are repeated after faults.
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = policy;
        self
    }

    /// Limits how long [`open`](Builder::open) may take, all attempts included. Default: the retry policy's
    /// [`total`](RetryPolicy::total), 10 s.
    ///
    /// ```no_run
    /// # async fn open() -> stanchion::Result<()> {
    /// use std::time::Duration;
    /// use stanchion::Locks;
    ///
    /// let locks = Locks::builder("redis://127.0.0.1").open_within(Duration::from_secs(1)).open().await?;
    /// # Ok(()) }
    /// ```
    pub fn open_within(mut self, limit: Duration) -> Self {
        self.open_within = Some(limit);
        self
    }

    /// What happens when a hold of this handle is lost, beside the signal. Default: nothing more.
    pub fn on_lost(mut self, policy: OnLost) -> Self {
        self.on_lost = policy;
        self
    }

    /// How keys are shown in spans and log events (feature `tracing`). Default: as they are.
    pub fn redact_keys(mut self, shown: KeyRedaction) -> Self {
        self.key_redaction = shown;
        self
    }

    /// The clock by which this handle believes and waits. Default: the machine's. For tests.
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Opens the handle: the store is reached and the session is open.
    ///
    /// Transient faults are repeated until [`open_within`](Builder::open_within) is over. A definite refusal, such as a
    /// wrong password, fails at once.
    ///
    /// # Errors
    /// As [`Locks::open`]; [`ErrorKind::InvalidArgument`] for settings out of range; [`ErrorKind::Internal`] if the system
    /// has no thread or descriptor left.
    ///
    /// # Cancel safety
    /// As [`Locks::open`].
    pub async fn open(self) -> Result<Locks> {
        check_duration("the session ttl", self.session_ttl)?;
        check_namespace(&self.namespace)?;
        if self.drift.per_mille >= 500 || self.retry.attempts == 0 {
            let message = "drift must be below 500 parts of a thousand, and a step needs one attempt or more";
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        self.drift.check(self.session_ttl)?;
        let owner = self.owner.unwrap_or_else(default_owner);
        if owner.len() > MAX_OWNER_BYTES {
            let message =
                format!("the owner label has {} bytes, the longest allowed is {MAX_OWNER_BYTES}", owner.len());
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        let config = Config {
            namespace: self.namespace,
            owner,
            session_ttl: self.session_ttl,
            drift: self.drift,
            retry: self.retry,
            on_lost: self.on_lost,
            key_redaction: self.key_redaction,
        };
        let (source, clock) = (self.source, self.clock);
        let limit = self.open_within.unwrap_or(config.retry.total);
        let give_up_at = clock.now().after(limit);
        let fault = Arc::new(Mutex::new(None));
        let (thread, opened) = keeper::start(clock.clone(), {
            let (clock, fault) = (clock.clone(), fault.clone());
            move |commands| async move {
                let store = match source {
                    Source::Url(url) => open_until_given_up(&url, &config.retry, &clock, &fault).await?,
                    Source::Store(store) => store,
                };
                Shared::new(store, clock, config, commands)
            }
        })?;
        let ended = || Error::new(ErrorKind::Internal, "the keeper ended while it was opening the store");
        let opened = tokio::select! {
            biased;
            opened = opened => opened.map_err(|_| ended())??,
            () = clock.sleep_until(give_up_at) => {
                let late = || {
                    let message = format!("the store could not be opened within {limit:.1?}");
                    Error::new(ErrorKind::Unavailable, message)
                };
                return Err(fault.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_else(late));
            }
        };
        // After an error, or if this future is dropped, the keeper ends by itself, and nobody waits for that.
        opened.shared().ok_or_else(ended)?.valid_session_by(give_up_at).await?;
        let shared = opened.claim().ok_or_else(ended)?;
        Ok(Locks { handle: Arc::new(Handle::new(shared, thread)) })
    }
}

fn scheme(url: &str) -> &str {
    url.split_once(':').map_or("", |(scheme, _)| scheme)
}

/// Opens the store, again and again after transient faults. The last one is left in `last`.
async fn open_until_given_up(
    url: &str,
    policy: &RetryPolicy,
    clock: &Clock,
    last: &Mutex<Option<Error>>,
) -> Result<Arc<dyn Store>> {
    let mut pauses = policy.endless_pauses();
    loop {
        match open_store(url).await {
            Err(fault) if fault.is_transient() => *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault),
            done => return done,
        }
        clock.sleep(pauses.next().unwrap_or(policy.longest_pause)).await;
    }
}

/// The scheme, if it is certain to be one: a URL without its scheme begins with the user.
fn shown_scheme(url: &str) -> Option<&str> {
    let (scheme, rest) = url.split_once(':')?;
    let is_scheme = scheme.len() <= 32 && scheme.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c));
    (is_scheme && (rest.starts_with("//") || !rest.contains('@'))).then_some(scheme)
}

async fn open_store(url: &str) -> Result<Arc<dyn Store>> {
    match scheme(url) {
        "memory" if url == "memory:" => Ok(Arc::new(crate::store::Memory::new())),
        "memory" => Err(Error::new(ErrorKind::InvalidArgument, "the memory store's URL is `memory:` and nothing more")),
        #[cfg(feature = "sqlite")]
        "sqlite" => Ok(Arc::new(crate::store::Sqlite::connect(url).await?)),
        #[cfg(not(feature = "sqlite"))]
        "sqlite" => Err(not_built("sqlite")),
        #[cfg(feature = "redis")]
        redis if is_redis(redis) => Ok(Arc::new(crate::store::Redis::from_url(url)?)),
        #[cfg(not(feature = "redis"))]
        redis if is_redis(redis) => Err(not_built(redis)),
        #[cfg(feature = "postgres")]
        "postgres" | "postgresql" => Ok(Arc::new(crate::store::Postgres::from_url(url)?)),
        #[cfg(not(feature = "postgres"))]
        known @ ("postgres" | "postgresql") => Err(not_built(known)),
        #[cfg(feature = "firestore")]
        "firestore" => Ok(Arc::new(crate::store::Firestore::from_url(url)?)),
        #[cfg(not(feature = "firestore"))]
        "firestore" => Err(not_built("firestore")),
        "" => {
            let message = format!("a store's URL begins with its scheme: one of {}", stores());
            Err(Error::new(ErrorKind::InvalidArgument, message))
        }
        _ => {
            let urls = shown_scheme(url).map_or("such URLs".to_owned(), |scheme| format!("`{scheme}:` URLs"));
            let message = format!("there is no store for {urls}; the schemes are {}", stores());
            Err(Error::new(ErrorKind::InvalidArgument, message))
        }
    }
}

/// `redis+sentinel` and the like are of the family too.
fn is_redis(scheme: &str) -> bool {
    matches!(scheme.split('+').next(), Some("redis" | "rediss"))
}

#[cfg(not(all(feature = "sqlite", feature = "redis", feature = "postgres", feature = "firestore")))]
fn not_built(scheme: &str) -> Error {
    let feature = match scheme {
        redis if is_redis(redis) => "redis",
        "postgresql" => "postgres",
        feature => feature,
    };
    let message = format!(
        "this build has no store for `{scheme}:` URLs: build it with the Cargo feature `{feature}`; it has {}",
        stores()
    );
    Error::new(ErrorKind::Unsupported, message)
}

fn stores() -> String {
    let redis = "`redis:` (with `rediss:`, `redis+unix:`, `redis+sentinel:`, `redis+cluster:`)";
    let all = [
        (true, "`memory:`"),
        (cfg!(feature = "sqlite"), "`sqlite:`"),
        (cfg!(feature = "redis"), redis),
        (cfg!(feature = "postgres"), "`postgres:`"),
        (cfg!(feature = "firestore"), "`firestore:`"),
    ];
    let built: Vec<_> = all.into_iter().filter(|(is_built, _)| *is_built).map(|(_, name)| name).collect();
    built.join(", ")
}

/// Program, host and process.
fn default_owner() -> String {
    let program = std::env::args_os().next().map(std::path::PathBuf::from);
    let program = program.as_deref().and_then(std::path::Path::file_name).map(|name| name.to_string_lossy());
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let process = std::process::id();
    let label = format!("{}@{host}/{process}", program.as_deref().unwrap_or("?"));
    let start = label.len().saturating_sub(MAX_OWNER_BYTES);
    let start = (start..label.len()).find(|at| label.is_char_boundary(*at)).unwrap_or(0);
    label[start..].to_owned()
}
