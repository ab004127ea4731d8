//! Checks many releases at once, rows that somebody deletes, and messages that the store did not send.

use super::*;
use crate::ends::{drop_calls, drop_many, number};
use stanchion::LossCause;

#[test]
fn many_dropped_guards_are_released_soon() {
    let server = server();
    block_on(drop_many(&server.url(), number("STANCHION_TEST_GUARDS", 20_000)));
}

#[test]
fn dropped_calls_free_their_keys_soon() {
    let server = server();
    let count = number("STANCHION_TEST_DROPS", 320);
    let longest = block_on(drop_calls(&server.url(), count, "dropped_calls_free_their_keys_soon"));
    assert!(longest < 3 * SECOND, "{longest:?}");
}

#[test]
fn deleted_row_is_a_loss() {
    let server = server();
    block_on(async {
        let locks = locks(&server).await;
        let guard = locks.lock("deleted").await.unwrap();
        server.psql("TRUNCATE stanchion.keys, stanchion.holds");
        until("the hold is lost", async || guard.loss() == Some(LossCause::Missing)).await;
    });
}

#[test]
fn a_forged_grant_is_lost_at_once() {
    let server = server();
    block_on(async {
        let (locks, other) = (locks(&server).await, locks(&server).await);
        let holder = locks.lock("k").await.unwrap();
        let waiting = tokio::spawn(other.lock("k").into_future());
        until("the other handle waits", async || !locks.inspect("k").await.unwrap().waiters.is_empty()).await;
        let token = server.psql("SELECT encode(token, 'hex') FROM stanchion.queue");
        let channel = server.psql("SELECT 'stanchion_' || encode(session, 'hex') FROM stanchion.queue");
        let message = format!("G{}{} :k", token.trim(), 1_u64 << 52);
        server.psql(&format!("SELECT pg_notify('{}', '{message}')", channel.trim()));
        let forged = waiting.await.unwrap().unwrap();
        assert_eq!(forged.fence().get(), 1 << 52, "the waiter accepts the message at first");
        until("the forged hold is lost", async || forged.loss() == Some(LossCause::Missing)).await;
        holder.check().unwrap();
    });
}
