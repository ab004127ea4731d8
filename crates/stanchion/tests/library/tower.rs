//! Tests the layer for HTTP services: over HTTP with the service of the example, or in process if only the response
//! matters.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests wait on the real clock, and may panic")]

#[path = "../../examples/axum_lock.rs"]
mod axum_lock;

use std::convert::Infallible;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use crate::support::until;
use axum::body::{Body, Bytes};
use axum::routing::get;
use axum::{Extension, Router};
use http::{Request, Response, StatusCode};
use http_body::{Body as _, Frame};
use stanchion::store::{Fault, Faulty, Memory, Operation};
use stanchion::tower::{HeldLock, LockLayer};
use stanchion::{Error, ErrorKind, Fence, Locks, LossCause, RetryPolicy};
use tokio::sync::{Notify, mpsc};
use tower_service::Service as _;

const LONG: Duration = Duration::from_secs(30);

/// A service that notifies the test when a request enters it, and waits until the test lets it go on.
#[derive(Clone, Default)]
struct Gate {
    entered: Arc<Notify>,
    go: Arc<Notify>,
    dropped: Arc<AtomicBool>,
}

struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Gate {
    fn app(&self, lock: LockLayer) -> Router {
        let gate = self.clone();
        let handler = move |Extension(fence): Extension<Fence>, Extension(held): Extension<HeldLock>| async move {
            let _dropped = SetOnDrop(gate.dropped.clone());
            assert!(held.is_held() && held.check().is_ok() && held.fence() == fence);
            gate.entered.notify_one();
            gate.go.notified().await;
            fence.to_string()
        };
        Router::new().route("/{key}", get(handler)).layer(lock)
    }
}

fn by_path(locks: &Locks) -> LockLayer {
    LockLayer::new(locks.clone(), |request| Some(request.uri.path().trim_start_matches('/').to_owned()))
}

async fn send(app: &Router, path: &str) -> Response<Body> {
    let request = Request::builder().uri(path).body(Body::empty()).unwrap();
    let response: Result<_, Infallible> = app.clone().call(request).await;
    response.unwrap()
}

fn retry_after(response: &Response<Body>) -> Option<u64> {
    response.headers().get("retry-after").map(|value| value.to_str().unwrap().parse().unwrap())
}

/// Sends a request over HTTP and returns the head and the body of the response, in lower case.
fn over_http(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "{request} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    response.to_lowercase()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn second_request_gets_retry_after() {
    let locks = Locks::open("memory:").await.unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let gate = Gate::default();
    let app = axum_lock::app(locks.clone()).merge(gate.app(by_path(&locks)));
    let server = tokio::spawn(async move { axum::serve(listener, app).await });
    let send_over_http =
        async |request: &'static str| tokio::task::spawn_blocking(move || over_http(address, request)).await.unwrap();

    let first = tokio::task::spawn_blocking(move || over_http(address, "GET /k"));
    gate.entered.notified().await;
    let fence = locks.inspect("k").await.unwrap().holders[0].fence;
    let second = send_over_http("GET /k").await;
    assert!(second.starts_with("http/1.1 409 conflict\r\n"), "{second}");
    assert!(second.contains("\r\nretry-after: 1\r\n"), "{second}");
    gate.go.notify_one();
    let first = first.await.unwrap();
    assert!(first.starts_with("http/1.1 200 ok\r\n") && first.ends_with(&fence.to_string()), "{first}");

    // The service of the example.
    let charged = send_over_http("POST /invoices/42/charge").await;
    assert!(charged.contains(" 200 ok\r\n") && charged.contains("invoice 42 is charged under fence"), "{charged}");
    assert!(!locks.is_locked("invoice:42").await.unwrap(), "the key is locked after the response");
    let _held = locks.lock("invoice:42").max_hold(Duration::from_secs(600)).await.unwrap();
    let busy = send_over_http("POST /invoices/42/charge").await;
    assert!(busy.contains(" 409 conflict\r\n"), "{busy}");
    let other = send_over_http("POST /invoices/43/charge").await;
    assert!(other.contains(" 200 ok\r\n"), "{other}");
    server.abort();
}

