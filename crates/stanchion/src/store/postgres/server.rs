//! The server that connections lead to. After a failover the connections from before lead to a server that takes no writes, or
//! to none, and are not used again.

use std::time::Duration;

use tokio::sync::watch;
use tokio_postgres::Client;

use super::connect::{sleep, within};

/// Ends a connection at a server that takes no writes, and does nothing elsewhere. It reaches the server behind a pooler too,
/// whose connection would be given to somebody else.
const END_WITHOUT_WRITES: &str = "SELECT pg_catalog.pg_terminate_backend(pg_catalog.pg_backend_pid()) \
     WHERE pg_catalog.current_setting('transaction_read_only') = 'on'";

/// Time after which a question about a connection counts as not answered.
const ANSWERED_WITHIN: Duration = Duration::from_secs(1);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct State {
    /// Raised when the connections that there are become useless.
    generation: u64,
    /// When the server that the newest connection leads to was started, as the server says it.
    identity: Option<String>,
}

#[derive(Debug)]
pub(super) struct Server(watch::Sender<State>);

impl Server {
    pub(super) fn new() -> Self {
        Self(watch::Sender::new(State::default()))
    }

    /// The generation of a connection that is begun now.
    pub(super) fn generation(&self) -> u64 {
        self.0.borrow().generation
    }

    /// A connection was made. Returns its generation: a new one, if it leads to another server than those before.
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

    /// The server of this generation takes no writes any more. Returns whether that is news.
    pub(super) fn left(&self, generation: u64) -> bool {
        self.0.send_if_modified(|state| {
            let is_news = state.generation == generation;
            if is_news {
                *state = State { generation: generation + 1, identity: None };
            }
            is_news
        })
    }

    /// Tells a connection that is begun now and lives long when its server was left.
    pub(super) fn watch(&self) -> Watch {
        Watch(self.0.subscribe())
    }
}

#[derive(Debug)]
pub(super) struct Watch(watch::Receiver<State>);

impl Watch {
    /// Ends when, after this watch began, another server than this one was reached, or its server was left. Ends too when the
    /// store is dropped.
    pub(super) async fn left(&mut self, identity: &str) {
        while self.0.changed().await.is_ok() && self.0.borrow_and_update().identity.as_deref() == Some(identity) {}
    }
}

/// Asks a connection whether its server takes writes. Otherwise the connection is ended, and this waits until that was noticed:
/// a pool looks at that.
pub(super) async fn takes_writes(client: &Client) -> bool {
    if matches!(within(ANSWERED_WITHIN, client.batch_execute(END_WITHOUT_WRITES)).await, Some(Ok(()))) {
        return true;
    }
    let noticed = async {
        while !client.is_closed() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    let _silent = within(ANSWERED_WITHIN / 10, noticed).await;
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
        assert!(within(Duration::from_millis(10), watch.left("a")).await.is_none());
        assert_eq!(server.reached("b", 0), 1);
        watch.left("a").await;
        assert!(within(Duration::from_millis(10), watch.left("b")).await.is_none());
        assert!(!server.left(0), "a fault of a connection from before says nothing new");
        assert!(server.left(1) && !server.left(1));
        watch.left("b").await;
        assert_eq!(server.reached("b", 1), 1, "a connection that was begun before it was left is old");
        assert_eq!(server.generation(), 2);
        drop(server);
        watch.left("b").await;
    }
}
