//! Defines [`Error`], the only error type of the library, and the kinds and causes in it.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::key::Key;
use crate::token::Token;

/// The result of a call to stanchion.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The kind of an [`Error`], by how the caller can react.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The wait limit was reached. Nothing is held.
    Timeout,
    /// The caller's cancellation token fired. Nothing is held.
    Cancelled,
    /// The handle is draining or closed, and takes no new holds.
    Draining,
    /// The lock was lost while it was in use. Stop the work: another holder may get the key.
    Lost(LossCause),
    /// Someone else holds the key, and the call does not wait.
    Busy,
    /// An argument is outside its documented range.
    InvalidArgument,
    /// The store or the file system rejected the credentials, or denied access.
    Unauthorized,
    /// The store cannot be reached, or cannot serve now. Transient.
    Unavailable,
    /// The store asks for fewer requests. Transient: see [`Error::retry_after`].
    RateLimited,
    /// The store did not answer within the time for one request. Transient: the request did nothing, or can be
    /// repeated.
    NetworkTimeout,
    /// The request was sent, and its outcome is unknown. Transient. The error carries the token, and the keeper cleans
    /// up.
    Indeterminate,
    /// The store or this build lacks the feature.
    Unsupported,
    /// The store would lose locks, or cannot be used as it is configured. The message says what to change.
    Misconfigured,
    /// The library has a defect, or the store's data is damaged.
    Internal,
}

impl ErrorKind {
    /// Returns the name in lower case with underscores, as in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Cancelled => "cancelled",
            Self::Draining => "draining",
            Self::Lost(_) => "lost",
            Self::Busy => "busy",
            Self::InvalidArgument => "invalid_argument",
            Self::Unauthorized => "unauthorized",
            Self::Unavailable => "unavailable",
            Self::RateLimited => "rate_limited",
            Self::NetworkTimeout => "network_timeout",
            Self::Indeterminate => "indeterminate",
            Self::Unsupported => "unsupported",
            Self::Misconfigured => "misconfigured",
            Self::Internal => "internal",
        }
    }

    pub(crate) fn is_transient(self) -> bool {
        matches!(self, Self::Unavailable | Self::RateLimited | Self::NetworkTimeout | Self::Indeterminate)
    }
}

/// The reason why a lock was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum LossCause {
    /// The session could not be renewed in time, or the store ended it.
    SessionExpired,
    /// The fixed lifetime of the hold is over ([`LockRequest::ttl`](crate::LockRequest::ttl)).
    TtlExpired,
    /// The hold reached its [`max_hold`](crate::LockRequest::max_hold).
    MaxHold,
    /// No heartbeat came within [`heartbeat_within`](crate::LockRequest::heartbeat_within).
    HeartbeatMissed,
    /// Somebody released the hold with [`Locks::force_release`](crate::Locks::force_release).
    ForceReleased,
    /// The store no longer has the hold.
    Missing,
    /// The handle was closed.
    Closed,
}

impl LossCause {
    /// Returns the name in lower case with underscores, as in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::SessionExpired => "session_expired",
            Self::TtlExpired => "ttl_expired",
            Self::MaxHold => "max_hold",
            Self::HeartbeatMissed => "heartbeat_missed",
            Self::ForceReleased => "force_released",
            Self::Missing => "missing",
            Self::Closed => "closed",
        }
    }

    /// Returns whether the holder notices this loss before the store does, so that the store keeps the key locked for
    /// the grace in which the holder stops.
    pub(crate) fn leaves_grace(self) -> bool {
        matches!(self, Self::TtlExpired | Self::MaxHold | Self::HeartbeatMissed)
    }
}

impl fmt::Display for LossCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SessionExpired => "the session expired",
            Self::TtlExpired => "its ttl ran out",
            Self::MaxHold => "it was held for longer than max_hold",
            Self::HeartbeatMissed => "no heartbeat came in time",
            Self::ForceReleased => "it was force-released",
            Self::Missing => "the store no longer has it",
            Self::Closed => "the handle was closed",
        })
    }
}

