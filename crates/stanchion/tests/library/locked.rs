//! Tests the attribute `#[stanchion::locked]`.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, reason = "tests wait on the real clock, and may panic")]

use std::fmt::Display;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::Duration;

use stanchion::{ErrorKind, Fence, Locks, LossCause};

/// An error type of the user.
#[derive(Debug)]
enum Failure {
    Lock(stanchion::Error),
    Own,
}

impl From<stanchion::Error> for Failure {
    fn from(error: stanchion::Error) -> Self {
        Self::Lock(error)
    }
}

impl Failure {
    fn kind(&self) -> Option<ErrorKind> {
        match self {
            Self::Lock(error) => Some(error.kind()),
            Self::Own => None,
        }
    }
}

type OwnResult<T> = Result<T, Failure>;

struct Request {
    id: u64,
    tags: (u8, &'static str),
}

struct Service {
    locks: Locks,
    name: String,
    runs: u32,
}

impl Service {
    async fn new() -> Self {
        Self { locks: Locks::open("memory:").await.unwrap(), name: "files".to_owned(), runs: 0 }
    }

    #[stanchion::locked(key = "{self.name}:{request.id}:{request.tags.1}{{}}", guard = guard)]
    async fn key_of(&self, request: Request) -> OwnResult<String> {
        assert_eq!(request.tags.0, 7);
        Ok(guard.key().to_string())
    }

    #[stanchion::locked(key = "k", guard = held)]
    async fn fence(&self) -> OwnResult<Fence> {
        held.check()?;
        assert!(self.locks.is_locked("k").await?);
        Ok(held.fence())
    }

    #[stanchion::locked(key = "k")]
    async fn failing(&mut self, fails: bool) -> OwnResult<u32> {
        self.runs += 1;
        if fails {
            return Err(Failure::Own);
        }
        Ok(self.runs)
    }

    #[stanchion::locked(key = "k", try)]
    async fn at_once(&self) -> OwnResult<()> {
        Ok(())
    }

    #[stanchion::locked(key = "k", wait = "20ms")]
    async fn within(&self) -> OwnResult<()> {
        Ok(())
    }

    #[stanchion::locked(key = "cool", cooldown = "1h 30m")]
    async fn cooling(&self) -> OwnResult<()> {
        Ok(())
    }

    #[stanchion::locked(key = "cool", cooldown = Duration::from_secs(minutes * 60))]
    async fn cooling_for(&self, minutes: u64) -> OwnResult<()> {
        Ok(())
    }

    #[stanchion::locked(key = "limited", max_hold = "2m")]
    async fn longest(&self) -> OwnResult<Duration> {
        Ok(self.locks.inspect("limited").await?.holders[0].remaining.unwrap())
    }

    #[stanchion::locked(key = "limited", ttl = "3m", guard = guard)]
    async fn fixed(&self) -> OwnResult<Duration> {
        Ok(guard.valid_for().unwrap())
    }

    #[stanchion::locked(key = "shared", read, try)]
    async fn read(&self) -> OwnResult<()> {
        // Another reader may enter, and a writer may not.
        self.read_inside().await?;
        assert_eq!(self.write().await.unwrap_err().kind(), Some(ErrorKind::Busy));
        Ok(())
    }

    #[stanchion::locked(key = "shared", read, try)]
    async fn read_inside(&self) -> OwnResult<()> {
        Ok(())
    }

    #[stanchion::locked(key = "shared", write, try)]
    async fn write(&self) -> OwnResult<()> {
        assert_eq!(self.read_inside().await.unwrap_err().kind(), Some(ErrorKind::Busy));
        Ok(())
    }

