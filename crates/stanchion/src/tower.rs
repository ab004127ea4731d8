//! A lock around each request of an HTTP service: a layer for `tower`, and so for `axum` and `tonic`.
//!
//! ```
//! use stanchion::tower::LockLayer;
//! use stanchion::{Fence, Locks};
//! use axum::{Extension, Router, routing::post};
//!
//! async fn charge(Extension(fence): Extension<Fence>) -> String {
//!     format!("charged under {fence}")
//! }
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let locks = Locks::open("memory:").await?;
//! // One at a time for each path; who comes meanwhile gets `409 Conflict` with `Retry-After`.
//! let lock = LockLayer::new(locks, |request| Some(format!("charge:{}", request.uri.path())));
//! let app: Router = Router::new().route("/invoices/{id}/charge", post(charge)).layer(lock);
//! # Ok::<(), stanchion::Error>(()) }).unwrap();
//! ```
//!
//! | what happens | the answer |
//! |---|---|
//! | the request has no key | that of the service, without a lock |
//! | granted | that of the service |
//! | another has the key | 409, or what [`busy_status`](LockLayer::busy_status) says, with `Retry-After` |
//! | the lock is lost while the service works | 503; the service's future is dropped |
//! | the store cannot serve, or the handle is draining | 503, with `Retry-After` if the store named a time |
//! | the key is none: empty, too long | 400 |
//! | an option is out of its range | 500 |
//!
//! Answers of the layer have the default body, an empty one, and the [`Error`] behind them in their
//! extensions, as `Arc<Error>`.
//!
//! The request that reaches the service has two extensions: the [`Fence`](crate::Fence), to be sent with every side effect,
//! and a [`HeldLock`], to be asked whether it is still held.

mod body;
mod held;

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::{HeaderValue, RETRY_AFTER};
use http::request::Parts;
use http::{Request, Response, StatusCode};
use tower_layer::Layer;
use tower_service::Service;

use crate::error::{Error, ErrorKind};
use crate::guard::Guard;
use crate::locks::Locks;
use crate::request::{LockRequest, conclude};

pub use body::LockedBody;
pub use held::HeldLock;

/// What makes a lock's request of the head of an HTTP request.
type LockFor = dyn Fn(&Parts) -> Option<LockRequest> + Send + Sync;

/// Takes a lock for each request, with a key from the request, and releases it when the response is ready.
#[derive(Clone)]
pub struct LockLayer {
    wanted: Arc<LockFor>,
    wait: Duration,
    busy: StatusCode,
    retry_after: Duration,
    holds_while_body: bool,
}

impl fmt::Debug for LockLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("LockLayer");
        out.field("wait", &self.wait).field("busy", &self.busy).field("retry_after", &self.retry_after);
        out.field("holds_while_body", &self.holds_while_body).finish_non_exhaustive()
    }
}

impl LockLayer {
    /// Locks the key that `key` makes of a request's head; a request without one goes through without a lock.
    pub fn new(locks: Locks, key: impl Fn(&Parts) -> Option<String> + Send + Sync + 'static) -> Self {
        Self::with_request(move |parts| key(parts).map(|key| locks.lock(key)))
    }

    /// Asks for the lock that `wanted` makes of a request's head, with whatever options: a reader's, a lifetime, a cooldown.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use stanchion::tower::LockLayer;
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// let locks = stanchion::Locks::open("memory:").await?;
    /// let lock = LockLayer::with_request(move |request| {
    ///     let key = request.headers.get("idempotency-key")?.to_str().ok()?;
    ///     Some(locks.lock(key).max_hold(Duration::from_secs(60)))
    /// });
    /// # Ok::<(), stanchion::Error>(()) }).unwrap();
    /// ```
    pub fn with_request(wanted: impl Fn(&Parts) -> Option<LockRequest> + Send + Sync + 'static) -> Self {
        Self {
            wanted: Arc::new(wanted),
            wait: Duration::ZERO,
            busy: StatusCode::CONFLICT,
            retry_after: Duration::from_secs(1),
            holds_while_body: false,
        }
    }

    /// Waits for the lock no longer than this; a limit of the lock's request goes before. Default: does not wait.
    #[must_use]
    pub fn wait(mut self, limit: Duration) -> Self {
        self.wait = limit;
        self
    }

    /// What a request is answered whose key another has. Default: 409 Conflict; 423 Locked is the other usual one.
    #[must_use]
    pub fn busy_status(mut self, status: StatusCode) -> Self {
        self.busy = status;
        self
    }

    /// The `Retry-After` of such an answer where it is not known when the key will be free, because its holder has no
    /// deadline. In whole seconds, rounded up. Default: 1 s.
    #[must_use]
    pub fn retry_after(mut self, span: Duration) -> Self {
        self.retry_after = span;
        self
    }

