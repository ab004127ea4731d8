//! Defines the body of a response, which can hold the lock until it has ended.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use crate::error::{Error, ErrorKind, LossCause};
use crate::guard::Guard;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

pin_project! {
    /// The body of a response from a [`LockLayer`](super::LockLayer).
    ///
    /// With [`hold_while_body`](super::LockLayer::hold_while_body) it holds the lock until it has ended.
    pub struct LockedBody<B> {
        #[pin]
        body: B,
        // It owns the guard, so dropping it releases the lock.
        lost: Option<Pin<Box<dyn Future<Output = LossCause> + Send>>>,
        // The body has reported the loss, which ends it.
        is_over: bool,
    }
}

impl<B> LockedBody<B> {
    pub(super) fn free(body: B) -> Self {
        Self { body, lost: None, is_over: false }
    }

    pub(super) fn holding(body: B, guard: Arc<Guard>) -> Self {
        Self { body, lost: Some(Box::pin(async move { guard.lost().await })), is_over: false }
    }
}

impl<B: fmt::Debug> fmt::Debug for LockedBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockedBody").field("body", &self.body).field("is_locked", &self.lost.is_some()).finish()
    }
}

impl<B: Body> Body for LockedBody<B>
where
    B::Error: Into<BoxError>,
{
    type Data = B::Data;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, BoxError>>> {
        let mut this = self.project();
        if *this.is_over {
            return Poll::Ready(None);
        }
        if let Some(lost) = this.lost
            && let Poll::Ready(cause) = lost.as_mut().poll(context)
        {
            (*this.lost, *this.is_over) = (None, true);
            let message = format!("the lock was lost while the response was sent: {cause}");
            return Poll::Ready(Some(Err(Error::new(ErrorKind::Lost(cause), message).into())));
        }
        let frame = ready!(this.body.as_mut().poll_frame(context));
        if !matches!(frame, Some(Ok(_))) || this.body.is_end_stream() {
            *this.lost = None;
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.is_over || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.is_over { SizeHint::with_exact(0) } else { self.body.size_hint() }
    }
}