/// An error of stanchion, with the key and the store that it is about.
///
/// `Display` is one line that names the key and the store, and never contains a secret. The cause is in
/// [`source`](StdError::source). Contention is not an error: calls that do not wait return an `Option`.
///
/// ```
/// use std::time::Duration;
/// use stanchion::ErrorKind;
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// # let locks = stanchion::Locks::open("memory:").await?;
/// # let _guard = locks.lock("report").await?;
/// match locks.lock("report").wait(Duration::from_millis(10)).await {
///     Ok(guard) => println!("held under fence {}", guard.fence()),
///     Err(error) if error.kind() == ErrorKind::Timeout => println!("someone else makes the report"),
///     Err(error) if error.is_transient() => println!("try again later: {error}"),
///     Err(error) => return Err(error),
/// }
/// # Ok::<(), stanchion::Error>(()) }).unwrap();
/// ```
#[derive(Clone)]
pub struct Error(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    message: String,
    /// The request may have taken effect although it failed.
    in_doubt: bool,
    retry_after: Option<Duration>,
    key: Option<Key>,
    token: Option<Token>,
    store: Option<&'static str>,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

impl Error {
    /// Creates an error of this kind. The message is a lowercase fragment without a final period and without secrets.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Arc::new(Inner {
            kind,
            message: message.into(),
            in_doubt: kind == ErrorKind::NetworkTimeout,
            retry_after: None,
            key: None,
            token: None,
            store: None,
            source: None,
        }))
    }

    /// Creates the error of a call whose hold was lost.
    pub(crate) fn lost(cause: LossCause) -> Self {
        Self::new(ErrorKind::Lost(cause), format!("the lock was lost: {cause}"))
    }

    /// Returns the parts for changing them; another clone of the error stays as it is.
    fn inner_mut(&mut self) -> &mut Inner {
        Arc::make_mut(&mut self.0)
    }

    /// Returns the kind, which says how the caller can react.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns whether the same call may succeed later without a change, because the store was unavailable, busy or
    /// slow.
    ///
    /// ```
    /// use stanchion::{Error, ErrorKind};
    /// assert!(Error::new(ErrorKind::Unavailable, "connection refused").is_transient());
    /// assert!(!Error::new(ErrorKind::InvalidArgument, "an empty key").is_transient());
    /// ```
    pub fn is_transient(&self) -> bool {
        self.0.kind.is_transient()
    }

    /// Replaces the kind and the message, and keeps the source.
    pub(crate) fn restate(mut self, kind: ErrorKind, message: String) -> Self {
        let inner = self.inner_mut();
        (inner.kind, inner.message) = (kind, message);
        self
    }

    /// Returns the message without the names of the key and the store.
    pub(crate) fn message(&self) -> &str {
        &self.0.message
    }

    /// Returns whether the request may have taken effect although it failed.
    ///
    /// It is always `true` for [`ErrorKind::Indeterminate`]. For other kinds it depends on how far the request got.
    ///
    /// ```
    /// use stanchion::{Error, ErrorKind};
    /// assert!(Error::new(ErrorKind::Indeterminate, "the connection broke").is_in_doubt());
    /// assert!(!Error::new(ErrorKind::Unavailable, "connection refused").is_in_doubt());
    /// ```
    pub fn is_in_doubt(&self) -> bool {
        self.0.in_doubt || self.0.kind == ErrorKind::Indeterminate
    }

    /// Returns the key that the call was about.
    pub fn key(&self) -> Option<&Key> {
        self.0.key.as_ref()
    }

    /// Returns the name of the store.
    pub fn store(&self) -> Option<&'static str> {
        self.0.store
    }

    /// Returns the token of a request whose outcome is unknown ([`ErrorKind::Indeterminate`]).
    pub fn token(&self) -> Option<&Token> {
        self.0.token.as_ref()
    }

    /// Returns how long to wait before another attempt, if the store named a time.
    pub fn retry_after(&self) -> Option<Duration> {
        self.0.retry_after
    }

    /// Adds the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.inner_mut().source = Some(Arc::from(source.into()));
        self
    }

    /// Adds the key, unless the error has one.
    #[must_use]
    pub fn with_key(mut self, key: &Key) -> Self {
        if self.0.key.is_none() {
            self.inner_mut().key = Some(key.clone());
        }
        self
    }

    /// Replaces the key if the error has one.
    pub(crate) fn replace_key(mut self, key: &Key) -> Self {
        if self.0.key.is_some() {
            self.inner_mut().key = Some(key.clone());
        }
        self
    }

    /// Adds the store's name, unless the error has one.
    #[must_use]
    pub fn with_store(mut self, store: &'static str) -> Self {
        if self.0.store.is_none() {
            self.inner_mut().store = Some(store);
        }
        self
    }

    /// Adds how long to wait before another attempt.
    #[must_use]
    pub fn with_retry_after(mut self, after: Duration) -> Self {
        self.inner_mut().retry_after = Some(after);
        self
    }

    /// Sets whether the request may have taken effect.
    ///
    /// Stores call this if the kind alone does not say it. An [`ErrorKind::Indeterminate`] always stays in doubt.
    #[must_use]
    pub fn in_doubt(mut self, in_doubt: bool) -> Self {
        self.inner_mut().in_doubt = in_doubt;
        self
    }

    #[must_use]
    pub(crate) fn with_token(mut self, token: Token) -> Self {
        self.inner_mut().token = Some(token);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.0.key, self.0.store) {
            (Some(key), Some(store)) => write!(f, "key `{key}` in {store}: ")?,
            (Some(key), None) => write!(f, "key `{key}`: ")?,
            (None, Some(store)) => write!(f, "{store}: ")?,
            (None, None) => {}
        }
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &self.0;
        let mut out = f.debug_struct("Error");
        out.field("kind", &inner.kind).field("message", &inner.message).field("in_doubt", &self.is_in_doubt());
        out.field("key", &inner.key).field("store", &inner.store).field("source", &inner.source).finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_names_key_and_store_in_one_line() {
        let key = Key::new("", "invoice:42").unwrap();
        let error = Error::new(ErrorKind::Timeout, "not obtained within 5s").with_key(&key).with_store("sqlite");
        assert_eq!(error.to_string(), "key `invoice:42` in sqlite: not obtained within 5s");
    }

    #[test]
    fn changed_clone_leaves_the_error() {
        let source = std::io::Error::other("refused");
        let error =
            Error::new(ErrorKind::Unavailable, "x").with_source(source).with_retry_after(Duration::from_secs(1));
        let clone = error.clone().restate(ErrorKind::Internal, "y".into()).with_store("sqlite").in_doubt(true);
        assert_eq!((error.kind(), error.to_string(), error.is_in_doubt()), (ErrorKind::Unavailable, "x".into(), false));
        assert_eq!((clone.kind(), clone.to_string()), (ErrorKind::Internal, "sqlite: y".into()));
        assert_eq!(clone.retry_after(), Some(Duration::from_secs(1)));
        assert_eq!(clone.source().unwrap().to_string(), "refused");
    }

    const ALL: [ErrorKind; 14] = [
        ErrorKind::Timeout,
        ErrorKind::Cancelled,
        ErrorKind::Draining,
        ErrorKind::Lost(LossCause::ForceReleased),
        ErrorKind::Busy,
        ErrorKind::InvalidArgument,
        ErrorKind::Unauthorized,
        ErrorKind::Unavailable,
        ErrorKind::RateLimited,
        ErrorKind::NetworkTimeout,
        ErrorKind::Indeterminate,
        ErrorKind::Unsupported,
        ErrorKind::Misconfigured,
        ErrorKind::Internal,
    ];

    /// Compares an error as it was made, after a store set the doubt, and after a store cleared it.
    #[test]
    fn kind_and_doubt_agree() {
        for kind in ALL {
            let made = Error::new(kind, "x").is_in_doubt();
            let [yes, no] = [true, false].map(|in_doubt| Error::new(kind, "x").in_doubt(in_doubt).is_in_doubt());
            let expected = match kind {
                ErrorKind::Indeterminate => (true, true, true),
                ErrorKind::NetworkTimeout => (true, true, false),
                _ => (false, true, false),
            };
            assert_eq!((made, yes, no), expected, "{kind:?}");
            // The new kind decides, even if a store had cleared the doubt.
            let restated = Error::new(kind, "x").in_doubt(false).restate(ErrorKind::Indeterminate, "y".into());
            assert!(restated.is_in_doubt() && format!("{restated:?}").contains("in_doubt: true"), "{kind:?}");
        }
    }

    #[test]
    fn transient_kinds_are_the_documented_four() {
        use ErrorKind::*;
        let transient: Vec<_> = ALL.into_iter().filter(|kind| Error::new(*kind, "x").is_transient()).collect();
        assert_eq!(transient, [Unavailable, RateLimited, NetworkTimeout, Indeterminate]);
    }
}