    /// Holds the lock until the response's body has ended or was given up, instead of until the response is ready: for
    /// services that work while they send. If the lock is lost meanwhile the body ends with an error.
    #[must_use]
    pub fn hold_while_body(mut self) -> Self {
        self.holds_while_body = true;
        self
    }

    async fn acquire(&self, wanted: LockRequest) -> Result<Guard, Refusal> {
        if let Err(error) = wanted.locks.key(&wanted.key) {
            let status = match error.kind() {
                ErrorKind::InvalidArgument => StatusCode::BAD_REQUEST,
                _ => StatusCode::SERVICE_UNAVAILABLE,
            };
            return Err(Refusal { status, retry_after: None, error });
        }
        let limit = wanted.wait.unwrap_or(self.wait);
        let (locks, key) = (wanted.locks.clone(), wanted.key.clone());
        match wanted.wait(limit).await {
            Ok(guard) => Ok(guard),
            Err(error) if matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Busy) => {
                let retry_after = Some(self.busy_for(&locks, key).await);
                Err(Refusal { status: self.busy, retry_after, error })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Until when a deadline or a cooldown frees the key, if one does.
    async fn busy_for(&self, locks: &Locks, key: String) -> Duration {
        let state = locks.inspect(key).await.ok();
        let known = state.and_then(|state| {
            let deadline = state.holders.iter().filter_map(|holder| holder.remaining).min();
            deadline.or(state.closed_for)
        });
        known.unwrap_or(self.retry_after)
    }
}

impl<S> Layer<S> for LockLayer {
    type Service = LockService<S>;

    fn layer(&self, inner: S) -> LockService<S> {
        LockService { inner, layer: self.clone() }
    }
}

/// What [`LockLayer`] makes of a service.
#[derive(Clone, Debug)]
pub struct LockService<S> {
    inner: S,
    layer: LockLayer,
}

impl<S, B, R> Service<Request<B>> for LockService<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send,
    B: Send + 'static,
    R: Default + Send + 'static,
{
    type Response = Response<LockedBody<R>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // The one that was asked whether it is ready, not its clone.
        let clone = self.inner.clone();
        let inner = std::mem::replace(&mut self.inner, clone);
        let layer = self.layer.clone();
        Box::pin(serve(layer, inner, request))
    }
}

async fn serve<S, B, R>(
    layer: LockLayer,
    mut inner: S,
    request: Request<B>,
) -> Result<Response<LockedBody<R>>, S::Error>
where
    S: Service<Request<B>, Response = Response<R>>,
    R: Default,
{
    let (mut parts, body) = request.into_parts();
    let Some(wanted) = (layer.wanted)(&parts) else {
        let response = inner.call(Request::from_parts(parts, body)).await?;
        return Ok(response.map(LockedBody::free));
    };
    let guard = match layer.acquire(wanted).await {
        Ok(guard) => Arc::new(guard),
        Err(refusal) => return Ok(refusal.into_response()),
    };
    parts.extensions.insert(guard.fence());
    parts.extensions.insert(HeldLock::of(&guard));
    let finished = tokio::select! {
        biased;
        response = inner.call(Request::from_parts(parts, body)) => Ok(response),
        cause = guard.lost() => Err(cause),
    };
    if layer.holds_while_body
        && guard.is_held()
        && let Ok(Ok(response)) = finished
    {
        return Ok(response.map(|body| LockedBody::holding(body, guard)));
    }
    let outcome = match Arc::into_inner(guard) {
        Some(guard) => conclude(guard, finished).await,
        // Somebody looks at it through a `HeldLock` at this very moment, and drops it after that, which releases.
        None => finished.map_err(Error::lost),
    };
    match outcome.map_err(Refusal::from) {
        Ok(response) => Ok(response?.map(LockedBody::free)),
        Err(refusal) => Ok(refusal.into_response()),
    }
}

/// An answer of the layer's own.
struct Refusal {
    status: StatusCode,
    retry_after: Option<Duration>,
    error: Error,
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let status = match error.kind() {
            ErrorKind::InvalidArgument => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self { status, retry_after: error.retry_after(), error }
    }
}

impl Refusal {
    fn into_response<R: Default>(self) -> Response<LockedBody<R>> {
        let mut response = Response::new(LockedBody::free(R::default()));
        *response.status_mut() = self.status;
        if let Some(span) = self.retry_after {
            let seconds = span.as_secs().saturating_add(u64::from(span.subsec_nanos() > 0));
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        response.extensions_mut().insert(Arc::new(self.error));
        response
    }
}
