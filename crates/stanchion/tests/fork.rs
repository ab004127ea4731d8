//! Tests a child that is forked without exec: it cannot use the parent's handle, and dropping its copies releases
//! nothing.
#![allow(unsafe_code, reason = "fork has no safe form")]
#![allow(clippy::unwrap_used, reason = "tests may panic")]

use std::time::Duration;

use stanchion::{ErrorKind, Locks};

const LINGER: Duration = Duration::from_secs(30);

#[test]
fn forked_child_is_rejected_and_releases_nothing() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (locks, guard, detached) = runtime.block_on(async {
        let locks = Locks::open("memory:").await.unwrap();
        while !locks.inspect("lingering").await.unwrap().holders.first().is_some_and(|holder| holder.lingers) {
            drop(locks.lock("lingering").linger(LINGER).await.unwrap());
        }
        let guard = locks.lock("k").await.unwrap();
        let detached = locks.lock("detached").await.unwrap();
        (locks, guard, detached)
    });
    // SAFETY: this test is alone in its process; the child calls nothing that another thread could have locked.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        let mut request = Box::pin(locks.try_lock("other"));
        let is_rejected = match request.as_mut().poll(&mut context) {
            std::task::Poll::Ready(Err(error)) => error.kind() == ErrorKind::Unsupported,
            _ => false,
        };
        drop(request);
        let mut request = Box::pin(locks.lock("lingering").linger(LINGER).try_acquire());
        let has_nothing = match request.as_mut().poll(&mut context) {
            std::task::Poll::Ready(Err(error)) => error.kind() == ErrorKind::Unsupported,
            _ => false,
        };
        drop(request);
        let holds_nothing = !guard.is_held()
            && guard.check().is_err_and(|error| error.kind() == ErrorKind::Unsupported)
            && guard.heartbeat().is_err_and(|error| error.kind() == ErrorKind::Unsupported)
            && guard.remaining() == Some(std::time::Duration::ZERO);
        // The detached token is invalid, because adopting it would take the hold from the parent.
        let is_invalid = detached.detach().id().as_bytes() == &[0; 16];
        drop((guard, locks));
        // SAFETY: ends the child without the parent's exit handlers.
        unsafe { libc::_exit(if is_rejected && has_nothing && is_invalid && holds_nothing { 0 } else { 1 }) }
    }
    let mut status = 0;
    // SAFETY: waits for the child that was just forked.
    let waited = unsafe { libc::waitpid(child, &mut status, 0) };
    assert_eq!((waited, status), (child, 0), "the child was rejected, and exited at once");
    assert!(guard.is_held() && detached.is_held());
    assert!(runtime.block_on(locks.is_locked("k")).unwrap());
    assert!(runtime.block_on(locks.lock("lingering").linger(LINGER).try_acquire()).unwrap().is_some());
}
