//! Borrows connections from a pool that belongs to the user.

use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;

use tokio::runtime::Handle;
use tokio_postgres::Client;

use super::error::error;
use crate::error::{ErrorKind, Result};

/// A connection of the user's pool. Dropping it returns the connection to the pool.
pub(super) trait Borrowed: Send + Sync {
    fn client(&self) -> &Client;
}

struct Connection<C, A> {
    of_pool: C,
    client: std::sync::Arc<A>,
}

impl<C: Send + Sync, A: for<'a> Fn(&'a C) -> &'a Client + Send + Sync> Borrowed for Connection<C, A> {
    fn client(&self) -> &Client {
        (self.client)(&self.of_pool)
    }
}

type Getting = Pin<Box<dyn Future<Output = Result<Box<dyn Borrowed>>> + Send>>;

/// A pool that belongs to the user.
pub(super) struct UsersPool {
    get: Box<dyn Fn() -> Getting + Send + Sync>,
    /// The runtime in which the pool opens its connections, even for a task of another runtime.
    runtime: Handle,
}

impl fmt::Debug for UsersPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UsersPool")
    }
}

impl UsersPool {
    pub(super) fn new<C, E, F>(
        get: impl Fn() -> F + Send + Sync + 'static,
        client: impl for<'a> Fn(&'a C) -> &'a Client + Send + Sync + 'static,
    ) -> Result<Self>
    where
        C: Send + Sync + 'static,
        E: fmt::Display,
        F: Future<Output = std::result::Result<C, E>> + Send + 'static,
    {
        let runtime = Handle::try_current()
            .map_err(|_| error(ErrorKind::InvalidArgument, "call `from_pool` inside the Tokio runtime of the pool"))?;
        let client = std::sync::Arc::new(client);
        let get = move || -> Getting {
            let (getting, client) = (get(), client.clone());
            Box::pin(async move {
                let of_pool = getting.await.map_err(|fault| {
                    error(ErrorKind::Unavailable, format!("the pool returned no connection: {fault}")).in_doubt(false)
                })?;
                Ok(Box::new(Connection { of_pool, client }) as Box<dyn Borrowed>)
            })
        };
        Ok(Self { get: Box::new(get), runtime })
    }

    pub(super) async fn connection(&self) -> Result<Box<dyn Borrowed>> {
        let mut getting = (self.get)();
        poll_fn(|context| {
            let _entered = self.runtime.enter();
            getting.as_mut().poll(context)
        })
        .await
    }
}
