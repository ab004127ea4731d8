//! Configures and opens a handle.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::clock::Clock;
use crate::error::{Error, ErrorKind, Result};
use crate::handle::Handle;
use crate::keeper;
use crate::key::{check_namespace, normal};
use crate::lease::Drift;
use crate::limits::{MAX_OWNER_BYTES, check_duration};
use crate::linger::check_linger;
use crate::locks::Locks;
use crate::on_lost::OnLost;
use crate::retry::RetryPolicy;
use crate::shared::{Config, Shared};
use crate::store::{self, Store, shown_scheme};
use crate::telemetry::KeyRedaction;

/// The settings of a handle before it is opened. [`Locks::builder`] returns one.
///
/// ```
/// use std::time::Duration;
/// use stanchion::{KeyRedaction, Locks, OnLost};
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let locks = Locks::builder("memory:")
///     .namespace("billing")
///     .owner("worker-3")
///     .session_ttl(Duration::from_secs(5))
///     .on_lost(OnLost::hook(|loss| eprintln!("lost {}: {}", loss.key, loss.cause)))
///     .redact_keys(KeyRedaction::Hashed)
///     .open()
///     .await?;
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
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
    linger: Option<Duration>,
}

enum Source {
    Url(String),
    Store(Arc<dyn Store>),
}

impl std::fmt::Debug for Source {
    /// Shows the scheme alone, because the URL may contain a password.
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
            linger: None,
        }
    }

    /// Keeps the keys of this handle separate from those of other namespaces. Default: no namespace. At most 128 bytes.
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.namespace = normal(namespace).into_owned();
        self
    }

    /// Sets the label that identifies this handle to people who inspect keys. At most 128 bytes.
    ///
    /// Default: `PROGRAM@HOST/PROCESS`.
    pub fn owner(mut self, owner: &str) -> Self {
        self.owner = Some(owner.to_owned());
        self
    }

    /// Sets the time after which a session expires unless it is renewed. Default: 10 s.
    ///
    /// The keeper renews the session five times in that time. If the process dies, its holds are free after this time.
    /// In the embedded store they are free at once, because its sessions end with the process.
    pub fn session_ttl(mut self, ttl: Duration) -> Self {
        self.session_ttl = ttl;
        self
    }

    /// Sets how much clocks may drift. Default: 1 % and 2 ms.
    ///
    /// The holder subtracts the drift from each lifetime that the store grants.
    ///
    /// ```
    /// # use std::time::Duration;
    /// use stanchion::{Drift, Locks};
    ///
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// let drift = Drift { per_mille: 20, fixed: Duration::from_millis(5) };
    /// let locks = Locks::builder("memory:").drift(drift).open().await?;
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    pub fn drift(mut self, drift: Drift) -> Self {
        self.drift = drift;
        self
    }

    /// Sets how requests to the store are retried after transient errors. Default: [`RetryPolicy::default`].
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = policy;
        self
    }

    /// Limits the time that [`open`](Builder::open) may take with all its attempts. Default: [`RetryPolicy::total`], 10
    /// s.
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

    /// Sets the action when a hold of this handle is lost, in addition to the signal of its guard. Default: none.
    ///
    /// [`LockRequest::on_lost`](crate::LockRequest::on_lost) overrides it for one hold.
    pub fn on_lost(mut self, policy: OnLost) -> Self {
        self.on_lost = policy;
        self
    }

    /// Sets the time for which holds of this handle linger after their release. Default: never.
    ///
    /// It applies to exclusive requests without a ttl, `max_hold` or cooldown, and not to
    /// [`lock_all`](Locks::lock_all), [`once`](Locks::once) and [`elect`](Locks::elect).
    /// [`LockRequest::linger`](crate::LockRequest::linger) describes the effect and its price, and overrides it for one
    /// request.
    pub fn linger(mut self, linger: Duration) -> Self {
        self.linger = Some(linger);
        self
    }

    /// Sets how keys appear in spans and log events (feature `tracing`). Default: unchanged.
    pub fn redact_keys(mut self, shown: KeyRedaction) -> Self {
        self.key_redaction = shown;
        self
    }

    /// Replaces the clock by which this handle measures lifetimes and waits. Default: the machine's clock. For tests.
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Connects to the store and opens the session.
    ///
    /// Transient errors are retried until [`open_within`](Builder::open_within) is over. Other errors, such as a wrong
    /// password, fail at once.
    ///
    /// # Errors
    /// - The errors of [`Locks::open`].
    /// - [`ErrorKind::InvalidArgument`] if a setting is out of range.
    /// - [`ErrorKind::Internal`] if the system has no thread or file descriptor left.
    ///
    /// # Cancel safety
    /// The same as for [`Locks::open`].
    pub async fn open(self) -> Result<Locks> {
        check_duration("the session ttl", self.session_ttl)?;
        check_namespace(&self.namespace)?;
        if self.drift.per_mille >= 500 || self.retry.attempts == 0 {
            let message = "the drift must be below 500 per mille, and the retry policy needs at least one attempt";
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        self.drift.check(self.session_ttl)?;
        check_linger(self.linger.unwrap_or_default())?;
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
            linger: self.linger,
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
        // After an error, or if this future is dropped, the keeper ends by itself in the background.
        opened.shared().ok_or_else(ended)?.valid_session_by(give_up_at).await?;
        let shared = opened.claim().ok_or_else(ended)?;
        Ok(Locks { handle: Arc::new(Handle::new(shared, thread)) })
    }
}

/// Opens the store, and retries after transient errors until the caller drops the future. Leaves the last error in
/// `last`.
async fn open_until_given_up(
    url: &str,
    policy: &RetryPolicy,
    clock: &Clock,
    last: &Mutex<Option<Error>>,
) -> Result<Arc<dyn Store>> {
    let mut pauses = policy.endless_pauses();
    loop {
        match store::open(url).await {
            Err(fault) if fault.is_transient() => *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault),
            done => return done,
        }
        clock.sleep(pauses.next().unwrap_or(policy.longest_pause)).await;
    }
}

/// Returns `PROGRAM@HOST/PROCESS`, shortened at its beginning if it is too long.
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