    #[stanchion::locked(key = "k")]
    async fn work(&self, entered: Arc<tokio::sync::Notify>, dropped: SetOnDrop) -> OwnResult<()> {
        let _dropped = dropped;
        entered.notify_one();
        std::future::pending().await
    }
}

struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[tokio::test]
async fn key_is_formatted_from_arguments() {
    let service = Service::new().await;
    let request = Request { id: 42, tags: (7, "a") };
    assert_eq!(service.key_of(request).await.unwrap(), "files:42:a{}");
}

#[tokio::test]
async fn body_sees_its_guard() {
    let service = Service::new().await;
    let (first, second) = (service.fence().await.unwrap(), service.fence().await.unwrap());
    assert!(second > first);
    assert!(!service.locks.is_locked("k").await.unwrap(), "the key is free when the call returns");
}

#[tokio::test]
async fn result_of_the_body_is_returned() {
    let mut service = Service::new().await;
    assert_eq!(service.failing(true).await.unwrap_err().kind(), None);
    assert!(!service.locks.is_locked("k").await.unwrap());
    assert_eq!(service.failing(false).await.unwrap(), 2);
}

#[tokio::test]
async fn unavailable_lock_is_an_error() {
    let service = Service::new().await;
    let held = service.locks.lock("k").await.unwrap();
    assert_eq!(service.at_once().await.unwrap_err().kind(), Some(ErrorKind::Busy));
    assert_eq!(service.within().await.unwrap_err().kind(), Some(ErrorKind::Timeout));
    held.release().await.unwrap();
    // Wait until the keeper has abandoned the waiter that timed out.
    service.locks.lock("k").wait(Duration::from_secs(30)).await.unwrap().release().await.unwrap();
    service.at_once().await.unwrap();
    service.within().await.unwrap();
}

#[tokio::test]
async fn options_reach_the_request() {
    let service = Service::new().await;
    service.cooling().await.unwrap();
    let closed = service.locks.inspect("cool").await.unwrap().closed_for.unwrap();
    assert!(closed > Duration::from_secs(5_300) && closed <= Duration::from_secs(5_400), "{closed:?}");
    let service = Service::new().await;
    service.cooling_for(2).await.unwrap();
    let closed = service.locks.inspect("cool").await.unwrap().closed_for.unwrap();
    assert!(closed > Duration::from_secs(60) && closed <= Duration::from_secs(120), "{closed:?}");
    let longest = service.longest().await.unwrap();
    assert!(longest > Duration::from_secs(60) && longest <= Duration::from_secs(130), "{longest:?}");
    let valid = service.fixed().await.unwrap();
    assert!(valid > Duration::from_secs(120) && valid <= Duration::from_secs(190), "{valid:?}");
    service.read().await.unwrap();
    service.write().await.unwrap();
}

#[tokio::test]
async fn lost_lock_drops_the_body() {
    let service = Service::new().await;
    let (entered, dropped) = (Arc::new(tokio::sync::Notify::new()), Arc::new(AtomicBool::new(false)));
    let force = async {
        entered.notified().await;
        let fence = service.locks.inspect("k").await.unwrap().holders[0].fence;
        service.locks.force_release("k", fence, "a test").await.unwrap();
    };
    let (outcome, ()) = tokio::join!(service.work(entered.clone(), SetOnDrop(dropped.clone())), force);
    assert_eq!(outcome.unwrap_err().kind(), Some(ErrorKind::Lost(LossCause::ForceReleased)));
    assert!(dropped.load(Ordering::SeqCst));
}

#[tokio::test]
async fn dropped_call_releases() {
    let service = Service::new().await;
    let entered = Arc::new(tokio::sync::Notify::new());
    tokio::select! {
        biased;
        _ = service.work(entered.clone(), SetOnDrop(Arc::default())) => unreachable!("the body never returns"),
        () = entered.notified() => {}
    }
    // This call waits until the keeper has released the key.
    service.locks.lock("k").wait(Duration::from_secs(30)).await.unwrap().release().await.unwrap();
}

// Functions of every shape that the attribute accepts.

static LOCKS: OnceLock<Locks> = OnceLock::new();
static LAZY: LazyLock<Locks> =
    LazyLock::new(|| stanchion::blocking::Locks::open("memory:").unwrap().as_async().clone());

/// Uses a handle in a static, and a generic, a destructured, a `mut` and an unused argument.
#[stanchion::locked(key = "all:{name}:{left}", locks = LOCKS.get().unwrap())]
#[must_use]
pub(crate) async fn shapes<T, const N: usize>(
    name: T,
    (left, _): (u8, u8),
    mut numbers: [u32; N],
    _unused: &str,
) -> Result<(String, u32), stanchion::Error>
where
    T: Display + Send,
{
    numbers[0] += 1;
    Ok((name.to_string(), numbers.iter().sum()))
}

#[stanchion::locked(key = "k", locks = LAZY)]
async fn opaque(name: impl Display + Send) -> Result<impl Display + Send, stanchion::Error> {
    Ok(format!("<{name}>"))
}

/// Uses the argument `locks` as the handle, and returns a borrow.
#[stanchion::locked(key = key(text))]
async fn borrowed<'a>(locks: &Locks, text: &'a str) -> OwnResult<&'a str> {
    text.split(':').next().ok_or(Failure::Own)
}

fn key(text: &str) -> String {
    format!("of {text}")
}

#[stanchion::locked(key = "recursive:{depth}")]
async fn recursive(locks: Arc<Locks>, depth: u8) -> Result<u8, Failure> {
    match depth {
        0 => Ok(0),
        _ => Ok(Box::pin(recursive(locks, depth - 1)).await? + 1),
    }
}

#[tracing::instrument(skip(locks))]
#[stanchion::locked(key = "traced:{id}")]
async fn traced(locks: &Locks, id: u64) -> OwnResult<u64> {
    Ok(id)
}

#[stanchion::locked(key = "traced:{id}")]
#[tracing::instrument(skip_all)]
async fn traced_inside(locks: &Locks, id: u64) -> OwnResult<u64> {
    Ok(id)
}

trait Named {
    async fn name(&self) -> OwnResult<&str>;
}

impl Named for Service {
    #[stanchion::locked(key = "k")]
    async fn name(&self) -> OwnResult<&str> {
        Ok(&self.name)
    }
}

impl<T: Named> Named for (T, u8) {
    #[stanchion::locked(key = "k", locks = LAZY)]
    async fn name(&self) -> OwnResult<&str> {
        self.0.name().await
    }
}

/// Fails to compile unless the future is `Send`.
fn is_send<T>(future: impl Future<Output = T> + Send) -> impl Future<Output = T> + Send {
    future
}

#[tokio::test]
async fn attribute_accepts_every_function_shape() {
    let locks = LOCKS.get_or_init(|| LAZY.clone());
    assert_eq!(is_send(shapes("n", (1, 2), [1, 2, 3], "")).await.unwrap(), ("n".to_owned(), 7));
    assert_eq!(is_send(opaque(5)).await.unwrap().to_string(), "<5>");
    assert_eq!(is_send(borrowed(locks, "a:b")).await.unwrap(), "a");
    assert_eq!(recursive(Arc::new(locks.clone()), 3).await.unwrap(), 3);
    assert_eq!(is_send(traced(locks, 4)).await.unwrap(), 4);
    assert_eq!(is_send(traced_inside(locks, 4)).await.unwrap(), 4);
    let service = (Service::new().await, 0);
    assert_eq!(service.name().await.unwrap(), "files");
    assert!(is_send(service.0.fence()).await.is_ok());
    let mut service = service.0;
    assert!(is_send(service.failing(false)).await.is_ok());
    let spawned = tokio::spawn(shapes("n".to_owned(), (1, 2), [1], "x"));
    assert!(spawned.await.unwrap().is_ok());
}