#[tokio::test]
async fn busy_answer_says_when_to_retry() {
    let locks = Locks::open("memory:").await.unwrap();
    let app =
        Gate::default().app(by_path(&locks).busy_status(StatusCode::LOCKED).retry_after(Duration::from_millis(6_500)));
    let held = locks.lock("k").await.unwrap();
    let busy = send(&app, "/k").await;
    assert_eq!(
        (busy.status(), retry_after(&busy)),
        (StatusCode::LOCKED, Some(7)),
        "a hold without a deadline gives the configured Retry-After"
    );
    assert_eq!(busy.extensions().get::<Arc<Error>>().unwrap().kind(), ErrorKind::Busy);
    assert!(busy.into_body().is_end_stream());
    held.release().await.unwrap();
    let held = locks.lock("k").ttl(Duration::from_secs(100)).await.unwrap();
    let seconds = retry_after(&send(&app, "/k").await).unwrap();
    assert!((30..=110).contains(&seconds), "{seconds} is not the rest of the hold");
    held.set_cooldown(Some(Duration::from_secs(1_000))).unwrap();
    held.release().await.unwrap();
    let seconds = retry_after(&send(&app, "/k").await).unwrap();
    assert!((500..=1_000).contains(&seconds), "{seconds} is not the rest of the cooldown");
}

#[tokio::test]
async fn longest_retry_after_is_sent() {
    let locks = Locks::open("memory:").await.unwrap();
    let app = Gate::default().app(by_path(&locks).retry_after(Duration::MAX));
    let _held = locks.lock("k").await.unwrap();
    assert_eq!(retry_after(&send(&app, "/k").await), Some(u64::MAX));
}

#[tokio::test]
async fn wait_limit_lets_requests_wait() {
    let locks = Locks::open("memory:").await.unwrap();
    let gate = Gate::default();
    let app = gate.app(by_path(&locks).wait(LONG));
    let held = locks.lock("k").await.unwrap();
    let waiting = tokio::spawn({
        let app = app.clone();
        async move { send(&app, "/k").await.status() }
    });
    until("the request waits", async || locks.inspect("k").await.unwrap().waiters.len() == 1).await;
    held.release().await.unwrap();
    gate.go.notify_one();
    assert_eq!(waiting.await.unwrap(), StatusCode::OK);

    // The wait limit of the lock request overrides that of the layer.
    let of_request = locks.clone();
    let lock = LockLayer::with_request(move |_| Some(of_request.lock("k").wait(Duration::from_millis(20)))).wait(LONG);
    let _held = locks.lock("k").await.unwrap();
    let busy = send(&gate.app(lock), "/any").await;
    assert_eq!(busy.extensions().get::<Arc<Error>>().unwrap().kind(), ErrorKind::Timeout);
}

#[tokio::test]
async fn lost_lock_drops_service_and_answers_503() {
    let locks = Locks::open("memory:").await.unwrap();
    let gate = Gate::default();
    let app = gate.app(by_path(&locks));
    let force = async {
        gate.entered.notified().await;
        let fence = locks.inspect("k").await.unwrap().holders[0].fence;
        locks.force_release("k", fence, "a test").await.unwrap();
    };
    let (response, ()) = tokio::join!(send(&app, "/k"), force);
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    let kind = response.extensions().get::<Arc<Error>>().unwrap().kind();
    assert_eq!(kind, ErrorKind::Lost(LossCause::ForceReleased));
    assert!(gate.dropped.load(Ordering::SeqCst));
}

