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
//! // One request at a time for each path. Others get `409 Conflict` with `Retry-After`.
//! let lock = LockLayer::new(locks, |request| Some(format!("charge:{}", request.uri.path())));
//! let app: Router = Router::new().route("/invoices/{id}/charge", post(charge)).layer(lock);
//! # Ok::<(), stanchion::Error>(()) }).unwrap();
//! ```
//!
//! The layer answers:
//!
//! | if | then |
//! |---|---|
//! | the request has no key | the answer of the service, without a lock |
//! | the lock is granted | the answer of the service |
//! | the key is locked | 409, or the status of [`busy_status`](LockLayer::busy_status), with a `Retry-After` header |
//! | the lock is lost while the service runs | 503; the service's future is dropped |
//! | the store cannot serve, or the handle is draining | 503, with `Retry-After` if the store named a time |
//! | the key is invalid: empty, too long | 400 |
//! | an option is out of range | 500 |
//!
//! An answer of the layer has the default body, which is empty, and the [`Error`] behind it in its extensions, as
//! `Arc<Error>`.
//!
//! The request that reaches the service has two extensions: the [`Fence`](crate::Fence), to send with every side
//! effect, and a [`HeldLock`], which shows whether the lock is still held.

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
use crate::key::Key;
use crate::locks::Locks;
use crate::request::{LockRequest, conclude};
use crate::shared::Shared;

pub use body::LockedBody;
pub use held::HeldLock;

/// Makes the lock request for an HTTP request from its head, or `None` if it needs no lock.
type LockFor = dyn Fn(&Parts) -> Option<LockRequest> + Send + Sync;

/// Takes a lock for each request, with a key from the request, and releases it when the response is ready.
///
/// The [module](self) lists the answers.
#[derive(Clone)]
pub struct LockLayer {
    lock_for: Arc<LockFor>,
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
    /// Creates a layer that locks the key that `key` returns for a request's head. Without a key the request passes
    /// without a lock.
    pub fn new(locks: Locks, key: impl Fn(&Parts) -> Option<String> + Send + Sync + 'static) -> Self {
        Self::with_request(move |parts| key(parts).map(|key| locks.lock(key)))
    }

    /// Creates a layer that uses the lock request that `lock_for` returns for a request's head, with any options: a
    /// reader, a lifetime, a cooldown.
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
    pub fn with_request(lock_for: impl Fn(&Parts) -> Option<LockRequest> + Send + Sync + 'static) -> Self {
        Self {
            lock_for: Arc::new(lock_for),
            wait: Duration::ZERO,
            busy: StatusCode::CONFLICT,
            retry_after: Duration::from_secs(1),
            holds_while_body: false,
        }
    }

    /// Limits the wait for the lock. Default: does not wait. A limit of the lock request overrides this one.
    #[must_use]
    pub fn wait(mut self, limit: Duration) -> Self {
        self.wait = limit;
        self
    }

    /// Sets the status of the answer if the key is locked. Default: 409 Conflict. 423 Locked is also common.
    #[must_use]
    pub fn busy_status(mut self, status: StatusCode) -> Self {
        self.busy = status;
        self
    }

    /// Sets the `Retry-After` of that answer, in whole seconds, rounded up. Default: 1 s.
    ///
    /// It applies if nobody knows when the key will be free, because its holder has no deadline.
    #[must_use]
    pub fn retry_after(mut self, span: Duration) -> Self {
        self.retry_after = span;
        self
    }

    /// Holds the lock until the response's body has ended or was dropped, instead of until the response is ready.
    ///
    /// For services that work while they send. If the lock is lost during that time, the body ends with an error.
    #[must_use]
    pub fn hold_while_body(mut self) -> Self {
        self.holds_while_body = true;
        self
    }

    async fn acquire(&self, request: LockRequest) -> Result<Guard, Rejection> {
        let handle = request.handle.clone();
        let key = handle.key(&request.key).map_err(|error| {
            let status = match error.kind() {
                ErrorKind::InvalidArgument => StatusCode::BAD_REQUEST,
                _ => StatusCode::SERVICE_UNAVAILABLE,
            };
            Rejection { status, retry_after: None, error }
        })?;
        let limit = request.options.wait.unwrap_or(self.wait);
        match request.wait(limit).await {
            Ok(guard) => Ok(guard),
            Err(error) if matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Busy) => {
                let retry_after = Some(self.busy_for(&handle.shared, &key).await);
                Err(Rejection { status: self.busy, retry_after, error })
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Returns the time until a deadline or a cooldown frees the key, or the configured time if there is none.
    async fn busy_for(&self, shared: &Shared, key: &Key) -> Duration {
        let state = shared.inspect(key).await.ok();
        let free_in = state.and_then(|state| {
            let deadline = state.holders.iter().filter_map(|holder| holder.remaining).min();
            deadline.or(state.closed_for)
        });
        free_in.unwrap_or(self.retry_after)
    }
}

impl<S> Layer<S> for LockLayer {
    type Service = LockService<S>;

    fn layer(&self, inner: S) -> LockService<S> {
        LockService { inner, layer: self.clone() }
    }
}

/// A service that [`LockLayer`] wraps.
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
        // The service whose `poll_ready` succeeded must serve the request, not its clone.
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
    let Some(lock_request) = (layer.lock_for)(&parts) else {
        let response = inner.call(Request::from_parts(parts, body)).await?;
        return Ok(response.map(LockedBody::free));
    };
    let guard = match layer.acquire(lock_request).await {
        Ok(guard) => Arc::new(guard),
        Err(rejection) => return Ok(rejection.into_response()),
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
        // Another thread uses the guard through a `HeldLock` at this moment. It drops the guard afterwards, which
        // releases the lock.
        None => finished.map_err(Error::lost),
    };
    match outcome.map_err(Rejection::from) {
        Ok(response) => Ok(response?.map(LockedBody::free)),
        Err(rejection) => Ok(rejection.into_response()),
    }
}

/// An answer that the layer gives instead of the service.
struct Rejection {
    status: StatusCode,
    retry_after: Option<Duration>,
    error: Error,
}

impl From<Error> for Rejection {
    fn from(error: Error) -> Self {
        let status = match error.kind() {
            ErrorKind::InvalidArgument => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self { status, retry_after: error.retry_after(), error }
    }
}

impl Rejection {
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
