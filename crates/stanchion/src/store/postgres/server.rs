//! Notices that the server behind the URL was replaced. After a failover the earlier connections lead to a server that
//! accepts no writes, or to none, and are not used again.

use crate::store::backoff::{sleep, within};
use std::time::Duration;

use tokio::sync::watch;
use tokio_postgres::Client;

/// Ends the connection if its server accepts no writes, and does nothing otherwise. The statement also ends the
/// connection of a pooler to that server, which the pooler would give to another client.
const END_WITHOUT_WRITES: &str = "SELECT pg_catalog.pg_terminate_backend(pg_catalog.pg_backend_pid()) \
     WHERE pg_catalog.current_setting('transaction_read_only') = 'on'";

/// Time after which a check of a connection counts as failed.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct State {
    /// Raised when the existing connections become useless.
    generation: u64,
    /// The start time of the server of the newest connection, as the server reports it.
    identity: Option<String>,
}

#[derive(Debug)]
pub(super) struct Server(watch::Sender<State>);

impl Server {
    pub(super) fn new() -> Self {
        Self(watch::Sender::new(State::default()))
    }

    /// Returns the generation of a connection that is opened now.
    pub(super) fn generation(&self) -> u64 {
        self.0.borrow().generation
    }

    /// Records the server of a new connection, and returns the generation of the connection. The generation is a new
    /// one if the server is another one than before.
    pub(super) fn reached(&self, identity: &str, begun_in: u64) -> u64 {
        let mut generation = begun_in;
        self.0.send_if_modified(|state| {
            if state.identity.as_deref() == Some(identity) {
                return false;
            }
            if state.identity.replace(identity.to_owned()).is_some() {
                state.generation += 1;
                generation = state.generation;
            }
            true
        });
        generation
    }

    /// Records that the server of a generation no longer accepts writes. Returns whether this was unknown.
    pub(super) fn retire(&self, generation: u64) -> bool {
        self.0.send_if_modified(|state| {
            let is_current = state.generation == generation;
            if is_current {
                *state = State { generation: generation + 1, identity: None };
            }
            is_current
        })
    }

    /// Returns a watch for a long-lived connection that is opened now.
    pub(super) fn watch(&self) -> Watch {
        Watch(self.0.subscribe())
    }
}

#[derive(Debug)]
pub(super) struct Watch(watch::Receiver<State>);

impl Watch {
    /// Waits until another server than this one was reached or this server was retired, since the watch began. Also
    /// ends when the store is dropped.
    pub(super) async fn replaced(&mut self, identity: &str) {
        while self.0.changed().await.is_ok() && self.0.borrow_and_update().identity.as_deref() == Some(identity) {}
    }
}

/// Returns whether the server of a connection accepts writes. If it does not, ends the connection, and waits until the
/// client notices that, because the pool of the client checks the client.
pub(super) async fn accepts_writes(client: &Client) -> bool {
    if matches!(within(CHECK_TIMEOUT, client.batch_execute(END_WITHOUT_WRITES)).await, Some(Ok(()))) {
        return true;
    }
    let noticed = async {
        while !client.is_closed() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    let _ = within(CHECK_TIMEOUT / 10, noticed).await; // A dead link may take longer.
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn another_server_ends_a_generation() {
        let server = Server::new();
        let mut watch = server.watch();
        assert_eq!(server.reached("a", server.generation()), 0);
        assert_eq!(server.reached("a", 0), 0, "the same server");
        assert!(within(Duration::from_millis(10), watch.replaced("a")).await.is_none());
        assert_eq!(server.reached("b", 0), 1);
        watch.replaced("a").await;
        assert!(within(Duration::from_millis(10), watch.replaced("b")).await.is_none());
        assert!(!server.retire(0), "an error of an earlier connection changes nothing");
        assert!(server.retire(1) && !server.retire(1));
        watch.replaced("b").await;
        assert_eq!(server.reached("b", 1), 1, "a connection that was begun before the server was retired is old");
        assert_eq!(server.generation(), 2);
        drop(server);
        watch.replaced("b").await;
    }
}