#[tokio::test]
async fn late_loss_answers_503() {
    let locks = Locks::open("memory:").await.unwrap();
    let of_service = locks.clone();
    // The handler loses the lock and returns at once.
    let handler = move |Extension(held): Extension<HeldLock>| async move {
        of_service.force_release("k", held.fence(), "a test").await.unwrap();
        held.cancel_token().cancelled().await;
        assert_eq!(held.check().unwrap_err().kind(), ErrorKind::Lost(LossCause::ForceReleased));
        assert_eq!(held.remaining(), Some(Duration::ZERO));
    };
    let app = Router::new().route("/{key}", get(handler)).layer(by_path(&locks));
    assert_eq!(send(&app, "/k").await.status(), StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn faults_and_invalid_keys_differ_in_status() {
    let store = Faulty::new(Memory::new());
    let faults = store.faults();
    let locks = Locks::builder_with_store(store).retry(RetryPolicy::never()).open().await.unwrap();
    let gate = Gate::default();
    let app = gate.app(by_path(&locks));
    faults.next(Operation::Acquire, Fault::Fail(ErrorKind::Unavailable));
    assert_eq!(send(&app, "/k").await.status(), StatusCode::SERVICE_UNAVAILABLE);
    let long = format!("/{}", "x".repeat(600));
    assert_eq!(send(&app, &long).await.status(), StatusCode::BAD_REQUEST);
    let of_request = locks.clone();
    let wrong = LockLayer::with_request(move |_| Some(of_request.lock("k").ttl(Duration::ZERO)));
    assert_eq!(send(&gate.app(wrong), "/k").await.status(), StatusCode::INTERNAL_SERVER_ERROR);
    locks.drain("a test");
    let response = send(&app, "/k").await;
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.extensions().get::<Arc<Error>>().unwrap().kind(), ErrorKind::Draining);
}

#[tokio::test]
async fn request_without_key_needs_no_lock() {
    let locks = Locks::open("memory:").await.unwrap();
    locks.close().await.unwrap();
    let handler = async |fence: Option<Extension<Fence>>| assert!(fence.is_none());
    let app = Router::new().route("/", get(handler)).layer(LockLayer::new(locks, |_| None));
    assert_eq!(send(&app, "/").await.status(), StatusCode::OK);
}

#[tokio::test]
async fn gone_client_leaves_no_lock() {
    let locks = Locks::open("memory:").await.unwrap();
    let gate = Gate::default();
    let app = gate.app(by_path(&locks));
    tokio::select! {
        biased;
        _ = send(&app, "/k") => unreachable!("the service never returns"),
        () = gate.entered.notified() => {}
    }
    until("the key is free", async || !locks.is_locked("k").await.unwrap()).await;
}

#[tokio::test]
async fn kept_held_lock_prolongs_nothing() {
    let locks = Locks::open("memory:").await.unwrap();
    let (sender, mut kept) = mpsc::unbounded_channel();
    let handler = move |Extension(held): Extension<HeldLock>| async move { sender.send(held).unwrap() };
    let app = Router::new().route("/{key}", get(handler)).layer(by_path(&locks));
    assert_eq!(send(&app, "/k").await.status(), StatusCode::OK);
    let held = kept.recv().await.unwrap();
    assert!(!locks.is_locked("k").await.unwrap(), "the key is locked after the response");
    assert!(!held.is_held() && held.check().is_err() && held.heartbeat().is_err());
    assert!(!held.cancel_token().is_cancelled(), "a released lock was not lost");
}

/// A body that is sent in pieces.
struct Pieces(mpsc::UnboundedReceiver<&'static str>);

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(context).map(|piece| piece.map(|piece| Ok(Frame::data(Bytes::from(piece)))))
    }
}

async fn next(body: &mut Body) -> Option<Result<Bytes, axum::Error>> {
    let frame = std::future::poll_fn(|context| Pin::new(&mut *body).poll_frame(context));
    let frame = tokio::time::timeout(LONG, frame).await.unwrap();
    frame.map(|frame| frame.map(|frame| frame.into_data().unwrap()))
}

/// Returns a service that holds its lock until the body ends, and a channel with a sender for each body.
fn app_with_body(locks: &Locks) -> (Router, mpsc::UnboundedReceiver<mpsc::UnboundedSender<&'static str>>) {
    let (give, given) = mpsc::unbounded_channel();
    let handler = move || async move {
        let (sender, pieces) = mpsc::unbounded_channel();
        give.send(sender).unwrap();
        Body::new(Pieces(pieces))
    };
    (Router::new().route("/{key}", get(handler)).layer(by_path(locks).hold_while_body()), given)
}

#[tokio::test]
async fn lock_is_held_until_the_body_ends() {
    let locks = Locks::open("memory:").await.unwrap();
    let (app, mut given) = app_with_body(&locks);
    let mut body = send(&app, "/k").await.into_body();
    let sender = given.recv().await.unwrap();
    sender.send("piece").unwrap();
    assert_eq!(next(&mut body).await.unwrap().unwrap(), "piece");
    assert!(locks.is_locked("k").await.unwrap());
    assert_eq!(send(&app, "/k").await.status(), StatusCode::CONFLICT);
    drop(sender);
    assert!(next(&mut body).await.is_none());
    until("the key is free", async || !locks.is_locked("k").await.unwrap()).await;

    // A dropped body releases the lock, too.
    let body = send(&app, "/k").await.into_body();
    let _sender = given.recv().await.unwrap();
    assert!(locks.is_locked("k").await.unwrap());
    drop(body);
    until("the key is free", async || !locks.is_locked("k").await.unwrap()).await;
}

#[tokio::test]
async fn lost_lock_ends_the_body_with_an_error() {
    let locks = Locks::open("memory:").await.unwrap();
    let (app, mut given) = app_with_body(&locks);
    let mut body = send(&app, "/k").await.into_body();
    let sender = given.recv().await.unwrap();
    let fence = locks.inspect("k").await.unwrap().holders[0].fence;
    locks.force_release("k", fence, "a test").await.unwrap();
    let error = next(&mut body).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("lost while the response was sent"), "{error}");
    sender.send("piece").unwrap();
    assert!(next(&mut body).await.is_none(), "the body goes on after the error");
    assert!(body.is_end_stream());
}
